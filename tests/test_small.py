"""The small-window kernels against the float64 oracle.

Without a GPU the very PTX that NVRTC made runs in the interpreter, with its checks for bounds,
alignment, unwritten memory and races; with one, the same table runs on it.
"""

import importlib.util
import random

import oracle
import pytest
import torch
from kernel_cases import BF16, F16, F32, cotangents, inputs, truth
from ptxsim import Checks
from ptxsim.launcher import PtxLauncher
from small_cases import case
from small_traffic import plan_of
from test_kernels import Gpu, Interpreter, check, run
from test_plan import problem
from tolerances import close

from natcupy import na2d, neighborhood
from natcupy.cuda import ops, plan, small

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("cupy") is None, reason="NVRTC comes with CuPy, which is not installed"
)


CASES = (
    case("nat", (14, 14), 7, "a whole map, two blocks of columns, one of them ragged", heads=2),
    case("odd rows", (9, 11), 7, "the last pair of rows has one row"),
    case("barely larger", (8, 8), 7, "windows that can move by one", dim=64, dtype=F16),
    case("wide", (10, 75), (5, 7), "two strips of columns, unequal windows", dtype=F16),
    case("tall", (45, 9), (7, 3), "several tiles of rows"),
    case("even", (12, 19), (4, 6), "even windows lean left", dtype=F16),
    case("nine", (19, 20), 9, "the widest window: all 16 columns of a step"),
    case("nine, 64", (11, 18), (9, 8), "the same with longer rows", dim=64),
    case("odd pitch", (9, 22), 7, "one column past the last staged row is read"),
    case("far border", (26, 26), 9, "18 query columns see a tile of keys"),
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
    case("dense row", (2, 16), (1, 8), "one row, in two groups", dilation=2, dtype=F16),
    case("dense row of nine", (2, 18), (1, 9), "one row of two blocks", dilation=2, dtype=F16),
    case("dense row, grouped", (1, 8), (1, 8), "one row, shared keys", heads=2, kv_heads=1),
    case("dense 3 x 8", (3, 8), (3, 8), "rectangular, all columns used"),
    case("dense nine", (9, 9), 9, "one window, but two blocks of columns"),
    case("no bias", (14, 15), 7, "the mask alone", rpb=False),
    case("dense, no bias", (7, 7), 7, "no mask but for unused columns", rpb=False, dim=64),
    case("packed", (9, 10), 5, "q, k, v in one tensor, read in place", heads=2, layout="packed",
         dtype=F16),
    case("heads first", (9, 10), 5, "[B, heads, N, D] memory", heads=2, layout="heads first",
         dtype=F16),
    case("grouped heads", (9, 18), 7, "query heads share keys", heads=6, kv_heads=2),
    case("grouped dense", (7, 7), 7, "and all their queries", heads=4, kv_heads=2, batch=2),
    case("scale", (8, 10), 5, "a given, negative scale", scale=-0.4, dtype=F16),
    case("eleven", (14, 27), 11, "steps of 24 columns, three blocks of queries see a key"),
    case("thirteen", (14, 25), (13, 12), "the same with longer rows", dim=64, dtype=F16),
    case("ten", (21, 12), 10, "even, and one axis dense in some groups", dilation=(2, 1)),
    case("tall window", (15, 8), (13, 2), "many rows of few columns", dtype=F16),
    case("dense thirteen", (13, 13), 13, "two blocks of columns, no mask", heads=2, dtype=F16),
    case("grouped eleven", (22, 11), 11, "dense groups of heads", dilation=(2, 1), heads=2,
         kv_heads=1),
    case("float", (9, 11), 7, "products of floats in three terms", dtype=F32),
    case("float, 64", (7, 9), (3, 7), "the same with longer rows", dim=64, dtype=F32),
    case("float dense", (7, 7), 7, "a map of one window", heads=2, kv_heads=1, dtype=F32),
    case("float dense, 64", (5, 4), (5, 4), "and longer rows", dim=64, dtype=F32, rpb=False),
    case("float packed", (8, 10), (3, 4), "strided and dilated", dilation=2, heads=2,
         layout="packed", dtype=F32),
    case("float eleven", (11, 13), (3, 11), "steps of 24 columns", dtype=F32),
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


TWICE = (
    "nat",
    "odd rows",
    "wide",
    "far border",
    "odd pitch",
    "remainder",
    "heads first",
    "eleven",
    "ten",
)


@pytest.mark.parametrize("name", TWICE)
def test_both_sides_in_launches_of_their_own(name, engine):
    with plan.use_family("apart"):
        check(named(name), engine)


@pytest.mark.parametrize("name", ["nat", "far border", "dilated", "eleven"])
def test_one_launch_or_two(name, engine):
    """The same bits but for the bias: delta is made by the same instructions on both sides."""
    given, found = named(name), []
    for family in ("small", "apart"):
        with plan.use_family(family):
            tensors, cotangent = inputs(given, engine.device), cotangents(given, engine.device)
            found.append(run(given, engine, tensors, *cotangent)[2])
    for name in ("query", "key", "value"):
        assert torch.equal(found[0][name], found[1][name]), name


def random_case(rng, number):
    """Any call the kernels take, kept small."""
    kernel, dilation, shape = [], [], []
    for _ in range(2):
        k, d = rng.choice((rng.randint(1, 9), rng.randint(1, 13))), rng.choice((1, 1, 1, 2, 3))
        kernel.append(k)
        dilation.append(d)
        shape.append(k * d + rng.choice((0, 0, 1, rng.randint(0, 12))))
    kv_heads = rng.choice((1, 2))
    return case(
        f"random {number}", tuple(shape), tuple(kernel), "", dilation=tuple(dilation),
        dim=rng.choice((32, 64)), dtype=rng.choice((F16, BF16, F32)), rpb=rng.random() < 0.7,
        kv_heads=kv_heads, heads=kv_heads * rng.choice((1, 1, 2)), batch=rng.choice((1, 2)),
        layout=rng.choice(("contiguous", "heads first")),
    )  # fmt: skip


@pytest.mark.parametrize("number", range(6))
def test_random_calls(number, engine):
    check(random_case(random.Random(number), number), engine, seed=number)


@pytest.mark.parametrize(
    ("arch", "dtype"),
    [
        ("75", F16),
        ("86", F16),
        ("86", F32),
        ("89", BF16),
        ("90a", BF16),
        ("90a", F32),
        ("100a", F16),
    ],
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


def test_tables_of_many_blocks_are_added(engine):
    """Enough of them that the second stage of their sum has blocks of 1024 threads."""
    given = case("many", (6, 9), 3, "", batch=plan.MANY_SLICES + 5)
    with plan.use_family("small"):
        check(given, engine)
        made = plan.backward(plan_of(given, 90), True, True, False).recipes
    (sums,) = (recipe for recipe in made if recipe.spec.entry == "reduce_partials")
    assert sums.block == (8, 128, 1)


@pytest.mark.parametrize("shape", [(7, 7), (9, 10)], ids=["dense", "joint"])
@pytest.mark.parametrize("lse", [True, False], ids=["lse", "out alone"])
@pytest.mark.parametrize("wanted", ["query", "value", "query key value", "rpb"])
def test_some_gradients_of_one_launch(wanted, lse, shape, engine):
    """One kernel makes those of query, key and value, with or without that of the bias."""
    given = case("some", shape, 7, "", heads=2)
    tensors = {n: x for n, x in inputs(given, engine.device).items() if x is not None}
    d_out, d_lse = cotangents(given, engine.device)
    if not lse:
        d_lse = torch.zeros_like(d_lse)
    _, _, true = truth(given, inputs(given, engine.device), d_out, d_lse)
    for name, tensor in tensors.items():
        tensor.requires_grad_(name in wanted)
    with engine.active():
        out = ops.attention(tensors["query"], tensors["key"], tensors["value"], given.hood,
                            given.factor, tensors["rpb"], None, None)  # fmt: skip
        results, given_to_them = (out, [d_out, d_lse]) if lse else (out[0], d_out)
        made = torch.autograd.grad(results, [tensors[n] for n in wanted.split()], given_to_them)
    for name, gradient in zip(wanted.split(), made, strict=True):
        close(gradient, true[name], given.dtype, name, backward=True)


def test_inputs_are_not_written():
    given = named("even")
    interpreter = Interpreter()
    tensors, cotangent = inputs(given), cotangents(given)
    interpreter.launcher.protect(*(x for x in tensors.values() if x is not None), *cotangent)
    with plan.use_family("small"):
        run(given, interpreter, tensors, *cotangent)


# ------------------------------------------------------------------------------------------------
# which calls


def planned(**changes):
    given = {
        "shape": (28, 28), "kernel_size": (7, 7), "stride": (1, 1), "dilation": (1, 1),
        "causal": (False, False), "head_dim": 32, "value_dim": 32, "dtype": "F32", "arch": 90,
    } | changes  # fmt: skip
    return problem(**given)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": "F64"}, "float16"),
        ({"dtype": "F32", "arch": 75}, "float32 from sm_80 on"),
        ({"dtype": "BF16", "arch": 75}, "bfloat16"),
        ({"head_dim": 48, "value_dim": 48}, "both 32 or both 64"),
        ({"value_dim": 64}, "both 32 or both 64"),
        ({"kernel_size": (7, 14)}, "at most 13"),
        ({"stride": (1, 2)}, "stride 1"),
        ({"causal": (True, False)}, "no causal axis"),
        ({"extras": 1}, "no additional keys"),
        ({"scale": 0.0}, "a scale of"),
        ({"alignment": 8}, "multiples of 16 bytes"),
        ({"scale": 0.0}, "scale"),
        ({"kernel_size": (13, 13), "head_dim": 64, "value_dim": 64, "arch": 86}, "shared memory"),
        ({"shape": (64, 2**21)}, "within 2**32 bytes"),
    ],
    ids=str,
)
def test_calls_they_do_not_take(changes, reason):
    assert not small.why_not(planned())
    assert reason in small.why_not(planned(**changes))


@pytest.mark.parametrize("arch", [75, 80, 86, 90, 120])
@pytest.mark.parametrize("dilation", [1, 2])
def test_a_batch_or_map_of_another_size_compiles_nothing(arch, dilation):
    """So that what a warm-up has prepared is what runs; but a map of one window is of its own."""
    found = set()
    for shape in ((56, 56), (28, 28), (16, 40), (15, 15)):
        for images in (1, 2, 64):
            more = {"dilation": (dilation, dilation), "dtype": "F16", "rpb": True}
            p = planned(shape=shape, batch=images, arch=arch, **more)
            recipes = list(plan.forward(p).recipes)
            for family in ("auto", "apart"):
                with plan.use_family(family):
                    recipes += plan.backward(p, True, True, False).recipes
            specs = {r.spec for r in recipes if r.spec.entry.startswith("na2d_small")}
            found.add(frozenset(specs))
    assert len(found) == 1 and len(*found) == 4


def test_rows_that_lie_far_apart(engine):
    """32 bits of bytes from row to row of a tile: beyond 2**31, of pages that nobody touches."""
    given = case("far", (20, 6), (5, 3), "", dtype=F16)
    step = 2**26
    tensors = inputs(given, engine.device)
    for name in ("query", "key", "value"):
        near = tensors[name].detach()
        far = torch.empty(20 * step, dtype=F16, device=engine.device)
        far = far.as_strided(near.shape, (20 * step, step, 32, 32, 1))
        far.copy_(near)
        tensors[name] = far.requires_grad_()
    d_out, d_lse = cotangents(given, engine.device)
    true = truth(given, tensors, d_out, d_lse)
    with plan.use_family("small"):
        out, _, gradients = run(given, engine, tensors, d_out, d_lse)
    close(out, true[0], given.dtype)
    for name, gradient in gradients.items():
        close(gradient, true[2][name], given.dtype, name, backward=True)


def test_calls_they_should_not_take():
    assert small.pays(planned()) and small.pays(planned(kernel_size=(13, 13), dtype="BF16"))
    assert not small.pays(planned(kernel_size=(2, 4)))
    wide = planned(shape=(56, 56), kernel_size=(11, 11), head_dim=64, value_dim=64)
    assert not small.why_not(wide) and not small.pays(wide)


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


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_scores_that_climb_take_a_second_try_and_no_more(dtype):
    """With the largest scores as references, not key by key as for NaNs: counted instructions."""
    counts = []
    for scale in (0.1, 30.0):
        given, engine = case("steep", (8, 9), 5, "", dtype=dtype, scale=scale), Interpreter()
        tensors = list(inputs(given).values())[:4]
        with plan.use_family("small"), engine.active(), torch.no_grad():
            ops.attention(*tensors[:3], given.hood, given.factor, tensors[3], None, None)
        counts.append(engine.launcher.records[0].counters.instructions)
    plain, steep = (sum(n for op, n in c.items() if op.startswith("mma")) for c in counts)
    assert 1.5 * plain < steep < 4 * plain
    assert sum(counts[1].values()) < 3 * sum(counts[0].values())


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


@pytest.mark.parametrize("dtype", [F16, F32], ids=str)
@pytest.mark.parametrize("name", ["key", "value", "query"])
def test_nan_reaches_its_windows_and_nothing_else(name, dtype, engine):
    kernel_size = (3, 4) if dtype == F32 else 5  # those of CASES, compiled once
    given = case("nan", (9, 11), kernel_size, "", dtype=dtype)
    tensors = {
        n: None if x is None else x.detach() for n, x in inputs(given, engine.device).items()
    }
    with engine.active():
        right, _ = ops.attention(*list(tensors.values())[:3], given.hood, given.factor,
                                 tensors["rpb"], None, None)  # fmt: skip
        tensors[name] = tensors[name].clone()
        tensors[name][0, 3, 5] = float("inf" if name == "value" else "nan")
        out, lse = ops.attention(*list(tensors.values())[:3], given.hood, given.factor,
                                 tensors["rpb"], None, None)  # fmt: skip
    index, _, _ = neighborhood.neighbor_table(given.shape, given.hood, "cpu")
    token = 3 * 11 + 5
    seen = (index == token).any(1) if name != "query" else torch.arange(len(index)) == token
    seen = seen.view(given.shape)
    assert torch.equal(~out.isfinite().all(-1)[0, ..., 0].cpu(), seen)
    close(out[0, ~seen], right[0, ~seen].cpu(), dtype)
    assert lse[0, ~seen].isfinite().all()


# ------------------------------------------------------------------------------------------------
# floats


def error(actual, true):
    return (actual.detach().double() - true).square().mean().sqrt().item()


def as_exact_as_torch(given, family, attend):
    """Root mean square error: forward at most twice, backward three times that of plain torch,
    with tensor cores that truncate where they add."""
    tensors, (d_out, d_lse) = inputs(given), cotangents(given)
    true_out, true_lse, true = truth(given, tensors, d_out, d_lse)
    plain = {n: x.detach().clone().requires_grad_() for n, x in tensors.items() if x is not None}
    torch_out, torch_lse = attend(
        plain["query"], plain["key"], plain["value"], given.kernel_size, rpb=plain["rpb"],
        scale=given.factor, return_lse=True, backend="torch",
    )  # fmt: skip
    grads = torch.autograd.grad([torch_out, torch_lse], list(plain.values()), [d_out, d_lse])
    engine = Interpreter()
    engine.launcher = PtxLauncher("80", checks=Checks(truncated_sums=True))
    with plan.use_family(family):
        out, lse, gradients = run(given, engine, tensors, d_out, d_lse)
    assert error(out, true_out) <= 2 * error(torch_out, true_out)
    assert error(lse, true_lse) <= 2 * error(torch_lse, true_lse)
    for name, by_torch in zip(plain, grads, strict=True):
        assert error(gradients[name], true[name]) <= 3 * error(by_torch, true[name]), name


def keeps_11_bits(given, family):
    """Where torch allows TF32 a product has one term: less exact than floats, and not by much."""
    tensors, cotangent = inputs(given), cotangents(given)
    true_out, _, true = truth(given, tensors, *cotangent)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with plan.use_family(family):
            out, _, gradients = run(given, Interpreter(), tensors, *cotangent)
    finally:
        torch.set_float32_matmul_precision(before)
    for actual, wanted in [(out, true_out), *((gradients[n], true[n]) for n in gradients)]:
        assert 2e-5 < (actual.double() - wanted).abs().max() / wanted.abs().max() < 3e-3


@pytest.mark.parametrize("dim", [32, 64])
def test_floats_are_as_exact_as_torch(dim):
    given = case("exact", (8, 9), 7 if dim == 32 else (3, 7), "", dtype=F32, dim=dim)
    as_exact_as_torch(given, "small", na2d)


def test_one_term_where_torch_allows_tf32():
    keeps_11_bits(case("tf32", (6, 9), 3, "", dtype=F32), "small")
