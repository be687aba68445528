"""The memory traffic of the small-window kernels: sectors moved, and no bank conflicts."""

import importlib.util
from dataclasses import replace

import pytest
import torch
from kernel_cases import F16, F32, cotangents, inputs
from planted import spoil
from ptxsim import Checks
from ptxsim.launcher import PtxLauncher
from small_cases import case, forget_plans
from small_traffic import expected
from test_kernels import Interpreter, run

from natcupy.cuda import heuristics, ops, plan
from natcupy.cuda.source import use_sources

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("cupy") is None, reason="NVRTC comes with CuPy, which is not installed"
)


def counts(given, arch="90a", family="small"):
    """Counters of every small-window kernel by entry."""
    checks = Checks(races=False, uninitialised=False, traffic=True)
    launcher = PtxLauncher(arch, checks=checks)
    engine = Interpreter(arch)
    engine.launcher = launcher
    with plan.use_family(family):
        run(given, engine, inputs(given), *cotangents(given))
    return {
        record.recipe.spec.entry: record.counters
        for record in launcher.records
        if "small" in record.recipe.spec.entry
    }


TRAFFIC = (
    case("56", (56, 56), 7, "level 1 of NAT"),
    case("dense", (7, 7), 7, "a row of 7 numbers beside rows of 64 bytes", heads=8, rpb=False),
    case("dense groups", (28, 14), 7, "", dilation=(4, 2), rpb=False, heads=2),
    case("dense 64", (14, 14), 7, "", dilation=2, dim=64, rpb=False, heads=2),
    case("28", (28, 28), 7, "level 2, longer rows", dim=64, rpb=False),
    case("thirteen", (15, 26), 13, "steps of 24 columns"),
    case("float", (14, 14), 7, "rows of 128 bytes", dtype=F32),
    case("float 64", (7, 9), 7, "rows of 256 bytes", dim=64, dtype=F32, rpb=False),
    case("float dense", (7, 7), 7, "two rows to a step", heads=4, dtype=F32),
)


@pytest.mark.parametrize(
    ("given", "family"),
    [*((given, "small") for given in TRAFFIC), (TRAFFIC[0], "apart"), (TRAFFIC[5], "apart")],
    ids=str,
)
def test_traffic(given, family):
    """No bank conflict in a main loop; every row is moved as often as the tiles say."""
    made, predicted = counts(given, family=family), expected(given)
    for name, counters in made.items():
        traffic = counters.traffic
        conflicts_are_rare(name, traffic, given.rpb)
        for kind, sectors in zip(("read", "write"), predicted[name], strict=True):
            actual = traffic[f"global {kind} sectors"]
            assert abs(actual - sectors) <= 0.05 * sectors, (name, kind, actual, sectors)
        assert not any("local" in kind for kind in traffic), name


def conflicts_are_rare(name, traffic, rpb):
    for kind in ("cp.async", "shared read", "shared write"):
        # Outside the loops, where tables are added up, some may conflict.
        allowed = (
            1.02 if name.endswith(("dq", "bwd", "dense")) and rpb and kind != "cp.async" else 1
        )
        assert traffic[f"{kind} wavefronts"] <= traffic[f"{kind} ideal"] * allowed, (name, kind)


# Warp instructions of the forward kernel's PTX per fragment, 2 rows by 8 columns of queries, with
# what a block does before and after: what bounds it where main memory does not.
FRAGMENTS = (
    (case("28", (28, 28), 7, "windows that stagger, in the tile measured fastest"), 56, 825),
    (case("dense", (14, 14), 7, "groups of one window", dilation=2, heads=4), 64, 745),
)


@pytest.fixture
def many_images(monkeypatch):
    """Tiles as for many images: of a GPU so small that one image fills it."""
    sliver = replace(heuristics.architecture(90), multiprocessors=1e-3)
    monkeypatch.setitem(heuristics.ARCHITECTURES, 90, sliver)
    forget_plans()
    yield
    forget_plans()


@pytest.mark.parametrize(("given", "fragments", "most"), FRAGMENTS, ids=str)
def test_instructions_forward(given, fragments, most, many_images):
    engine = Interpreter("90a")
    engine.launcher = PtxLauncher("90a", checks=Checks(races=False, uninitialised=False))
    q, k, v, rpb = list(inputs(given).values())[:4]
    with plan.use_family("small"), engine.active(), torch.no_grad():
        ops.attention(q, k, v, given.hood, given.factor, rpb, None, None)
    (made,) = engine.launcher.records
    assert made.counters.total <= most * fragments, made.counters.total / fragments


@pytest.mark.parametrize("dtype", [F16, F32], ids=str)
def test_a_lost_swizzle_shows_as_bank_conflicts(dtype, tmp_path):
    spoil(tmp_path, "products.cuh", "return chunk ^ (ROW", "return chunk ^ 0 * (ROW")
    given = case("plain", (7, 9), 3, "", dtype=dtype, rpb=False)
    with use_sources(tmp_path):
        made = counts(given)
    for name, counters in made.items():
        with pytest.raises(AssertionError):
            conflicts_are_rare(name, counters.traffic, False)
