"""Who touched which word, and was it ordered: two detectors with one face.

In: every shared-memory access (instruction, raw address, thread) and every synchronisation. Out:
race issues. Warps are the unit: threads of one warp count as ordered, except two that write
different values to one word in the same instruction (seen where the store is done).

`Intervals` serves kernels that only ever use whole-block barriers: between two barriers each warp
leaves the number of the instruction that last read and wrote each word, and at the barrier any
word that two warps touched, one of them writing, is a race. `VectorClocks` serves the rest (named
and counted barriers, arrive without wait, mbarriers) and judges each access as it happens, after
FastTrack (Flanagan and Freund, 2009).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .memory import views

if TYPE_CHECKING:
    from .machine import Machine
    from .parse import Instruction

_CELL = 2  # bytes that are told apart


class NoRaces:
    """Checks nothing; used when race checking is switched off."""

    clock_of_warp: np.ndarray | None = None

    def __init__(self, m: Machine):
        self._m = m

    def read(self, inst: Instruction, at: int, raw: np.ndarray, size: int) -> None:
        """Threads m.idx read `size` bytes at shared addresses `raw`."""

    def write(self, inst: Instruction, at: int, raw: np.ndarray, size: int) -> None:
        """Threads m.idx write `size` bytes at shared addresses `raw`."""

    def barrier(self, blocks: np.ndarray) -> None:
        """All threads of these blocks passed a barrier together."""

    def join(self, block: int, warps: np.ndarray, key: object = None) -> None:
        """These warps of a block passed a barrier, after what was given to `key`."""

    def give(self, block: int, warp: int, key: object) -> None:
        """A warp arrived at `key` without waiting: what it did so far happens before."""

    def publish(self, key: object) -> None:
        """A phase of `key` completed: later takers see what was given to it."""

    def receive(self, block: int, warp: int, key: object) -> None:
        """A warp saw the completed phase of `key`."""

    def stamp(self) -> np.ndarray | int:
        """The clock of each active thread's warp, to be kept beside a global write."""
        return 0

    def ordered(self, writer_warp: np.ndarray, stamp: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Whether a write of the same block, stamped so, happens before active thread rows."""
        return np.ones(len(rows), bool)

    def finish(self) -> None:
        """The blocks ended."""


class Intervals(NoRaces):
    """Races between whole-block barriers, judged at the barrier."""

    def __init__(self, m: Machine):
        super().__init__(m)
        self._stride = m.shared.stride
        shape = m.blocks_here * m.warps * self._stride
        self._reads = np.zeros(shape, np.uint8)
        self._writes = np.zeros(shape, np.uint8)
        self._read_views, self._write_views = views(self._reads), views(self._writes)
        self._base = m.lane_warp * self._stride
        self._ids: dict[tuple[int, int], np.generic] = {}
        self._any_read = self._any_write = False
        self._high = 0
        self._clock = np.ones(m.blocks_here, np.int32)

    def _mark(self, table: dict[int, np.ndarray], raw: np.ndarray, size: int, at: int) -> None:
        step = min(max(size, _CELL), 16)
        value = self._ids.get((at, step))
        if value is None:
            code = np.full(step // 2, at % 65535 + 1, np.uint16)
            value = self._ids[at, step] = code.view(table[step].dtype)[0]
        m = self._m
        flat = raw + (self._base if m.full else self._base.take(m.idx))
        shift = step.bit_length() - 1
        for part in range(0, max(size, _CELL), step):
            table[step][(flat + part) >> shift if part else flat >> shift] = value
        self._high = max(self._high, int(raw.max()) + size)

    def read(self, inst: Instruction, at: int, raw: np.ndarray, size: int) -> None:
        """Leave the instruction's number in the reading warp's map."""
        self._mark(self._read_views, raw, size, at)
        self._any_read = True

    def write(self, inst: Instruction, at: int, raw: np.ndarray, size: int) -> None:
        """Leave the instruction's number in the writing warp's map."""
        self._mark(self._write_views, raw, size, at)
        self._any_write = True

    def barrier(self, blocks: np.ndarray) -> None:
        """Judge the interval that ends for these blocks, and begin a new one."""
        every = bool(blocks.all())
        high = (self._high + 15) // 16 * 16
        shape = (self._m.blocks_here, self._m.warps, self._stride)
        reads = self._reads.reshape(shape)[:, :, :high]
        writes = self._writes.reshape(shape)[:, :, :high]
        if self._any_write and self._m.warps > 1:
            self._judge(reads, writes, None if every else blocks)
        self._clock[blocks] += 1
        for table, used in ((reads, self._any_read), (writes, self._any_write)):
            if used and every:
                table[...] = 0
            elif used:
                table[blocks] = 0
        if every:
            self._any_read = self._any_write = False
            self._high = 0

    def _judge(self, reads: np.ndarray, writes: np.ndarray, only: np.ndarray | None) -> None:
        writes = writes.view(np.uint16)
        reads = reads.view(np.uint16)
        written = np.bitwise_or.reduce(writes, axis=1)
        touched = np.add.reduce(writes != 0, axis=1, dtype=np.uint8)
        if self._any_read:
            seen = (reads != 0) | (writes != 0)
            touched = np.add.reduce(seen, axis=1, dtype=np.uint8)
        bad = (written != 0) & (touched > 1)
        if only is not None:
            bad &= only[:, None]
        if bad.any():
            self._say(bad, reads, writes)

    def _say(self, bad: np.ndarray, reads: np.ndarray, writes: np.ndarray) -> None:
        """Report one cell for each pair of instructions involved."""
        m, said = self._m, set()
        blocks, cells = np.nonzero(bad)
        involved = np.bitwise_or.reduce(writes, axis=1)[bad].astype(np.int64) << 16
        involved |= np.bitwise_or.reduce(reads, axis=1)[bad]
        _, some = np.unique(involved, return_index=True)
        for block, cell in zip(blocks[some], cells[some], strict=True):
            w, r = writes[block, :, cell], reads[block, :, cell]
            writer = int(np.flatnonzero(w)[0])
            others = [(k, w[k], "write") for k in np.flatnonzero(w) if k != writer]
            others += [(k, r[k], "read") for k in np.flatnonzero(r) if k != writer]
            for warp, code, verb in others:
                pair = (int(w[writer]), int(code), verb)
                if pair in said or len(said) > 16:
                    continue
                said.add(pair)
                inst, other = m.code_numbered(pair[0]), m.code_numbered(pair[1])
                m.report(
                    "race",
                    f"shared byte {cell * _CELL} is written by warp {writer} and {verb} by warp "
                    f"{warp} at PTX line {other.line} ({other.source}: {other.text[:60]}) with no "
                    "barrier between",
                    inst,
                    int(block) * m.threads + writer * 32,
                )

    def stamp(self) -> np.ndarray | int:
        """The number of barriers each active thread's block has passed."""
        return self._clock[self._m.lane_block[self._m.idx]]

    def ordered(self, writer_warp: np.ndarray, stamp: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Ordered if a barrier lies between, or by the same warp."""
        m = self._m
        lanes = m.idx[rows]
        mine = m.lane_warp[lanes] % m.warps
        return (stamp < self._clock[m.lane_block[lanes]]) | (writer_warp == mine)

    def finish(self) -> None:
        """Judge the last interval of every block."""
        self.barrier(np.ones(self._m.blocks_here, bool))


class VectorClocks(NoRaces):
    """Races by happens-before between warps, judged at each access."""

    def __init__(self, m: Machine):
        super().__init__(m)
        cells = m.blocks_here * m.shared.stride // _CELL
        self._writer = np.zeros(cells, np.int16)
        self._write_clock = np.zeros(cells, np.int32)
        self._write_inst = np.zeros(cells, np.int32)
        self._read_clock = np.zeros((cells, m.warps), np.int32)
        self._known = np.tile(np.eye(m.warps, dtype=np.int32), (m.blocks_here, 1, 1))
        self._given: dict[object, np.ndarray] = {}
        self._published: dict[object, np.ndarray] = {}

    def _cells(self, raw: np.ndarray, part: int) -> np.ndarray:
        m = self._m
        return (raw + m.lane_block[m.idx] * m.shared.stride + part) // _CELL

    def _who(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        m = self._m
        warp = m.lane_warp[m.idx] % m.warps
        known = self._known[m.lane_block[m.idx], warp]
        return np.arange(len(warp)), warp, known

    def _say(self, bad: np.ndarray, what: str, inst: Instruction, raw: np.ndarray) -> None:
        if bad.any():
            k = int(np.flatnonzero(bad)[0])
            self._m.report(
                "race",
                f"{what} another warp with no barrier between, shared byte {int(raw[k])}",
                inst,
                int(self._m.idx[k]),
            )

    def read(self, inst: Instruction, at: int, raw: np.ndarray, size: int) -> None:
        """A read races with the last write unless it is known."""
        rows, warp, known = self._who()
        for part in range(0, max(size, _CELL), _CELL):
            cell = self._cells(raw, part)
            writer = self._writer[cell]
            late = (writer != warp) & (self._write_clock[cell] > known[rows, writer])
            self._say(late, "read after a write by", inst, raw)
            self._read_clock[cell, warp] = known[rows, warp]

    def write(self, inst: Instruction, at: int, raw: np.ndarray, size: int) -> None:
        """A write races with the last write and with any read unless they are known."""
        rows, warp, known = self._who()
        for part in range(0, max(size, _CELL), _CELL):
            cell = self._cells(raw, part)
            writer = self._writer[cell]
            late = (writer != warp) & (self._write_clock[cell] > known[rows, writer])
            self._say(late, "write after a write by", inst, raw)
            read = self._read_clock[cell] > known
            read[rows, warp] = False
            self._say(read.any(1), "write after a read by", inst, raw)
            self._writer[cell], self._write_clock[cell] = warp, known[rows, warp]

    def barrier(self, blocks: np.ndarray) -> None:
        """Every warp of these blocks learns what every other knows."""
        for block in np.flatnonzero(blocks):
            self.join(int(block), np.arange(self._m.warps))

    def join(self, block: int, warps: np.ndarray, key: object = None) -> None:
        """These warps learn from each other and from what was given to `key`."""
        common = self._known[block, warps].max(0)
        if key in self._given:
            common = np.maximum(common, self._given.pop(key))
        self._known[block, warps] = common
        self._known[block, warps, warps] += 1

    def give(self, block: int, warp: int, key: object) -> None:
        """`key` learns what the warp knows; the warp goes on in a new epoch."""
        mine = self._known[block, warp]
        self._given[key] = np.maximum(self._given.get(key, 0), mine)
        self._known[block, warp, warp] += 1

    def publish(self, key: object) -> None:
        """The completed phase holds what was given to `key` until now."""
        if key in self._given:
            self._published[key] = self._given.pop(key)

    def receive(self, block: int, warp: int, key: object) -> None:
        """The warp learns the completed phase."""
        if key in self._published:
            row = self._known[block, warp]
            self._known[block, warp] = np.maximum(row, self._published[key])

    def stamp(self) -> np.ndarray | int:
        """Each active thread's own clock."""
        rows, warp, known = self._who()
        return known[rows, warp]

    def ordered(self, writer_warp: np.ndarray, stamp: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Ordered if known, or by the same warp."""
        _, warp, known = self._who()
        return (known[rows, writer_warp] >= stamp) | (writer_warp == warp[rows])
