"""The interpreter as a launcher for torch code: kernels run on CPU tensors, in place.

In: launch recipes (anything with `spec`, `grid`, `block`, `shared`, `args`), and the tensors whose
addresses are in the arguments. Out: the tensors changed, a record of each launch, and
`PtxCheckError` if a check found something. Tensors keep their memory: device addresses are
`tensor.data_ptr()`, and an access outside the bytes that the tensors of this launch cover is out
of bounds.
"""

from __future__ import annotations

import contextlib
import gc
import time
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

from . import load
from .counters import Counters
from .errors import Issue, PtxCheckError
from .machine import Checks, Machine
from .memory import Buffer, Memory
from .program import Program

_programs: dict[Hashable, Program] = {}


@dataclass(frozen=True)
class LaunchRecord:
    """What one launch did."""

    recipe: Any
    issues: tuple[Issue, ...]
    counters: Counters
    seconds: float


def compile_with_natcupy(spec: Any, arch: str) -> bytes:
    """PTX of a `natcupy.cuda.jit.Spec`, with line information."""
    from natcupy.cuda import jit

    return jit.compile_spec(spec, arch, ptx=True, line_info=True).image


class PtxLauncher:
    """Runs launches in the interpreter. Use it with `natcupy.cuda.jit.use_launcher`, or `active()`.

    `buffers` are pairs (tensor, writable) known to every launch; the tensors of one launch arrive
    through `observe`. With `strict` a launch with findings raises; otherwise they are in `records`.
    """

    device_type = "cpu"

    def __init__(
        self,
        arch: str = "80",
        buffers: Iterable[tuple[torch.Tensor, bool]] = (),
        *,
        checks: Checks | None = None,
        seed: int | None = None,
        lanes: int = 4096,
        strict: bool = True,
        compile_ptx: Callable[[Any, str], bytes] = compile_with_natcupy,
    ):
        self.arch, self.checks, self.seed, self.lanes = arch, checks, seed, lanes
        self.strict, self.records = strict, list[LaunchRecord]()
        self._compile = compile_ptx
        self._known: list[tuple[torch.Tensor, bool]] = list(buffers)
        self._observed: tuple[torch.Tensor, ...] = ()
        self._protected: set[int] = set()
        self._fresh: dict[int, Buffer] = {}

    def target(self, device: torch.device) -> Any:
        """What kernels are compiled for: PTX of the launcher's architecture."""
        from natcupy.cuda.arch import Target

        return Target(self.arch, ptx=True)

    def prepare(self, spec: Any, device: torch.device, shared: int = 0) -> None:
        """Compile ahead."""
        self.program(spec)

    def register(self, tensor: torch.Tensor, writable: bool = True) -> None:
        """Let every later launch use this tensor; an input (writable=False) is guarded."""
        self._known.append((tensor, writable))

    def protect(self, *tensors: torch.Tensor) -> None:
        """Report any write to the memory of these tensors."""
        self._protected.update(t.untyped_storage().data_ptr() for t in tensors)

    def observe(self, tensors: Iterable[Any]) -> None:
        """The tensors whose pointers the next launch holds."""
        self._observed = tuple(t for t in tensors if isinstance(t, torch.Tensor))

    def program(self, spec: Any) -> Program:
        """The decoded kernel of a spec; compiled once per process."""
        key = (self._compile, spec, self.arch)
        if key not in _programs:
            entry = getattr(spec, "entry", None)
            ptx = self._compile(spec, self.arch)
            gc.collect()
            _programs[key] = load(ptx, entry)
            gc.freeze()  # kept for good: no later collection need walk all its instructions
        return _programs[key]

    def launch(self, recipe: Any, device: torch.device | None = None) -> None:
        """Run one kernel to its end."""
        self.run(self.program(recipe.spec), recipe)

    @property
    def observed(self) -> tuple[torch.Tensor, ...]:
        """The tensors that the next launch may use, beside those known to every launch."""
        return self._observed

    def run(self, program: Program, recipe: Any) -> None:
        """Run a program that is there already; of `recipe` all but its spec counts."""
        machine = Machine(
            program,
            self._memory(),
            recipe.block,
            recipe.shared,
            checks=self.checks,
            seed=self.seed,
            lanes=self.lanes,
        )
        self._observed = ()
        start = time.perf_counter()
        try:
            machine.run(recipe.grid, recipe.args)
        finally:
            took = time.perf_counter() - start
            record = LaunchRecord(recipe, tuple(machine.issues), machine.counters, took)
            self.records.append(record)
        if self.strict and record.issues:
            raise PtxCheckError(program.name, list(record.issues))

    @contextlib.contextmanager
    def active(self) -> Iterator[PtxLauncher]:
        """Run natcupy's launches here, and treat what torch.empty gives as unwritten memory."""
        from natcupy.cuda import jit

        with jit.use_launcher(self), self.watch_empty():
            yield self

    @contextlib.contextmanager
    def watch_empty(self) -> Iterator[None]:
        """Inside the block, tensors from torch.empty and its kin count as unwritten.

        They are filled with NaNs, and a kernel that reads a word nothing wrote is reported.
        """
        with contextlib.ExitStack() as stack:
            for owner, name in (
                (torch, "empty"),
                (torch, "empty_like"),
                (torch, "empty_strided"),
                (torch.Tensor, "new_empty"),
            ):
                patch = mock.patch.object(owner, name, self._watched(getattr(owner, name)))
                stack.enter_context(patch)
            yield

    def _watched(self, make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def empty(*args: Any, **kwargs: Any) -> torch.Tensor:
            tensor = make(*args, **kwargs)
            if type(tensor) is torch.Tensor and tensor.device.type == "cpu" and tensor.numel():
                self._expect_writes(tensor)
            return tensor

        return empty

    def _expect_writes(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        address = storage.data_ptr()
        buffer = Buffer(address, storage.nbytes(), f"empty{tuple(tensor.shape)}", "out")
        buffer.expect_writes()
        self._fresh[address] = buffer
        weakref.finalize(tensor, self._forget, address, weakref.ref(buffer))

    def _forget(self, address: int, buffer: weakref.ref[Buffer]) -> None:
        if self._fresh.get(address) is buffer():
            self._fresh.pop(address, None)

    def _memory(self) -> Memory:
        """Buffers of this launch: the bytes its tensors cover, overlapping ones joined."""
        spans: list[tuple[int, int, str, bool]] = []
        for number, (tensor, writable) in enumerate(
            [*self._known, *((t, True) for t in self._observed)]
        ):
            if tensor.device.type == "cpu" and tensor.numel():
                start, end = _extent(tensor)
                guarded = tensor.untyped_storage().data_ptr() in self._protected
                name = f"tensor{number}{tuple(tensor.shape)}"
                spans.append((start, end, name, writable and not guarded))
        memory = Memory()
        for start, end, name, writable in _joined(spans):
            buffer = memory.register(start, end - start, name, "inout" if writable else "in")
            fresh = self._fresh.get(start)
            if fresh is not None and writable and fresh.end >= end:
                buffer.marks, buffer.mode = fresh.marks, "out"
        return memory


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    """First and last byte address + 1 of a tensor's elements."""
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.data_ptr()
    return start, start + (last + 1) * tensor.element_size()


def _joined(spans: list[tuple[int, int, str, bool]]) -> list[tuple[int, int, str, bool]]:
    """Overlapping spans as one; it is guarded only if all of them are."""
    out: list[tuple[int, int, str, bool]] = []
    for span in sorted(spans):
        if out and span[0] < out[-1][1]:
            start, end, name, writable = out[-1]
            out[-1] = (start, max(end, span[1]), name, writable or span[3])
        else:
            out.append(span)
    return out
