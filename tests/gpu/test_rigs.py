"""The simulated GPU is like the real one where the tests look, and can make a test fail."""

import inspect

import pytest
import torch
from kernel_cases import F32, inputs
from problems import check, feature, run
from rigs import Rig, both, param
from simulated import DOUBLE, MEMORY, Cuda

from natcupy.cuda import launch

simulated = pytest.mark.parametrize("rig", [param("simulated")], indirect=True)


def names(call):
    return [p for p in inspect.signature(call).parameters if p not in ("self", "args", "kwargs")]


def test_the_double_has_only_what_torch_has():
    """Every name and every parameter of the double exists in torch.cuda."""
    for name in DOUBLE.functions:
        real = names(getattr(torch.cuda, name))
        assert names(getattr(Cuda, name)) == real[: len(names(getattr(Cuda, name)))], name
    for name, methods in DOUBLE.classes.items():
        double, real = getattr(Cuda, name), getattr(torch.cuda, name)
        assert set(names(double)) <= {*names(real), "device", "priority"}, name
        for method in methods:
            assert callable(getattr(real, method)), (name, method)
    public = {n for n in vars(Cuda) if not n.startswith("__")}
    assert public <= {*DOUBLE.functions, *DOUBLE.classes, "OutOfMemoryError"}


@simulated
def test_a_kernel_on_the_wrong_stream_is_noticed(rig):
    """The stream test can fail: a driver that is told the default stream reads stale numbers."""
    case = feature("plain", 1, F32, "small")
    tensors = inputs(case, rig.device)
    expected = run(case, tensors)[0]
    true = tensors["value"].detach().clone()
    for wrong in (False, True):
        if wrong:
            rig.gpu.driver.stream = lambda device: rig.cuda.default.cuda_stream
        tensors["value"].data.zero_()
        side = rig.cuda.Stream()
        with rig.cuda.stream(side):
            rig.cuda._sleep(1)
            rig.queue(lambda: tensors["value"].data.copy_(true))
            out = run(case, tensors)[0]
        side.synchronize()
        assert torch.equal(out, expected) is not wrong


@simulated
def test_a_graph_that_misses_a_step_is_noticed(rig):
    case = feature("plain", 1, F32, "small")
    tensors = {n: None if x is None else x.detach() for n, x in inputs(case, rig.device).items()}
    run(case, tensors)
    graph = rig.cuda.CUDAGraph()
    with rig.cuda.graph(graph):
        out = run(case, tensors)[0]
    assert out.isnan().all()  # nothing ran yet
    graph.steps.pop()
    graph.replay()
    assert out.isnan().any()


@simulated
def test_memory_ends_and_comes_back(rig):
    before = rig.cuda.memory_allocated()
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(MEMORY + 1, dtype=torch.uint8)
    room = torch.empty(1000)
    assert rig.cuda.memory_allocated() == before + 4000 and room.isnan().all()
    del room
    assert rig.cuda.memory_allocated() == before


@simulated
def test_shared_memory_must_be_asked_for(rig, monkeypatch):
    monkeypatch.setattr(launch, "WITHOUT_ASKING", 1)
    monkeypatch.setattr(rig.gpu.driver, "unasked", 1)
    case = feature("plain", 1, F32, "small")
    check(case, rig)  # the launcher asks
    monkeypatch.setattr(rig.gpu.driver, "allow_shared", lambda function, size: None)
    rig.gpu.launcher._loaded.clear()
    with pytest.raises(AssertionError, match="was allowed"):
        run(case, inputs(case, rig.device))


@both
def test_a_wrong_number_is_noticed(rig, monkeypatch):
    """The error rule has teeth: a scale off by one part in a thousand fails in float32."""
    from natcupy import functional

    resolve = functional.resolve_scale
    monkeypatch.setattr(functional, "resolve_scale", lambda *a: resolve(*a) * 1.001)
    with pytest.raises(AssertionError, match="allowed"):
        check(feature("plain", 1, F32, "small"), rig)


def test_a_rig_outside_its_block_changes_nothing():
    pytest.importorskip("cupy")
    rig = Rig("simulated")
    made = torch.empty
    with rig.active():
        assert torch.empty is not made
    assert torch.empty is made and launch.current_launcher() is None
