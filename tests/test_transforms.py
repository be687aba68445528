"""torch's transforms over neighborhood attention: vmap, jvp, compile, export, checkpointing."""

import functools

import oracle
import pytest
import torch
from strategies import Problem, tensors
from tolerances import close
from torch._dynamo.testing import CompileCounterWithBackend

import natcupy

P = Problem((6, 7), (3, 3), (1, 1), (2, 1), (False, True), rpb=True, extra=2, groups=2)


def run(query, key, value, rpb=None, backend=None):
    return natcupy.na2d(query, key, value, kernel_size=3, dilation=(2, 1), rpb=rpb, backend=backend)


def triple(*lead, dtype=torch.float64):
    return torch.randn(3, *lead, 6, 7, 2, 4, dtype=dtype)


@pytest.mark.parametrize("backend", [None, "torch"])
def test_vmap_equals_a_loop(backend):
    attend = functools.partial(run, backend=backend)
    q, k, v = triple(3, 2)
    rpb = torch.randn(3, 2, 5, 5, dtype=torch.float64)
    out = torch.func.vmap(attend)(q, k, v, rpb)
    close(out, torch.stack([attend(*x) for x in zip(q, k, v, rpb, strict=True)]), torch.float64)
    tables = torch.func.vmap(attend, in_dims=(None, None, None, 0))(q[0], k[0], v[0], rpb)
    close(tables, torch.stack([attend(q[0], k[0], v[0], x) for x in rpb]), torch.float64)
    shared = torch.func.vmap(attend, in_dims=(0, None, None))(q, k[0], v[0])
    close(shared, torch.stack([attend(x, k[0], v[0]) for x in q]), torch.float64)


def test_a_traced_function_is_torchs_own():
    given = triple(1)
    traced = torch.jit.trace(run, tuple(given))
    close(traced(*given), run(*given), torch.float64)
    for backend in ("cpu", "cuda"):
        with pytest.raises(RuntimeError, match="torch's own operators alone: leave `backend` out"):
            torch.jit.trace(lambda *x, name=backend: run(*x, backend=name), tuple(given))


def test_per_sample_gradients():
    q, k, v = triple(3, 1)
    per_sample = torch.func.vmap(torch.func.grad(lambda *x: run(*x).square().sum()))(q, k, v)
    for i in range(3):
        leaf = q[i].clone().requires_grad_()
        run(leaf, k[i], v[i]).square().sum().backward()
        close(per_sample[i], leaf.grad, torch.float64, backward=True)


def test_jvp_equals_finite_differences():
    primals, tangents = tuple(triple(1)), tuple(triple(1))
    _, tangent = torch.func.jvp(run, primals, tangents)
    step = 1e-6
    ahead = run(*(p + step * t for p, t in zip(primals, tangents, strict=True)))
    behind = run(*(p - step * t for p, t in zip(primals, tangents, strict=True)))
    assert torch.allclose(tangent, (ahead - behind) / (2 * step), atol=1e-7)
    assert tangent.abs().max() > 0.1


def test_hessian_vector_product():
    q, k, v = (x.requires_grad_() for x in triple(1))
    (first,) = torch.autograd.grad(run(q, k, v).square().sum(), q, create_graph=True)
    second = torch.autograd.grad(first.square().sum(), (q, k, v))
    out, _ = oracle.attention(q, k, v, 3, dilation=(2, 1))
    (first,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    expected = torch.autograd.grad(first.square().sum(), (q, k, v))
    for a, b in zip(second, expected, strict=True):
        close(a, b, torch.float64, backward=True)


def test_compile_full_graph_and_any_size():
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter, dynamic=True)
    def step(**inputs):
        return natcupy.na2d(**inputs, **P.window, return_lse=True)

    for height in range(6, 16):
        inputs = tensors(P.but(shape=(height, height + 1)), torch.float32, requires_grad=True)
        out, lse = step(**inputs)
        expected, expected_lse = oracle.attention(**inputs, **P.window)
        close(out, expected, torch.float32)
        close(lse, expected_lse, torch.float32, "lse")
        leaves = [x for x in inputs.values() if isinstance(x, torch.Tensor)]
        got = torch.autograd.grad(out.sum() + lse.sum(), leaves)
        want = torch.autograd.grad(expected.sum() + expected_lse.sum(), leaves)
        for a, b in zip(got, want, strict=True):
            close(a, b.double(), torch.float32, backward=True)
    assert counter.frame_count <= 2


def test_compile_several_scales():
    """A second value makes torch.compile take the number for a variable."""
    torch.compiler.reset()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(query, scale):
        return natcupy.na1d(query, query, query, 3, scale=scale)

    query = torch.randn(1, 6, 1, 4)
    for scale in (0.25, 0.5, 2.0):
        expected, _ = oracle.attention(query, query, query, 3, scale=scale)
        close(step(query, scale), expected, torch.float32)


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = natcupy.NeighborhoodAttention2D(8, 2, 3, dilation=2, rel_pos_bias=True)

    def forward(self, x):
        return self.attn(x)


def test_export_with_symbolic_sizes():
    layer = Layer().eval()
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO}
    program = torch.export.export(layer, (torch.randn(2, 8, 9, 8),), dynamic_shapes=(sizes,))
    for shape in ((1, 8, 9, 8), (3, 12, 7, 8)):
        x = torch.randn(shape)
        close(program.module()(x), layer(x).double(), torch.float32)


def test_onnx(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs natcupy[export]")
    pytest.importorskip("onnxscript", reason="needs natcupy[export]")
    layer = Layer().eval()
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO}
    program = torch.onnx.export(
        layer,
        (torch.randn(2, 8, 9, 8),),
        dynamo=True,
        dynamic_shapes=(sizes,),
        verbose=False,
    )
    assert all(node.domain == "" for node in program.model.graph)  # standard operators only
    path = tmp_path / "layer.onnx"
    program.save(path)
    session = onnxruntime.InferenceSession(path)
    for shape in ((1, 8, 9, 8), (3, 12, 7, 8)):
        x = torch.randn(shape)
        (out,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        close(torch.from_numpy(out), layer(x).double(), torch.float32)


def test_activation_checkpointing():
    layer = natcupy.NeighborhoodAttention2D(8, 2, 3, rel_pos_bias=True).double()
    x = torch.randn(2, 5, 6, 8, dtype=torch.float64)
    layer(x).square().sum().backward()
    expected = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False).square().sum().backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(layer.parameters(), expected, strict=True))


def test_inputs_changed_in_place_give_no_wrong_gradient():
    q, k, v = (x.requires_grad_() for x in triple(1))
    (expected,) = torch.autograd.grad(run(q, k, v).square().sum(), q)
    key, value = k * 1, v * 1
    out = run(q, key, value).square().sum()
    with torch.no_grad():
        key.mul_(2)
        value.mul_(2)
    try:
        (got,) = torch.autograd.grad(out, q)
    except RuntimeError as error:  # a backend may save the inputs themselves
        assert "modified by an inplace operation" in str(error)
    else:
        close(got, expected, torch.float64, backward=True)


def test_meta_tensors_give_shapes():
    q = torch.empty(2, 6, 7, 4, 8, device="meta")
    out, lse = natcupy.na2d(q, q, q, 3, return_lse=True)
    assert out.shape == q.shape and lse.shape == (2, 6, 7, 4) and out.is_meta
