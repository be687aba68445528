"""A training picture: cropped, mirrored, changed a little, normalised. Pillow and torch alone.

In: a PIL picture as it is stored, and a model's `Preprocess` recipe. Out: a float32 tensor
`[C, H, W]`. Drawings (crop mode "ink") are framed as always and only turned and shifted a little.
What timm has beyond this comes from `timm_parts` if the config wants it.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from natcupy.train import timm_parts
from natcupy.train.config import TrainConfig
from natcupy.zoo.config import ConfigError
from natcupy.zoo.preprocess import CROP_MODES, Preprocess, _bands, plain

LUMA = torch.tensor([0.299, 0.587, 0.114])[:, None, None]  # ITU-R 601
ATTEMPTS = 10


class Augment:
    """From a PIL picture to a training item; draws from torch's generator.

    Args:
        recipe: how the model's pictures are made otherwise.
        config: what to vary, and how much.

    Raises ConfigError for variations that this model's pictures cannot have.
    """

    takes_stored = True  # since drawings may be drawn on a transparent ground

    def __init__(self, recipe: Preprocess, config: TrainConfig) -> None:
        self.recipe, self.config = recipe, config
        drawn = recipe.crop_mode == "ink"
        if recipe.input_size[0] not in (1, 3, 4) and not drawn:
            raise ConfigError(
                f"a model that is trained on pictures must take 1, 3 or 4 channels (grey, RGB, "
                f"RGBA), got {recipe.input_size[0]}. Build it with another in_chans."
            )
        self.flip = (0.0 if drawn else 0.5) if config.flip is None else config.flip
        self.affine = (0.05 if drawn else 0.0) if config.affine is None else config.affine
        if config.auto_augment and (recipe.input_size[0] != 3 or drawn):
            raise ConfigError(
                f"auto_augment varies pictures of three channels that are not drawings, got "
                f"{recipe.input_size[0]} channels and crop mode {recipe.crop_mode!r}. Set it to ''."
            )
        self.policy = timm_parts.policy(config, recipe)
        self.erase = timm_parts.erasing(config)

    def __call__(self, picture: Image.Image) -> Tensor:
        """`[C, H, W]`, float32, normalised."""
        x = self._unit(self._framed(picture))
        if self.config.color_jitter and self.policy is None:
            x = torch.cat([jittered(x[:3], self.config.color_jitter), x[3:]])  # but transparency
        if self.affine:
            x = wobbled(x, self.affine)
        mean, std = (torch.tensor(v)[:, None, None] for v in (self.recipe.mean, self.recipe.std))
        x = (x - mean) / std
        return x if self.erase is None else self.erase(x)

    def _framed(self, picture: Image.Image) -> list[Image.Image]:
        """One band per channel, at the input size."""
        channels = self.recipe.input_size[0]
        if self.recipe.crop_mode == "ink":
            bands = CROP_MODES["ink"](picture, self.recipe)
        elif channels == 4:  # band by band, since Pillow weighs whole RGBA by its transparency
            bands = self._cropped(_bands(picture, channels))
        else:
            (cut,) = self._cropped([plain(picture).convert("L" if channels == 1 else "RGB")])
            bands = list((cut if self.policy is None else self.policy(cut)).split())
        if _chance() < self.flip:
            bands = [band.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for band in bands]
        return bands

    def _cropped(self, bands: list[Image.Image]) -> list[Image.Image]:
        """The same random part of every band or picture, at the input size."""
        _, height, width = self.recipe.input_size
        box = random_box(bands[0].size, self.config.crop_scale, self.config.crop_ratio)
        name = self.recipe.interpolation
        if self.config.interpolation == "random":
            name = ("bilinear", "bicubic")[int(_chance() < 0.5)]
        filter = Image.Resampling[name.upper()]
        return [band.resize((width, height), filter, box) for band in bands]

    def _unit(self, bands: list[Image.Image]) -> Tensor:
        planes = [np.asarray(band, dtype=np.float32) for band in bands]
        scaled = [plane / 255 if band.mode == "L" else plane.clip(0, 1)
                  for plane, band in zip(planes, bands, strict=True)]  # fmt: skip
        return torch.from_numpy(np.stack(scaled))


def random_box(
    size: tuple[int, int], scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of a random part of a picture (Szegedy et al., arXiv 1409.4842).

    Its area is a share in `scale`, its width over height in `ratio` (even in the logarithm). If ten
    draws do not fit, the largest part in the middle whose shape is allowed.
    """
    width, height = size
    for _ in range(ATTEMPTS):
        area = width * height * _between(*scale)
        shape = math.exp(_between(math.log(ratio[0]), math.log(ratio[1])))
        across, down = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if 0 < across <= width and 0 < down <= height:
            left, top = _below(width - across + 1), _below(height - down + 1)
            return left, top, left + across, top + down
    shape = min(max(width / height, ratio[0]), ratio[1])
    across = min(width, max(round(height * shape), 1))
    down = min(height, max(round(width / shape), 1))
    left, top = (width - across) // 2, (height - down) // 2
    return left, top, left + across, top + down


def jittered(x: Tensor, size: float) -> Tensor:
    """Brightness, contrast and saturation of `[C, H, W]` in 0..1, each changed by up to `size`."""
    coloured = x.shape[0] == 3
    for kind in torch.randperm(3).tolist():
        factor = 1 + size * (2 * _chance() - 1)
        grey = (x * LUMA).sum(0, keepdim=True) if coloured else x.mean(0, keepdim=True)
        other = (torch.zeros(()), grey.mean(), grey)[kind]
        if kind < 2 or coloured:
            x = (other + factor * (x - other)).clamp(0, 1)
    return x


def wobbled(x: Tensor, size: float) -> Tensor:
    """`[C, H, W]` turned, sheared, scaled and shifted by normal amounts of deviation `size`."""
    turn, shear, across, down, right, below = (size * torch.randn(6)).tolist()
    cos, sin = math.cos(turn), math.sin(turn)
    matrix = torch.tensor(
        [[(1 + across) * cos, shear - sin, right], [sin, (1 + down) * cos, below]]
    )
    grid = F.affine_grid(matrix[None], [1, *x.shape], align_corners=False)
    return F.grid_sample(x[None], grid, align_corners=False)[0]


def _chance() -> float:
    return torch.rand(()).item()


def _between(low: float, high: float) -> float:
    return low + (high - low) * _chance()


def _below(count: int) -> int:
    return int(torch.randint(count, ()))


def describe(augment: Augment) -> str:
    """What is varied, in plain words."""
    config: Any = augment.config
    words = []
    if augment.recipe.crop_mode != "ink":
        words.append(f"random crops of {config.crop_scale[0]:g} to {config.crop_scale[1]:g}")
    for name, size in (("flips", augment.flip), ("affine", augment.affine)):
        words += [f"{name} {size:g}"] if size else []
    if augment.policy is not None:
        words.append(config.auto_augment)
    elif config.color_jitter:
        words.append(f"colour {config.color_jitter:g}")
    for name in ("random_erasing", "mixup", "cutmix"):
        value = getattr(config, name)
        words += [f"{name.replace('_', ' ')} {value:g}"] if value else []
    return ", ".join(words) or "none"
