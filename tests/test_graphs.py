"""The graph helper without a GPU: what it says to torch.cuda, in which order, and its errors."""

import contextlib
import gc
import weakref

import pytest
import torch
from torch import nn

import natcupy
from natcupy import graphs


class Stream:
    def __init__(self, log, name):
        self.log, self.name = log, name

    def wait_stream(self, other):
        self.log.append(f"{self.name} waits for {other.name}")


class FakeCuda:
    """torch.cuda's part in a capture; a replay runs the captured model on the same tensors."""

    def __init__(self, model):
        self.log, self.model, self.capturing, self.cached = [], model, False, []
        model.register_forward_hook(self._ran)

    def _ran(self, module, inputs, output):
        self.cached.append(torch.is_autocast_cache_enabled())
        self.log.append("captured run" if self.capturing else "run")
        if self.capturing:
            self.inputs, self.output = inputs, output

    @contextlib.contextmanager
    def device(self, device):
        self.log.append(f"device {device}")
        yield

    def Stream(self, device):  # noqa: N802
        return Stream(self.log, "side")

    def current_stream(self, device):
        return Stream(self.log, "current")

    @contextlib.contextmanager
    def stream(self, stream):
        self.log.append(f"on {stream.name}")
        yield
        self.log.append("off")

    def CUDAGraph(self):  # noqa: N802
        return self

    @contextlib.contextmanager
    def graph(self, graph, stream):
        self.log.append(f"capture on {stream.name}")
        self.capturing = True
        yield
        self.capturing = False

    def replay(self):
        self.log.append("replay")
        self.output["out"].copy_(self.model(*self.inputs)["out"])


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x):
        return {"out": self.linear(x), "size": 3}


@pytest.fixture
def cuda(monkeypatch):
    model = Net().eval()
    fake = FakeCuda(model)
    monkeypatch.setattr(graphs, "_cuda", fake)
    monkeypatch.setattr(graphs, "_DEVICE_TYPE", "cpu")
    return fake


def test_the_capture(cuda):
    """Warm-up on a side stream that both ways is waited for, then one captured run."""
    natcupy.graph(cuda.model, torch.randn(2, 4))
    assert cuda.log == [
        "device cpu", "side waits for current", "on side", *["run"] * graphs.WARM_UPS, "off",
        "current waits for side", "capture on side", "captured run",
    ]  # fmt: skip


def test_calls(cuda):
    example, other = torch.randn(2, 2, 4)
    graphed = natcupy.graph(cuda.model, example)
    first = graphed(example)
    kept = first["out"].clone()
    second = graphed(other)
    assert torch.equal(kept, first["out"]), "results are the caller's own"
    assert torch.equal(second["out"], cuda.model(other)["out"]) and second["size"] == 3
    assert not second["out"].requires_grad
    mine = graphed(example, copy=False)
    graphed(other)
    assert torch.equal(mine["out"], second["out"]), "the graph's own are overwritten"
    with torch.no_grad():
        cuda.model.linear.weight.zero_()
    assert torch.equal(graphed(other)["out"], cuda.model.linear.bias.expand(2, 3))


def test_the_example_is_not_kept(cuda):
    example = torch.randn(2, 4)
    graphed, before = natcupy.graph(cuda.model, example), example.clone()
    graphed(torch.randn(2, 4))
    assert torch.equal(example, before)


def test_autocast_copies_no_weights_beside_the_graph(cuda):
    with torch.autocast("cpu", torch.bfloat16):
        graphed = natcupy.graph(cuda.model, torch.randn(2, 4))
        assert torch.is_autocast_cache_enabled()
    assert not any(cuda.cached)
    assert graphed(torch.randn(2, 4))["out"].dtype == torch.bfloat16


def test_a_failing_model_leaves_autocast_as_it_was(cuda):
    cuda.model.linear = nn.Linear(5, 3).eval()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        natcupy.graph(cuda.model, torch.randn(2, 4))
    assert torch.is_autocast_cache_enabled()


@pytest.mark.parametrize(
    "given",
    [(torch.randn(3, 4),), (torch.randn(2, 4).double(),), (), (torch.randn(2, 4),) * 2, ("x",)],
)
def test_calls_that_do_not_fit(cuda, given):
    graphed = natcupy.graph(cuda.model, torch.randn(2, 4))
    with pytest.raises(ValueError, match=r"captured for \(\[2, 4\] float32 on cpu\), got .*model"):
        graphed(*given)
    assert "replay" not in cuda.log


def test_what_the_graph_reads_is_not_freed(cuda, monkeypatch):
    """Its caller may forget the model, or replace a weight in it."""
    model = Net().eval()
    monkeypatch.setattr(graphs, "_cuda", FakeCuda(model))
    first, later = weakref.ref(model.linear.weight), weakref.ref(model.linear.bias)
    graphed = natcupy.graph(model, torch.randn(2, 4))
    model.linear.weight = nn.Parameter(torch.zeros(3, 4))
    graphs._cuda.model = None
    del model
    gc.collect()
    assert first() is not None and later() is not None
    del graphed
    graphs._cuda = None
    gc.collect()
    assert first() is None and later() is None


def test_captured_in_inference_mode_and_called_outside(cuda):
    with torch.inference_mode():
        graphed = natcupy.graph(cuda.model, torch.randn(2, 4))
    x = torch.randn(2, 4)
    assert torch.equal(graphed(x)["out"], cuda.model(x)["out"])


def test_a_model_with_a_state_of_its_own(cuda):
    cuda.model.get_extra_state = lambda: 7
    natcupy.graph(cuda.model, torch.randn(2, 4))


def test_wrong_arguments(monkeypatch):
    with pytest.raises(TypeError, match=r"torch\.nn\.Module, got function"):
        natcupy.graph(lambda x: x, torch.randn(1))
    with pytest.raises(TypeError, match=r"example tensors.* got none"):
        natcupy.graph(Net())
    for net in (Net(), Net().eval()):  # what eval() would not help with comes first
        with pytest.raises(ValueError, match=r"one CUDA device, got cpu; move them"):
            natcupy.graph(net, torch.randn(2, 4))
    monkeypatch.setattr("natcupy.graphs._DEVICE_TYPE", "cpu")
    with pytest.raises(ValueError, match=r"training mode; call model\.eval\(\)"):
        natcupy.graph(Net(), torch.randn(2, 4))
    partly = Net().eval()
    partly.linear.train()
    with pytest.raises(ValueError, match="training mode"):
        natcupy.graph(partly, torch.randn(2, 4))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")
def test_on_a_gpu():
    model = natcupy.create_model("nat-mini", num_classes=10).cuda().eval()
    images = torch.randn(2, 2, 3, 64, 64, device="cuda")
    graphed = natcupy.graph(model, images[0])
    with torch.no_grad():
        for image in images:
            assert torch.equal(graphed(image), model(image))
