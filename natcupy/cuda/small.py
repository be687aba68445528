"""Plans of the kernels for small 2-D windows: which calls they run, how blocks cover a map.

In: a `Problem`. Out: why the kernels cannot run it, or their recipes. Tile sizes, like image sizes
and strides, are arguments of the kernels; compiled in are dtype, head_dim, the window, whether
there is a bias, and whether every dilation group is exactly one window ("dense": a 7 x 7 map under
a 7 x 7 window, or a dilation that stretches the window over the map). For float32 also the terms of
a product: three, as exact as float32 arithmetic, or one where torch's own setting allows TF32.

The shapes below were chosen from counts of memory traffic and of blocks that fit, not measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import prod

from natcupy.cuda.recipes import Plan, Problem, Recipe, access, array, recipe, views
from natcupy.cuda.tiling import ITEM_SIZE
from natcupy.neighborhood import inverse_window, window

DIMS = (32, 64)  # head_dim
LARGEST_WINDOW = 13  # per axis: the windows of 8 neighbours span at most 24 columns
SMALLEST_WINDOW = 9  # keys; below, most of a step of 16 columns is masked
LARGEST_HALO = 6.0  # staged tokens per token: beyond, tiles are too small for shared memory's sake
WARPS = 8  # of a block
LARGEST_GRID = 2**31 - 1
LARGEST_TABLE = 2**31 - 1  # entries of all heads' bias tables, indexed in 32 bits

# Shared memory of a multiprocessor in KiB; a block may have all but one of them, on sm_75 all.
SHARED = {75: 64, 80: 164, 86: 100, 87: 164, 89: 100, 90: 228, 100: 228, 103: 228, 110: 228}
SHARED_ELSEWHERE = 100
ROOMY = 228

# (widest group, blocks of 8 columns, rows, warps that share a block's rows): the largest tiles. The
# halo makes the traffic between L2 and the multiprocessors, in units of the map: the wider the tile
# the less. Where two tiles would not fit a multiprocessor, smaller ones are taken.
TILES_ROOMY = (
    (8, 1, 14, 4),  # one column block
    (16, 2, 14, 2),  # whole 14 x 14 maps, 1.0 units
    (32, 4, 14, 2),  # full width: 1.4 units on 28 x 28
    (2**30, 7, 14, 1),  # full width to 56: 1.64 units with halves of head_dim 32, in 8 rows
)
TILES = (
    (8, 1, 14, 4),
    (16, 2, 14, 2),
    (2**30, 2, 14, 2),  # 2.3 units with halves of head_dim 32, in 10 rows
)
# What a block's traffic counts if it has a multiprocessor to itself: nobody computes meanwhile.
ALONE = 1.5


def why_not(p: Problem) -> str:
    """Why the kernels cannot run `p`, or "" if they can."""
    kernel = p.hood.kernel_size
    reasons = {
        "two axes": p.rank == 2,
        "float16, or bfloat16 or float32 from sm_80 on": p.dtype == "F16"
        or (p.dtype in ("BF16", "F32") and p.arch >= 80),
        "head_dim and value_dim both 32 or both 64": p.head_dim in DIMS
        and p.head_dim == p.value_dim,
        f"windows of at most {LARGEST_WINDOW} per axis": max(kernel) <= LARGEST_WINDOW,
        "stride 1": set(p.hood.stride) == {1},
        "no causal axis": not any(p.hood.is_causal),
        "no additional keys": p.extras == 0,
        "rows at multiples of 16 bytes": access(p) == 16,
        "bias tables of 2**31 - 1 entries": p.heads * p.biases <= LARGEST_TABLE,
    }
    missing = [rule for rule, held in reasons.items() if not held]
    if not missing:
        tiles = [_tile(p, extra) for extra in _EXTRAS]
        if None in tiles:
            missing.append("a tile that fits shared memory")
        elif max(tile.items * p.heads for tile in tiles) > LARGEST_GRID:
            missing.append("at most 2**31 - 1 blocks")
    return f"they need {' and '.join(missing)}" if missing else ""


def pays(p: Problem) -> bool:
    """Whether the kernels are expected to beat the portable ones on `p`, which they can run."""
    if prod(p.hood.kernel_size) < SMALLEST_WINDOW:
        return False
    return max(_tile(p, side).moved for side in _EXTRAS) <= LARGEST_HALO


# ------------------------------------------------------------------------------------------------
# tiles


def _groups(p: Problem) -> tuple[int, int]:
    """Tokens of the longest dilation group per axis."""
    return tuple(-(-n // d) for n, d in zip(p.shape, p.hood.dilation, strict=True))


def _dense(p: Problem) -> bool:
    """Whether every dilation group is exactly one window."""
    hood = p.hood
    return all(n == k * d for n, k, d in zip(p.shape, hood.kernel_size, hood.dilation, strict=True))


def _columns(p: Problem) -> int:
    """Columns of a step: whole blocks of 8 that hold the windows of 8 neighbours."""
    return -(-(p.hood.kernel_size[1] + (0 if _dense(p) else 7)) // 8) * 8


@dataclass(frozen=True)
class Tile:
    """How blocks of threads cover a problem."""

    rows: int
    blocks: int
    splits: int
    heads_here: int
    staged: int
    pitch: int
    tiles: tuple[int, int]
    items: int
    shared: int
    moved: float  # staged tokens per token of the map

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


# What a kernel stages beside the rows of two tensors, bytes per staged token.
FORWARD, QUERIES, KEYS = "forward", "queries", "keys"
_EXTRAS = (FORWARD, QUERIES, KEYS)


def _warps(p: Problem, side: str) -> tuple[int, int]:
    """Warps of a block, and of a multiprocessor's registers, as the kernels' launch bounds say."""
    if side == FORWARD and p.head_dim == 32:
        return (6, 12) if p.dtype == "F32" else (WARPS, 16)
    return WARPS, 12 if side == KEYS and p.head_dim == 32 and p.dtype != "F32" else 8


@lru_cache(maxsize=4096)
def _tile(p: Problem, side: str) -> Tile | None:
    """The tile that moves the least, of those as large as the table's at most."""
    room = SHARED.get(p.arch, SHARED_ELSEWHERE)
    groups, dense = _groups(p), _dense(p)
    warps, resident = _warps(p, side)
    heads = p.kv_heads if side == KEYS else p.heads
    grouped = p.heads // p.kv_heads
    if dense:
        # All heads of a group that fit: a group is small, and its heads lie side by side.
        rows, blocks, pairs = -(-groups[0] // 2) * 2, -(-groups[1] // 8), -(-groups[0] // 2)
        splits = min(pairs, warps // blocks)
        if side != KEYS or grouped == 1:
            splits = max(1, min(splits, warps // 2 // heads))
        most = max(1, warps // splits // blocks)
        here = max(n for n in range(1, min(heads, most) + 1) if heads % n == 0)
        shapes = [(rows, blocks, splits, n) for n in range(here, 0, -1) if heads % n == 0]
    else:
        table = TILES_ROOMY if room == ROOMY else TILES
        _, blocks, rows, splits = next(line for line in table if groups[1] <= line[0])
        blocks, rows = min(blocks, warps, -(-groups[1] // 8)), min(rows, -(-groups[0] // 2) * 2)
        shapes = [(r, b) for b in range(blocks, 0, -1) for r in range(rows, 0, -2)]
        # A tile cut narrow keeps its warps busy with rows.
        shares = {b: min(splits, warps // b) if b == blocks else warps // b for _, b in shapes}
        shapes = [(r, b, min(shares[b], r // 2), 1) for r, b in shapes]
        if side == KEYS and grouped > 1:  # a warp keeps its sums over the heads of a group
            shapes = [(r, b, r // 2, n) for r, b, _, n in shapes if b * (r // 2) <= warps]
    made = [_measure(p, groups, dense, side, shape) for shape in shapes]
    limit = room * 1024 if p.arch < 80 else (room - 1) * 1024
    fit = [tile for tile in made if tile.shared <= limit]
    alone = {t: t.shared > room * 512 - 1024 or 2 * t.warps > resident for t in fit}
    # Of tiles that move the same the first: the widest, most rows or most heads.
    return min(fit, key=lambda tile: tile.moved * (ALONE if alone[tile] else 1), default=None)


def _lane_sums(p: Problem) -> int:
    """Bytes of a warp's sums of the bias gradient, where they are not in registers."""
    k = p.hood.kernel_size[0]
    own = 2 if _dense(p) and _columns(p) == 8 else _columns(p) // 4
    return (k + 1) * own * 128 if p.dtype == "F32" or k > 9 else 0


def _measure(p: Problem, groups, dense: bool, side: str, shape: tuple[int, int, int, int]) -> Tile:
    rows, blocks, splits, here = shape
    kernel = p.hood.kernel_size
    staged = _span(groups[0], kernel[0], rows, side == KEYS)
    columns = _span(groups[1], kernel[1], 8 * blocks, side == KEYS)
    pitch = max(_columns(p), columns)
    row = ITEM_SIZE[p.dtype] * p.head_dim
    table = 2 * kernel[0] * ((2 * kernel[1] + 3) // 4 * 4) * 4
    shared = here * (2 * staged * pitch * row + table)
    if side == QUERIES and p.rpb:
        shared += blocks * splits * here * (table + _lane_sums(p))
    if side == KEYS:
        shared += here * 2 * staged * pitch * 4
    tiles = (-(-groups[0] // rows), -(-groups[1] // (8 * blocks)))
    items = p.batch * prod(p.hood.dilation) * prod(tiles)
    moved = _moved(groups[0], kernel[0], rows, side == KEYS) * pitch * tiles[1] / prod(groups)
    return Tile(rows, blocks, splits, here, staged, pitch, tiles, items, shared, moved)


# ------------------------------------------------------------------------------------------------
# recipes


def _recipe(kernel: str, p: Problem, tile: Tile, heads: int, blocks: int, **constants) -> Recipe:
    compiled = {
        "SCALAR": p.dtype,
        "ACCESS": 16,
        "LANES": 1,
        "HEAD_DIM": p.head_dim,
        "TERMS": 3 if p.dtype == "F32" and not p.tf32 else 1,
        "KERNEL_HEIGHT": p.hood.kernel_size[0],
        "KERNEL_WIDTH": p.hood.kernel_size[1],
        "DENSE": int(_dense(p)),
        "RPB": int(p.rpb),
        **constants,
    }
    values = {
        **_pair("geometry.length", p.shape),
        **_pair("geometry.dilation", p.hood.dilation),
        **_pair("geometry.tiles", tile.tiles),
        "geometry.rows": tile.rows,
        "geometry.blocks": tile.blocks,
        "geometry.splits": tile.splits,
        "geometry.heads_here": tile.heads_here,
        "geometry.pitch": tile.pitch,
        "geometry.staged": tile.staged,
        "geometry.heads": heads,
        "geometry.queries_per_kv": p.heads // p.kv_heads,
        "geometry.zero": 0,
        "items": tile.items,
        "scale": p.scale,
        **views(p),
    }
    blocks *= heads // tile.heads_here
    threads = (32 * tile.warps, 1, 1)
    return recipe(kernel, tuple(compiled.items()), blocks, threads, tile.shared, values)


def _pair(name: str, entries: tuple[int, ...]) -> dict[str, int]:
    return dict(list(array(name, entries, 0).items())[:2])


def forward(p: Problem) -> Plan:
    """The launch that computes `out` and `lse`."""
    tile = _tile(p, FORWARD)
    return Plan((_recipe("na2d_small_fwd", p, tile, p.heads, tile.items),))


def query_side(p: Problem, rpb: bool, most: int) -> tuple[Recipe, int]:
    """The launch that computes delta and d_query, and its blocks per head.

    With `rpb`, the gradient of the bias as well, in a table per block of which there are at most
    `most`, or as few as possible.
    """
    tile = _tile(p, QUERIES)
    blocks = tile.items
    if rpb:
        teams = p.heads // tile.heads_here
        blocks = max(1, min(blocks, most, -(-1024 // teams)))
        # Blocks that always meet the same place of a map keep their sums in registers.
        places = prod(tile.tiles)
        blocks = blocks // places * places or blocks
    kernel = "na2d_small_bwd_dq"
    return _recipe(kernel, p, tile, p.heads, blocks, RPB_GRAD=int(rpb)), blocks


def key_side(p: Problem) -> Plan:
    """The launch that computes d_key and d_value."""
    tile = _tile(p, KEYS)
    return Plan((_recipe("na2d_small_bwd_dkv", p, tile, p.kv_heads, tile.items),))
