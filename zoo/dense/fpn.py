"""Feature pyramid network: every level of the backbone gets the coarser levels' knowledge.

In: maps of falling size with different channels. Out: maps of the same sizes with equal channels,
and one coarser level. Paper: FPN (arXiv 1612.03144).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from natcupy.zoo.dense.layers import ConvUnit, init_xavier


class FPN(nn.Module):
    """1x1 convolutions, top-down sums with nearest upsampling, 3x3 convolutions; no norms."""

    def __init__(self, dims: Sequence[int], channels: int) -> None:
        super().__init__()
        self.lateral_convs = nn.ModuleList(_plain(dim, channels, 1) for dim in dims)
        self.fpn_convs = nn.ModuleList(_plain(channels, channels, 3) for _ in dims)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """n maps `[B, dims[i], H_i, W_i]` to n + 1 maps `[B, channels, H_i, W_i]`.

        The extra one takes every second pixel of the coarsest.
        """
        levels = [conv(x) for conv, x in zip(self.lateral_convs, maps, strict=True)]
        for fine in range(len(levels) - 2, -1, -1):
            size = levels[fine].shape[2:]
            levels[fine] = levels[fine] + F.interpolate(levels[fine + 1], size=size, mode="nearest")
        out = [conv(x) for conv, x in zip(self.fpn_convs, levels, strict=True)]
        return [*out, out[-1][:, :, ::2, ::2]]


def _plain(in_channels: int, out_channels: int, kernel_size: int) -> ConvUnit:
    unit = ConvUnit(in_channels, out_channels, kernel_size, norm=False, act=False)
    init_xavier(unit.conv)
    return unit
