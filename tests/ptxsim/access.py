"""Checked access to every state space: one function to read and one to write per space.

In: the machine, an instruction, raw addresses (one int64 per active thread) and a size. Out: the
records, or the memory changed; and issues for whatever is out of bounds, misaligned, unwritten,
read-only or raced. Threads that are out of bounds read poison and write nothing; misalignment ends
the launch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from .errors import PtxFaultError
from .memory import POISON, Arena, Buffer, mark, store, take
from .program import LOCAL_WINDOW, PARAM_WINDOW, SHARED_WINDOW, Address

if TYPE_CHECKING:
    from .machine import Machine
    from .parse import Instruction

_RECORD = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def addresses(address: Address) -> Callable[[Machine], np.ndarray]:
    """A function giving the address of every active thread as int64."""
    slot, offset = address.slot, np.int64(address.offset)
    if slot is None:
        return lambda m: np.full(len(m.idx), offset)
    if address.cls == "u32":
        return lambda m: m.pick(m.v["u32"][slot]).astype(np.int64) + offset
    if offset == 0:
        return lambda m: m.pick(m.v["s64"][slot])
    return lambda m: m.pick(m.v["s64"][slot]) + offset


def aligned(m: Machine, inst: Instruction, raw: np.ndarray, size: int, space: str) -> None:
    """Raise PtxFaultError unless every address is a multiple of `size`."""
    step = min(size, 32)
    if int(np.bitwise_or.reduce(raw)) & (step - 1):
        k = int(np.flatnonzero(raw & (step - 1))[0])
        at = int(raw[k])
        place = m.memory.where(at) if space == "global" else f"{space} byte {at}"
        m.report("misaligned", f"{place}: {size} bytes at once", inst, int(m.idx[k]))
        raise PtxFaultError(f"misaligned {space} access of {size} bytes at {place}: {inst.text}")


def poisoned(count: int, size: int) -> np.ndarray:
    if size == 1:
        return np.full(count, POISON & 0xFF, np.uint8)
    out = np.full((count, size // 2), POISON, np.uint16)
    return out.view(np.complex128 if size >= 16 else f"u{size}").reshape(-1)


def _outside(
    m: Machine, inst: Instruction, raw: np.ndarray, size: int, limit: int, what: str
) -> np.ndarray | None:
    """Rows that are in bounds, or None if all are; the others are reported."""
    if len(raw) == 0 or (int(raw.max()) + size <= limit and int(raw.min()) >= 0):
        return None
    bad = (raw < 0) | (raw + size > limit)
    k = int(np.flatnonzero(bad)[0])
    message = f"{what} of {size} bytes at {int(raw[k])}, there are {limit}"
    m.report("out-of-bounds", message, inst, int(m.idx[k]))
    return np.flatnonzero(~bad)


def unwritten(
    m: Machine,
    inst: Instruction,
    owner: Arena | Buffer,
    at: np.ndarray,
    records: np.ndarray,
    size: int,
    what: str,
) -> None:
    """Report records nothing ever wrote; their content shows which to look at closely."""
    if not m.checks.uninitialised or not len(at):
        return
    if size > 1 and not (records.view(np.uint16) == POISON).any():
        return
    bad = owner.unwritten(at, size)
    if bad.any():
        k = int(np.flatnonzero(bad)[0])
        place = (
            owner.where(int(at[k]) + owner.origin)
            if isinstance(owner, Buffer)
            else f"byte {int(at[k]) % owner.stride}"
        )
        m.report("uninitialised", f"{what} {place} was never written", inst, int(m.idx[k]))


def _within(
    m: Machine,
    rows: np.ndarray | None,
    raw: np.ndarray,
    size: int,
    read: Callable[[np.ndarray], np.ndarray],
) -> np.ndarray:
    """Read the rows in bounds; the others get poison."""
    if rows is None:
        return read(raw)
    out = poisoned(len(raw), size)
    if len(rows):
        before = m.only(rows)
        part = read(raw[rows])
        out.reshape(len(raw), -1)[rows] = part.reshape(len(rows), -1)
        m.restore(before)
    return out


# -- shared and local -----------------------------------------------------------------------------


def read_shared(m: Machine, inst: Instruction, at: int, raw: np.ndarray, size: int) -> np.ndarray:
    """Records at shared addresses."""
    rows = _outside(m, inst, raw, size, m.shared.size, "shared read")
    if rows is not None:
        return _within(m, rows, raw, size, lambda r: read_shared(m, inst, at, r, size))
    aligned(m, inst, raw, size, "shared")
    flat = raw + m.pick(m.shared_base)
    records = take(m.shared.data, flat, size)
    m.races.read(inst, at, raw, size)
    if m.counters.wants_traffic:
        m.counters.shared(m, "shared read", raw, size)
    unwritten(m, inst, m.shared, flat, records, size, "shared")
    return records


def write_shared(
    m: Machine, inst: Instruction, at: int, raw: np.ndarray, size: int, records: np.ndarray
) -> None:
    """Store records at shared addresses."""
    rows = _outside(m, inst, raw, size, m.shared.size, "shared write")
    if rows is not None:
        before = m.only(rows)
        if len(rows):
            part = records.reshape(len(raw), -1)[rows].reshape(-1)
            write_shared(m, inst, at, raw[rows], size, part)
        m.restore(before)
        return
    aligned(m, inst, raw, size, "shared")
    flat = raw + m.pick(m.shared_base)
    store(m.shared.data, flat, size, records)
    mark(m.shared.marks, flat, size)
    m.races.write(inst, at, raw, size)
    if m.checks.races:
        _same_word(m, inst, flat, size, records)
    if m.counters.wants_traffic:
        m.counters.shared(m, "shared write", raw, size)


def _same_word(
    m: Machine, inst: Instruction, flat: np.ndarray, size: int, records: np.ndarray
) -> None:
    """What is found again differs from what was stored: two threads wrote there at once."""
    unit = min(size, 8)
    found = take(m.shared.data, flat, size).view(f"u{unit}").reshape(len(flat), -1)
    lost = (found != records.view(f"u{unit}").reshape(len(flat), -1)).any(1)
    if lost.any():
        k = int(np.flatnonzero(lost)[0])
        message = (
            f"shared byte {int(flat[k]) % m.shared.stride}: another thread stores a different "
            "value there in the same instruction"
        )
        m.report("race", message, inst, int(m.idx[k]))


def read_local(m: Machine, inst: Instruction, at: int, raw: np.ndarray, size: int) -> np.ndarray:
    """Records of each thread's local memory."""
    rows = _outside(m, inst, raw, size, m.local.size, "local read")
    if rows is not None:
        return _within(m, rows, raw, size, lambda r: read_local(m, inst, at, r, size))
    aligned(m, inst, raw, size, "local")
    flat = raw + m.pick(m.local_base)
    records = take(m.local.data, flat, size)
    m.counters.local("read", len(raw), size)
    unwritten(m, inst, m.local, flat, records, size, "local")
    return records


def write_local(
    m: Machine, inst: Instruction, at: int, raw: np.ndarray, size: int, records: np.ndarray
) -> None:
    """Store records to each thread's local memory."""
    rows = _outside(m, inst, raw, size, m.local.size, "local write")
    if rows is not None:
        before = m.only(rows)
        if len(rows):
            part = records.reshape(len(raw), -1)[rows].reshape(-1)
            write_local(m, inst, at, raw[rows], size, part)
        m.restore(before)
        return
    aligned(m, inst, raw, size, "local")
    flat = raw + m.pick(m.local_base)
    store(m.local.data, flat, size, records)
    mark(m.local.marks, flat, size)
    m.counters.local("write", len(raw), size)


# -- generic --------------------------------------------------------------------------------------


def space_of(raw: np.ndarray) -> str | None:
    """The space all generic addresses are in, or None if they differ."""
    low, high = int(raw.min()), int(raw.max())
    if high < SHARED_WINDOW:
        return "global"
    for window, name in (
        (PARAM_WINDOW, "param"),
        (LOCAL_WINDOW, "local"),
        (SHARED_WINDOW, "shared"),
    ):
        if low >= window:
            return name if high < 2 * window else None
    return None


_WINDOW = {"global": 0, "shared": SHARED_WINDOW, "local": LOCAL_WINDOW, "param": PARAM_WINDOW}


def in_space(raw: np.ndarray, space: str) -> np.ndarray:
    """Generic addresses as addresses of their space."""
    return raw - _WINDOW[space] if space != "global" else raw


def by_space(raw: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """Rows of generic addresses, grouped by space."""
    spaces = np.zeros(len(raw), np.int8)
    for k, window in enumerate((SHARED_WINDOW, LOCAL_WINDOW, PARAM_WINDOW), 1):
        spaces[raw >= window] = k
    names = ("global", "shared", "local", "param")
    return [(names[k], np.flatnonzero(spaces == k)) for k in np.unique(spaces)]
