"""Calls like an earlier one: the checks of a small map's call take longer than its attention.

In: the arguments of `na1d`, `na2d`, `na3d`. Out: what an earlier call with equal sizes, dtypes and
parameters was found to mean, so that it need not be checked again.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Parameter

from natcupy.neighborhood import Neighborhood

MOST = 1024

_good: dict[tuple, tuple[Neighborhood, float, tuple]] = {}


def signature(rank: int, window: tuple, scale, tensors: tuple) -> tuple | None:
    """All that the checks of a call look at, or None where it is not plain tensors on a CPU.

    The window's parameters are known by identity, for equality does not tell True from 1;
    `remember` keeps them alive, and so their identities their own.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return None
    if torch.is_autocast_enabled("cpu") or (scale is not None and type(scale) is not float):
        return None
    found = [rank, scale, *map(id, window)]
    for x in tensors:
        if x is None:
            found.append(None)
            continue
        if type(x) not in (Tensor, Parameter) or not x.is_cpu:
            return None
        if x.layout is not torch.strided or x.is_nested:
            return None
        found += (x.shape, x.dtype)
    return tuple(found)


def find(like: tuple | None) -> tuple[Neighborhood, float] | None:
    """The neighborhood and the scale of calls with this signature."""
    known = None if like is None else _good.get(like)
    return None if known is None else known[:2]


def remember(like: tuple | None, hood: Neighborhood, scale: float, window: tuple) -> None:
    """Note that calls with this signature passed the checks."""
    if like is None or not all(_never_changes(x) for x in window):
        return
    if len(_good) >= MOST:
        _good.clear()
    _good[like] = hood, scale, window


def _never_changes(x) -> bool:
    return type(x) in (int, bool) or (
        type(x) is tuple and all(type(entry) in (int, bool) for entry in x)
    )
