"""Pictures: an image processor that prepares them as natcupy does, number for number.

In: a preprocessor_config.json and pictures. Out: `pixel_values`.

Two vocabularies say how a picture is shaped: natcupy's (input_size, crop_pct, crop_mode) says it
exactly, transformers' (size, crop_size, do_center_crop) is what users change. As long as they say
the same, natcupy's recipe runs; once they differ, transformers' words and its order of steps do.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor, get_size_dict
from transformers.image_utils import ChannelDimension
from transformers.processing_utils import ImagesKwargs

from natcupy.hub.preprocessor import parse_preprocessor
from natcupy.zoo import Preprocess
from natcupy.zoo.preprocess import _opened

_EXACT = ("input_size", "crop_pct", "crop_mode")
_WORDS = frozenset(ImagesKwargs.__annotations__) | {*_EXACT}
_SWITCHES = ("do_resize", "do_center_crop", "do_rescale", "do_normalize")
_LEVELS = {"I": 65535, "F": 1}  # what stands for 1.0, by the first letter of Pillow's mode


class NatcupyImageProcessor(BaseImageProcessor):
    """Pictures as `model.preprocess` of natcupy makes them, number for number, unless told else.

    What transformers' image processors take can be given to `from_pretrained`, set as an attribute
    or given with a call: size, crop_size, resample, image_mean, image_std, rescale_factor and the
    switches do_resize, do_center_crop, do_rescale, do_normalize; natcupy's own input_size,
    crop_pct and crop_mode, too. An int as `size` is the shorter side where pictures are cropped,
    and a crop larger than the picture is filled up with zeros. Floats in 0..1 are taken as scaled,
    and all pictures get the channels of the model.
    """

    model_input_names = ["pixel_values"]  # noqa: RUF012  (as transformers declares it)
    do_resize = do_rescale = do_normalize = True
    default_to_square = None  # by do_center_crop

    def __init__(self, **words: Any) -> None:
        words = {name: value for name, value in words.items() if value is not None}
        known = {name: words[name] for name in _EXACT if name in words}
        if len(known) == len(_EXACT):
            words = {**_shape_words(Preprocess(**known)), **words}
        else:  # not natcupy's file: as natcupy reads such a one
            words = {**words, **_shape_words(Preprocess(**{**_foreign_shape(words), **known}))}
        super().__init__(**{name: words[name] for name in words if name not in _EXACT})
        self.__dict__.update({name: words[name] for name in _EXACT})

    def __setattr__(self, name: str, value: Any) -> None:
        """Keep a word; one of natcupy's brings transformers' words for the same shape along."""
        if name in _EXACT:
            self.__dict__.update(_shape_words(replace(self.recipe(), **{name: value})))
        else:
            super().__setattr__(name, value)

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The processor of a file's words, changed by the words among `kwargs`."""
        changes = {name: kwargs.pop(name) for name in _WORDS & kwargs.keys()}
        made = super().from_dict(image_processor_dict, **kwargs)
        _change(made[0] if isinstance(made, tuple) else made, changes)
        return made

    def recipe(self) -> Preprocess:
        """natcupy's recipe: its words for the shape, and the filter, mean and std."""
        values = {name: self.__dict__[name] for name in _EXACT}
        for theirs, ours in (("image_mean", "mean"), ("image_std", "std")):
            if (numbers := getattr(self, theirs, None)) is not None:
                values[ours] = numbers if isinstance(numbers, list | tuple) else (numbers,)
        if getattr(self, "resample", None) is not None:
            values["interpolation"] = _filter(self.resample)
        return Preprocess(**values)

    def preprocess(self, images: Any, return_tensors: Any = None, **kwargs: Any) -> BatchFeature:
        """Pictures to `pixel_values` `[B, C, H, W]`.

        Args:
            images: a path, a PIL picture, an array or a tensor; a list of them, or a batch with
                four axes.
            return_tensors: "pt", "np" or None for a list.
            **kwargs: words of the class's docstring, for this call alone; data_format,
                input_data_format and device as in transformers.

        Raises TypeError for an unknown word, ValueError for a value that cannot be had.
        """
        unknown = sorted(kwargs.keys() - _WORDS)
        if unknown:
            raise TypeError(
                f"an image processor takes {', '.join(sorted(_WORDS))}; got {', '.join(unknown)}. "
                "Leave it out."
            )
        now = copy.copy(self)
        _change(now, kwargs)
        steps = _steps(now)
        channels, layout = steps.recipe.input_size[0], getattr(now, "input_data_format", None)
        pictures = (_channels_last(picture, layout, channels) for picture in _pictures(images))
        pixels = [_delivered(steps(picture), now) for picture in pictures]
        return BatchFeature({"pixel_values": pixels}, tensor_type=return_tensors)


@dataclass(frozen=True)
class _Steps:
    """What is done to a picture, in transformers' order; calling it gives `[C, H, W]`.

    Attributes:
        recipe: natcupy's; of its steps only the shape's are used as they are, where `exact`.
        exact: the recipe says the shape.
        size: what a picture is resized to otherwise, None for nothing.
        crop: (height, width) that is cut out of its middle otherwise, None for nothing.
        factor: what the picture's own values are multiplied by, None for nothing.
        normalize: whether mean and std are applied.
    """

    recipe: Preprocess
    exact: bool
    size: Mapping[str, int] | None
    crop: tuple[int, int] | None
    factor: float | None
    normalize: bool

    def __call__(self, image: Any) -> Tensor:
        source = _opened(image, self.recipe.input_size[0])
        pixels = self._shaped(source)
        scale = self._scale(source)
        if scale != 1:
            pixels = pixels * scale
        if self.normalize:
            mean, std = (
                torch.tensor(values, device="cpu", dtype=torch.float32)[:, None, None]
                for values in (self.recipe.mean, self.recipe.std)
            )
            pixels = (pixels - mean) / std
        return pixels

    def _shaped(self, source: Any) -> Tensor:
        """`[C, H, W]` with values in 0..1."""
        recipe = replace(self.recipe, mean=(0.0,), std=(1.0,))
        if not self.exact:
            mode = "ink" if self.size and recipe.crop_mode == "ink" else "squash"
            sides = _resized(_height_width(source), self.size)
            recipe = replace(recipe, input_size=(recipe.input_size[0], *sides), crop_mode=mode)
        pixels = recipe(source)[0]
        return pixels if self.exact or self.crop is None else _cropped(pixels, *self.crop)

    def _scale(self, source: Any) -> float:
        """From 0..1 to the picture's own values, times the factor for them.

        Floats stand for bytes that are divided by 255 already.
        """
        if self.factor is not None:
            scale = self.factor * 255
            return 1 if math.isclose(scale, 1) else scale
        if hasattr(source, "mode"):
            return _LEVELS.get(source.mode[0], 255)
        return 255 if source.dtype.kind == "u" else 1


# ---------------------------------------------------------------- from words to steps


def _change(processor: NatcupyImageProcessor, words: Mapping[str, Any]) -> None:
    """Set the words given; natcupy's last, since they bring the others along."""
    for name in sorted(words, key=_EXACT.__contains__):
        if words[name] is not None:
            setattr(processor, name, words[name])


def _steps(processor: NatcupyImageProcessor) -> _Steps:
    _check_wishes(processor)
    recipe = processor.recipe()
    names = ("size", "crop_size", "do_center_crop", "default_to_square")
    size, crop = stated = _shape({name: getattr(processor, name, None) for name in names})
    return _Steps(
        recipe=recipe,
        exact=processor.do_resize and stated == _shape(_shape_words(recipe)),
        size=size if processor.do_resize else None,
        crop=crop,
        factor=processor.rescale_factor if processor.do_rescale else None,
        normalize=processor.do_normalize,
    )


def _check_wishes(processor: NatcupyImageProcessor) -> None:
    """Raise for what cannot be had, which must not be lost in silence."""
    for name in _SWITCHES:
        if not isinstance(getattr(processor, name), bool):
            raise ValueError(f"{name} must be True or False, got {getattr(processor, name)!r}.")
    if getattr(processor, "do_pad", None):
        raise ValueError(
            "do_pad must be left out: pictures are not filled up to each other's size, got "
            f"{processor.do_pad!r}. Resize or crop them to one size."
        )
    factor = processor.rescale_factor
    if processor.do_rescale and not (isinstance(factor, int | float) and math.isfinite(factor)):
        raise ValueError(f"rescale_factor must be a finite number, got {factor!r}.")


def _foreign_shape(words: Mapping[str, Any]) -> dict[str, Any]:
    """natcupy's words for the shape that another processor's file says."""
    names = ("size", "crop_size", "do_center_crop")
    values = {name: words[name] for name in names if name in words}
    cfg = parse_preprocessor(json.dumps(values, default=dict).encode(), "preprocessor_config.json")
    return {name: cfg[name] for name in _EXACT if name in cfg}


def _shape_words(recipe: Preprocess) -> dict[str, Any]:
    """A recipe's shape in both vocabularies, as natcupy's preprocessor_config.json has it."""
    _, height, width = recipe.input_size
    whole = {"height": height, "width": width}
    words = {name: getattr(recipe, name) for name in _EXACT}
    if recipe.crop_mode != "center":
        return {**words, "size": whole, "do_center_crop": False}
    shorter = {"shortest_edge": math.floor(min(height, width) / recipe.crop_pct)}
    return {**words, "size": shorter, "do_center_crop": True, "crop_size": whole}


def _shape(words: Mapping[str, Any]) -> tuple[dict[str, int], tuple[int, int] | None]:
    """transformers' words for the shape: what is resized to, and (height, width) of the crop."""
    square = words.get("default_to_square")
    crops = bool(words["do_center_crop"])
    size = _sides("size", words["size"], (not crops) if square is None else square)
    if not crops:
        return size, None
    crop = _sides("crop_size", words.get("crop_size"), True)
    if crop.keys() != {"height", "width"}:
        raise ValueError(f"crop_size must have a height and a width, got {words['crop_size']!r}.")
    return size, (crop["height"], crop["width"])


def _sides(name: str, value: Any, square: bool) -> dict[str, int]:
    """A size in any of transformers' spellings, as a dict."""
    given = value
    if value is not None and not isinstance(value, int | list | tuple):
        value = {key: side for key, side in dict(value).items() if side is not None}
    try:
        sides = get_size_dict(value, default_to_square=square, param_name=name)
    except (TypeError, ValueError):
        sides = {}
    known = sides.keys() in ({"height", "width"}, {"shortest_edge"})
    if not known or not all(isinstance(side, int) and side >= 1 for side in sides.values()):
        raise ValueError(
            f"{name} must be an int from 1, (height, width), or a dict with height and width or "
            f"shortest_edge, got {given!r}."
        )
    return sides


def _filter(resample: Any) -> str:
    """The name of a filter that is given by name, number or enumeration."""
    from PIL import Image

    value = getattr(resample, "value", resample)
    return Image.Resampling(value).name.lower() if isinstance(value, int) else value


# ---------------------------------------------------------------- pictures in and out


def _pictures(images: Any) -> list[Any]:
    """Single pictures out of a picture, a batch with four axes, or lists of them."""
    if isinstance(images, list | tuple):
        return [picture for each in images for picture in _pictures(each)]
    return list(images) if getattr(images, "ndim", None) == 4 else [images]


def _channels_last(image: Any, layout: Any, channels: int) -> Any:
    """An array's or tensor's channels put last; where no layout is said, if only that fits."""
    import numpy as np

    if not isinstance(image, Tensor | np.ndarray) or image.ndim != 3:
        return image
    if layout is None and isinstance(image, Tensor):
        return image  # natcupy's recipe tells tensors itself
    colours = {1, 3, 4, channels}
    first = image.shape[0] in colours and image.shape[2] not in {2, *colours}
    if layout is not None:
        first = ChannelDimension(layout) is ChannelDimension.FIRST
    if isinstance(image, Tensor):
        image = image.detach().cpu()
        image = (image.float() if image.dtype == torch.bfloat16 else image).numpy()
    return np.moveaxis(image, 0, -1) if first else image


def _height_width(source: Any) -> tuple[int, int]:
    return source.size[::-1] if hasattr(source, "mode") else source.shape[:2]


def _resized(sides: tuple[int, int], size: Mapping[str, int] | None) -> tuple[int, int]:
    """(height, width) of a picture after resizing to `size`."""
    if size is None:
        return sides
    if "shortest_edge" not in size:
        return size["height"], size["width"]
    return tuple(size["shortest_edge"] * side // min(sides) for side in sides)


def _cropped(pixels: Tensor, height: int, width: int) -> Tensor:
    """The middle of `[C, H, W]`, with zeros around it where it is too small."""
    high, wide = (have - want for have, want in zip(pixels.shape[1:], (height, width), strict=True))
    top, left = int(high / 2), int(wide / 2)
    return F.pad(pixels, (-left, left - wide, -top, top - high))


def _delivered(pixels: Tensor, processor: NatcupyImageProcessor) -> Tensor:
    """On the device and with the axes that are wished for."""
    layout = ChannelDimension(getattr(processor, "data_format", None) or ChannelDimension.FIRST)
    pixels = pixels.to(getattr(processor, "device", None))
    return pixels.permute(1, 2, 0) if layout is ChannelDimension.LAST else pixels
