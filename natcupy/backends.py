"""The choice of backend: which module runs a call, and why another cannot.

In: a user's `backend=` and checked tensors. Out: a module with `attention(...)` and
`unsupported_reason(...)`. A backend is imported when a call first wants it, and its compiler (CuPy,
llvmlite) when it first runs.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch

from natcupy import reference
from natcupy.neighborhood import Neighborhood

BACKENDS = ("torch", "cpu", "cuda")

# Exported programs hold standard operators only, so that they run where natcupy is not.
_is_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)


def choose(name: str | None, query, key, value, hood, rpb, extra_keys, extra_values) -> ModuleType:
    """The backend asked for, or for None the fastest that can run this call.

    Raises ValueError for an unknown name and RuntimeError when the named backend cannot run.
    """
    call = (query, key, value, hood, rpb, extra_keys, extra_values)
    if name is None:
        own = _load(query.device.type)
        if own is reference or _is_exporting() or torch.jit.is_tracing():
            return reference
        return own if own.unsupported_reason(*call) is None else reference
    if not isinstance(name, str) or name not in BACKENDS:
        known = ", ".join(repr(known) for known in BACKENDS)
        raise ValueError(f"backend must be None or one of {known}, got {name!r}.")
    backend = _load(name)
    reason = backend.unsupported_reason(*call)
    if backend is not reference and torch.jit.is_tracing():
        reason = "torch.jit.trace records torch's own operators alone: leave `backend` out."
    if reason is not None:
        raise RuntimeError(f"backend={name!r} cannot run this call: {reason}")
    return backend


def plain(backend: ModuleType, hood: Neighborhood, scale: float) -> Callable | None:
    """A backend's function `(tensors, return_lse)` for plain calls like one, if it has one."""
    make = getattr(backend, "plain_attention", None)
    return None if make is None else make(hood, scale)


def _load(name: str) -> ModuleType:
    """The backend called `name`, which is also the device it is made for; else plain torch."""
    if name == "cpu":
        from natcupy import cpu

        return cpu
    if name == "cuda":
        from natcupy.cuda import ops

        return ops
    return reference
