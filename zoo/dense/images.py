"""Pictures for segmentation and detection: resized with their shape kept, normalised, padded.

In: a path, PIL picture, array or tensor, and a `Recipe`. Out: `Prepared`, whose frame leads results
back to the picture's own coordinates. Units: pixel values, means and deviations in 0..255.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from natcupy.zoo.preprocess import MAX_RESIZED_PIXELS, _bands, _opened, _per_channel

MEAN = (123.675, 116.28, 103.53)
STD = (58.395, 57.12, 57.375)

_STATISTICS = ("mean", "std")
_BITS = 11  # of the fixed-point weights of `resize_bytes`


@dataclass(frozen=True)
class Frame:
    """Where a picture lies in a model's input, and what it was before.

    Attributes:
        size: height and width in the input, without padding.
        original_size: height and width of the picture itself.
    """

    size: tuple[int, int]
    original_size: tuple[int, int]

    @property
    def scale(self) -> tuple[float, float, float, float]:
        """Prepared over original size, for boxes (x1, y1, x2, y2)."""
        y, x = (new / old for new, old in zip(self.size, self.original_size, strict=True))
        return x, y, x, y


@dataclass(frozen=True)
class Prepared:
    """A picture ready for a model: `pixels` `[1, 3, H, W]` float32, padded right and bottom."""

    pixels: Tensor
    frame: Frame


@dataclass(frozen=True)
class Recipe:
    """How pictures are prepared; `prepare` does it.

    Attributes:
        long_side, short_side: the picture is scaled, its shape kept, to the largest size whose
            longer and shorter sides stay within these.
        pad_divisor: sides are padded with zeros, after normalising, to multiples of this.
        mean, std: per channel, for values in 0..255.
    """

    long_side: int
    short_side: int
    pad_divisor: int = 1
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD

    def __post_init__(self) -> None:
        for name in ("long_side", "short_side", "pad_divisor"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 65536:
                raise ValueError(f"{name} must be an int in 1..65536, got {value!r}.")
        for name in ("mean", "std"):
            values = tuple(getattr(self, name))
            if not values or not all(math.isfinite(v) for v in values):
                raise ValueError(f"{name} must be finite numbers, one per channel, got {values}.")
            object.__setattr__(self, name, values)
        if len(self.mean) != len(self.std) or min(self.std) <= 0:
            raise ValueError(
                f"std must be above 0 and have one value per mean, got mean={self.mean} and "
                f"std={self.std}."
            )

    @classmethod
    def for_task(cls, task: str) -> Recipe:
        """The papers' test-time sizes: 2048 x 512 for segmentation, 1333 x 800 for detection."""
        return cls(2048, 512) if task == "segmentation" else cls(1333, 800, pad_divisor=32)

    @classmethod
    def from_pretrained_cfg(
        cls, cfg: dict[str, Any], task: str, channels: int | None = None
    ) -> Recipe:
        """The recipe in a model's `pretrained_cfg`; what it does not say is the task's own.

        `channels`: of the model's pictures; another number of means and deviations stands for all
        channels by its average. None takes them as they are.
        """
        own = asdict(cls.for_task(task))
        recipe = cls(**{name: cfg.get(name, value) for name, value in own.items()})
        if channels is None:
            return recipe
        pair = {name: _per_channel(name, getattr(recipe, name), channels) for name in _STATISTICS}
        return replace(recipe, **pair)

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def scaled(self, factor: float) -> Recipe:
        """The recipe with both sides multiplied, for multi-scale testing."""
        if not 0 < factor <= 16:
            raise ValueError(f"a scale must be above 0 and at most 16, got {factor}.")
        if factor == 1:
            return self
        sides = (max(int(side * factor), 1) for side in (self.long_side, self.short_side))
        return replace(self, **dict(zip(("long_side", "short_side"), sides, strict=True)))

    def target_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width after scaling."""
        scale = min(
            self.long_side / max(height, width),
            self.short_side / min(height, width),
        )
        return tuple(max(int(side * scale + 0.5), 1) for side in (height, width))

    def prepare(self, image: Any) -> Prepared:
        """One picture to a model's input, on the CPU.

        Args:
            image: a path, a PIL picture, an array `[H, W]` or `[H, W, C]`, or a tensor `[C, H, W]`,
                `[H, W, C]` or `[H, W]`; uint8, or floats in 0..1. EXIF orientation is applied.

        Raises TypeError for other kinds, ValueError for other shapes and values, OSError for files
        that are missing or no picture.
        """
        pixels = read_pixels(image, len(self.mean))
        original = tuple(pixels.shape[:2])
        size = self.target_size(*original)
        if size[0] * size[1] > MAX_RESIZED_PIXELS:
            raise ValueError(
                f"a picture of {original[1]} x {original[0]} pixels would be resized to "
                f"{size[1]} x {size[0]}, more than {MAX_RESIZED_PIXELS:,} pixels; crop it first."
            )
        pixels = resize_pixels(pixels, size)
        return Prepared(self.normalise(pixels), Frame(size, original))

    def normalise(self, pixels: Tensor) -> Tensor:
        """`[H, W, C]` in 0..255 to `[1, C, H', W']`: normalised, then padded to the divisor."""
        mean, std = (
            torch.tensor(v, device=pixels.device, dtype=torch.float32)
            for v in (self.mean, self.std)
        )
        x = ((pixels.float() - mean) / std).permute(2, 0, 1)[None]
        bottom, right = (-side % self.pad_divisor for side in x.shape[2:])
        return F.pad(x, (0, right, 0, bottom)).contiguous()


def stack(prepared: Sequence[Prepared]) -> tuple[Tensor, list[Frame]]:
    """Pictures of different sizes as one batch `[B, 3, H, W]`, zero-padded, and their frames."""
    if not prepared:
        raise ValueError("a batch must have at least one picture, got none.")
    height, width = (max(p.pixels.shape[axis] for p in prepared) for axis in (2, 3))
    padded = [
        F.pad(p.pixels, (0, width - p.pixels.shape[3], 0, height - p.pixels.shape[2]))
        for p in prepared
    ]
    return torch.cat(padded), [p.frame for p in prepared]


def read_pixels(image: Any, channels: int = 3) -> Tensor:
    """A picture as `[H, W, channels]`: uint8, or float32 in 0..255 where the picture had floats."""
    import numpy as np

    bands = _bands(_opened(image, channels), channels)
    planes = [np.array(band) for band in bands]
    if any(band.mode != "L" for band in bands):
        planes = [
            plane.astype(np.float32).clip(0, 1) * 255 if band.mode != "L" else plane
            for plane, band in zip(planes, bands, strict=True)
        ]
    return torch.from_numpy(np.stack(planes, axis=-1))


def resize_pixels(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """`[H, W, C]` to `[*size, C]`, bilinear without antialiasing, as the models were tested."""
    if tuple(pixels.shape[:2]) == tuple(size):
        return pixels
    if pixels.dtype == torch.uint8:
        return resize_bytes(pixels, size)
    planes = pixels.permute(2, 0, 1)[None]
    return F.interpolate(planes, size, mode="bilinear", align_corners=False)[0].permute(1, 2, 0)


def resize_bytes(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear resize of uint8 pixels in 11-bit fixed point, as OpenCV's INTER_LINEAR rounds it.

    Halving both sides exactly is the mean of 2x2 pixels there, and here.
    """
    height, width = pixels.shape[:2]
    x = pixels.int()
    if (height, width) == (2 * size[0], 2 * size[1]):
        rows = x[::2] + x[1::2]
        return ((rows[:, ::2] + rows[:, 1::2] + 2) >> 2).to(torch.uint8)
    left, right, weight_left, weight_right = _columns(width, size[1])
    x = x[:, left] * weight_left[:, None] + x[:, right] * weight_right[:, None]
    x = x >> 4
    above, below, weight_above, weight_below = _lines(height, size[0])
    x = (
        ((x[above] * weight_above[:, None, None]) >> 16)
        + ((x[below] * weight_below[:, None, None]) >> 16)
        + 2
    ) >> 2
    return x.clamp(0, 255).to(torch.uint8)


def _columns(length: int, target: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Two neighbours and their weights per target column; beyond an edge the edge pixel alone."""
    first, fraction = _source(length, target)
    fraction[(first < 0) | (first >= length - 1)] = 0
    first = first.clamp(0, length - 1)
    return first, (first + 1).clamp(max=length - 1), _fixed(1 - fraction), _fixed(fraction)


def _lines(length: int, target: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `_columns`, but beyond an edge both neighbours are the edge row and keep their weights.

    The sum is the same; only its rounding differs.
    """
    first, fraction = _source(length, target)
    second = (first + 1).clamp(0, length - 1)
    return first.clamp(0, length - 1), second, _fixed(1 - fraction), _fixed(fraction)


def _source(length: int, target: int) -> tuple[Tensor, Tensor]:
    scale = 1.0 / (target / length)  # in this order for the sake of the last bit
    centre = ((torch.arange(target, dtype=torch.float64, device="cpu") + 0.5) * scale - 0.5).float()
    first = centre.floor()
    return first.long(), centre - first


def _fixed(weight: Tensor) -> Tensor:
    return (weight * (1 << _BITS)).round().int()
