"""RoIAlign: features of regions, resampled to one size. Mask R-CNN (arXiv 1703.06870), section 3.

In: maps `[B, C, H, W]` and boxes in pixels. Out: `[n, C, side, side]`. Half-pixel exact
("aligned"), with as many samples per cell as the region has map pixels there, rounded up.
torchvision's operator where it works, else plain torch with the same result.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from natcupy.zoo.dense.torchvision_ops import torchvision_ops

CANONICAL = 56  # side of a region that is taken from the finest map up to twice of it
CHUNK_ELEMENTS = 1 << 24  # features gathered at once


def pool_regions(
    maps: Sequence[Tensor], strides: Sequence[int], boxes: Sequence[Tensor], side: int
) -> Tensor:
    """Features of every picture's boxes, each from the level that suits its size.

    Args:
        maps: `[B, C, H_i, W_i]`, finest first.
        strides: pixels per map pixel of each level.
        boxes: per picture `[n_b, 4]`, in pixels.
        side: of the result.

    Returns:
        `[sum n_b, C, side, side]`, picture by picture.
    """
    rois = with_batch_index(boxes)
    # Empty regions still enter the graph, so that a step without any has gradients (of zero).
    out = maps[0].new_zeros((rois.shape[0], maps[0].shape[1], side, side))
    levels = region_levels(rois[:, 1:], len(maps))
    for level, (x, stride) in enumerate(zip(maps, strides, strict=True)):
        chosen = (levels == level).nonzero().flatten()
        if chosen.numel():
            pooled = roi_align(x, rois[chosen], side, 1 / stride)
            out = out.index_put((chosen,), pooled.to(out))
    return out


def with_batch_index(boxes: Sequence[Tensor]) -> Tensor:
    """Per-picture boxes as one list of (picture's number, x1, y1, x2, y2): `[n, 5]`."""
    rows = [torch.cat([b.new_full((b.shape[0], 1), i), b], 1) for i, b in enumerate(boxes)]
    return torch.cat(rows)


def region_levels(boxes: Tensor, count: int) -> Tensor:
    """Level for each box `[n]`: one step coarser for each doubling of its size over 112 pixels."""
    sides = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sqrt()
    return (sides / CANONICAL + 1e-6).log2().floor().clamp(0, count - 1).long()


def roi_align(x: Tensor, rois: Tensor, side: int, scale: float) -> Tensor:
    """Features of regions of one map.

    Args:
        x: `[B, C, H, W]`.
        rois: `[n, 5]`, picture's number and box in pixels.
        side: cells along each axis of the result.
        scale: map pixels per pixel.

    Returns:
        `[n, C, side, side]` in the dtype of `x`.
    """
    ops = torchvision_ops(x.device)
    exact = x if x.dtype in (torch.float32, torch.float64) else x.float()
    align = _plain if ops is None else ops.roi_align
    if ops is None:
        return align(exact, rois.to(exact.dtype), side, scale).to(x.dtype)
    return align(exact, rois.to(exact.dtype), side, scale, -1, True).to(x.dtype)


def _plain(x: Tensor, rois: Tensor, side: int, scale: float) -> Tensor:
    """Bilinear sampling and averaging are linear and separable: two small matrices per region.

    Regions with windows of about the same size are multiplied together.
    """
    height, width = x.shape[2:]
    pixels = x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])
    top, rows = _extent(rois[:, 2], rois[:, 4], scale, height)
    left, columns = _extent(rois[:, 1], rois[:, 3], scale, width)
    window = torch.stack([_rounded(rows), _rounded(columns)], dim=1)
    parts, order = [], []
    for size in window.unique(dim=0).tolist():
        members = (window == window.new_tensor(size)).all(dim=1).nonzero().flatten()
        per_chunk = max(1, CHUNK_ELEMENTS // (size[0] * size[1] * x.shape[1]))
        for chosen in members.split(per_chunk):
            region = rois[chosen]
            row, from_rows = _axis(
                region[:, 2], region[:, 4], top[chosen], size[0], side, scale, height
            )
            column, from_columns = _axis(
                region[:, 1], region[:, 3], left[chosen], size[1], side, scale, width
            )
            first = region[:, 0].long() * height
            index = ((first[:, None] + row) * width)[:, :, None] + column[:, None]
            patch = pixels[index]
            partial = from_rows @ patch.flatten(2)
            partial = partial.unflatten(2, (size[1], -1))
            parts.append((from_columns[:, None] @ partial).permute(0, 3, 1, 2))
            order.append(chosen)
    if not parts:
        return x.new_zeros((0, x.shape[1], side, side))
    return torch.cat(parts)[torch.cat(order).argsort()]


def _extent(low: Tensor, high: Tensor, scale: float, length: int) -> tuple[Tensor, Tensor]:
    """First map pixel that a region reads along an axis, and how many from there: `[n]`, `[n]`."""
    first = (low * scale - 0.5).floor().clamp(0, length - 1).long()
    last = ((high * scale - 0.5).floor() + 1).clamp(0, length - 1).long()
    return first, (last - first).clamp(min=0) + 1


def _rounded(count: Tensor) -> Tensor:
    """The next of 4, 6, 8, 12, 16, 24, 32, 48, ...: few sizes, little waste."""
    power = 1 << count.clamp(min=4).double().log2().floor().long()
    steps = torch.stack([power, power * 3 // 2, power * 2], dim=-1)
    return torch.where(steps >= count[:, None], steps, steps[:, 2:]).amin(dim=-1)


def _axis(
    low: Tensor, high: Tensor, first: Tensor, window: int, side: int, scale: float, length: int
) -> tuple[Tensor, Tensor]:
    """Sampling and averaging along one axis, for n regions.

    Returns:
        The map pixels of each window, `[n, window]`, and the weights of the cells' averages on
        them, `[n, side, window]`.
    """
    start, end = low * scale - 0.5, high * scale - 0.5
    extent = end - start
    samples = (extent / side).ceil().clamp(min=0)
    most = max(int(samples.max()), 1)
    cell = (extent / side)[:, None, None]
    cells = torch.arange(side, device=low.device, dtype=low.dtype)[:, None]
    step = torch.arange(most, device=low.device, dtype=low.dtype)
    count = samples.clamp(min=1)[:, None, None]
    position = start[:, None, None] + cells * cell + (step + 0.5) * cell / count
    # Samples up to one pixel outside take the edge's value, those farther out are zero.
    counts = (step < samples[:, None, None]) & (position >= -1) & (position <= length)
    position = position.clamp(0, length - 1)
    below = position.floor()
    weight = position - below
    index = below.long() - first[:, None, None]
    share = counts.to(low.dtype) / count
    weights = low.new_zeros((low.shape[0], side, window + 1))
    weights.scatter_add_(2, index.clamp(0, window - 1), (1 - weight) * share)
    weights.scatter_add_(2, (index + 1).clamp(0, window), weight * share)
    pixels = first[:, None] + torch.arange(window, device=low.device)
    return pixels.clamp(max=length - 1), weights[:, :, :window]
