"""The boxes that a region proposal network starts from.

In: strides and map sizes. Out: boxes (x1, y1, x2, y2) in pixels. Anchors are centred on (column *
stride, row * stride), without half a pixel's offset and without rounding, as the released models
were trained.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

RATIOS = (0.5, 1.0, 2.0)  # height over width
SCALE = 8  # side of the square anchor in strides


def base_anchors(stride: int) -> Tensor:
    """The anchors around (0, 0): `[3, 4]` float32, all of the same area."""
    root = torch.tensor(RATIOS, device="cpu", dtype=torch.float32).sqrt()
    width, height = stride * (1 / root) * SCALE, stride * root * SCALE
    return torch.stack([-0.5 * width, -0.5 * height, 0.5 * width, 0.5 * height], dim=1)


def grid_anchors(shape: tuple[int, int], stride: int, like: Tensor) -> Tensor:
    """All anchors of a map of the given height and width: `[height * width * 3, 4]`.

    Row by row, the ratios of one position next to each other. Device and dtype are those of `like`.
    """
    y, x = (torch.arange(n, device=like.device, dtype=like.dtype) * stride for n in shape)
    y, x = torch.meshgrid(y, x, indexing="ij")
    centres = torch.stack([x, y, x, y], dim=-1).reshape(-1, 1, 4)
    return (centres + base_anchors(stride).to(like)).reshape(-1, 4)


def inside(
    shape: tuple[int, int], stride: int, size: tuple[int, int], device: torch.device
) -> Tensor:
    """Which anchors of a map belong to positions of a padded picture of height and width `size`.

    In a batch, smaller pictures are padded further; anchors out there are not trained. Out: bool
    `[height * width * 3]`.
    """
    rows, columns = (
        torch.arange(n, device=device) < -(-side // stride)
        for n, side in zip(shape, size, strict=True)
    )
    flags = rows[:, None] & columns[None]
    return flags.flatten().repeat_interleave(len(RATIOS))


def within(anchors: Tensor, size: tuple[int, int], border: int) -> Tensor:
    """Which anchors reach at most `border` pixels across the edges of a picture: bool `[n]`.

    The released models' rule: the right and lower limits themselves are already outside.
    """
    height, width = size
    x1, y1, x2, y2 = anchors.unbind(1)
    return (x1 >= -border) & (y1 >= -border) & (x2 < width + border) & (y2 < height + border)


def pyramid_anchors(
    shapes: Sequence[tuple[int, int]], strides: Sequence[int], like: Tensor
) -> list[Tensor]:
    """`grid_anchors` of every level."""
    pairs = zip(shapes, strides, strict=True)
    return [grid_anchors(shape, stride, like) for shape, stride in pairs]
