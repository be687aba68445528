"""Isotropic models: 16 x 16 patches and one map size throughout, as in ViT.

In: a `ModelConfig` of family "isotropic" or "vitrpb", or a size's name. Out: `Isotropic`, with
neighborhood attention (NAT, DiNAT) or, for comparison, dense attention with the same kind of
relative positional bias (ViT-RPB). Paper: DiNAT (arXiv 2209.15001), table 6. No class token, no
absolute position; pictures of one fixed size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from natcupy.zoo.base import ImageModel
from natcupy.zoo.config import PATCH_SIZE, ModelConfig
from natcupy.zoo.layers import Block, PatchEmbed, drop_path_rates, neighborhood_blocks
from natcupy.zoo.sizes import sized


class Isotropic(ImageModel):
    """Pictures `[B, in_chans, img_size, img_size]` to logits or feature maps (one per block)."""

    stages_name = "layers"

    def __init__(self, config: ModelConfig, pretrained_cfg: dict[str, Any] | None = None) -> None:
        super().__init__(config, pretrained_cfg)
        patch = PATCH_SIZE[config.family]
        self.patch_embed = PatchEmbed(config.in_chans, config.embed_dim, patch)
        make = _dense_blocks if config.family == "vitrpb" else _windowed_blocks
        self.layers = nn.Sequential(*make(config))
        self._finish()


class DenseAttention(nn.Module):
    """Self-attention over a whole square map, with a learned bias per offset.

    The logit of a query and a key gets `rpb[head, dr, dc]`, where dr, dc = (key - query) + side - 1
    per axis, as in neighborhood attention. `relative_position_index`, part of the released state
    dicts, holds each pair's place in the flattened table.
    """

    def __init__(self, embed_dim: int, num_heads: int, side: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.side = side
        self.rpb = nn.Parameter(torch.empty(num_heads, 2 * side - 1, 2 * side - 1))
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim)
        self.proj = nn.Linear(embed_dim, embed_dim)
        self.relative_position_index: Tensor
        self.register_buffer("relative_position_index", _pair_index(side))
        self.register_load_state_dict_pre_hook(_check_pair_index)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the bias table anew and write the index again, as after `to_empty`."""
        nn.init.trunc_normal_(self.rpb, std=0.02)
        with torch.no_grad():
            self.relative_position_index.copy_(_pair_index(self.side))

    def forward(self, x: Tensor) -> Tensor:
        """`[B, side, side, embed_dim]` to the same shape."""
        qkv = self.qkv(x).flatten(1, 2).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        bias = self.rpb.flatten(1)[:, self.relative_position_index]
        out = F.scaled_dot_product_attention(query, key, value, bias.to(query.dtype)[None])
        return self.proj(out.transpose(1, 2).reshape(x.shape))


def _pair_index(side: int) -> Tensor:
    """`[side**2, side**2]`: for each query and key, the place of their offset in a flat table."""
    axis = torch.arange(side)
    row, column = axis.repeat_interleave(side), axis.repeat(side)
    rows = row[None, :] - row[:, None] + side - 1
    columns = column[None, :] - column[:, None] + side - 1
    return rows * (2 * side - 1) + columns


def _check_pair_index(module: DenseAttention, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """A loaded index must stay inside the table; outside it the GPU would read foreign memory."""
    index = state.get(f"{prefix}relative_position_index")
    places = module.rpb[0].numel()
    if index is None or index.is_meta or not index.numel():
        return
    if index.is_floating_point() or int(index.min()) < 0 or int(index.max()) >= places:
        raise ValueError(
            f"{prefix}relative_position_index must hold integers in 0..{places - 1}, got "
            f"{index.dtype} values from {index.min().item()} to {index.max().item()}."
        )


def _windowed_blocks(config: ModelConfig) -> list[Block]:
    return next(neighborhood_blocks(config))


def _dense_blocks(config: ModelConfig) -> list[Block]:
    dim, heads = config.embed_dim, config.num_heads[0]
    side = config.img_size // PATCH_SIZE["vitrpb"]
    return [
        Block(dim, DenseAttention(dim, heads, side), config.mlp_ratio, rate, config.layer_scale)
        for rate in drop_path_rates(config)
    ]


_SMALL = {"embed_dim": 384, "depths": (12,), "num_heads": (12,), "drop_path_rate": 0.1}
_BASE = {"embed_dim": 768, "depths": (12,), "num_heads": (24,), "drop_path_rate": 0.4}


def nat_isotropic_small(**overrides: Any) -> Isotropic:
    """Isotropic NAT-Small."""
    return _isotropic("nat_isotropic_small", overrides, **_SMALL)


def nat_isotropic_base(**overrides: Any) -> Isotropic:
    """Isotropic NAT-Base."""
    return _isotropic("nat_isotropic_base", overrides, **_BASE)


def dinat_isotropic_small(**overrides: Any) -> Isotropic:
    """Isotropic DiNAT-Small: dilation 2 in every other block."""
    return _dilated("dinat_isotropic_small", overrides, **_SMALL)


def dinat_isotropic_base(**overrides: Any) -> Isotropic:
    """Isotropic DiNAT-Base: dilation 2 in every other block."""
    return _dilated("dinat_isotropic_base", overrides, **_BASE)


def vitrpb_small(**overrides: Any) -> Isotropic:
    """ViT-RPB-Small: dense attention with relative positional bias."""
    return _isotropic("vitrpb_small", overrides, family="vitrpb", kernel_size=None, **_SMALL)


def vitrpb_base(**overrides: Any) -> Isotropic:
    """ViT-RPB-Base: dense attention with relative positional bias."""
    return _isotropic("vitrpb_base", overrides, family="vitrpb", kernel_size=None, **_BASE)


def _dilated(name: str, overrides: dict[str, Any], **numbers: Any) -> Isotropic:
    return _isotropic(name, overrides, dilated_for=224, **numbers)


def _isotropic(name: str, overrides: dict[str, Any], **numbers: Any) -> Isotropic:
    shared = {"family": "isotropic", "mlp_ratio": 4.0, "img_size": 224}
    return sized(Isotropic, name, overrides, **{**shared, **numbers})
