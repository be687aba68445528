"""The choice of backend: which module runs a call, and why another cannot.

In: a user's `backend=` and checked tensors. Out: a module with `attention(...)`.
"""

from __future__ import annotations

from types import ModuleType

from natcupy import reference

BACKENDS: dict[str, ModuleType] = {"torch": reference}


def choose(name: str | None, query, key, value, hood, rpb, extra_keys, extra_values) -> ModuleType:
    """The backend asked for, or for None the fastest that can run this call.

    Raises ValueError for an unknown name and RuntimeError when the named backend cannot run.
    """
    if name is None:
        return reference
    if not isinstance(name, str) or name not in BACKENDS:
        known = ", ".join(repr(known) for known in BACKENDS)
        raise ValueError(f"backend must be None or one of {known}, got {name!r}.")
    backend = BACKENDS[name]
    reason = backend.unsupported_reason(query, key, value, hood, rpb, extra_keys, extra_values)
    if reason is not None:
        raise RuntimeError(f"backend={name!r} cannot run this call: {reason}")
    return backend
