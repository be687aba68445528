"""Which keys each query sees: the one place in Python where windows are computed.

In: positions and sizes, as ints or tensors. Out: half-open key intervals, index tables, indices of
biases.

An axis of length L with dilation d splits into d groups of tokens g, g + d, g + 2d, ...; a token
sees only its own group. Inside a group of length n, token number p has one *leader* (itself when
the stride is 1), and its window is the `kernel_size` tokens around the leader, shifted inward at
the borders, never shrunk and never padded. A causal window ends at the token itself. On several
axes the neighborhood is the Cartesian product. Hassani et al., "Neighborhood Attention Transformer"
(CVPR 2023), eq. 1-3; dilation: "Dilated Neighborhood Attention Transformer" (2022); stride:
"Generalized Neighborhood Attention" (2025).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor


@dataclass(frozen=True)
class Neighborhood:
    """The parameters of a neighborhood, one entry per axis, already checked."""

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    is_causal: tuple[bool, ...]

    @property
    def rank(self) -> int:
        """Number of spatial axes: 1, 2 or 3."""
        return len(self.kernel_size)

    @property
    def size(self) -> int:
        """Number of keys of a full window, the product of `kernel_size`."""
        return prod(self.kernel_size)


def _least(a, b):
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return a.clamp(max=b) if isinstance(a, Tensor) else b.clamp(max=a)
    return min(a, b)


def _most(a, b):
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return a.clamp(min=b) if isinstance(a, Tensor) else b.clamp(min=a)
    return max(a, b)


def window(position, length, kernel_size, stride=1, is_causal=False):
    """Keys that the query at `position` sees, as (start, end) with start <= key < end.

    Everything is in group coordinates; `position` and `length` are ints or int64 tensors.
    Non-causal windows hold exactly `kernel_size` keys, causal ones between 1 and `kernel_size`.
    """
    group = position // stride * stride
    if is_causal:
        leader = _least(group + (stride - 1), length - 1)
        return _most(leader - (kernel_size - 1), 0), position + 1
    leader = _least(group + stride // 2, length - 1)
    start = _most(_least(leader - kernel_size // 2, length - kernel_size), 0)
    return start, start + kernel_size


def inverse_window(position, length, kernel_size, stride=1, is_causal=False):
    """Queries that see the key at `position`, as (start, end) with start <= query < end.

    Starts and ends of `window` never decrease, so these queries are consecutive. Group coordinates,
    plain ints.
    """
    last_group = (length - 1) // stride * stride
    if is_causal:
        if position + kernel_size >= length:
            return position, length
        return position, (position + kernel_size) // stride * stride
    shift = kernel_size // 2 - stride // 2
    if position < kernel_size:
        start = 0
    else:
        first = position - (kernel_size - 1) + shift
        start = min(-(-first // stride) * stride, last_group)
    if position >= length - kernel_size:
        return start, length
    return start, min(length, ((position + shift) // stride + 1) * stride)


def rpb_index(key, query, kernel_size):
    """Index of the pair's bias on one axis, in [0, 2 * kernel_size - 2]; group coordinates."""
    return key - query + (kernel_size - 1)


def axis_table(length, kernel_size, stride, dilation, is_causal, device):
    """Every window of one axis as tensors (index, bias, valid), each [length, kernel_size].

    `index` holds real token indices, `bias` indices into that axis of `rpb`, and `valid` is False
    where a causal window is shorter than `kernel_size`: such slots hold the query's own token
    (None when no slot can be empty). Written with tensor arithmetic only, so that symbolic lengths
    can be traced and exported.
    """
    token = torch.arange(length, device=device)
    group, position = token % dilation, token // dilation
    members = (length - group + dilation - 1) // dilation
    start, end = window(position, members, kernel_size, stride, is_causal)
    slot = start[:, None] + torch.arange(kernel_size, device=device)
    valid = None
    if is_causal:
        valid = slot < end[:, None]
        slot = torch.where(valid, slot, position[:, None])
    index = slot * dilation + group[:, None]
    return index, rpb_index(slot, position[:, None], kernel_size), valid


def neighbor_table(shape, hood: Neighborhood, device):
    """All windows of a map: (index, bias, valid), each [prod(shape), hood.size].

    `index` counts tokens in row-major order, `bias` counts entries of a flattened `rpb[head]`, taps
    are in row-major order too; `valid` is None when no axis is causal.
    """
    index = bias = valid = None
    axes = zip(shape, hood.kernel_size, hood.stride, hood.dilation, hood.is_causal, strict=True)
    for length, kernel_size, stride, dilation, is_causal in axes:
        idx, rel, ok = axis_table(length, kernel_size, stride, dilation, is_causal, device)
        if index is None:
            index, bias, valid = idx, rel, ok
            continue
        index = _outer(index * length, idx)
        bias = _outer(bias * (2 * kernel_size - 1), rel)
        valid = _outer_and(valid, ok, index)
    return index, bias, valid


def _outer(a: Tensor, b: Tensor) -> Tensor:
    """[m, s] and [n, t] to [m * n, s * t], sums of all pairs, row-major."""
    return (a[:, None, :, None] + b[None, :, None, :]).flatten(2).flatten(0, 1)


def _outer_and(a: Tensor | None, b: Tensor | None, like: Tensor) -> Tensor | None:
    if a is None and b is None:
        return None
    taps = like.shape[1]
    if a is None:
        rows = like.shape[0] // b.shape[0]
        a = torch.ones(rows, taps // b.shape[1], dtype=torch.bool, device=like.device)
    if b is None:
        rows = like.shape[0] // a.shape[0]
        b = torch.ones(rows, taps // a.shape[1], dtype=torch.bool, device=like.device)
    return (a[:, None, :, None] & b[None, :, None, :]).flatten(2).flatten(0, 1)
