"""How work is cut: lanes to a row, tokens to a tile, tokens to a box, keys to a turn.

In: sizes, as plain numbers. Out: the few choices of a plan that cost or save time; any of them
gives the same results. Nothing here touches a device.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from heapq import nsmallest
from itertools import product
from math import prod

THREADS = 256
RANKED = 4  # tiles that are worth measuring
WAVE = 256  # blocks that run at once, two on each of about 128 multiprocessors

ITEM_SIZE = {"F16": 2, "BF16": 2, "F32": 4, "F64": 8}

# ------------------------------------------------------------------------------------------------
# who shares a row, and how rows are read


@dataclass(frozen=True)
class Sharing:
    """Lanes per row, and how many 16-byte chunks of a key and of a value each lane holds."""

    lanes: int
    qk_chunks: int
    v_chunks: int

    @property
    def row_bytes(self) -> int:
        """Shared memory of one staged token: a row of head_dim and one of value_dim."""
        return 16 * self.lanes * (self.qk_chunks + self.v_chunks)


def sharing(dtype: str, head_dim: int, value_dim: int) -> Sharing:
    """Eight numbers per lane (four for float64) while 32 lanes suffice, then more."""
    per_chunk = 16 // ITEM_SIZE[dtype]
    qk, v = -(-head_dim // per_chunk), -(-value_dim // per_chunk)
    wanted = 1 if ITEM_SIZE[dtype] == 2 else 2
    lanes = 1
    while lanes < 32 and lanes * wanted < max(qk, v):
        lanes *= 2
    return Sharing(lanes, -(-qk // lanes), -(-v // lanes))


def forward_step(dtype: str, share: Sharing, last_kernel_size: int) -> int:
    """Keys per turn: enough for independent work, and few slots past the window's end."""
    if dtype == "F64" or share.qk_chunks + share.v_chunks > 4:
        return min(2, last_kernel_size)
    steps = (4, 5, 6, 7) if ITEM_SIZE[dtype] == 2 and share.qk_chunks == 1 else (3, 4)
    if last_kernel_size < steps[0]:
        return last_kernel_size
    return min(steps, key=lambda step: -(-last_kernel_size // step) * step)


def backward_step(dtype: str, share: Sharing) -> int:
    """Keys or queries per turn: two dot products each, so fewer than forward."""
    return 1 if dtype == "F64" or share.qk_chunks + share.v_chunks > 4 else 2


# ------------------------------------------------------------------------------------------------
# tiles and boxes


def _extents(length: int, most: int) -> tuple[int, ...]:
    """Candidate tile sizes of an axis: equal parts and powers of two, at most `most`."""
    parts = {-(-length // n) for n in range(1, min(length, 24) + 1)}
    powers = {1 << n for n in range(most.bit_length()) if 1 << n <= length}
    return tuple(sorted(extent for extent in parts | powers if extent <= most))


@lru_cache(maxsize=4096)
def rank_tiles(
    groups: tuple[int, ...],  # tokens of the longest dilation group per axis
    kernel_size: tuple[int, ...],
    stride: tuple[int, ...],
    slots: int,  # tokens a block can own
    copies: int,  # batch * heads * dilation groups: how many such groups there are
) -> tuple[tuple[int, ...], ...]:
    """Tokens per axis that a block owns: the few cheapest tiles, cheapest first, by a plain model.

    A staged token costs four units, a pair of a slot and a key one, and blocks run in waves.
    """
    window = prod(kernel_size)

    def cost(tile: tuple[int, ...]) -> tuple[float, int]:
        halo = prod(halo_of(groups, kernel_size, stride, tile))
        blocks = copies * prod(-(-n // t) for n, t in zip(groups, tile, strict=True))
        quantum = max(1, slots // 8)  # slots of a warp
        work = 4 * halo + -(-prod(tile) // quantum) * quantum * window
        return max(1.0, blocks / WAVE) * work, halo

    tiles = product(*(_extents(length, slots) for length in groups))
    return tuple(nsmallest(RANKED, (t for t in tiles if prod(t) <= slots), key=cost))


def halo_of(groups, kernel_size, stride, tile) -> tuple[int, ...]:
    """Tokens per axis that an inner tile sees."""
    axes = zip(groups, kernel_size, stride, tile, strict=True)
    return tuple(min(n, t + k - 1 + s - 1) for n, k, s, t in axes)


def choose_stage(halo: tuple[int, ...], capacity: int) -> tuple[int, ...]:
    """Box per axis, at most `capacity` tokens: the whole halo, or near-equal parts of it."""
    box = []
    for extent in reversed(halo):
        fits = max(1, min(extent, capacity // prod(box)))
        box.append(-(-extent // -(-extent // fits)))
    return tuple(reversed(box))
