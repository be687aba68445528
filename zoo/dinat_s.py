"""DiNAT-s: Swin's skeleton (patches, patch merging) around dilated neighborhood attention.

In: a `ModelConfig` of family "dinat_s", or a size's name. Out: `DiNATS`. Paper: DiNAT (arXiv
2209.15001), section 4.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from natcupy.zoo.base import ImageModel
from natcupy.zoo.config import PATCH_SIZE, ModelConfig
from natcupy.zoo.layers import PatchEmbed, PatchMerging, neighborhood_stages
from natcupy.zoo.sizes import sized


class DiNATS(ImageModel):
    """Pictures `[B, in_chans, H, W]` of any size to logits or feature maps."""

    stages_name = "layers"

    def __init__(self, config: ModelConfig, pretrained_cfg: dict[str, Any] | None = None) -> None:
        super().__init__(config, pretrained_cfg)
        self.patch_embed = PatchEmbed(config.in_chans, config.embed_dim, PATCH_SIZE["dinat_s"])
        self.layers = nn.ModuleList(neighborhood_stages(config, PatchMerging))
        self._finish()


_TINY = {"embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24)}
_SMALL = {"embed_dim": 96, "depths": (2, 2, 18, 2), "num_heads": (3, 6, 12, 24)}
_BASE = {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)}
_LARGE = {"embed_dim": 192, "depths": (2, 2, 18, 2), "num_heads": (6, 12, 24, 48)}


def dinat_s_tiny(**overrides: Any) -> DiNATS:
    """DiNAT-s-Tiny."""
    return _dinat_s("dinat_s_tiny", overrides, **_TINY, drop_path_rate=0.2)


def dinat_s_small(**overrides: Any) -> DiNATS:
    """DiNAT-s-Small."""
    return _dinat_s("dinat_s_small", overrides, **_SMALL, drop_path_rate=0.3)


def dinat_s_base(**overrides: Any) -> DiNATS:
    """DiNAT-s-Base."""
    return _dinat_s("dinat_s_base", overrides, **_BASE, drop_path_rate=0.5)


def dinat_s_large(**overrides: Any) -> DiNATS:
    """DiNAT-s-Large, tuned on ImageNet-1K after ImageNet-22K."""
    return _dinat_s("dinat_s_large", overrides, **_LARGE, drop_path_rate=0.35)


def dinat_s_large_384(**overrides: Any) -> DiNATS:
    """DiNAT-s-Large for pictures of 384 x 384: larger dilations."""
    return _dinat_s("dinat_s_large_384", overrides, **_LARGE, drop_path_rate=0.35, dilated_for=384)


def dinat_s_large_21k(**overrides: Any) -> DiNATS:
    """DiNAT-s-Large as pretrained on ImageNet-22K."""
    return _dinat_s("dinat_s_large_21k", overrides, **_LARGE, drop_path_rate=0.2, num_classes=21841)


def _dinat_s(
    name: str, overrides: dict[str, Any], dilated_for: int = 224, **numbers: Any
) -> DiNATS:
    numbers = {"family": "dinat_s", "mlp_ratio": 4.0, **numbers}
    return sized(DiNATS, name, overrides, dilated_for=dilated_for, **numbers)
