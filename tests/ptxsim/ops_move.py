"""mov, selp, slct: values go from register to register.

In: an instruction and its scope. Out: closures that copy, pack, unpack or choose between rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .emit import compute, put, put_row
from .errors import PtxParseError
from .parse import Instruction, split_operands, type_bytes
from .program import Op, Scope, opcode
from .registers import DTYPES, class_of, view_of

if TYPE_CHECKING:
    from .machine import Machine


@opcode("mov")
def move(inst: Instruction, scope: Scope) -> Op:
    """Copy a register, literal, address or predicate; pack and unpack vectors."""
    target, source = inst.operands
    type_name = inst.parts[-1]
    if source.startswith("{"):
        return _pack(target, split_operands(source[1:-1]), type_name, scope)
    if target.startswith("{"):
        return _unpack(split_operands(target[1:-1]), source, type_name, scope)
    cls = "pred" if type_name == "pred" else class_of(view_of(type_name))
    dst, src = scope.dst(target, type_name), scope.src(source, type_name)

    def copy(m: Machine) -> None:
        put_row(m, cls, dst, m.v[cls][src])

    return copy


def _piece(type_name: str, count: int) -> tuple[str, int]:
    width = type_bytes(type_name) // count
    if width == 1:
        raise PtxParseError("vectors of bytes in mov are not handled")
    return f"u{8 * width}", width


def _pack(target: str, parts: list[str], type_name: str, scope: Scope) -> Op:
    view, width = _piece(type_name, len(parts))
    whole = view_of(f"b{8 * type_bytes(type_name)}")
    dst = scope.dst(target, type_name)
    srcs = [scope.src(p, f"b{8 * width}") for p in parts]

    def pack(m: Machine) -> None:
        out = np.empty((m.n, len(srcs)), DTYPES[view])
        for k, s in enumerate(srcs):
            out[:, k] = m.v[view][s]
        put(m, whole, dst, out.view(DTYPES[whole])[:, 0])

    return pack


def _unpack(parts: list[str], source: str, type_name: str, scope: Scope) -> Op:
    view, width = _piece(type_name, len(parts))
    whole = view_of(f"b{8 * type_bytes(type_name)}")
    src = scope.src(source, type_name)
    dsts = [None if p == "_" else scope.dst(p, f"b{8 * width}") for p in parts]

    def unpack(m: Machine) -> None:
        pieces = m.v[whole][src].view(DTYPES[view]).reshape(m.n, -1).T.copy()
        for k, d in enumerate(dsts):
            if d is not None:
                put(m, view, d, pieces[k])

    return unpack


@opcode("selp")
def select(inst: Instruction, scope: Scope) -> Op:
    """a where the predicate holds, else b."""
    cls = class_of(view_of(inst.parts[-1]))
    type_name = inst.parts[-1]
    dst = scope.dst(inst.operands[0], type_name)
    a, b = (scope.src(x, type_name) for x in inst.operands[1:3])
    p, negated = scope.predicate(inst.operands[3])
    if negated:
        a, b = b, a

    def choose(m: Machine) -> None:
        rows = m.v[cls]
        put(m, cls, dst, np.where(m.v["pred"][p], rows[a], rows[b]))

    return choose


@opcode("slct")
def select_by_sign(inst: Instruction, scope: Scope) -> Op:
    """a where c >= 0, else b."""
    type_name, sign = inst.parts[-2], inst.parts[-1]
    view = view_of(type_name)
    srcs = [(view, scope.src(x, type_name)) for x in inst.operands[1:3]]
    srcs.append((sign, scope.src(inst.operands[3], sign)))
    return compute(
        lambda a, b, c: np.where(c >= 0, a, b), view, scope.dst(inst.operands[0], type_name), *srcs
    )
