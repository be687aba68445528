"""Jumps, exits, barriers, fences, and what needs no doing.

In: bra, brx, ret, exit, trap, bar / barrier, membar / fence, nanosleep and the like. Out: closures
that move threads: they set `m.next` (the whole group goes on there) or `m.pc` per thread.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from . import access
from .barriers import lane_bits, named_threads, whole_warps
from .errors import PtxFaultError, PtxParseError
from .parse import Instruction
from .program import Op, Scope, opcode

if TYPE_CHECKING:
    from .machine import Machine

_DONE = 2


@opcode("bra")
def branch(inst: Instruction, scope: Scope) -> Op:
    """Jump, all or those whose predicate holds."""
    target, after = scope.label(inst.operands[0]), scope.at + 1
    if inst.predicate is None:

        def jump(m: Machine) -> None:
            m.next = target

        return jump
    slot, negated = scope.src(inst.predicate, "pred"), inst.negated

    def choose(m: Machine) -> None:
        taken = m.pick(m.v["pred"][slot])
        count = np.count_nonzero(taken)
        if count == 0 or count == len(taken):
            m.next = target if (count != 0) != negated else after
            return
        go, stay = (after, target) if negated else (target, after)
        m.pc[m.idx] = np.where(taken, go, stay)
        m.next = None

    return choose


@opcode("brx")
def indexed_branch(inst: Instruction, scope: Scope) -> Op:
    """Jump tables are not made by the kernels this tool is for."""
    raise PtxParseError("brx.idx is not handled")


@opcode("ret", "exit")
def leave(inst: Instruction, scope: Scope) -> Op:
    """The threads end."""

    def run(m: Machine) -> None:
        m.state[m.idx] = _DONE
        m.copies.leaving(inst)
        if len(m.idx) == len(m.whole):
            m.next = None

    return run


@opcode("trap", "brkpt")
def stop(inst: Instruction, scope: Scope) -> Op:
    """The kernel gives up."""

    def run(m: Machine) -> None:
        m.report("trap", "the kernel stops itself", inst, int(m.idx[0]))
        raise PtxFaultError(f"{m.program.name}: {inst.text} at PTX line {inst.line} {inst.source}")

    return run


@opcode("extern")
def external(inst: Instruction, scope: Scope) -> Op:
    """A call of something NVRTC does not define: printf is silent, a failed assertion stops."""
    if inst.parts[1] == "vprintf":
        place = scope.symbol(inst.operands[0].strip("() "))
        return lambda m: access.write_local(
            m, inst, scope.at, np.full(len(m.idx), place), 4, np.zeros(len(m.idx), np.uint32)
        )
    if inst.parts[1] == "__assertfail":
        return stop(inst, scope)
    raise PtxParseError(f"external function {inst.parts[1]!r} is not handled")


@opcode("bar", "barrier")
def barrier(inst: Instruction, scope: Scope) -> Op:
    """bar.sync / arrive / red with number and count; bar.warp.sync waits for the named threads."""
    parts = inst.parts
    if "warp" in parts:
        named, at = scope.src(inst.operands[0], "b32"), scope.at
        return lambda m: named_threads(m, m.v["u32"][named], at)
    if "cluster" in parts:
        raise PtxParseError("cluster barriers are not handled")
    if "red" in parts:
        return _vote(inst, scope)
    aligned = parts[0] == "bar" or "aligned" in parts
    number = scope.src(inst.operands[0], "b32")
    count = scope.src(inst.operands[1], "b32") if len(inst.operands) > 1 else None
    plain = inst.operands[0] == "0" and count is None
    at = scope.at

    def sync(m: Machine) -> bool | None:
        if aligned and whole_warps(m, inst, at, exited_may_miss=True):
            return True
        if plain and m.barriers.pass_all(inst):
            return None
        _wait(m, number, count, at + 1)
        return None

    def arrive(m: Machine) -> bool | None:
        if aligned and whole_warps(m, inst, at, exited_may_miss=True):
            return True
        m.barriers.arrive(m.pick(m.v["u32"][number]))
        return None

    return arrive if "arrive" in parts else sync


def _wait(m: Machine, number: int, count: int | None, after: int) -> None:
    numbers = m.pick(m.v["u32"][number])
    counts = m.pick(m.v["u32"][count]) if count is not None else np.zeros(len(m.idx), np.uint32)
    m.barriers.wait(numbers, counts, after)


def _vote(inst: Instruction, scope: Scope) -> Op:
    """bar.red.popc / and / or: a barrier that also combines a predicate."""
    kind = next(p for p in inst.parts if p in ("popc", "and", "or"))
    result_type = "b32" if kind == "popc" else "pred"
    dst = scope.dst(inst.operands[0], result_type)
    cls = "u32" if kind == "popc" else "pred"
    number = scope.src(inst.operands[1], "b32")
    if inst.operands[1] != "0":
        raise PtxParseError("bar.red is handled for barrier 0 only")
    predicate, negated = scope.predicate(inst.operands[-1])
    count = scope.src(inst.operands[2], "b32") if len(inst.operands) > 3 else None
    at = scope.at

    def run(m: Machine) -> bool | None:
        if whole_warps(m, inst, at, exited_may_miss=True):
            return True
        votes = m.pick(m.v["pred"][predicate])
        m.barriers.vote(kind, cls, dst, ~votes if negated else votes)
        _wait(m, number, count, at + 1)
        return None

    return run


@opcode("activemask")
def active_mask(inst: Instruction, scope: Scope) -> Op:
    """The threads of the warp that execute this together."""
    dst = scope.dst(inst.operands[0], "b32")

    def run(m: Machine) -> None:
        row = m.v["u32"][dst]
        row[m.idx] = lane_bits(m)[m.lane_warp[m.idx]].astype(np.uint32)

    return run


@opcode("membar", "fence", "nanosleep", "setmaxnreg", "griddepcontrol", "pmevent")
def nothing(inst: Instruction, scope: Scope) -> Op:
    """Fences order what is already in order here; the others are about speed."""
    return lambda m: None
