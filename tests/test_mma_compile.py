"""The tensor-core kernels for any window compile for every architecture they are for.

In CI halves of 64 are compiled for every second architecture, and every sixth of the others for one
in turn; `python tests/test_mma_compile.py` measures all of them and writes the table of registers,
stack and spilled bytes; do that after a kernel has changed, and read the difference.
"""

import importlib.util
import json
import re
from itertools import product
from math import prod
from pathlib import Path

import pytest
from compiled import check_table, measure_all, write_table
from test_plan import problem

from natcupy.cuda import jit, launch, mma, plan

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("cupy") is None, reason="NVRTC comes with CuPy, which is not installed"
)

ARCHS = ("80", "86", "89", "90a", "100a", "120a")
MAPS = {1: ((4096,), (63,)), 2: ((64, 64), (21, 21)), 3: ((8, 28, 28), (3, 7, 7))}
TABLE = Path(__file__).with_name("mma_resources.json")


def recipes(rank, dim, dtype, rpb, arch="90a", value_dim=None, tf32=False, shape=None, kernel=None):
    shape, kernel = shape or MAPS[rank][0], kernel or MAPS[rank][1]
    p = problem(shape, kernel, (1,) * rank, (1,) * rank, (False,) * rank, head_dim=dim,
                value_dim=value_dim or dim, dtype=dtype, rpb=rpb, tf32=tf32,
                arch=int(arch.rstrip("a")))  # fmt: skip
    with plan.use_family("mma"):
        plans = (plan.forward(p), plan.backward(p, True, rpb, False))
    found = [recipe for made in plans for recipe in made.recipes]
    return [recipe for recipe in found if recipe.spec.entry.startswith("na_mma")]


def specs(*call, **more):
    return [recipe.spec for recipe in recipes(*call, **more)]


def jobs():
    """Every kind of row and rank on sm_90a; halves of 64 numbers on all, some on sm_75."""
    found = {}

    def add(archs, *call, **more):
        for arch in archs:
            found.update(dict.fromkeys((spec, arch) for spec in specs(*call, arch=arch, **more)))

    for rank in MAPS:
        add(ARCHS, rank, 64, "BF16", False)
        add(("75",), rank, 32, "F16", False)
        for dim, rpb in product((32, 64, 128), (False, True)):
            add(("90a",), rank, dim, "BF16", rpb)
        for dim in (32, 64):
            add(("90a", "80"), rank, dim, "F32", False)
        add(("90a",), rank, 32, "F32", True)
    add(("90a",), 1, 64, "F16", True)
    add(("90a",), 1, 64, "BF16", False, shape=(64,))
    for dims in ((64, 128), (128, 64)):
        add(("90a",), 3, dims[0], "BF16", False, value_dim=dims[1])
    add(("80", "90a"), 1, 64, "F32", False, tf32=True)
    for dim in (32, 64):  # tables of biases in global memory
        add(("80", "90a"), 2, dim, "BF16", True, kernel=(63, 63))
    return tuple(found)


def sample():
    """What CI compiles."""
    own = set(specs(3, 64, "BF16", False))
    others = {}
    for spec, arch in jobs():
        if spec not in own:
            others.setdefault(spec, []).append(arch)
    in_turn = [(spec, archs[i // 2 % len(archs)]) for i, (spec, archs) in enumerate(others.items())]
    return [*product(own, ARCHS[::2]), *in_turn[::6]]


@pytest.fixture(scope="module")
def measured():
    return measure_all(sample())


def test_no_warning(measured):
    assert not {name: warnings for name, _, warnings in measured if warnings}


@pytest.mark.parametrize("dims", [(32, 32), (64, 64), (64, 128), (128, 64), (128, 128)])
@pytest.mark.parametrize("rank", [1, 3])
def test_blocks_keep_to_their_bounds(rank, dims):
    """The threads of a tile are those that the kernel is compiled for, its own shared memory no
    more than the plan and the launcher leave it."""
    for recipe in recipes(rank, dims[0], "BF16", False, value_dim=dims[1]):
        text = jit.compile_spec(recipe.spec, "90a", ptx=True).image.decode()
        warps = dict(recipe.spec.constants)["WARPS"]
        assert int(re.search(r"\.maxntid (\d+)", text)[1]) == 32 * warps
        own = sum(map(int, re.findall(r"\.shared .*?\[(\d+)\];", text)))
        assert 0 < own <= mma.OWN_SHARED - 128
        assert own + 128 + launch.WITHOUT_ASKING <= 48 * 1024


def test_tiles_have_whole_warps():
    for shape, kernel in MAPS.values():
        tile, fragment = mma._tile(shape, kernel, (1,) * len(shape))
        assert prod(tile) in mma.SIZES and prod(fragment) == mma.FRAGMENT


# Bytes of a thread that the kernels may put aside, for twice the warps.
ASIDE = 128


def test_no_spill_in_the_table():
    """Of halves without a bias nothing in the loop over turns; of every architecture."""
    table = json.loads(TABLE.read_text())["kernels"]
    assert not {name: row for name, row in table.items() if max(row[1:]) > ASIDE}
    plain = {n: row for n, row in table.items() if "RPB=0" in n and "F32" not in n}
    assert not {name: row for name, row in plain.items() if max(row[1:]) > 32}


def test_resources_are_those_of_the_table(measured):
    check_table(TABLE, jobs(), measured, Path(__file__).name)


if __name__ == "__main__":
    write_table(TABLE, jobs())
