"""A layer hands its projection to the kernels and takes their result without a copy, both ways.

Seen from the launcher: the addresses and strides in a kernel's arguments are those of the tensors
that the projections made and take.
"""

import importlib.util

import pytest
import torch
from ptxsim.launcher import PtxLauncher

import natcupy
from natcupy import backends
from natcupy.cuda import jit, ops, params, plan
from natcupy.cuda.arch import Target
from natcupy.layouts import joined
from natcupy.zoo.layers import Block

needs_nvrtc = pytest.mark.skipif(
    importlib.util.find_spec("cupy") is None, reason="NVRTC comes with CuPy, which is not installed"
)
DIM, HEADS = 64, 2


class Driver:
    """Writes down the fields of every launch, runs nothing."""

    device_type = "cpu"

    def __init__(self):
        self.launches = []

    def target(self, device):
        return Target("90a")

    def launch(self, recipe, device):
        packer, offsets = params.layout(recipe.spec.entry)
        fields = dict(zip(offsets, packer.unpack(recipe.args), strict=True))
        self.launches.append((recipe.spec.entry, fields))


@pytest.fixture
def driver(monkeypatch):
    class Cuda:
        @staticmethod
        def attention(*args):
            return ops.attention(*args[:8])

    monkeypatch.setattr(backends, "choose", lambda *_: Cuda)
    with jit.use_launcher(Driver()) as launcher:
        yield launcher


def layer(dtype=torch.float32):
    torch.manual_seed(0)
    return natcupy.NeighborhoodAttention2D(DIM, HEADS, 7, rel_pos_bias=True).to(dtype)


class Seen:
    """The tensors at the two projections: their addresses, and the gradient of the first's."""

    def __init__(self, attention):
        self.gradient = None
        attention.qkv.register_forward_hook(self._projected)
        attention.proj.register_forward_pre_hook(self._attended)

    def _projected(self, module, inputs, output):
        self.qkv, self.size = output.data_ptr(), output.element_size()
        if output.requires_grad:
            output.register_hook(self._differentiated)

    def _attended(self, module, inputs):
        self.out = inputs[0].data_ptr()
        if inputs[0].requires_grad:
            inputs[0].register_hook(lambda grad: setattr(self, "d_out", grad.data_ptr()))

    def _differentiated(self, grad):
        assert grad.is_contiguous()
        self.gradient = grad.data_ptr()


def check_in_place(fields, names, start, size):
    """Three parts of one tensor, a row apart, read or written where they lie."""
    for number, name in enumerate(names):
        assert fields[f"{name}.data"] == start + number * DIM * size, name
        assert fields[f"{name}.axis.1"] == 3 * DIM and fields[f"{name}.head"] == DIM // HEADS


ROWS, GRADIENTS = ("query", "key", "value"), ("d_query", "d_key", "d_value")


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_a_layer_copies_nothing(driver, training, autocast):
    attention = layer(torch.float32 if autocast else torch.bfloat16)
    seen = Seen(attention)
    image = torch.randn(2, 9, 11, DIM, dtype=attention.qkv.weight.dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), torch.set_grad_enabled(training):
        out = attention(image)
    assert seen.size == 2
    ((entry, fields),) = driver.launches
    assert entry == "na2d_small_fwd"
    check_in_place(fields, ROWS, seen.qkv, 2)
    assert fields["out.data"] == seen.out
    if not training:
        return
    driver.launches.clear()
    out.float().square().sum().backward()
    launches = dict(driver.launches)
    fields = launches["na2d_small_bwd"]
    check_in_place(fields, ROWS, seen.qkv, 2)
    assert fields["d_out.data"] == seen.d_out
    check_in_place(fields, GRADIENTS, seen.gradient, 2)
    assert all(parameter.grad is not None for parameter in attention.parameters())


def test_a_block_takes_no_other_path(driver):
    """Norms, residuals and dropped paths around the layer change nothing of that."""
    block = Block(DIM, layer(), 3.0, drop_path=0.2, layer_scale=1e-5).to(torch.bfloat16)
    seen = Seen(block.attn)
    image = torch.randn(2, 9, 11, DIM, dtype=torch.bfloat16, requires_grad=True)
    block(image).float().sum().backward()
    launches = dict(driver.launches)
    check_in_place(launches["na2d_small_fwd"], ROWS, seen.qkv, 2)
    assert launches["na2d_small_fwd"]["out.data"] == seen.out
    check_in_place(launches["na2d_small_bwd"], GRADIENTS, seen.gradient, 2)


def test_compiled_layers_copy_nothing_forward(driver):
    attention = layer(torch.bfloat16)
    compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)
    image = torch.randn(2, 9, 11, DIM, dtype=torch.bfloat16)
    compiled(image).float().sum().backward()
    for entry, fields in driver.launches:
        if entry != "reduce_partials":
            check_in_place(fields, ROWS, fields["query.data"], 2)
    assert [entry for entry, _ in driver.launches][:2] == ["na2d_small_fwd", "na2d_small_bwd"]


@needs_nvrtc
@pytest.mark.parametrize("family", ["portable", "small"])
def test_packed_gradients_are_right(family, monkeypatch):
    """The same bits as through `unbind`, whose backward joins the three by a copy."""
    driver = type("Cuda", (), {"attention": staticmethod(lambda *args: ops.attention(*args[:8]))})
    monkeypatch.setattr(backends, "choose", lambda *_: driver)
    attention = natcupy.NeighborhoodAttention2D(DIM, HEADS, 3, rel_pos_bias=True)
    attention.to(torch.float16)
    image = torch.randn(1, 4, 9, DIM, dtype=torch.float16)

    def gradients():
        attention.zero_grad()
        attention(image).float().square().sum().backward()
        return [parameter.grad for parameter in attention.parameters()]

    with PtxLauncher("80").active(), plan.use_family(family):
        packed = gradients()
        monkeypatch.setattr("natcupy.modules._split", lambda qkv: qkv.unbind(-3))
        plain = gradients()
    assert all(torch.equal(a, b) for a, b in zip(packed, plain, strict=True))


def test_what_counts_as_packed():
    whole = torch.randn(2, 5, 3, 2, 4)
    parts = whole.unbind(-3)
    assert joined(*parts).data_ptr() == whole.data_ptr() and torch.equal(joined(*parts), whole)
    assert joined(*(x.clone() for x in parts)) is None
    assert joined(parts[0], parts[2], parts[1]) is None
    assert joined(parts[0], parts[1], torch.randn(2, 5, 4, 2, 4).unbind(-3)[2]) is None
    assert joined(*torch.randn(2, 5, 2, 3, 4).unbind(-2)) is None
    assert joined(*whole[:, ::2].unbind(-3)) is None
    wide = torch.randn(2, 5, 4, 2, 4)
    assert joined(*wide.unbind(-3)[:3]) is None


def test_gradients_of_gradients_still_flow(monkeypatch):
    """With a graph of the backward pass, the three are joined by torch's own differentiable op."""
    monkeypatch.setattr(backends, "choose", lambda *_: backends.reference)
    attention = natcupy.NeighborhoodAttention2D(8, 2, 3).double()
    image = torch.randn(1, 3, 4, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(attention, image, fast_mode=True)


def test_batched_gradients_still_flow(monkeypatch):
    monkeypatch.setattr(backends, "choose", lambda *_: backends.reference)
    attention = natcupy.NeighborhoodAttention2D(8, 2, 3)
    image = torch.randn(1, 3, 4, 8, requires_grad=True)
    out, d_outs = attention(image), torch.randn(2, 1, 3, 4, 8)
    (batched,) = torch.autograd.grad(out, image, d_outs, retain_graph=True, is_grads_batched=True)
    for one, d_out in zip(batched, d_outs, strict=True):
        (expected,) = torch.autograd.grad(out, image, d_out, retain_graph=True)
        assert torch.allclose(one, expected, atol=1e-6)
