"""The head that draws an object's outline inside its box. Mask R-CNN (arXiv 1703.06870), figure 4.

In: features of regions `[n, C, 14, 14]`. Out: logits `[n, classes, 28, 28]`, one mask per class.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from natcupy.zoo.dense.layers import ConvUnit, init_kaiming

SIDE = 14
MASK_SIDE = 28
CONVS = 4


class MaskHead(nn.Module):
    """Four 3x3 convolutions with ReLU, a 2x2 deconvolution with ReLU, a 1x1 classifier."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            ConvUnit(channels, channels, 3, norm=False) for _ in range(CONVS)
        )
        self.upsample = nn.ConvTranspose2d(channels, channels, 2, stride=2)
        self.conv_logits = nn.Conv2d(channels, num_classes, 1)
        init_kaiming(self.upsample)
        init_kaiming(self.conv_logits)

    def forward(self, x: Tensor) -> Tensor:
        """`[n, C, 14, 14]` to `[n, classes, 28, 28]`."""
        for conv in self.convs:
            x = conv(x)
        return self.conv_logits(F.relu(self.upsample(x), inplace=True))
