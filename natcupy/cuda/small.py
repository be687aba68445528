"""Plans of the kernels for small 2-D windows: which calls they run, in which launches.

In: a `Problem`, and the shape of one of its tiles (`small_tiles`) or none. Out: why the kernels
cannot run it, or their recipes. Tile sizes, like image sizes and strides, are arguments of the
kernels; compiled in are dtype, head_dim, the window, whether there is a bias, and whether every
dilation group is exactly one window ("dense": a 7 x 7 map under a 7 x 7 window, or a dilation that
stretches the window over the map); of some the registers that they are to make do with. For float32
also the terms of a product: three, as exact as float32 arithmetic, or one where torch's own setting
allows TF32.

Lines of one axis are for the kernels of `mma`. A fragment is two rows by 8 columns: of a line it
would be half empty; as one row by 16 columns, neighbours' windows would span a block of 8 more, the
two halves would share no bias, and none of the kernels' walks over pairs of rows would fit.
"""

from __future__ import annotations

from math import e, inf, log2, prod

from natcupy.cuda import heuristics
from natcupy.cuda.heuristics import BOTH, FORWARD, KEYS, QUERIES, SIDES
from natcupy.cuda.recipes import Plan, Problem, Recipe, access, array, recipe, views
from natcupy.cuda.small_tiles import (
    ROWS,
    WARPS,
    Shape,
    Tile,
    crowds,
    is_dense,
    joint_tile,
    joint_tiles,
    tile,
    tiles,
)
from natcupy.cuda.tiling import ITEM_SIZE

DIMS = (32, 64)  # head_dim
LARGEST_WINDOW = 13  # per axis: the windows of 8 neighbours span at most 24 columns
LARGEST_HALO = 6.0  # staged tokens per token: beyond, tiles are too small for shared memory's sake
BLOCKS = 1024  # of all heads, where each adds up the bias gradient of several tiles
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
    groups, most = p.groups, (max(ROWS), 8 * WARPS)
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
        "DENSE": int(is_dense(p)),
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
    crowded = int(crowds(p, FORWARD))
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
    constants = {"RPB_GRAD": int(rpb), "CROWDED": int(crowds(p, QUERIES))}
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
    crowded = int(crowds(p, KEYS))
    return Plan((_recipe("na2d_small_bwd_dkv", p, cut, p.kv_heads, cut.items, CROWDED=crowded),))


# ------------------------------------------------------------------------------------------------
# both sides backward, in one launch


def joins(p: Problem) -> bool:
    """Whether one launch can compute all gradients of `p`, which the kernels here can run.

    Then a tile's tensors come from main memory once instead of twice, for a tenth more
    instructions on the key side.
    """
    short = p.dtype != "F32" and p.head_dim == 32 and p.heads == p.kv_heads
    return short and not is_dense(p) and bool(joint_tiles(p))


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
    constants = _constants(p, RPB_GRAD=int(rpb), CROWDED=int(crowds(p, BOTH)))
    grid = blocks * teams * share
    return recipe("na2d_small_bwd", constants, grid, threads, shared, values), blocks


# ------------------------------------------------------------------------------------------------
# dense groups backward, in one launch

DENSE_WARPS = 4  # of a block, each with a group of its own
DENSE_RESIDENT = 8  # warps whose registers a multiprocessor holds


def fuses(p: Problem) -> bool:
    """Whether one kernel computes all gradients of `p`, which the small-window kernels can run."""
    small = max(p.hood.kernel_size) <= 8 and p.dtype != "F32" and p.head_dim == 32
    return small and is_dense(p) and p.heads == p.kv_heads


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
