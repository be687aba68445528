"""Neighborhood attention by query tiles: plain torch, matrix products only, for eager mode.

In: checked tensors and a `Neighborhood`. Out: attention output and log-sum-exp.

The tokens of each dilation group are cut into tiles of neighboring queries. The windows of one tile
lie in one box of at most tile + kernel_size - 1 keys per axis, so a tile is a small dense attention
with a mask. Several times faster than gathering every window, at about twice the useful logits per
axis. A weight of zero times a NaN value would be NaN, so `applicable` asks for finite values.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.nn.functional import embedding  # the fastest gather of rows, forward and backward

from natcupy.neighborhood import Neighborhood, rpb_index, window

MIN_TILE = 4  # below this the key box is mostly overlap


class Tiling(NamedTuple):
    """One axis or one map cut into T tiles of t queries, each with a box of u keys."""

    query: Tensor  # [T, t] token of each query slot; unused slots repeat a token
    key: Tensor  # [T, u] token of each key slot
    bias: Tensor  # [T, t, u] index into (flattened) rpb
    hidden: Tensor  # [T, t, u] True where the query does not see the key
    tile: Tensor  # [length] tile that holds each token as a query
    slot: Tensor  # [length] and its slot there


def applicable(value: Tensor, additional_values: Tensor | None) -> bool:
    """True in eager mode with finite values; tracing and non-finite values take the gather path."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or value.is_meta:
        return False
    try:
        finite = bool(value.isfinite().all())
        if additional_values is not None:
            finite = finite and bool(additional_values.isfinite().all())
    except RuntimeError:  # inside vmap or a fake tensor there is no value to look at
        return False
    return finite


def attention(
    query, key, value, hood, scale, rpb, additional_keys, additional_values, return_lse=True
):
    """Same contract as `reference.attention`."""
    kv_heads, dtype = key.shape[-2], query.dtype
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    tiling = map_tiling(tuple(query.shape[1:-2]), hood, query.device)
    q = _take(query.unflatten(-2, (kv_heads, -1)).flatten(-2), tiling.query, compute)
    k, v = _take(key, tiling.key, compute), _take(value, tiling.key, compute)
    groups = query.shape[-2] // kv_heads
    q = q.unflatten(-1, (groups, -1)).movedim(-2, 2) * scale  # [B, Hkv, G, T, t, D]
    logits = q @ k[:, :, None].mT
    if rpb is not None:
        bias = _bias(tiling, rpb, kv_heads, compute)
        # where each sample has a table of its own, the logits may have none yet
        logits = logits + bias if is_functorch_wrapped_tensor(bias) else logits.add_(bias)
    logits.masked_fill_(tiling.hidden, float("-inf"))
    if additional_keys is not None:
        extra = additional_keys.to(compute).movedim(1, 2)[:, :, None, None]
        logits = torch.cat([logits, q @ extra.mT], -1)
    weights = logits.softmax(-1)
    box = k.shape[-2]
    out = weights[..., :box] @ v[:, :, None]
    if additional_values is not None:
        extra = additional_values.to(compute).movedim(1, 2)[:, :, None, None]
        out = out + weights[..., box:] @ extra
    lse = None
    if return_lse:
        lse = _untile(logits.logsumexp(-1)[..., None], tiling, query).squeeze(-1)
    return _untile(out, tiling, query).to(dtype), lse


@lru_cache(maxsize=32)
def map_tiling(shape: tuple[int, ...], hood: Neighborhood, device: torch.device) -> Tiling:
    """Tiles of a whole map, tokens, tiles and slots counted in row-major order."""
    whole = None
    axes = zip(shape, hood.kernel_size, hood.stride, hood.dilation, hood.is_causal, strict=True)
    with torch.inference_mode(False):  # the tables outlive the call, whose mode they must not keep
        for length, kernel_size, stride, dilation, is_causal in axes:
            axis = axis_tiling(length, kernel_size, stride, dilation, is_causal, device)
            whole = axis if whole is None else _product(whole, axis, length, 2 * kernel_size - 1)
    return whole


def axis_tiling(length, kernel_size, stride, dilation, is_causal, device) -> Tiling:
    """Tiles of one axis: every dilation group gets the same number of tiles of the same size."""
    longest = -(-length // dilation)
    tile = _tile_size(longest, kernel_size, stride)
    tiles = -(-longest // tile)
    box = min(tile + kernel_size - 1, longest)

    group = torch.arange(dilation, device=device)[:, None, None]
    members = (length - group + dilation - 1) // dilation
    queries = torch.arange(tiles * tile, device=device).view(1, tiles, tile)
    queries = queries.minimum(members - 1)
    first, _ = window(queries[..., :1], members, kernel_size, stride, is_causal)
    first = first.minimum((members - box).clamp(min=0))
    keys = first + torch.arange(box, device=device)

    start, end = window(queries, members, kernel_size, stride, is_causal)
    hidden = (keys[:, :, None] < start[..., None]) | (keys[:, :, None] >= end[..., None])
    keys = keys.minimum(members - 1)
    bias = rpb_index(keys[:, :, None], queries[..., None], kernel_size)
    bias = bias.clamp(0, 2 * kernel_size - 2)

    token = torch.arange(length, device=device)
    place = token % dilation * (tiles * tile) + token // dilation
    return Tiling(
        query=(queries * dilation + group).flatten(0, 1),
        key=(keys * dilation + group).flatten(0, 1),
        bias=bias.flatten(0, 1),
        hidden=hidden.flatten(0, 1),
        tile=place // tile,
        slot=place % tile,
    )


def _tile_size(longest: int, kernel_size: int, stride: int) -> int:
    """Queries per tile: about one window, even over the axis, whole stride groups."""
    tiles = -(-longest // max(kernel_size, MIN_TILE))
    tile = -(-longest // tiles)
    return -(-tile // stride) * stride


def _product(a: Tiling, b: Tiling, length: int, bias_span: int) -> Tiling:
    """Tiling of the map whose last axis (`length` tokens) is `b` and whose others are `a`."""
    return Tiling(
        query=_pairs(a.query * length, b.query),
        key=_pairs(a.key * length, b.key),
        bias=_pair_boxes(a.bias * bias_span, b.bias),
        hidden=_pair_boxes(a.hidden, b.hidden),
        tile=(a.tile[:, None] * len(b.query) + b.tile).flatten(),
        slot=(a.slot[:, None] * b.query.shape[1] + b.slot).flatten(),
    )


def _pairs(a: Tensor, b: Tensor) -> Tensor:
    return (a[:, None, :, None] + b[None, :, None, :]).flatten(2).flatten(0, 1)


def _pair_boxes(a: Tensor, b: Tensor) -> Tensor:
    a, b = a[:, None, :, None, :, None], b[None, :, None, :, None, :]
    both = a | b if a.dtype == torch.bool else a + b
    return both.flatten(4).flatten(2, 3).flatten(0, 1)


def _bias(tiling: Tiling, rpb: Tensor, kv_heads: int, dtype) -> Tensor:
    """Bias of every pair, [Hkv, G, T, t, u]."""
    rows = embedding(tiling.bias, rpb.to(dtype).flatten(1).t()).movedim(-1, 0)
    return rows.unflatten(0, (kv_heads, -1))


def _take(x: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, *spatial, Hkv, C] and tokens [T, t] to [B, Hkv, T, t, C]."""
    rows = x.flatten(1, -3).movedim(2, 1).to(dtype)
    batch, heads, tokens, channels = rows.shape
    first = torch.arange(batch * heads, device=x.device).view(batch, heads, 1, 1) * tokens
    return embedding(first + index, rows.reshape(-1, channels))


def _untile(x: Tensor, tiling: Tiling, like: Tensor) -> Tensor:
    """[B, Hkv, G, T, t, C] to [B, *spatial, H, C] with the spatial shape of `like`."""
    rows = x.flatten(3, 4).flatten(1, 2)
    batch, heads, slots, channels = rows.shape
    place = tiling.tile * tiling.query.shape[1] + tiling.slot
    first = torch.arange(batch * heads, device=x.device).view(batch, 1, heads) * slots
    picked = embedding(first + place[:, None], rows.reshape(-1, channels))
    return picked.unflatten(1, like.shape[1:-2])
