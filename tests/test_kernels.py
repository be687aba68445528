"""The CUDA kernels against the float64 oracle, forward and backward, through the ops.

Without a GPU the very PTX that NVRTC made runs in the interpreter, with its checks for bounds,
alignment, unwritten memory and races; with one, the same table runs on it.
"""

import importlib.util

import pytest
import torch
from kernel_cases import BF16, CASES, F16, F32, F64, Case, cotangents, inputs, truth
from ptxsim.launcher import PtxLauncher
from tolerances import close

from natcupy import neighborhood
from natcupy.cuda import jit, ops, plan, tiling

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("cupy") is None, reason="NVRTC comes with CuPy, which is not installed"
)


@pytest.fixture(autouse=True)
def portable():
    """The portable kernels, whatever the shape."""
    with plan.use_family("portable"):
        yield


class Interpreter:
    """Runs calls on CPU tensors with the PTX of one architecture."""

    def __init__(self, arch="80", seed=None):
        self.launcher, self.device = PtxLauncher(arch, seed=seed), "cpu"

    def active(self):
        return self.launcher.active()


class Gpu:
    def __init__(self):
        self.device = "cuda"

    def active(self):
        return jit.use_launcher(None)


@pytest.fixture(params=["interpreter", pytest.param("gpu", marks=pytest.mark.gpu)])
def engine(request):
    if request.param == "gpu" and not torch.cuda.is_available():
        pytest.skip("no CUDA GPU here")
    return Gpu() if request.param == "gpu" else Interpreter()


@pytest.fixture
def few_blocks(monkeypatch):
    """Plan for the fewest blocks, as for a large batch: tiles of many tokens."""
    forget(monkeypatch)
    monkeypatch.setattr(tiling, "WAVE", 1)
    yield
    forget(monkeypatch)


def forget(monkeypatch):
    tiling.rank_tiles.cache_clear()
    plan.forget()


def run(case, engine, tensors, d_out, d_lse):
    """(out, lse, gradients by name) of the ops."""
    given = {n: x for n, x in tensors.items() if x is not None}
    with engine.active():
        out, lse = ops.attention(
            tensors["query"], tensors["key"], tensors["value"], case.hood, case.factor,
            tensors["rpb"], tensors["additional_keys"], tensors["additional_values"],
        )  # fmt: skip
        made = torch.autograd.grad([out, lse], list(given.values()), [d_out, d_lse])
    return out, lse, dict(zip(given, made, strict=True))


def check(case, engine, seed=0):
    tensors = inputs(case, engine.device, seed)
    d_out, d_lse = cotangents(case, engine.device)
    out, lse, gradients = run(case, engine, tensors, d_out, d_lse)
    true_out, true_lse, true_gradients = truth(case, tensors, d_out, d_lse)
    close(out, true_out, case.dtype, f"{case}: out")
    close(lse, true_lse, lse.dtype, f"{case}: lse")
    assert lse.dtype == (F64 if case.dtype == F64 else F32)
    for name, gradient in gradients.items():
        assert gradient.dtype == tensors[name].dtype
        close(gradient, true_gradients[name], case.dtype, f"{case}: d_{name}", backward=True)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_oracle(case, engine, few_blocks):
    check(case, engine)


@pytest.mark.parametrize("name", ["border", "volume, everything", "remainder"])
def test_one_token_per_block(name, engine):
    """The plan of small inputs: as many blocks as there is room for."""
    check(named(name), engine)


@pytest.mark.parametrize(
    ("arch", "name"),
    [
        ("75", "nat"),
        ("86", "odd dim"),
        ("89", "double"),
        ("90a", "nat"),
        ("100a", "odd dim"),
        ("120a", "double"),
    ],
)
def test_every_architecture(name, arch, few_blocks):
    """The sources do not ask for the architecture, the PTX differs; the table runs sm_80's."""
    check(named(name), Interpreter(arch))


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("name", ["extra", "volume, everything"])
def test_random_schedules(name, seed, few_blocks):
    """Warps in any order: a missing barrier shows as a race or as a wrong number."""
    check(named(name), Interpreter(seed=seed))


@pytest.mark.parametrize("name", ["nat", "volume", "extra", "causal"])
def test_boxes_smaller_than_what_a_tile_sees(name, engine, few_blocks, monkeypatch):
    monkeypatch.setattr(plan, "SHARED", 5000)
    check(named(name), engine)


@pytest.mark.parametrize("name", ["extra", "many extras", "remainder", "grouped heads"])
def test_blocks_that_take_several_tiles(name, engine, monkeypatch):
    """What happens past the largest grid, with a largest grid of a few blocks."""
    forget(monkeypatch)
    monkeypatch.setattr(plan, "LARGEST_GRID", 7)
    monkeypatch.setattr(plan, "BLOCKS", 1)
    check(named(name), engine)
    forget(monkeypatch)


def named(name):
    return next(case for case in CASES if case.name == name)


# ------------------------------------------------------------------------------------------------
# what must not depend on how the numbers lie in memory, nor on the run


@pytest.mark.parametrize("layout", ["packed", "offset", "heads first"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["float32", "bfloat16"])
def test_layouts_give_the_same_bits(layout, dtype, engine):
    case = Case("layout", (6, 7), 3, "", heads=2, kv_heads=2, rpb=True, dtype=dtype)
    other = Case(**{**case.__dict__, "layout": layout})
    cotangent = cotangents(case, engine.device)
    expected = run(case, engine, inputs(case, engine.device), *cotangent)
    actual = run(other, engine, inputs(other, engine.device), *cotangent)
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[1], expected[1])
    for name, gradient in expected[2].items():
        assert torch.equal(actual[2][name], gradient), name


def test_gradient_of_a_sum(engine):
    """`sum().backward()` hands over a gradient without strides."""
    case = named("grouped heads")
    tensors = inputs(case, engine.device)
    _, d_lse = cotangents(case, engine.device)
    ones = torch.ones((), dtype=case.dtype, device=engine.device)
    d_out = ones.expand(case.batch, *case.shape, case.heads, case.value_dim)
    _, _, gradients = run(case, engine, tensors, d_out, d_lse)
    _, _, expected = truth(case, tensors, d_out, d_lse)
    for name, gradient in gradients.items():
        close(gradient, expected[name], case.dtype, name, backward=True)


def test_transposed_and_expanded_inputs(engine):
    """A last axis that is not contiguous is copied; an expanded axis is read in place."""
    case = Case("strides", (6, 5), 3, "", heads=2, kv_heads=2, head_dim=4, value_dim=4)
    tensors = inputs(case, engine.device)
    plain = {n: x for n, x in tensors.items()}
    tensors["query"] = tensors["query"].detach().transpose(-1, -3).contiguous().transpose(-1, -3)
    tensors["value"] = tensors["value"].detach()[..., :1, :].expand(-1, -1, -1, 2, -1)
    tensors["query"].requires_grad_()
    tensors["value"].requires_grad_()
    plain["value"] = tensors["value"].detach().contiguous().requires_grad_()
    cotangent = cotangents(case, engine.device)
    actual, expected = (run(case, engine, given, *cotangent) for given in (tensors, plain))
    assert torch.equal(actual[0], expected[0])
    for name, gradient in expected[2].items():
        assert torch.equal(actual[2][name], gradient), name


def test_the_same_bits_every_time(engine):
    case = named("volume, everything")
    tensors, cotangent = inputs(case, engine.device), cotangents(case, engine.device)
    first = run(case, engine, tensors, *cotangent)
    other = Interpreter(seed=5) if engine.device == "cpu" else engine
    second = run(case, other, tensors, *cotangent)
    assert torch.equal(first[0], second[0])
    for name, gradient in first[2].items():
        assert torch.equal(second[2][name], gradient), name


def test_inputs_are_not_written(few_blocks):
    case = named("volume, everything")
    interpreter = Interpreter()
    tensors, cotangent = inputs(case), cotangents(case)
    interpreter.launcher.protect(*(x for x in tensors.values() if x is not None), *cotangent)
    run(case, interpreter, tensors, *cotangent)


# ------------------------------------------------------------------------------------------------
# numbers at the edge


def test_nan_in_a_key_reaches_its_windows_and_nothing_else(engine, few_blocks):
    case = Case("nan", (9, 10), (3, 4), "", stride=(1, 2), dilation=(2, 1), is_causal=(False, True))
    hood = case.hood
    tensors = {n: None if x is None else x.detach() for n, x in inputs(case, engine.device).items()}
    for name in ("key", "value"):
        spoilt = dict(tensors)
        spoilt[name] = tensors[name].clone()
        spoilt[name][0, 4, 5] = float("nan")
        with engine.active():
            out, _ = ops.attention(*list(spoilt.values())[:3], hood, case.factor, None, None, None)
        index, _, valid = neighborhood.neighbor_table(case.shape, hood, "cpu")
        expected = ((index == 4 * 10 + 5) & valid).any(1).view(case.shape)
        assert torch.equal(out.isnan().all(-1)[0, ..., 0].cpu(), expected), name
        assert torch.equal(out.isnan().any(-1)[0, ..., 0].cpu(), expected), name


def test_infinite_value_and_nan_query(engine, few_blocks):
    case = Case("edge", (12,), 3, "", dtype=F16)
    tensors = [x.detach().clone() for x in list(inputs(case, engine.device).values())[:3]]
    tensors[0][0, 2] = float("nan")
    tensors[2][0, 8] = float("inf")
    with engine.active():
        out, _ = ops.attention(*tensors, case.hood, case.factor, None, None, None)
    finite = out.isfinite().all(-1)[0, :, 0].cpu()
    assert (~finite).nonzero().flatten().tolist() == [2, 7, 8, 9]


@pytest.mark.parametrize("dtype", [F16, BF16, F32, F64], ids=str)
def test_large_logits_stay_finite(dtype, engine):
    case = Case("large", (9, 6), 3, "", dtype=dtype, extras=2, rpb=True)
    tensors = inputs(case, engine.device)
    for name in ("query", "key", "additional_keys"):
        tensors[name] = (tensors[name].detach() * 60).requires_grad_()
    cotangent = cotangents(case, engine.device)
    out, lse, gradients = run(case, engine, tensors, *cotangent)
    true_out, true_lse, _ = truth(case, tensors, *cotangent)
    assert all(x.isfinite().all() for x in (out, lse, *gradients.values()))
    if dtype == F64:
        close(out, true_out, dtype)
    close(lse / true_lse.abs().max().to(lse), true_lse / true_lse.abs().max(), lse.dtype)


@pytest.mark.parametrize("axis", ["batch", "extras"])
def test_empty(axis, engine):
    batch, extras = (0, 2) if axis == "batch" else (2, 0)
    case = Case("empty", (5, 4), 3, "", batch=batch, rpb=True)
    tensors = inputs(case, engine.device)
    for name in ("additional_keys", "additional_values"):
        tensors[name] = torch.zeros(batch, extras, 1, 8, device=engine.device).requires_grad_()
    cotangent = cotangents(case, engine.device)
    out, lse, gradients = run(case, engine, tensors, *cotangent)
    assert out.shape == (batch, 5, 4, 1, 8) and lse.shape == (batch, 5, 4, 1)
    assert all(gradients[n].shape == x.shape for n, x in tensors.items())
    if batch == 0:
        assert not gradients["rpb"].any()
    else:
        true_out, _, true_gradients = truth(case, tensors, *cotangent)
        close(out, true_out, case.dtype)
        close(gradients["rpb"], true_gradients["rpb"], case.dtype, backward=True)


def test_bias_in_float32_beside_halves(engine):
    case = Case("mixed", (6, 7), 3, "", rpb=True, dtype=BF16, heads=2)
    tensors = inputs(case, engine.device)
    tensors["rpb"] = tensors["rpb"].detach().float().requires_grad_()
    cotangent = cotangents(case, engine.device)
    out, _, gradients = run(case, engine, tensors, *cotangent)
    true_out, _, true_gradients = truth(case, tensors, *cotangent)
    close(out, true_out, BF16)
    assert gradients["rpb"].dtype == F32
    close(gradients["rpb"], true_gradients["rpb"], BF16, backward=True)
