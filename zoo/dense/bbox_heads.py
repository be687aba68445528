"""Heads that name the object in a region and correct its box.

In: features of regions `[n, C, 7, 7]`. Out: logits `[n, classes + 1]`, background last, and deltas
`[n, classes * 4]`, four for each class.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional as F

from natcupy.zoo.dense.layers import ConvUnit, init_normal, init_xavier

SIDE = 7


class BBoxHead(nn.Module):
    """Convolutions (perhaps none), fully connected layers with ReLU, two linear outputs.

    Args of the constructor: channels of the features; width and number of the fully connected
    layers; number of 3x3 convolutions with batch norm; classes without background; deviations that
    the deltas are divided by.
    """

    def __init__(
        self,
        channels: int,
        fc_channels: int,
        num_fcs: int,
        num_convs: int,
        num_classes: int,
        stds: Sequence[float],
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.stds = tuple(stds)
        self.fc_cls = nn.Linear(fc_channels, num_classes + 1)
        self.fc_reg = nn.Linear(fc_channels, 4 * num_classes)
        self.shared_convs = nn.ModuleList(ConvUnit(channels, channels, 3) for _ in range(num_convs))
        widths = [channels * SIDE * SIDE] + [fc_channels] * num_fcs
        self.shared_fcs = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        for fc in self.shared_fcs:
            init_xavier(fc)
        init_normal(self.fc_cls, 0.01)
        init_normal(self.fc_reg, 0.001)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`[n, C, 7, 7]` to logits `[n, classes + 1]` and deltas `[n, classes * 4]`."""
        for conv in self.shared_convs:
            x = conv(x)
        x = x.flatten(1)
        for fc in self.shared_fcs:
            x = F.relu(fc(x), inplace=True)
        return self.fc_cls(x), self.fc_reg(x)
