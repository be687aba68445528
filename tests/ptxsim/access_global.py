"""Checked access to global memory.

In: the machine, an instruction, addresses (one int64 per active thread) and a size. Out: the
records, or the buffers changed; and issues: out of bounds, misaligned, unwritten, read-only, words
that two threads or blocks touch with nothing to order them, words read through the read-only path
and written in the same launch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .access import aligned, poisoned, unwritten
from .memory import Buffer, mark, store, take, views

if TYPE_CHECKING:
    from .machine import Machine
    from .parse import Instruction


def _one_buffer(m: Machine, at: int, raw: np.ndarray, size: int) -> Buffer | None:
    """The buffer all addresses are in, if it is one; the last one used here is tried first."""
    low, high = int(raw.min()), int(raw.max()) + size
    hint = m.hints[at]
    if hint is not None and hint.start <= low and high <= hint.end:
        return hint
    found = m.memory.find(low, high)
    if found is not None:
        m.hints[at] = found
    return found


def _no_buffer(m: Machine, inst: Instruction, raw: np.ndarray, size: int, verb: str) -> None:
    message = f"global {verb} of {size} bytes at {m.memory.where(int(raw[0]))}"
    m.report("out-of-bounds", message, inst, int(m.idx[0]))


def read_global(m: Machine, inst: Instruction, at: int, raw: np.ndarray, size: int) -> np.ndarray:
    """Records at global addresses."""
    buffer = _one_buffer(m, at, raw, size)
    if buffer is None:
        return _read_many(m, inst, at, raw, size)
    aligned(m, inst, raw, size, "global")
    offsets = raw - buffer.origin
    records = take(buffer.views, offsets, size)
    if buffer.marks is not None:
        unwritten(m, inst, buffer, offsets, records, size, "global")
    if m.checks.races and buffer.writable:
        _race_on_read(m, inst, buffer, offsets, size)
    if m.counters.wants_traffic:
        m.counters.global_(m, "read", raw, size)
    return records


def _read_many(m: Machine, inst: Instruction, at: int, raw: np.ndarray, size: int) -> np.ndarray:
    out = poisoned(len(raw), size)
    for buffer, rows in m.memory.partition(raw, size):
        before = m.only(rows)
        if buffer is None:
            _no_buffer(m, inst, raw[rows], size, "read")
        else:
            part = read_global(m, inst, at, raw[rows], size)
            out.reshape(len(raw), -1)[rows] = part.reshape(len(rows), -1)
        m.restore(before)
    return out


def write_global(
    m: Machine, inst: Instruction, at: int, raw: np.ndarray, size: int, records: np.ndarray
) -> None:
    """Store records at global addresses."""
    buffer = _one_buffer(m, at, raw, size)
    if buffer is None:
        for part, rows in m.memory.partition(raw, size):
            before = m.only(rows)
            if part is None:
                _no_buffer(m, inst, raw[rows], size, "write")
            else:
                data = records.reshape(len(raw), -1)[rows].reshape(-1)
                write_global(m, inst, at, raw[rows], size, data)
            m.restore(before)
        return
    aligned(m, inst, raw, size, "global")
    if not may_write(m, inst, buffer, raw):
        return
    offsets = raw - buffer.origin
    store(buffer.views, offsets, size, records)
    if buffer.marks is not None:
        mark(buffer.marks, offsets, size)
    if m.checks.races:
        _race_on_write(m, inst, buffer, offsets, size)
    if m.counters.wants_traffic:
        m.counters.global_(m, "write", raw, size)


def may_write(m: Machine, inst: Instruction, buffer: Buffer, raw: np.ndarray) -> bool:
    """False, with a report, if the buffer is an input."""
    if not buffer.writable:
        where = buffer.where(int(raw[0]))
        m.report("read-only", f"write to the input {where}", inst, int(m.idx[0]))
    return buffer.writable


def _threads(m: Machine) -> np.ndarray:
    """A number for every active thread, unique in the launch, from 1."""
    lane = m.idx
    block = m.block_numbers[m.lane_block[lane]]
    return block * np.int64(m.threads) + lane % m.threads + 1


def _tags(m: Machine, size: int) -> np.ndarray:
    """Per thread, a number of its block repeated to a record of `size` bytes."""
    if size not in m.block_tags:
        number = (m.block_numbers[m.lane_block] % 65535 + 1).astype(np.uint16)
        record = np.repeat(number, size // 2).view(np.complex128 if size >= 16 else f"u{size}")
        m.block_tags[size] = record
    return m.block_tags[size]


def _cells(offsets: np.ndarray, size: int) -> np.ndarray:
    return offsets[:, None] // 2 + np.arange(max(size // 2, 1))


def _race_on_write(
    m: Machine, inst: Instruction, buffer: Buffer, offsets: np.ndarray, size: int
) -> None:
    """Report a word some other thread wrote, or read through the read-only path."""
    if size < 2:
        return  # bytes of one cell may belong to different threads
    if buffer.owner is None:
        cells = len(buffer.bytes) // 2
        buffer.owner, buffer.stamp = np.zeros(cells, np.int64), np.zeros(cells, np.int32)
    cell, me = _cells(offsets, size), _threads(m)
    if buffer.readers is not None:
        read = take(buffer.readers, offsets, size).view(np.uint16).reshape(len(offsets), -1)
        mine = m.pick(_tags(m, 2))[:, None]
        text = "is written here and was read by another block with nothing to order them"
        _say(m, inst, buffer, offsets, ((read != 0) & (read != mine)).any(1), "race", text)
    if buffer.cached is not None and buffer.cached[cell].any():
        _say(
            m,
            inst,
            buffer,
            offsets,
            buffer.cached[cell].any(1),
            "non-coherent",
            "is written here and read through the read-only path (ld.global.nc) elsewhere",
        )
    owner = buffer.owner[cell]
    buffer.owner[cell] = me[:, None]
    if owner.any():
        foreign = (owner != 0) & (owner != me[:, None])
        _foreign(m, inst, buffer, offsets, foreign, owner, buffer.stamp[cell], "written")
    twice = (buffer.owner[cell] != me[:, None]).any(1)
    _say(m, inst, buffer, offsets, twice, "race", "is written by two threads at once")
    stamp = m.races.stamp()
    buffer.stamp[cell] = stamp[:, None] if isinstance(stamp, np.ndarray) else stamp


def _race_on_read(
    m: Machine, inst: Instruction, buffer: Buffer, offsets: np.ndarray, size: int
) -> None:
    """Report a word another thread wrote with nothing between; remember read-only loads."""
    if size < 2:
        return
    if not m.grid_sync:  # leave the last reading block's mark
        if buffer.readers is None:
            buffer.readers = views(np.zeros(len(buffer.bytes), np.uint8))
        step = min(size, 16)
        for part in range(0, size, step):
            store(buffer.readers, offsets + part, step, m.pick(_tags(m, step)))
    if "nc" not in inst.parts and buffer.owner is None:
        return
    cell = _cells(offsets, size)
    if "nc" in inst.parts:
        if buffer.cached is None:
            buffer.cached = np.zeros(len(buffer.bytes) // 2, bool)
        buffer.cached[cell] = True
    if buffer.owner is not None:
        owner = buffer.owner[cell]
        if owner.any():
            foreign = (owner != 0) & (owner != _threads(m)[:, None])
            if "nc" in inst.parts:
                _say(
                    m,
                    inst,
                    buffer,
                    offsets,
                    (owner != 0).any(1),
                    "non-coherent",
                    "was written in this launch and is read through the read-only path",
                )
            _foreign(m, inst, buffer, offsets, foreign, owner, buffer.stamp[cell], "read")


def _foreign(
    m: Machine,
    inst: Instruction,
    buffer: Buffer,
    offsets: np.ndarray,
    foreign: np.ndarray,
    owner: np.ndarray,
    stamp: np.ndarray,
    verb: str,
) -> None:
    """Accesses to words of other threads: fine within a block after a barrier, else a race."""
    rows, cols = np.nonzero(foreign)
    if not len(rows):
        return
    writer = owner[rows, cols] - 1
    mine = m.block_numbers[m.lane_block[m.idx[rows]]]
    same = writer // m.threads == mine
    across = ~same
    if m.grid_sync and verb == "read":
        across[:] = False  # the kernel orders its blocks itself; that is beyond this check
    ordered = same & m.races.ordered(writer % m.threads // 32, stamp[rows, cols], rows)
    bad = np.zeros(len(offsets), bool)
    bad[rows[across | (same & ~ordered)]] = True
    _say(
        m,
        inst,
        buffer,
        offsets,
        bad,
        "race",
        f"is {verb} here and was written by another thread with nothing to order them",
    )


def _say(
    m: Machine,
    inst: Instruction,
    buffer: Buffer,
    offsets: np.ndarray,
    bad: np.ndarray,
    kind: str,
    text: str,
) -> None:
    if bad.any():
        k = int(np.flatnonzero(bad)[0])
        where = buffer.where(int(offsets[k]) + buffer.origin)
        m.report(kind, f"global {where} {text}", inst, int(m.idx[k]))
