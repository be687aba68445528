"""The torch contract of the CUDA ops, run for real on CPU tensors through the interpreter."""

import importlib.util
import itertools

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from kernel_cases import CASES, Case, cotangents, inputs, truth
from ptxsim.launcher import PtxLauncher
from tolerances import close

from natcupy import known_calls, na1d, reference
from natcupy.arguments import neighborhood
from natcupy.cuda import jit, ops, plan, run

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("cupy") is None, reason="NVRTC comes with CuPy, which is not installed"
)

HOOD = neighborhood(1, 3)
ARGS = ((3,), (1,), (1,), (False,), 0.5)
NONE = (None, None, None)


@pytest.fixture
def launcher():
    with PtxLauncher("80").active() as active:
        yield active


@pytest.fixture
def opcheck_launcher():
    """Without the check for unwritten memory: opcheck copies into tensors from torch.empty."""
    with jit.use_launcher(PtxLauncher("80")) as active:
        yield active


def qkv(dtype=torch.float32, grad=False, batch=1, seed=0):
    make = torch.Generator().manual_seed(seed)
    return [
        torch.randn(batch, 6, 2, 4, generator=make, dtype=torch.float64)
        .to(dtype)
        .requires_grad_(grad)
        for _ in range(3)
    ]


def bias(dtype=torch.float32, grad=False):
    make = torch.Generator().manual_seed(9)
    return torch.randn(2, 5, generator=make, dtype=torch.float64).to(dtype).requires_grad_(grad)


def attend(query, key, value, rpb=None):
    return ops.attention(query, key, value, HOOD, 0.5, rpb, None, None)


def define(query, key, value, rpb=None):
    return reference.attention(query, key, value, HOOD, 0.5, rpb, None, None)


def same(actual, expected, dtype=torch.float32, backward=True):
    for a, e in zip(actual, expected, strict=True):
        close(a, e, dtype, backward=backward)


def shifted(x, by):
    """A copy that begins `by` elements behind an aligned address."""
    memory = torch.empty(x.numel() + by, dtype=x.dtype)
    return memory[by:].view(x.shape).copy_(x)


def test_known_calls_differ_in_addresses_alone(launcher, monkeypatch):
    """Tensors that pass for a GPU's: checks once, a plan for each alignment, results anew."""
    monkeypatch.setattr(known_calls, "_place", lambda x: 0)
    checked, planned = [], []
    check, by_layout = run._check, run._by_layout
    monkeypatch.setattr(run, "_check", lambda *args: checked.append(args) or check(*args))
    monkeypatch.setattr(run, "_by_layout", lambda *args: planned.append(args) or by_layout(*args))
    for round_, by in enumerate((0, 0, 1, 1, 0)):
        q, k, v, rpb = *qkv(seed=round_), bias()
        given = [shifted(x, by) for x in (q, k, v)]
        out = na1d(*given, 3, scale=0.5, rpb=rpb, backend="cuda")
        same((out,), define(q, k, v, rpb)[:1], backward=False)
    assert len(checked) == 1 and len(planned) == 3
    plan.forget()
    na1d(*given, 3, scale=0.5, rpb=rpb, backend="cuda")
    assert len(planned) == 4


def test_known_calls_have_gradients(launcher, monkeypatch):
    monkeypatch.setattr(known_calls, "_place", lambda x: 0)
    for seed in (1, 2, 3):
        given = [*qkv(grad=True, seed=seed), bias(grad=True)]
        out, lse = na1d(*given[:3], 3, scale=0.5, rpb=given[3], return_lse=True, backend="cuda")
        found = torch.autograd.grad((out.sum() + lse.sum(),), given)
        true_out, true_lse = define(*given)
        same(found, torch.autograd.grad((true_out.sum() + true_lse.sum(),), given))


def test_known_gradients_follow_what_autograd_hands_back(launcher, monkeypatch):
    """The same call again, once with saved tensors that come back in another layout."""
    monkeypatch.setattr(known_calls, "_place", lambda x: 0)
    planned, by_layout = [], run._by_layout
    monkeypatch.setattr(run, "_by_layout", lambda *args: planned.append(args) or by_layout(*args))
    packed = torch.randn(2, 6, 3, 2, 4, generator=torch.Generator().manual_seed(1))
    cotangent = torch.randn(2, 6, 2, 4, generator=torch.Generator().manual_seed(2))
    found = []
    for unpack in (torch.Tensor.detach, torch.Tensor.detach, torch.Tensor.contiguous) * 2:
        whole, rpb = packed.clone().requires_grad_(), bias(grad=True)
        with torch.autograd.graph.saved_tensors_hooks(torch.Tensor.detach, unpack):
            out = na1d(*whole.unbind(-3), 3, scale=0.5, rpb=rpb, backend="cuda")
            found.append(torch.autograd.grad(out, (whole, rpb), cotangent))
    # the first call is not a known one yet; the third backward pass reads another layout
    assert len(planned) == 2 + 3
    for gradients in found[1:]:
        assert all(map(torch.equal, gradients, found[0]))
    whole, rpb = packed.clone().requires_grad_(), bias(grad=True)
    out, _ = reference.attention(*whole.unbind(-3), HOOD, 0.5, rpb, None, None)
    same(found[0], torch.autograd.grad(out, (whole, rpb), cotangent))


def test_tensors_on_a_cpu_are_no_known_calls_of_this_backend(launcher):
    q, k, v = qkv()
    for _ in range(2):
        na1d(q, k, v, 3, scale=0.5, backend="cuda")
    assert not known_calls._good


# ------------------------------------------------------------------------------------------------
# registration

SAMPLES = ("line", "odd dim", "volume, everything", "packed", "extra", "heads first", "double")


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("name", SAMPLES)
def test_opcheck_forward(name, grad, opcheck_launcher):
    case = next(case for case in CASES if case.name == name)
    tensors = [
        None if x is None else x.detach().requires_grad_(grad) for x in inputs(case).values()
    ]
    hood = case.hood
    parameters = (hood.kernel_size, hood.stride, hood.dilation, hood.is_causal, case.factor)
    torch.library.opcheck(torch.ops.natcupy.na_fwd.default, (*tensors, *parameters))


@pytest.mark.parametrize("wanted", [[True] * 6, [False, True, False, False, True, False]])
@pytest.mark.parametrize("name", ["volume, everything", "extra"])
def test_opcheck_backward(name, wanted, opcheck_launcher):
    case = next(case for case in CASES if case.name == name)
    tensors = [x.detach() for x in inputs(case).values()]
    d_out, d_lse = cotangents(case)
    hood = case.hood
    parameters = (hood.kernel_size, hood.stride, hood.dilation, hood.is_causal, case.factor)
    out, lse = torch.ops.natcupy.na_fwd(*tensors, *parameters)
    arguments = (d_out, d_lse, *tensors, out, lse, *parameters, wanted)
    torch.library.opcheck(torch.ops.natcupy.na_bwd.default, arguments)


@pytest.mark.parametrize("case", CASES[::3], ids=str)
def test_fake_agrees_with_real(case, launcher):
    tensors = [None if x is None else x.detach() for x in inputs(case).values()]
    hood = case.hood
    real = ops.attention(*tensors[:3], hood, case.factor, *tensors[3:])
    meta = [None if x is None else x.to("meta") for x in tensors]
    fake = torch.ops.natcupy.na_fwd(
        *meta, hood.kernel_size, hood.stride, hood.dilation, hood.is_causal, case.factor
    )
    for r, f in zip(real, fake, strict=True):
        assert (r.shape, r.stride(), r.dtype) == (f.shape, f.stride(), f.dtype)


def test_gradients_of_tensors_in_another_order_of_axes(launcher):
    """A bias table that was looked up, say, has its heads last."""
    hood = neighborhood(2, 3)
    make = torch.Generator().manual_seed(4)
    q, k, v = (
        torch.randn(1, 2, 5, 4, 6, generator=make).permute(0, 3, 2, 1, 4).requires_grad_()
        for _ in range(3)
    )
    rpb = torch.randn(5, 5, 2, generator=make).permute(2, 1, 0).requires_grad_()
    d_out = torch.randn(1, 4, 5, 2, 6, generator=make)
    found = []
    for way in (ops, reference):
        out, _ = way.attention(q, k, v, hood, 0.5, rpb, None, None)
        found.append(torch.autograd.grad(out, (q, k, v, rpb), d_out))
    same(*found)


def test_compiled_in_one_graph(launcher):
    """No graph break, and no new graph for a new length once lengths vary."""
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    def model(query, key, value, rpb):
        return attend(query * 2, key, value, rpb)[0].square().sum()

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for length in (6, 7, 8, 9, 11):
        query, key, value = (torch.randn(1, length, 2, 4).requires_grad_() for _ in range(3))
        rpb = bias(grad=True)
        actual = compiled(query, key, value, rpb)
        expected = define(query * 2, key, value, rpb)[0].square().sum()
        leaves = (query, key, value, rpb)
        same(torch.autograd.grad(actual, leaves), torch.autograd.grad(expected, leaves))
    assert len(graphs) <= 2


def test_compiled_through_autograd_tracing(launcher):
    query, key, value = qkv(grad=True)
    rpb = bias(grad=True)
    leaves = (query, key, value, rpb)
    compiled = torch.compile(
        lambda *x: attend(*x)[0].square().sum(), backend="aot_eager", fullgraph=True
    )
    expected = torch.autograd.grad(define(*leaves)[0].square().sum(), leaves)
    same(torch.autograd.grad(compiled(*leaves), leaves), expected)


# ------------------------------------------------------------------------------------------------
# autograd


@pytest.mark.parametrize("name", ["volume, everything", "causal stride", "extra"])
def test_gradcheck(name, launcher):
    """In float64, every input at once, the log-sum-exp included."""
    case = next(case for case in CASES if case.name == name)
    small = type(case)(
        **{**case.__dict__, "dtype": torch.float64, "heads": 2, "kv_heads": 1, "batch": 1,
           "head_dim": 2, "value_dim": 3, "extras": 2, "rpb": True, "shape": {
               "volume, everything": (4, 3, 3), "causal stride": (10,), "extra": (3, 4)}[name]}
    )  # fmt: skip
    given = inputs(small)

    def call(*tensors):
        return ops.attention(*tensors[:3], small.hood, small.factor, *tensors[3:])

    torch.autograd.gradcheck(call, tuple(given.values()), fast_mode=True)


def test_only_what_is_needed(launcher):
    """Every subset of the six inputs: right gradients for them, None for the rest."""
    case = Case("six", (5,), 3, "", heads=2, head_dim=2, value_dim=2, extras=1, rpb=True)
    d_out, d_lse = cotangents(case)
    _, _, expected = truth(case, inputs(case), d_out, d_lse)
    for needed in itertools.product((True, False), repeat=6):
        if not any(needed):
            continue
        tensors = inputs(case)
        for x, need in zip(tensors.values(), needed, strict=True):
            x.requires_grad_(need)
        values = list(tensors.values())
        out, lse = ops.attention(*values[:3], case.hood, case.factor, *values[3:])
        torch.autograd.backward([out, lse], [d_out, d_lse])
        for (name, x), need in zip(tensors.items(), needed, strict=True):
            if need:
                close(x.grad, expected[name], case.dtype, name, backward=True)
            else:
                assert x.grad is None


def test_bias_gradient_costs_nothing_when_not_needed(launcher):
    query, key, value = qkv(grad=True)
    attend(query, key, value, bias())[0].sum().backward()
    constants = [dict(r.recipe.spec.constants) for r in launcher.records]
    assert not any(c.get("RPB_GRAD") for c in constants)
    assert "reduce_partials" not in {r.recipe.spec.entry for r in launcher.records}


@pytest.mark.parametrize("which", [0, 1])
def test_one_output_used(which, launcher):
    query, key, value = qkv(grad=True)
    actual = torch.autograd.grad(attend(query, key, value)[which].sum(), (query, key))
    expected = torch.autograd.grad(define(query, key, value)[which].sum(), (query, key))
    same(actual, expected)


def test_in_place_change_of_a_saved_input_is_noticed(launcher):
    query, key, value = qkv(grad=True)
    changed = query * 1
    out, _ = attend(changed, key, value)
    changed.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_second_derivative_is_refused(launcher):
    query, key, value = qkv(grad=True)
    (first,) = torch.autograd.grad(
        attend(query, key, value)[0].square().sum(), query, create_graph=True
    )
    with pytest.raises(NotImplementedError, match=r"second derivative.*backend='torch'"):
        torch.autograd.grad(first.square().sum(), query)


def test_second_derivative_is_refused_under_transforms(launcher):
    query, key, value = qkv()

    def first(q):
        return torch.func.grad(lambda x: attend(x, key, value)[0].square().sum())(q).sum()

    with pytest.raises(NotImplementedError, match="second derivative"):
        torch.func.grad(first)(query)


def test_forward_mode_is_refused(launcher):
    query, key, value = qkv()
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(lambda q: attend(q, key, value)[0], (query,), (query,))
    for way in (attend, lambda *x: torch.ops.natcupy.na_fwd(*x, *NONE, *ARGS)):
        with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
            way(forward_ad.make_dual(query, query), key, value)


# ------------------------------------------------------------------------------------------------
# torch.func


@pytest.mark.parametrize("rpb", [None, "same", "mapped"])
def test_vmap(rpb, launcher):
    queries, (_, key, value) = torch.randn(3, 1, 6, 2, 4), qkv()
    biases = {None: None, "same": bias(), "mapped": torch.randn(3, 2, 5)}[rpb]
    dims = (0, None, None, 0 if rpb == "mapped" else None)
    actual = torch.func.vmap(attend, dims)(queries, key, value, biases)
    expected = torch.func.vmap(define, dims)(queries, key, value, biases)
    same(actual, expected, backward=False)
    if rpb != "mapped":
        assert len(launcher.records) == 1  # folded into the batch, not a loop


def test_vmap_over_other_axes(launcher):
    query, key, value = (torch.randn(1, 6, 3, 2, 4) for _ in range(3))
    actual = torch.func.vmap(attend, in_dims=2, out_dims=1)(query, key, value)
    expected = torch.func.vmap(define, in_dims=2, out_dims=1)(query, key, value)
    same(actual, expected, backward=False)


@pytest.mark.parametrize("with_bias", [False, True])
def test_gradients_per_sample(with_bias, launcher):
    queries, (_, key, value) = torch.randn(3, 1, 6, 2, 4), qkv()
    leaves = (key, value, bias()) if with_bias else (key, value)

    def per_sample(run):
        def loss(query, *rest):
            return run(query, *rest)[0].square().sum()

        which = tuple(range(len(leaves) + 1))
        dims = (0, *(None,) * len(leaves))
        return torch.func.vmap(torch.func.grad(loss, which), dims)(queries, *leaves)

    same(per_sample(attend), per_sample(define))


def test_batched_gradients(launcher):
    query, key, value = qkv(grad=True)
    rpb, d_out = bias(grad=True), torch.randn(3, 1, 6, 2, 4)
    leaves = (query, value, rpb)
    actual, expected = (
        torch.autograd.grad(run(query, key, value, rpb)[0], leaves, d_out, is_grads_batched=True)
        for run in (attend, define)
    )
    same(actual, expected)


def test_ops_refuse_gradients_inside_transforms(launcher):
    query, key, value = qkv()
    with pytest.raises(NotImplementedError, match=r"call natcupy\.na1d"):
        torch.func.grad(lambda q: torch.ops.natcupy.na_fwd(q, key, value, *NONE, *ARGS)[0].sum())(
            query
        )


# ------------------------------------------------------------------------------------------------
# dtypes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast(dtype, launcher):
    query, key, value = qkv(grad=True)
    rpb = bias(grad=True)
    with torch.autocast("cpu", dtype):
        out, lse = torch.ops.natcupy.na_fwd(query, key.to(dtype), value, rpb, None, None, *ARGS)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    assert [g.dtype for g in torch.autograd.grad(out.sum(), (query, rpb))] == [torch.float32] * 2
    true = define(query, key, value, rpb)[0]
    close(out, true, dtype)


def test_autocast_leaves_float64_alone(launcher):
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = torch.ops.natcupy.na_fwd(*qkv(torch.float64), *NONE, *ARGS)
    assert out.dtype == torch.float64


def test_mixed_dtypes_are_refused(launcher):
    query, key, value = qkv()
    with pytest.raises(TypeError, match=r"one dtype.*float16"):
        torch.ops.natcupy.na_fwd(query, key.half(), value, *NONE, *ARGS)
    assert not launcher.records


def test_deterministic_switch(launcher):
    torch.use_deterministic_algorithms(True)
    try:
        query, key, value = qkv(grad=True)
        rpb = bias(grad=True)
        attend(query, key, value, rpb)[0].sum().backward()
        assert rpb.grad.isfinite().all()
    finally:
        torch.use_deterministic_algorithms(False)


# ------------------------------------------------------------------------------------------------
# where it cannot run


def test_cpu_tensors_without_a_launcher():
    query, key, value = qkv()
    reason = ops.unsupported_reason(query, key, value, HOOD, *NONE)
    remedy = ".to('cuda')" if torch.cuda.is_available() else "no CUDA GPU here"
    assert "needs CUDA tensors" in reason and remedy in reason
    with pytest.raises(RuntimeError, match="run on CUDA tensors"):
        torch.ops.natcupy.na_fwd(query, key, value, *NONE, *ARGS)


@pytest.mark.parametrize("able", [True, False])
def test_the_machine_is_asked_while_tracing(able, monkeypatch):
    """Compiled code takes this backend only where eager code would."""

    def arch_for(device):
        if not able:
            raise ImportError("CuPy is not installed.")

    monkeypatch.setattr(jit, "arch_for", arch_for)
    torch._dynamo.reset()

    def model(x):
        return x + len(ops._device_reasons(torch.device("cuda", 0)))

    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert compiled(torch.zeros(())) == (0 if able else 1)


def test_every_reason_is_named(launcher):
    query = torch.empty(1, 6, 2, 600)
    reason = ops.unsupported_reason(query, query, query, HOOD, *NONE)
    assert "at most 512, got 600" in reason and "backend='torch'" in reason
    huge = torch.empty(1, 1, 1, 1).expand(1, 2**30 + 1, 1, 1)
    assert f"at most {2**30} tokens" in ops.unsupported_reason(huge, huge, huge, HOOD, *NONE)
    assert ops.unsupported_reason(*qkv(), HOOD, *NONE) is None
