"""Comparisons: setp, set and testp on integers and floats (halves are in `ops_half`).

In: an instruction and its scope. Out: closures that write predicates; a comparison with NaN is
false, but for the forms that end in u.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from . import ops_half
from .emit import compute, put
from .numerics import flushed, is_half
from .parse import Instruction
from .program import Op, Scope, opcode
from .registers import DTYPES, view_of

if TYPE_CHECKING:
    from .machine import Machine


@opcode("testp")
def test_property(inst: Instruction, scope: Scope) -> Op:
    """Is the number finite, infinite, number, NaN, normal, subnormal."""
    type_name = inst.parts[-1]
    tiny = np.finfo(DTYPES[type_name]).tiny
    fn = {
        "finite": np.isfinite,
        "infinite": np.isinf,
        "number": lambda x: ~np.isnan(x),
        "notanumber": np.isnan,
        "normal": lambda x: np.isfinite(x) & (np.abs(x) >= tiny),
        "subnormal": lambda x: (np.abs(x) < tiny) & (x != 0),
    }[inst.parts[1]]
    src = (type_name, scope.src(inst.operands[1], type_name))
    return compute(fn, "pred", scope.dst(inst.operands[0], "pred"), src)


_COMPARE = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}
COMBINE = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def comparison(name: str, is_number: bool) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """The comparison called `name`; the ...u forms are true where either side is NaN."""
    if name in ("num", "nan"):
        want = name == "nan"
        return lambda a, b: (np.isnan(a) | np.isnan(b)) == want
    if name.endswith("u") and name[:-1] in _COMPARE:
        fn = _COMPARE[name[:-1]]
        return lambda a, b: fn(a, b) | np.isnan(a) | np.isnan(b)
    if name == "ne" and is_number:  # ordered: false for NaN, unlike numpy's
        return lambda a, b: (a < b) | (a > b)
    return _COMPARE[name]


@opcode("setp", "set")
def set_predicate(inst: Instruction, scope: Scope) -> Op:
    """Compare; combine with a predicate; set gives all ones or 1.0 instead of a predicate."""
    parts = inst.parts
    type_name = parts[-1]
    if is_half(type_name):
        return ops_half.set_predicate(inst, scope)
    number = type_name in ("f32", "f64")
    fn = comparison(parts[1], number)
    dtype_view = type_name if number else view_of(type_name)
    srcs = [(dtype_view, scope.src(x, type_name)) for x in inst.operands[1:3]]
    boolean = next((p for p in parts[2:] if p in COMBINE), None)
    extra = scope.predicate(inst.operands[3]) if boolean else None
    if "ftz" in parts:
        plain = fn

        def fn(a: np.ndarray, b: np.ndarray) -> np.ndarray:
            return plain(flushed(a), flushed(b))

    if parts[0] == "set":
        return _set_value(inst, scope, fn, srcs, boolean, extra)
    return write_predicates(inst, scope, fn, srcs, boolean, extra)


def write_predicates(
    inst: Instruction,
    scope: Scope,
    fn: Callable[..., np.ndarray],
    srcs: list[tuple[str, int]],
    boolean: str | None,
    extra: tuple[int, bool] | None,
) -> Op:
    """`p|q`: p gets the comparison, q its complement, each combined with the extra predicate."""
    names = inst.operands[0].split("|")
    dsts = [None if n == "_" else scope.dst(n, "pred") for n in names]
    (va, a), (vb, b) = srcs
    combine = COMBINE[boolean] if boolean else None
    if len(dsts) == 1 and combine is None and isinstance(fn, np.ufunc):
        dst = dsts[0]

        def direct(m: Machine) -> None:
            if m.full:
                fn(m.v[va][a], m.v[vb][b], out=m.v["pred"][dst])
            else:
                put(m, "pred", dst, fn(m.v[va][a], m.v[vb][b]))

        return direct

    def general(m: Machine) -> None:
        holds = fn(m.v[va][a], m.v[vb][b])
        other = ~holds if len(dsts) > 1 else None
        if combine is not None and extra is not None:
            c = m.v["pred"][extra[0]]
            c = ~c if extra[1] else c
            holds = combine(holds, c)
            other = combine(other, c) if other is not None else None
        for dst, value in zip(dsts, (holds, other), strict=False):
            if dst is not None:
                put(m, "pred", dst, value)

    return general


def _set_value(
    inst: Instruction,
    scope: Scope,
    fn: Callable[..., np.ndarray],
    srcs: list[tuple[str, int]],
    boolean: str | None,
    extra: tuple[int, bool] | None,
) -> Op:
    out = inst.parts[-2]
    true = DTYPES["f32"](1) if out == "f32" else np.uint32(0xFFFFFFFF)
    view = "f32" if out == "f32" else "u32"

    def value(a: np.ndarray, b: np.ndarray, *rest: np.ndarray) -> np.ndarray:
        holds = fn(a, b)
        if boolean and extra is not None:
            holds = COMBINE[boolean](holds, ~rest[0] if extra[1] else rest[0])
        return np.where(holds, true, true.dtype.type(0))

    more = [("pred", extra[0])] if extra is not None else []
    return compute(value, view, scope.dst(inst.operands[0], out), *srcs, *more)
