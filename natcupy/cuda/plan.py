"""Plans: which kernels run, with which constants, grid, block, shared memory and arguments.

In: a `Problem`, plain numbers that describe a call. Out: a `Plan`, a few `Recipe`s in order and the
scratch memory they share; `fill` turns a recipe and data pointers into a `Launch`. Nothing here
touches a device: it is arithmetic, cached, and testable anywhere.

Only what shapes the code is compiled in (dtype, rank, lanes, rpb or not); sizes, strides and tiles
are arguments, so a new image size compiles nothing.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from math import prod

from natcupy.cuda.launch import Launch
from natcupy.cuda.params import pack
from natcupy.cuda.source import Spec
from natcupy.cuda.tiling import (
    ITEM_SIZE,
    THREADS,
    Sharing,
    backward_step,
    choose_stage,
    choose_tile,
    forward_step,
    halo_of,
    sharing,
)
from natcupy.neighborhood import Neighborhood

LARGEST_DIM = 512  # head_dim and value_dim; beyond, a row no longer fits its lanes' registers
LARGEST_IMAGE = 2**30  # tokens; window arithmetic adds two lengths in 32 bits
LARGEST_BIAS = 2**31 - 1  # entries of a head's bias table, indexed in 32 bits
LARGEST_GRID = 2**31 - 1  # blocks on the x axis, the only one used
SHARED = 48 * 1024 - 256  # bytes every architecture gives unasked, but for a kernel's own few
BLOCKS = 1024  # blocks that keep any GPU busy: a bound for two-stage sums
SCRATCH = 64 * 2**20  # bytes of partial sums of one gradient


@dataclass(frozen=True)
class Problem:
    """One call in numbers. Strides are in elements, without the last axis, which is 1."""

    dtype: str  # "F16", "BF16", "F32", "F64"
    batch: int
    shape: tuple[int, ...]  # tokens per axis
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    extras: int  # additional keys and values
    hood: Neighborhood
    scale: float
    rpb: bool
    alignment: int  # of all pointers, a power of two, at most 16
    strides: tuple[tuple[str, tuple[int, ...]], ...]  # tensor name -> (batch, *axes, head)

    @property
    def rank(self) -> int:
        """Number of spatial axes."""
        return len(self.shape)

    @property
    def tokens(self) -> int:
        """Tokens of one image."""
        return prod(self.shape)

    @property
    def biases(self) -> int:
        """Entries of one head's bias table."""
        return prod(2 * k - 1 for k in self.hood.kernel_size)

    @property
    def sum_size(self) -> int:
        """Bytes of a number in registers and partial sums."""
        return 8 if self.dtype == "F64" else 4


@dataclass(frozen=True)
class Recipe:
    """One launch but for its pointers: `args` has zeros where `pointers` says (name, offset)."""

    spec: Spec
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int
    args: bytes = field(repr=False)
    pointers: tuple[tuple[str, int], ...] = field(repr=False)


@dataclass(frozen=True)
class Plan:
    """Recipes in order of launch, and scratch arrays by name: (name, numbers, must be zero)."""

    recipes: tuple[Recipe, ...]
    scratch: tuple[tuple[str, int, bool], ...] = ()


def fill(recipe: Recipe, pointers: Mapping[str, int]) -> Launch:
    """The launch of `recipe` on these addresses; a pointer that is not named is null."""
    args = bytearray(recipe.args)
    for name, offset in recipe.pointers:
        struct.pack_into("<Q", args, offset, pointers.get(name, 0))
    return Launch(recipe.spec, recipe.grid, recipe.block, recipe.shared, bytes(args))


# ------------------------------------------------------------------------------------------------
# arguments by name


def _array(name: str, entries, filler: int) -> dict[str, int]:
    entries = (*entries, *(filler,) * (3 - len(entries)))
    return {f"{name}.{i}": int(entry) for i, entry in enumerate(entries)}


def _view(name: str, strides: tuple[int, ...]) -> dict[str, int]:
    batch, *axes, head = strides
    return {f"{name}.batch": batch, f"{name}.head": head, **_array(f"{name}.axis", axes, 0)}


def contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a row-major [*shape], without the last axis."""
    strides, step = [], 1
    for extent in reversed(shape):
        strides.append(step)
        step *= max(extent, 1)
    return tuple(reversed(strides))[:-1]


# ------------------------------------------------------------------------------------------------
# how rows are read, how blocks cover a map


def access(problem: Problem) -> int:
    """The widest access in bytes that every pointer, stride and row length allows."""
    size = ITEM_SIZE[problem.dtype]
    bits = 16 | problem.alignment | problem.head_dim * size | problem.value_dim * size
    extents = {
        "extra_key": (problem.batch, problem.extras, problem.kv_heads),
        "extra_value": (problem.batch, problem.extras, problem.kv_heads),
        "key": (problem.batch, *problem.shape, problem.kv_heads),
        "value": (problem.batch, *problem.shape, problem.kv_heads),
    }
    every = (problem.batch, *problem.shape, problem.heads)
    for name, strides in problem.strides:
        for extent, stride in zip(extents.get(name, every), strides, strict=True):
            if extent > 1:
                bits |= stride * size
    return bits & -bits


@dataclass(frozen=True)
class Tiling:
    """How blocks cover a problem: `Geometry` in numbers, items, threads and staged tokens."""

    values: Mapping[str, int]
    items: int
    threads: int
    slots: int
    capacity: int


def _tiling(p: Problem, share: Sharing, row_bytes: int, per_slot: int, heads: int) -> Tiling:
    """Cover `p`; a staged token costs `row_bytes` and `per_slot` bytes for each slot of a block."""
    hood = p.hood
    groups = tuple(-(-n // d) for n, d in zip(p.shape, hood.dilation, strict=True))
    most = THREADS // share.lanes
    copies = p.batch * heads * prod(hood.dilation)
    tile = choose_tile(groups, hood.kernel_size, hood.stride, most, copies)
    threads = -(-prod(tile) * share.lanes // 32) * 32
    slots = threads // share.lanes
    # One row more than the capacity stays zero, and a table row is padded to an odd length.
    room = SHARED - row_bytes - 16 - slots * per_slot
    capacity = room // (row_bytes + slots * per_slot)
    stage = choose_stage(halo_of(groups, hood.kernel_size, hood.stride, tile), capacity)
    tiles = tuple(-(-n // t) for n, t in zip(groups, tile, strict=True))
    values = {
        **_array("geometry.length", p.shape, 1),
        **_array("geometry.kernel_size", hood.kernel_size, 1),
        **_array("geometry.stride", hood.stride, 1),
        **_array("geometry.dilation", hood.dilation, 1),
        **_array("geometry.causal", hood.is_causal, 0),
        **_array("geometry.tile", tile, 1),
        **_array("geometry.tiles", tiles, 1),
        **_array("geometry.stage", stage, 1),
        "geometry.capacity": prod(stage),
    }
    items = p.batch * prod(tiles) * prod(hood.dilation)
    return Tiling(values, items, threads, slots, prod(stage))


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


def _views(p: Problem) -> dict[str, int]:
    """Strides of all tensors; those not given are fresh and contiguous, or absent."""
    every = (p.batch, *p.shape)
    absent = {f"{name}.{part}": 0 for name in ("extra_key", "extra_value") for part in _PARTS}
    return {
        **absent,
        **_view("out", contiguous((*every, p.heads, p.value_dim))),
        **_view("d_query", contiguous((*every, p.heads, p.head_dim))),
        **_view("d_key", contiguous((*every, p.kv_heads, p.head_dim))),
        **_view("d_value", contiguous((*every, p.kv_heads, p.value_dim))),
        **{k: v for name, strides in p.strides for k, v in _view(name, strides).items()},
    }


_PARTS = ("batch", "head", "axis.0", "axis.1", "axis.2")


def _blocks(items: int, heads: int) -> int:
    """Blocks per head: one per item, or as many as a grid can have, each then taking several."""
    return max(1, min(items, LARGEST_GRID // heads))


def _recipe(kernel: str, constants, blocks: int, block, shared: int, values) -> Recipe:
    args, pointers = pack(kernel, values)
    assert 0 < blocks <= LARGEST_GRID and shared <= SHARED, (kernel, blocks, shared)
    return Recipe(Spec(f"{kernel}.cu", constants), (blocks, 1, 1), block, shared, args, pointers)


@lru_cache(maxsize=4096)
def forward(p: Problem) -> Plan:
    """The launch that computes `out` and `lse`."""
    share = sharing(p.dtype, p.head_dim, p.value_dim)
    tiling = _tiling(p, share, share.row_bytes, 0, p.heads)
    step = forward_step(p.dtype, share, p.hood.kernel_size[-1])
    values = {**tiling.values, **_sizes(p), **_views(p), "items": tiling.items}
    recipe = _recipe(
        "na_fwd",
        _constants(p, share, STEP=step, RPB=int(p.rpb)),
        p.heads * _blocks(tiling.items, p.heads),
        (tiling.threads, 1, 1),
        (tiling.capacity + 1) * share.row_bytes,
        values,
    )
    return Plan((recipe,))


@lru_cache(maxsize=4096)
def backward(p: Problem, keys: bool, rpb: bool, extras: bool) -> Plan:
    """The launches of the gradients: always of the query (it makes delta), others as asked for.

    `keys` asks for keys and values, `rpb` for the bias, `extras` for additional keys and values.
    """
    plans = [_query_side(p, rpb)]
    if keys:
        plans.append(_key_side(p))
    if extras and p.extras:
        plans.append(_extra_side(p))
    return Plan(
        tuple(recipe for plan in plans for recipe in plan.recipes),
        (
            ("delta", p.batch * p.heads * p.tokens, False),
            *(array for plan in plans for array in plan.scratch),
        ),
    )


def _query_side(p: Problem, rpb: bool) -> Plan:
    share = sharing(p.dtype, p.head_dim, p.value_dim)
    tiling = _tiling(p, share, share.row_bytes, p.sum_size if rpb else 0, p.heads)
    pitch = tiling.capacity | 1
    table = tiling.slots * pitch * p.sum_size if rpb else 0
    blocks = _blocks(tiling.items, p.heads)
    if rpb:  # every block writes a table of its own: bound their number and their memory
        fit = SCRATCH // (p.heads * p.biases * p.sum_size)
        blocks = min(blocks, max(1, min(-(-BLOCKS // p.heads), fit)))
    step = backward_step(p.dtype, share)
    recipe = _recipe(
        "na_bwd_dq",
        _constants(p, share, STEP=step, RPB=int(p.rpb), RPB_GRAD=int(rpb)),
        p.heads * blocks,
        (tiling.threads, 1, 1),
        (tiling.capacity + 1) * share.row_bytes + table,
        {**tiling.values, **_sizes(p), **_views(p), "items": tiling.items, "pitch": pitch},
    )
    if not rpb:
        return Plan((recipe,))
    size = p.heads * p.biases
    total = _sum("F64" if p.dtype == "F64" else "F32", size, blocks, "partial", "d_rpb")
    return Plan((recipe, total), (("partial", blocks * size, True),))


def _key_side(p: Problem) -> Plan:
    share = sharing(p.dtype, p.head_dim, p.value_dim)
    row_bytes = share.row_bytes + 2 * p.sum_size
    tiling = _tiling(p, share, row_bytes, 0, p.kv_heads)
    step = backward_step(p.dtype, share)
    recipe = _recipe(
        "na_bwd_dkv",
        _constants(p, share, STEP=step, RPB=int(p.rpb)),
        p.kv_heads * _blocks(tiling.items, p.kv_heads),
        (tiling.threads, 1, 1),
        (tiling.capacity + 1) * row_bytes,
        {**tiling.values, **_sizes(p), **_views(p), "items": tiling.items},
    )
    return Plan((recipe,))


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
    values = {**_sizes(p), **_views(p), **_array("length", p.shape, 1)}
    first = _recipe(
        "na_bwd_extra",
        _constants(p, share),
        min(blocks, LARGEST_GRID),
        (threads, 1, 1),
        0,
        {**values, "keys": keys, "slices": slices, "blocks": blocks},
    )
    recipes, scratch = [_rename(first, d_key="partial_key", d_value="partial_value")], []
    for dim, partial, out in (
        (p.head_dim, "partial_key", "d_extra_key"),
        (p.value_dim, "partial_value", "d_extra_value"),
    ):
        size = p.batch * p.extras * p.kv_heads * dim
        recipes.append(_sum(p.dtype, size, slices, partial, out))
        scratch.append((partial, slices * size, False))
    return Plan(tuple(recipes), tuple(scratch))


def _sum(dtype: str, size: int, slices: int, partial: str, out: str) -> Recipe:
    """Add `slices` arrays of `size` numbers in order."""
    recipe = _recipe(
        "reduce_partials",
        (("SCALAR", dtype), ("ACCESS", 16), ("LANES", 1)),
        min(-(-size // 32), LARGEST_GRID),
        (32, THREADS // 32, 1),
        0,
        {"size": size, "slices": slices},
    )
    return _rename(recipe, partial=partial, out=out)


def _rename(recipe: Recipe, **names: str) -> Recipe:
    pointers = tuple((names.get(name, name), offset) for name, offset in recipe.pointers)
    return Recipe(recipe.spec, recipe.grid, recipe.block, recipe.shared, recipe.args, pointers)
