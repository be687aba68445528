"""The tensor-core kernels for any window against the float64 oracle.

Without a GPU the very PTX that NVRTC made runs in the interpreter, with its checks for bounds,
alignment, unwritten memory and races; with one, the same table runs on it.
"""

import importlib.util
import random

import oracle
import pytest
import torch
from kernel_cases import BF16, F16, F32, Case, cotangents, inputs, truth
from test_kernels import Gpu, Interpreter, check, run
from test_small import as_exact_as_torch, keeps_11_bits
from tolerances import close

from natcupy import na1d, neighborhood
from natcupy.cuda import mma, ops, plan

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("cupy") is None, reason="NVRTC comes with CuPy, which is not installed"
)


def case(name, shape, kernel_size, why, dim=32, **more):
    given = {"dtype": BF16, "head_dim": dim, "value_dim": dim}
    return Case(name, shape, kernel_size, why, **given | more)


CASES = (
    case("line", (150,), 37, "two tiles, ragged", heads=2, kv_heads=2),
    case("short line", (9,), 3, "most of a tile is empty", dtype=F16),
    case("long window", (300,), 201, "several turns of keys, most seen by all", dim=64),
    case("map", (20, 27), (5, 9), "tiles at every border", heads=2, kv_heads=2),
    case("bias", (14, 14), 7, "biases at every border", rpb=True, dtype=F16),
    case("bias, line", (70,), 23, "biases of full blocks as well", rpb=True),
    case("volume", (4, 9, 13), (3, 4, 5), "three axes", rpb=True, dtype=F16),
    case("thin volume", (3, 40, 2), (3, 5, 2), "a last axis of two"),
    case("remainder", (23, 25), 5, "groups of unequal length", dilation=(2, 3)),
    case("stride", (21, 30), (7, 6), "shared windows", stride=(3, 2), rpb=True),
    case("blocked", (64,), 16, "stride = window: blocks seen by whole tiles", stride=16, dim=64),
    case("causal", (40, 11), (9, 4), "one causal axis", is_causal=(True, False), dtype=F16),
    case("causal stride", (90,), 21, "causal, strided and dilated", stride=5, dilation=2,
         is_causal=True, rpb=True),
    case("grouped heads", (9, 18), 7, "query heads share keys", heads=6, kv_heads=2, rpb=True),
    case("extras", (7, 20), (3, 5), "additional keys: more than a turn", extras=70, batch=2),
    case("one extra", (5, 6, 7), 3, "a line of one token beside three axes", extras=1, rpb=True),
    case("everything", (6, 7, 9), (2, 3, 4), "every feature at once", stride=(1, 2, 3),
         dilation=(2, 1, 1), is_causal=(False, True, False), heads=4, kv_heads=2, head_dim=40,
         value_dim=72, extras=3, batch=2, rpb=True, dtype=F16, scale=-0.3),
    case("dim 8", (40,), 9, "a quarter of a part", dim=8),
    case("dim 48", (30,), 9, "three quarters of a part", dim=48, rpb=True),
    case("dim 96", (9, 9), 5, "a part and a half", dim=96, dtype=F16),
    case("dim 128", (12, 11), 5, "two parts", dim=128, heads=2, kv_heads=1),
    case("wider values", (7, 16), 5, "parts of values alone", head_dim=16, value_dim=128),
    case("wider keys", (7, 16), 5, "parts of keys alone", head_dim=104, value_dim=24, rpb=True),
    case("packed", (9, 10), 5, "q, k, v in one tensor, read in place", heads=2, kv_heads=2,
         layout="packed", dtype=F16),
    case("heads first", (9, 10), 5, "[B, heads, N, D] memory", heads=2, kv_heads=2,
         layout="heads first"),
    case("scale", (33,), 9, "a given, negative scale", scale=-0.7, rpb=True, dtype=F16),
    case("no scale", (33,), 9, "all keys weigh alike", scale=0.0),
    case("float", (70,), 23, "products of floats in three terms", dtype=F32, heads=2, rpb=True),
    case("float volume", (3, 7, 9), (2, 3, 5), "longer rows", dim=64, dtype=F32, extras=3),
    case("float, odd dims", (9, 14), 5, "rows of 20 and 44 floats", head_dim=20, value_dim=44,
         dtype=F32, heads=2, kv_heads=1, is_causal=(False, True)),
)  # fmt: skip


@pytest.fixture(params=["interpreter", pytest.param("gpu", marks=pytest.mark.gpu)])
def engine(request):
    if request.param == "gpu" and not torch.cuda.is_available():
        pytest.skip("no CUDA GPU here")
    with plan.use_family("mma"):
        yield Gpu() if request.param == "gpu" else Interpreter()


def named(name):
    return next(case for case in CASES if case.name == name)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_oracle(case, engine):
    check(case, engine)


def random_case(rng, number):
    """Any call the kernels take, kept small; few head dims, each of which compiles three."""
    rank = rng.choice((1, 2, 3))
    kernel, stride, dilation, shape = [], [], [], []
    most = {1: 90, 2: 12, 3: 5}[rank]
    for _ in range(rank):
        k, d = rng.randint(1, most), rng.choice((1, 1, 1, 2, 3))
        kernel.append(k)
        dilation.append(d)
        stride.append(rng.choice((1, 1, 1, rng.randint(1, k))))
        shape.append(k * d + rng.choice((0, 0, 1, rng.randint(0, most))))
    kv_heads, dtype = rng.choice((1, 2)), rng.choice((F16, BF16, F32))
    dim = rng.choice((32, 64) if dtype == F32 else (32, 64, 128))
    return case(
        f"random {number}", tuple(shape), tuple(kernel), "", stride=tuple(stride),
        dilation=tuple(dilation), is_causal=tuple(rng.random() < 0.25 for _ in range(rank)),
        head_dim=dim - rng.choice((0, 0, 8)), value_dim=dim - rng.choice((0, 0, 24)),
        dtype=dtype, rpb=rng.random() < 0.5, extras=rng.choice((0, 0, 2, 65)),
        kv_heads=kv_heads, heads=kv_heads * rng.choice((1, 1, 2)), batch=rng.choice((1, 2)),
        layout=rng.choice(("contiguous", "heads first")),
    )  # fmt: skip


@pytest.mark.parametrize("number", range(12))
def test_random_calls(number, engine):
    check(random_case(random.Random(number), number), engine, seed=number)


@pytest.mark.parametrize(
    ("arch", "dtype"),
    [("75", F16), ("86", BF16), ("89", F32), ("90a", BF16), ("100a", F16), ("120a", F32)],
)
def test_every_architecture(arch, dtype):
    """Other instructions on sm_75: no asynchronous copies, products of 8 keys at a time."""
    given = case("architecture", (12, 18), (5, 7), "", dtype=dtype, extras=3, rpb=True)
    with plan.use_family("mma"):
        check(given, Interpreter(arch))


@pytest.mark.parametrize("name", ["map", "one extra", "dim 128"])
def test_random_schedules(name):
    """Warps in any order: a missing barrier shows as a race, and the bits stay the same."""
    given = named(name)
    tensors, cotangent = inputs(given), cotangents(given)
    with plan.use_family("mma"):
        first = run(given, Interpreter(), tensors, *cotangent)
        second = run(given, Interpreter(seed=3), tensors, *cotangent)
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    for key, gradient in first[2].items():
        assert torch.equal(second[2][key], gradient), key


def test_inputs_are_not_written():
    given = named("everything")
    interpreter = Interpreter()
    tensors, cotangent = inputs(given), cotangents(given)
    interpreter.launcher.protect(*(x for x in tensors.values() if x is not None), *cotangent)
    with plan.use_family("mma"):
        run(given, interpreter, tensors, *cotangent)


@pytest.mark.parametrize("layout", ["packed", "heads first"])
def test_layouts_give_the_same_bits(layout, engine):
    given = case("layout", (9, 17), (5, 6), "", heads=2, kv_heads=2)
    other = Case(**{**given.__dict__, "layout": layout})
    cotangent = cotangents(given, engine.device)
    expected = run(given, engine, inputs(given, engine.device), *cotangent)
    actual = run(other, engine, inputs(other, engine.device), *cotangent)
    assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1], expected[1])
    for name, gradient in expected[2].items():
        assert torch.equal(actual[2][name], gradient), name


def test_an_image_alone_has_the_bits_it_has_in_a_batch(engine):
    """Tiles depend on the map and its windows, not on how many images there are."""
    given = case("batch", (20, 27), (5, 9), "", batch=3)
    one = Case(**{**given.__dict__, "batch": 1})
    tensors, (d_out, d_lse) = inputs(given, engine.device), cotangents(given, engine.device)
    expected = run(given, engine, tensors, d_out, d_lse)
    alone = {n: None if x is None else x.detach()[1:2].clone() for n, x in tensors.items()}
    alone = {n: None if x is None else x.requires_grad_() for n, x in alone.items()}
    actual = run(one, engine, alone, d_out[1:2], d_lse[1:2])
    assert torch.equal(actual[0][0], expected[0][1])
    for name, gradient in expected[2].items():
        assert torch.equal(actual[2][name][0], gradient[1]), name


def test_a_bias_at_rest(engine):
    """Nobody asks for its gradient."""
    given = named("bias")
    tensors, (d_out, d_lse) = inputs(given, engine.device), cotangents(given, engine.device)
    true = truth(given, tensors, d_out, d_lse)[2]
    tensors["rpb"] = tensors["rpb"].detach()
    wanted = [tensors[name] for name in ("query", "key", "value")]
    with engine.active():
        out, lse = ops.attention(*wanted, given.hood, given.factor, tensors["rpb"], None, None)
        made = torch.autograd.grad([out, lse], wanted, [d_out, d_lse])
    for name, gradient in zip(("query", "key", "value"), made, strict=True):
        close(gradient, true[name], given.dtype, name, backward=True)


@pytest.mark.parametrize(
    ("name", "blocks"),
    [("bias", 1), ("bias", 3), ("volume", 1), ("causal stride", 3), ("everything", 3)],
)
def test_blocks_that_take_several_tiles(name, blocks, engine, monkeypatch):
    """Few tables of bias sums: a block walks many tiles and images."""
    monkeypatch.setattr(mma, "BLOCKS", blocks)
    plan.forget()
    check(Case(**{**named(name).__dict__, "batch": 3}), engine)
    plan.forget()


@pytest.mark.parametrize(("name", "blocks"), [("bias", 3), ("volume", 1), ("causal stride", 3)])
def test_far_tables(name, blocks, engine, monkeypatch):
    """Of calls that need none: the same sums, by warps in global memory."""
    monkeypatch.setattr(mma, "is_far", lambda p: True)
    monkeypatch.setattr(mma, "BLOCKS", blocks)
    plan.forget()
    check(Case(**{**named(name).__dict__, "batch": 2}), engine)
    plan.forget()


# ------------------------------------------------------------------------------------------------
# numbers at the edge


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_scores_that_climb(dtype, engine):
    """Every later key scores higher: the sums are scaled down turn after turn."""
    given = case("climb", (300,), 151, "", dtype=dtype)
    tensors = inputs(given, engine.device)
    ramp = torch.linspace(1, 400, 300, device=engine.device).view(1, 300, 1, 1)
    tensors["query"] = torch.ones_like(tensors["query"]).requires_grad_()
    tensors["key"] = (torch.ones_like(tensors["key"]) * ramp / 8).to(dtype).requires_grad_()
    d_out, d_lse = cotangents(given, engine.device)
    out, lse, gradients = run(given, engine, tensors, d_out, d_lse)
    true_out, true_lse, _ = truth(given, tensors, d_out, d_lse)
    close(out, true_out, dtype)
    close(lse / 300, true_lse / 300, lse.dtype)
    assert all(x.isfinite().all() for x in gradients.values())


@pytest.mark.parametrize("scale", [0.0, 1e-44, -1e-30])
def test_a_scale_of_nothing_is_no_detour(scale):
    """Queries are not computed again one by one, as where a NaN came to them."""
    counts = []
    for given in (case("plain", (33,), 9, ""), case("nothing", (33,), 9, "", scale=scale)):
        engine, tensors = Interpreter(), inputs(given)
        with plan.use_family("mma"), engine.active(), torch.no_grad():
            ops.attention(*list(tensors.values())[:3], given.hood, given.factor, None, None, None)
        counts.append(engine.launcher.records[0].counters.total)
    assert counts[1] < 1.1 * counts[0]


def test_rows_that_begin_anywhere_where_there_is_one(engine):
    """The stride of an axis of one token is never walked, whatever it is."""
    given = case("one", (40,), 9, "", extras=1, dtype=F16)
    tensors = inputs(given, engine.device)
    for name in ("additional_keys", "additional_values"):
        wide = torch.zeros(1, 4, 1, 33, dtype=F16, device=engine.device)
        wide[:, :1, :, :32] = tensors[name].detach()
        tensors[name] = wide[:, :1, :, :32].requires_grad_()
    d_out, d_lse = cotangents(given, engine.device)
    out, _, gradients = run(given, engine, tensors, d_out, d_lse)
    true_out, _, true = truth(given, tensors, d_out, d_lse)
    close(out, true_out, F16)
    for name, gradient in gradients.items():
        close(gradient, true[name], F16, name, backward=True)


@pytest.mark.parametrize("sign", [1, -1])
def test_large_logits_stay_finite(sign, engine):
    given = case("large", (40,), 17, "", dtype=F16, extras=2, rpb=True, scale=sign * 32**-0.5)
    tensors = inputs(given, engine.device)
    for name in ("query", "key", "additional_keys"):
        tensors[name] = (tensors[name].detach() * 60).requires_grad_()
    cotangent = cotangents(given, engine.device)
    out, lse, gradients = run(given, engine, tensors, *cotangent)
    true_out, true_lse, _ = truth(given, tensors, *cotangent)
    assert all(x.isfinite().all() for x in (out, lse, *gradients.values()))
    close(out, true_out, F16)
    close(lse / true_lse.abs().max().to(lse), true_lse / true_lse.abs().max(), lse.dtype)


def test_bias_of_minus_infinity(engine):
    """A bias may hide keys, all of some queries' too."""
    given = case("hidden", (80,), 21, "", dtype=F16, rpb=True)
    tensors = {n: x if x is None else x.detach() for n, x in inputs(given, engine.device).items()}
    tensors["rpb"][:, :22] = float("-inf")
    hood = given.hood
    with engine.active():
        out, lse = ops.attention(
            *list(tensors.values())[:3], hood, given.factor, tensors["rpb"], None, None
        )
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


@pytest.mark.parametrize("extras", [0, 3])
@pytest.mark.parametrize("name", ["key", "value", "query"])
def test_nan_reaches_its_windows_and_nothing_else(name, extras, engine):
    given = case(
        "nan", (9, 10), (3, 4), "", stride=(1, 2), dilation=(2, 1), is_causal=(False, True),
        extras=extras, heads=2, kv_heads=1, value_dim=72, dtype=F16, rpb=True,
    )  # fmt: skip
    hood = given.hood
    tensors = {n: x if x is None else x.detach() for n, x in inputs(given, engine.device).items()}

    def attend():
        query, key, value, rpb, *more = tensors.values()
        with engine.active():
            return ops.attention(query, key, value, hood, given.factor, rpb, *more)

    right, right_lse = attend()
    tensors[name] = tensors[name].clone()
    tensors[name][0, 4, 5] = float("inf" if name == "value" else "nan")
    out, lse = attend()
    index, _, valid = neighborhood.neighbor_table(given.shape, hood, "cpu")
    token = 4 * 10 + 5
    seen = ((index == token) & valid).any(1)
    seen = (seen if name != "query" else torch.arange(len(index)) == token).view(given.shape)
    assert torch.equal(~out.isfinite().all(-1)[0, ..., 0].cpu(), seen)
    close(out[0, ~seen].cpu(), right[0, ~seen].cpu(), given.dtype)
    close(lse[0, ~seen].cpu(), right_lse[0, ~seen].cpu(), lse.dtype)


def test_nan_in_an_additional_key_reaches_every_query(engine):
    given = case("nan", (40,), 5, "", extras=3)
    query, key, value, rpb, *more = (x if x is None else x.detach().clone()
                                     for x in inputs(given, engine.device).values())  # fmt: skip
    more[1][0, 1] = float("nan")
    with engine.active():
        out, lse = ops.attention(query, key, value, given.hood, given.factor, rpb, *more)
    assert out.isnan().all() and lse.isfinite().all()


def test_rows_that_lie_far_apart(engine):
    """32 bits of bytes from corner to corner of a halo: beyond 2**31, of pages nobody touches."""
    given = case("far", (40,), 13, "", dtype=F16)
    step = 2**25
    tensors = inputs(given, engine.device)
    for name in ("query", "key", "value"):
        near = tensors[name].detach()
        far = torch.empty(40 * step, dtype=F16, device=engine.device)
        far = far.as_strided(near.shape, (40 * step, step, 32, 1))
        far.copy_(near)
        tensors[name] = far.requires_grad_()
    d_out, d_lse = cotangents(given, engine.device)
    true = truth(given, tensors, d_out, d_lse)
    out, _, gradients = run(given, engine, tensors, d_out, d_lse)
    close(out, true[0], given.dtype)
    for name, gradient in gradients.items():
        close(gradient, true[2][name], given.dtype, name, backward=True)


# ------------------------------------------------------------------------------------------------
# floats


@pytest.mark.parametrize("dim", [32, 64])
def test_floats_are_as_exact_as_torch(dim):
    given = case("exact", (150,), 101, "", dtype=F32, dim=dim, rpb=True)
    as_exact_as_torch(given, "mma", na1d)


def test_one_term_where_torch_allows_tf32():
    keeps_11_bits(case("tf32", (50,), 9, "", dtype=F32), "mma")
