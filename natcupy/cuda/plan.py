"""Plans: which kernels run, with which constants, grid, block, shared memory and arguments.

In: a `Problem`, plain numbers that describe a call. Out: a `Plan`, a few `Recipe`s in order and the
scratch memory they share; `fill` turns a recipe and data pointers into a `Launch`. Nothing here
touches a device: it is arithmetic, cached, and testable anywhere.

Three families of kernels: those for small 2-D windows on tensor cores (`small`), those for other
windows on tensor cores (`mma`), and the portable ones, planned here, which run every call. Of the
portable ones only what shapes the code is compiled in (dtype, rank, lanes, rpb or not); sizes,
strides and tiles are arguments, so a new image size compiles nothing.

A `Choice` names one of the ways to run one side of a call: forward, its query side or key side
backward, or both of these. Without one the first of `choices` runs, which `heuristics` and
`tiling` rank.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import prod

from natcupy.cuda import mma, small, small_tiles
from natcupy.cuda.heuristics import BOTH, FORWARD, KEYS, QUERIES
from natcupy.cuda.recipes import (
    Plan,
    Problem,
    Recipe,
    access,
    array,
    contiguous,
    fill,
    geometry,
    recipe,
    rename,
    views,
)
from natcupy.cuda.tiling import (
    THREADS,
    Sharing,
    backward_step,
    choose_stage,
    forward_step,
    halo_of,
    rank_tiles,
    sharing,
)

__all__ = [
    "Choice", "Plan", "Problem", "Recipe", "access", "backward", "choices", "contiguous",
    "family_in_use", "fill", "forget", "forward", "generation", "legal", "part", "use_family",
]  # fmt: skip

LARGEST_DIM = 512  # head_dim and value_dim; beyond, a row no longer fits its lanes' registers
LARGEST_IMAGE = 2**30  # tokens; window arithmetic adds two lengths in 32 bits
LARGEST_BIAS = 2**31 - 1  # entries of a head's bias table, indexed in 32 bits
LARGEST_GRID = 2**31 - 1  # blocks on the x axis, the only one used
SHARED = 48 * 1024 - 256  # bytes every architecture gives unasked, but for a kernel's own few
MANY_SLICES = 128  # of a sum in two stages, from which on blocks are of 128 rows for 8 results
BLOCKS = 1024  # blocks that keep any GPU busy: a bound for two-stage sums
SCRATCH = 64 * 2**20  # bytes of partial sums of one gradient
FAMILIES = ("auto", "portable", "mma", "small", "apart")

# ("small", blocks of 8 columns, rows, splits, heads), ("mma", tokens per axis, ...) or ("portable",
# tokens per axis, ...); of both sides backward ("joint", as of "small") for one launch, or
# ("apart",), which leaves each its own.
Choice = tuple[str | int, ...]
APART: Choice = ("apart",)

_family = "auto"


@dataclass(frozen=True)
class Tiling:
    """How blocks cover a problem: `Geometry` in numbers, items, threads and staged tokens."""

    values: Mapping[str, int]
    items: int
    threads: int
    slots: int
    capacity: int


def _portable_tiles(p: Problem, heads: int) -> tuple[tuple[int, ...], ...]:
    """The few cheapest tiles of a problem whose blocks each take one of `heads`."""
    hood, share = p.hood, sharing(p.dtype, p.head_dim, p.value_dim)
    copies = p.batch * heads * prod(hood.dilation)
    most = THREADS // share.lanes
    return rank_tiles(p.groups, hood.kernel_size, hood.stride, most, copies)


def _tiling(p: Problem, tile: tuple[int, ...], row_bytes: int, per_slot: int) -> Tiling:
    """Cover `p`; a staged token costs `row_bytes` and `per_slot` bytes for each slot of a block."""
    hood, groups, share = p.hood, p.groups, sharing(p.dtype, p.head_dim, p.value_dim)
    threads = -(-prod(tile) * share.lanes // 32) * 32
    slots = threads // share.lanes
    # One row more than the capacity stays zero, and a table row is padded to an odd length.
    room = SHARED - row_bytes - 16 - slots * per_slot
    capacity = room // (row_bytes + slots * per_slot)
    stage = choose_stage(halo_of(groups, hood.kernel_size, hood.stride, tile), capacity)
    tiles = (-(-n // t) for n, t in zip(groups, tile, strict=True))
    items = p.batch * prod(tiles) * prod(hood.dilation)
    return Tiling(geometry(p, tile, stage), items, threads, slots, prod(stage))


# ------------------------------------------------------------------------------------------------
# plans


def _constants(p: Problem, share: Sharing, **more: int) -> tuple[tuple[str, int | str], ...]:
    return (
        ("SCALAR", p.dtype),
        ("RANK", p.rank),
        ("ACCESS", access(p)),
        ("LANES", share.lanes),
        ("QK_CHUNKS", share.qk_chunks),
        ("V_CHUNKS", share.v_chunks),
        *more.items(),
    )


def _sizes(p: Problem) -> dict[str, int | float]:
    return {
        "heads": p.heads,
        "kv_heads": p.kv_heads,
        "queries_per_kv": p.heads // p.kv_heads,
        "head_dim": p.head_dim,
        "value_dim": p.value_dim,
        "extras": p.extras,
        "batch": p.batch,
        "scale": p.scale,
    }


def _blocks(items: int, heads: int) -> int:
    """Blocks per head: one per item, or as many as a grid can have, each then taking several."""
    return max(1, min(items, LARGEST_GRID // heads))


def _recipe(kernel: str, constants, blocks: int, block, shared: int, values) -> Recipe:
    assert 0 < blocks <= LARGEST_GRID and shared <= SHARED, (kernel, blocks, shared)
    return recipe(kernel, constants, blocks, block, shared, values)


@contextlib.contextmanager
def use_family(family: str) -> Iterator[None]:
    """Plan inside the block with one family of kernels, in every thread: for tests and benchmarks.

    "auto" is the default: the small-window kernels where `small.pays` says they pay, else those of
    `mma` where they pay, else the portable ones, which run everything. "portable" takes those
    always; "small" and "mma" take the others wherever they can run and raise ValueError, with the
    reason, where they cannot; "apart" is "small", each side of a backward pass in a launch of its
    own.
    """
    global _family
    if family not in FAMILIES:
        raise ValueError(f"a family of kernels is one of {', '.join(FAMILIES)}, got {family!r}.")
    before, _family = _family, family
    forget()
    try:
        yield
    finally:
        _family = before
        forget()


def family_in_use() -> str:
    """The family that `use_family` asks for."""
    return _family


_generation = 0


def generation() -> int:
    """A number that changes whenever the same call may be planned otherwise than before."""
    return _generation


def forget() -> None:
    """Plan anew from now on."""
    global _generation
    _generation += 1
    for planned in (choices, part, backward):
        planned.cache_clear()


def _use_small(p: Problem) -> bool:
    """Whether this call runs on the small-window kernels."""
    return _family in ("auto", "small", "apart") and _takes(small, "small-window", p)


def _use_mma(p: Problem) -> bool:
    """Whether a call that no small-window kernel runs goes to the other tensor-core kernels."""
    return _family in ("auto", "mma") and _takes(mma, "tensor-core", p)


def _takes(family, called: str, p: Problem) -> bool:
    """Whether kernels run `p`: where they pay, or where they are all that was asked for."""
    reason, forced = family.why_not(p), _family != "auto"
    if forced and reason:
        raise ValueError(
            f"the {called} kernels cannot run this call: {reason}; plan it with "
            "family 'auto' or 'portable'."
        )
    return not reason and (forced or family.pays(p))


@lru_cache(maxsize=4096)
def choices(p: Problem, side: str) -> tuple[Choice, ...]:
    """The ways to run one side of `p` that are worth measuring, all legal, the default first."""
    if side == BOTH:
        if not joins(p, True):
            return (APART,)
        return (*(("joint", *cut.shape) for cut, _ in small_tiles.joint_tiles(p)), APART)
    portable = [("portable", *tile) for tile in _portable_tiles(p, _heads(p, side))]
    if _use_small(p):
        cut = [("small", *tile.shape) for tile in small_tiles.ranked(p, side)]
        return tuple([*cut, portable[0]] if _family == "auto" else cut)
    if _use_mma(p):
        cut = ("mma", *mma.tile(p))
        return (cut, portable[0]) if _family == "auto" else (cut,)
    return tuple(portable)


def _heads(p: Problem, side: str) -> int:
    """Heads that blocks divide among them."""
    return p.kv_heads if side == KEYS else p.heads


@lru_cache(maxsize=4096)
def part(p: Problem, side: str, rpb: bool = False, choice: Choice | None = None) -> Plan:
    """The launches of one side: forward, the gradient of the query, those of keys and values, both.

    `rpb` asks the query side for the gradient of the bias. Raises ValueError for a `choice` that
    is not `legal`.
    """
    choice = choices(p, side)[0] if choice is None else choice
    if not legal(p, side, choice):
        raise ValueError(f"this call runs as one of {choices(p, side)}, got {choice}.")
    family, *tile = choice
    return _PARTS[family, side](p, tuple(tile), rpb)


def legal(p: Problem, side: str, choice: Choice) -> bool:
    """Whether one side of `p` can run so: a family that takes it, a tile within its bounds."""
    if not choice or any(type(n) is not int for n in choice[1:]):
        return False
    family, tile = choice[0], choice[1:]
    if side == BOTH:
        joint = family == "joint" and joins(p, True) and small_tiles.joint_tile(p, tile) is not None
        return choice == APART or joint
    if family == "small":
        return not small.why_not(p) and tile in {t.shape for t in small_tiles.tiles(p, side)}
    if family == "mma":
        return not mma.why_not(p) and tile == mma.tile(p)
    most = THREADS // sharing(p.dtype, p.head_dim, p.value_dim).lanes
    fits = len(tile) == p.rank and all(0 < t <= n for t, n in zip(tile, p.groups, strict=True))
    return family == "portable" and fits and prod(tile) <= most


def forward(p: Problem, choice: Choice | None = None) -> Plan:
    """The launch that computes `out` and `lse`."""
    return part(p, FORWARD, False, choice)


@lru_cache(maxsize=4096)
def backward(
    p: Problem,
    keys: bool,
    rpb: bool,
    extras: bool,
    query_choice: Choice | None = None,
    key_choice: Choice | None = None,
    both: Choice | None = None,
) -> Plan:
    """The launches of the gradients: always of the query (it makes delta), others as asked for.

    `keys` asks for keys and values, `rpb` for the bias, `extras` for additional keys and values.
    """
    if fuses(p, keys) and query_choice is None and key_choice is None:
        return _dense_backward(p, rpb)
    if joins(p, keys) and both != APART and query_choice is None and key_choice is None:
        return part(p, BOTH, rpb, both)
    plans = [part(p, QUERIES, rpb, query_choice)]
    if keys:
        plans.append(part(p, KEYS, False, key_choice))
    if extras and p.extras:
        plans.append(_extra_side(p))
    return Plan(
        tuple(one for plan in plans for one in plan.recipes),
        (delta_of(p), *(array for plan in plans for array in plan.scratch)),
    )


def fuses(p: Problem, keys: bool) -> bool:
    """Whether one kernel computes all gradients, which leaves nothing to choose per side."""
    return keys and _use_small(p) and small.fuses(p)


def joins(p: Problem, keys: bool) -> bool:
    """Whether one launch may compute all gradients, by blocks of both sides."""
    return keys and _family != "apart" and _use_small(p) and not fuses(p, keys) and small.joins(p)


def delta_of(p: Problem) -> tuple[str, int, bool]:
    """The scratch array that the query side writes and the others read."""
    return ("delta", p.batch * p.heads * p.tokens, False)


def _forward(p: Problem, tile: tuple[int, ...], rpb: bool) -> Plan:
    share = sharing(p.dtype, p.head_dim, p.value_dim)
    tiling = _tiling(p, tile, share.row_bytes, 0)
    step = forward_step(p.dtype, share, p.hood.kernel_size[-1])
    values = {**tiling.values, **_sizes(p), **views(p), "items": tiling.items}
    made = _recipe(
        "na_fwd",
        _constants(p, share, STEP=step, RPB=int(p.rpb)),
        p.heads * _blocks(tiling.items, p.heads),
        (tiling.threads, 1, 1),
        (tiling.capacity + 1) * share.row_bytes,
        values,
    )
    return Plan((made,))


def _mma_query_side(p: Problem, tile: tuple[int, ...], rpb: bool) -> Plan:
    return _with_bias_sums(p, rpb, *mma.query_side(p, rpb, _most_tables(p)))


def _small_query_side(p: Problem, tile: tuple[int, ...], rpb: bool) -> Plan:
    return _with_bias_sums(p, rpb, *small.query_side(p, rpb, _most_tables(p), tile))


def _joint(p: Problem, tile: tuple[int, ...], rpb: bool) -> Plan:
    return _with_bias_sums(p, rpb, *small.both_sides(p, rpb, _most_tables(p), tile))


def _apart(p: Problem, tile: tuple[int, ...], rpb: bool) -> Plan:
    return backward(p, True, rpb, False, both=APART)


def _dense_backward(p: Problem, rpb: bool) -> Plan:
    return _with_bias_sums(p, rpb, *small.dense_backward(p, rpb, _most_tables(p)))


def _most_tables(p: Problem) -> int:
    return min(BLOCKS, SCRATCH // (p.heads * p.biases * 4))


def _with_bias_sums(p: Problem, rpb: bool, made: Recipe, slices: int) -> Plan:
    size = p.heads * p.biases
    if not rpb:
        return Plan((made,))
    total = _sum("F32", size, slices, "partial", "d_rpb")
    return Plan((made, total), (("partial", slices * size, False),))


def _query_side(p: Problem, tile: tuple[int, ...], rpb: bool) -> Plan:
    share = sharing(p.dtype, p.head_dim, p.value_dim)
    tiling = _tiling(p, tile, share.row_bytes, p.sum_size if rpb else 0)
    pitch = tiling.capacity | 1
    table = tiling.slots * pitch * p.sum_size if rpb else 0
    blocks = _blocks(tiling.items, p.heads)
    if rpb:  # every block writes a table of its own: bound their number and their memory
        fit = SCRATCH // (p.heads * p.biases * p.sum_size)
        blocks = min(blocks, max(1, min(-(-BLOCKS // p.heads), fit)))
    step = backward_step(p.dtype, share)
    made = _recipe(
        "na_bwd_dq",
        _constants(p, share, STEP=step, RPB=int(p.rpb), RPB_GRAD=int(rpb)),
        p.heads * blocks,
        (tiling.threads, 1, 1),
        (tiling.capacity + 1) * share.row_bytes + table,
        {**tiling.values, **_sizes(p), **views(p), "items": tiling.items, "pitch": pitch},
    )
    if not rpb:
        return Plan((made,))
    size = p.heads * p.biases
    total = _sum("F64" if p.dtype == "F64" else "F32", size, blocks, "partial", "d_rpb")
    return Plan((made, total), (("partial", blocks * size, True),))


def _key_side(p: Problem, tile: tuple[int, ...], rpb: bool) -> Plan:
    share = sharing(p.dtype, p.head_dim, p.value_dim)
    row_bytes = share.row_bytes + 2 * p.sum_size
    tiling = _tiling(p, tile, row_bytes, 0)
    step = backward_step(p.dtype, share)
    made = _recipe(
        "na_bwd_dkv",
        _constants(p, share, STEP=step, RPB=int(p.rpb)),
        p.kv_heads * _blocks(tiling.items, p.kv_heads),
        (tiling.threads, 1, 1),
        (tiling.capacity + 1) * row_bytes,
        {**tiling.values, **_sizes(p), **views(p), "items": tiling.items},
    )
    return Plan((made,))


def _extra_side(p: Problem) -> Plan:
    share = sharing(p.dtype, p.head_dim, p.value_dim)
    # As many slices of the queries in a block as there is room for, and as scratch allows.
    columns = p.batch * p.kv_heads * p.extras * (p.head_dim + p.value_dim)
    fit = max(1, SCRATCH // (columns * p.sum_size))
    groups = THREADS // share.lanes
    keys = min(groups, 1 << (p.extras - 1).bit_length())
    threads = max(32, keys * min(groups // keys, 1 << (fit.bit_length() - 1)) * share.lanes)
    slices_here = threads // share.lanes // keys
    rounds = -(-p.extras // keys)
    slice_blocks = min(
        -(-p.tokens // (8 * slices_here)),  # eight queries for every slice
        -(-BLOCKS // (p.batch * p.kv_heads * rounds)),
        max(1, fit // slices_here),
    )
    slices = slice_blocks * slices_here
    blocks = p.batch * p.kv_heads * rounds * slice_blocks
    values = {**_sizes(p), **views(p), **array("length", p.shape, 1)}
    first = _recipe(
        "na_bwd_extra",
        _constants(p, share),
        min(blocks, LARGEST_GRID),
        (threads, 1, 1),
        0,
        {**values, "keys": keys, "slices": slices, "blocks": blocks},
    )
    recipes, scratch = [rename(first, d_key="partial_key", d_value="partial_value")], []
    for dim, partial, out in (
        (p.head_dim, "partial_key", "d_extra_key"),
        (p.value_dim, "partial_value", "d_extra_value"),
    ):
        size = p.batch * p.extras * p.kv_heads * dim
        recipes.append(_sum(p.dtype, size, slices, partial, out))
        scratch.append((partial, slices * size, False))
    return Plan(tuple(recipes), tuple(scratch))


def _sum(dtype: str, size: int, slices: int, partial: str, out: str) -> Recipe:
    """Add `slices` arrays of `size` numbers, always in the same order."""
    results, rows = (8, 128) if slices >= MANY_SLICES else (32, THREADS // 32)
    made = _recipe(
        "reduce_partials",
        (("SCALAR", dtype), ("ACCESS", 16), ("LANES", 1)),
        min(-(-size // results), LARGEST_GRID),
        (results, rows, 1),
        0,
        {"size": size, "slices": slices},
    )
    return rename(made, partial=partial, out=out)


_PARTS = {
    ("portable", FORWARD): _forward,
    ("portable", QUERIES): _query_side,
    ("portable", KEYS): _key_side,
    ("mma", FORWARD): lambda p, tile, rpb: mma.forward(p),
    ("mma", QUERIES): _mma_query_side,
    ("mma", KEYS): lambda p, tile, rpb: mma.key_side(p),
    ("small", FORWARD): lambda p, tile, rpb: small.forward(p, tile),
    ("small", QUERIES): _small_query_side,
    ("small", KEYS): lambda p, tile, rpb: small.key_side(p, tile),
    ("joint", BOTH): _joint,
    ("apart", BOTH): _apart,
}
