"""Number formats numpy lacks, and the flush of subnormal numbers.

In: rows of bits or of float32 / float64. Out: rows of float32 or bits; roundings are to nearest
even unless the name says otherwise.
"""

from __future__ import annotations

import numpy as np

U16, U32, F32 = np.uint16, np.uint32, np.float32
_TINY_BITS = U32(0x00800000)  # the smallest normal float32


def is_half(type_name: str) -> bool:
    """Whether a PTX type is f16, bf16 or a pair of them."""
    return type_name in ("f16", "bf16", "f16x2", "bf16x2")


def bf16_to_f32(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bits to float32, exact."""
    return (bits.astype(U32) << U32(16)).view(F32)


def f32_to_bf16(values: np.ndarray, mode: str = "rn") -> np.ndarray:
    """float32 to bfloat16 bits; `mode` is rn (nearest even) or rz (towards zero)."""
    u = np.ascontiguousarray(values, F32).view(U32)
    if mode == "rn":
        rounded = u + U32(0x7FFF) + ((u >> U32(16)) & U32(1))
    else:
        rounded = u
    out = (rounded >> U32(16)).astype(U16)
    nan = (u & U32(0x7FFFFFFF)) > U32(0x7F800000)
    return np.where(nan, U16(0x7FFF), out)


def f64_to_f32_odd(values: np.ndarray) -> np.ndarray:
    """float64 to float32 rounded to odd, so that a second rounding is as if there were one."""
    near = values.astype(F32)
    back = near.astype(np.float64)
    bits = near.view(U32)
    inexact = (back != values) & np.isfinite(near) & ((bits & U32(1)) == 0)
    away = np.abs(back) > np.abs(values)
    step = np.where(away, np.int64(-1), np.int64(1))
    moved = (bits.astype(np.int64) + step).astype(U32)
    return np.where(inexact, moved, bits).view(F32)


def half_to_f64(bits: np.ndarray, type_name: str) -> np.ndarray:
    """f16 or bf16 bits to float64."""
    if type_name.startswith("bf16"):
        return bf16_to_f32(bits).astype(np.float64)
    return bits.view(np.float16).astype(np.float64)


def f64_to_half(values: np.ndarray, type_name: str) -> np.ndarray:
    """float64 to f16 or bf16 bits, rounded once."""
    if type_name.startswith("bf16"):
        return f32_to_bf16(f64_to_f32_odd(values))
    out = values.astype(np.float16).view(U16)
    return np.where(np.isnan(values), U16(0x7FFF), out)


def to_tf32(values: np.ndarray) -> np.ndarray:
    """float32 as the tensor cores read it for tf32: the low 13 bits do not count."""
    return (np.ascontiguousarray(values).view(U32) & U32(0xFFFFE000)).view(F32)


def round_tf32(values: np.ndarray, mode: str = "rna") -> np.ndarray:
    """float32 to tf32 bits: rna (nearest, ties away) or rn (nearest even) or rz."""
    u = np.ascontiguousarray(values, F32).view(U32)
    add = {
        "rna": U32(0x1000),
        "rn": U32(0xFFF) + ((u >> U32(13)) & U32(1)),
        "rz": U32(0),
    }[mode]
    special = (u & U32(0x7F800000)) == U32(0x7F800000)
    return np.where(special, u, (u + add) & U32(0xFFFFE000))


def flush(values: np.ndarray) -> np.ndarray:
    """Replace subnormal float32 by zero of the same sign, in place; returns the array."""
    bits = values.view(U32)
    size = bits & U32(0x7FFFFFFF)
    size -= U32(1)  # zero wraps around and counts as large
    if size.min() < _TINY_BITS - U32(1):
        small = size < _TINY_BITS - U32(1)
        bits[small] &= U32(0x80000000)
    return values


def flushed(values: np.ndarray) -> np.ndarray:
    """A flushed copy where there is anything to flush, else the same array."""
    size = values.view(U32) & U32(0x7FFFFFFF)
    size -= U32(1)
    if size.min() < _TINY_BITS - U32(1):
        return flush(values.copy())
    return values


def canonical_nan(values: np.ndarray) -> np.ndarray:
    """Give every float32 NaN the bits a device makes, in place."""
    nan = np.isnan(values)
    if nan.any():
        values.view(U32)[nan] = U32(0x7FFFFFFF)
    return values


def directed(exact: np.ndarray, mode: str) -> np.ndarray:
    """float64 to float32 rounded down (rm), up (rp) or to zero (rz)."""
    near = exact.astype(F32)
    back = near.astype(np.float64)
    if mode == "rm":
        wrong, towards = back > exact, F32(-np.inf)
    elif mode == "rp":
        wrong, towards = back < exact, F32(np.inf)
    else:
        wrong, towards = np.abs(back) > np.abs(exact), F32(0)
    return np.where(wrong, np.nextafter(near, towards), near)
