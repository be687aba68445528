"""Global memory: the buffers a kernel may touch, at their real host addresses, in place.

In: numpy arrays or (address, size) pairs, each with a name and a mode ("in": never written,
"inout", "out": its content means nothing until the kernel writes it). Out: typed views to gather
from and scatter to, and an answer to "which buffer is this address in". What lies outside every
buffer is out of bounds.
"""

from __future__ import annotations

import ctypes
from bisect import bisect_right
from collections.abc import Iterator

import numpy as np

MODES = ("in", "inout", "out")
#: Both a quiet NaN as f16 and as bf16, and an unlikely integer: what unwritten memory holds.
POISON = 0x7FDE
_ALIGN = 256
_WIDE: dict[int, type[np.generic]] = {
    1: np.uint8,
    2: np.uint16,
    4: np.uint32,
    8: np.uint64,
    16: np.complex128,  # 16 bytes moved as they are; never computed with
}
ONES = {size: np.frombuffer(b"\1" * size, dtype)[0] for size, dtype in _WIDE.items()}


def views(memory: np.ndarray) -> dict[int, np.ndarray]:
    """One array of bytes seen as records of 1, 2, 4, 8 and 16 bytes."""
    return {size: memory.view(dtype) for size, dtype in _WIDE.items()}


def take(table: dict[int, np.ndarray], at: np.ndarray, size: int) -> np.ndarray:
    """Records of `size` bytes at byte offsets `at` (multiples of size), one after another."""
    if size <= 16:
        return table[size].take(at >> (size.bit_length() - 1))
    rows = at[:, None] // 16 + np.arange(size // 16)
    return table[16].take(rows).reshape(-1)


def store(table: dict[int, np.ndarray], at: np.ndarray, size: int, records: np.ndarray) -> None:
    """Write records (an array of size bytes per element of `at`) at byte offsets `at`."""
    if size <= 16:
        table[size][at >> (size.bit_length() - 1)] = records.view(_WIDE[size]).reshape(-1)
    else:
        rows = at[:, None] // 16 + np.arange(size // 16)
        table[16][rows] = records.view(np.complex128).reshape(rows.shape)


def mark(table: dict[int, np.ndarray], at: np.ndarray, size: int) -> None:
    """Set every byte of the records at byte offsets `at` to one."""
    step = min(size, 16)
    for part in range(0, size, step):
        table[step][(at + part) >> (step.bit_length() - 1)] = ONES[step]


def poison(memory: np.ndarray) -> None:
    """Fill bytes with the pattern that stands for "never written"."""
    memory[: len(memory) // 2 * 2].view(np.uint16)[...] = POISON


class Buffer:
    """One range of memory; `origin` is its start rounded down to 16, where the views begin."""

    def __init__(self, address: int, nbytes: int, name: str, mode: str):
        if mode not in MODES:
            raise ValueError(f"mode must be one of {MODES}, got {mode!r}")
        self.start, self.end, self.name, self.mode = address, address + nbytes, name, mode
        self.origin = address & ~15
        span = (self.end - self.origin + 15) & ~15
        raw = (ctypes.c_uint8 * span).from_address(self.origin) if span else b""
        self.bytes = np.frombuffer(raw, np.uint8)
        self.views = views(self.bytes)
        self.marks: dict[int, np.ndarray] | None = None
        self.keep: object = None
        self.reset()

    @property
    def writable(self) -> bool:
        """Whether a kernel may write here."""
        return self.mode != "in"

    def reset(self) -> None:
        """Forget who wrote what: a new launch begins."""
        self.owner: np.ndarray | None = None
        self.stamp: np.ndarray | None = None
        self.cached: np.ndarray | None = None
        self.readers: dict[int, np.ndarray] | None = None

    def expect_writes(self) -> None:
        """Make the content meaningless until it is written."""
        written = np.zeros(len(self.bytes), np.uint8)
        poison(self.bytes[self.start - self.origin : self.end - self.origin])
        self.marks = views(written)

    def unwritten(self, at: np.ndarray, size: int) -> np.ndarray:
        """Which of the records at byte offsets `at` hold a byte nothing ever wrote."""
        if self.marks is None:
            return np.zeros(len(at), bool)
        flags = take(self.marks, at, size).view(np.uint8).reshape(len(at), size)
        return ~flags.all(1)

    def where(self, address: int) -> str:
        """An address in words: "out+16 of 4096"."""
        return f"{self.name}{address - self.start:+d} of {self.end - self.start}"


class Memory:
    """All buffers of a device, ordered by address."""

    def __init__(self) -> None:
        self._buffers: list[Buffer] = []
        self._starts: list[int] = []

    def register(
        self, address: int, nbytes: int, name: str, mode: str, keep: object = None
    ) -> Buffer:
        """Let kernels use `nbytes` at `address`; the same range again only changes its mode.

        `keep` is held, so that the memory outlives the buffer. Raises ValueError where the range
        overlaps another one.
        """
        at = bisect_right(self._starts, address)
        near = self._buffers[max(at - 1, 0) : at + 1]
        for other in near:
            if (other.start, other.end) == (address, address + nbytes):
                other.mode, other.keep = mode, keep
                return other
            if nbytes and other.start < address + nbytes and address < other.end:
                raise ValueError(
                    f"buffer {name!r} at {address:#x}, {nbytes} bytes, overlaps {other.name!r} at "
                    f"{other.start:#x}, {other.end - other.start} bytes; register one of them."
                )
        buffer = Buffer(address, nbytes, name, mode)
        buffer.keep = keep
        if mode == "out":
            buffer.expect_writes()
        self._buffers.insert(at, buffer)
        self._starts.insert(at, address)
        return buffer

    def alloc(self, array: np.ndarray, name: str, mode: str = "inout") -> int:
        """Copy an array into memory of its own (256-byte aligned); returns its address."""
        flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        own = np.zeros(len(flat) + 2 * _ALIGN, np.uint8)
        shift = -int(own.ctypes.data) % _ALIGN
        own[shift : shift + len(flat)] = flat
        address = int(own.ctypes.data) + shift
        self.register(address, len(flat), name, mode, keep=own)
        return address

    def read(self, address: int, like: np.ndarray) -> np.ndarray:
        """A copy of the memory at `address`, with the dtype and shape of `like`."""
        raw = ctypes.string_at(address, like.nbytes)
        return np.frombuffer(raw, like.dtype).reshape(like.shape).copy()

    def find(self, low: int, high: int) -> Buffer | None:
        """The buffer that holds all of [low, high)."""
        at = bisect_right(self._starts, low) - 1
        if at >= 0 and high <= self._buffers[at].end:
            return self._buffers[at]
        return None

    def partition(
        self, address: np.ndarray, size: int
    ) -> Iterator[tuple[Buffer | None, np.ndarray]]:
        """Split accesses by buffer: pairs (buffer or None, positions in `address`)."""
        starts = np.array(self._starts, np.int64)
        which = np.searchsorted(starts, address, "right") - 1
        ends = np.array([b.end for b in self._buffers] or [0], np.int64)
        which = np.where((which >= 0) & (address + size <= ends[which]), which, -1)
        for k in np.unique(which):
            yield (self._buffers[k] if k >= 0 else None), np.flatnonzero(which == k)

    def where(self, address: int) -> str:
        """An address in words, by the nearest buffer."""
        if not self._buffers:
            return f"{address:#x} (no buffer is registered)"
        near = min(self._buffers, key=lambda b: max(b.start - address, address - b.end + 1, 0))
        return near.where(address)

    def __iter__(self) -> Iterator[Buffer]:
        return iter(self._buffers)

    def forget(self, buffer: Buffer) -> None:
        """Remove a buffer."""
        at = self._buffers.index(buffer)
        del self._buffers[at], self._starts[at]


class Arena:
    """Shared memory of many blocks, or local memory of many threads: `owners` equal pieces."""

    def __init__(self, owners: int, size: int):
        self.size = size
        self.stride = (size + 15) // 16 * 16
        data = np.empty(owners * self.stride, np.uint8)
        poison(data)
        self.data = views(data)
        self.marks = views(np.zeros(len(data), np.uint8))

    def unwritten(self, at: np.ndarray, size: int) -> np.ndarray:
        """Which of the records at byte offsets `at` hold a byte nothing ever wrote."""
        flags = take(self.marks, at, size).view(np.uint8).reshape(len(at), size)
        return ~flags.all(1)

    def lose(self, at: np.ndarray, size: int) -> None:
        """Make records unwritten again: an asynchronous copy is on its way to them."""
        lanes = at[:, None] + np.arange(0, size, 2)
        self.data[2][lanes >> 1] = POISON
        self.marks[2][lanes >> 1] = 0
