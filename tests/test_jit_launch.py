"""From recipe to launch: with a launcher on the CPU, and what can be seen of the real driver."""

import contextlib
import ctypes
import importlib.util
import struct
import threading
import types
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

from natcupy.cuda import jit
from natcupy.cuda import launch as room
from natcupy.cuda.jit import DeviceError, Launch, Spec, Target

needs_nvrtc = pytest.mark.skipif(
    importlib.util.find_spec("cupy") is None,
    reason="CuPy, which brings the compiler, is not installed",
)
ADD = Spec("vector_add.cu", (("SCALE", 2),))
PARAMS = struct.Struct("<QQQq")  # a, b, out, count
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def recipe(grid=(1, 1, 1), block=(32, 1, 1), shared=0, args=b"\0" * 32, spec=ADD):
    return Launch(spec, grid, block, shared, args)


# -- a launcher on the CPU ------------------------------------------------------------------------


class AddOnCPU:
    """Compiles for real, then does by hand what a GPU would, at the addresses it was given."""

    device_type = "cpu"

    def __init__(self, arch="90a"):
        self.arch, self.images = arch, {}

    def target(self, device):
        return Target(self.arch)

    def launch(self, recipe, device):
        if recipe.spec not in self.images:
            self.images[recipe.spec] = jit.compile_spec(recipe.spec, self.arch).image
        a, b, out, count = PARAMS.unpack(recipe.args)
        count = min(count, recipe.grid[0] * recipe.block[0])
        a, b, out = (self.array(address, count) for address in (a, b, out))
        out[:] = a + np.float32(dict(recipe.spec.constants)["SCALE"]) * b

    @staticmethod
    def array(address, count):
        memory = (ctypes.c_float * count).from_address(address)
        return np.frombuffer(memory, dtype=np.float32)


@needs_nvrtc
@pytest.mark.parametrize("count", [1, 1000, 1024])
def test_a_vector_add_compiles_and_launches(count):
    a, b, out = torch.randn(count), torch.randn(count), torch.full((count,), float("nan"))
    args = PARAMS.pack(a.data_ptr(), b.data_ptr(), out.data_ptr(), count)
    with jit.use_sources(Path(__file__).parent), jit.use_launcher(AddOnCPU()) as launcher:
        assert str(jit.arch_for(CPU)) == "sm_90a"
        jit.prepare(ADD, CPU)  # this launcher has nothing to prepare
        step = Launch(ADD, (-(-count // 256), 1, 1), (256, 1, 1), 0, args)
        jit.launch(step, CPU, keep_alive=(a, b, out))
    torch.testing.assert_close(out, a + 2 * b)
    assert list(launcher.images) == [ADD]


class Recorder:
    device_type, device = "cpu", None

    def __init__(self):
        self.seen = []

    def launch(self, recipe, device):
        self.seen.append((recipe, device))


def test_an_empty_grid_is_never_launched():
    with jit.use_launcher(Recorder()) as recorder:
        for grid in ((0, 1, 1), (1, 0, 1), (1, 1, 0), (0, 0, 0)):
            jit.launch(recipe(grid), CPU)
    assert recorder.seen == []


def test_launchers_nest_reach_every_thread_and_leave_when_a_block_fails():
    outer, inner = Recorder(), Recorder()
    with jit.use_launcher(outer):
        with contextlib.suppress(ZeroDivisionError), jit.use_launcher(inner):
            thread = threading.Thread(target=jit.launch, args=(recipe(), CPU))
            thread.start()
            thread.join()
            raise ZeroDivisionError
        jit.launch(recipe(), CPU)
    assert (len(outer.seen), len(inner.seen)) == (1, 1)
    assert room.current_launcher() is None


def test_what_is_to_be_kept_alive_lives_until_the_launch_is_queued():
    alive = []

    class Watch(Recorder):
        def launch(self, recipe, device):
            alive.append(watch())

    def call():
        tensor = torch.zeros(3)
        nonlocal watch
        watch = weakref.ref(tensor)
        return (tensor,)

    watch = None
    with jit.use_launcher(Watch()):
        jit.launch(recipe(), CPU, keep_alive=call())
    assert alive[0] is not None
    alive.clear()
    assert watch() is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"grid": (2**31, 1, 1)},
        {"grid": (1, 65536, 1)},
        {"grid": (1, 1, 65536)},
        {"grid": (-1, 1, 1)},
        {"block": (0, 1, 1)},
        {"block": (1025, 1, 1)},
        {"block": (1, 1, 65)},
        {"block": (64, 32, 1)},
        {"shared": -1},
        {"shared": 232449},
        {"args": b""},
        {"args": bytes(4097)},
    ],
)
def test_an_illegal_launch_cannot_be_made(wrong):
    with pytest.raises(ValueError, match="a launch needs grid <="):
        recipe(**wrong)


@pytest.mark.parametrize(
    "right", [{"grid": (2**31 - 1, 65535, 65535)}, {"block": (16, 1, 64)}, {"shared": 232448}]
)
def test_the_largest_legal_launches_can(right):
    assert recipe(**right)


# -- the real driver -------------------------------------------------------------------------------


@needs_nvrtc
def test_the_real_runtime_asks_the_real_driver():
    """What can be seen of it without a GPU: its parts are there, and it knows of no driver."""
    runtime = room.CuPyRuntime()
    version = runtime.driver_version()
    assert version is None or version >= (11, 0)
    assert runtime.void(b"\1\0\2").tobytes() == b"\1\0\2"
    assert callable(runtime.module().load)
    assert callable(runtime.driver.funcSetAttribute)
    assert isinstance(runtime.driver.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, int)
    if version is None:
        with pytest.raises(DeviceError, match="no NVIDIA driver was found"):
            jit.arch_for(GPU)


@needs_nvrtc
@pytest.mark.parametrize("context", [0, 1])
def test_shared_memory_is_asked_for_in_a_context(context):
    """A thread may ask before anything has made the device's context current there."""
    said = []
    runtime = room.CuPyRuntime()
    runtime.runtime = types.SimpleNamespace(memGetInfo=lambda: said.append("context"))
    runtime.driver = types.SimpleNamespace(
        ctxGetCurrent=lambda: context,
        CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES=8,
        funcSetAttribute=lambda *given: said.append(given),
    )
    runtime.allow_shared(types.SimpleNamespace(ptr=5), 60000)
    assert said == ["context"] * (not context) + [(5, 8, 60000)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_on_a_gpu_a_vector_add_is_right_on_any_stream_and_takes_nothing_from_cupy():
    count = 100_003
    a, b = torch.randn(2, count, device="cuda")
    side = torch.cuda.Stream()
    with jit.use_sources(Path(__file__).parent):
        for stream in (torch.cuda.current_stream(), side):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                out = torch.full_like(a, float("nan"))
                args = PARAMS.pack(a.data_ptr(), b.data_ptr(), out.data_ptr(), count)
                step = Launch(ADD, (-(-count // 256), 1, 1), (256, 1, 1), 0, args)
                jit.launch(step, a.device, keep_alive=(a, b, out))
            torch.cuda.synchronize()
            torch.testing.assert_close(out, a + 2 * b)
    assert jit.import_cupy().get_default_memory_pool().total_bytes() == 0
