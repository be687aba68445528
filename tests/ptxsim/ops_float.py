"""Arithmetic that exists for several kinds of numbers, and everything on f32 and f64.

In: add, sub, mul, mad, fma, min, max, neg, abs (integers and halves are passed to their rooms),
and the float-only functions. Out: closures. f32 sums and products round once; fma is exact in
float64 before its rounding (f32) or compensated (f64). .ftz flushes results, and the inputs of the
approximate functions. ex2, lg2, rcp, rsqrt, sqrt, sin, cos, tanh .approx give the correctly
rounded value of numpy: a device may differ in the last bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from . import ops_half, ops_int
from .emit import compute, put, simple, ufunc
from .errors import PtxParseError
from .numerics import directed, flush, flushed, is_half
from .parse import Instruction
from .program import Op, Scope, opcode
from .registers import DTYPES, class_of

if TYPE_CHECKING:
    from .machine import Machine

F32, F64 = np.float32, np.float64
_SPLIT = F64(134217729.0)  # 2^27 + 1, Dekker's constant


def _mode(inst: Instruction) -> str:
    return next((p for p in inst.parts if p in ("rz", "rm", "rp")), "rn")


@opcode("add", "sub", "mul")
def arithmetic(inst: Instruction, scope: Scope) -> Op:
    """Sum, difference, product of any type."""
    name, type_name = inst.parts[0], inst.parts[-1]
    fn = {"add": np.add, "sub": np.subtract, "mul": np.multiply}[name]
    if is_half(type_name):
        return ops_half.arithmetic(inst, scope, fn, 2)
    if not ops_int.is_float(inst):
        if name == "mul":
            return ops_int.integer_mad(inst, scope, with_addend=False)
        if "sat" in inst.parts:
            return simple(inst, scope, _saturating(fn), 2)
        return simple(inst, scope, fn, 2)
    return _rounded(inst, scope, fn)


def _saturating(fn: np.ufunc) -> Callable[..., np.ndarray]:
    def clamp(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        info = np.iinfo(np.int32)
        return np.clip(fn(a.astype(np.int64), b.astype(np.int64)), info.min, info.max)

    return clamp


def _rounded(inst: Instruction, scope: Scope, fn: np.ufunc) -> Op:
    """add, sub, mul on floats with rounding mode, .ftz and .sat."""
    view, mode = inst.parts[-1], _mode(inst)
    ftz, sat = "ftz" in inst.parts, "sat" in inst.parts
    dst = scope.dst(inst.operands[0], view)
    a, b = (scope.src(x, view) for x in inst.operands[1:3])
    if mode == "rn" and not sat:
        if not ftz:
            return ufunc(fn, view, dst, (a, b))

        def flushing(m: Machine) -> None:
            rows = m.v["f32"]
            if m.full:
                flush(fn(rows[a], rows[b], out=rows[dst]))
            else:
                put(m, "u32", dst, flush(fn(rows[a], rows[b])))

        return flushing
    if view == "f64" and mode != "rn":
        raise PtxParseError(f"rounding .{mode} of f64 is not handled")

    def exact(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        out = directed(fn(x.astype(F64), y.astype(F64)), mode) if mode != "rn" else fn(x, y)
        return _finish(out, ftz, sat)

    return compute(exact, view, dst, (view, a), (view, b))


def _finish(out: np.ndarray, ftz: bool, sat: bool) -> np.ndarray:
    if sat:
        out = np.where(np.isnan(out), out.dtype.type(0), np.clip(out, 0, 1))
    return flush(out) if ftz else out


@opcode("fma", "mad")
def multiply_add(inst: Instruction, scope: Scope) -> Op:
    """Fused on floats; mad on integers."""
    if is_half(inst.parts[-1]):
        return ops_half.arithmetic(inst, scope, lambda a, b, c: a * b + c, 3)
    if not ops_int.is_float(inst):
        return ops_int.integer_mad(inst, scope, with_addend=True)
    if inst.parts[-1] == "f64":
        return simple(inst, scope, fma64, 3)
    mode, ftz, sat = _mode(inst), "ftz" in inst.parts, "sat" in inst.parts
    dst = scope.dst(inst.operands[0], "f32")
    a, b, c = (scope.src(x, "f32") for x in inst.operands[1:4])
    if mode != "rn" or sat:

        def other(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
            exact = np.multiply(x, y, dtype=F64) + z
            return _finish(directed(exact, mode) if mode != "rn" else exact.astype(F32), ftz, sat)

        return compute(other, "f32", dst, ("f32", a), ("f32", b), ("f32", c))

    def fused(m: Machine) -> None:
        rows = m.v["f32"]
        x = rows[a].astype(F64)
        x *= rows[b]
        x += rows[c]
        if m.full:
            out = rows[dst]
            out[...] = x
            if ftz:
                flush(out)
        else:
            new = x.astype(F32)
            put(m, "u32", dst, flush(new) if ftz else new)

    return fused


def fma64(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c with the product's rounding error carried along (Dekker 1971, Knuth's two-sum)."""
    product = a * b
    t = _SPLIT * a
    a_high = t - (t - a)
    t = _SPLIT * b
    b_high = t - (t - b)
    a_low, b_low = a - a_high, b - b_high
    error = ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low
    total = product + c
    part = total - product
    error += (product - (total - part)) + (c - part)
    out = total + error
    return np.where(np.isfinite(out), out, total)


@opcode("min", "max")
def min_max(inst: Instruction, scope: Scope) -> Op:
    """The number wins over NaN, unless .NaN; -0 is less than +0."""
    type_name = inst.parts[-1]
    if is_half(type_name):
        return ops_half.min_max(inst, scope)
    if not ops_int.is_float(inst):
        return ops_int.integer_min_max(inst, scope)
    fn = min_max_function(inst.parts[0], "NaN" in inst.parts)
    ftz, count = "ftz" in inst.parts, len(inst.operands) - 1
    dst = scope.dst(inst.operands[0], type_name)
    srcs = [(type_name, scope.src(x, type_name)) for x in inst.operands[1:]]

    def choose(*rows: np.ndarray) -> np.ndarray:
        out = fn(rows[0], rows[1])
        if count == 3:
            out = fn(out, rows[2])
        return flush(out) if ftz else out

    return compute(choose, type_name, dst, *srcs)


def min_max_function(name: str, nan: bool) -> Callable[..., np.ndarray]:
    """min or max of two rows with PTX's rules for NaN and signed zeros."""
    if nan:
        plain = np.minimum if name == "min" else np.maximum
    else:
        plain = np.fmin if name == "min" else np.fmax

    def choose(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        out = plain(a, b)
        zero = (a == b) & (out == 0)
        if zero.any():
            negative = np.signbit(a) | np.signbit(b)
            if name == "max":
                negative = np.signbit(a) & np.signbit(b)
            dtype = out.dtype.type
            out = np.where(zero, np.where(negative, dtype(-0.0), dtype(0.0)), out)
        return out

    return choose


@opcode("neg", "abs")
def sign(inst: Instruction, scope: Scope) -> Op:
    """Negation and absolute value; on floats they act on the sign bit."""
    type_name = inst.parts[-1]
    if is_half(type_name):
        return ops_half.sign(inst, scope)
    if not ops_int.is_float(inst):
        return simple(inst, scope, np.negative if inst.parts[0] == "neg" else np.abs, 1)
    dtype = DTYPES[class_of(type_name)]
    top = dtype(1 << (31 if type_name == "f32" else 63))
    ftz = "ftz" in inst.parts
    cls = class_of(type_name)
    dst, a = scope.dst(inst.operands[0], type_name), scope.src(inst.operands[1], type_name)

    def change(bits: np.ndarray) -> np.ndarray:
        out = bits ^ top if inst.parts[0] == "neg" else bits & ~top
        return flush(out.view(F32)).view(dtype) if ftz else out

    return compute(change, cls, dst, (cls, a))


@opcode("copysign")
def copy_sign(inst: Instruction, scope: Scope) -> Op:
    """The magnitude of b with the sign of a."""
    return simple(inst, scope, lambda a, b: np.copysign(b, a), 2)


def float_division(inst: Instruction, scope: Scope) -> Op:
    """div: correctly rounded for .rn and .full / .approx alike."""
    ftz = "ftz" in inst.parts
    if _mode(inst) != "rn":
        raise PtxParseError("directed rounding of division is not handled")

    def divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        if not ftz:
            return np.divide(a, b)
        return flush(np.divide(flushed(a), flushed(b)))

    return simple(inst, scope, divide, 2)


def _reciprocal(x: np.ndarray) -> np.ndarray:
    return x.dtype.type(1) / x


_FUNCTIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "ex2": np.exp2,
    "lg2": np.log2,
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
    "sqrt": np.sqrt,
    "rcp": _reciprocal,
    "rsqrt": lambda x: (1.0 / np.sqrt(x.astype(F64))).astype(x.dtype),
}


@opcode(*_FUNCTIONS)
def function(inst: Instruction, scope: Scope) -> Op:
    """Functions of one variable; .approx.ftz.f64 keeps only the upper word, as a device does."""
    fn, ftz, type_name = _FUNCTIONS[inst.parts[0]], "ftz" in inst.parts, inst.parts[-1]
    if is_half(type_name):
        return ops_half.arithmetic(inst, scope, fn, 1)
    if _mode(inst) != "rn":
        return _directed_function(inst, scope)
    if type_name == "f64":
        coarse = "approx" in inst.parts

        def double(x: np.ndarray) -> np.ndarray:
            out = fn(x)
            if coarse:
                out = (out.view(np.uint64) & ~np.uint64(0xFFFFFFFF)).view(F64)
            return out

        return simple(inst, scope, double, 1)
    if not ftz:
        return simple(inst, scope, fn, 1)
    return simple(inst, scope, lambda x: flush(fn(flushed(x))), 1)


def _directed_function(inst: Instruction, scope: Scope) -> Op:
    """rcp and sqrt of f32 with a directed rounding, through float64 (exact enough for both)."""
    mode, name, ftz = _mode(inst), inst.parts[0], "ftz" in inst.parts
    if inst.parts[-1] != "f32" or name not in ("rcp", "sqrt"):
        raise PtxParseError(f"rounding .{mode} is not handled for {inst.opcode}")
    fn = _FUNCTIONS[name]

    def rounded(x: np.ndarray) -> np.ndarray:
        out = directed(fn(x.astype(F64)), mode)
        return flush(out) if ftz else out

    return simple(inst, scope, rounded, 1)
