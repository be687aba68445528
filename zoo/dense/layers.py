"""The convolution unit that every dense head is made of, and the initialisations of those heads.

In: channel counts. Out: modules whose parameters carry the names of the released checkpoints
(`conv`, `bn`). Maps are `[B, C, H, W]`.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class ConvUnit(nn.Module):
    """Convolution that keeps the map's size, then optional batch norm, then optional ReLU.

    With batch norm the convolution has no bias.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        norm: bool = True,
        act: bool = True,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=not norm
        )
        self.bn = nn.BatchNorm2d(out_channels) if norm else None
        self.act = act
        init_kaiming(self.conv)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, in_channels, H, W]` to `[B, out_channels, H, W]`."""
        x = self.conv(x)
        if self.bn is not None:
            x = self.bn(x)
        return F.relu(x, inplace=True) if self.act else x


def init_kaiming(module: nn.Module) -> None:
    """He initialisation (arXiv 1502.01852) over outputs for ReLU; bias 0."""
    nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    _zero_bias(module)


def init_xavier(module: nn.Module) -> None:
    """Uniform Xavier initialisation; bias 0."""
    nn.init.xavier_uniform_(module.weight)
    _zero_bias(module)


def init_normal(module: nn.Module, std: float) -> None:
    """Normal of the given deviation; bias 0."""
    nn.init.normal_(module.weight, std=std)
    _zero_bias(module)


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear, half-pixel centres, no antialiasing: `[B, C, h, w]` to `[B, C, *size]`."""
    if tuple(x.shape[2:]) == tuple(size):
        return x
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


def _zero_bias(module: nn.Module) -> None:
    if module.bias is not None:
        nn.init.zeros_(module.bias)
