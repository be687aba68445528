"""Neighborhood attention as plain loops that Numba compiles: one query after the other.

In: float32 tensors `[B, H, N, D]`, tables of keys and biases `[N, taps]`, a bias `[H, entries]` or
None. Out: `[B, H, N, D]`, with history. Threads are Python's, so that no pool of Numba's own keeps
spinning beside torch's; the loops release the GIL.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np
import torch
from torch import Tensor

LOOSE = {"reassoc", "contract", "nsz", "arcp", "afn"}
CHUNKS = 4  # parts of the work for each thread
EXP2 = (0.6931472, 0.24022651, 0.05550411, 0.009618129, 0.0013333558)
C1, C2, C3, C4, C5 = (np.float32(c) for c in EXP2)
ONE, HALF = np.float32(1), np.float32(0.5)
LOG2_E, LEAST = np.float32(1 / math.log(2)), np.float32(-126)

compiled = numba.njit(nogil=True, fastmath=LOOSE, error_model="numpy", cache=True)
inlined = numba.njit(nogil=True, fastmath=LOOSE, error_model="numpy", inline="always")


@inlined
def _exp(s, shift, whole):
    """s = exp(s - shift), by a polynomial and the exponent's bits, so that it vectorises."""
    power = whole.view(np.float32)
    for t in range(s.size):
        y = max((s[t] - shift) * LOG2_E, LEAST)
        n = np.floor(y + HALF)
        f = y - n
        s[t] = ONE + f * (C1 + f * (C2 + f * (C3 + f * (C4 + f * C5))))
        whole[t] = (np.int32(n) + np.int32(127)) << np.int32(23)
    for t in range(s.size):
        s[t] *= power[t]


@inlined
def _logits(s, q, k, keys, places, bias, biased, scale):
    for t in range(s.size):
        total = np.float32(0)
        row = k[keys[t]]
        for d in range(q.size):
            total += q[d] * row[d]
        s[t] = total * scale
    if biased:
        for t in range(s.size):
            s[t] += bias[places[t]]


@compiled
def _forward(q, k, v, index, place, bias, biased, scale, out, lse, first, end):
    _, heads, tokens, dim = q.shape
    taps = index.shape[1]
    s, whole = np.empty(taps, np.float32), np.empty(taps, np.int32)
    for row in range(first, end):
        b, h, i = row // (heads * tokens), row // tokens % heads, row % tokens
        _logits(s, q[b, h, i], k[b, h], index[i], place[i], bias[h], biased, scale)
        top = s.max()
        _exp(s, top, whole)
        total = s.sum()
        lse[b, h, i] = top + np.log(total)
        o = out[b, h, i]
        o[:] = 0
        for t in range(taps):
            weight, value = s[t] / total, v[b, h, index[i, t]]
            for d in range(dim):
                o[d] += weight * value[d]


@compiled
def _backward(q, k, v, index, place, bias, biased, scale, out, lse, g, dq, dk, dv, db, first, end):
    _, heads, tokens, dim = q.shape
    taps = index.shape[1]
    s, ds, whole = (
        np.empty(taps, np.float32),
        np.empty(taps, np.float32),
        np.empty(taps, np.int32),
    )
    for task in range(first, end):
        b, h = task // heads, task % heads
        for i in range(tokens):
            _logits(s, q[b, h, i], k[b, h], index[i], place[i], bias[h], biased, scale)
            _exp(s, lse[b, h, i], whole)
            grad = g[b, h, i]
            delta = np.float32(0)
            for d in range(dim):
                delta += grad[d] * out[b, h, i, d]
            for t in range(taps):
                total = np.float32(0)
                value = v[b, h, index[i, t]]
                for d in range(dim):
                    total += grad[d] * value[d]
                ds[t] = s[t] * (total - delta)
            if biased:
                for t in range(taps):
                    db[b, h, place[i, t]] += ds[t]
            to, own = dq[b, h, i], q[b, h, i]
            for t in range(taps):
                j, step, weight = index[i, t], ds[t] * scale, s[t]
                key, to_key, to_value = k[b, h, j], dk[b, h, j], dv[b, h, j]
                for d in range(dim):
                    to[d] += step * key[d]
                    to_key[d] += step * own[d]
                    to_value[d] += weight * grad[d]


def _split(run, count: int) -> None:
    """`run(first, end)` over 0 .. count - 1 on torch's number of threads."""
    threads = torch.get_num_threads()
    if threads == 1:
        return run(0, count)
    step = max(1, -(-count // (threads * CHUNKS)))
    bounds = [(a, min(count, a + step)) for a in range(0, count, step)]
    list(_pool(threads).map(lambda bound: run(*bound), bounds))
    return None


_pools: dict[int, ThreadPoolExecutor] = {}


def _pool(threads: int) -> ThreadPoolExecutor:
    return _pools.setdefault(threads, ThreadPoolExecutor(threads))


class _Loops(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, bias, index, place, scale):
        q, k, v = (x.contiguous() for x in (q, k, v))
        out, lse = torch.empty_like(q), torch.empty(q.shape[:-1])
        table = torch.zeros(q.shape[1], 1) if bias is None else bias.contiguous()
        ctx.given = q, k, v, index, place, table
        ctx.biased, ctx.scale = bias is not None, scale
        ctx.save_for_backward(out, lse)
        args = _arrays(*ctx.given), ctx.biased, np.float32(scale), *_arrays(out, lse)
        _split(lambda a, b: _forward(*args[0], *args[1:], a, b), lse.numel())
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, _, _, table = ctx.given
        dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
        db = torch.zeros(q.shape[0], *table.shape)
        args = [
            *_arrays(*ctx.given),
            ctx.biased,
            np.float32(ctx.scale),
            *_arrays(*ctx.saved_tensors),
        ]
        args += _arrays(grad.contiguous(), dq, dk, dv, db)
        _split(lambda a, b: _backward(*args, a, b), q.shape[0] * q.shape[1])
        return dq, dk, dv, db.sum(0) if ctx.biased else None, None, None, None


def _arrays(*tensors: Tensor):
    return [x.detach().numpy() for x in tensors]


def attend(q: Tensor, k: Tensor, v: Tensor, index: Tensor, place: Tensor, bias, scale: float):
    """Attention of every query over the keys its row of `index` names."""
    return _Loops.apply(q, k, v, bias, index, place, scale)
