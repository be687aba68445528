"""Tiles of the kernels for small 2-D windows: how blocks of threads may cover a map.

In: a `Problem` that the kernels take, but for its tiles, and a side of it. Out: its legal `Tile`s,
the few that are worth measuring, the one that runs: what each stages, in how much shared memory, by
how many warps. Which one is the fastest is for `heuristics` to say.

A dense problem is one whose every dilation group is exactly one window: there a group is a tile.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod

from natcupy.cuda import heuristics
from natcupy.cuda.heuristics import BOTH, FORWARD, KEYS, QUERIES
from natcupy.cuda.recipes import Problem
from natcupy.cuda.tiling import ITEM_SIZE
from natcupy.neighborhood import inverse_window, window

WARPS = 8  # of a block
# Warps whose registers a multiprocessor holds where kernels make do with 80 or 128 a thread.
CROWD = {FORWARD: 24, QUERIES: 16, KEYS: 16, BOTH: 16}
# Rows of a tile that are worth a try, and warps that may share them.
ROWS = (2, 4, 6, 8, 10, 14, 16, 20, 28)
SPLITS = (1, 2, 4)
RANKED = 8  # tiles that are worth measuring
LARGEST_GRID = 2**31 - 1

Shape = tuple[int, int, int, int]  # blocks of 8 columns, rows, splits, heads


def is_dense(p: Problem) -> bool:
    """Whether every dilation group is exactly one window."""
    hood = p.hood
    return all(n == k * d for n, k, d in zip(p.shape, hood.kernel_size, hood.dilation, strict=True))


def _columns(p: Problem) -> int:
    """Columns of a step: whole blocks of 8 that hold the windows of 8 neighbours."""
    return -(-(p.hood.kernel_size[1] + (0 if is_dense(p) else 7)) // 8) * 8


@dataclass(frozen=True)
class Tile:
    """How blocks of threads cover a problem; `SmallGeometry` has all but the last three."""

    rows: int
    blocks: int  # of 8 columns
    splits: int  # warps that share the rows of a block of columns
    heads_here: int  # heads of a block of threads
    staged: int  # rows at most
    pitch: int  # staged columns
    tiles: tuple[int, int]  # per axis of the longest dilation group
    items: int  # tiles of all dilation groups of all images
    shared: int  # bytes
    moved: float  # staged tokens per token of the map

    @property
    def shape(self) -> Shape:
        """What tells it from the other tiles of a problem."""
        return (self.blocks, self.rows, self.splits, self.heads_here)

    @property
    def warps(self) -> int:
        """Warps of a block."""
        return self.blocks * self.splits * self.heads_here


def _box(begin: int, length: int, k: int, tile: int, inverse: bool) -> int:
    """Tokens of an axis that a tile sees, or that see a tile."""
    sees, last = inverse_window if inverse else window, min(begin + tile, length) - 1
    return sees(last, length, k)[1] - sees(begin, length, k)[0]


def _near_ends(length: int, k: int, tile: int) -> list[int]:
    """Where tiles near an end of an axis begin; all others see `tile + k - 1` tokens."""
    near, tiles = 3 * k + tile, -(-length // tile)
    few = min(tiles, -(-near // tile) + 1)
    return [n * tile for n in (*range(few), *range(max(few, tiles - few), tiles))]


@lru_cache(maxsize=4096)
def _span(length: int, k: int, tile: int, inverse: bool) -> int:
    """The most tokens per axis that a tile sees, or that see a tile."""
    # Groups are this long or one shorter.
    return max(
        _box(begin, n, k, tile, inverse)
        for n in {length, max(k, length - 1)}
        for begin in _near_ends(n, k, tile)
    )


@lru_cache(maxsize=4096)
def _moved(length: int, k: int, tile: int, inverse: bool) -> int:
    """Tokens of an axis that all tiles stage together."""
    ends = _near_ends(length, k, tile)
    rest = -(-length // tile) - len(ends)
    return sum(_box(b, length, k, tile, inverse) for b in ends) + rest * (tile + k - 1)


def _warps(p: Problem, side: str) -> tuple[int, int]:
    """Warps of a block, and of a multiprocessor's registers, as the kernels' launch bounds say."""
    if crowds(p, side):
        return WARPS, CROWD[side]
    if side == FORWARD and p.dtype == "F32":
        return 6, 12 if p.head_dim == 32 else 8
    if side == FORWARD and p.head_dim == 32:
        return WARPS, 16
    short = p.head_dim == 32 and p.dtype != "F32" and p.hood.kernel_size[1] <= 9
    return WARPS, 12 if side == KEYS and short else 8


def crowds(p: Problem, side: str) -> bool:
    """Whether kernels are to make do with fewer registers, so that more warps can run.

    Where shared memory can hold so many, and a warp's sums are so few: what registers do not hold
    any more is read once a tile. A warp waits most of its time (5.7 clocks an instruction on an
    H100). It depends on nothing that is not compiled in: a batch or map of another size needs no
    other kernel.
    """
    few = p.head_dim == 32 and p.dtype != "F32" and p.hood.kernel_size[1] <= 8
    return few and p.arch >= 80 and (side == FORWARD or not is_dense(p))


@lru_cache(maxsize=4096)
def tiles(p: Problem, side: str) -> tuple[Tile, ...]:
    """Every tile that fits a multiprocessor of this architecture and a grid."""
    groups, dense = p.groups, is_dense(p)
    shapes = (_dense_shapes if dense else _shapes)(p, groups, side)
    made = (_measure(p, groups, dense, side, shape) for shape in shapes)
    limit, heads = heuristics.block_limit(p.arch), p.heads
    return tuple(t for t in made if t.shared <= limit and t.items * heads <= LARGEST_GRID)


def _dense_shapes(p: Problem, groups, side: str) -> list[Shape]:
    """A group is one tile; as it is small, several heads of it may share a block.

    Of tiles that cost the same the first is taken: forward, blocks of two warps for one group (see
    `heuristics.AROUND`).
    """
    heads, (warps, _) = p.kv_heads if side == KEYS else p.heads, _warps(p, side)
    pairs, blocks = -(-groups[0] // 2), -(-groups[1] // 8)
    most = max(1, min(pairs, warps // blocks))
    found = []
    every = list(range(most, 0, -1))
    if side == FORWARD:
        every.sort(key=lambda splits: (abs(splits - 2), -splits))
    for splits in (most,) if side == KEYS and p.heads > p.kv_heads else every:
        here = min(heads, max(1, warps // splits // blocks))
        few = range(1, here + 1) if side == FORWARD else range(here, 0, -1)
        found += [(blocks, 2 * pairs, splits, n) for n in few]
    return [shape for shape in found if heads % shape[3] == 0]


def _shapes(p: Problem, groups, side: str) -> list[Shape]:
    """One head per block; a warp keeps its sums of keys over the heads of a group."""
    warps, _ = _warps(p, side)
    whole = side == KEYS and p.heads > p.kv_heads
    widest, tallest = -(-groups[1] // 8), -(-groups[0] // 2) * 2
    found = []
    for blocks in range(min(warps, widest), 0, -1):
        for rows in sorted({min(r, tallest) for r in ROWS}):
            for splits in (rows // 2,) if whole else SPLITS:
                if splits <= rows // 2 and blocks * splits <= warps:
                    found.append((blocks, rows, splits, 1))
    return found


@lru_cache(maxsize=4096)
def tile(p: Problem, side: str, shape: Shape | None = None) -> Tile:
    """The tile of `shape`, which must be legal; by default the one that `heuristics` chooses."""
    if shape is None:
        return ranked(p, side)[0]
    found = [t for t in tiles(p, side) if t.shape == shape]
    if not found:
        raise ValueError(f"{shape} is no tile of this call; see natcupy.cuda.small_tiles.tiles.")
    return found[0]


@lru_cache(maxsize=4096)
def ranked(p: Problem, side: str) -> tuple[Tile, ...]:
    """The few cheapest tiles: first the one that the table says, then by cost."""
    legal = {_cover(p, side, t): t for t in tiles(p, side)}
    short = ITEM_SIZE[p.dtype] * p.head_dim == 64
    table = short and p.hood.kernel_size == (7, 7) and not is_dense(p)
    row = heuristics.row_for(p.arch, side, p.groups[1]) if table else None
    covers = heuristics.rank(p.arch, side, tuple(legal), row)
    return tuple(legal[cover] for cover in covers[:RANKED])


def _cover(p: Problem, side: str, t: Tile) -> heuristics.Cover:
    """What the choice needs to know about a tile."""
    places = t.tiles[0] * t.tiles[1] * t.rows * 8 * t.blocks
    return heuristics.Cover(
        shape=t.shape,
        halo=t.moved,
        fill=prod(p.groups) / places,
        shared=t.shared,
        grid=t.items * p.heads // t.heads_here,
        most_warps=_warps(p, side)[1],
        around=0.0 if side == FORWARD and is_dense(p) else heuristics.AROUND[side],
    )


def _lane_sums(p: Problem) -> int:
    """Bytes of a warp's sums of the bias gradient in shared memory: of all rows, or of one."""
    height, width = p.hood.kernel_size
    folded = -(-width // 8)  # columns 8 or 16 apart, which no window holds both of, share a number
    one_row = is_dense(p) and height == 1  # one step, which is no straight code
    many = height > 9 or (height > 8 and width > 8)
    if p.dtype == "F32" or many or p.head_dim == 64 or one_row:
        return (height + 1) * folded * 288
    return 256 if folded == 1 else 768


def _number_pitch(pitch: int) -> int:
    """Numbers from a staged row to the next: `number_pitch` in small_keys.cuh."""
    even = pitch + pitch % 2
    return even + max(0, 8 - even % 32) + (40 - even % 32 if even % 32 > 24 else 0)


def _measure(p: Problem, groups, dense: bool, side: str, shape: Shape) -> Tile:
    blocks, rows, splits, here = shape
    kernel = p.hood.kernel_size
    staged = _span(groups[0], kernel[0], rows, side == KEYS)
    columns = _span(groups[1], kernel[1], 8 * blocks, side == KEYS)
    pitch = max(_columns(p), columns)
    row = ITEM_SIZE[p.dtype] * p.head_dim
    line = (2 * kernel[1] + 3) // 4 * 4 * 4
    table = 2 * kernel[0] * line
    shared = here * (2 * staged * pitch * row + table)
    if side == FORWARD:  # a fragment of queries of each warp
        shared += blocks * splits * here * 16 * row
    if side == QUERIES and p.rpb:
        shared += blocks * splits * here * (table + _lane_sums(p))
    if side == KEYS:
        shared += here * 2 * staged * _number_pitch(pitch) * 4 + line + row
    counts = (-(-groups[0] // rows), -(-groups[1] // (8 * blocks)))
    items = p.batch * prod(p.hood.dilation) * prod(counts)
    moved = _moved(groups[0], kernel[0], rows, side == KEYS) * pitch * counts[1] / prod(groups)
    return Tile(rows, blocks, splits, here, staged, pitch, counts, items, shared, moved)


# ------------------------------------------------------------------------------------------------
# both sides backward, in one launch


@lru_cache(maxsize=4096)
def joint_tile(p: Problem, shape: Shape) -> tuple[Tile, Tile] | None:
    """The tiles of this shape on both sides, where both have one.

    Of one shape, so that blocks beside each other read the same rows: keys in the tile that is
    fastest for them alone made the launch 10 % slower on an H100 (56x56, batch 64).
    """
    cut = next((t for t in tiles(p, QUERIES) if t.shape == shape), None)
    mate = next((t for t in tiles(p, KEYS) if t.shape == shape), None)
    # With one item more than blocks of the query side, nearly half of all blocks find no work.
    if cut is None or mate is None or 4 * p.heads * (cut.items + mate.items) > LARGEST_GRID:
        return None
    return cut, mate


@lru_cache(maxsize=4096)
def joint_tiles(p: Problem) -> tuple[tuple[Tile, Tile], ...]:
    """Tiles of both sides, of one shape, that are worth measuring; the first one runs."""
    made = (joint_tile(p, t.shape) for t in tiles(p, QUERIES))
    legal = {_joint_cover(p, *pair): pair for pair in made if pair is not None}
    return tuple(legal[cover] for cover in heuristics.rank(p.arch, BOTH, tuple(legal))[:RANKED])


def _joint_cover(p: Problem, cut: Tile, mate: Tile) -> heuristics.Cover:
    """Of the launch: queries see two tensors, and keys are seen from three, out among them."""
    one, shared = _cover(p, QUERIES, cut), max(cut.shared, mate.shared)
    most = _warps(p, BOTH)[1]
    halo = cut.moved + 1.5 * mate.moved
    return replace(one, halo=halo, shared=shared, grid=2 * one.grid, most_warps=most)
