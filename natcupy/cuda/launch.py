"""From recipe to running kernel: a `Launch` comes in, a kernel is queued on torch's stream.

Torch owns memory, streams and the choice of device: outputs come from torch, the stream is read at
every launch and never stored, and the tensor's device is current during compile, load and launch.
Who launches can be exchanged (`use_launcher`); the default is `CuPyLauncher`.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from natcupy.cuda.arch import Target, choose_target
from natcupy.cuda.nvrtc import extra, import_cupy, toolkit
from natcupy.cuda.source import Spec

LARGEST_GRID = (2**31 - 1, 65535, 65535)
LARGEST_BLOCK = (1024, 1024, 64)
LARGEST_SHARED = 232448  # bytes a block of the largest architecture may have (227 KiB)
LARGEST_ARGS = 4096  # bytes of kernel parameters that every driver takes
# Bytes of dynamic shared memory that need no attribute: 48 KiB, less 4 for what kernels declare.
WITHOUT_ASKING = 45056


FORKED = (
    "CUDA kernels cannot run in a process forked from one that has used CUDA; start workers with "
    "the 'spawn' method, or keep GPU work out of them."
)
_used = _forked = False  # whether kernels have run here, or in the process that this is a fork of


def _note_use() -> None:
    global _used
    if not _used and hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_note_fork)
    _used = True


def _note_fork() -> None:
    global _forked
    _forked = True


def refuse_forked(device: torch.device) -> None:
    """Say what is wrong before torch, asked for memory, says "initialization error"."""
    if _forked and device.type == "cuda":
        raise RuntimeError(FORKED)


@dataclass(frozen=True)
class Launch:
    """One kernel launch, complete: `args` are the bytes of the one struct passed by value."""

    spec: Spec
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int
    args: bytes

    def __post_init__(self) -> None:
        g, b, most = self.grid, self.block, LARGEST_GRID
        legal = (
            0 <= g[0] <= most[0]
            and 0 <= g[1] <= most[1]
            and 0 <= g[2] <= most[2]
            and 0 < b[0] <= LARGEST_BLOCK[0]
            and 0 < b[1] <= LARGEST_BLOCK[1]
            and 0 < b[2] <= LARGEST_BLOCK[2]
            and b[0] * b[1] * b[2] <= 1024
            and 0 <= self.shared <= LARGEST_SHARED
            and 0 < len(self.args) <= LARGEST_ARGS
        )
        if not legal:
            raise ValueError(
                f"a launch needs grid <= {most}, block <= {LARGEST_BLOCK} of 1 to 1024 threads, "
                f"shared memory <= {LARGEST_SHARED} bytes and 1 to {LARGEST_ARGS} bytes of "
                f"arguments, got {self}."
            )

    def with_args(self, args: bytes) -> Launch:
        """The same launch with other arguments of the same size, not checked again."""
        made = object.__new__(Launch)
        made.__dict__.update(self.__dict__, args=args)
        return made

    def __str__(self) -> str:
        return (
            f"{self.spec} with grid={self.grid}, block={self.block}, shared={self.shared} bytes, "
            f"arguments={len(self.args)} bytes"
        )


class Launcher(Protocol):
    """Whoever runs launches, for tensors whose device is of type `device_type`."""

    device_type: str

    def launch(self, recipe: Launch, device: torch.device) -> None:
        """Queue or run one kernel; the grid has no zero."""

    def target(self, device: torch.device) -> Target:
        """What kernels for `device` are compiled for."""


class LaunchError(RuntimeError):
    """The driver refused a kernel or a launch; the text names kernel, grid, block and memory.

    `lost` says that the process's CUDA context cannot be used any more.
    """

    lost = False


_AS_IT_IS = contextlib.nullcontext()


class CuPyRuntime:
    """Every word said to the driver, and nothing else; a test puts another in its place."""

    def __init__(self) -> None:
        self.module = import_cupy("cupy.cuda.function").Module
        self.driver = import_cupy("cupy_backends.cuda.api.driver")
        self.runtime = import_cupy("cupy_backends.cuda.api.runtime")
        self.void = importlib.import_module("numpy").void  # numpy comes with CuPy
        self._raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)  # much quicker

    def driver_version(self) -> tuple[int, int] | None:
        """The newest CUDA version the driver serves; None without a driver."""
        number = self.runtime.driverGetVersion()
        return (number // 1000, number % 1000 // 10) if number else None

    def capability(self, device: torch.device) -> tuple[int, int]:
        """The compute capability of `device`."""
        return torch.cuda.get_device_capability(device)

    def guard(self, device: torch.device) -> contextlib.AbstractContextManager:
        """Make `device` current, and the one before it again afterwards."""
        if torch.cuda.current_device() == _index(device):
            return _AS_IT_IS
        return torch.cuda.device(device)

    def stream(self, device: torch.device) -> int:
        """The handle of torch's current stream."""
        if self._raw_stream is not None:
            return self._raw_stream(_index(device))
        return torch.cuda.current_stream(device).cuda_stream

    def capturing(self) -> bool:
        """Whether a CUDA graph is being captured on the current stream."""
        return torch.cuda.is_current_stream_capturing()

    def synchronize(self, device: torch.device) -> None:
        """Wait for the device, so that a fault shows at the launch that caused it."""
        torch.cuda.synchronize(device)

    def load(self, image: bytes, entry: str) -> Any:
        """Load a binary on the current device; its function keeps the module alive."""
        module = self.module()
        module.load(image)
        return module.get_function(entry)

    def release_memory(self) -> None:
        """Give the driver the memory that torch's allocator keeps unused."""
        torch.cuda.empty_cache()

    def allow_shared(self, function: Any, size: int) -> None:
        """Let `function` use `size` bytes of dynamic shared memory."""
        if not self.driver.ctxGetCurrent():  # a thread, such as autograd's, that asks for the first
            self.runtime.memGetInfo()  # time: this makes the device's own context current
        attribute = self.driver.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        self.driver.funcSetAttribute(function.ptr, attribute, size)

    def launch(self, function: Any, recipe: Launch, stream: int) -> None:
        """Queue the kernel; a scalar of numpy's void type travels as its bytes, by value."""
        function(
            recipe.grid, recipe.block, (self.void(recipe.args),), recipe.shared, _Stream(stream)
        )


class _Stream:
    """All that CuPy asks of a stream: its handle."""

    __slots__ = ("ptr",)

    def __init__(self, ptr: int):
        self.ptr = ptr


class _Loaded:
    """A function on one device, and the dynamic shared memory it has been allowed."""

    __slots__ = ("allowed", "function")

    def __init__(self, function: Any):
        self.function, self.allowed = function, WITHOUT_ASKING


class CuPyLauncher:
    """Compiles on first use, loads once per device, launches on torch's current stream.

    `binary(spec, target)` gives the machine code, `discard` forgets one that turned out spoilt.
    """

    device_type = "cuda"

    def __init__(
        self,
        binary: Callable[[Spec, Target], bytes],
        discard: Callable[[Spec, Target], None],
        runtime: Any = None,
    ):
        self._binary, self._discard, self._runtime = binary, discard, runtime
        self._loaded: dict[tuple[Spec, int], _Loaded] = {}
        self._targets: dict[int, Target] = {}
        self._locks: dict[object, threading.Lock] = {}
        self._process: int | None = None  # the one that first spoke to the driver
        self._sync = os.environ.get("NATCUPY_DEBUG_SYNC") == "1"

    @property
    def runtime(self) -> Any:
        """The way to the driver, made at first use and not valid in a forked child."""
        if self._runtime is None:
            self._runtime = CuPyRuntime()
        if self._process is None:
            self._process = os.getpid()
            _note_use()
        if self._process != os.getpid():
            raise RuntimeError(FORKED)
        return self._runtime

    def target(self, device: torch.device) -> Target:
        """What kernels for `device` are compiled for; warns once if that is PTX by necessity."""
        index = _index(device)
        if index in self._targets:
            return self._targets[index]
        with self._lock(index):
            if index not in self._targets:
                self._targets[index] = target = self._choose(device)
                if target.note:
                    warnings.warn(target.note, RuntimeWarning, stacklevel=2)
            return self._targets[index]

    def _choose(self, device: torch.device) -> Target:
        kit, driver = toolkit(), self.runtime.driver_version()
        capability = self.runtime.capability(device) if driver else (0, 0)
        forced = os.environ.get("NATCUPY_PTX") == "1"
        return choose_target(capability, kit.archs, kit.version, driver, force_ptx=forced)

    def prepare(self, spec: Spec, device: torch.device, shared: int = 0) -> None:
        """Compile and load `spec` for `device` now, so that the first launch finds it ready."""
        with self.runtime.guard(device):
            self._ready(spec, device, shared)

    def launch(self, recipe: Launch, device: torch.device) -> None:
        """Queue `recipe` on torch's current stream of `device`."""
        runtime = self.runtime
        with runtime.guard(device):
            function = self._ready(recipe.spec, device, recipe.shared)
            try:
                runtime.launch(function, recipe, runtime.stream(device))
                if self._sync:
                    runtime.synchronize(device)
            except RuntimeError as error:
                raise _explained(recipe, device, error) from error

    def _ready(self, spec: Spec, device: torch.device, shared: int) -> Any:
        """The loaded function, allowed `shared` bytes of dynamic shared memory."""
        loaded = self._loaded.get((spec, _index(device))) or self._load(spec, device)
        if shared > loaded.allowed:
            try:
                self.runtime.allow_shared(loaded.function, shared)
            except RuntimeError as error:
                raise LaunchError(
                    f"{device} refuses {spec} {shared} bytes of shared memory per block: {error}; "
                    "use backend='torch' for this shape."
                ) from error
            loaded.allowed = shared
        return loaded.function

    def _load(self, spec: Spec, device: torch.device) -> _Loaded:
        key = (spec, _index(device))
        with self._lock(key):
            if key not in self._loaded:
                if self.runtime.capturing():
                    raise RuntimeError(
                        f"{spec} is not compiled and loaded on {device} yet, and that cannot "
                        "happen while a CUDA graph is captured; call natcupy.warmup(...) with the "
                        "model or the shapes, or run the same call once, before the capture."
                    )
                self._loaded[key] = _Loaded(self._function(spec, self.target(device), device))
            return self._loaded[key]

    def _function(self, spec: Spec, target: Target, device: torch.device) -> Any:
        """Load the binary; one the driver refuses is built anew once, in case it was spoilt.

        Where memory is short, torch first returns what it keeps for tensors to come.
        """
        image = self._binary(spec, target)
        try:
            return self.runtime.load(image, spec.entry)
        except RuntimeError as error:
            if _is_memory(error):
                self.runtime.release_memory()
            else:
                self._discard(spec, target)
                image = self._binary(spec, target)
        try:
            return self.runtime.load(image, spec.entry)
        except RuntimeError as error:
            if _is_memory(error):
                raise LaunchError(
                    f"{device} has no memory left to load {spec}: {error}; free some, call "
                    "natcupy.warmup(...) before the memory is full, or use backend='torch'."
                ) from error
            raise LaunchError(
                f"the driver refuses {spec} compiled for {target} on {device}: {error}; "
                f"`natcupy doctor` shows driver and compiler, and '{extra()}' fits this torch."
            ) from error

    def _lock(self, key: object) -> threading.Lock:
        return self._locks.setdefault(key, threading.Lock())


def _is_memory(error: RuntimeError) -> bool:
    return "OUT_OF_MEMORY" in str(error)


_LOST = (
    "ILLEGALADDRESS",
    "ILLEGALMEMORY",
    "ILLEGALINSTR",
    "MISALIGNEDADDR",
    "LAUNCHFAIL",
    "ASSERT",
)


def _explained(recipe: Launch, device: torch.device, error: RuntimeError) -> LaunchError:
    reason = str(error)
    text = f"launch failed on {device}: {recipe}: {reason}."
    squeezed = reason.upper().replace("_", "").replace(" ", "")
    lost = any(word in squeezed for word in _LOST)
    if lost:
        text += (
            " This process's CUDA context is lost and every later call will fail, whoever caused "
            "it: restart the process, with NATCUPY_DEBUG_SYNC=1 to name the kernel at fault."
        )
    made = LaunchError(text)
    made.lost = lost
    return made


def _index(device: torch.device) -> int:
    return device.index if device.index is not None else torch.cuda.current_device()


_current: Launcher | None = None


def current_launcher() -> Launcher | None:
    """The launcher put in place by `use_launcher`, or None for the default."""
    return _current


@contextlib.contextmanager
def use_launcher(launcher: Launcher) -> Iterator[Launcher]:
    """Let `launcher` run every launch inside the block, in every thread of the process."""
    global _current
    before, _current = _current, launcher
    try:
        yield launcher
    finally:
        _current = before


def nothing_to_do(recipe: Launch) -> bool:
    """Whether the grid is empty: such a launch is legal and must never reach the driver."""
    return math.prod(recipe.grid) == 0
