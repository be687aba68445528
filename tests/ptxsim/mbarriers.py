"""mbarriers: barriers in shared memory that count arrivals and bytes of asynchronous copies.

In: init, arrive, expect_tx and waits on a phase's parity; bulk copies that complete by bytes. Out:
phases, sleeping threads, and what the race check learns from them. Bulk copies land only when
nothing else can run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .errors import PtxFaultError

if TYPE_CHECKING:
    from .machine import Machine
    from .parse import Instruction

_RUN, _ASLEEP = 0, 3
Key = tuple[int, int]


@dataclass
class MBarrier:
    """One barrier: arrivals per phase, arrivals and bytes still missing, phase number."""

    count: int
    pending: int
    bytes: int = 0
    phase: int = 0


class MBarriers:
    """All mbarriers of the batch and the bulk copies that will complete on them."""

    def __init__(self, m: Machine):
        self._m = m
        self._all: dict[Key, MBarrier] = {}
        self._flying: list[tuple[Callable[[], None], Key, int]] = []

    def init(self, key: Key, count: int) -> None:
        """mbarrier.init."""
        self._all[key] = MBarrier(count, count)

    def get(self, key: Key, inst: Instruction, lane: int) -> MBarrier:
        """The barrier at (block, shared address); a fault if it was never initialised."""
        if key not in self._all:
            self._m.report("mbarrier", f"no mbarrier at shared byte {key[1]}", inst, lane)
            raise PtxFaultError(
                f"mbarrier at shared byte {key[1]} was never initialised: {inst.text}"
            )
        return self._all[key]

    def arrive(self, key: Key, inst: Instruction, lane: int, count: int, expect: int) -> int:
        """Arrive `count` times and expect so many more bytes; returns the phase arrived at."""
        barrier = self.get(key, inst, lane)
        phase = barrier.phase
        barrier.bytes += expect
        barrier.pending -= count
        if barrier.pending < 0:
            self._m.report("mbarrier", f"more arrivals than {barrier.count}", inst, lane)
            raise PtxFaultError(
                f"mbarrier at shared byte {key[1]} has too many arrivals: {inst.text}"
            )
        block, warp = key[0], int(self._m.lane_warp[lane] % self._m.warps)
        self._m.races.give(block, warp, key)
        self._complete(key, barrier)
        return phase

    def expect(self, key: Key, inst: Instruction, lane: int, count: int) -> None:
        """Expect so many more bytes."""
        self.get(key, inst, lane).bytes += count

    def _complete(self, key: Key, barrier: MBarrier) -> None:
        if barrier.pending == 0 and barrier.bytes == 0:
            barrier.phase += 1
            barrier.pending = barrier.count
            self._m.races.publish(key)
            self._m.state[self._m.state == _ASLEEP] = _RUN

    def passed(self, key: Key, inst: Instruction, lane: int, parity: int) -> bool:
        """Whether the phase of that parity is complete; then the thread's warp learns from it."""
        barrier = self.get(key, inst, lane)
        done = (barrier.phase & 1) != parity
        if done:
            self._m.races.receive(key[0], int(self._m.lane_warp[lane] % self._m.warps), key)
        return done

    def sleep(self, lanes: np.ndarray) -> None:
        """These threads wait until some phase completes."""
        self._m.state[lanes] = _ASLEEP

    def launch(self, copy: Callable[[], None], key: Key, size: int) -> None:
        """A bulk copy of `size` bytes that completes on `key`."""
        if self._m.checks.late_copies:
            self._flying.append((copy, key, size))
        else:
            self._land(copy, key, size)

    def _land(self, copy: Callable[[], None], key: Key, size: int) -> None:
        copy()
        barrier = self._all[key]
        barrier.bytes -= size
        self._complete(key, barrier)

    def advance(self) -> bool:
        """Nothing else can run: let one bulk copy land. False if there is none."""
        if not self._flying:
            return False
        self._land(*self._flying.pop(0))
        self._m.state[self._m.state == _ASLEEP] = _RUN
        return True
