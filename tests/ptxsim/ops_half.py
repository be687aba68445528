"""Arithmetic on f16, bf16 and pairs of them.

In: instructions whose type is f16, bf16, f16x2 or bf16x2. Out: closures that compute in float64
and round once, so that sums, products and fused multiply-adds have the bits a device gives.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from .emit import put
from .numerics import f64_to_half, half_to_f64
from .parse import Instruction
from .program import Op, Scope
from .registers import view_of

if TYPE_CHECKING:
    from .machine import Machine

_TINY_F16 = 2.0**-14


def _operands(inst: Instruction, scope: Scope, count: int) -> tuple[str, int, list[int]]:
    type_name = inst.parts[-1]
    view = view_of("b32" if type_name.endswith("x2") else "b16")
    dst = scope.dst(inst.operands[0], view)
    return view, dst, [scope.src(x, view) for x in inst.operands[1 : 1 + count]]


def _halves(m: Machine, view: str, slot: int) -> np.ndarray:
    return m.v[view][slot].view(np.uint16)


def arithmetic(inst: Instruction, scope: Scope, fn: Callable[..., np.ndarray], count: int) -> Op:
    """Compute `fn` in float64 and round; .ftz, .sat and .relu are honoured."""
    view, dst, srcs = _operands(inst, scope, count)
    type_name, parts = inst.parts[-1], inst.parts
    ftz = "ftz" in parts and type_name.startswith("f16")

    def run(m: Machine) -> None:
        rows = [half_to_f64(_halves(m, view, s), type_name) for s in srcs]
        if ftz:
            rows = [_flush(r) for r in rows]
        out = fn(*rows)
        if "sat" in parts:
            out = np.where(np.isnan(out), 0.0, np.clip(out, 0, 1))
        if "relu" in parts:
            out = np.where(out < 0, 0.0, out)
        put(m, view, dst, f64_to_half(_flush(out) if ftz else out, type_name))

    return run


def _flush(values: np.ndarray) -> np.ndarray:
    return np.where(np.abs(values) < _TINY_F16, np.copysign(0.0, values), values)


def min_max(inst: Instruction, scope: Scope) -> Op:
    """The number wins over NaN, unless .NaN."""
    from .ops_float import min_max_function

    return arithmetic(inst, scope, min_max_function(inst.parts[0], "NaN" in inst.parts), 2)


def sign(inst: Instruction, scope: Scope) -> Op:
    """neg and abs act on the sign bit."""
    view, dst, (a,) = _operands(inst, scope, 1)
    negate = inst.parts[0] == "neg"
    top = np.uint16(0x8000)

    def run(m: Machine) -> None:
        bits = _halves(m, view, a)
        put(m, view, dst, bits ^ top if negate else bits & ~top)

    return run


def set_predicate(inst: Instruction, scope: Scope) -> Op:
    """setp on f16 and bf16; on pairs `p|q` gets the low and the high comparison."""
    from .ops_compare import COMBINE, comparison

    type_name, parts = inst.parts[-1], inst.parts
    pair = type_name.endswith("x2")
    view = view_of("b32" if pair else "b16")
    a, b = (scope.src(x, view) for x in inst.operands[1:3])
    fn = comparison(parts[1], True)
    boolean = next((p for p in parts[2:] if p in COMBINE), None)
    extra = scope.predicate(inst.operands[3]) if boolean else None
    dsts = [scope.dst(n, "pred") for n in inst.operands[0].split("|")]

    def run(m: Machine) -> None:
        x, y = (half_to_f64(_halves(m, view, s), type_name) for s in (a, b))
        holds = fn(x, y)
        values = [holds[::2], holds[1::2]] if pair else [holds, ~holds]
        for dst, value in zip(dsts, values, strict=False):
            if boolean and extra is not None:
                c = m.v["pred"][extra[0]]
                value = COMBINE[boolean](value, ~c if extra[1] else c)
            put(m, "pred", dst, np.array(value))

    return run
