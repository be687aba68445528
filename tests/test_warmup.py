"""What a warm-up makes ready is what the calls then launch, seen by a launcher without a GPU."""

import functools
import importlib.util
import subprocess
import sys
import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import natcupy
from natcupy import backends, cache
from natcupy.cuda import jit, ops
from natcupy.cuda.arch import Target
from natcupy.warmup import Call, Warmed, _cuda_specs, warmup

needs_nvrtc = pytest.mark.skipif(
    importlib.util.find_spec("cupy") is None, reason="NVRTC comes with CuPy, which is not installed"
)
needs_llvm = pytest.mark.skipif(
    importlib.util.find_spec("llvmlite") is None, reason="llvmlite is not installed"
)
CPU = torch.device("cpu")


class Driver:
    """A launcher that only writes down what it is asked for."""

    device_type = "cpu"

    def __init__(self):
        self.launched, self.prepared = {}, {}

    def target(self, device):
        return Target("80")

    def prepare(self, spec, device, shared=0):
        self.prepared[spec] = max(shared, self.prepared.get(spec, 0))

    def launch(self, recipe, device):
        self.launched[recipe.spec] = max(recipe.shared, self.launched.get(recipe.spec, 0))


class Cuda:
    """The CUDA backend, asked for or not."""

    @staticmethod
    def attention(*args):
        return ops.attention(*args)


compile_once = functools.cache(jit.compile_spec)  # tests with empty caches want the same kernels


@pytest.fixture
def driver(monkeypatch, tmp_path):
    """The CUDA backend for every call, up to the driver; binaries in a folder of their own."""
    monkeypatch.setenv(cache.FOLDER_VARIABLE, str(tmp_path))
    monkeypatch.setattr(jit, "compile_spec", compile_once)
    monkeypatch.setattr(backends, "choose", lambda *_: Cuda)
    with jit.use_launcher(Driver()) as launcher:
        yield launcher


@pytest.fixture
def binaries(monkeypatch, tmp_path):
    monkeypatch.setenv(cache.FOLDER_VARIABLE, str(tmp_path))


class Net(nn.Module):
    """Two layers of different windows, a norm with statistics, dropout."""

    def __init__(self, dim=16, dtype=None):
        super().__init__()
        self.first = natcupy.NeighborhoodAttention2D(dim, 2, 3, rel_pos_bias=True)
        self.norm = nn.BatchNorm2d(dim)
        self.drop = nn.Dropout(0.5)
        self.second = natcupy.NeighborhoodAttention2D(dim, 4, 5, dilation=2, is_causal=True)
        self.to(dtype)

    def forward(self, x):
        x = self.norm(self.first(x).movedim(-1, 1)).movedim(1, -1)
        return {"out": self.second(self.drop(x))}


CALLS = (
    Call((9,), 2, 8, 3),
    Call((6, 7), 4, 16, 3, kv_heads=2, value_dim=24, rpb=True, dtype=torch.float16),
    Call((4, 5, 6), 2, 5, (3, 2, 3), stride=(1, 2, 1), is_causal=True, extras=3, batch=2),
    Call((12, 12), 1, 20, 3, dilation=2, dtype=torch.bfloat16),
    Call((5,), 1, 3, 3, rpb=True, dtype=torch.float64),
)


def run(call, backward):
    """The same call with tensors, of which all, none or some are to have gradients."""
    rows, kv_heads = (call.batch, *call.shape), call.kv_heads or call.heads
    value_dim = call.value_dim or call.head_dim

    def tensor(name, *shape):
        wanted = backward if isinstance(backward, bool) else name in backward
        return torch.zeros(shape, dtype=call.dtype, requires_grad=wanted)

    extra = {}
    if call.rpb:
        sizes = call.kernel_size
        sizes = sizes if isinstance(sizes, tuple) else (sizes,) * len(call.shape)
        extra["rpb"] = tensor("rpb", call.heads, *(2 * k - 1 for k in sizes))
    if call.extras:
        for name, dim in (("additional_keys", call.head_dim), ("additional_values", value_dim)):
            extra[name] = tensor(name, call.batch, call.extras, kv_heads, dim)
    attend = getattr(natcupy, f"na{len(call.shape)}d")
    out = attend(
        tensor("query", *rows, call.heads, call.head_dim),
        tensor("key", *rows, kv_heads, call.head_dim),
        tensor("value", *rows, kv_heads, value_dim),
        call.kernel_size, call.stride, call.dilation, call.is_causal, **extra,
    )  # fmt: skip
    if out.requires_grad:
        out.backward(torch.zeros_like(out))


@needs_nvrtc
@pytest.mark.parametrize("backward", [False, True])
def test_calls_are_made_ready(driver, backward):
    done = warmup(CALLS, backward=backward, device="cpu", quiet=True)
    assert not driver.launched, "a warm-up launches nothing"
    for call in CALLS:
        run(call, backward)
    assert driver.prepared == driver.launched
    assert done.kernels == done.compiled == len(driver.launched) and done.cached == 0
    assert done.calls == len(CALLS) * (1 + backward)


SMALL = Call((9, 10), 2, 32, 7, rpb=True, dtype=torch.bfloat16)  # of the small-window kernels


@pytest.fixture
def nothing_compiled(monkeypatch):
    monkeypatch.setattr(jit, "compile_many", lambda *_, **__: {})


@needs_nvrtc
@pytest.mark.parametrize("call", [SMALL, CALLS[1], CALLS[2]], ids=["small", "grouped", "extras"])
@pytest.mark.parametrize(
    "wanted",
    [("query",), ("query", "rpb"), ["rpb"], ("key", "value"), ("additional_values",), ()],
    ids=str,
)
def test_some_gradients_are_made_ready(driver, nothing_compiled, call, wanted):
    warmup(call, backward=wanted, device="cpu", quiet=True)
    run(call, wanted)
    assert driver.prepared == driver.launched


@needs_nvrtc
def test_all_gradients_and_some_of_them_are_different_kernels(driver, nothing_compiled):
    warmup(SMALL, backward=True, device="cpu", quiet=True)
    every = {spec.entry for spec in driver.prepared}
    assert every == {"na2d_small_fwd", "na2d_small_bwd", "reduce_partials"}
    driver.prepared.clear()
    warmup(SMALL, backward=("query", "rpb"), device="cpu", quiet=True)
    some = {spec.entry for spec in driver.prepared}
    assert some == {"na2d_small_fwd", "na2d_small_bwd_dq", "reduce_partials"}


class Frozen(nn.Module):
    """Queries and a bias that learn, keys and values that do not."""

    def __init__(self):
        super().__init__()
        self.query, self.rest = nn.Linear(8, 64), nn.Linear(8, 128)
        self.rpb = nn.Parameter(torch.zeros(2, 13, 13))
        self.rest.requires_grad_(False)
        self.to(torch.bfloat16)

    def forward(self, x):
        q, k, v = (y.unflatten(-1, (2, 32)) for y in (self.query(x), *self.rest(x).chunk(2, -1)))
        return natcupy.na2d(q, k, v, 7, rpb=self.rpb)


@needs_nvrtc
def test_what_is_frozen_in_a_model_needs_no_kernel(driver, nothing_compiled):
    warmup(Frozen(), (1, 9, 10, 8), quiet=True)
    Frozen()(torch.zeros(1, 9, 10, 8, dtype=torch.bfloat16)).sum().backward()
    assert driver.prepared == driver.launched
    assert "na2d_small_bwd_dq" in {spec.entry for spec in driver.prepared}


@needs_nvrtc
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_is_made_ready_and_left_alone(driver, dtype):
    model = Net(dtype=dtype)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    state = torch.get_rng_state()
    done = warmup(model, (2, 11, 13, 16), quiet=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    model(torch.zeros(2, 11, 13, 16, dtype=dtype))["out"].sum().backward()
    assert driver.prepared == driver.launched
    assert (done.calls, done.kernels) == (4, len(driver.launched))


@needs_nvrtc
def test_the_mode_decides_about_gradients(driver):
    model = Net().eval()
    assert warmup(model, (1, 11, 11, 16), quiet=True).calls == 2
    forward = set(driver.prepared)
    assert {spec.entry for spec in forward} == {"na_fwd"}
    again = warmup(model, (1, 11, 11, 16), backward=True, quiet=True)
    assert again.cached == len(forward) and again.compiled == again.kernels - len(forward)
    assert {spec.entry for spec in driver.prepared} >= {"na_fwd", "na_bwd_dq", "na_bwd_dkv"}


@needs_nvrtc
def test_a_model_that_runs_again_for_its_gradients(driver):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = Net()

        def forward(self, x):
            return checkpoint(lambda x: self.net(x)["out"], x, use_reentrant=False)

    plain = warmup(Net(), (1, 11, 11, 16), quiet=True)
    again = warmup(Twice(), (1, 11, 11, 16), quiet=True)
    assert again.kernels == again.cached == plain.kernels
    assert again.calls > plain.calls


@needs_nvrtc
def test_several_sizes_and_a_second_time(driver):
    sizes = [(1, 11, 11, 16), (2, 30, 17, 16)]
    first = warmup(Net(), sizes, quiet=True)
    second = warmup(Net(), sizes, quiet=True)
    assert first.calls == second.calls == 8
    assert first.compiled == first.kernels == second.kernels == second.cached
    assert str(second).endswith(f"0 compiled, {second.kernels} from the cache")


@needs_nvrtc
def test_autocast_is_seen(driver):
    with torch.autocast("cpu", torch.bfloat16):
        warmup(Net().eval(), (1, 11, 11, 16), quiet=True)
        Net().eval()(torch.zeros(1, 11, 11, 16))
    assert {dict(spec.constants)["SCALAR"] for spec in driver.prepared} == {"BF16"}
    assert driver.prepared.keys() == driver.launched.keys()


@needs_nvrtc
def test_strides_and_offsets_are_seen(driver):
    """Rows of five halves can only be read two bytes at a time; those of sixteen by sixteen."""

    class Odd(nn.Module):
        def forward(self, x):
            q, k, v = x[..., 1:].unflatten(-1, (3, 1, 5)).unbind(-3)
            return natcupy.na1d(q, k, v, 3)

    warmup(Odd(), (1, 9, 16), dtype=torch.float16, quiet=True)
    Odd()(torch.zeros(1, 9, 16, dtype=torch.float16))
    assert driver.prepared.keys() == driver.launched.keys()
    assert {dict(spec.constants)["ACCESS"] for spec in driver.prepared} == {2}


@needs_nvrtc
def test_other_threads_launch_meanwhile(driver):
    """Launches of a running model are not swallowed while another thread warms up."""
    go, stop = threading.Event(), threading.Event()
    counted = []

    def work():
        go.set()
        while not stop.is_set() or not counted:
            driver.launched.clear()
            run(CALLS[0], False)
            counted.append(len(driver.launched))

    thread = threading.Thread(target=work)
    thread.start()
    go.wait()
    warmup(CALLS[:1] * 20, device="cpu", quiet=True)
    stop.set()
    thread.join()
    assert set(counted) == {1}


@needs_nvrtc
def test_progress_is_shown_and_can_be_silenced(driver, capsys):
    warmup(CALLS[0], device="cpu")
    shown = capsys.readouterr()
    assert "compiling for cpu" in shown.err and not shown.out
    warmup(CALLS[0], device="cpu")
    warmup(CALLS[1], device="cpu", quiet=True)
    assert capsys.readouterr() == ("", "")


def test_a_failing_compiler_is_not_hidden(driver, monkeypatch):
    def fail(*_, **__):
        raise jit.CompileError("this compiler fails")

    monkeypatch.setattr(jit, "ingredients", lambda spec, target: {"spec": str(spec)})
    monkeypatch.setattr(jit, "compile_many", fail)
    with pytest.raises(jit.CompileError, match="this compiler fails"):
        warmup(CALLS[0], device="cpu", quiet=True)


@needs_llvm
def test_cpu_kernels_are_made_ready(binaries, monkeypatch):
    """In a fresh cache: the run that follows compiles nothing more."""
    from natcupy.cpu import host

    monkeypatch.setattr(host, "_functions", {})
    net, image = Net(), torch.randn(1, 11, 11, 16)
    done = warmup(net, tuple(image.shape), quiet=True)
    assert done.compiled == done.kernels >= 2
    ready = set(host._functions)
    assert len(ready) == done.kernels
    net(image)["out"].sum().backward()
    assert set(host._functions) == ready
    again = warmup(net, tuple(image.shape), quiet=True)
    assert (again.kernels, again.compiled) == (done.kernels, 0)


def test_the_torch_backend_needs_nothing(binaries):
    done = warmup(Call((9,), 2, 8, 3), device="cpu", backend="torch", quiet=True)
    assert (done.calls, done.kernels) == (0, 0)


def test_zoo_models_know_their_input(binaries):
    model = natcupy.create_model("nat-mini", num_classes=3).eval()
    done = warmup(model, quiet=True)
    assert isinstance(done, Warmed)
    if importlib.util.find_spec("llvmlite"):
        assert done.calls == sum(model.config.depths)


@pytest.mark.parametrize(
    "arguments, error, match",
    [
        ((3,), TypeError, "a torch.nn.Module, a natcupy.warmup.Call"),
        (([1],), TypeError, "or several calls"),
        ((nn.Linear(3, 3),), ValueError, "shape of its input"),
        ((nn.Linear(3, 3), (0, 3)), ValueError, "at least 1"),
        ((nn.Linear(3, 3), [(1, 3), "ab"]), TypeError, "one shape or several"),
        ((CALLS[0], (1, 9)), TypeError, "input_size is for models"),
        ((Call((1, 1, 1, 1), 1, 8, 1),), ValueError, "1, 2 or 3 axes"),
        ((Call((5,), 1, 8, 7),), ValueError, "kernel_size"),
    ],
)
def test_wrong_arguments(arguments, error, match):
    with pytest.raises(error, match=match):
        warmup(*arguments, quiet=True)


@pytest.mark.parametrize("wrong", ["query", ("query", "bias"), 1])
def test_gradients_have_names(wrong):
    with pytest.raises(ValueError, match="several of query, key, value, rpb, additional_keys"):
        warmup(CALLS[0], backward=wrong, quiet=True)
    with pytest.raises(TypeError, match="names of tensors are for calls"):
        warmup(nn.Linear(3, 3), (1, 3), backward=wrong, quiet=True)


def test_calls_are_found_beside_the_function():
    code = "import natcupy; natcupy.warmup; natcupy.warmup.Call((9,), 1, 8, 3)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_arguments_of_the_other_kind():
    with pytest.raises(TypeError, match="device is for calls"):
        warmup(nn.Linear(3, 3), (1, 3), device="cpu")
    with pytest.raises(TypeError, match="backend is for calls"):
        warmup(nn.Linear(3, 3), (1, 3), backend="torch")
    with pytest.raises(TypeError, match="dtype is for models"):
        warmup(CALLS[0], dtype=torch.float16)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there():
    for device in ("cuda", "cuda:1", torch.device("cuda", 0)):
        with pytest.raises(ValueError, match="without a CUDA device"):
            warmup(CALLS[0], device=device)
    with pytest.raises((ValueError, RuntimeError)):  # torch's own words, in newer ones
        warmup(CALLS[0], device=0)


def test_plans_are_made_for_the_models_own_gpu(monkeypatch):
    """Tensors without memory ask for the current device's architecture."""
    current = []

    class Two(Driver):
        device_type = "cuda"

        def target(self, device):
            return Target({0: "80", 1: "75"}[current[-1] if current else 0])

    class MakeCurrent:  # a class, as torch's own is
        def __init__(self, device):
            self.index = device.index

        def __enter__(self):
            current.append(self.index)

        def __exit__(self, *failure):
            current.pop()

    monkeypatch.setattr(torch.cuda, "device", MakeCurrent)
    query = torch.empty(1, 9, 9, 1, 32, dtype=torch.bfloat16, device="meta")
    args = [query, query, query, None, None, None, [3, 3], [1, 1], [1, 1], [False, False], 1.0]
    kernels = {}
    with jit.use_launcher(Two()):
        for index in range(2):
            device = torch.device("cuda", index)
            ((spec, _),) = _cuda_specs("na_fwd", args, device)
            kernels[index] = spec.entry
    assert kernels == {0: "na2d_small_fwd", 1: "na_fwd"} and not current


CALLABLE = """
import natcupy.warmup
from natcupy.warmup import Call
import natcupy, sys
print(natcupy.warmup(Call((9,), 1, 8, 3), device="cpu", backend="torch", quiet=True))
assert "cupy" not in sys.modules
"""


def test_the_name_is_a_function_even_after_its_module_was_imported():
    result = subprocess.run(
        [sys.executable, "-c", CALLABLE], check=True, capture_output=True, text=True
    )
    assert result.stdout.startswith("0 kernels ready for 0 calls") and not result.stderr
