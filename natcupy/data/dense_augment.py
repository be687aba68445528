"""Random views of pictures together with their labels or objects, as the papers trained.

In: a picture `[H, W, 3]` uint8 with a map of classes or with objects, and a recipe. Out: the same
kind, changed; random numbers are torch's own. Boxes and masks move with the pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from natcupy.zoo.dense.images import resize_pixels
from natcupy.zoo.dense.targets import Objects
from natcupy.zoo.dense.upernet import IGNORE_INDEX

Size = tuple[int, int]


@dataclass(frozen=True)
class SegmentationViews:
    """How mmsegmentation's ADE20K recipe varies pictures.

    Attributes:
        long_side, short_side: the size that the ratio multiplies; the picture keeps its shape.
        ratios: smallest and largest ratio.
        crop: height and width of what is cut out and, where there is less, padded to.
        cat_max_ratio: a cut is drawn again, up to ten times, while one class has more of it.
        flip: probability of mirroring.
        photometric: vary brightness, contrast, saturation and hue.
    """

    long_side: int = 2048
    short_side: int = 512
    ratios: tuple[float, float] = (0.5, 2.0)
    crop: Size = (512, 512)
    cat_max_ratio: float = 0.75
    flip: float = 0.5
    photometric: bool = True

    def __call__(self, pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """`[H, W, 3]` uint8 and `[H, W]` int64 to those of a view, not padded: `fill` does that."""
        ratio = _uniform(*self.ratios)
        size = keep_shape(
            pixels.shape[:2], int(self.long_side * ratio), int(self.short_side * ratio)
        )
        pixels, labels = resize_pixels(pixels, size), resize_labels(labels, size)
        top, left, height, width = self._cut(labels)
        pixels = pixels[top : top + height, left : left + width]
        labels = labels[top : top + height, left : left + width]
        if _uniform(0, 1) < self.flip:
            pixels, labels = pixels.flip(1), labels.flip(1)
        return vary_colours(pixels) if self.photometric else pixels, labels

    def _cut(self, labels: Tensor) -> tuple[int, int, int, int]:
        for _ in range(10):
            box = _place(labels.shape, self.crop)
            top, left, height, width = box
            part = labels[top : top + height, left : left + width]
            counts = part[part != IGNORE_INDEX].flatten().bincount()
            counts = counts[counts > 0]
            if len(counts) > 1 and counts.max() / counts.sum() < self.cat_max_ratio:
                break
        return box

    def fill(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """A normalised view `[3, H, W]` and its labels, padded right and below to `crop`."""
        bottom, right = (side - own for side, own in zip(self.crop, labels.shape, strict=True))
        room = (0, right, 0, bottom)
        return F.pad(x, room), F.pad(labels, room, value=IGNORE_INDEX)


@dataclass(frozen=True)
class DetectionViews:
    """How the COCO recipe of NAT (that of DETR and Swin) varies pictures.

    Attributes:
        short_sides: one of these is drawn for the shorter side.
        long_side: the longer one stays within it.
        cut_short_sides: with probability one half, the picture is first scaled to one of these and
            a random part of it is cut out; none: never.
        cut: least and largest side of that part.
        flip: probability of mirroring.
    """

    short_sides: tuple[int, ...] = tuple(range(480, 801, 32))
    long_side: int = 1333
    cut_short_sides: tuple[int, ...] = (400, 500, 600)
    cut: tuple[int, int] = (384, 600)
    flip: float = 0.5

    @classmethod
    def of_size(cls, long_side: int, short_side: int) -> DetectionViews:
        """The recipe scaled from 1333 x 800 to another size."""
        if (long_side, short_side) == (1333, 800):
            return cls()

        def scaled(sides: Sequence[int]) -> tuple[int, ...]:
            return tuple(dict.fromkeys(max(round(s * short_side / 800), 1) for s in sides))

        usual = cls()
        cut = tuple(max(round(s * short_side / 800), 1) for s in usual.cut)
        return cls(scaled(usual.short_sides), long_side, scaled(usual.cut_short_sides), cut)

    def __call__(self, pixels: Tensor, objects: Objects) -> tuple[Tensor, Objects]:
        """`[H, W, 3]` uint8 and objects in its pixels to those of a view."""
        if _uniform(0, 1) < self.flip:
            pixels, objects = pixels.flip(1), mirrored(objects, pixels.shape[1])
        if self.cut_short_sides and _uniform(0, 1) < 0.5:
            pixels, objects = resized(pixels, objects, self._size(pixels, self.cut_short_sides))
            low, high = self.cut
            sides = [_integer(min(low, side), min(high, side)) for side in pixels.shape[:2]]
            pixels, objects = cut_out(pixels, objects, _place(pixels.shape[:2], sides))
        return resized(pixels, objects, self._size(pixels, self.short_sides))

    def _size(self, pixels: Tensor, short_sides: Sequence[int]) -> Size:
        short = short_sides[_integer(0, len(short_sides) - 1)]
        return keep_shape(pixels.shape[:2], self.long_side, short)


# ---------------------------------------------------------------- geometry


def keep_shape(size: Sequence[int], long_side: int, short_side: int) -> Size:
    """The largest size of the same shape within two bounds, as `Recipe.target_size` rounds."""
    height, width = size
    scale = min(long_side / max(height, width), short_side / min(height, width))
    return max(int(height * scale + 0.5), 1), max(int(width * scale + 0.5), 1)


def resize_labels(labels: Tensor, size: Size) -> Tensor:
    """Class numbers `[H, W]` or masks `[n, H, W]` at another size: the nearest pixel's."""
    rows, columns = (
        (torch.arange(new) * (old / new)).floor().long().clamp(max=old - 1)
        for new, old in zip(size, labels.shape[-2:], strict=True)
    )
    return labels[..., rows[:, None], columns]


def resized(pixels: Tensor, objects: Objects, size: Size) -> tuple[Tensor, Objects]:
    """A picture and its objects at another size; boxes are cut to it."""
    y, x = (new / old for new, old in zip(size, pixels.shape[:2], strict=True))
    boxes = objects.boxes * objects.boxes.new_tensor([x, y, x, y])
    boxes = torch.minimum(boxes, boxes.new_tensor([size[1], size[0], size[1], size[0]]))
    masks = resize_labels(objects.masks, size)
    return resize_pixels(pixels, size), _real(Objects(boxes, objects.labels, masks))


def mirrored(objects: Objects, width: int) -> Objects:
    """The objects of the picture flipped left to right."""
    x1, y1, x2, y2 = objects.boxes.unbind(1)
    boxes = torch.stack([width - x2, y1, width - x1, y2], dim=1)
    return Objects(boxes, objects.labels, objects.masks.flip(2))


def cut_out(
    pixels: Tensor, objects: Objects, place: tuple[int, int, int, int]
) -> tuple[Tensor, Objects]:
    """Part (top, left, height, width) of a picture; objects that are not in it go."""
    top, left, height, width = place
    shift = objects.boxes.new_tensor([left, top, left, top])
    limit = objects.boxes.new_tensor([width, height, width, height])
    boxes = torch.minimum((objects.boxes - shift).clamp(min=0), limit)
    masks = objects.masks[:, top : top + height, left : left + width]
    pixels = pixels[top : top + height, left : left + width]
    return pixels, _real(Objects(boxes, objects.labels, masks))


def _real(objects: Objects) -> Objects:
    """The objects whose boxes have an area."""
    boxes = objects.boxes
    kept = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    return Objects(boxes[kept], objects.labels[kept], objects.masks[kept])


def _place(size: Sequence[int], part: Sequence[int]) -> tuple[int, int, int, int]:
    """A random part of at most the given size: top, left, height, width."""
    height, width = (min(a, b) for a, b in zip(size, part, strict=True))
    return _integer(0, size[0] - height), _integer(0, size[1] - width), height, width


# ---------------------------------------------------------------- colours


def vary_colours(pixels: Tensor) -> Tensor:
    """Brightness (up to 32 of 255), contrast and saturation (half to one and a half), hue (18 of
    180), each with probability one half, in mmsegmentation's order.

    `[H, W, 3]` uint8 in and out; every step rounds and clips.
    """
    if _coin():
        pixels = _rounded(pixels.float() + _uniform(-32, 32))
    contrast_last = _coin()
    if not contrast_last and _coin():
        pixels = _rounded(pixels.float() * _uniform(0.5, 1.5))
    if _coin():
        hue, saturation, value = _to_hsv(pixels)
        saturation = (saturation * _uniform(0.5, 1.5)).clamp(max=1)
        pixels = _from_hsv(hue, saturation, value)
    if _coin():
        hue, saturation, value = _to_hsv(pixels)
        turn = _integer(-18, 17) / 180
        pixels = _from_hsv((hue + turn) % 1.0, saturation, value)
    if contrast_last and _coin():
        pixels = _rounded(pixels.float() * _uniform(0.5, 1.5))
    return pixels


def _to_hsv(pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`[H, W, 3]` in 0..255 to hue, saturation (0..1) and value (0..255), each `[H, W]`."""
    rgb = pixels.float()
    value, top = rgb.max(dim=-1)
    spread = value - rgb.amin(dim=-1)
    red, green, blue = rgb.unbind(-1)
    safe = spread.clamp(min=1e-6)
    sextant = torch.stack(
        [(green - blue) / safe, 2 + (blue - red) / safe, 4 + (red - green) / safe], dim=-1
    )
    hue = sextant.gather(-1, top[..., None])[..., 0] / 6 % 1.0
    return hue, spread / value.clamp(min=1e-6), value


def _from_hsv(hue: Tensor, saturation: Tensor, value: Tensor) -> Tensor:
    offsets = hue.new_tensor([5.0, 3.0, 1.0])
    k = (offsets + hue[..., None] * 6) % 6
    fall = torch.minimum(k, 4 - k).clamp(0, 1)
    return _rounded(value[..., None] * (1 - saturation[..., None] * fall))


def _rounded(values: Tensor) -> Tensor:
    return values.round().clamp(0, 255).to(torch.uint8)


# ---------------------------------------------------------------- chance


def _uniform(low: float, high: float) -> float:
    return low + (high - low) * torch.rand(()).item()


def _integer(low: int, high: int) -> int:
    """Whole number in low..high, both included."""
    return min(low + math.floor((high - low + 1) * torch.rand(()).item()), high)


def _coin() -> bool:
    return torch.rand(()).item() < 0.5
