"""A GPU that is none: CPU tensors, the PTX interpreter as driver, and a double of `torch.cuda`.

In: nothing. Out: `SimulatedGpu.active()`, inside which `backend="cuda"` runs on CPU tensors through
the real launcher: targets, cache, loading, graph capture rules and streams are natcupy's own code,
and only what the driver would do is done here. `SimulatedGpu.cuda` has the names of `torch.cuda`
that the tests use (tests/gpu/test_rigs.py compares the two), so that their bodies run in CI.

Streams are queues: a stream that sleeps does its work at the next synchronization, so a kernel on
the wrong stream reads what is not there yet. A captured graph replays kernels and torch operations.
"""

from __future__ import annotations

import contextlib
import os
import warnings
import weakref
from types import SimpleNamespace
from unittest import mock

import torch
from ptxsim import load
from ptxsim.errors import PtxCheckError, PtxFaultError
from ptxsim.launcher import PtxLauncher
from torch.utils._python_dispatch import TorchDispatchMode

from natcupy import backends
from natcupy.cuda import jit, launch, ops, run
from natcupy.cuda.launch import CuPyLauncher
from natcupy.cuda.nvrtc import toolkit

MEMORY = 64 << 20  # bytes of the card
_FACTORIES = (
    (torch, "empty"),
    (torch, "empty_like"),
    (torch, "empty_strided"),
    (torch.Tensor, "new_empty"),
)


class Stream:
    """A queue; `wait_stream` and `synchronize` work it off."""

    _count = 0

    def __init__(self, device=None, priority=0):
        del device, priority
        Stream._count += 1
        self.cuda_stream, self.asleep, self.work = Stream._count * 16, False, []

    def put(self, job):
        """Do `job`, or keep it until the stream wakes."""
        if self.asleep:
            self.work.append(job)
        else:
            job()

    def synchronize(self):
        self.asleep = False
        while self.work:
            self.work.pop(0)()

    def wait_stream(self, stream):
        stream.synchronize()


class CUDAGraph:
    """What was done while it was captured, to be done again."""

    def __init__(self, keep_graph=False):
        del keep_graph
        self.steps = []

    def replay(self):
        for step in self.steps:
            step()


class _Tape(TorchDispatchMode):
    """Writes torch's own operations into a graph; natcupy's are looked into."""

    def __init__(self, graph):
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "natcupy":
            inside = {"na_fwd": run.forward, "na_bwd": run.backward}
            with self:
                return inside[func._schema.name.partition("::")[2]](*args, **kwargs)
        out = func(*args, **kwargs)
        aliases = any(x.alias_info is not None for x in func._schema.returns)
        if func._schema.is_mutable:
            self.graph.steps.append(lambda: func(*args, **kwargs))
        elif not aliases and isinstance(out, torch.Tensor) and "empty" not in func._schema.name:
            self.graph.steps.append(lambda: out.copy_(func(*args, **kwargs)))
        return out


class Cuda:
    """The part of `torch.cuda` that the tests use."""

    Stream, CUDAGraph = Stream, CUDAGraph
    OutOfMemoryError = torch.OutOfMemoryError

    def __init__(self):
        self.default = Stream()
        self.streams = [self.default]
        self.used = 0
        self.capturing: CUDAGraph | None = None

    def current_stream(self, device=None):
        return self.streams[-1]

    @contextlib.contextmanager
    def stream(self, stream):
        self.streams.append(stream)
        try:
            yield
        finally:
            self.streams.pop()

    def synchronize(self, device=None):
        self.streams[-1].synchronize()
        self.default.synchronize()

    def is_current_stream_capturing(self):
        return self.capturing is not None

    @contextlib.contextmanager
    def graph(self, cuda_graph, pool=None, stream=None):
        """Capture: torch's operations are done and noted, kernels are noted only."""
        self.capturing = cuda_graph
        try:
            with self.stream(stream or Stream()), _Tape(cuda_graph):
                yield
        finally:
            self.capturing = None

    def _sleep(self, cycles):
        del cycles
        self.streams[-1].asleep = True

    def memory_allocated(self, device=None):
        return self.used

    def mem_get_info(self, device=None):
        return MEMORY - self.used, MEMORY

    def empty_cache(self):
        pass

    def is_available(self):
        return True


class Driver:
    """A `CuPyRuntime` on the interpreter."""

    unasked = 48 * 1024  # bytes of shared memory, what a kernel declares among them

    def __init__(self, capability, cuda, seed, raises):
        self._capability, self.cuda, self._raises = capability, cuda, raises
        self.interpreter = PtxLauncher(seed=seed)
        self.shared, self.lost, self.current = {}, False, None

    def driver_version(self):
        return toolkit().version  # PTX of a newer NVRTC would need a newer driver

    def capability(self, device):
        return self._capability

    @contextlib.contextmanager
    def guard(self, device):
        before, self.current = self.current, device
        try:
            yield
        finally:
            self.current = before

    def stream(self, device):
        return self.cuda.current_stream(device).cuda_stream

    def capturing(self):
        return self.cuda.is_current_stream_capturing()

    def synchronize(self, device):
        self.cuda.synchronize(device)

    def load(self, image, entry):
        return load(image, entry)

    def allow_shared(self, function, size):
        self.shared[id(function)] = size

    def launch(self, function, recipe, stream):
        allowed = self.shared.get(id(function), self.unasked - function.dynamic_offset)
        assert recipe.shared <= allowed, f"{recipe} was allowed {allowed} bytes"
        if self.lost:
            raise RuntimeError("CUDA_ERROR_ILLEGAL_ADDRESS: an illegal memory access")
        tensors, capturing = self.interpreter.observed, self.cuda.capturing
        where = next((s for s in self.cuda.streams if s.cuda_stream == stream), self.cuda.default)

        def job():
            self.interpreter.observe(tensors)
            self._run(function, recipe)

        if capturing is not None:
            capturing.steps.append(job)
        else:
            where.put(job)

    def _run(self, function, recipe):
        try:
            self.interpreter.run(function, recipe)
        except (PtxCheckError, PtxFaultError) as error:
            if not self._raises:
                raise
            self.lost = True
            raise RuntimeError(f"CUDA_ERROR_ILLEGAL_ADDRESS: {error}") from error
        finally:
            self.interpreter.records.clear()


class Launcher(CuPyLauncher):
    """natcupy's launcher for CPU tensors."""

    device_type = "cpu"

    def observe(self, tensors):
        self.runtime.interpreter.observe(tensors)


class SimulatedGpu:
    """One such device; `raises` makes a finding an error of the driver, as on hardware."""

    def __init__(self, capability=(8, 0), seed=None, raises=False):
        self.cuda = Cuda()
        self.driver = Driver(capability, self.cuda, seed, raises)
        self.launcher = Launcher(jit.binary, jit._discard, self.driver)

    @contextlib.contextmanager
    def active(self):
        """Inside, the CUDA backend runs here, also where none is named."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(mock.patch.dict(os.environ, NATCUPY_PTX="1"))
            stack.enter_context(mock.patch.object(launch, "_index", lambda device: 0))
            stack.enter_context(mock.patch.object(backends, "_load", _load))
            for owner, name in _FACTORIES:
                make = self._counted(getattr(owner, name))
                stack.enter_context(mock.patch.object(owner, name, make))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that PTX was asked for
                self.launcher.target(torch.device("cpu"))
            stack.enter_context(jit.use_launcher(self.launcher))
            yield self

    def _counted(self, make):
        """Memory from torch that counts, ends, and holds NaNs until something writes it."""

        def empty(*args, **kwargs):
            x = make(*args, **kwargs)
            if type(x) is not torch.Tensor or x.device.type != "cpu" or not x.numel():
                return x
            size = x.untyped_storage().nbytes()
            if self.cuda.used + size > MEMORY:
                raise torch.OutOfMemoryError("CUDA out of memory (simulated)")
            self.cuda.used += size
            weakref.finalize(x, self._freed, size)
            if x.is_floating_point():
                x.fill_(float("nan"))
            return x

        return empty

    def _freed(self, size):
        self.cuda.used -= size


def _load(name):
    return ops if name in ("cpu", "cuda") else backends.reference


#: What is looked at when the double is compared with `torch.cuda`.
DOUBLE = SimpleNamespace(
    functions=(
        "current_stream", "stream", "synchronize", "is_current_stream_capturing", "graph", "_sleep",
        "memory_allocated", "mem_get_info", "empty_cache", "is_available",
    ),
    classes={"Stream": ("synchronize", "wait_stream"), "CUDAGraph": ("replay",)},
)  # fmt: skip
