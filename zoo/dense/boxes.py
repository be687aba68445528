"""Box arithmetic: overlaps, and the coding of one box relative to another.

In and out: boxes `[..., 4]` as (x1, y1, x2, y2) in pixels, a pixel's left edge at its index, so
that width is x2 - x1. Deltas are (dx, dy, dw, dh) as in R-CNN (arXiv 1311.2524), appendix C.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# The largest change of a side by decoding, as a logarithm; it holds for shrinking too.
MAX_LOG_RATIO = abs(math.log(16 / 1000))


def area(boxes: Tensor) -> Tensor:
    """`[..., 4]` to `[...]`."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def intersection(a: Tensor, b: Tensor) -> Tensor:
    """Area that two boxes share; `[..., 4]` each, broadcast against each other."""
    low = torch.maximum(a[..., :2], b[..., :2])
    high = torch.minimum(a[..., 2:], b[..., 2:])
    sides = (high - low).clamp(min=0)
    return sides[..., 0] * sides[..., 1]


def iou_matrix(a: Tensor, b: Tensor, eps: float = 1e-6) -> Tensor:
    """Intersection over union of every pair: `[n, 4]`, `[m, 4]` to `[n, m]`."""
    shared = intersection(a[:, None], b[None])
    union = area(a)[:, None] + area(b)[None] - shared
    return shared / union.clamp(min=eps)


def giou(a: Tensor, b: Tensor, eps: float = 1e-6) -> Tensor:
    """Generalised IoU (arXiv 1902.09630) of pairs: `[n, 4]`, `[n, 4]` to `[n]`, in -1..1."""
    shared = intersection(a, b)
    union = (area(a) + area(b) - shared).clamp(min=eps)
    low = torch.minimum(a[..., :2], b[..., :2])
    high = torch.maximum(a[..., 2:], b[..., 2:])
    sides = (high - low).clamp(min=0)
    hull = (sides[..., 0] * sides[..., 1]).clamp(min=eps)
    return shared / union - (hull - union) / hull


def encode(reference: Tensor, boxes: Tensor, stds: Sequence[float]) -> Tensor:
    """Deltas that lead from `reference` to `boxes`, divided by `stds`; all `[n, 4]`."""
    from_centre, from_size = _centre_and_size(reference)
    to_centre, to_size = _centre_and_size(boxes)
    deltas = torch.cat([(to_centre - from_centre) / from_size, (to_size / from_size).log()], dim=-1)
    return deltas / deltas.new_tensor(stds)


def decode(
    reference: Tensor,
    deltas: Tensor,
    stds: Sequence[float],
    size: tuple[int, int] | None = None,
) -> Tensor:
    """Boxes that deltas lead to from `reference`.

    Args:
        reference: `[n, 4]`.
        deltas: `[n, k * 4]`, k boxes per reference.
        stds: what the deltas are multiplied by.
        size: height and width to clip the boxes to; None leaves them.

    Returns:
        `[n, k, 4]`.
    """
    deltas = deltas.unflatten(1, (deltas.shape[1] // 4, 4)) * deltas.new_tensor(stds)
    centre, sides = (part[:, None] for part in _centre_and_size(reference))
    centre = centre + sides * deltas[..., :2]
    sides = sides * deltas[..., 2:].clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    boxes = torch.cat([centre - sides * 0.5, centre + sides * 0.5], dim=-1)
    return boxes if size is None else clip(boxes, size)


def clip(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Boxes cut to a picture of the given height and width."""
    height, width = size
    return torch.minimum(boxes.clamp(min=0), boxes.new_tensor([width, height, width, height]))


def _centre_and_size(boxes: Tensor) -> tuple[Tensor, Tensor]:
    low, high = boxes[..., :2], boxes[..., 2:]
    return (low + high) * 0.5, high - low
