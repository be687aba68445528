"""Other ways to attend on a CPU: gathered keys compiled by inductor, unfold, Numba loops, NATTEN.

In and out as in `ways.py`. `CPU_WAYS` join the list in `peers.py`; each says why it cannot run.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
from math import prod

import torch
from torch import Tensor
from torch.nn import functional as nn_functional

from benchmarks.ways import DENSE_BYTES, Way, flat, unflat
from natcupy.neighborhood import Neighborhood, neighbor_table


@functools.lru_cache(maxsize=8)
@torch.inference_mode(False)  # tables outlive the call, whose mode they must not keep
def _table(shape: tuple[int, ...], hood: Neighborhood, device: torch.device):
    """(index of every key of every window, of its bias), each [N, taps]."""
    index, bias, _ = neighbor_table(shape, hood, device)
    return index, bias


def _not_causal(hood: Neighborhood) -> str | None:
    return "written here without causality" if any(hood.is_causal) else None


# ------------------------------------------------------------------------------------------------
# every window's keys gathered, fused by torch.compile


def _gathered(query: Tensor, key: Tensor, value: Tensor, index: Tensor, bias, scale: float):
    """`[B, H, N, D]` and tables `[N, taps]`, bias `[H, N, taps]` or None, to `[B, H, N, D]`."""
    logits = (query[:, :, :, None] * key[:, :, index]).sum(-1) * scale
    if bias is not None:
        logits = logits + bias
    return (logits.softmax(-1)[..., None] * value[:, :, index]).sum(-2)


@functools.cache
def _compiled_gather():
    return torch.compile(_gathered, dynamic=False)


def _gather(query, key, value, hood, scale, rpb):
    index, place = _table(tuple(query.shape[1:-2]), hood, query.device)
    bias = None if rpb is None else rpb.flatten(1)[:, place]
    with torch._dynamo.config.patch(recompile_limit=1000):
        out = _compiled_gather()(flat(query), flat(key), flat(value), index, bias, scale)
    return unflat(out, query)


def _gather_why_not(query, hood, rpb, backward):
    if query.device.type == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is None:
        return "torch.compile needs a C++ compiler, and none is on the PATH"
    if query.device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "torch.compile needs triton"
    return _not_causal(hood)


# ------------------------------------------------------------------------------------------------
# unfold: Ramachandran et al., "Stand-Alone Self-Attention in Vision Models" (NeurIPS 2019)


def _unfold(query, key, value, hood, scale, rpb):
    """Windows centred on every query and padded with zeros, as torch's unfold cuts them."""
    batch, *shape, heads, dim = query.shape
    pad = [d * (k // 2) for k, d in zip(hood.kernel_size, hood.dilation, strict=True)]

    def windows(x):
        maps = x.flatten(-2).movedim(-1, 1)
        cut = nn_functional.unfold(maps, hood.kernel_size, hood.dilation, pad)
        return cut.view(batch, heads, dim, hood.size, prod(shape))

    logits = (flat(query).mT[:, :, :, None] * windows(key)).sum(2) * scale
    if rpb is not None:
        middle = [slice(k - 1 - k // 2, k - 1 - k // 2 + k) for k in hood.kernel_size]
        logits = logits + rpb[:, middle[0], middle[1]].flatten(1)[..., None]
    out = (logits.softmax(2)[:, :, None] * windows(value)).sum(3)
    return unflat(out.mT, query)


def _unfold_why_not(query, hood, rpb, backward):
    if hood.rank != 2:
        return "torch unfolds maps only"
    if any(s > 1 for s in hood.stride) or any(k % 2 == 0 for k in hood.kernel_size):
        return "written here for odd windows without stride"
    needed = (2 + 2 * backward) * hood.size * query.numel() * query.dtype.itemsize
    if needed > DENSE_BYTES[query.device.type]:
        return f"unfolded keys and values would take {needed / 1e9:.1f} GB"
    return _not_causal(hood)


# ------------------------------------------------------------------------------------------------
# loops compiled by Numba


def _numba(query, key, value, hood, scale, rpb):
    from benchmarks.numba_loops import attend

    index, place = _table(tuple(query.shape[1:-2]), hood, query.device)
    bias = None if rpb is None else rpb.flatten(1)
    return unflat(attend(flat(query), flat(key), flat(value), index, place, bias, scale), query)


def _numba_why_not(query, hood, rpb, backward):
    if importlib.util.find_spec("numba") is None:
        return "Numba is not installed"
    if query.device.type != "cpu" or query.dtype != torch.float32:
        return "written here for float32 on a CPU"
    return _not_causal(hood)


# ------------------------------------------------------------------------------------------------
# NATTEN up to 0.17: the last releases with CPU kernels


def natten_by_halves(query, key, value, hood, scale, rpb):
    """By `na*d_qk` and `na*d_av`, the only operators with CPU kernels and with a bias."""
    from natten import functional

    qk, av = (getattr(functional, f"na{hood.rank}d_{half}") for half in ("qk", "av"))
    q, k, v = (x.movedim(-2, 1).contiguous() for x in (query, key, value))
    window = {"kernel_size": hood.kernel_size, "dilation": hood.dilation}
    logits = qk(q * scale, k, **window, is_causal=hood.is_causal, rpb=rpb)
    return av(logits.softmax(-1), v, **window, is_causal=hood.is_causal).movedim(1, -2)


CPU_WAYS = (
    Way("gather, compiled", True, _gather, _gather_why_not),
    Way("unfold", False, _unfold, _unfold_why_not),
    Way("Numba", True, _numba, _numba_why_not),
)
