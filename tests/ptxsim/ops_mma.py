"""Tensor-core instructions of a warp: ldmatrix, stmatrix, movmatrix and mma.sync.

In: m16n8k4 / k8 / k16 with f16, bf16 and tf32 operands and f32 or f16 sums, m8n8k4 with f64. Out:
closures over all warps of the group at once. Products are exact, sums are float32 (or float64) in
numpy's order, or rounded towards zero if `Checks.truncated_sums` asks for it: a device may differ
in the last bits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from . import access
from .barriers import whole_warps
from .emit import put_at
from .errors import PtxParseError
from .numerics import bf16_to_f32, directed, to_tf32
from .parse import Instruction, split_operands
from .program import Op, Scope, opcode

if TYPE_CHECKING:
    from .machine import Machine

F32 = np.float32


def slots(scope: Scope, text: str, type_name: str) -> list[int]:
    """Slots of a braced register list."""
    return [scope.src(x, type_name) for x in split_operands(text.strip("{}"))]


def _halves(m: Machine, slot: int, bf16: bool) -> np.ndarray:
    """A register of packed halves as float32 [warp, 8 groups, 4 threads, 2]."""
    bits = np.ascontiguousarray(m.pick(m.v["u32"][slot])).view(np.uint16)
    values = bf16_to_f32(bits) if bf16 else bits.view(np.float16).astype(F32)
    return values.reshape(-1, 8, 4, 2)


@opcode("mma")
def mma(inst: Instruction, scope: Scope) -> Op:
    """D = A B + C for every warp."""
    shape = next(p for p in inst.parts if p.startswith("m") and p[1:2].isdigit())
    dt, at, bt, ct = inst.parts[-4:]
    if (shape, dt, at) == ("m8n8k4", "f64", "f64"):
        return _mma_f64(inst, scope)
    if not shape.startswith("m16n8k") or at != bt or dt not in ("f32", "f16") or dt != ct:
        raise PtxParseError(f"{inst.opcode} is not handled")
    if at not in ("f16", "bf16", "tf32"):
        raise PtxParseError(f"{inst.opcode}: operands of type {at} are not handled")
    k = int(shape[6:])
    a, b = (slots(scope, x, "b32") for x in inst.operands[1:3])
    c, d = (slots(scope, x, "b32") for x in (inst.operands[3], inst.operands[0]))
    per = 4 if at == "tf32" else 8
    if len(a) != 2 * k // per or len(b) != k // per or len(c) != (4 if dt == "f32" else 2):
        raise PtxParseError(f"{inst.opcode}: wrong number of registers")
    index = scope.at

    def run(m: Machine) -> bool | None:
        if whole_warps(m, inst, index):
            return True
        if at == "tf32":
            left, right = _operands_tf32(m, a, b)
        else:
            left, right = _operands_half(m, a, b, at == "bf16")
        _accumulate(m, left, right, c, d, dt)
        return None

    return run


def _operands_half(
    m: Machine, a: list[int], b: list[int], bf16: bool
) -> tuple[np.ndarray, np.ndarray]:
    """A as [warp, 16, k] and B transposed as [warp, 8, k] from packed halves."""
    warps, steps = len(m.idx) // 32, len(b)
    left = np.empty((warps, 2, 8, steps, 4, 2), F32)
    for r, slot in enumerate(a):
        left[:, r & 1, :, r >> 1] = _halves(m, slot, bf16)
    right = np.empty((warps, 8, steps, 4, 2), F32)
    for r, slot in enumerate(b):
        right[:, :, r] = _halves(m, slot, bf16)
    return left.reshape(warps, 16, -1), right.reshape(warps, 8, -1)


def _operands_tf32(m: Machine, a: list[int], b: list[int]) -> tuple[np.ndarray, np.ndarray]:
    warps, steps = len(m.idx) // 32, len(b)
    left = np.empty((warps, 2, 8, steps, 4), F32)
    for r, slot in enumerate(a):
        left[:, r & 1, :, r >> 1] = to_tf32(m.pick(m.v["f32"][slot])).reshape(-1, 8, 4)
    right = np.empty((warps, 8, steps, 4), F32)
    for r, slot in enumerate(b):
        right[:, :, r] = to_tf32(m.pick(m.v["f32"][slot])).reshape(-1, 8, 4)
    return left.reshape(warps, 16, -1), right.reshape(warps, 8, -1)


def _accumulate(
    m: Machine, left: np.ndarray, right: np.ndarray, c: list[int], d: list[int], dt: str
) -> None:
    """D = A Bt' + C; thread (g, t) holds rows g and g + 8, columns 2t and 2t + 1."""
    wide = m.checks.truncated_sums and dt == "f32"
    if wide:
        left, right = left.astype(np.float64), right.astype(np.float64)
    product = np.matmul(left, right.swapaxes(1, 2)).reshape(-1, 2, 8, 4, 2)
    if dt == "f32":
        old = [m.pick(m.v["f32"][s]) for s in c]
        if wide:
            for k, slot in enumerate(d):
                total = product[:, k >> 1, :, :, k & 1].reshape(-1) + old[k].astype(np.float64)
                put_at(m, "f32", slot, directed(total, "rz"))
            return
        for k, slot in enumerate(d):
            put_at(m, "f32", slot, product[:, k >> 1, :, :, k & 1].reshape(-1) + old[k])
        return
    old16 = [_halves(m, s, bf16=False) for s in c]
    for k, slot in enumerate(d):
        total = (product[:, k] + old16[k]).astype(np.float16)
        put_at(m, "u32", slot, np.ascontiguousarray(total).view(np.uint32).reshape(-1))


def _mma_f64(inst: Instruction, scope: Scope) -> Op:
    """m8n8k4: thread (g, t) holds A[g, t], B[t, g] and C[g, 2t], C[g, 2t + 1]."""
    a, b, c, d = (slots(scope, inst.operands[k], "f64") for k in (1, 2, 3, 0))
    index = scope.at

    def run(m: Machine) -> bool | None:
        if whole_warps(m, inst, index):
            return True
        rows = m.v["f64"]
        left = m.pick(rows[a[0]]).reshape(-1, 8, 4)
        right = m.pick(rows[b[0]]).reshape(-1, 8, 4)
        product = np.matmul(left, right.swapaxes(1, 2)).reshape(-1, 8, 4, 2)
        old = [m.pick(rows[s]) for s in c]
        for k, slot in enumerate(d):
            put_at(m, "f64", slot, product[..., k].reshape(-1) + old[k])
        return None

    return run


def _matrices(inst: Instruction) -> int:
    return next(int(p[1:]) for p in inst.parts if p in ("x1", "x2", "x4"))


def _row_threads(m: Machine, count: int) -> np.ndarray:
    """Positions (in the group) of the threads that give row addresses: 8 per matrix."""
    return (np.arange(len(m.idx) // 32)[:, None] * 32 + np.arange(8 * count)).reshape(-1)


@opcode("ldmatrix")
def load_matrix(inst: Instruction, scope: Scope) -> Op:
    """Load 1, 2 or 4 8x8 matrices; thread 8i + r gives the address of row r of matrix i."""
    count, trans = _matrices(inst), "trans" in inst.parts
    if inst.parts[-1] != "b16":
        raise PtxParseError("ldmatrix is handled for b16 only")
    dsts = [scope.dst(x, "b32") for x in split_operands(inst.operands[0].strip("{}"))]
    where, at = access.addresses(scope.address(inst.operands[1])), scope.at

    def run(m: Machine) -> bool | None:
        if whole_warps(m, inst, at):
            return True
        rows, raw = _row_threads(m, count), where(m)
        before = m.only(rows)
        records = access.read_shared(m, inst, at, raw[rows], 16)
        m.restore(before)
        table = records.view(np.uint16).reshape(-1, count, 8, 8)
        if trans:
            table = table.swapaxes(2, 3)
        fragments = np.ascontiguousarray(table).view(np.uint32).reshape(-1, count, 32)
        for k, dst in enumerate(dsts):
            put_at(m, "u32", dst, fragments[:, k].reshape(-1))
        return None

    return run


@opcode("stmatrix")
def store_matrix(inst: Instruction, scope: Scope) -> Op:
    """Store 1, 2 or 4 8x8 matrices of halves: the reverse of ldmatrix."""
    count, trans = _matrices(inst), "trans" in inst.parts
    where, at = access.addresses(scope.address(inst.operands[0])), scope.at
    srcs = slots(scope, inst.operands[1], "b32")

    def run(m: Machine) -> bool | None:
        if whole_warps(m, inst, at):
            return True
        table = np.stack([m.pick(m.v["u32"][s]).reshape(-1, 32) for s in srcs], 1)
        table = table.view(np.uint16).reshape(-1, count, 8, 8)
        if trans:
            table = table.swapaxes(2, 3)
        rows, raw = _row_threads(m, count), where(m)
        before = m.only(rows)
        records = np.ascontiguousarray(table).reshape(-1).view(np.complex128)
        access.write_shared(m, inst, at, raw[rows], 16, records)
        m.restore(before)
        return None

    return run


@opcode("movmatrix")
def transpose_matrix(inst: Instruction, scope: Scope) -> Op:
    """Transpose an 8x8 matrix of halves across a warp."""
    dst, src = scope.dst(inst.operands[0], "b32"), scope.src(inst.operands[1], "b32")
    at = scope.at

    def run(m: Machine) -> bool | None:
        if whole_warps(m, inst, at):
            return True
        bits = np.ascontiguousarray(m.pick(m.v["u32"][src])).view(np.uint16).reshape(-1, 8, 8)
        out = np.ascontiguousarray(bits.swapaxes(1, 2)).view(np.uint32)
        put_at(m, "u32", dst, out.reshape(-1))
        return None

    return run
