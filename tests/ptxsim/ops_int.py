"""Integer, bit and predicate instructions, and setp / selp / mov / slct.

In: an instruction and its scope. Out: closures; every result is the bits a device would give, so
they are tested for equality.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .emit import compute, put, simple, ufunc
from .errors import PtxParseError
from .numerics import is_half
from .parse import Instruction, type_bytes
from .program import Op, Scope, opcode
from .registers import DTYPES, class_of, view_of

if TYPE_CHECKING:
    from .machine import Machine

U32, U64, S32, S64 = np.uint32, np.uint64, np.int32, np.int64
_WIDER = {"u16": "u32", "s16": "s32", "u32": "u64", "s32": "s64"}


def is_float(inst: Instruction) -> bool:
    """Whether the instruction's type is a floating-point one (handled in another room)."""
    return inst.parts[-1] in ("f32", "f64") or is_half(inst.parts[-1])


def integer_mad(inst: Instruction, scope: Scope, with_addend: bool) -> Op:
    """mul and mad on integers: .lo, .hi, .wide."""
    type_name = inst.parts[-1]
    if "wide" in inst.parts:
        return _wide(inst, scope, with_addend)
    high = _high(type_name) if "hi" in inst.parts else None
    if high is None:
        if not with_addend:
            return simple(inst, scope, np.multiply, 2)
        return simple(inst, scope, lambda a, b, c: a * b + c, 3)
    if not with_addend:
        return simple(inst, scope, high, 2)
    return simple(inst, scope, lambda a, b, c: high(a, b) + c, 3)


def _wide(inst: Instruction, scope: Scope, with_addend: bool) -> Op:
    narrow = inst.parts[-1]
    wide = _WIDER[narrow]
    dtype = DTYPES[wide]
    dst = scope.dst(inst.operands[0], wide)
    cls = class_of(wide)
    a, b = (scope.src(x, narrow) for x in inst.operands[1:3])
    if not with_addend:

        def product(m: Machine) -> None:
            rows = m.v[narrow]
            put(m, cls, dst, np.multiply(rows[a], rows[b], dtype=dtype))

        return product
    c = scope.src(inst.operands[3], wide)

    def fused(m: Machine) -> None:
        rows = m.v[narrow]
        out = np.multiply(rows[a], rows[b], dtype=dtype)
        out += m.v[wide][c]
        put(m, cls, dst, out)

    return fused


def _high(type_name: str):
    """The upper half of a product."""
    bits = 8 * type_bytes(type_name)
    signed = type_name[0] == "s"
    narrow = DTYPES[type_name]
    if bits < 64:
        wide = np.int64 if signed else np.uint64
        return lambda a, b: (np.multiply(a, b, dtype=wide) >> wide(bits)).astype(narrow)

    def high64(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        x, y = a.astype(U64), b.astype(U64)
        low, s = U64(0xFFFFFFFF), U64(32)
        mid = (x >> s) * (y & low) + ((x & low) * (y & low) >> s)
        rest = (x & low) * (y >> s) + (mid & low)
        out = (x >> s) * (y >> s) + (mid >> s) + (rest >> s)
        if signed:
            out = out - np.where(a < 0, y, U64(0)) - np.where(b < 0, x, U64(0))
        return out.astype(narrow)

    return high64


def integer_min_max(inst: Instruction, scope: Scope) -> Op:
    """min / max on integers, .relu included."""
    fn = np.minimum if inst.parts[0] == "min" else np.maximum
    if inst.parts[-1] in ("u16x2", "s16x2"):
        return _packed16(inst, scope, fn)
    if "relu" in inst.parts:
        return simple(inst, scope, lambda a, b: np.maximum(fn(a, b), 0), 2)
    return simple(inst, scope, fn, 2)


def _packed16(inst: Instruction, scope: Scope, fn: np.ufunc) -> Op:
    dtype = DTYPES[inst.parts[-1][:3]]
    dst = scope.dst(inst.operands[0], "b32")
    a, b = (("u32", scope.src(x, "b32")) for x in inst.operands[1:3])
    return compute(lambda x, y: fn(x.view(dtype), y.view(dtype)).view(U32), "u32", dst, a, b)


@opcode("div", "rem")
def division(inst: Instruction, scope: Scope) -> Op:
    """Truncating division and remainder; division by zero gives all ones, as hardware does."""
    if is_float(inst):
        from .ops_float import float_division

        return float_division(inst, scope)
    dtype = DTYPES[inst.parts[-1]]
    remainder = inst.parts[0] == "rem"

    def divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        zero = b == 0
        safe = np.where(zero, dtype(1), b)
        if inst.parts[-1][0] == "s":
            q = a // safe
            q = q + ((q < 0) & (q * safe != a)).astype(dtype)
        else:
            q = a // safe
        if remainder:
            return np.where(zero, a, a - q * safe)
        return np.where(zero, dtype(0) - dtype(1) if dtype(0) - 1 < 0 else ~dtype(0), q)

    return simple(inst, scope, divide, 2)


@opcode("and", "or", "xor")
def bitwise(inst: Instruction, scope: Scope) -> Op:
    """Bits or predicates."""
    fn = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[inst.parts[0]]
    if inst.parts[-1] == "pred":
        return _predicates(inst, scope, fn)
    return simple(inst, scope, fn, 2)


def _predicates(inst: Instruction, scope: Scope, fn: np.ufunc) -> Op:
    dst = scope.dst(inst.operands[0], "pred")
    (a, na), (b, nb) = (scope.predicate(x) for x in inst.operands[1:3])
    if not na and not nb:
        return ufunc(fn, "pred", dst, (a, b))
    return compute(
        lambda x, y: fn(~x if na else x, ~y if nb else y), "pred", dst, ("pred", a), ("pred", b)
    )


@opcode("not")
def invert(inst: Instruction, scope: Scope) -> Op:
    """Every bit, or a predicate."""
    return simple(inst, scope, np.invert, 1)


@opcode("cnot")
def logical_not(inst: Instruction, scope: Scope) -> Op:
    """1 where the operand is zero, else 0."""
    return simple(inst, scope, lambda a: a == 0, 1)


@opcode("shl", "shr")
def shift(inst: Instruction, scope: Scope) -> Op:
    """Shifts clamp at the width: shl and unsigned shr give 0, signed shr the sign."""
    type_name = inst.parts[-1]
    view = view_of(type_name)
    dtype, bits = DTYPES[view], 8 * type_bytes(type_name)
    fn = np.left_shift if inst.parts[0] == "shl" else np.right_shift
    arithmetic = inst.parts[0] == "shr" and type_name[0] == "s"
    dst, a = scope.dst(inst.operands[0], type_name), scope.src(inst.operands[1], type_name)
    amount = scope.literal(inst.operands[2], "u32")
    if amount is not None:
        if amount >= bits:
            if not arithmetic:
                return compute(np.zeros_like, view, dst, (view, a))
            amount = bits - 1
        by = dtype(amount)
        return compute(lambda x: fn(x, by), view, dst, (view, a))
    b = scope.src(inst.operands[2], "u32")

    def vary(x: np.ndarray, s: np.ndarray) -> np.ndarray:
        out = fn(x, np.minimum(s, U32(bits - 1)).astype(dtype))
        return out if arithmetic else np.where(s >= bits, dtype(0), out)

    return compute(vary, view, dst, (view, a), ("u32", b))


@opcode("shf")
def funnel_shift(inst: Instruction, scope: Scope) -> Op:
    """Shift a 64-bit pair {b, a}, keep 32 bits; .wrap takes the amount modulo 32."""
    left, wrap = "l" in inst.parts, "wrap" in inst.parts
    dst = scope.dst(inst.operands[0], "b32")
    srcs = [("u32", scope.src(x, "b32")) for x in inst.operands[1:4]]

    def funnel(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        s = (c & U32(31)) if wrap else np.minimum(c, U32(32))
        pair = (b.astype(U64) << U64(32)) | a
        if left:
            return np.where(s == 32, a, ((pair << s.astype(U64)) >> U64(32)).astype(U32))
        return np.where(s == 32, b, (pair >> s.astype(U64)).astype(U32))

    return compute(funnel, "u32", dst, *srcs)


@opcode("bfe")
def bit_field_extract(inst: Instruction, scope: Scope) -> Op:
    """`len` bits from `pos`, sign-extended for signed types (beyond the top: the top bit)."""
    type_name = inst.parts[-1]
    dtype, bits = DTYPES[type_name], 8 * type_bytes(type_name)
    srcs = [(view_of(type_name), scope.src(inst.operands[1], type_name))]
    srcs += [("u32", scope.src(x, "b32")) for x in inst.operands[2:4]]

    def extract(a: np.ndarray, pos: np.ndarray, length: np.ndarray) -> np.ndarray:
        p = (pos & U32(255)).astype(U64)
        n = (length & U32(255)).astype(U64)
        x = a.view(f"u{bits // 8}").astype(U64)
        shifted = np.where(p >= bits, U64(0), x >> np.minimum(p, U64(63)))
        mask = np.where(n >= 64, ~U64(0), (U64(1) << np.minimum(n, U64(63))) - U64(1))
        out = shifted & mask
        if type_name[0] == "s":
            top = np.minimum(p + n - U64(1), U64(bits - 1))
            sign = (n > 0) & ((x >> top) & U64(1)).astype(bool)
            reach = np.where(p >= bits, U64(0), np.minimum(n, U64(bits) - np.minimum(p, U64(bits))))
            fill = np.where(reach >= 64, U64(0), ~U64(0) << np.minimum(reach, U64(63)))
            out = np.where(sign, out | fill, out)
        return out.astype(f"u{bits // 8}").view(dtype)

    return compute(extract, view_of(type_name), scope.dst(inst.operands[0], type_name), *srcs)


@opcode("bfi")
def bit_field_insert(inst: Instruction, scope: Scope) -> Op:
    """The low `len` bits of a into b at `pos`."""
    type_name = inst.parts[-1]
    view = view_of(type_name)
    bits = 8 * type_bytes(type_name)
    srcs = [(view, scope.src(x, type_name)) for x in inst.operands[1:3]]
    srcs += [("u32", scope.src(x, "b32")) for x in inst.operands[3:5]]

    def insert(a: np.ndarray, b: np.ndarray, pos: np.ndarray, length: np.ndarray) -> np.ndarray:
        p = (pos & U32(255)).astype(U64)
        n = (length & U32(255)).astype(U64)
        ones = np.where(n >= 64, ~U64(0), (U64(1) << np.minimum(n, U64(63))) - U64(1))
        at = np.minimum(p, U64(63))
        field = np.where(p >= bits, U64(0), ones << at)
        value = np.where(p >= bits, U64(0), a.astype(U64) << at)
        return ((b.astype(U64) & ~field) | (value & field)).astype(DTYPES[view])

    return compute(insert, view, scope.dst(inst.operands[0], type_name), *srcs)


@opcode("bmsk")
def bit_mask(inst: Instruction, scope: Scope) -> Op:
    """`len` ones from `pos`, clamped or wrapped."""
    wrap = "wrap" in inst.parts

    def build(pos: np.ndarray, length: np.ndarray) -> np.ndarray:
        p, n = ((x & U32(31)) if wrap else np.minimum(x, U32(32)) for x in (pos, length))
        ones = (U64(1) << n.astype(U64)) - U64(1)
        return (ones << p.astype(U64)).astype(U32)

    return simple(inst, scope, build, 2)


@opcode("lop3")
def lop3(inst: Instruction, scope: Scope) -> Op:
    """Any three-operand bit function, given as the table of its eight outcomes."""
    lut = int(inst.operands[4], 0)
    dst = scope.dst(inst.operands[0], "b32")
    srcs = [("u32", scope.src(x, "b32")) for x in inst.operands[1:4]]

    def table(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        out = np.zeros_like(a)
        for k in range(8):
            if lut >> k & 1:
                term = a if k & 4 else ~a
                term = term & (b if k & 2 else ~b)
                out |= term & (c if k & 1 else ~c)
        return out

    return compute(table, "u32", dst, *srcs)


@opcode("prmt")
def permute_bytes(inst: Instruction, scope: Scope) -> Op:
    """Pick four of eight bytes; a selector's fourth bit replicates the byte's sign."""
    mode = inst.parts[2] if len(inst.parts) > 2 else ""
    if mode:
        raise PtxParseError(f"prmt mode .{mode} is not handled")
    dst = scope.dst(inst.operands[0], "b32")
    srcs = [("u32", scope.src(x, "b32")) for x in inst.operands[1:4]]

    def pick(a: np.ndarray, b: np.ndarray, s: np.ndarray) -> np.ndarray:
        table = np.stack([a, b], 1).view(np.uint8)
        select = (s[:, None] >> (U32(4) * np.arange(4, dtype=U32))) & U32(15)
        out = np.take_along_axis(table, (select & U32(7)).astype(np.intp), 1)
        sign = np.where(out & 128, np.uint8(255), np.uint8(0))
        out = np.where(select & U32(8), sign, out)
        return np.ascontiguousarray(out).view(U32)[:, 0]

    return compute(pick, "u32", dst, *srcs)


@opcode("popc", "clz", "brev", "bfind")
def count_bits(inst: Instruction, scope: Scope) -> Op:
    """Population count, leading zeros, bit reversal, highest set bit."""
    type_name = inst.parts[-1]
    view = view_of(type_name)
    bits = 8 * type_bytes(type_name)
    src = (view, scope.src(inst.operands[1], type_name))
    name = inst.parts[0]
    if name == "brev":
        return compute(
            lambda a: _reverse(a, bits), view, scope.dst(inst.operands[0], type_name), src
        )
    amount = "shiftamt" in inst.parts

    def leading(a: np.ndarray) -> np.ndarray:
        x, n = a.view(f"u{bits // 8}").astype(U64), np.zeros(len(a), U32)
        for step in (32, 16, 8, 4, 2, 1):
            big = (x >> U64(step)) != 0
            n += np.where(big, U32(step), U32(0))
            x = np.where(big, x >> U64(step), x)
        return np.where(x == 0, U32(bits), U32(bits - 1) - n)

    def highest(a: np.ndarray) -> np.ndarray:
        x = np.where(a < 0, ~a, a) if type_name[0] == "s" else a
        lead = leading(x)
        at = lead if amount else U32(bits - 1) - lead
        return np.where(lead == bits, ~U32(0), at)

    fn = {"popc": lambda a: _popcount(a), "clz": leading, "bfind": highest}[name]
    return compute(fn, "u32", scope.dst(inst.operands[0], "b32"), src)


def _popcount(a: np.ndarray) -> np.ndarray:
    octets = a.view(np.uint8).reshape(len(a), -1)
    return np.unpackbits(octets, axis=1).sum(1, dtype=U32)


def _reverse(a: np.ndarray, bits: int) -> np.ndarray:
    octets = a.view(np.uint8).reshape(len(a), -1)
    flipped = np.packbits(
        np.unpackbits(octets, axis=1, bitorder="little")[:, ::-1], axis=1, bitorder="little"
    )
    return np.ascontiguousarray(flipped).view(f"u{bits // 8}")[:, 0]


@opcode("sad")
def absolute_difference(inst: Instruction, scope: Scope) -> Op:
    """c + |a - b|."""
    return simple(inst, scope, lambda a, b, c: c + np.where(a < b, b - a, a - b), 3)


@opcode("dp4a")
def dot_four_bytes(inst: Instruction, scope: Scope) -> Op:
    """c plus the dot product of four byte pairs."""
    ta, tb = (np.int8 if p == "s32" else np.uint8 for p in inst.parts[-2:])
    out = "s32" if "s32" in inst.parts[-2:] else "u32"
    dst = scope.dst(inst.operands[0], out)
    srcs = [("u32", scope.src(x, "b32")) for x in inst.operands[1:3]]
    srcs.append((out, scope.src(inst.operands[3], out)))

    def dot(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        x = a.view(ta).reshape(-1, 4).astype(S64)
        y = b.view(tb).reshape(-1, 4).astype(S64)
        return (c.astype(S64) + (x * y).sum(1)).astype(DTYPES[out])

    return compute(dot, out, dst, *srcs)
