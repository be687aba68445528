"""Closures the decoders are built from: read rows, compute, write the threads of the group.

In: view names, slots and a numpy function. Out: `Op`s. Writing to part of a row is done by bits (d
^= (d ^ new) & mask), which is several times faster than a masked copy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from .parse import Instruction
from .program import Op, Scope
from .registers import DTYPES, class_of, view_of

if TYPE_CHECKING:
    from .machine import Machine

Fn = Callable[..., np.ndarray]


def put(m: Machine, cls: str, slot: int, new: np.ndarray) -> None:
    """Write `new` (a fresh row of the class's width) to the threads of the group."""
    row = m.v[cls][slot]
    bits = new.view(row.dtype)
    if m.full:
        row[...] = bits
        return
    np.bitwise_xor(bits, row, out=bits)
    np.bitwise_and(bits, m.blend[cls], out=bits)
    np.bitwise_xor(row, bits, out=row)


def put_row(m: Machine, cls: str, slot: int, row: np.ndarray) -> None:
    """Copy another row of the class to the threads of the group; that row is left alone."""
    target = m.v[cls][slot]
    if m.full:
        target[...] = row
        return
    bits = np.bitwise_xor(row, target)
    np.bitwise_and(bits, m.blend[cls], out=bits)
    np.bitwise_xor(target, bits, out=target)


def put_at(m: Machine, cls: str, slot: int, values: np.ndarray) -> None:
    """Write one value per active thread."""
    row = m.v[cls][slot]
    if m.full:
        row[...] = values.view(row.dtype)
    else:
        row[m.idx] = values.view(row.dtype)


def ufunc(fn: np.ufunc, view: str, dst: int, srcs: tuple[int, ...]) -> Op:
    """A numpy ufunc whose inputs and output have one type."""
    cls = class_of(view)
    if len(srcs) == 1:
        (a,) = srcs

        def one(m: Machine) -> None:
            rows = m.v[view]
            if m.full:
                fn(rows[a], out=rows[dst])
            else:
                put(m, cls, dst, fn(rows[a]))

        return one
    a, b = srcs

    def two(m: Machine) -> None:
        rows = m.v[view]
        if m.full:
            fn(rows[a], rows[b], out=rows[dst])
        else:
            put(m, cls, dst, fn(rows[a], rows[b]))

    return two


def compute(fn: Fn, out_view: str, dst: int, *srcs: tuple[str, int]) -> Op:
    """`fn` of rows (each given as view and slot) to a fresh row of `out_view`'s type."""
    cls = class_of(out_view)
    dtype = DTYPES[out_view]
    if len(srcs) == 1:
        ((va, a),) = srcs
        return lambda m: put(m, cls, dst, fresh(fn(m.v[va][a]), dtype))
    if len(srcs) == 2:
        (va, a), (vb, b) = srcs
        return lambda m: put(m, cls, dst, fresh(fn(m.v[va][a], m.v[vb][b]), dtype))
    return lambda m: put(m, cls, dst, fresh(fn(*[m.v[v][s] for v, s in srcs]), dtype))


def fresh(values: np.ndarray, dtype: type[np.generic]) -> np.ndarray:
    """Values as an array of `dtype`; functions given to `compute` never return a register row."""
    return values if values.dtype == dtype else values.astype(dtype)


def simple(inst: Instruction, scope: Scope, fn: Fn, count: int, type_name: str = "") -> Op:
    """An instruction whose operands and result all have the type its name ends with."""
    type_name = type_name or inst.parts[-1]
    view = "pred" if type_name == "pred" else view_of(type_name)
    dst = scope.dst(inst.operands[0], type_name)
    srcs = [scope.src(text, type_name) for text in inst.operands[1 : 1 + count]]
    if isinstance(fn, np.ufunc):
        return ufunc(fn, view, dst, tuple(srcs))
    return compute(fn, view, dst, *((view, s) for s in srcs))
