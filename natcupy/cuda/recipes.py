"""The words of a plan: a call in numbers, and a launch without its pointers.

In: sizes, strides and field values by name. Out: `Problem`, `Recipe` and `Plan`, and `fill`, which
turns a recipe and data pointers into a `Launch`. Nothing here touches a device.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod

from natcupy.cuda.launch import Launch
from natcupy.cuda.params import pack
from natcupy.cuda.source import Spec
from natcupy.cuda.tiling import ITEM_SIZE
from natcupy.neighborhood import Neighborhood


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
    arch: int  # compute capability without the dot, 80 or 120
    alignment: int  # of all pointers, a power of two, at most 16
    strides: tuple[tuple[str, tuple[int, ...]], ...]  # tensor name -> (batch, *axes, head)
    tf32: bool = False  # whether float32 products may keep 11 bits only

    @property
    def rank(self) -> int:
        """Number of spatial axes."""
        return len(self.shape)

    @property
    def tokens(self) -> int:
        """Tokens of one image."""
        return prod(self.shape)

    @property
    def groups(self) -> tuple[int, ...]:
        """Tokens of the longest dilation group per axis."""
        return tuple(-(-n // d) for n, d in zip(self.shape, self.hood.dilation, strict=True))

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

    @cached_property
    def launch(self) -> Launch:
        """The launch with null pointers, checked once for all that have others."""
        return Launch(self.spec, self.grid, self.block, self.shared, self.args)


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
    return recipe.launch.with_args(bytes(args))


# ------------------------------------------------------------------------------------------------
# arguments by name


def array(name: str, entries, filler: int) -> dict[str, int]:
    """Fields of an array of three, filled up."""
    entries = (*entries, *(filler,) * (3 - len(entries)))
    return {f"{name}.{i}": int(entry) for i, entry in enumerate(entries)}


def view(name: str, strides: tuple[int, ...]) -> dict[str, int]:
    """Fields of a `View`."""
    batch, *axes, head = strides
    return {f"{name}.batch": batch, f"{name}.head": head, **array(f"{name}.axis", axes, 0)}


def geometry(p: Problem, tile: tuple[int, ...], stage: tuple[int, ...]) -> dict[str, int]:
    """Fields of a `Geometry`: tiles of `tile` tokens, boxes of `stage`."""
    tiles = tuple(-(-n // t) for n, t in zip(p.groups, tile, strict=True))
    return {
        **array("geometry.length", p.shape, 1),
        **array("geometry.kernel_size", p.hood.kernel_size, 1),
        **array("geometry.stride", p.hood.stride, 1),
        **array("geometry.dilation", p.hood.dilation, 1),
        **array("geometry.causal", p.hood.is_causal, 0),
        **array("geometry.tile", tile, 1),
        **array("geometry.tiles", tiles, 1),
        **array("geometry.stage", stage, 1),
        "geometry.capacity": prod(stage),
    }


def contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a row-major [*shape], without the last axis."""
    strides, step = [], 1
    for extent in reversed(shape):
        strides.append(step)
        step *= max(extent, 1)
    return tuple(reversed(strides))[:-1]


# ------------------------------------------------------------------------------------------------
# how rows are read


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


def views(p: Problem) -> dict[str, int]:
    """Strides of all tensors; those not given are fresh and contiguous, or absent."""
    every = (p.batch, *p.shape)
    absent = {f"{name}.{part}": 0 for name in ("extra_key", "extra_value") for part in _PARTS}
    return {
        **absent,
        **view("out", contiguous((*every, p.heads, p.value_dim))),
        **view("d_query", contiguous((*every, p.heads, p.head_dim))),
        **view("d_key", contiguous((*every, p.kv_heads, p.head_dim))),
        **view("d_value", contiguous((*every, p.kv_heads, p.value_dim))),
        **{k: v for name, strides in p.strides for k, v in view(name, strides).items()},
    }


_PARTS = ("batch", "head", "axis.0", "axis.1", "axis.2")


def recipe(
    kernel: str, constants, blocks: int, block, shared: int, values: Mapping[str, int | float]
) -> Recipe:
    """A launch of `blocks` blocks on the x axis; `values` are the fields of its struct by name."""
    args, pointers = pack(kernel, values)
    return Recipe(Spec(f"{kernel}.cu", constants), (blocks, 1, 1), block, shared, args, pointers)


def rename(made: Recipe, **names: str) -> Recipe:
    """The same launch on arrays of other names."""
    pointers = tuple((names.get(name, name), offset) for name, offset in made.pointers)
    return Recipe(made.spec, made.grid, made.block, made.shared, made.args, pointers)
