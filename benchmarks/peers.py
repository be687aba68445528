"""Ways to attend that natcupy is measured beside, all with one face.

In: query, key, value `[B, *spatial, H, D]`, a `Neighborhood`, a scale and a bias `[H, 2K-1, ...]`
or None. Out: `[B, *spatial, H, D]`. A way says why it cannot run a call; `exact` ways compute
neighborhood attention itself, the others something of similar cost that people use in its place.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from math import prod

import torch
from torch import Tensor
from torch.nn import functional as nn_functional

import natcupy
from benchmarks.cpu_peers import CPU_WAYS, natten_by_halves
from benchmarks.ways import DENSE_BYTES, Way, anything, flat, unflat
from natcupy.neighborhood import Neighborhood, rpb_index, window

_MODULES = {"cuda": "natcupy.cuda.ops", "cpu": "natcupy.cpu", "torch": "natcupy.reference"}


# ------------------------------------------------------------------------------------------------
# natcupy


def _natcupy(backend: str) -> Way:
    calls = {1: natcupy.na1d, 2: natcupy.na2d, 3: natcupy.na3d}

    def attend(query, key, value, hood, scale, rpb):
        return calls[hood.rank](
            query, key, value, hood.kernel_size, hood.stride, hood.dilation, hood.is_causal,
            scale=scale, rpb=rpb, backend=backend,
        )  # fmt: skip

    def why_not(query, hood, rpb, backward):
        if backend in ("cpu", "cuda") and query.device.type != backend:
            return f"made for {backend} tensors"
        module = importlib.import_module(_MODULES[backend])
        reason = module.unsupported_reason(query, query, query, hood, rpb, None, None)
        return None if reason is None else reason.rstrip(".")

    return Way(f"natcupy {backend}", True, attend, why_not)


# ------------------------------------------------------------------------------------------------
# torch's FlexAttention, compiled


def _group(place: Tensor, length: int, dilation: int) -> tuple[Tensor, Tensor, Tensor]:
    """Group, position in it and its length."""
    group = place % dilation
    return group, place // dilation, (length - group + dilation - 1) // dilation


def _coordinates(token: Tensor, shape: tuple[int, ...]) -> list[Tensor]:
    places = []
    for length in reversed(shape):
        places.append(token % length)
        token = token // length
    return places[::-1]


def _sees(shape: tuple[int, ...], hood: Neighborhood):
    """A FlexAttention mask function: whether a query sees a key."""

    def sees(_batch, _head, query, key):
        seen = None
        for axis, (q, k) in enumerate(
            zip(_coordinates(query, shape), _coordinates(key, shape), strict=True)
        ):
            window_of = hood.kernel_size[axis], hood.stride[axis], hood.is_causal[axis]
            group, position, length = _group(q, shape[axis], hood.dilation[axis])
            other, place, _ = _group(k, shape[axis], hood.dilation[axis])
            start, end = window(position, length, *window_of)
            here = (group == other) & (place >= start) & (place < end)
            seen = here if seen is None else seen & here
        return seen

    return sees


@functools.lru_cache(maxsize=8)
@torch.inference_mode(False)  # tables outlive the call, whose mode they must not keep
def _flex_mask(shape: tuple[int, ...], hood: Neighborhood, device: torch.device):
    from torch.nn.attention.flex_attention import create_block_mask

    tokens = prod(shape)
    return create_block_mask(_sees(shape, hood), None, None, tokens, tokens, device=device)


@functools.cache
def _compiled_flex():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _flex(query, key, value, hood, scale, rpb):
    shape = tuple(query.shape[1:-2])

    def biased(score, _batch, head, q, k):
        at = [
            rpb_index(there // d, here // d, size).clamp(0, 2 * size - 2)
            for here, there, size, d in zip(
                _coordinates(q, shape),
                _coordinates(k, shape),
                hood.kernel_size,
                hood.dilation,
                strict=True,
            )
        ]
        return score + rpb[(head, *at)]

    mask = _flex_mask(shape, hood, query.device)
    # One graph for each shape, bias and mode; the harness runs more of them than a model would.
    with torch._dynamo.config.patch(recompile_limit=1000):
        out = _compiled_flex()(
            flat(query), flat(key), flat(value),
            score_mod=None if rpb is None else biased, block_mask=mask, scale=scale,
        )  # fmt: skip
    return unflat(out, query)


def _flex_why_not(query, hood, rpb, backward):
    if importlib.util.find_spec("torch.nn.attention.flex_attention") is None:
        return "this torch has none"
    if query.device.type == "cpu" and backward:
        return "torch has no backward pass of it on a CPU"
    if query.dtype == torch.float64:
        return "it takes no float64"
    if query.device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "it needs triton"
    return None


# ------------------------------------------------------------------------------------------------
# torch's scaled_dot_product_attention


@functools.lru_cache(maxsize=4)
@torch.inference_mode(False)
def _pairs(shape: tuple[int, ...], hood: Neighborhood, device: torch.device):
    """(seen [N, N], index into a flattened bias [N, N]) of every pair of tokens."""
    tokens = torch.arange(prod(shape), device=device)
    seen = _sees(shape, hood)(None, None, tokens[:, None], tokens[None])
    index = torch.zeros_like(seen, dtype=torch.long)
    axes = zip(_coordinates(tokens, shape), hood.kernel_size, hood.dilation, strict=True)
    for place, size, d in axes:
        step = rpb_index(place[None] // d, place[:, None] // d, size).clamp(0, 2 * size - 2)
        index = index * (2 * size - 1) + step
    return seen, index


def _masked(query, key, value, hood, scale, rpb):
    seen, index = _pairs(tuple(query.shape[1:-2]), hood, query.device)
    mask = seen
    if rpb is not None:
        mask = rpb.flatten(1)[:, index].masked_fill(~seen, float("-inf"))
    out = nn_functional.scaled_dot_product_attention(
        flat(query), flat(key), flat(value), attn_mask=mask, scale=scale
    )
    return unflat(out, query)


def _masked_why_not(query, hood, rpb, backward):
    tokens, heads = prod(query.shape[1:-2]), query.shape[-2]
    logits = query.shape[0] * heads * tokens**2 * query.dtype.itemsize
    index = tokens**2 * 8
    needed = index + (heads * tokens**2 * query.dtype.itemsize + logits) * (1 + backward)
    if needed > DENSE_BYTES[query.device.type]:
        return f"mask and logits would take {needed / 1e9:.1f} GB"
    return None


def _dense(query, key, value, hood, scale, rpb):
    out = nn_functional.scaled_dot_product_attention(
        flat(query), flat(key), flat(value), scale=scale
    )
    return unflat(out, query)


# ------------------------------------------------------------------------------------------------
# shifted windows: Liu et al., "Swin Transformer" (ICCV 2021), section 3.2


@functools.lru_cache(maxsize=8)
@torch.inference_mode(False)
def _window_tables(size: tuple[int, ...], grid: tuple[int, ...], device: torch.device):
    """(index into a flattened bias [T, T], mask of the shifted windows [windows, T, T])."""
    places = torch.cartesian_prod(*(torch.arange(k, device=device) for k in size))
    places = places.reshape(prod(size), len(size))
    index = torch.zeros(len(places), len(places), dtype=torch.long, device=device)
    for axis, k in enumerate(size):
        step = places[None, :, axis] - places[:, None, axis] + k - 1
        index = index * (2 * k - 1) + step
    region = torch.zeros([k * n for k, n in zip(size, grid, strict=True)], device=device)
    for axis, k in enumerate(size):  # a rolled map holds tokens from both of its ends
        cut = region.shape[axis] - k // 2
        region = region * 3
        region.narrow(axis, cut, k // 2).add_(1)
        region.narrow(axis, region.shape[axis] - k, k - k // 2).add_(2)
    tokens = _partition(region[None, ..., None, None], size)[..., 0].flatten(1)
    return index, tokens[:, :, None] == tokens[:, None, :]


def _partition(x: Tensor, size: tuple[int, ...]) -> Tensor:
    """[B, *spatial, H, D] as [B * windows, H, T, D]."""
    for axis, k in enumerate(size):
        x = x.unflatten(1 + 2 * axis, (-1, k))
    rank = len(size)
    order = [0, *range(1, 2 * rank, 2), 2 * rank + 1, *range(2, 2 * rank + 1, 2), 2 * rank + 2]
    return x.permute(order).flatten(0, rank).flatten(2, -2)


def _unpartition(x: Tensor, size: tuple[int, ...], batch: int, grid: tuple[int, ...]) -> Tensor:
    """The way back."""
    rank = len(size)
    x = x.unflatten(2, size).unflatten(0, (batch, *grid))
    order = [0]
    for axis in range(rank):
        order += [1 + axis, 2 + rank + axis]
    x = x.permute([*order, 1 + rank, 2 + 2 * rank])
    for axis in range(rank):
        x = x.flatten(1 + axis, 2 + axis)
    return x


def _windows(query, key, value, hood, scale, rpb):
    """Attention inside shifted windows of the kernel's size, as Swin's odd layers do it.

    Roll, pad, partition, attend under a bias and a mask, and all the way back.
    """
    size, shape = hood.kernel_size, query.shape[1:-2]
    grid = tuple(-(-n // k) for n, k in zip(shape, size, strict=True))
    axes = tuple(range(1, 1 + hood.rank))
    shift = tuple(-(k // 2) for k in size)
    pads = [0, 0, 0, 0]
    for n, k, count in zip(reversed(shape), reversed(size), reversed(grid), strict=True):
        pads += [0, k * count - n]
    parts = [
        _partition(nn_functional.pad(x, pads).roll(shift, axes), size) for x in (query, key, value)
    ]
    index, seen = _window_tables(size, grid, query.device)
    bias = 0.0 if rpb is None else rpb.flatten(1)[:, index]
    mask = torch.zeros_like(seen, dtype=query.dtype).masked_fill(~seen, float("-inf"))
    mask = (mask[:, None] + bias).repeat(query.shape[0], 1, 1, 1)
    out = nn_functional.scaled_dot_product_attention(*parts, attn_mask=mask, scale=scale)
    out = _unpartition(out, size, query.shape[0], grid).roll([-s for s in shift], axes)
    for axis, n in zip(axes, shape, strict=True):
        out = out.narrow(axis, 0, n)
    return out


# ------------------------------------------------------------------------------------------------
# NATTEN


def _natten(query, key, value, hood, scale, rpb):
    if _has_halves(hood.rank):
        return natten_by_halves(query, key, value, hood, scale, rpb)
    return _natten_whole(query, key, value, hood, scale)


def _natten_whole(query, key, value, hood, scale, backend=None):
    import natten

    more = {} if backend is None else {"backend": backend}
    run = getattr(natten, f"na{hood.rank}d")
    return run(
        query.contiguous(), key.contiguous(), value.contiguous(),
        kernel_size=hood.kernel_size, stride=hood.stride, dilation=hood.dilation,
        is_causal=hood.is_causal, scale=scale, **more,
    )  # fmt: skip


@functools.cache
def _natten_missing() -> str | None:
    if importlib.util.find_spec("natten") is None:
        return "not installed"
    try:
        importlib.import_module("natten")
    except Exception as error:  # an old release fails in its own ways
        return f"installed, but its import fails with {type(error).__name__}: {error}"
    return None


def _has_halves(rank: int) -> bool:
    """True up to 0.17."""
    return hasattr(importlib.import_module("natten.functional"), f"na{rank}d_qk")


def _natten_why_not(query, hood, rpb, backward):
    missing = _natten_missing()
    if missing is not None:
        return missing
    if _has_halves(hood.rank):
        if any(s > 1 for s in hood.stride):
            return "this release has no stride"
        if query.device.type == "cpu" and query.dtype not in (torch.float32, torch.float64):
            return "on a CPU it takes float32 and float64 only"
        return None
    if rpb is not None:
        return "this release has no relative bias any more"
    if query.device.type == "cpu" and backward:
        return "this release has no backward pass on a CPU"
    return None


def _natten_without_bias(backend: str) -> Way:
    """A release from 0.20 on, which has none: less work than what is measured."""

    def attend(query, key, value, hood, scale, rpb):
        return _natten_whole(query, key, value, hood, scale, backend)

    def why_not(query, hood, rpb, backward):
        if rpb is None:
            return "without a bias the way NATTEN runs"
        missing = _natten_missing()
        if missing is not None:
            return missing
        if _has_halves(hood.rank):
            return "this release has the bias: see NATTEN"
        return None if query.device.type == "cuda" else "made for CUDA tensors"

    return Way(f"NATTEN {backend}, no bias", False, attend, why_not)


WAYS = (
    _natcupy("cuda"),
    _natcupy("cpu"),
    _natcupy("torch"),
    Way("FlexAttention", True, _flex, _flex_why_not),
    Way("SDPA, masked", True, _masked, _masked_why_not),
    Way("SDPA, dense", False, _dense, anything),
    Way("shifted windows", False, _windows, anything),
    Way("NATTEN", True, _natten, _natten_why_not),
    _natten_without_bias("hopper-fna"),
    _natten_without_bias("cutlass-fna"),
    *CPU_WAYS,
)


def pick_ways(wanted: str | None) -> tuple[Way, ...]:
    """Ways by a comma-separated list of parts of their names; all for None."""
    if wanted is None:
        return WAYS
    parts = [part.strip().lower() for part in wanted.split(",")]
    found = tuple(way for way in WAYS if any(part in way.name.lower() for part in parts))
    if not found:
        known = ", ".join(way.name for way in WAYS)
        raise ValueError(f"--way must name some of {known}, got {wanted!r}.")
    return found
