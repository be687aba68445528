"""NAT and DiNAT: a convolutional stem, levels of neighborhood attention, convolutions between.

In: a `ModelConfig` of family "nat", or a size's name. Out: `NAT`. Papers: NAT (arXiv 2204.07143)
and DiNAT (arXiv 2209.15001), which is NAT with dilation in every other block.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from natcupy.zoo.base import ImageModel
from natcupy.zoo.config import ModelConfig
from natcupy.zoo.layers import ConvDownsampler, ConvTokenizer, neighborhood_stages
from natcupy.zoo.sizes import sized


class NAT(ImageModel):
    """Pictures `[B, in_chans, H, W]` of any size to logits or feature maps."""

    stages_name = "levels"

    def __init__(self, config: ModelConfig, pretrained_cfg: dict[str, Any] | None = None) -> None:
        super().__init__(config, pretrained_cfg)
        self.patch_embed = ConvTokenizer(config.in_chans, config.embed_dim)
        self.levels = nn.ModuleList(neighborhood_stages(config, ConvDownsampler))
        self._finish()


# The shapes that NAT and DiNAT share; what differs is said by each size.
_MINI = {"embed_dim": 64, "depths": (3, 4, 6, 5), "num_heads": (2, 4, 8, 16)}
_TINY = {"embed_dim": 64, "depths": (3, 4, 18, 5), "num_heads": (2, 4, 8, 16)}
_SMALL = {"embed_dim": 96, "depths": (3, 4, 18, 5), "num_heads": (3, 6, 12, 24), "mlp_ratio": 2.0}
_BASE = {"embed_dim": 128, "depths": (3, 4, 18, 5), "num_heads": (4, 8, 16, 32), "mlp_ratio": 2.0}
_LARGE = {"embed_dim": 192, "depths": (3, 4, 18, 5), "num_heads": (6, 12, 24, 48), "mlp_ratio": 2.0}


def nat_mini(**overrides: Any) -> NAT:
    """NAT-Mini."""
    return _nat("nat_mini", overrides, **_MINI, drop_path_rate=0.2)


def nat_tiny(**overrides: Any) -> NAT:
    """NAT-Tiny."""
    return _nat("nat_tiny", overrides, **_TINY, drop_path_rate=0.2)


def nat_small(**overrides: Any) -> NAT:
    """NAT-Small."""
    return _nat("nat_small", overrides, **_SMALL, drop_path_rate=0.3, layer_scale=1e-5)


def nat_base(**overrides: Any) -> NAT:
    """NAT-Base."""
    return _nat("nat_base", overrides, **_BASE, drop_path_rate=0.5, layer_scale=1e-5)


def dinat_mini(**overrides: Any) -> NAT:
    """DiNAT-Mini."""
    return _dinat("dinat_mini", overrides, **_MINI, drop_path_rate=0.2)


def dinat_tiny(**overrides: Any) -> NAT:
    """DiNAT-Tiny."""
    return _dinat("dinat_tiny", overrides, **_TINY, drop_path_rate=0.2)


def dinat_small(**overrides: Any) -> NAT:
    """DiNAT-Small. Unlike NAT-Small it has no layer scale."""
    return _dinat("dinat_small", overrides, **_SMALL, drop_path_rate=0.3)


def dinat_base(**overrides: Any) -> NAT:
    """DiNAT-Base."""
    return _dinat("dinat_base", overrides, **_BASE, drop_path_rate=0.5, layer_scale=1e-5)


def dinat_large(**overrides: Any) -> NAT:
    """DiNAT-Large, tuned on ImageNet-1K after ImageNet-22K."""
    return _dinat("dinat_large", overrides, **_LARGE, drop_path_rate=0.35)


def dinat_large_384(**overrides: Any) -> NAT:
    """DiNAT-Large for pictures of 384 x 384: larger dilations."""
    return _dinat("dinat_large_384", overrides, **_LARGE, drop_path_rate=0.35, dilated_for=384)


def dinat_large_384_11x11(**overrides: Any) -> NAT:
    """DiNAT-Large for pictures of 384 x 384 with 11 x 11 windows."""
    numbers = {**_LARGE, "kernel_size": 11, "drop_path_rate": 0.35}
    return _dinat("dinat_large_384_11x11", overrides, **numbers, dilated_for=384)


def dinat_large_21k(**overrides: Any) -> NAT:
    """DiNAT-Large as pretrained on ImageNet-22K."""
    numbers = {**_LARGE, "drop_path_rate": 0.2, "num_classes": 21841}
    return _dinat("dinat_large_21k", overrides, **numbers)


def dinat_large_21k_11x11(**overrides: Any) -> NAT:
    """DiNAT-Large of ImageNet-22K with its bias tables resized to 11 x 11 windows."""
    numbers = {**_LARGE, "kernel_size": 11, "drop_path_rate": 0.2, "num_classes": 21841}
    # Its dilations are those of 384 x 384 pictures, which it was made to be tuned on.
    return _dinat("dinat_large_21k_11x11", overrides, **numbers, dilated_for=384)


def _nat(name: str, overrides: dict[str, Any], **numbers: Any) -> NAT:
    return sized(NAT, name, overrides, family="nat", **numbers)


def _dinat(name: str, overrides: dict[str, Any], dilated_for: int = 224, **numbers: Any) -> NAT:
    return _nat(name, overrides, dilated_for=dilated_for, **numbers)
