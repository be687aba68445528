"""From a picture to the model's input: resize, crop, scale, normalise, with Pillow and NumPy only.

In: a path, PIL picture, array or tensor, and a `Preprocess` recipe. Out: a float32 tensor
`[1, C, H, W]` on the CPU. A crop mode is a function of (source, recipe): the source is an upright
PIL picture or an array `[H, W, C]`, the result is one band per channel at the input size. A new
mode is one more entry in `CROP_MODES`. A band is one channel as a PIL picture,
"L" for bytes or "F" for floats in 0..1.
"""

from __future__ import annotations

import errno
import math
import os
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO, Union

import torch
from torch import Tensor

from natcupy.zoo.config import ModelConfig

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
INTERPOLATIONS = ("bicubic", "bilinear", "nearest", "lanczos", "box", "hamming")
MAX_RESIZED_PIXELS = 100_000_000  # a very long picture would otherwise grow without bound
# Formats that Pillow hands to a program or library outside it: EPS to Ghostscript, for one.
OUTSIDE_FORMATS = ("EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG")
# By EXIF orientation: Pillow's name of the transposition that turns a picture upright.
TURNS = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}
ORIENTATION_KEYS = ("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp")  # in `info`
LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, as Pillow's conversion to grey

# natcupy.data, which tells why pictures are left out, and the command line say the same.
MISSING = "there is no such file"
UNKNOWN = "this is not a picture in a format that Pillow knows"

Bands = list["Image.Image"]
Source = Union["Image.Image", "np.ndarray"]


@dataclass(frozen=True)
class Preprocess:
    """A recipe; calling it on a picture gives `[1, C, H, W]`.

    Attributes:
        input_size: channels, height, width of the result.
        crop_pct: crop over resized picture; 0.875 resizes to 256 for a crop of 224.
        interpolation: one of `INTERPOLATIONS`, Pillow's filters.
        mean, std: per channel, for values in 0..1. One value, or another number of values than
            channels, stands for all channels by its average.
        crop_mode: "center" resizes the shorter side to floor(size / crop_pct) and crops the centre;
            "squash" resizes both sides to the input size; "ink" finds one drawing on an even ground
            and frames it, bright on black.
    """

    input_size: tuple[int, int, int] = (3, 224, 224)
    crop_pct: float = 0.875
    interpolation: str = "bicubic"
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    crop_mode: str = "center"

    def __post_init__(self) -> None:
        size = self.input_size
        if not isinstance(size, list | tuple) or len(size) != 3 or not all(map(_is_side, size)):
            raise ValueError(f"input_size must be three ints in 1..8192, got {size!r}.")
        if not _is_number(self.crop_pct) or not 0.01 <= self.crop_pct <= 1:
            raise ValueError(f"crop_pct must be in 0.01..1, got {self.crop_pct!r}.")
        for name, known in (("interpolation", INTERPOLATIONS), ("crop_mode", tuple(CROP_MODES))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {known}, got {getattr(self, name)!r}.")
        object.__setattr__(self, "input_size", tuple(size))
        for name in ("mean", "std"):
            values = _per_channel(name, getattr(self, name), size[0])
            object.__setattr__(self, name, values)
        if min(self.std) <= 0:
            raise ValueError(f"std must be above 0, got {self.std}.")

    @classmethod
    def from_pretrained_cfg(cls, cfg: dict[str, Any], config: ModelConfig) -> Preprocess:
        """The recipe in a model's `pretrained_cfg`, with the channels and side of its config."""
        _, height, width = cfg["input_size"]
        if config.img_size is not None:
            height = width = config.img_size
        names = ("crop_pct", "interpolation", "mean", "std", "crop_mode")
        rest = {name: cfg[name] for name in names if name in cfg}
        return cls((config.in_chans, height, width), **rest)

    def __call__(self, image: Any) -> Tensor:
        """One picture to `[1, C, H, W]`, float32, on the CPU.

        Args:
            image: a path, a PIL picture, a NumPy array `[H, W]` or `[H, W, C]`, or a tensor
                `[C, H, W]`, `[H, W, C]` or `[H, W]`; uint8, or floats in 0..1. A picture's EXIF
                orientation is applied. Colour and grey are converted to what the model takes.

        Raises TypeError for other kinds, ValueError for other shapes and values, OSError for files
        that are missing or no picture.
        """
        import numpy as np

        source = _opened(image, self.input_size[0])
        bands = CROP_MODES[self.crop_mode](source, self)
        planes = [np.asarray(band, dtype=np.float32) for band in bands]
        scaled = [
            plane / 255 if band.mode == "L" else plane.clip(0, 1)
            for plane, band in zip(planes, bands, strict=True)
        ]
        pixels = torch.from_numpy(np.stack(scaled))
        # Their dtype given: torch's default may be another one.
        mean, std = (
            torch.tensor(v, device="cpu", dtype=torch.float32)[:, None, None]
            for v in (self.mean, self.std)
        )
        return ((pixels - mean) / std).unsqueeze(0)


# -- crop modes ---------------------------------------------------------------------------------


def _center(source: Source, recipe: Preprocess) -> Bands:
    """Resize so that the shorter side is floor(size / crop_pct), then cut out the middle."""
    channels, height, width = recipe.input_size
    bands = _bands(source, channels)
    resized = _cover(bands[0].size, recipe)
    left = round((resized[0] - width) / 2)
    top = round((resized[1] - height) / 2)
    box = (left, top, left + width, top + height)
    return [band.crop(box) for band in _resize(bands, resized, recipe.interpolation)]


def _squash(source: Source, recipe: Preprocess) -> Bands:
    """Resize to the input size whatever the picture's shape."""
    channels, height, width = recipe.input_size
    return _resize(_bands(source, channels), (width, height), recipe.interpolation)


def _ink(source: Source, recipe: Preprocess) -> Bands:
    """Find the drawing, in whatever colours, and frame it; every channel gets the same."""
    from natcupy.zoo.ink import ink

    channels, *size = recipe.input_size
    return [ink(_picture(source), tuple(size))] * channels


CROP_MODES: dict[str, Callable[[Source, Preprocess], Bands]] = {
    "center": _center,
    "squash": _squash,
    "ink": _ink,
}


def _cover(size: tuple[int, int], recipe: Preprocess) -> tuple[int, int]:
    """(width, height) of the smallest picture of this shape that covers floor(size / crop_pct)."""
    width, height = size
    _, *target = (math.floor(side / recipe.crop_pct) for side in recipe.input_size)
    # The side that needs the larger scale gets its target exactly, the other is cut to an int.
    if target[0] * width >= target[1] * height:
        resized = (max(target[0] * width // height, target[1]), target[0])
    else:
        resized = (target[1], max(target[1] * height // width, target[0]))
    if resized[0] * resized[1] > MAX_RESIZED_PIXELS:
        raise ValueError(
            f"a picture of {width} x {height} pixels would be resized to {resized[0]} x "
            f"{resized[1]}, more than {MAX_RESIZED_PIXELS:,} pixels; crop it first."
        )
    return resized


def _resize(bands: Bands, size: tuple[int, int], interpolation: str) -> Bands:
    from PIL import Image

    filter_ = Image.Resampling[interpolation.upper()]
    return [band if band.size == size else band.resize(size, filter_) for band in bands]


# -- from any kind of picture to bands ------------------------------------------------------------


class PictureError(OSError):
    """A file that is no picture; its text is in words, without the system's number."""

    def __str__(self) -> str:
        if self.filename is None:  # raised anew with its text alone, as by torch's data loaders
            return super().__str__()
        return f"{self.filename}: {self.strerror}."


class MissingPictureError(PictureError, FileNotFoundError):
    """A picture's path that leads nowhere."""


def open_picture(file: str | os.PathLike[str] | BinaryIO) -> Image.Image:
    """A picture from a path or open file, decoded and turned as its EXIF orientation says.

    Of an animation, the first frame. Raises MissingPictureError (a FileNotFoundError), PictureError
    (an OSError) for what is empty, not an ordinary file or broken, and Pillow's
    UnidentifiedImageError (also an OSError) for no picture; all name the path. Broken is what
    Pillow, whose own error is the cause, could not decode, or takes for a decompression bomb. Of an
    open file, whatever Pillow raises.
    """
    from PIL import Image, UnidentifiedImageError

    if isinstance(file, str | os.PathLike):
        _check_file(os.fspath(file))
    Image.init()
    formats = [name for name in Image.OPEN if name not in OUTSIDE_FORMATS]
    try:
        with Image.open(file, formats=formats) as opened:
            return _upright(opened)
    except UnidentifiedImageError:
        if not isinstance(file, str | os.PathLike):
            raise
        raise UnidentifiedImageError(f"{os.fspath(file)}: {UNKNOWN}.") from None
    except (MemoryError, TimeoutError):  # what a handler of an alarm raises is no picture's fault
        raise
    except Exception as error:  # decoders raise nearly anything for broken data, and name no file
        named = getattr(error, "filename", None) is not None
        if named or not isinstance(file, str | os.PathLike):
            raise
        reason = getattr(error, "strerror", None) or " ".join(str(error).split()).rstrip(".")
        number = getattr(error, "errno", None) or errno.EINVAL
        raise PictureError(number, reason or type(error).__name__, os.fspath(file)) from error


def _upright(image: Image.Image) -> Image.Image:
    """A copy, turned as the EXIF orientation says, that no longer says so.

    Unlike Pillow's `exif_transpose`, which writes the whole block anew and fails where any of it is
    damaged; orientation is all that is needed here.
    """
    from PIL import Image

    image.load()
    turn = TURNS.get(_orientation(image))
    upright = image.transpose(Image.Transpose[turn]) if turn else image.copy()
    for key in ORIENTATION_KEYS:
        upright.info.pop(key, None)
    return upright


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1, upright, where none can be read."""
    try:
        return int(image.getexif().get(0x0112, 1))
    except Exception:  # a damaged block raises nearly anything, and says nothing of the pixels
        return 1


def _check_file(path: str) -> None:
    """Look before opening: a named pipe would wait for ever."""
    try:
        found = os.stat(path)
    except FileNotFoundError:
        raise MissingPictureError(errno.ENOENT, MISSING, path) from None
    if not stat.S_ISREG(found.st_mode):
        raise PictureError(errno.EINVAL, "this is not an ordinary file", path)
    if not found.st_size:
        raise PictureError(errno.EINVAL, "this file is empty (0 bytes)", path)


def plain(image: Image.Image) -> Image.Image:
    """A picture of any mode as "L" (what is grey) or "RGB": the bytes a recipe would work on.

    As in a recipe, transparency is left out and 16 bits of grey are scaled to 8.
    """
    import numpy as np
    from PIL import Image

    grey = image.mode in ("1", "L", "LA", "La") or image.mode.startswith(("I", "F"))
    bands = _bands(image, 1 if grey else 3)
    if bands[0].mode == "F":
        values = (np.asarray(band).clip(0, 1) * 255 for band in bands)
        bands = [Image.fromarray(value.round().astype(np.uint8)) for value in values]
    return bands[0] if grey else Image.merge("RGB", bands)


def _opened(image: Any, channels: int) -> Source:
    """An upright PIL picture, or an array `[H, W, C]` of uint8 or float32 in 0..1."""
    import numpy as np
    from PIL import Image

    if isinstance(image, str | os.PathLike):
        return open_picture(image)
    if isinstance(image, Image.Image):
        return _upright(image)
    if isinstance(image, Tensor):
        return _checked_array(_channels_last(image.detach().cpu(), channels))
    if isinstance(image, np.ndarray):
        return _checked_array(image)
    raise TypeError(
        f"a picture must be a path, a PIL picture, a NumPy array or a tensor, got "
        f"{type(image).__name__}."
    )


def _bands(source: Source, channels: int) -> Bands:
    """One band per channel that the model takes."""
    import numpy as np
    from PIL import Image

    if isinstance(source, Image.Image):
        if not source.mode.startswith(("I", "F")):
            if source.mode == "P":  # by way of RGBA, since its transparency may be a table
                source = source.convert("RGBA")
            wanted = {1: "L", 4: "RGBA"}.get(channels, "RGB")
            return _match_channels(list(source.convert(wanted).split()), channels)
        # 16 bits of grey, which Pillow's own conversion would clip; or floats
        scale = 65535 if source.mode.startswith("I") else 1
        source = _checked_array(np.asarray(source, dtype=np.float32) / scale)
    planes = np.moveaxis(source, -1, 0)
    bands = [Image.fromarray(np.ascontiguousarray(plane)) for plane in planes]
    return _match_channels(bands, channels)


def _picture(source: Source) -> Image.Image:
    """One PIL picture, in bytes if it comes from an array."""
    import numpy as np
    from PIL import Image

    if isinstance(source, Image.Image):
        return source
    if source.dtype != np.uint8:
        source = (source.clip(0, 1) * 255).round().astype(np.uint8)
    modes = {1: source[..., 0], 3: source, 4: source}
    if source.shape[-1] not in modes:
        raise ValueError(
            f"a picture with a drawing must have 1, 3 or 4 channels, got {source.shape[-1]}."
        )
    return Image.fromarray(np.ascontiguousarray(modes[source.shape[-1]]))


def _channels_last(tensor: Tensor, channels: int) -> np.ndarray:
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.float()
    if tensor.dim() == 3 and tensor.shape[0] in {1, 3, 4, channels}:
        tensor = tensor.movedim(0, -1)
    return tensor.numpy()


def _checked_array(array: np.ndarray) -> np.ndarray:
    """`[H, W, C]`, uint8 or float32 in 0..1."""
    import numpy as np

    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or 0 in array.shape:
        raise ValueError(
            f"a picture must be [H, W] or [H, W, C] (a tensor may be [C, H, W]) and not empty, "
            f"got shape {array.shape}."
        )
    if array.dtype == bool:
        return array.astype(np.uint8) * 255
    return array if array.dtype == np.uint8 else _unit_floats(array)


def _unit_floats(array: np.ndarray) -> np.ndarray:
    import numpy as np

    if not np.issubdtype(array.dtype, np.floating):
        raise TypeError(f"a picture must be uint8 or floats in 0..1, got {array.dtype}.")
    low, high = array.min(), array.max()
    if not (low >= -1e-3 and high <= 1 + 1e-3):  # also false for NaN
        raise ValueError(
            f"floating-point pictures must hold values in 0..1, got {low:.4g} to {high:.4g}; "
            f"divide by 255 or pass uint8."
        )
    return array.astype(np.float32)


def _match_channels(bands: Bands, channels: int) -> Bands:
    """Grey to colour, colour to grey, and without transparency; other numbers must agree."""
    if len(bands) == channels:
        return bands
    if len(bands) in (2, 4) and channels in (1, 3):  # the last band is transparency
        return _match_channels(bands[:-1], channels)
    if len(bands) == 1 and channels == 3:
        return bands * 3
    if len(bands) == 3 and channels == 1:
        return [_grey(bands)]
    raise ValueError(
        f"the picture must have {channels} channels like the model, got {len(bands)} channels."
    )


def _grey(bands: Bands) -> Image.Image:
    import numpy as np
    from PIL import Image

    if bands[0].mode == "L":
        return Image.merge("RGB", bands).convert("L")
    planes = (weight * np.asarray(band) for weight, band in zip(LUMA, bands, strict=True))
    return Image.fromarray(np.asarray(sum(planes), dtype=np.float32))


# -- checks -------------------------------------------------------------------------------------


def _is_side(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 8192


def _is_number(value: object) -> bool:
    fits = isinstance(value, int | float) and not isinstance(value, bool)
    return fits and math.isfinite(value)


def _per_channel(name: str, values: Sequence[float], channels: int) -> tuple[float, ...]:
    if not isinstance(values, list | tuple) or not values or not all(map(_is_number, values)):
        raise ValueError(f"{name} must be a list of finite numbers, got {values!r}.")
    if len(values) == channels:
        return tuple(map(float, values))
    return (math.fsum(values) / len(values),) * channels
