"""atom and red on global, shared and generic addresses.

In: add, min, max, and, or, xor, exch, cas, inc, dec on integers, f32, f64, f16 and bf16 (pairs
too). Out: closures; threads take their turns in lane order, so results of float sums depend on it
as on a device they depend on chance.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from . import access, access_global
from .emit import put_at
from .errors import PtxParseError
from .memory import Buffer, mark
from .numerics import f64_to_half, half_to_f64, is_half
from .ops_memory import space, vector
from .parse import Instruction, type_bytes
from .program import Op, Scope, opcode
from .registers import DTYPES, view_of

if TYPE_CHECKING:
    from .machine import Machine

_KINDS = ("add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec")
_SIMPLE = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}


@opcode("atom", "red")
def atomic(inst: Instruction, scope: Scope) -> Op:
    """Read, combine and write back, one thread after another."""
    if vector(inst) > 1:
        raise PtxParseError("vector atomics are not handled")
    returns = inst.parts[0] == "atom"
    operands = list(inst.operands)
    target = operands.pop(0) if returns else "_"
    type_name = inst.parts[-1]
    kind = next(p for p in inst.parts[1:] if p in _KINDS)
    size = type_bytes(type_name)
    view = view_of(type_name)
    dst = scope.dst(target, type_name) if target != "_" else None
    where = access.addresses(scope.address(operands[0]))
    srcs = [scope.src(x, type_name) for x in operands[1:]]
    name, at = space(inst), scope.at
    step = _step(kind, type_name)

    def run(m: Machine) -> None:
        values = [m.pick(m.v[view][s]) for s in srcs]
        raw = where(m)
        old = _apply(m, inst, at, name, raw, size, DTYPES[view], step, values)
        if dst is not None:
            put_at(m, view, dst, old)

    return run


def _step(kind: str, type_name: str) -> Callable[..., np.generic]:
    """New content from the old and the operands."""
    if is_half(type_name):
        return _half_step(kind, type_name)
    if kind in _SIMPLE:
        fn = _SIMPLE[kind]
        return lambda old, b: fn(old, b)
    if kind == "exch":
        return lambda old, b: b
    if kind == "cas":
        return lambda old, b, c: c if old == b else old
    if kind == "inc":
        return lambda old, b: old.dtype.type(0) if old >= b else old + old.dtype.type(1)
    return lambda old, b: b if old == 0 or old > b else old - old.dtype.type(1)


def _half_step(kind: str, type_name: str) -> Callable[..., np.generic]:
    if kind == "exch":
        return lambda old, b: b
    if kind == "cas":
        return lambda old, b, c: c if old == b else old
    fn = _SIMPLE[kind]

    def combine(old: np.generic, b: np.generic) -> np.generic:
        x, y = (half_to_f64(np.atleast_1d(v).view(np.uint16), type_name) for v in (old, b))
        return f64_to_half(fn(x, y), type_name).view(np.asarray(old).dtype)[0]

    return combine


def _apply(
    m: Machine,
    inst: Instruction,
    at: int,
    name: str,
    raw: np.ndarray,
    size: int,
    dtype: type[np.generic],
    step: Callable[..., np.generic],
    values: list[np.ndarray],
) -> np.ndarray:
    """Let each active thread take its turn; returns what each found."""
    old = np.zeros(len(raw), dtype)
    groups = access.by_space(raw) if name == "generic" else [(name, np.arange(len(raw)))]
    for kind, rows in groups:
        place = access.in_space(raw[rows], kind) if name == "generic" else raw[rows]
        for table, marks, offsets, some in _places(m, inst, kind, place, size):
            picked = rows[some]
            cells = table[size].view(dtype)
            index = offsets // size
            for row, k in zip(picked, index, strict=True):
                old[row] = cells[k]
                cells[k] = step(cells[k], *(v[row] for v in values))
            if marks is not None:
                mark(marks, offsets, size)
    return old


def _places(
    m: Machine, inst: Instruction, kind: str, raw: np.ndarray, size: int
) -> list[tuple[dict[int, np.ndarray], dict[int, np.ndarray] | None, np.ndarray, np.ndarray]]:
    """(data, marks, byte offsets, rows) of every memory the addresses are in, all checked."""
    access.aligned(m, inst, raw, size, kind)
    if kind == "shared":
        rows = np.flatnonzero((raw >= 0) & (raw + size <= m.shared.size))
        if len(rows) < len(raw):
            m.report("out-of-bounds", f"shared atomic at {int(raw.max())}", inst, int(m.idx[0]))
        flat = raw[rows] + m.shared_base[m.idx[rows]]
        if m.checks.uninitialised and m.shared.unwritten(flat, size).any():
            m.report("uninitialised", "shared atomic on unwritten memory", inst, int(m.idx[0]))
        return [(m.shared.data, m.shared.marks, flat, rows)]
    found = []
    for buffer, rows in m.memory.partition(raw, size):
        if buffer is None:
            where = m.memory.where(int(raw[rows][0]))
            m.report("out-of-bounds", f"global atomic at {where}", inst, int(m.idx[rows[0]]))
        elif access_global.may_write(m, inst, buffer, raw[rows]):
            _check_written(m, inst, buffer, raw[rows], size)
            found.append((buffer.views, buffer.marks, raw[rows] - buffer.origin, rows))
    return found


def _check_written(
    m: Machine, inst: Instruction, buffer: Buffer, raw: np.ndarray, size: int
) -> None:
    if m.checks.uninitialised and buffer.unwritten(raw - buffer.origin, size).any():
        where = buffer.where(int(raw[0]))
        m.report("uninitialised", f"atomic on {where}, never written", inst, int(m.idx[0]))
