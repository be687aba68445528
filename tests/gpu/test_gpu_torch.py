"""How it lives with torch: opcheck, compile, graphs, streams, vmap, autocast, models, CuPy arrays.

On a GPU and, with the same bodies, on the simulated one.
"""

import copy

import pytest
import torch
from kernel_cases import BF16, CASES, F16, F32, cotangents, inputs
from problems import but, check, feature, layer, run
from rigs import both, on, only_gpu
from tolerances import close
from torch import nn

import natcupy
from natcupy.cuda import jit, launch, ops


class Net(nn.Module):
    """Two layers of different windows, with biases."""

    def __init__(self, dim=64, layers=2):
        super().__init__()
        self.first = natcupy.NeighborhoodAttention2D(dim, dim // 32, 3, rel_pos_bias=True)
        self.second = nn.Identity()
        if layers == 2:
            self.second = natcupy.NeighborhoodAttention2D(dim, dim // 32, 3, dilation=2)

    def forward(self, x):
        return self.second(self.first(x))


def on_reference(model, x):
    """The same model on the torch backend, in float64."""
    other = copy.deepcopy(model).double()
    for module in other.modules():
        if isinstance(module, natcupy.NeighborhoodAttention2D):
            module._attend = lambda *qkv, m=module: natcupy.na2d(
                *qkv, m.hood.kernel_size, m.hood.stride, m.hood.dilation, m.hood.is_causal,
                scale=m.scale, rpb=m.rpb, backend="torch",
            )  # fmt: skip
    return other(x.double())


def arguments(case):
    hood = case.hood
    return hood.kernel_size, hood.stride, hood.dilation, hood.is_causal, case.factor


# ------------------------------------------------------------------------------------------------
# registration and compilation

SAMPLES = [case for case in CASES if case.extras < 9 and case.head_dim < 128]


@on(("case",), SAMPLES, simulated=[0])
def test_opcheck(rig, case):
    """Schema, autograd registration, fake kernels and ahead-of-time dispatch, both operators."""
    tensors = list(inputs(case, rig.device).values())
    torch.library.opcheck(torch.ops.natcupy.na_fwd.default, (*tensors, *arguments(case)))
    plain = [None if x is None else x.detach() for x in tensors]
    out, lse = torch.ops.natcupy.na_fwd(*plain, *arguments(case))
    wanted = [x is not None for x in plain]
    given = (*cotangents(case, rig.device), *plain, out, lse, *arguments(case), wanted)
    torch.library.opcheck(torch.ops.natcupy.na_bwd.default, given)


@on(("compiler",), ("aot_eager", "inductor"), simulated=[0])
def test_compile(rig, compiler):
    """One graph, the right numbers, and no new graph for every image size."""
    graphs = []

    def counting(graph, example):
        graphs.append(graph)
        return torch._dynamo.lookup_backend(compiler)(graph, example)

    torch._dynamo.reset()
    model = Net(rig.size(64, 32), rig.size(2, 1)).to(rig.device)
    compiled = torch.compile(model, backend=counting, fullgraph=True)
    for side in rig.size((14, 15, 17, 22, 28, 31), (4, 5, 6)):
        x = torch.randn(1, side, side, model.first.embed_dim, device=rig.device, requires_grad=True)
        out = compiled(x)
        (gradient,) = torch.autograd.grad(out.square().sum(), x)
        expected = on_reference(model, x)
        (true,) = torch.autograd.grad(expected.square().sum(), x)
        close(out, expected, F32, backward=True)
        close(gradient / true.abs().max(), true / true.abs().max(), F32, backward=True)
    assert len(graphs) <= 2
    rig.note(graphs=len(graphs))


@only_gpu
def test_compiled_zoo_model(rig):
    """A training step of NAT-Mini, compiled by inductor, beside the same step in eager mode."""
    torch.manual_seed(0)
    model = natcupy.create_model("nat_mini").to(rig.device).eval()
    x = torch.randn(2, 3, 224, 224, device=rig.device)
    losses, gradients = [], []
    with torch.backends.cudnn.flags(allow_tf32=False):
        for step in (model, torch.compile(model)):
            model.zero_grad()
            loss = step(x).square().mean()
            loss.backward()
            losses.append(loss.item())
            gradients.append(model.levels[0].blocks[0].attn.rpb.grad.clone())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert (gradients[0] - gradients[1]).abs().max() < 1e-3 * gradients[0].abs().max()


# ------------------------------------------------------------------------------------------------
# CUDA graphs


@on(("case",), [feature("everything", 2, F32, "small"), layer(14, 7, 1, BF16)], simulated=[0])
def test_graph_capture(rig, case):
    """After a warm-up a call is captured with its gradients; replays give eager's very bits."""
    case = but(case, batch=rig.size(4, 1))
    tensors, cotangent = inputs(case, rig.device), cotangents(case, rig.device)
    run(case, tensors, *cotangent)
    rig.cuda.synchronize()
    graph = rig.cuda.CUDAGraph()
    with rig.cuda.graph(graph):
        out, lse, gradients = run(case, tensors, *cotangent)
    for number in rig.many(1_000, 2):
        if number % rig.size(100, 1) == 0:
            with torch.no_grad():
                tensors["query"].copy_(torch.randn_like(tensors["query"]))
            expected = run(case, tensors, *cotangent)
        graph.replay()
        rig.cuda.synchronize()
        assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1])
        for name, gradient in gradients.items():
            assert torch.equal(gradient, expected[2][name]), name


@both
def test_cold_capture_is_refused(rig):
    """A kernel that would have to be loaded inside a capture: a clear error, and life goes on."""
    case = feature("plain", 1, F32, "small")
    tensors = inputs(case, rig.device)
    rig.cuda.synchronize()
    (launch.current_launcher() or jit._default)._loaded.clear()
    graph = rig.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match=r"natcupy\.warmup"), rig.cuda.graph(graph):
        run(case, tensors)
    check(case, rig)


@both
def test_warmup_makes_a_model_ready_for_capture(rig):
    model = Net(rig.size(128, 32)).to(rig.device).eval()
    side = rig.size(28, 6)
    x = torch.randn(1, side, side, model.first.embed_dim, device=rig.device)
    with torch.inference_mode():
        for _ in range(2):  # cuBLAS wants its own warm-up
            model.first.qkv(x)
        natcupy.warmup(model, tuple(x.shape), backward=False, quiet=True)
        graph = rig.cuda.CUDAGraph()
        with rig.cuda.graph(graph):
            out = model(x)
        graph.replay()
        rig.cuda.synchronize()
        expected = model(x)
    close(out, expected, F32)  # products may be summed otherwise inside a graph


# ------------------------------------------------------------------------------------------------
# streams


@on(("backward",), (False, True), simulated=[0, 1])
def test_the_current_stream_is_used(rig, backward):
    """A parked stream: whoever does not wait in it reads numbers that are not there yet."""
    case = feature("bias", 2, F32, rig.size("full", "small"))
    tensors = inputs(case, rig.device)
    cotangent = cotangents(case, rig.device) if backward else ()
    expected = run(case, tensors, *cotangent)
    true = tensors["value"].detach().clone()
    side = rig.cuda.Stream()
    rig.cuda.synchronize()
    for _ in rig.many(100, 2):
        with torch.no_grad():
            tensors["value"].zero_()
        rig.cuda.synchronize()
        side.wait_stream(rig.cuda.current_stream())
        with rig.cuda.stream(side):
            rig.cuda._sleep(20_000_000)
            rig.queue(lambda: tensors["value"].data.copy_(true))
            out, _, gradients = run(case, tensors, *cotangent)
        side.synchronize()
        assert torch.equal(out, expected[0])
        for name, gradient in gradients.items():
            assert torch.equal(gradient, expected[2][name]), name


@both
def test_memory_between_streams(rig):
    """Two streams and a busy allocator: what one frees, the other must not get too early."""
    case = layer(rig.size(28, 4), 3, 1, F16)
    base = {n: None if x is None else x.detach() for n, x in inputs(case, rig.device).items()}
    expected = run(case, base)[0]
    streams = [rig.cuda.Stream(), rig.cuda.Stream()]
    wrong = [torch.zeros((), dtype=torch.bool, device=rig.device) for _ in streams]
    rig.cuda.synchronize()
    for number in rig.many(1_000, 3):
        with rig.cuda.stream(streams[number % 2]):
            copies = {n: None if x is None else x.clone() for n, x in base.items()}
            out = run(case, copies)[0]
            del copies
            wrong[number % 2].logical_or_((out != expected).any())
    for stream in streams:
        stream.synchronize()
    assert not any(flag.item() for flag in wrong)


# ------------------------------------------------------------------------------------------------
# transforms and casts


@both
def test_vmap_and_refusals(rig):
    case = feature("plain", 1, F32, "small")
    tensors = inputs(case, rig.device)
    query, key, value = (tensors[n].detach() for n in ("query", "key", "value"))

    def attend(q):
        return natcupy.na1d(q, key, value, case.kernel_size, backend="cuda")

    queries = torch.stack([query, query * 2])
    mapped = torch.func.vmap(attend)(queries)
    assert torch.equal(mapped, torch.stack([attend(q) for q in queries]))
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(attend, (query,), (query,))
    query.requires_grad_()
    (first,) = torch.autograd.grad(attend(query).square().sum(), query, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        torch.autograd.grad(first.sum(), query)


@on(("dtype",), (F16, BF16), simulated=[1])
def test_autocast(rig, dtype):
    """Its dtype inside, float32 gradients outside."""
    model = Net(rig.size(64, 32)).to(rig.device)
    side = rig.size(14, 6)
    x = torch.randn(1, side, side, model.first.embed_dim, device=rig.device, requires_grad=True)
    with torch.autocast(rig.device.type, dtype):
        out = model(x)
    assert out.dtype == dtype
    out.float().sum().backward()
    assert x.grad.dtype == F32 and model.first.rpb.grad.dtype == F32
    expected = on_reference(model, x)
    assert (out.double() - expected).abs().max() < 0.1 * expected.abs().max()


@both
def test_mixed_devices_and_dtypes_are_refused(rig):
    case = feature("plain", 1, F32, "small")
    x = inputs(case, rig.device)["query"].detach()
    with pytest.raises(TypeError, match="one dtype"):
        natcupy.na1d(x, x.half(), x, 3, backend="cuda")
    with pytest.raises(ValueError, match="one device"):
        natcupy.na1d(x, x.to("meta"), x, 3, backend="cuda")


# ------------------------------------------------------------------------------------------------
# models, arrays


@on(("name", "side"), [("nat_mini", 224), ("dinat_mini", 224), ("tiny", 16)], simulated=[2])
def test_models(rig, name, side):
    """Logits and every gradient of a model beside the same model on the torch backend."""
    torch.manual_seed(0)
    if name == "tiny":
        model = natcupy.zoo.build_model(
            natcupy.zoo.ModelConfig("nat", 16, (1,), (1,), kernel_size=3, num_classes=10)
        )
    else:
        model = natcupy.create_model(name, num_classes=10)
    model = model.to(rig.device).eval()
    x = torch.randn(rig.size(2, 1), 3, side, side, device=rig.device)
    attend = natcupy.functional.backends.choose
    results = []
    for wanted in ("cuda", "torch"):
        model.zero_grad(set_to_none=True)
        exact = torch.backends.cudnn.flags(allow_tf32=False)
        with pytest.MonkeyPatch.context() as patch, exact:
            patch.setattr(
                natcupy.functional.backends, "choose",
                lambda _, *call, wanted=wanted: attend(wanted, *call),
            )  # fmt: skip
            logits = model(x)
            logits.square().sum().backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        results.append((logits.detach(), gradients))
    (ours, here), (theirs, there) = results
    assert (ours - theirs).abs().max() <= 1e-3 * max(1.0, theirs.abs().max())
    assert set(here) == set(there)
    for parameter, gradient in here.items():
        scale = there[parameter].abs().max().clamp_min(1e-6)
        assert ((gradient - there[parameter]).abs().max() / scale) < 1e-2, parameter


@both
def test_arrays_of_other_libraries(rig):
    """CuPy arrays in and out (numpy ones here), in place, on their stream."""
    case = feature("packed", 2, F32, rig.size("full", "small"))
    x = inputs(case, rig.device)["query"].detach()
    if rig.simulated:
        give, take = (lambda t: t.numpy()), torch.from_numpy
    else:
        cupy = pytest.importorskip("cupy")
        give, take = cupy.from_dlpack, torch.from_dlpack
    out = natcupy.na2d(*(give(x),) * 3, 3, backend="cuda")
    assert type(out) is type(give(x))
    assert torch.equal(take(out), natcupy.na2d(x, x, x, 3, backend="cuda"))


@both
def test_backend_choice_and_reasons(rig):
    """None takes this backend; asked by name for what it cannot do, it lists why."""
    from natcupy import backends

    case = feature("plain", 1, F32, "small")
    query, key, value = (inputs(case, rig.device)[n].detach() for n in ("query", "key", "value"))
    nothing = (case.hood, None, None, None)
    assert backends.choose(None, query, key, value, *nothing) is ops
    wide = query.new_zeros(1, 9, 1, 600)
    assert backends.choose(None, wide, wide, wide, *nothing) is backends.reference
    with pytest.raises(RuntimeError, match=r"at most 512.*backend='torch'"):
        natcupy.na1d(wide, wide, wide, 3, backend="cuda")


@only_gpu
def test_cupys_pool_stays_empty(rig):
    from natcupy.cuda import jit

    case = layer(14, 7, 1, BF16)
    run(case, inputs(case, rig.device), *cotangents(case, rig.device))
    assert jit.import_cupy().get_default_memory_pool().total_bytes() == 0
