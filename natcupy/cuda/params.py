"""Argument structs: one table per kernel comes in, packed bytes go out.

A kernel takes one struct by value. The tables below say its fields in order, the sources declare
the same structs, and a test compares the two, so a scalar of the wrong width cannot travel.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from functools import cache

# (name, type, count) of every field. A pointer is 8 bytes.
GEOMETRY = (
    ("length", "int", 3),
    ("kernel_size", "int", 3),
    ("stride", "int", 3),
    ("dilation", "int", 3),
    ("causal", "int", 3),
    ("tile", "int", 3),
    ("tiles", "int", 3),
    ("stage", "int", 3),
    ("capacity", "int", 1),
)
VIEW = (("data", "pointer", 1), ("batch", "long", 1), ("head", "long", 1), ("axis", "long", 3))
SMALL_GEOMETRY = (
    ("length", "int", 2),
    ("dilation", "int", 2),
    ("tiles", "int", 2),
    *((name, "int", 1) for name in ("rows", "blocks", "splits", "heads_here", "pitch", "staged")),
    *((name, "int", 1) for name in ("heads", "queries_per_kv", "zero")),
    ("by_teams", "Divisor", 1),
    ("by_dilation", "Divisor", 2),
    ("by_tiles", "Divisor", 2),
    ("by_blocks", "Divisor", 1),
    ("by_splits", "Divisor", 1),
)
SCALE = tuple((name, "float", 1) for name in ("plain", "base_two", "inverse", "never"))
DIVISOR = tuple((name, "int", 1) for name in ("number", "times", "shift"))
NESTED = {
    "Geometry": GEOMETRY,
    "View": VIEW,
    "SmallGeometry": SMALL_GEOMETRY,
    "Divisor": DIVISOR,
    "Scale": SCALE,
}
PARAMS = {
    "na_fwd": (
        ("geometry", "Geometry", 1),
        ("heads", "int", 1),
        ("queries_per_kv", "int", 1),
        ("head_dim", "int", 1),
        ("value_dim", "int", 1),
        ("extras", "int", 1),
        ("items", "long", 1),
        ("scale", "double", 1),
        *((name, "View", 1) for name in ("query", "key", "value")),
        *((name, "View", 1) for name in ("extra_key", "extra_value", "out")),
        *((name, "pointer", 1) for name in ("rpb", "lse")),
    ),
    "na_bwd_dq": (
        ("geometry", "Geometry", 1),
        ("heads", "int", 1),
        ("queries_per_kv", "int", 1),
        ("head_dim", "int", 1),
        ("value_dim", "int", 1),
        ("extras", "int", 1),
        ("pitch", "int", 1),
        ("items", "long", 1),
        ("scale", "double", 1),
        *((name, "View", 1) for name in ("query", "key", "value")),
        *((name, "View", 1) for name in ("extra_key", "extra_value")),
        *((name, "View", 1) for name in ("out", "d_out", "d_query")),
        *((name, "pointer", 1) for name in ("rpb", "lse", "d_lse", "delta", "partial")),
    ),
    "na_bwd_dkv": (
        ("geometry", "Geometry", 1),
        ("heads", "int", 1),
        ("kv_heads", "int", 1),
        ("queries_per_kv", "int", 1),
        ("head_dim", "int", 1),
        ("value_dim", "int", 1),
        ("items", "long", 1),
        ("scale", "double", 1),
        *((name, "View", 1) for name in ("query", "key", "value")),
        *((name, "View", 1) for name in ("d_out", "d_key", "d_value")),
        *((name, "pointer", 1) for name in ("rpb", "lse", "delta")),
    ),
    "na_bwd_extra": (
        ("length", "int", 3),
        ("heads", "int", 1),
        ("kv_heads", "int", 1),
        ("queries_per_kv", "int", 1),
        ("head_dim", "int", 1),
        ("value_dim", "int", 1),
        ("extras", "int", 1),
        ("keys", "int", 1),
        ("slices", "int", 1),
        ("batch", "int", 1),
        ("blocks", "long", 1),
        ("scale", "double", 1),
        *((name, "View", 1) for name in ("query", "d_out", "extra_key", "extra_value")),
        *((name, "pointer", 1) for name in ("lse", "delta", "d_key", "d_value")),
    ),
    "na_mma_fwd": (
        ("geometry", "Geometry", 1),
        *((name, "int", 1) for name in ("heads", "queries_per_kv", "head_dim", "value_dim")),
        *((name, "int", 1) for name in ("extras", "zero")),
        ("scale", "float", 1),
        *((name, "View", 1) for name in ("query", "key", "value")),
        *((name, "View", 1) for name in ("extra_key", "extra_value", "out")),
        *((name, "pointer", 1) for name in ("rpb", "lse")),
    ),
    "na_mma_bwd_dq": (
        ("geometry", "Geometry", 1),
        *((name, "int", 1) for name in ("heads", "queries_per_kv", "head_dim", "value_dim")),
        *((name, "int", 1) for name in ("extras", "zero", "items")),
        ("scale", "float", 1),
        *((name, "View", 1) for name in ("query", "key", "value")),
        *((name, "View", 1) for name in ("extra_key", "extra_value")),
        *((name, "View", 1) for name in ("out", "d_out", "d_query")),
        *((name, "pointer", 1) for name in ("rpb", "lse", "d_lse", "delta", "partial")),
    ),
    "na_mma_bwd_dkv": (
        ("geometry", "Geometry", 1),
        *((name, "int", 1) for name in ("heads", "kv_heads", "queries_per_kv")),
        *((name, "int", 1) for name in ("head_dim", "value_dim", "zero")),
        ("scale", "float", 1),
        *((name, "View", 1) for name in ("query", "key", "value")),
        *((name, "View", 1) for name in ("d_out", "d_key", "d_value")),
        *((name, "pointer", 1) for name in ("rpb", "lse", "delta")),
    ),
    "na2d_small_fwd": (
        ("geometry", "SmallGeometry", 1),
        ("scale", "Scale", 1),
        *((name, "View", 1) for name in ("query", "key", "value", "out")),
        *((name, "pointer", 1) for name in ("rpb", "lse")),
    ),
    "na2d_small_bwd_dq": (
        ("geometry", "SmallGeometry", 1),
        ("items", "int", 1),
        ("scale", "Scale", 1),
        *((name, "View", 1) for name in ("query", "key", "value", "out", "d_out", "d_query")),
        *((name, "pointer", 1) for name in ("rpb", "lse", "d_lse", "delta", "partial")),
    ),
    "na2d_small_bwd_dkv": (
        ("geometry", "SmallGeometry", 1),
        ("scale", "Scale", 1),
        *((name, "View", 1) for name in ("query", "key", "value", "d_out", "d_key", "d_value")),
        *((name, "pointer", 1) for name in ("rpb", "lse", "delta")),
    ),
    "na2d_small_bwd": (
        *((name, "SmallGeometry", 1) for name in ("geometry", "key_geometry")),
        *((name, "int", 1) for name in ("items", "query_blocks", "key_blocks")),
        ("by_share", "Divisor", 1),
        ("scale", "Scale", 1),
        *((name, "View", 1) for name in ("query", "key", "value", "out", "d_out")),
        *((name, "View", 1) for name in ("d_query", "d_key", "d_value")),
        *((name, "pointer", 1) for name in ("rpb", "lse", "d_lse", "partial")),
    ),
    "na2d_small_bwd_dense": (
        ("geometry", "SmallGeometry", 1),
        ("items", "int", 1),
        ("slots", "int", 1),
        ("scale", "Scale", 1),
        *((name, "View", 1) for name in ("query", "key", "value", "out", "d_out")),
        *((name, "View", 1) for name in ("d_query", "d_key", "d_value")),
        *((name, "pointer", 1) for name in ("rpb", "lse", "d_lse", "partial")),
    ),
    "reduce_partials": (
        ("size", "long", 1),
        ("slices", "int", 1),
        ("partial", "pointer", 1),
        ("out", "pointer", 1),
    ),
}
_CODES = {
    "int": ("i", 4),
    "long": ("q", 8),
    "double": ("d", 8),
    "float": ("f", 4),
    "pointer": ("Q", 8),
}


def flatten(fields, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every scalar of a struct in order, as (dotted name, type); arrays as name.0, name.1, ..."""
    for name, kind, count in fields:
        for i in range(count):
            full = f"{prefix}{name}" if count == 1 else f"{prefix}{name}.{i}"
            if kind in NESTED:
                yield from flatten(NESTED[kind], f"{full}.")
            else:
                yield full, kind


@cache
def layout(kernel: str) -> tuple[struct.Struct, dict[str, int]]:
    """How `kernel`'s argument struct is packed, C's natural alignment, and every offset by name."""
    code, offset, offsets, widest = "<", 0, {}, 1
    for name, kind in flatten(PARAMS[kernel]):
        letter, size = _CODES[kind]
        gap = -offset % size
        code += f"{gap}x{letter}" if gap else letter
        offsets[name] = offset + gap
        offset += gap + size
        widest = max(widest, size)
    return struct.Struct(f"{code}{-offset % widest}x"), offsets


def pack(kernel: str, values: Mapping[str, int | float]) -> tuple[bytes, tuple]:
    """Argument bytes of `kernel` with null pointers, and (name, offset) of every pointer."""
    packer, offsets = layout(kernel)
    kinds = dict(flatten(PARAMS[kernel]))
    row = [0 if kinds[name] == "pointer" else values[name] for name in offsets]
    pointers = tuple(
        (name.removesuffix(".data"), offsets[name]) for name in offsets if kinds[name] == "pointer"
    )
    return packer.pack(*row), pointers
