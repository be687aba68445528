"""Where threads wait for each other: block barriers and warp-wide instructions.

In: threads that arrive at bar / barrier (with number and count) or at an instruction their whole
warp must execute together. Out: thread states, released threads, and issues for warps that arrive
in part.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

import numpy as np

from .errors import PtxFaultError

if TYPE_CHECKING:
    from .machine import Machine
    from .parse import Instruction

_RUN, _AT_BARRIER, _DONE, _PARKED = 0, 1, 2, 4


class Barriers:
    """The barriers of every block in the batch."""

    def __init__(self, m: Machine):
        self._m = m
        self._number = np.zeros(m.n, np.int32)
        self._count = np.zeros(m.n, np.int32)
        self._vote = np.zeros(m.n, bool)
        self._arrived: dict[tuple[int, int], int] = defaultdict(int)
        self._results: dict[tuple[int, int], tuple[str, str, int]] = {}

    def pass_all(self, inst: Instruction) -> bool:
        """Fast way through barrier 0: true if every living thread of every block is here."""
        m = self._m
        if m.full or not ((m.state != _DONE) & ~m.mask).any():
            if not m.full:
                alive = (m.state != _DONE).reshape(m.blocks_here, -1).any(1)
                m.races.barrier(alive)
            else:
                m.races.barrier(np.ones(m.blocks_here, bool))
            return True
        return False

    def wait(self, number: np.ndarray, count: np.ndarray, after: int) -> None:
        """The group waits at barrier `number` for `count` threads (0: all of the block)."""
        m = self._m
        m.pc[m.whole] = after
        m.next = None
        self._number[m.idx], self._count[m.idx] = number, count
        m.state[m.idx] = _AT_BARRIER
        self.release()

    def vote(self, kind: str, cls: str, slot: int, votes: np.ndarray) -> None:
        """What bar.red combines, and the register the result goes to."""
        m = self._m
        self._vote[m.idx] = votes
        for block in np.unique(m.lane_block[m.idx]):
            self._results[int(block), 0] = (kind, cls, slot)

    def arrive(self, number: np.ndarray) -> None:
        """The group counts at barrier `number` and goes on."""
        m = self._m
        for lane, k in zip(m.idx, number, strict=True):
            self._arrived[int(m.lane_block[lane]), int(k)] += 1
        for warp in np.unique(m.lane_warp[m.idx]):
            block = int(warp // m.warps)
            for k in np.unique(number[m.lane_warp[m.idx] == warp]):
                m.races.give(block, int(warp % m.warps), ("bar", block, int(k)))

    def release(self) -> bool:
        """Let go every barrier that is complete; true if there was one."""
        m = self._m
        waiting = m.state == _AT_BARRIER
        if not waiting.any():
            return False
        numbers = np.unique(self._number[waiting])
        alive = (m.state != _DONE).reshape(m.blocks_here, -1).sum(1)
        hit = False
        for number in numbers:
            here = waiting & (self._number == number)
            present = here.reshape(m.blocks_here, -1).sum(1)
            need = np.where(here, self._count, 0).reshape(m.blocks_here, -1).max(1)
            given = np.array([self._arrived.get((b, int(number)), 0) for b in range(m.blocks_here)])
            done = (present > 0) & (present + given >= np.where(need == 0, alive, need))
            if done.any():
                self._let_go(int(number), here & done[m.lane_block], done)
                hit = True
        return hit

    def _let_go(self, number: int, lanes: np.ndarray, blocks: np.ndarray) -> None:
        m = self._m
        m.state[lanes] = _RUN
        warps = lanes.reshape(m.blocks_here, m.warps, 32).any(2)
        living = (m.state != _DONE).reshape(m.blocks_here, m.warps, 32).any(2)
        whole = blocks & (warps | ~living).all(1)
        if (
            not any((b, number) in self._arrived for b in np.flatnonzero(blocks))
            and (whole == blocks).all()
        ):
            m.races.barrier(blocks)
        else:
            for b in np.flatnonzero(blocks):
                self._arrived.pop((int(b), number), None)
                m.races.join(int(b), np.flatnonzero(warps[b]), ("bar", int(b), number))
        for b in np.flatnonzero(blocks):
            if (int(b), 0) in self._results:
                self._combine(int(b), lanes)

    def _combine(self, block: int, lanes: np.ndarray) -> None:
        m = self._m
        kind, cls, slot = self._results.pop((block, 0))
        mine = np.flatnonzero(lanes & (m.lane_block == block))
        votes = self._vote[mine]
        result = {"popc": votes.sum, "and": votes.all, "or": votes.any}[kind]()
        m.v[cls][slot][mine] = result


def whole_warps(m: Machine, inst: Instruction, at: int, exited_may_miss: bool = False) -> bool:
    """Check that the group consists of whole warps, as an .aligned instruction wants.

    True: stop here, threads of these warps may still be on their way and will be waited for.
    Raises PtxFaultError where a warp is parted for good.
    """
    if m.full:
        return False
    per_warp = m.mask.reshape(-1, 32)
    want = np.ones(32, bool)
    if exited_may_miss:
        want = (m.state != _DONE).reshape(-1, 32)
    elif m.block_threads % 32:
        want = (m.lane % m.threads < m.block_threads).reshape(-1, 32)
    parted = per_warp.any(1) & (per_warp != want).any(1)
    if not parted.any():
        return False
    if at not in m.program.leaders:
        return wait_here(m, at)
    warp = int(np.flatnonzero(parted)[0])
    have, lane = int(per_warp[warp].sum()), int(np.flatnonzero(per_warp[warp])[0])
    m.report(
        "divergent",
        f"an aligned instruction is executed by {have} threads of a warp without the others",
        inst,
        warp * 32 + lane,
    )
    raise PtxFaultError(f"{inst.text}: executed by {have} threads of a warp without the others")


def wait_here(m: Machine, at: int) -> bool:
    """Stop the group before instruction `at`, so that threads on their way can join it."""
    m.program.split(at)
    m.pc[m.whole] = at
    m.next = None
    return True


def named_threads(m: Machine, named: np.ndarray, at: int) -> bool:
    """Wait until all living threads that `named` (a mask per thread) names are here.

    True: stop here. Threads whose warp is not complete are parked until the others come.
    """
    if m.full:
        return False
    here = lane_bits(m)
    alive = (m.state != _DONE).reshape(-1, 32) @ (np.int64(1) << np.arange(32))
    wanted = named.astype(np.int64) & alive[m.lane_warp]
    missing = (wanted & ~here[m.lane_warp]) != 0
    missing &= m.mask
    if not missing.any():
        return False
    if at not in m.program.leaders:
        return wait_here(m, at)
    m.pc[m.whole] = at
    m.state[missing.reshape(-1, 32).any(1)[m.lane_warp] & m.mask] = _PARKED
    m.parked = True
    m.next = None
    return True


def lane_bits(m: Machine) -> np.ndarray:
    """Per warp, the bits of its threads that are in the group."""
    return m.mask.reshape(-1, 32) @ (np.int64(1) << np.arange(32))
