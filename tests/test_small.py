"""The small-window kernels against the float64 oracle, and the counts that make them fast.

Without a GPU the very PTX that NVRTC made runs in the interpreter, with its checks for bounds,
alignment, unwritten memory and races; with one, the same table runs on it.
"""

import importlib.util
import random
from importlib import resources
from math import prod

import oracle
import pytest
import torch
from kernel_cases import BF16, F16, Case, cotangents, inputs, truth
from ptxsim import Checks
from ptxsim.errors import PtxCheckError
from ptxsim.launcher import PtxLauncher, compile_with_natcupy
from test_kernels import Gpu, Interpreter, check, run
from tolerances import close

from natcupy.cuda import ops, plan
from natcupy.cuda.source import use_sources

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("cupy") is None, reason="NVRTC comes with CuPy, which is not installed"
)


def case(name, shape, kernel_size, why, dim=32, **more):
    more = {"heads": 1, "dtype": BF16, "rpb": True} | more
    more = {"kv_heads": more["heads"]} | more
    return Case(name, shape, kernel_size, why, head_dim=dim, value_dim=dim, **more)


CASES = (
    case("nat", (14, 14), 7, "a whole map, two blocks of columns, one of them ragged", heads=2),
    case("odd rows", (9, 11), 7, "the last pair of rows has one row"),
    case("barely larger", (8, 8), 7, "windows that can move by one", dim=64, dtype=F16),
    case("wide", (10, 75), (5, 7), "two strips of columns, unequal windows", dtype=F16),
    case("tall", (45, 9), (7, 3), "several tiles of rows"),
    case("even", (12, 19), (4, 6), "even windows lean left", dtype=F16),
    case("nine", (19, 20), 9, "the widest window: all 16 columns of a step"),
    case("nine, 64", (11, 18), (9, 8), "the same with longer rows", dim=64),
    case("far border", (26, 26), 9, "18 query columns see a tile of keys", dtype=F16),
    case("three", (7, 17), 3, "most of a step is masked", dim=64),
    case("one row", (5, 30), (1, 9), "a window of one row: every pair is staggered", dtype=F16),
    case("one column", (20, 9), (9, 1), "a window of one column"),
    case("row dense", (7, 20), 7, "one axis is one window, the other is not"),
    case("remainder", (23, 25), 5, "groups of unequal length", dilation=(2, 3), dtype=F16),
    case("dilated", (16, 30), (3, 7), "groups of several tiles", dilation=(4, 2), heads=2),
    case("dense", (7, 7), 7, "a map of one window", heads=4, batch=2),
    case("dense, 64", (7, 7), 7, "the same with longer rows", dim=64, heads=3, dtype=F16),
    case("dense groups", (14, 21), 7, "the largest dilation", dilation=(2, 3), heads=2),
    case("dense even", (8, 12), (4, 6), "an even number of rows, two unused columns",
         dilation=2, dtype=F16),
    case("dense 3 x 8", (3, 8), (3, 8), "rectangular, all columns used"),
    case("dense nine", (9, 9), 9, "one window, but two blocks of columns"),
    case("no bias", (14, 15), 7, "the mask alone", rpb=False),
    case("dense, no bias", (7, 7), 7, "no mask but for unused columns", rpb=False, dim=64),
    case("packed", (9, 10), 5, "q, k, v in one tensor, read in place", heads=2, layout="packed"),
    case("heads first", (9, 10), 5, "[B, heads, N, D] memory", heads=2, layout="heads first"),
    case("grouped heads", (9, 18), 7, "query heads share keys", heads=6, kv_heads=2, dtype=F16),
    case("grouped dense", (7, 7), 7, "and all their queries", heads=4, kv_heads=2, batch=2),
    case("scale", (8, 10), 3, "a given, negative scale", scale=-0.4, dtype=F16),
)  # fmt: skip


@pytest.fixture(params=["interpreter", pytest.param("gpu", marks=pytest.mark.gpu)])
def engine(request):
    if request.param == "gpu" and not torch.cuda.is_available():
        pytest.skip("no CUDA GPU here")
    with plan.use_family("small"):
        yield Gpu() if request.param == "gpu" else Interpreter()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_oracle(case, engine):
    check(case, engine)


def named(name):
    return next(case for case in CASES if case.name == name)


def random_case(rng, number):
    """Any call the kernels take, kept small."""
    kernel, dilation, shape = [], [], []
    for _ in range(2):
        k, d = rng.randint(1, 9), rng.choice((1, 1, 1, 2, 3))
        kernel.append(k)
        dilation.append(d)
        shape.append(k * d + rng.choice((0, 0, 1, rng.randint(0, 12))))
    kv_heads = rng.choice((1, 2))
    return case(
        f"random {number}", tuple(shape), tuple(kernel), "", dilation=tuple(dilation),
        dim=rng.choice((32, 64)), dtype=rng.choice((F16, BF16)), rpb=rng.random() < 0.7,
        kv_heads=kv_heads, heads=kv_heads * rng.choice((1, 1, 2)), batch=rng.choice((1, 2)),
        layout=rng.choice(("contiguous", "heads first")),
    )  # fmt: skip


@pytest.mark.parametrize("number", range(6))
def test_random_calls(number, engine):
    check(random_case(random.Random(number), number), engine, seed=number)


@pytest.mark.parametrize(
    ("arch", "dtype"), [("75", F16), ("86", F16), ("89", BF16), ("90a", BF16), ("100a", F16)]
)
def test_every_architecture(arch, dtype):
    """Other instructions on sm_75 (no asynchronous copies, k8 products), other tiles elsewhere."""
    given = case("architecture", (9, 18), 5, "", dtype=dtype)
    with plan.use_family("small"):
        check(given, Interpreter(arch))


@pytest.mark.parametrize("name", ["odd rows", "grouped dense"])
def test_random_schedules(name):
    """Warps in any order: a missing barrier shows as a race, and the bits stay the same."""
    given = named(name)
    tensors, cotangent = inputs(given), cotangents(given)
    with plan.use_family("small"):
        first = run(given, Interpreter(), tensors, *cotangent)
        second = run(given, Interpreter(seed=3), tensors, *cotangent)
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    for key, gradient in first[2].items():
        assert torch.equal(second[2][key], gradient), key


def test_blocks_that_take_several_tiles(engine, monkeypatch):
    """Few tables of bias sums: a block walks many tiles and images, the bits are the truth's."""
    monkeypatch.setattr(plan, "BLOCKS", 3)
    check(case("several", (17, 10), 3, "", batch=2, heads=2, dilation=(1, 2)), engine)


def test_inputs_are_not_written():
    given = named("even")
    interpreter = Interpreter()
    tensors, cotangent = inputs(given), cotangents(given)
    interpreter.launcher.protect(*(x for x in tensors.values() if x is not None), *cotangent)
    with plan.use_family("small"):
        run(given, interpreter, tensors, *cotangent)


# ------------------------------------------------------------------------------------------------
# numbers at the edge


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_scores_that_climb(dtype, engine):
    """Every later key row scores far higher: the accumulated sums are rescaled each time."""
    given = case("climb", (9, 9), 7, "", dtype=dtype, rpb=False)
    tensors = inputs(given, engine.device)
    ramp = torch.linspace(1, 400, 81, device=engine.device).view(1, 9, 9, 1, 1)
    tensors["query"] = torch.ones_like(tensors["query"]).requires_grad_()
    tensors["key"] = (torch.ones_like(tensors["key"]) * ramp / 8).to(dtype).requires_grad_()
    d_out, d_lse = cotangents(given, engine.device)
    out, lse, gradients = run(given, engine, tensors, d_out, d_lse)
    true_out, true_lse, _ = truth(given, tensors, d_out, d_lse)
    close(out, true_out, dtype)
    close(lse / 300, true_lse / 300, lse.dtype)
    assert all(x.isfinite().all() for x in gradients.values())


def test_bias_of_minus_infinity(engine):
    """A bias may hide keys, the first rows of a window too."""
    given = case("hidden", (9, 8), 5, "", dtype=F16)
    tensors = {
        n: None if x is None else x.detach() for n, x in inputs(given, engine.device).items()
    }
    tensors["rpb"][:, :6] = float("-inf")
    hood = given.hood
    with engine.active():
        out, lse = ops.attention(*list(tensors.values())[:3], hood, given.factor, tensors["rpb"],
                                 None, None)  # fmt: skip
    double = {n: None if x is None else x.cpu().double() for n, x in tensors.items()}
    true_out, true_lse = oracle.attention(
        double["query"], double["key"], double["value"], hood.kernel_size, hood.stride,
        hood.dilation, hood.is_causal, given.factor, double["rpb"], None, None,
    )  # fmt: skip
    seen = true_lse.isfinite()
    assert seen.any() and not seen.all()
    close(out.cpu()[seen], true_out[seen], F16)
    close(lse.cpu()[seen], true_lse[seen], lse.dtype)
    assert not out.cpu()[~seen].isfinite().any()


# ------------------------------------------------------------------------------------------------
# counts


def counts(given, arch="90a"):
    """Counters of every small-window kernel by entry, in units of the tensors' sectors."""
    checks = Checks(races=False, uninitialised=False, traffic=True)
    launcher = PtxLauncher(arch, checks=checks)
    engine = Interpreter(arch)
    engine.launcher = launcher
    with plan.use_family("small"):
        run(given, engine, inputs(given), *cotangents(given))
    unit = given.batch * prod(given.shape) * given.heads * given.head_dim * 2 / 32
    return {
        record.recipe.spec.entry: (record.counters, unit)
        for record in launcher.records
        if "small" in record.recipe.spec.entry
    }


# (case, reads of forward, dq, dkv in tensors: the halo twice and the own tile once or more)
NAT = case("56", (56, 56), 7, "level 1 of NAT: tiles of 8 x 56")
HALO = 2 * (2 * 11 + 5 * 14) / 56  # keys and values of border and inner tiles
INVERSE = 2 * (2 * 14 + 3 * 14 + 2 * 14 + 2 * 1) / 56
TRAFFIC = (
    (NAT, 1 + HALO, 3 + HALO, 2 + INVERSE),
    # no figure for dq: it reads 5.7 tensors where the design counts 5.35, not yet explained
    (case("dense", (7, 7), 7, "", heads=8, rpb=False), 3, None, 4),
    (case("dense 64", (14, 14), 7, "", dilation=2, dim=64, rpb=False, heads=2), 3, 5, 4),
    (case("28", (28, 28), 7, "level 2, longer rows", dim=64, rpb=False), None, None, None),
)


@pytest.mark.parametrize(("given", "forward", "queries", "keys"), TRAFFIC, ids=lambda x: str(x))
def test_traffic(given, forward, queries, keys):
    """No bank conflict in a main loop; every row is moved as often as the tiles say."""
    made = counts(given)
    reads = dict(zip(("fwd", "bwd_dq", "bwd_dkv"), (forward, queries, keys), strict=True))
    writes = {"fwd": 1, "bwd_dq": 1, "bwd_dkv": 2}
    for name, (counters, unit) in made.items():
        part, traffic = name.removeprefix("na2d_small_"), counters.traffic
        for kind in ("cp.async", "shared read", "shared write"):
            # Outside the loops, where tables are added up, a hundredth may conflict.
            allowed = 1.01 if part == "bwd_dq" and kind == "shared read" and given.rpb else 1
            assert traffic[f"{kind} wavefronts"] <= traffic[f"{kind} ideal"] * allowed, (name, kind)
        if reads[part] is not None:
            extra = scalars(given, part)
            assert traffic["global read sectors"] <= 1.05 * (reads[part] + extra[0]) * unit, name
            assert traffic["global write sectors"] <= 1.05 * (writes[part] + extra[1]) * unit, name
        assert not any("local" in kind for kind in traffic), name


def scalars(given, part):
    """Log-sum-exp, delta and the gradient of the former, read and written, in tensors."""
    one = 4 / (given.head_dim * 2)
    # A row of 7 numbers touches up to two sectors, a strided one a sector per number.
    one *= {1: 1.15 if given.shape[1] == 56 else 2.0, 2: 8.0}[given.hood.dilation[1]]
    return {"fwd": (0.05, one), "bwd_dq": (2 * one + 0.1, one + 0.1), "bwd_dkv": (3.6 * one, 0)}[
        part
    ]


# ------------------------------------------------------------------------------------------------
# planted mistakes must be found

MISTAKES = {
    "no barrier after staging": (
        "na2d_small_fwd.cu", "    copies_done();\n    __syncthreads();", "    copies_done();"),
    "no wait for copies": ("na2d_small_fwd.cu", "    copies_done();\n", ""),
    "a window one row too low": (
        "na2d_small_fwd.cu", "const unsigned skip = (from - top) * line;",
        "const unsigned skip = (from - top + 1) * line;"),
    "a column mask one too wide": (
        "na2d_small_fwd.cu", "key < seen.end;", "key <= seen.end;"),
    "staggered rows taken as aligned": (
        "na2d_small_fwd.cu", "if (!DENSE && two &&", "if (false &&"),
    "no rescaling": ("na2d_small_fwd.cu", "if (i > 0) {", "if (false) {"),
    "table without its first row": ("small.cuh", "BIAS_ROWS - 1;", "BIAS_ROWS;"),
    "words swapped in a store": ("small.cuh", '"r"(w[1]), "r"(w[2])', '"r"(w[2]), "r"(w[1])'),
    "columns past the map stored": (
        "na2d_small_fwd.cu", "const bool write = column < width &&", "const bool write ="),
    "bias sums not flushed": (
        "na2d_small_bwd_dq.cu", "if (__any_sync(0xFFFFFFFFu, other)) flush", "if (false) flush"),
    "lanes add all at once": (
        "na2d_small_bwd_dq.cu", "if (lane / 4 == turn)", "if (turn == 0)"),
    "no barrier between tiles": (
        "na2d_small_bwd_dq.cu", "        __syncthreads();  // the keys", "        // the keys"),
    "rows past the map weigh": (
        "na2d_small_bwd_dq.cu", "real ? p.lse[token] * (float)LOG2_E : -minus_infinity()",
        "p.lse[token] * (float)LOG2_E"),
    "no gradient of the log-sum-exp": ("na2d_small_bwd_dq.cu", "if (p.d_lse)", "if (false)"),
    "second query block forgotten": (
        "na2d_small_bwd_dkv.cu", "begin < to; begin += COLUMNS", "begin < to; begin += 64"),
    "query columns counted twice": ("na2d_small_bwd_dkv.cu", "query >= begin && ", ""),
    "heads of a group not staged": (
        "na2d_small_bwd_dkv.cu", "if (pass == 0 || g.queries_per_kv > 1)",
        "if (pass == 0 && member == 0)"),
    "rows of keys not masked": (
        "na2d_small_bwd_dkv.cu",
        "if (!(row + side >= seen.begin && row + side < seen.end)) continue;", ""),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_planted_mistakes_are_found(mistake, tmp_path, monkeypatch):
    file, right, wrong = MISTAKES[mistake]
    for found in resources.files("natcupy.kernels").iterdir():
        if found.name.endswith((".cu", ".cuh")):
            text = found.read_text()
            assert found.name != file or text.count(right) == 1, "the text to spoil has changed"
            (tmp_path / found.name).write_text(text.replace(right, wrong))
    given = case("planted", (9, 13), (3, 5), "", dtype=F16, heads=2, kv_heads=1, batch=2)
    if file.startswith("na2d_small_bwd_dkv") and "query" in mistake:
        given = case("planted, wide", (5, 26), (5, 9), "", dtype=F16)
    monkeypatch.setattr(plan, "BLOCKS", 1)  # a block takes several tiles
    plan.backward.cache_clear()

    def compile_here(spec, arch):
        return compile_with_natcupy(spec, arch)

    engine = Interpreter()
    engine.launcher = PtxLauncher("80", compile_ptx=compile_here)
    with (
        plan.use_family("small"),
        use_sources(tmp_path),
        pytest.raises((PtxCheckError, AssertionError)),
    ):
        check(given, engine)
