"""cvt and cvta.

In: conversions between integers, f16, bf16, tf32, f32 and f64 with their rounding and saturation.
Out: closures. Rounding of a float to an integer keeps the PTX rules: out of range clamps, NaN
gives 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from .emit import put
from .errors import PtxParseError
from .numerics import (
    bf16_to_f32,
    directed,
    f32_to_bf16,
    f64_to_f32_odd,
    flush,
    flushed,
    is_half,
    round_tf32,
)
from .parse import Instruction, type_bytes
from .program import LOCAL_WINDOW, PARAM_WINDOW, SHARED_WINDOW, Op, Scope, opcode
from .registers import DTYPES, VIEWS

if TYPE_CHECKING:
    from .machine import Machine

Fn = Callable[[np.ndarray], np.ndarray]
_TO_INTEGER = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


@opcode("cvta")
def convert_address(inst: Instruction, scope: Scope) -> Op:
    """Between an address in a space and a generic address."""
    to = "to" in inst.parts
    window = 0
    for part in inst.parts:
        space = part.split("::")[0]
        window = {"shared": SHARED_WINDOW, "local": LOCAL_WINDOW, "param": PARAM_WINDOW}.get(
            space, window
        )
    if inst.parts[-1] == "u32":
        raise PtxParseError("32-bit generic addresses are not handled")
    dst, src = scope.dst(inst.operands[0], "u64"), scope.src(inst.operands[1], "u64")
    by = np.uint64(window)

    def run(m: Machine) -> None:
        row = m.v["u64"][src]
        put(m, "u64", dst, row - by if to else row + by)

    return run


def _narrowed(scope: Scope, text: str, type_name: str) -> tuple[str, int]:
    """(view, slot) of a source that may be wider than its type."""
    if text in scope.layout.slots:
        return scope.any_register(text)
    width = max(2, type_bytes(type_name))
    name = type_name if type_name in DTYPES and width == type_bytes(type_name) else f"b{8 * width}"
    return (f"u{8 * width}", scope.src(text, name))


def reader(scope: Scope, text: str, type_name: str) -> Callable[[Machine], np.ndarray]:
    """A function giving the operand as a fresh or borrowed row of the named number type."""
    cls, slot = _narrowed(scope, text, type_name)
    width = type_bytes(type_name)
    held = np.dtype(DTYPES[cls]).itemsize
    name = {"b8": "u8", "b16": "u16", "b32": "u32", "b64": "u64", "bf16": "u16"}.get(
        type_name, type_name
    )
    if held == width:
        if name in VIEWS[cls]:
            return lambda m: m.v[name][slot]
        dtype = DTYPES[name]
        return lambda m: m.v[cls][slot].view(dtype)
    if held < width:
        raise PtxParseError(f"register {text} is narrower than .{type_name}")
    low, dtype = np.dtype(f"u{width}"), DTYPES[name]
    return lambda m: m.v[cls][slot].astype(low).view(dtype)


def writer(scope: Scope, text: str, type_name: str) -> Callable[[Machine, np.ndarray], None]:
    """A function storing a fresh row of the number type, extended to the register's width."""
    cls, slot = scope.any_register("%sink.u32" if text == "_" else text)
    held, width = np.dtype(DTYPES[cls]).itemsize, type_bytes(type_name)
    if held == width:
        return lambda m, new: put(m, cls, slot, new)
    if held < width:
        raise PtxParseError(f"destination {text} is narrower than .{type_name}")
    signed = type_name[0] == "s"
    narrow = np.dtype(f"{'i' if signed else 'u'}{width}")
    wide = np.dtype(f"{'i' if signed else 'u'}{held}")
    return lambda m, new: put(m, cls, slot, new.view(narrow).astype(wide))


@opcode("cvt")
def convert(inst: Instruction, scope: Scope) -> Op:
    """Any number type to any other."""
    to, of = _types(inst)
    if to.endswith("x2"):
        return _pair(inst, scope, to)
    read, write = reader(scope, inst.operands[1], of), writer(scope, inst.operands[0], to)
    fn = _conversion(to, of, inst.parts)

    def run(m: Machine) -> None:
        row = read(m)
        new = fn(row)
        write(m, new.copy() if new is row else new)

    return run


def _types(inst: Instruction) -> tuple[str, str]:
    return inst.parts[-2], inst.parts[-1]


def _pair(inst: Instruction, scope: Scope, to: str) -> Op:
    """cvt.rn.bf16x2.f32 d, high, low."""
    if inst.parts[-1] != "f32":
        raise PtxParseError(f"conversion {inst.opcode} is not handled")
    high, low = (scope.src(x, "f32") for x in inst.operands[1:3])
    dst = scope.dst(inst.operands[0], "b32")
    fn = _conversion(to[:-2], "f32", inst.parts)

    def run(m: Machine) -> None:
        rows = m.v["f32"]
        out = np.empty((m.n, 2), np.uint16)
        out[:, 0], out[:, 1] = fn(rows[low]).view(np.uint16), fn(rows[high]).view(np.uint16)
        put(m, "u32", dst, out.view(np.uint32)[:, 0])

    return run


def _conversion(to: str, of: str, parts: tuple[str, ...]) -> Fn:
    """The function from rows of type `of` to rows of type `to`."""
    mode = next((p for p in parts if p in ("rn", "rz", "rm", "rp", "rna", *_TO_INTEGER)), "")
    sat, relu, ftz = "sat" in parts, "relu" in parts, "ftz" in parts
    of_float = of in ("f32", "f64") or is_half(of)
    to_float = to in ("f32", "f64", "tf32") or is_half(to)
    if of_float and not to_float:
        return _float_to_integer(to, of, mode, ftz)
    if not of_float and to_float:
        return _integer_to_float(to, mode)
    if not of_float:
        return _integer_to_integer(to, sat)
    return _float_to_float(to, of, mode, sat, relu, ftz)


def _widen(of: str) -> Fn:
    """Rows of a half or float type to a float row numpy computes with."""
    if of == "bf16":
        return lambda x: bf16_to_f32(x.view(np.uint16))
    if of == "f16":
        return lambda x: x.view(np.float16).astype(np.float32)
    return lambda x: x


def _float_to_integer(to: str, of: str, mode: str, ftz: bool) -> Fn:
    info, dtype = np.iinfo(DTYPES[to]), DTYPES[to]
    rounding, widen = _TO_INTEGER[mode], _widen(of)
    below = float(info.min)
    above = float(2 ** (info.bits - (1 if info.min < 0 else 0)))

    def run(x: np.ndarray) -> np.ndarray:
        value = widen(x)
        if ftz and value.dtype == np.float32:
            value = flushed(value)
        value = rounding(value.astype(np.float64))
        high, low, bad = value >= above, value < below, np.isnan(value)
        safe = np.where(high | low | bad, 0.0, value)
        out = safe.astype(dtype)
        out = np.where(high, dtype(info.max), np.where(low, dtype(info.min), out))
        return np.where(bad, dtype(0), out).astype(dtype)

    return run


def _integer_to_float(to: str, mode: str) -> Fn:
    if to == "bf16":
        return lambda x: f32_to_bf16(f64_to_f32_odd(x.astype(np.float64)))
    dtype = DTYPES[to]
    if to == "f32" and mode in ("rz", "rm", "rp"):
        return lambda x: directed(x.astype(np.longdouble), mode)  # exact for 64-bit integers
    return lambda x: x.astype(dtype)


def _integer_to_integer(to: str, sat: bool) -> Fn:
    dtype = DTYPES[to]
    info = np.iinfo(dtype)

    def run(x: np.ndarray) -> np.ndarray:
        if not sat:
            return x.astype(dtype)
        low, high = max(info.min, np.iinfo(x.dtype).min), min(info.max, np.iinfo(x.dtype).max)
        return np.clip(x, x.dtype.type(low), x.dtype.type(high)).astype(dtype)

    return run


def _float_to_float(to: str, of: str, mode: str, sat: bool, relu: bool, ftz: bool) -> Fn:
    widen, narrow = _widen(of), _narrowing(to, of, mode)

    def run(x: np.ndarray) -> np.ndarray:
        value = widen(x)
        if ftz and value.dtype == np.float32:
            value = flushed(value)
        if mode in _TO_INTEGER:
            value = _TO_INTEGER[mode](value)
        if sat:
            value = np.where(np.isnan(value), value.dtype.type(0), np.clip(value, 0, 1))
        if relu:
            value = np.where(value < 0, value.dtype.type(0), value)
        out = narrow(value)
        return flush(out) if ftz and to == "f32" and out is not x else out

    return run


def _narrowing(to: str, of: str, mode: str) -> Fn:
    """From f32 or f64 to the target format."""
    if to == "bf16":
        rounding = "rz" if mode == "rz" else "rn"
        return lambda v: f32_to_bf16(f64_to_f32_odd(v) if v.dtype == np.float64 else v, rounding)
    if to == "tf32":
        return lambda v: round_tf32(v, mode)
    if to == "f16":
        if mode == "rz":
            return lambda v: _f16_towards_zero(v)
        return lambda v: v.astype(np.float16)
    if to == "f32" and of == "f64" and mode in ("rz", "rm", "rp"):
        return lambda v: directed(v, mode)
    dtype = DTYPES[to]
    return lambda v: v.astype(dtype) if v.dtype != dtype else v


def _f16_towards_zero(v: np.ndarray) -> np.ndarray:
    near = v.astype(np.float16)
    over = np.abs(near.astype(np.float64)) > np.abs(v)
    return np.where(over, np.nextafter(near, np.float16(0)), near)
