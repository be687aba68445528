"""The small-window kernels compile for every architecture they are for, without a warning, within
the table; what they may put aside in local memory is bounded.

In CI NAT's own are compiled for every architecture, and every second of the others for one of its
architectures, in turn; `python tests/test_small_compile.py` measures all of them and writes the
table of registers, stack and spilled bytes; do that after a kernel has changed, and read the
difference.
"""

import importlib.util
import json
import re
from itertools import product
from pathlib import Path

import pytest
from compiled import check_table, measure_all, write_table
from test_plan import problem

from natcupy.cuda import jit, plan, small, small_tiles
from natcupy.cuda.heuristics import FORWARD, KEYS

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("cupy") is None, reason="NVRTC comes with CuPy, which is not installed"
)

ARCHS = ("80", "86", "89", "90a", "100a", "120a")
MAPS = ((56, 56), (7, 7))
TABLE = Path(__file__).with_name("small_resources.json")


def specs(dim, dtype, rpb, shape, k=7, arch="90a"):
    p = problem(shape, (k, k), (1, 1), (1, 1), (False, False), head_dim=dim, value_dim=dim,
                dtype=dtype, rpb=rpb, arch=int(arch.rstrip("a")))  # fmt: skip
    with plan.use_family("small"):
        plans = [plan.forward(p), plan.backward(p, True, rpb, False)]
    with plan.use_family("apart"):
        plans.append(plan.backward(p, True, rpb, False))
    found = dict.fromkeys(recipe.spec for made in plans for recipe in made.recipes)
    return [spec for spec in found if spec.entry.startswith("na2d_small")]


def jobs():
    """NAT's own on every architecture, the others on sm_90a and, in float16, on sm_75.

    Floats, and DiNAT's windows of 11, on the architectures whose compilers differ.
    """
    found = {}

    def add(archs, *call, k=7):
        for arch in archs:
            found.update(dict.fromkeys((spec, arch) for spec in specs(*call, k=k, arch=arch)))

    for shape in MAPS:
        add(ARCHS, 32, "BF16", True, shape)
        for dim, dtype, rpb in product((32, 64), ("F16", "BF16"), (False, True)):
            archs = ("90a", "75") if dtype == "F16" and dim == 32 else ("90a",)
            add(archs, dim, dtype, rpb, shape)
        add(("80", "90a", "120a"), 32, "F32", True, shape)
        add(("80", "90a", "120a"), 64, "F32", True, shape)
    for dtype, n in (("BF16", 56), ("BF16", 11), ("F32", 56)):
        add(("90a",), 32, dtype, True, (n, n), k=11)
    for k in (3, 5, 9):
        add(("90a",), 32, "BF16", True, (56, 56), k=k)
    add(("90a",), 64, "BF16", True, (56, 56), k=13)
    return tuple(found)


def sample():
    """What CI compiles."""
    own = {spec for shape in MAPS for spec in specs(32, "BF16", True, shape)}
    others = {}
    for spec, arch in jobs():
        if spec not in own:
            others.setdefault(spec, []).append(arch)
    in_turn = [(spec, archs[i // 2 % len(archs)]) for i, (spec, archs) in enumerate(others.items())]
    return [*product(own, ARCHS), *in_turn[::2]]


@pytest.fixture(scope="module")
def measured():
    return measure_all(sample())


def test_no_warning(measured):
    assert not {name: warnings for name, _, warnings in measured if warnings}


@pytest.mark.parametrize(("dim", "dtype"), product((32, 64), ("F16", "F32")))
def test_blocks_keep_to_the_launch_bounds(dim, dtype):
    """Every legal tile's threads are no more than its kernel is compiled for."""
    p = problem((56, 56), (7, 7), (1, 1), (1, 1), (False, False), head_dim=dim, value_dim=dim,
                dtype=dtype, rpb=True, batch=8, arch=90)  # fmt: skip
    made = {FORWARD: small.forward(p).recipes[0], KEYS: small.key_side(p).recipes[0]}
    for side, recipe in made.items():
        text = jit.compile_spec(recipe.spec, "90a", ptx=True).image.decode()
        most = max(tile.warps for tile in small_tiles.tiles(p, side)) * 32
        assert most <= int(re.search(r"\.maxntid (\d+)", text)[1]), recipe.spec


# Bytes of a thread that crowded kernels may put aside, for twice the warps: numbers that are read
# once for a tile or a pair of rows.
ASIDE = 96


def test_no_spill(measured):
    assert not {name: row for name, row, _ in measured if spills(name, row)}


def test_no_spill_in_the_table():
    """Of every architecture, where CI compiles for one in turn."""
    table = json.loads(TABLE.read_text())["kernels"]
    assert not {name: row for name, row in table.items() if spills(name, row)}


def spills(name, row):
    return max(row[1:]) > ASIDE if "CROWDED=1" in name else any(row[1:])


def test_resources_are_those_of_the_table(measured):
    check_table(TABLE, jobs(), measured, Path(__file__).name)


if __name__ == "__main__":
    write_table(TABLE, jobs())
