"""The launcher for GPUs on a driver that only pretends: what it asks for, and what it raises."""

import contextlib
import os
import types

import pytest
import torch
from at_once import at_once
from test_jit_launch import ADD, GPU, recipe

from natcupy.cuda import jit
from natcupy.cuda import launch as room
from natcupy.cuda.jit import CuPyLauncher, DeviceError, LaunchError, Spec, Target


class FakeRuntime:
    """A driver that remembers every word; `fail` maps a call to what it raises."""

    def __init__(self):
        self.said, self.fail, self.stream_now, self.current = [], {}, 7, None
        self.capture = False
        self.driver, self.chip = (13, 0), (9, 0)

    def say(self, *words):
        self.said.append(words)
        if words[0] in self.fail:
            raise self.fail[words[0]]

    def driver_version(self):
        return self.driver

    def capability(self, device):
        return self.chip

    @contextlib.contextmanager
    def guard(self, device):
        before, self.current = self.current, device
        try:
            yield
        finally:
            self.current = before

    def stream(self, device):
        return self.stream_now

    def capturing(self):
        return self.capture

    def synchronize(self, device):
        self.say("synchronize", device)

    def load(self, image, entry):
        self.say("load", image, entry, self.current)
        return object()

    def release_memory(self):
        self.say("release")

    def allow_shared(self, function, size):
        self.say("allow", size)

    def launch(self, function, recipe, stream):
        self.say("launch", recipe, stream, self.current)

    def heard(self, word):
        return [words for words in self.said if words[0] == word]


@pytest.fixture
def driver():
    return FakeRuntime()


@pytest.fixture
def launcher(driver, monkeypatch):
    """A GPU launcher on the fake driver; `built` and `discarded` note what it asked for."""
    kit = types.SimpleNamespace(version=(13, 0), archs=(75, 80, 86, 89, 90, 100, 120))
    monkeypatch.setattr(room, "toolkit", lambda: kit)
    monkeypatch.delenv("NATCUPY_PTX", raising=False)
    monkeypatch.delenv("NATCUPY_DEBUG_SYNC", raising=False)
    built, discarded = [], []

    def binary(spec, target):
        assert driver.current is not None
        built.append((spec, target))
        return b"cubin"

    launcher = CuPyLauncher(binary, lambda *what: discarded.append(what), driver)
    launcher.built, launcher.discarded = built, discarded
    return launcher


def test_compile_and_load_once_then_only_launch(launcher, driver):
    for _ in range(3):
        launcher.launch(recipe(), GPU)
    assert launcher.built == [(ADD, Target("90a"))]
    assert driver.heard("load") == [("load", b"cubin", "vector_add", GPU)]
    assert driver.heard("launch") == [("launch", recipe(), 7, GPU)] * 3
    assert driver.current is None


def test_the_stream_is_read_at_every_launch(launcher, driver):
    for driver.stream_now in (0, 5, 9, 5):
        launcher.launch(recipe(), GPU)
    assert [stream for _, _, stream, _ in driver.heard("launch")] == [0, 5, 9, 5]


def test_each_device_has_its_own_module_and_is_current_for_it(launcher, driver):
    devices = [torch.device("cuda", index) for index in (0, 1, 0, 1)]
    for device in devices:
        launcher.launch(recipe(), device)
    assert [words[3] for words in driver.heard("load")] == devices[:2]
    assert [words[3] for words in driver.heard("launch")] == devices


def test_the_device_before_is_current_again_even_after_a_failure(launcher, driver):
    driver.current = "before"
    driver.fail["launch"] = RuntimeError("CUDA_ERROR_INVALID_VALUE")
    with pytest.raises(LaunchError):
        launcher.launch(recipe(), GPU)
    assert driver.current == "before"


def test_large_shared_memory_is_asked_for_once_and_only_when_needed(launcher, driver):
    for shared in (0, 45056, 45057, 60000, 50000, 60000, 70000):
        launcher.launch(recipe(shared=shared), GPU)
    assert driver.heard("allow") == [("allow", 45057), ("allow", 60000), ("allow", 70000)]


def test_shared_memory_the_device_has_not_is_an_error_with_the_kernel_in_it(launcher, driver):
    driver.fail["allow"] = RuntimeError("CUDA_ERROR_INVALID_VALUE: invalid argument")
    with pytest.raises(LaunchError, match=r"refuses vector_add\(SCALE=2\) 200000 bytes"):
        launcher.launch(recipe(shared=200000), GPU)
    assert driver.heard("launch") == []


CODES = {
    "CUDA_ERROR_INVALID_VALUE: invalid argument": False,
    "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES: too many resources requested for launch": False,
    "CUDA_ERROR_OUT_OF_MEMORY: out of memory": False,
    "CUDA_ERROR_ILLEGAL_ADDRESS: an illegal memory access was encountered": True,
    "CUDA_ERROR_MISALIGNED_ADDRESS: misaligned address": True,
    "CUDA_ERROR_LAUNCH_FAILED: unspecified launch failure": True,
    "cudaErrorLaunchFailure: unspecified launch failure": True,
    "CUDA error: an illegal memory access was encountered": True,
}


@pytest.mark.parametrize(("reason", "lost"), CODES.items())
def test_each_failure_names_kernel_grid_block_and_memory(launcher, driver, reason, lost):
    driver.fail["launch"] = RuntimeError(reason)
    with pytest.raises(LaunchError) as error:
        launcher.launch(recipe(grid=(3, 2, 1), shared=1024), GPU)
    text = str(error.value)
    for words in (
        "vector_add(SCALE=2)",
        "grid=(3, 2, 1)",
        "block=(32, 1, 1)",
        "shared=1024 bytes",
        "cuda:0",
        reason,
    ):
        assert words in text
    assert ("restart the process" in text) == lost
    assert error.value.__cause__ is driver.fail["launch"]


def test_debug_sync_finds_the_fault_at_its_own_launch(launcher, driver, monkeypatch):
    launcher.launch(recipe(), GPU)
    assert driver.heard("synchronize") == []
    monkeypatch.setenv("NATCUPY_DEBUG_SYNC", "1")
    careful = CuPyLauncher(lambda *what: b"cubin", lambda *what: None, driver)
    driver.fail["synchronize"] = RuntimeError("an illegal memory access was encountered")
    with pytest.raises(LaunchError, match="launch failed on cuda:0: vector_add"):
        careful.launch(recipe(), GPU)


def test_nothing_is_compiled_during_graph_capture(launcher, driver):
    driver.capture = True
    with pytest.raises(RuntimeError, match=r"natcupy\.warmup\(\.\.\.\)"):
        launcher.launch(recipe(), GPU)
    assert launcher.built == driver.said == []
    driver.capture = False
    launcher.prepare(ADD, GPU, shared=50000)
    driver.capture = True
    launcher.launch(recipe(shared=50000), GPU)  # warm: captured like any other launch
    assert [words[0] for words in driver.said] == ["load", "allow", "launch"]


def test_a_binary_the_driver_refuses_is_built_anew_once(launcher, driver):
    class Spoilt(FakeRuntime):
        def load(self, image, entry):
            self.fail = {} if self.heard("load") else {"load": RuntimeError("INVALID_IMAGE")}
            return super().load(image, entry)

    launcher._runtime = spoilt = Spoilt()
    launcher._binary = lambda spec, target: launcher.built.append(spec) or b"cubin"
    launcher.launch(recipe(), GPU)
    assert launcher.discarded == [(ADD, Target("90a"))]
    assert len(launcher.built) == len(spoilt.heard("load")) == 2


def test_a_binary_refused_twice_is_an_error_that_names_target_and_remedy(launcher, driver):
    driver.fail["load"] = RuntimeError("CUDA_ERROR_NO_BINARY_FOR_GPU")
    with pytest.raises(LaunchError, match=r"sm_90a on cuda:0: CUDA_ERROR_NO_BINARY.*doctor"):
        launcher.launch(recipe(), GPU)
    assert len(launcher.built) == 2
    with pytest.raises(LaunchError):
        launcher.launch(recipe(), GPU)


@pytest.mark.parametrize("helps", [True, False])
def test_where_memory_is_full_torch_returns_what_it_keeps(launcher, helps):
    class Full(FakeRuntime):
        def release_memory(self):
            super().release_memory()
            self.fail = {} if helps else self.fail

    launcher._runtime = full = Full()
    launcher._binary = lambda spec, target: launcher.built.append(spec) or b"cubin"
    full.fail["load"] = RuntimeError("CUDA_ERROR_OUT_OF_MEMORY: out of memory")
    memory = r"cuda:0 has no memory left to load vector_add\(SCALE=2\): CUDA_ERROR_OUT.*warmup"
    with contextlib.nullcontext() if helps else pytest.raises(LaunchError, match=memory):
        launcher.launch(recipe(), GPU)
    assert [words[0] for words in full.said] == ["load", "release", "load", *["launch"] * helps]
    assert launcher.built == [ADD] and not launcher.discarded  # the binary was right


def test_a_compile_error_is_raised_as_it_is_and_only_once(launcher, driver):
    def broken(spec, target):
        launcher.built.append(spec)
        raise jit.CompileError("line 3")

    launcher._binary = broken
    with pytest.raises(jit.CompileError, match="line 3"):
        launcher.launch(recipe(), GPU)
    assert (launcher.built, launcher.discarded, driver.said) == ([ADD], [], [])


def test_a_gpu_newer_than_the_compiler_gets_ptx_and_one_warning(launcher, driver):
    driver.chip, driver.driver = (13, 0), (14, 0)
    with pytest.warns(RuntimeWarning, match="compute_120 and finished by the driver") as warned:
        for _ in range(3):
            launcher.launch(recipe(), GPU)
            assert launcher.target(GPU) == launcher.built[0][1]
    assert len(warned) == 1
    assert (launcher.built[0][1].arch, launcher.built[0][1].ptx) == ("120", True)


def test_ptx_is_forced_by_the_environment(launcher, monkeypatch):
    monkeypatch.setenv("NATCUPY_PTX", "1")
    with pytest.warns(RuntimeWarning, match="NATCUPY_PTX"):
        assert str(launcher.target(GPU)) == "compute_90a"


def test_without_a_driver_the_reason_is_said(launcher, driver):
    driver.driver = None
    with pytest.raises(DeviceError, match="no NVIDIA driver was found"):
        launcher.launch(recipe(), GPU)
    assert launcher.built == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_is_told_to_spawn(launcher, driver, monkeypatch):
    launcher.launch(recipe(), GPU)
    here = os.getpid()
    monkeypatch.setattr(room.os, "getpid", lambda: here + 1)
    with pytest.raises(RuntimeError, match="'spawn'"):
        launcher.launch(recipe(), GPU)
    assert len(driver.heard("launch")) == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_is_told_before_it_asks_for_memory(launcher):
    launcher.launch(recipe(), GPU)
    room.refuse_forked(GPU)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            room.refuse_forked(torch.device("cpu"))
            room.refuse_forked(GPU)
            os.write(writing, b"nothing")
        except RuntimeError as error:
            os.write(writing, str(error).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        assert "'spawn'" in pipe.read()
    os.waitpid(child, 0)


def test_a_fork_before_the_first_launch_is_fine(launcher, driver, monkeypatch):
    here = os.getpid()
    monkeypatch.setattr(room.os, "getpid", lambda: here + 1)
    launcher.launch(recipe(), GPU)
    assert len(driver.heard("launch")) == 1


def test_64_threads_load_each_kernel_once(launcher, driver):
    specs = [Spec("vector_add.cu", (("SCALE", number),)) for number in range(4)]
    driver.guard = lambda device: contextlib.nullcontext()
    driver.current = GPU

    def work(thread):
        for step in range(4):
            launcher.launch(recipe(spec=specs[(thread + step) % 4]), GPU)

    at_once(work)
    assert len(launcher.built) == len(driver.heard("load")) == 4
    assert len(driver.heard("launch")) == 256
