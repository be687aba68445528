"""cp.async and its commits and waits (the bulk forms are in `ops_hopper`).

In: cp.async.ca / .cg with 4, 8 or 16 bytes and an optional source size (the rest is filled with
zeros; a predicate form skips nothing but the read). Out: closures that hand the data to `copies`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from . import access, access_global, ops_hopper
from .errors import PtxParseError
from .parse import Instruction
from .program import Op, Scope, opcode

if TYPE_CHECKING:
    from .machine import Machine


@opcode("cp")
def copy(inst: Instruction, scope: Scope) -> Op:
    """Start, commit or await copies."""
    parts = inst.parts
    if "bulk" in parts:
        return ops_hopper.bulk(inst, scope)
    if "mbarrier" in parts:
        return ops_hopper.copy_arrive(inst, scope)
    if "commit_group" in parts:
        return lambda m: m.copies.commit()
    if "wait_group" in parts or "wait_all" in parts:
        return _wait(int(inst.operands[0]) if inst.operands else 0, "wait_all" in parts)
    return _start(inst, scope)


def _wait(newest: int, everything: bool) -> Op:
    def run(m: Machine) -> None:
        if everything:
            m.copies.commit()
        m.copies.wait(newest)

    return run


def _start(inst: Instruction, scope: Scope) -> Op:
    target = access.addresses(scope.address(inst.operands[0]))
    source = access.addresses(scope.address(inst.operands[1]))
    size = scope.literal(inst.operands[2], "b32")
    if size not in (4, 8, 16):
        raise PtxParseError(f"cp.async moves 4, 8 or 16 bytes, got {inst.operands[2]}")
    if "cg" in inst.parts and size != 16:
        raise PtxParseError("cp.async.cg moves 16 bytes only")
    given = scope.src(inst.operands[3], "b32") if len(inst.operands) > 3 else None
    at = scope.at

    def run(m: Machine) -> None:
        raw, address = target(m), source(m)
        if given is None:
            records = access_global.read_global(m, inst, at, address, size)
        else:
            records = _partial(m, inst, at, address, size, m.pick(m.v["u32"][given]))
        m.copies.issue(inst, at, raw, records, size)

    return run


def _partial(
    m: Machine, inst: Instruction, at: int, address: np.ndarray, size: int, given: np.ndarray
) -> np.ndarray:
    """Read `given` bytes of each record; the rest is zero. Nothing is touched where it is 0, but an
    address has to be whole there, too."""
    access.aligned(m, inst, address, size, "global")
    whole = given >= size
    if whole.all():
        return access_global.read_global(m, inst, at, address, size)
    out = np.zeros((len(address), size), np.uint8)
    for count in np.unique(given):
        rows = np.flatnonzero(given == count)
        n = min(int(count), size)
        if n == 0:
            continue
        before = m.only(rows)
        if n == size:
            part = access_global.read_global(m, inst, at, address[rows], size)
            out[rows] = part.view(np.uint8).reshape(len(rows), -1)
        else:
            access.aligned(m, inst, address[rows], size, "global")
            for byte in range(n):
                out[rows, byte] = access_global.read_global(m, inst, at, address[rows] + byte, 1)
        m.restore(before)
    return out.reshape(-1).view({4: np.uint32, 8: np.uint64, 16: np.complex128}[size])
