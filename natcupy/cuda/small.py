"""Plans of the kernels for small 2-D windows: which calls they run, how blocks cover a map.

In: a `Problem`. Out: why the kernels cannot run it, or their recipes. Tile sizes, like image sizes
and strides, are arguments of the kernels; compiled in are dtype, head_dim, the window, whether
there is a bias, and whether every dilation group is exactly one window ("dense": a 7 x 7 map under
a 7 x 7 window, or a dilation that stretches the window over the map); of some the registers that
they are to make do with. For float32 also the terms of a product: three, as exact as float32
arithmetic, or one where torch's own setting allows TF32.

Which of the legal tiles runs is for `heuristics` to say, or for whoever plans to choose.

Lines of one axis are for the portable kernels. A fragment is two rows by 8 columns: of a line it
would be half empty; as one row by 16 columns, neighbours' windows would span a block of 8 more, the
two halves would share no bias, and none of the three kernels' walks over pairs of rows would fit.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from math import e, inf, log2, prod

from natcupy.cuda import heuristics
from natcupy.cuda.heuristics import BOTH, FORWARD, KEYS, QUERIES, SIDES
from natcupy.cuda.recipes import Plan, Problem, Recipe, access, array, recipe, views
from natcupy.cuda.tiling import ITEM_SIZE
from natcupy.neighborhood import inverse_window, window

DIMS = (32, 64)  # head_dim
LARGEST_WINDOW = 13  # per axis: the windows of 8 neighbours span at most 24 columns
LARGEST_HALO = 6.0  # staged tokens per token: beyond, tiles are too small for shared memory's sake
WARPS = 8  # of a block
BLOCKS = 1024  # of all heads that are to add up gradients of the bias one after the other's tiles
LARGEST_GRID = 2**31 - 1
LARGEST_TABLE = 2**31 - 1  # entries of all heads' bias tables, indexed in 32 bits


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
        "a scale of 1e-6 to 1e6 in size": 1e-6 <= abs(p.scale) <= 1e6,
        "rows at multiples of 16 bytes": access(p) == 16,
        "a tile's rows within 2**32 bytes": _reach(p) < 2**32,
        "bias tables of 2**31 - 1 entries": p.heads * p.biases <= LARGEST_TABLE,
    }
    missing = [rule for rule, held in reasons.items() if not held]
    if not missing and not all(tiles(p, side) for side in SIDES):
        missing.append("a tile that fits shared memory, in at most 2**31 - 1 blocks")
    return f"they need {' and '.join(missing)}" if missing else ""


def _reach(p: Problem) -> int:
    """Bytes from one corner to the other of the largest box of tokens that a tile may stage."""
    if p.rank != 2:
        return 0
    groups, most = _groups(p), (max(ROWS), 8 * WARPS)
    extents = [
        min(n, tile + 2 * k) * d
        for n, tile, k, d in zip(groups, most, p.hood.kernel_size, p.hood.dilation, strict=True)
    ]
    steps = (strides[1:-1] for name, strides in p.strides if not name.startswith("extra"))
    reach = (sum(n * step for n, step in zip(extents, axes, strict=True)) for axes in steps)
    return max(reach, default=0) * ITEM_SIZE[p.dtype]


def pays(p: Problem) -> bool:
    """Whether the kernels are expected to beat the portable ones on `p`, which they can run."""
    if heuristics.family(p.dtype, prod(p.hood.kernel_size)) != "small":
        return False
    least = (min(tile.moved for tile in tiles(p, side)) for side in SIDES)
    return max(least) <= LARGEST_HALO


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


# Rows of a tile that are worth a try, and warps that may share them.
ROWS = (2, 4, 6, 8, 10, 14, 16, 20, 28)
SPLITS = (1, 2, 4)
RANKED = 8  # tiles that are worth measuring
Shape = tuple[int, int, int, int]  # blocks of 8 columns, rows, splits, heads


def _warps(p: Problem, side: str) -> tuple[int, int]:
    """Warps of a block, and of a multiprocessor's registers, as the kernels' launch bounds say."""
    if _crowds(p, side):
        return WARPS, CROWD[side]
    if side == FORWARD and p.head_dim == 32:
        return (6, 12) if p.dtype == "F32" else (WARPS, 16)
    short = p.head_dim == 32 and p.dtype != "F32" and p.hood.kernel_size[1] <= 9
    return WARPS, 12 if side == KEYS and short else 8


# Warps whose registers a multiprocessor holds where kernels make do with 80 or 128 a thread.
CROWD = {FORWARD: 24, QUERIES: 16, KEYS: 16, BOTH: 16}


def _crowds(p: Problem, side: str) -> bool:
    """Whether kernels are to make do with fewer registers, so that more warps can run.

    Where shared memory can hold so many, and a warp's sums are so few: what registers do not hold
    any more is read once a tile. A warp waits most of its time (5.7 clocks an instruction on an
    H100). It depends on nothing that is not compiled in: a batch or map of another size needs no
    other kernel.
    """
    few = p.head_dim == 32 and p.dtype != "F32" and p.hood.kernel_size[1] <= 8
    return few and p.arch >= 80 and (side == FORWARD or not _dense(p))


@lru_cache(maxsize=4096)
def tiles(p: Problem, side: str) -> tuple[Tile, ...]:
    """Every tile that fits a multiprocessor of this architecture and a grid."""
    groups, dense = _groups(p), _dense(p)
    shapes = (_dense_shapes if dense else _shapes)(p, groups, side)
    made = (_measure(p, groups, dense, side, shape) for shape in shapes)
    limit, heads = heuristics.block_limit(p.arch), p.heads
    return tuple(t for t in made if t.shared <= limit and t.items * heads <= LARGEST_GRID)


def _dense_shapes(p: Problem, groups, side: str) -> list[Shape]:
    """A group is one tile; as it is small, several heads of it may share a block.

    Of tiles that cost the same the first is taken: forward, one whose warps work through a group
    alone, as what a warp does before its first rows takes as long as some rows.
    """
    heads, (warps, _) = p.kv_heads if side == KEYS else p.heads, _warps(p, side)
    pairs, blocks = -(-groups[0] // 2), -(-groups[1] // 8)
    most = max(1, min(pairs, warps // blocks))
    found = []
    every = range(1, most + 1) if side == FORWARD else range(most, 0, -1)
    for splits in (most,) if side == KEYS and p.heads > p.kv_heads else every:
        here = max(1, warps // splits // blocks)
        found += [(blocks, 2 * pairs, splits, n) for n in range(min(heads, here), 0, -1)]
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
        raise ValueError(f"{shape} is no tile of this call; see natcupy.cuda.small.tiles.")
    return found[0]


@lru_cache(maxsize=4096)
def ranked(p: Problem, side: str) -> tuple[Tile, ...]:
    """The few cheapest tiles: first the one that the table says, then by cost."""
    legal = {_cover(p, side, t): t for t in tiles(p, side)}
    table = ITEM_SIZE[p.dtype] * p.head_dim == 64 and p.hood.kernel_size == (7, 7) and not _dense(p)
    row = heuristics.row_for(p.arch, side, _groups(p)[1]) if table else None
    covers = heuristics.rank(p.arch, side, tuple(legal), row)
    return tuple(legal[cover] for cover in covers[:RANKED])


def _cover(p: Problem, side: str, t: Tile) -> heuristics.Cover:
    """What the choice needs to know about a tile."""
    places = t.tiles[0] * t.tiles[1] * t.rows * 8 * t.blocks
    return heuristics.Cover(
        shape=t.shape,
        halo=t.moved,
        fill=prod(_groups(p)) / places,
        shared=t.shared,
        grid=t.items * p.heads // t.heads_here,
        most_warps=_warps(p, side)[1],
    )


def _lane_sums(p: Problem) -> int:
    """Bytes of a warp's sums of the bias gradient in shared memory: of all rows, or of one."""
    height, width = p.hood.kernel_size
    folded = -(-width // 8)  # columns 8 or 16 apart, which no window holds both of, share a number
    one_row = _dense(p) and height == 1  # one step, which is no straight code
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
    if side == QUERIES and p.rpb:
        shared += blocks * splits * here * (table + _lane_sums(p))
    if side == KEYS:
        shared += here * 2 * staged * _number_pitch(pitch) * 4 + line + row
    counts = (-(-groups[0] // rows), -(-groups[1] // (8 * blocks)))
    items = p.batch * prod(p.hood.dilation) * prod(counts)
    moved = _moved(groups[0], kernel[0], rows, side == KEYS) * pitch * counts[1] / prod(groups)
    return Tile(rows, blocks, splits, here, staged, pitch, counts, items, shared, moved)


# ------------------------------------------------------------------------------------------------
# recipes


def _constants(p: Problem, **more) -> tuple[tuple[str, str | int], ...]:
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
        **more,
    }
    return tuple(compiled.items())


def _values(p: Problem, tile: Tile, heads: int) -> dict[str, int | float]:
    return {
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
        **_divisor("by_teams", heads // tile.heads_here),
        **_divisor("by_dilation.0", p.hood.dilation[0]),
        **_divisor("by_dilation.1", p.hood.dilation[1]),
        **_divisor("by_tiles.0", tile.tiles[0]),
        **_divisor("by_tiles.1", tile.tiles[1]),
        **_divisor("by_blocks", tile.blocks),
        **_divisor("by_splits", tile.splits),
        "items": tile.items,
        "scale.plain": p.scale,
        "scale.base_two": p.scale * log2(e),
        "scale.inverse": 1 / p.scale,
        "scale.never": -inf if p.scale > 0 else inf,
        **views(p),
    }


def _recipe(kernel: str, p: Problem, tile: Tile, heads: int, blocks: int, **constants) -> Recipe:
    values = _values(p, tile, heads)
    blocks *= heads // tile.heads_here
    threads = (32 * tile.warps, 1, 1)
    return recipe(kernel, _constants(p, **constants), blocks, threads, tile.shared, values)


def _pair(name: str, entries: tuple[int, ...]) -> dict[str, int]:
    return dict(list(array(name, entries, 0).items())[:2])


def _divisor(name: str, number: int, of: str = "geometry.") -> dict[str, int]:
    """Fields of a `Divisor`: n // number is (2 n * times >> 32) >> shift for all n below 2**31.

    `times` is 2**(31 + shift) / number rounded up, where 2**shift is the least power of two from
    `number` on: 32 bits, packed as the signed number of the same bits (Granlund and Montgomery,
    Division by invariant integers using multiplication, 1994, theorem 4.2).
    """
    shift = (number - 1).bit_length()
    times = -(-(2 ** (31 + shift)) // number)
    signed = times - 2**32 if times >= 2**31 else times
    fields = {"number": number, "times": signed, "shift": shift}
    return {f"{of}{name}.{field}": value for field, value in fields.items()}


def forward(p: Problem, shape: Shape | None = None) -> Plan:
    """The launch that computes `out` and `lse`."""
    cut = tile(p, FORWARD, shape)
    crowded = int(_crowds(p, FORWARD))
    return Plan((_recipe("na2d_small_fwd", p, cut, p.heads, cut.items, CROWDED=crowded),))


def query_side(p: Problem, rpb: bool, most: int, shape: Shape | None = None) -> tuple[Recipe, int]:
    """The launch that computes delta and d_query, and its blocks per head.

    With `rpb`, the gradient of the bias as well, in a table per block of which there are at most
    `most`, or as few as possible.
    """
    cut = tile(p, QUERIES, shape)
    # Few, so that most tiles of a block add to what it holds already.
    few = -(-BLOCKS * cut.heads_here // p.heads)
    blocks = _query_blocks(p, cut, rpb, min(most, few))
    kernel = "na2d_small_bwd_dq"
    constants = {"RPB_GRAD": int(rpb), "CROWDED": int(_crowds(p, QUERIES))}
    return _recipe(kernel, p, cut, p.heads, blocks, **constants), blocks


def _query_blocks(p: Problem, cut: Tile, rpb: bool, most: int) -> int:
    """Blocks per head of the query side."""
    if not rpb:
        return cut.items
    blocks = max(1, min(cut.items, most))
    # Blocks that always meet the same place of a map keep their sums in registers.
    places = prod(cut.tiles)
    return blocks // places * places or blocks


def key_side(p: Problem, shape: Shape | None = None) -> Plan:
    """The launch that computes d_key and d_value."""
    cut = tile(p, KEYS, shape)
    crowded = int(_crowds(p, KEYS))
    return Plan((_recipe("na2d_small_bwd_dkv", p, cut, p.kv_heads, cut.items, CROWDED=crowded),))


# ------------------------------------------------------------------------------------------------
# both sides backward, in one launch


def joins(p: Problem) -> bool:
    """Whether one launch can compute all gradients of `p`, which the kernels here can run.

    Then a tile's tensors come from main memory once instead of twice, for a tenth more
    instructions on the key side.
    """
    short = p.dtype != "F32" and p.head_dim == 32 and p.heads == p.kv_heads
    return short and not _dense(p) and bool(joint_tiles(p))


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


def both_sides(p: Problem, rpb: bool, most: int, shape: Shape | None = None) -> tuple[Recipe, int]:
    """The launch that computes the gradients of query, key and value, and query blocks per head.

    `rpb` and `most` as in `query_side`.
    """
    cut, key_cut = joint_tile(p, shape) if shape else joint_tiles(p)[0]
    # As many as tiles, if they may: beside the keys' blocks that read the same rows at that time.
    blocks = _query_blocks(p, cut, rpb, most)
    teams = p.heads // cut.heads_here
    share = 1 + -(-key_cut.items // blocks)  # blocks that work on the same tiles
    values = _values(p, cut, p.heads)
    of_keys = _values(p, key_cut, p.heads)
    values |= {f"key_{name}": x for name, x in of_keys.items() if name.startswith("geometry.")}
    values |= {"query_blocks": blocks * teams, "key_blocks": key_cut.items * teams}
    values |= _divisor("by_share", share, of="")
    shared, threads = max(cut.shared, key_cut.shared), (32 * cut.warps, 1, 1)
    constants = _constants(p, RPB_GRAD=int(rpb), CROWDED=int(_crowds(p, BOTH)))
    grid = blocks * teams * share
    return recipe("na2d_small_bwd", constants, grid, threads, shared, values), blocks


# ------------------------------------------------------------------------------------------------
# dense groups backward, in one launch

DENSE_WARPS = 4  # of a block, each with a group of its own
DENSE_RESIDENT = 8  # warps whose registers a multiprocessor holds


def fuses(p: Problem) -> bool:
    """Whether one kernel computes all gradients of `p`, which the small-window kernels can run."""
    small = max(p.hood.kernel_size) <= 8 and p.dtype != "F32" and p.head_dim == 32
    return small and _dense(p) and p.heads == p.kv_heads


def dense_backward(p: Problem, rpb: bool, most: int) -> tuple[Recipe, int]:
    """The launch that computes the gradients of query, key and value, and its warps per head.

    With `rpb`, the gradient of the bias as well, in a table per warp of which there are at most
    `most` per head.
    """
    height, width = p.hood.kernel_size
    line = 8 * ITEM_SIZE[p.dtype] * p.head_dim
    table = 2 * height * ((2 * width + 3) // 4 * 4) * 4
    each = height * (4 * line + 128) + table + ((2 * height - 1) * 256 if rpb else 0)
    each = -(-each // 128) * 128
    warps = min(DENSE_WARPS, heuristics.block_limit(p.arch) // each)
    items = p.batch * prod(p.hood.dilation)
    # As many warps as a GPU holds twice, each with as many groups as the others, or one more.
    wanted = -(-2 * DENSE_RESIDENT * heuristics.architecture(p.arch).multiprocessors // p.heads)
    slots = max(1, min(items, wanted, most if rpb else items))
    slots = -(-items // -(-items // slots))
    cut = Tile(2 * -(-height // 2), 1, warps, 1, height, 8, (1, 1), items, warps * each, 1.0)
    blocks = -(-slots * p.heads // warps)
    values = {**_values(p, cut, p.heads), "slots": slots}
    constants, threads = _constants(p, RPB_GRAD=int(rpb)), (32 * warps, 1, 1)
    made = recipe("na2d_small_bwd_dense", constants, blocks, threads, cut.shared, values)
    return made, slots
