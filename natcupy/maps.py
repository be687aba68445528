"""Attention weights of a model on a picture: where one place looks.

In: a model of the zoo, a prepared picture, a block and a query. Out: its weights laid out on the
block's map, one layer per head, each summing to one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from natcupy.functional import na2d_qk
from natcupy.modules import NeighborhoodAttention2D
from natcupy.neighborhood import neighbor_table


@dataclass(frozen=True)
class AttentionMap:
    """Where a query looks.

    Attributes:
        weights: `[heads, height, width]` on the block's map; each head sums to 1.
        query: (row, column) of the place that looks.
        window: `[height, width]` bool: the keys that the query could see.
        outside: `[heads]`, the share that went to padding beyond the map (small maps are padded).
    """

    weights: Tensor
    query: tuple[int, int]
    window: Tensor
    outside: Tensor


def attention_weights(module: NeighborhoodAttention2D, x: Tensor) -> Tensor:
    """The weights inside a layer for its input `[B, H, W, C]`: `[B, H', W', heads, taps]`.

    H' and W' are H and W, or the size that a map smaller than the window is padded to.
    """
    padded = module._pad(x)
    qkv = module.qkv(padded).unflatten(-1, (3, module.num_heads, module.head_dim))
    query, key, _ = qkv.unbind(-3)
    hood = module.hood
    logits = na2d_qk(
        query,
        key,
        hood.kernel_size,
        hood.stride,
        hood.dilation,
        hood.is_causal,
        scale=module.scale,
        rpb=module.rpb,
    )
    return logits.softmax(-1)


@torch.no_grad()
def attention_map(
    model: nn.Module, picture: Tensor, layer: NeighborhoodAttention2D, query: tuple[float, float]
) -> AttentionMap:
    """Where a place of the picture looks in one attention layer of the model.

    Args:
        model: any model that runs `layer` on `[B, H, W, C]` in its forward pass.
        picture: `[1, C, H, W]`, prepared for the model.
        layer: one of the model's attention layers.
        query: (x, y) of the place as fractions of width and height.

    Raises TypeError for another kind of layer, ValueError for a place outside the picture or a
    layer that the model does not run.
    """
    _check(layer, query)
    seen: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        model(picture)
    finally:
        hook.remove()
    if not seen:
        raise ValueError(
            "layer must be one that the model runs, got one that it did not; pass a layer of "
            "model.modules()."
        )
    height, width = seen[0].shape[1:3]
    row, column = min(int(query[1] * height), height - 1), min(int(query[0] * width), width - 1)
    weights = attention_weights(layer, seen[0])[0]
    padded = weights.shape[:2]
    index, _, _ = neighbor_table(padded, layer.hood, weights.device)
    taps = index[row * padded[1] + column]
    full = weights.new_zeros(layer.num_heads, padded[0] * padded[1])
    full.index_add_(1, taps, weights[row, column])
    window = torch.zeros(padded[0] * padded[1], dtype=torch.bool)
    window[taps.cpu()] = True
    full = full.unflatten(1, padded)[:, :height, :width].cpu()
    return AttentionMap(
        weights=full,
        query=(row, column),
        window=window.unflatten(0, padded)[:height, :width],
        outside=1 - full.sum((1, 2)),
    )


def _check(layer: nn.Module, query: tuple[float, float]) -> None:
    if not isinstance(layer, NeighborhoodAttention2D):
        raise TypeError(
            f"layer must be a NeighborhoodAttention2D, got {type(layer).__name__}; other layers "
            "have no windows to show."
        )
    if not all(0 <= x <= 1 for x in query):
        raise ValueError(
            "query must be (x, y) as fractions of width and height, from 0 to 1 each, got "
            f"{tuple(query)}."
        )
