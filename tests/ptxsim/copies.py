"""cp.async: copies that land later.

In: copies of 4, 8 or 16 bytes from global to shared memory, commits and waits, per thread. Out:
shared memory filled when its thread waits (as late as a device may let it; at once when late
copies are switched off). Until then the target counts as unwritten.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from . import access
from .memory import mark, store

if TYPE_CHECKING:
    from .machine import Machine
    from .parse import Instruction


@dataclass
class Copy:
    """One executed cp.async: threads, shared addresses and flat offsets, data, commit groups."""

    inst: Instruction
    at: int
    lanes: np.ndarray
    raw: np.ndarray
    flat: np.ndarray
    records: np.ndarray
    size: int
    group: np.ndarray

    def part(self, keep: np.ndarray) -> Copy:
        """The threads of `keep`."""
        lanes, raw, flat = self.lanes[keep], self.raw[keep], self.flat[keep]
        records, group = self.records[keep], self.group[keep]
        return Copy(self.inst, self.at, lanes, raw, flat, records, self.size, group)


class AsyncCopies:
    """All copies in flight in the batch."""

    def __init__(self, m: Machine):
        self._m = m
        self._flying: list[Copy] = []
        self._commits = np.zeros(m.n, np.int32)

    def issue(
        self, inst: Instruction, at: int, raw: np.ndarray, records: np.ndarray, size: int
    ) -> None:
        """The group's copies set out to shared addresses `raw`."""
        m = self._m
        access.aligned(m, inst, raw, size, "shared")
        inside = (raw >= 0) & (raw + size <= m.shared.size)
        if not inside.all():
            k = int(np.flatnonzero(~inside)[0])
            message = f"cp.async to shared byte {int(raw[k])}, there are {m.shared.size}"
            m.report("out-of-bounds", message, inst, int(m.idx[k]))
        before = m.only(np.flatnonzero(inside)) if not inside.all() else m.group
        raw, records = raw[inside], records[inside]
        flat = raw + m.pick(m.shared_base)
        if len(raw):
            m.races.write(inst, at, raw, size)
        if m.counters.wants_traffic:
            m.counters.shared(m, "cp.async", raw, size)
        lanes = m.idx.copy()
        copy = Copy(inst, at, lanes, raw, flat, records, size, self._commits[lanes])
        if m.checks.late_copies:
            m.shared.lose(flat, size)
            self._flying.append(copy)
        else:
            self._land(copy)
        m.restore(before)

    def _land(self, copy: Copy) -> None:
        store(self._m.shared.data, copy.flat, copy.size, copy.records)
        mark(self._m.shared.marks, copy.flat, copy.size)

    def _land_late(self, copy: Copy) -> None:
        """After the wait it is written anew: barriers before that order nothing."""
        self._land(copy)
        m, before = self._m, self._m.group
        mask = np.zeros(m.n, bool)
        mask[copy.lanes] = True
        m.set_mask(mask)
        m.races.write(copy.inst, copy.at, copy.raw, copy.size)
        m.restore(before)

    def commit(self) -> None:
        """The group's copies so far form a commit group."""
        self._commits[self._m.idx] += 1

    def wait(self, newest: int) -> None:
        """All but the `newest` latest commit groups of these threads land."""
        m = self._m
        left: list[Copy] = []
        for copy in self._flying:
            due = m.mask[copy.lanes] & (copy.group < self._commits[copy.lanes] - newest)
            if due.all():
                self._land_late(copy)
            elif due.any():
                self._land_late(copy.part(due))
                left.append(copy.part(~due))
            else:
                left.append(copy)
        self._flying = left

    def leaving(self, inst: Instruction) -> None:
        """The group ends: copies still in flight are reported and dropped."""
        if not self._flying:
            return
        m = self._m
        left: list[Copy] = []
        for copy in self._flying:
            gone = m.mask[copy.lanes]
            if gone.any():
                lane = int(copy.lanes[gone][0])
                m.report("unwaited copy", "cp.async still in flight at the end", inst, lane)
            if not gone.all():
                left.append(copy.part(~gone))
        self._flying = left
