"""From a segmentation head's logits to the classes of a picture's pixels, with bounded memory.

In: logits of one or more variants of a picture (scales, mirrored) and the picture's size. Out:
`Segmentation`. The logits of a large picture with many classes would not fit into memory at its own
size: they are resized, normalised and compared in strips of rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

Size = tuple[int, int]

STRIP_ELEMENTS = 1 << 25  # largest number of logits held at the picture's size


@dataclass(frozen=True)
class Variant:
    """One pass of a picture through the model.

    Attributes:
        logits: `[classes, h, w]`.
        input_size: height and width of the prepared picture, to which the logits are resized first.
        mirrored: whether the picture was flipped left to right.
    """

    logits: Tensor
    input_size: Size
    mirrored: bool = False


@dataclass(frozen=True)
class Segmentation:
    """The class of every pixel.

    Attributes:
        labels: `[H, W]` int64, indices into `names`.
        confidence: `[H, W]`, the probability of that class.
        names: one per class.
    """

    labels: Tensor
    confidence: Tensor
    names: tuple[str, ...]

    def areas(self) -> list[tuple[str, float]]:
        """Names of the classes present with their share of the picture, largest first."""
        counts = torch.bincount(self.labels.flatten(), minlength=len(self.names))
        present = counts.nonzero().flatten().tolist()
        shares = [(self.names[i], counts[i].item() / self.labels.numel()) for i in present]
        return sorted(shares, key=lambda pair: -pair[1])


def combine(variants: Sequence[Variant], size: Size, names: tuple[str, ...]) -> Segmentation:
    """The most probable class by the mean of the variants' probabilities, at `size`."""
    height, width = size
    classes = variants[0].logits.shape[0]
    rows = max(1, STRIP_ELEMENTS // (classes * width))
    best, labels = [], []
    for start in range(0, height, rows):
        stop = min(start + rows, height)
        total = sum(_probabilities(variant, size, start, stop) for variant in variants)
        top = (total / len(variants)).max(dim=0)
        best.append(top.values)
        labels.append(top.indices)
    return Segmentation(torch.cat(labels), torch.cat(best), names)


def _probabilities(variant: Variant, size: Size, start: int, stop: int) -> Tensor:
    """Rows `start..stop` of the variant's probabilities at `size`: `[classes, stop - start, W]`."""
    x, first = variant.logits, 0
    x = x if x.dtype == torch.float64 else x.float()
    height = x.shape[1]
    # Rows of the prepared picture that these rows of the original need; then both resizes.
    inner = _needed(start, stop, variant.input_size[0], size[0])
    x, first = _rows(x, first, height, variant.input_size, *inner)
    x, _ = _rows(x, first, variant.input_size[0], size, start, stop)
    x = x.softmax(dim=0)
    return x.flip(2) if variant.mirrored else x


def _rows(
    x: Tensor, first: int, height: int, size: Size, start: int, stop: int
) -> tuple[Tensor, int]:
    """Rows `start..stop` of a map resized to `size`.

    `x` holds rows `first...` of a map of `height` rows. Returns the rows and the first one's
    number. Bilinear with half-pixel centres, as `layers.resize` of the whole map.
    """
    begin, end = start, stop
    if height != size[0]:
        low, high, weight = _positions(start, stop, height, size[0], x)
        begin, end = int(low[0]), int(high[-1]) + 1
    x = x[:, begin - first : end - first]
    if x.shape[2] != size[1]:
        x = F.interpolate(x[None], (x.shape[1], size[1]), mode="bilinear", align_corners=False)[0]
    if height != size[0]:
        x = torch.lerp(x[:, low - begin], x[:, high - begin], weight[:, None])
    return x, start


def _needed(start: int, stop: int, height: int, target: int) -> Size:
    """Range of source rows that rows `start..stop` of a resize from `height` to `target` read."""
    scale = height / target
    low = int(max((start + 0.5) * scale - 0.5, 0)) - 1
    high = int(max((stop - 0.5) * scale - 0.5, 0)) + 3
    return max(low, 0), min(high, height)


def _positions(
    start: int, stop: int, height: int, target: int, like: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Per target row: the two source rows and the weight of the second."""
    rows = torch.arange(start, stop, device=like.device, dtype=like.dtype)
    centre = ((rows + 0.5) * (height / target) - 0.5).clamp(min=0)
    low = centre.floor().long().clamp(max=height - 1)
    high = (low + 1).clamp(max=height - 1)
    return low, high, centre - low
