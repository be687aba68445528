"""The table of tiles: legal on every architecture it names, and each row as cheap as it says."""

import json
import re
from dataclasses import replace
from math import prod
from pathlib import Path

import pytest
from test_plan import problem

from natcupy.cuda import heuristics, plan, small, small_tiles
from natcupy.cuda.heuristics import (
    ARCHITECTURES,
    BOTH,
    CLASSES,
    FORWARD,
    KEYS,
    QUERIES,
    ROWS,
    SIDES,
    WIDE,
)

ROOT = Path(__file__).parent.parent
HEADS = {(14, 14): 8, (28, 28): 4, (56, 56): 2, (112, 200): 2}
IDS = [f"{row.archs} {row.side} {row.width}" for row in ROWS]


def nat(shape, arch, **more):
    """A layer of NAT on a map."""
    heads = more.pop("heads", HEADS.get(shape, 2))
    more = {"dtype": "F16", "batch": 128, "head_dim": 32, "dilation": (1, 1)} | more
    dilation, dim = more.pop("dilation"), more["head_dim"]
    return problem(shape, (7, 7), (1, 1), dilation, (False, False), arch=arch, heads=heads,
                   kv_heads=heads, value_dim=dim, rpb=True, **more)  # fmt: skip


def cover_of(row, arch):
    """The row's tile on its own map."""
    p = nat(heuristics.MAPS[row.width], arch)
    return p, small_tiles._cover(p, row.side, small_tiles.tile(p, row.side, (*row.tile, 1)))


def test_every_class_has_its_rows():
    have = [(row.archs, row.side, row.width) for row in ROWS]
    assert have == [(c, side, w) for c in CLASSES for side in SIDES for w in (16, 32, 64, WIDE)]
    assert sorted(arch for archs in CLASSES.values() for arch in archs) == sorted(ARCHITECTURES)


@pytest.mark.parametrize("row", ROWS, ids=IDS)
def test_rows_are_legal(row):
    """Shared memory, threads and registers, on every architecture of the class."""
    for arch in CLASSES[row.archs]:
        _, cover = cover_of(row, arch)
        chip = ARCHITECTURES[arch]
        assert cover.shared <= heuristics.block_limit(arch) <= chip.shared * 1024
        assert 1 <= cover.warps <= small_tiles.WARPS and 32 * cover.warps <= 1024
        assert heuristics.resident(arch, cover) >= 1


@pytest.mark.parametrize("row", ROWS, ids=IDS)
def test_rows_are_justified(row):
    """What was counted is so, and no legal tile costs less; a measured row has its record."""
    if isinstance(row.why, heuristics.Measured):
        record = json.loads((ROOT / "benchmarks/results" / row.why.record).read_text())
        assert any(found["case"] == row.why.case for found in record["rows"])
        return
    arch = CLASSES[row.archs][0]
    p, cover = cover_of(row, arch)
    blocks = heuristics.resident(arch, cover)
    counted = (round(cover.halo, 2), blocks, blocks * cover.warps)
    assert counted == (row.why.halo, row.why.blocks, row.why.warps)
    costs = [
        heuristics.cost(arch, row.side, small_tiles._cover(p, row.side, tile))
        for tile in small_tiles.tiles(p, row.side)
    ]
    assert heuristics.cost(arch, row.side, cover) == min(costs)


def test_rows_are_what_runs():
    for row in ROWS:
        for arch in CLASSES[row.archs]:
            p = nat(heuristics.MAPS[row.width], arch)
            assert small_tiles.tile(p, row.side).shape == (*row.tile, 1)


def test_registers_are_those_of_the_compile_table():
    """As many warps as the plan counts on fit the registers that the compiler allots.

    Not for float32 windows beyond 9: there a block less fits than is counted on.
    """
    table = json.loads((ROOT / "tests/small_resources.json").read_text())["kernels"]
    sides = {f"na2d_small_{name}": side for side, name in
             ((FORWARD, "fwd"), (QUERIES, "bwd_dq"), (KEYS, "bwd_dkv"), (BOTH, "bwd"))}  # fmt: skip
    for name, (registers, *_) in table.items():
        entry, _, rest = name.partition("(")
        dtype = re.search(r"SCALAR=(\w+)", rest)[1]
        dim, height = (int(re.search(rf"{what}=(\d+)", rest)[1]) for what in
                       ("HEAD_DIM", "KERNEL_HEIGHT"))  # fmt: skip
        if dtype == "F32" and height > 9:
            continue
        # Registers are half as many from sm_80 on, where the plan counts on twice the warps.
        p = nat((56, 56), 90 if "CROWDED=1" in rest else 75, dtype=dtype, head_dim=dim)
        p = replace(p, hood=replace(p.hood, kernel_size=(height, height)))
        if entry == "na2d_small_bwd_dense":
            warps = small.DENSE_RESIDENT
        else:
            warps = small_tiles._warps(p, sides[entry])[1]
        assert "CROWDED=1" not in rest or warps == small_tiles.CROWD[sides[entry]]
        assert warps * 32 * -(-registers // 8) * 8 <= 65536, name


def test_a_small_grid_gets_smaller_tiles():
    """One image must not leave most of the GPU idle."""
    for shape in HEADS:
        p, many = nat(shape, 90, batch=1), nat(shape, 90)
        one = small_tiles._cover(p, FORWARD, small_tiles.tile(p, FORWARD))
        full = small_tiles.tile(many, FORWARD)
        assert one.grid >= min(100, prod(shape) * HEADS[shape] // 16)
        assert one.shape[0] * one.shape[1] <= full.blocks * full.rows


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_choice_is_legal(arch):
    """Where no row decides: other windows, longer rows, few images, dense groups."""
    for shape in ((7, 7), (9, 31), (57, 64), (200, 15)):
        for dim in small.DIMS:
            for batch in (1, 3, 200):
                for dilation in ((1, 1), (1, shape[1] // 7)):
                    p = nat(shape, arch, head_dim=dim, batch=batch, heads=6, dilation=dilation)
                    for side in SIDES:
                        tile = small_tiles.tile(p, side)
                        assert tile.shared <= heuristics.block_limit(arch)
                        assert 1 <= tile.warps <= small_tiles.WARPS
                        assert small_tiles.tile(p, side, tile.shape) == tile
                        assert 6 % tile.heads_here == 0


def test_unknown_architectures_take_the_nearest_older():
    assert heuristics.architecture(92) is ARCHITECTURES[90]
    assert heuristics.architecture(61) is ARCHITECTURES[75]
    assert heuristics.arch_class(999) == "100 KiB"


def test_tiles_that_are_not_legal_are_refused():
    with pytest.raises(ValueError, match="is no tile of this call"):
        small_tiles.tile(nat((14, 14), 90), FORWARD, (1, 3, 1, 1))


def test_families():
    assert heuristics.family("BF16", 9) == "small"
    assert heuristics.family("BF16", 8) == heuristics.family("F64", 49) == "portable"
    p = nat((14, 14), 90)
    assert plan.forward(p).recipes[0].spec.entry == "na2d_small_fwd"
