"""Instructions in which the threads of a warp see each other: shfl, vote, match, redux, elect.

In: the group, and for the .sync forms a mask of threads that must come together. Out: closures.
Threads whose partners are still on their way wait for them; if they never come the launch is
reported as divergent.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .barriers import lane_bits, named_threads
from .emit import put
from .errors import PtxParseError
from .memory import POISON
from .parse import Instruction
from .program import Op, Scope, opcode

if TYPE_CHECKING:
    from .machine import Machine

U32 = np.uint32
_NOBODY = U32(POISON << 16 | POISON)


@opcode("shfl")
def shuffle(inst: Instruction, scope: Scope) -> Op:
    """Read another thread's register; out of range keeps the own value and clears the predicate."""
    mode = inst.parts[2]
    names = inst.operands[0].split("|")
    dst = scope.dst(names[0], "b32")
    flag = scope.dst(names[1], "pred") if len(names) > 1 else None
    a, b, c, named = (scope.src(x, "b32") for x in inst.operands[1:5])
    at = scope.at
    cache: dict[tuple[int, int, int], tuple[np.ndarray, np.ndarray]] = {}

    def sources(m: Machine, by: np.ndarray, limit: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Nearly always every thread has the same distance and limit: then compute once."""
        if (by != by[0]).any() or (limit != limit[0]).any():
            return _sources(mode, m.lane, by, limit)
        key = (m.n, int(by[0]), int(limit[0]))
        if key not in cache:
            cache.clear()
            cache[key] = _sources(mode, m.lane, by, limit)
        return cache[key]

    def run(m: Machine) -> bool | None:
        rows = m.v["u32"]
        if named_threads(m, rows[named], at):
            return True
        source, ok = sources(m, rows[b], rows[c])
        values = rows[a].take(source)
        if not m.full:
            values = np.where(m.mask.take(source), values, _NOBODY)
        put(m, "u32", dst, values)
        if flag is not None:
            put(m, "pred", flag, ok.copy())
        return None

    return run


def _sources(
    mode: str, lane: np.ndarray, b: np.ndarray, c: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Which thread each thread reads, and whether that lies in its segment."""
    own = lane % 32
    b, clamp, segment = b.astype(np.int64) & 31, c.astype(np.int64) & 31, c.astype(np.int64) >> 8
    segment &= 31
    most, least = (own & segment) | (clamp & ~segment & 31), own & segment
    if mode == "bfly":
        j = own ^ b
        ok = j <= most
    elif mode == "up":
        j = own - b
        ok = j >= most
    elif mode == "down":
        j = own + b
        ok = j <= most
    else:
        j = least | (b & ~segment & 31)
        ok = j <= most
    return lane - own + np.where(ok, j, own), ok


@opcode("vote")
def vote(inst: Instruction, scope: Scope) -> Op:
    """all, any, uni, ballot over the named threads."""
    mode = inst.parts[2]
    if mode not in ("all", "any", "uni", "ballot"):
        raise PtxParseError(f"vote mode .{mode} is not handled")
    dst = scope.dst(inst.operands[0], "b32" if mode == "ballot" else "pred")
    predicate, negated = scope.predicate(inst.operands[1])
    named, at = scope.src(inst.operands[2], "b32"), scope.at

    def run(m: Machine) -> bool | None:
        if named_threads(m, m.v["u32"][named], at):
            return True
        holds = m.v["pred"][predicate]
        holds = ((~holds if negated else holds) & m.mask).reshape(-1, 32)
        here = m.mask.reshape(-1, 32)
        if mode == "ballot":
            bits = holds @ (np.int64(1) << np.arange(32))
            put(m, "u32", dst, np.repeat(bits.astype(U32), 32))
            return None
        everyone, someone = (holds | ~here).all(1), holds.any(1)
        result = {"all": everyone, "any": someone, "uni": everyone | ~someone}[mode]
        put(m, "pred", dst, np.repeat(result, 32))
        return None

    return run


@opcode("match")
def match(inst: Instruction, scope: Scope) -> Op:
    """Which threads hold the same value (any), or whether all do (all)."""
    width = inst.parts[-1]
    view = "u64" if width == "b64" else "u32"
    names = inst.operands[0].split("|")
    dst = scope.dst(names[0], "b32")
    flag = scope.dst(names[1], "pred") if len(names) > 1 else None
    src, named, at = (
        scope.src(inst.operands[1], width),
        scope.src(inst.operands[2], "b32"),
        scope.at,
    )
    everyone = inst.parts[1] == "all"

    def run(m: Machine) -> bool | None:
        if named_threads(m, m.v["u32"][named], at):
            return True
        values, here = m.v[view][src].reshape(-1, 32), m.mask.reshape(-1, 32)
        equal = (values[:, :, None] == values[:, None, :]) & here[:, None, :]
        bits = (equal @ (np.int64(1) << np.arange(32))).reshape(-1)
        if everyone:
            own = np.repeat(lane_bits(m), 32)
            same = bits == own
            put(m, "u32", dst, np.where(same, own, 0).astype(U32))
            if flag is not None:
                put(m, "pred", flag, same)
            return None
        put(m, "u32", dst, bits.astype(U32))
        return None

    return run


_REDUCE = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}


@opcode("redux")
def reduce(inst: Instruction, scope: Scope) -> Op:
    """Combine an integer over the named threads."""
    fn = _REDUCE[inst.parts[2]]
    view = "s32" if inst.parts[-1] == "s32" else "u32"
    if inst.parts[-1] == "f32":
        raise PtxParseError("redux on f32 is not handled")
    dst = scope.dst(inst.operands[0], "b32")
    src, named, at = scope.src(inst.operands[1], view), scope.src(inst.operands[2], "b32"), scope.at

    def run(m: Machine) -> bool | None:
        if named_threads(m, m.v["u32"][named], at):
            return True
        values = m.v[view][src]
        out = np.zeros(m.n, values.dtype)
        for warp in np.unique(m.lane_warp[m.idx]):
            lanes = m.idx[m.lane_warp[m.idx] == warp]
            out[lanes] = fn.reduce(values[lanes])
        put(m, "u32", dst, out)
        return None

    return run


@opcode("elect")
def elect(inst: Instruction, scope: Scope) -> Op:
    """The lowest of the named threads is chosen."""
    names = inst.operands[0].split("|")
    dst = scope.dst(names[0], "b32")
    flag = scope.dst(names[1], "pred")
    named, at = scope.src(inst.operands[1], "b32"), scope.at

    def run(m: Machine) -> bool | None:
        if named_threads(m, m.v["u32"][named], at):
            return True
        first = np.repeat(np.argmax(m.mask.reshape(-1, 32), axis=1), 32)
        put(m, "u32", dst, first.astype(U32))
        put(m, "pred", flag, first == m.lane % 32)
        return None

    return run
