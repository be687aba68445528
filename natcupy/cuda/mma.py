"""Plans of the tensor-core kernels for any window: which calls they run, in which launches.

In: a `Problem`. Out: why the kernels cannot run it, the tile that its blocks take, or recipes. They
run what the small-window kernels do not: lines and volumes, large windows, strides, causal axes,
additional keys, head_dim and value_dim of up to 128 (float32: 64). Sizes, tiles and strides are
arguments; compiled in are dtype, rank, the parts that rows are cut into, and whether there is a
bias; for float32 also the terms of a product, as for small windows.

A tile depends on nothing but the shape of a map and the kind of its windows: sums are taken in
blocks of keys, which begin with the tile, so results would not be the same bits with other tiles.
"""

from __future__ import annotations

from functools import cache, lru_cache
from itertools import product
from math import ceil, e, lcm, log2, prod

from natcupy.cuda import heuristics
from natcupy.cuda.heuristics import FORWARD, KEYS, QUERIES, SIDES
from natcupy.cuda.recipes import Plan, Problem, Recipe, access, geometry, recipe, views
from natcupy.cuda.tiling import ITEM_SIZE

LARGEST_ROW = 256  # bytes of head_dim or value_dim; beyond, the sums of a row fill the registers
FRAGMENT = 16  # tokens that a warp owns
BLOCK = 8  # columns that are seen or skipped together
TURN = 64  # tokens staged at a time
SIZES = (128, 64)  # tokens of a tile
LARGEST_GRID = 2**31 - 1
LARGEST_SCALE = 1e38  # in base two; a float of the kernels
COPIED = ("query", "key", "value", "d_out", "extra_key", "extra_value")
BLOCKS = 1024  # of all heads, where each adds up the bias gradient of several tiles
OWN_SHARED = 4096  # bytes that the kernels declare themselves, at most
# Numbers of all keys and values that a query sees, from which on they pay: below, the interpreter
# counts fewer instructions of the portable kernels, in tiles for many images.
LEAST_WORK = {"F16": 512, "BF16": 512, "F32": 1024}

# Instructions of a warp, counted: for a block of columns that it sees, for a block that it stages,
# for a turn, and for a tile beside these.
SEEN, STAGED, TURNED, AROUND = 45, 28, 50, 400


def why_not(p: Problem) -> str:
    """Why the kernels cannot run `p`, or "" if they can."""
    most = LARGEST_ROW // ITEM_SIZE[p.dtype]
    reasons = {
        "float16, or bfloat16 or float32 from sm_80 on": p.dtype == "F16"
        or (p.dtype in ("BF16", "F32") and p.arch >= 80),
        f"head_dim and value_dim of at most {most}": max(p.head_dim, p.value_dim) <= most,
        "rows at multiples of 16 bytes": access(p) == 16,
        "a scale within float32": abs(p.scale) <= LARGEST_SCALE,
    }
    missing = [rule for rule, held in reasons.items() if not held]
    if not missing:
        missing = [rule for rule, held in _limits(p).items() if not held]
    return f"they need {' and '.join(missing)}" if missing else ""


def _limits(p: Problem) -> dict[str, bool]:
    sums = _bias_sums(p, True) if p.rpb else 0
    most = max(_shared(p, side) for side in SIDES) + sums + OWN_SHARED
    return {
        "tiles that fit shared memory": most <= heuristics.block_limit(p.arch),
        "at most 2**31 - 1 blocks": max(p.heads, p.kv_heads) * _items(p) <= LARGEST_GRID,
        "what a tile sees within 2**32 bytes": _reach(p) < 2**32,
    }


def pays(p: Problem) -> bool:
    """Whether the kernels are expected to beat the portable ones on `p`, which they can run."""
    keys = prod(p.hood.kernel_size) + p.extras
    return keys * (p.head_dim + p.value_dim) >= LEAST_WORK[p.dtype]


def _reach(p: Problem) -> int:
    """Bytes from one corner to the other of the largest box of tokens that is staged for a tile."""
    hood, size = p.hood, ITEM_SIZE[p.dtype]
    axes = zip(p.groups, tile(p), hood.kernel_size, hood.stride, hood.dilation, strict=True)
    extents = [(min(n, t + 2 * (k + s)) - 1) * d for n, t, k, s, d in axes]
    reach = [
        strides[1] * (p.extras - 1)
        if name.startswith("extra")
        else sum(n * step for n, step in zip(extents, strides[1:-1], strict=True))
        for name, strides in p.strides
        if name in COPIED
    ]
    return (max(reach, default=0) + max(p.head_dim, p.value_dim)) * size


# ------------------------------------------------------------------------------------------------
# tiles


def tile(p: Problem) -> tuple[int, ...]:
    """Tokens per axis that a block owns."""
    return _tile(p.groups, p.hood.kernel_size, p.hood.stride)[0]


def fragment(p: Problem) -> tuple[int, ...]:
    """Tokens per axis of a tile that a warp owns."""
    return _tile(p.groups, p.hood.kernel_size, p.hood.stride)[1]


@lru_cache(maxsize=4096)
def _tile(groups, kernel_size, stride) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The cheapest tile and fragment whose extents are powers of two."""
    size = next((s for s in reversed(SIZES) if s >= prod(groups)), SIZES[0])
    pairs = product(_boxes(size, len(groups)), _boxes(FRAGMENT, len(groups)))
    legal = (pair for pair in pairs if all(f <= t for t, f in zip(*pair, strict=True)))
    return min(legal, key=lambda pair: _cost(groups, kernel_size, stride, *pair))


@cache
def _boxes(tokens: int, rank: int) -> list[tuple[int, ...]]:
    """Boxes of so many tokens whose extents are powers of two."""
    powers = [1 << n for n in range(tokens.bit_length())]
    return [box for box in product(powers, repeat=rank) if prod(box) == tokens]


def _cost(groups, kernel_size, stride, shape, part) -> float:
    """Instructions of all tiles of a group."""
    axes = list(zip(groups, kernel_size, stride, shape, strict=True))
    *lines, columns = (_span(*axis) for axis in axes)
    staged = prod(lines) * ceil(columns / BLOCK)
    warps = prod(shape) // FRAGMENT
    seen = warps * _seen(groups, kernel_size, stride, shape, part)
    turns = ceil(staged * BLOCK / TURN)
    one = SEEN * seen + STAGED * staged + warps * (TURNED * turns + AROUND)
    return one * prod(-(-n // t) for n, _, _, t in axes)


def _span(length: int, kernel_size: int, stride: int, tile: int) -> float:
    """Keys of an axis that a tile sees, on average over the tiles."""
    starts = range(0, min(length, lcm(tile, stride)), tile)
    moves = sum((min(at + tile, length) - 1) // stride - at // stride for at in starts)
    return min(length, kernel_size + moves * stride / len(starts))


def _seen(groups, kernel_size, stride, shape, part) -> float:
    """Blocks of 8 columns that one of the 16 tokens of a warp sees, on average."""
    *lines, columns = (_span(*axis) for axis in zip(groups, kernel_size, stride, part, strict=True))
    starts = [at // stride[-1] * stride[-1] for at in range(0, shape[-1], part[-1])]
    touched = [ceil((at % BLOCK + columns) / BLOCK) for at in starts]
    return prod(lines) * sum(touched) / len(touched)


# ------------------------------------------------------------------------------------------------
# recipes


def _parts(p: Problem) -> tuple[int, int, int]:
    """Numbers of a part of a row, and the parts of queries and keys and of values."""
    dim = 32 if max(p.head_dim, p.value_dim) <= 32 else 64
    return dim, -(-p.head_dim // dim), -(-p.value_dim // dim)


def _items(p: Problem) -> int:
    """Tiles of all dilation groups of all images."""
    tiles = (-(-n // t) for n, t in zip(p.groups, tile(p), strict=True))
    return p.batch * prod(tiles) * prod(p.hood.dilation)


def _shared(p: Problem, side: str) -> int:
    """Bytes of two turns of rows, and with queries their log-sum-exp and delta."""
    dim, *parts = _parts(p)
    row = dim * sum(parts) * ITEM_SIZE[p.dtype]
    return 2 * (TURN * row + (TURN * 8 + 128 if side == KEYS else 0))


def _bias_sums(p: Problem, far: bool) -> int:
    """Bytes of a block's sums of dS per bias: diagonals, pairs of a block, tables unless `far`."""
    table = 0 if far else -(-p.biases // 2) * 8
    return _warps(p) * (128 * 8 + FRAGMENT * BLOCK * 4 + table)


def is_far(p: Problem) -> bool:
    """Whether the tables of the bias gradient are in global memory: shared memory has no room."""
    most = _shared(p, QUERIES) + _bias_sums(p, False) + OWN_SHARED
    return most > heuristics.block_limit(p.arch)


def _warps(p: Problem) -> int:
    return prod(tile(p)) // FRAGMENT


def _recipe(
    kernel: str,
    p: Problem,
    side: str,
    scale: float,
    blocks: int | None = None,  # per head; one for each tile
    extra_shared: int = 0,
    **more: int,
) -> Recipe:
    dim, qk_parts, v_parts = _parts(p)
    constants = {
        "SCALAR": p.dtype,
        "RANK": p.rank,
        "ACCESS": 16,
        "LANES": 1,
        "TERMS": 3 if p.dtype == "F32" and not p.tf32 else 1,
        "HEAD_DIM": dim,
        "QK_PARTS": qk_parts,
        "V_PARTS": v_parts,
        "WARPS": _warps(p),
        "RPB": int(p.rpb),
        **more,
    }
    values = {
        **geometry(p, tile(p), fragment(p)),
        "heads": p.heads,
        "kv_heads": p.kv_heads,
        "queries_per_kv": p.heads // p.kv_heads,
        "head_dim": p.head_dim,
        "value_dim": p.value_dim,
        "extras": p.extras,
        "zero": 0,
        "items": _items(p),
        "scale": scale,
        **views(p),
    }
    heads = p.kv_heads if side == KEYS else p.heads
    threads, shared = (32 * _warps(p), 1, 1), _shared(p, side) + extra_shared
    blocks = heads * (_items(p) if blocks is None else blocks)
    return recipe(kernel, tuple(constants.items()), blocks, threads, shared, values)


def forward(p: Problem) -> Plan:
    """The launch that computes `out` and `lse`."""
    return Plan((_recipe("na_mma_fwd", p, FORWARD, p.scale * log2(e)),))


def query_side(p: Problem, rpb: bool, most: int) -> tuple[Recipe, int]:
    """The launch that computes delta and d_query, and how many tables it writes per head.

    With `rpb`, the gradient of the bias as well, in a table per block, or per warp of each where
    these are far, of which there are at most `most`, or as few as possible. How many there are, and
    where they lie, decides the order of its sums: its bits differ by architecture and heads.
    """
    if not rpb:
        none = {"RPB_GRAD": 0, "FAR": 0}
        return _recipe("na_mma_bwd_dq", p, QUERIES, p.scale, **none), _items(p)
    far = is_far(p)
    tables = _warps(p) if far else 1
    blocks = max(1, min(_items(p), -(-BLOCKS // p.heads), most // tables))
    sums = {"RPB_GRAD": 1, "FAR": int(far)}
    made = _recipe("na_mma_bwd_dq", p, QUERIES, p.scale, blocks, _bias_sums(p, far), **sums)
    return made, blocks * tables


def key_side(p: Problem) -> Plan:
    """The launch that computes d_key and d_value."""
    return Plan((_recipe("na_mma_bwd_dkv", p, KEYS, p.scale),))
