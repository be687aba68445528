"""Neighborhood attention in plain torch: the definition, and the backend `"torch"` on any device.

In: checked tensors and a `Neighborhood`. Out: attention outputs, logits, log-sum-exp.

Each query's keys are gathered by index, so memory is O(tokens * window), a NaN stays inside the
windows that hold it, and every torch transform works: double backward, `torch.func`,
`torch.compile`, `torch.export`. Half precision is computed in float32. `tiles.py` does the same
faster in eager mode when the values are finite; `attention` picks between the two.
"""

from __future__ import annotations

import torch
from torch import Tensor

from natcupy import tiles
from natcupy.neighborhood import Neighborhood, neighbor_table


def unsupported_reason(*_args) -> None:
    """Plain torch runs everything the public functions accept."""
    return None


def attention(
    query: Tensor,  # [B, *spatial, H, D]
    key: Tensor,  # [B, *spatial, Hkv, D]
    value: Tensor,  # [B, *spatial, Hkv, Dv]
    hood: Neighborhood,
    scale: float,
    rpb: Tensor | None,  # [H, 2K-1, ...]
    additional_keys: Tensor | None,  # [B, E, Hkv, D]
    additional_values: Tensor | None,  # [B, E, Hkv, Dv]
    return_lse: bool = True,
) -> tuple[Tensor, Tensor | None]:  # [B, *spatial, H, Dv], [B, *spatial, H]
    """Output in the inputs' dtype, and if asked natural log-sum-exp in the compute dtype."""
    if tiles.applicable(value, additional_values):
        return tiles.attention(
            query, key, value, hood, scale, rpb, additional_keys, additional_values, return_lse
        )
    index, logits = _logits(query, key, hood, scale, rpb, additional_keys)
    out = _weighted_sum(logits.softmax(-1), value, index, additional_values)
    lse = _heads_last(logits.logsumexp(-1), query) if return_lse else None
    return _heads_last(out, query).to(value.dtype), lse


def qk(
    query: Tensor,
    key: Tensor,
    hood: Neighborhood,
    scale: float,
    rpb: Tensor | None,
    additional_keys: Tensor | None,
) -> Tensor:  # [B, *spatial, H, prod(K) + E]
    """Attention logits per query and tap, -inf in the empty slots of causal windows."""
    _, logits = _logits(query, key, hood, scale, rpb, additional_keys)
    return _heads_last(logits, query).to(query.dtype)


def av(
    attn: Tensor,  # [B, *spatial, H, prod(K) + E]
    value: Tensor,
    hood: Neighborhood,
    additional_values: Tensor | None,
) -> Tensor:  # [B, *spatial, H, Dv]
    """Values summed under given weights, taps ordered as `qk` orders them."""
    index, _, valid = neighbor_table(attn.shape[1:-2], hood, attn.device)
    weights = _fold_query(attn, value.shape[-2])
    if valid is not None:
        taps = weights[..., : hood.size].masked_fill(~valid[:, None], 0.0)
        weights = torch.cat([taps, weights[..., hood.size :]], -1)
    out = _weighted_sum(weights, value, index, additional_values)
    return _heads_last(out, attn).to(value.dtype)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of logits and sums: float64 for float64, float32 otherwise."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def bias_rows(rpb: Tensor, bias: Tensor, kv_heads: int) -> Tensor:
    """Bias of each (kv head, ..., query of its group, ...) from flat indices `bias` [N, T].

    Returns [Hkv, N, G, T] in the table's dtype.
    """
    rows = rpb.flatten(1)[:, bias]
    return rows.unflatten(0, (kv_heads, -1)).movedim(1, 2)


def _logits(query, key, hood, scale, rpb, additional_keys):
    """Flat key indices [N, T] and logits [B, Hkv, N, G, T + E]."""
    kv_heads = key.shape[-2]
    index, bias, valid = neighbor_table(query.shape[1:-2], hood, query.device)
    folded = _fold_query(query, kv_heads) * scale
    logits = folded @ _gather(key, index, folded.dtype).mT
    if rpb is not None:
        logits = logits + bias_rows(rpb.to(folded.dtype), bias, kv_heads)
    if valid is not None:
        logits = logits.masked_fill(~valid[:, None], float("-inf"))
    if additional_keys is not None:
        extra = additional_keys.to(folded.dtype).movedim(1, 2)[:, :, None]
        logits = torch.cat([logits, folded @ extra.mT], -1)
    return index, logits


def _weighted_sum(weights, value, index, additional_values):
    """Weights [B, Hkv, N, G, T + E] and values to [B, Hkv, N, G, Dv]."""
    taps = index.shape[1]
    out = weights[..., :taps] @ _gather(value, index, weights.dtype)
    if additional_values is not None:
        extra = additional_values.to(weights.dtype).movedim(1, 2)[:, :, None]
        out = out + weights[..., taps:] @ extra
    return out


def _gather(x: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, *spatial, Hkv, D] and [N, T] to [B, Hkv, N, T, D]."""
    return x.flatten(1, -3).movedim(2, 1).to(dtype)[:, :, index]


def _fold_query(x: Tensor, kv_heads: int) -> Tensor:
    """[B, *spatial, H, D] to [B, Hkv, N, G, D] in the compute dtype; head h is (h // G, h % G)."""
    folded = x.flatten(1, -3).unflatten(2, (kv_heads, x.shape[-2] // kv_heads))
    return folded.movedim(2, 1).to(compute_dtype(x.dtype))


def _heads_last(x: Tensor, like: Tensor) -> Tensor:
    """[B, Hkv, N, G, ...] to [B, *spatial, H, ...] with the spatial shape of `like`."""
    return x.movedim(1, 2).flatten(2, 3).unflatten(1, like.shape[1:-2])
