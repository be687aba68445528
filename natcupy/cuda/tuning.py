"""Measured choices: a class of problems comes in, the plan's choice that was fastest on this GPU.

`NATCUPY_AUTOTUNE=1`, or `natcupy.warmup(..., autotune=True)`, has every class that is met for the
first time measured: each of `plan.choices` on the tensors of the call itself, by CUDA events, the
L2 cache flushed before each run, medians compared, and the default kept unless another is faster
by `MARGIN`. The winner is stored beside the compiled kernels. Later processes use what is stored,
measuring nothing, unless `NATCUPY_AUTOTUNE=0`.

What that does to results: a choice is fixed per device, hash of the kernels' text, compiler and
class, and within a process a class keeps the choice it first ran with, so the same call gives the
same bits. Two choices may differ in the last bits: those of another family, and the gradient of
the bias, which is summed over other blocks. So bits can change once, when a class is measured, and
again after `clear()`; under `NATCUPY_AUTOTUNE=0` they never do. Nothing is measured while a CUDA
graph is captured or a model is traced: such a class keeps the default in this process.

What is read back is only used where it is a legal choice for the very call: a known family, and
integers within its bounds. Anything else counts as not there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import statistics
import threading
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from importlib import resources
from math import isfinite, prod
from typing import Any, Protocol

import torch

from natcupy.cache import default_store
from natcupy.cuda import jit, plan
from natcupy.cuda.launch import LaunchError, current_launcher
from natcupy.cuda.source import Spec, source_text

VARIABLE = "NATCUPY_AUTOTUNE"
ENGINE = "cuda choice"  # what its entries in the store are called
RUNS, WARM_UPS = 15, 2  # of each choice
FLUSHES = 4  # of the L2 cache before each run: as long as the host needs to queue two launches
MARGIN = 0.03  # by which a choice must beat the default: below, it is noise

_settled: dict[tuple, plan.Choice | None] = {}
_locks: dict[tuple, threading.Lock] = {}
_asked: list[list[str]] = []  # what each open block of `measuring` has seen measured


class Clock(Protocol):
    """Whoever times launches on a device."""

    def device_name(self, device: torch.device) -> str:
        """What a choice is bound to."""

    def busy(self, device: torch.device) -> bool:
        """Whether nothing may be timed at this moment."""

    def seconds(self, run: Callable[[], None], device: torch.device) -> float:
        """The median time of `run` on the device."""


class CudaClock:
    """Times by CUDA events on torch's current stream."""

    def device_name(self, device: torch.device) -> str:
        """The GPU's name."""
        return torch.cuda.get_device_name(device if device.type == "cuda" else None)

    def busy(self, device: torch.device) -> bool:
        """Whether a graph is being captured."""
        return torch.cuda.is_current_stream_capturing()

    def seconds(self, run: Callable[[], None], device: torch.device) -> float:
        """The median of `RUNS`, each with a cold L2; the flushes also hide the host's time."""
        with torch.cuda.device(device):
            size = 2 * torch.cuda.get_device_properties(device).L2_cache_size
            flush = torch.empty(size, dtype=torch.int8, device=device)
            for _ in range(WARM_UPS):
                run()
            times = []
            for _ in range(RUNS):
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                for _ in range(FLUSHES):
                    flush.zero_()
                begin.record()
                run()
                end.record()
                end.synchronize()
                times.append(begin.elapsed_time(end) / 1e3)
        return statistics.median(times)


def _clock(device: torch.device) -> Clock | None:
    """The launcher's own clock; the GPU's for the default launcher; else none."""
    launcher = current_launcher()
    if launcher is not None and hasattr(launcher, "clock"):
        return launcher.clock
    on_gpu = device.type == "cuda" or (device.type == "meta" and torch.cuda.is_available())
    passing = launcher is None or launcher.device_type == "cuda"
    return CudaClock() if on_gpu and passing else None


# ------------------------------------------------------------------------------------------------
# when to measure


def mode() -> str:
    """ "measure", "use" what is stored, or "off", as the environment and `measuring` say."""
    wish = _wish(os.environ.get(VARIABLE, "").strip())
    return "measure" if _asked and wish == "use" else wish


@cache
def _wish(said: str) -> str:
    """What a value of `VARIABLE` asks for; one that asks for nothing is told, once."""
    if said.lower() in ("0", "off", "no", "false"):
        return "off"
    if said.lower() in ("1", "on", "yes", "true"):
        return "measure"
    if said:
        warnings.warn(
            f"{VARIABLE} must be 1 or 0, got {said!r}; what was measured before is used, nothing "
            "is measured.",
            RuntimeWarning,
            stacklevel=3,
        )
    return "use"


@contextlib.contextmanager
def measuring() -> Iterator[list[str]]:
    """Measure what is met inside the block, also classes that ran before with the default.

    The list fills with the classes measured.
    """
    _forget(lambda choice: choice is None)
    seen: list[str] = []
    _asked.append(seen)
    try:
        yield seen
    finally:
        _asked[:] = [other for other in _asked if other is not seen]


def choice(
    p: plan.Problem,
    side: str,
    rpb: bool,
    device: torch.device,
    trial: Callable[[plan.Plan], None],
) -> plan.Choice | None:
    """How one side of `p` runs: stored, or measured by `trial(plan)`; None is the default."""
    clock = _clock(device)
    if clock is None or plan.family_in_use() != "auto" or mode() == "off":
        return None
    name = problem_class(p, side, rpb)
    key = (clock.device_name(device), jit.arch_for(device).arch, name)
    if device.type == "meta" and key not in _settled:  # a warm-up asks what will run
        return _parse(default_store().get(ingredients(*key)), p, side)
    if key not in _settled:
        with _locks.setdefault(key, threading.Lock()):
            if key not in _settled:
                _settled[key] = _settle(key, p, side, rpb, device, clock, trial)
    settled = _settled[key]
    return settled if settled is not None and plan.legal(p, side, settled) else None


def _settle(key, p, side, rpb, device, clock, trial) -> plan.Choice | None:
    told = ingredients(*key)
    found = _parse(default_store().get(told), p, side)
    free = not clock.busy(device) and not torch.compiler.is_compiling()
    if found is None and mode() == "measure" and free:
        default_store().discard(told)  # an entry that this call cannot use

        def build() -> bytes:
            return _measure(p, side, rpb, device, clock, trial)

        found = _parse(default_store().get_or_build(told, build), p, side)
        for seen in _asked:
            seen.append(told["class"])
    return found


def _measure(p, side, rpb, device, clock, trial) -> bytes:
    """Time every choice; the record of the fastest, or of the default within the margin."""
    times: dict[plan.Choice, float] = {}
    default, *others = plan.choices(p, side)
    for candidate in (default, *others):
        made = plan.part(p, side, rpb, candidate)
        try:
            times[candidate] = clock.seconds(lambda made=made: trial(made), device)
        except LaunchError as error:
            if candidate == default or error.lost:
                raise
    fastest = min(times, key=times.get)
    chosen = fastest if times[fastest] < (1 - MARGIN) * times[default] else default
    record = {"choice": chosen, "seconds": times[chosen], "default": times[default]}
    return json.dumps(record).encode("ascii")


def _parse(data: bytes | None, p: plan.Problem, side: str) -> plan.Choice | None:
    """The choice in an entry, or None unless it is one that this call can run."""
    try:
        given = json.loads(data)["choice"] if data else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    if not isinstance(given, list) or not 1 <= len(given) <= 5 or not isinstance(given[0], str):
        return None
    found = tuple(given)
    return found if plan.legal(p, side, found) else None


# ------------------------------------------------------------------------------------------------
# what is stored under which name


def problem_class(p: plan.Problem, side: str, rpb: bool) -> str:
    """All of `p` that a choice depends on. Images are counted in powers of two."""
    hood = p.hood
    images = 1 << (p.batch * prod(hood.dilation) - 1).bit_length()
    uneven = any(n % d for n, d in zip(p.shape, hood.dilation, strict=True))
    parts = [
        side + (" with bias gradient" if rpb else ""),
        f"{p.dtype} {p.head_dim}/{p.value_dim}",
        f"heads {p.heads}/{p.kv_heads}",
        f"window {_by(hood.kernel_size)}",
        f"on {images} x {_by(p.groups)}" + (" uneven" if uneven else ""),
        f"by {plan.access(p)} bytes",
    ]
    if any(s > 1 for s in hood.stride):
        parts.append(f"stride {_by(hood.stride)}")
    if any(hood.is_causal):
        parts.append(f"causal {_by(map(int, hood.is_causal))}")
    parts += ["bias"] if p.rpb else []
    parts += ["TF32"] if p.tf32 else []
    parts += [f"extras {p.extras}"] if p.extras else []
    return ", ".join(parts)


def _by(numbers) -> str:
    return "x".join(map(str, numbers))


def ingredients(device: str, arch: str, name: str) -> dict[str, str]:
    """Everything that decides a choice: the key of its entry."""
    kit = jit.toolkit()
    return {
        "engine": ENGINE,
        "device": device,
        "arch": arch,
        "class": name,
        "kernels": _kernels(),
        "compiler": f"NVRTC {kit.version[0]}.{kit.version[1]}",
        "build": kit.build,
    }


@cache
def _kernels() -> str:
    """The hash of all kernels' complete text: an edit makes every choice a stranger."""
    names = (entry.name for entry in resources.files("natcupy.kernels").iterdir())
    texts = [source_text(Spec(name)) for name in sorted(names) if name.endswith(".cu")]
    return hashlib.sha256("\0".join(texts).encode("utf-8")).hexdigest()


# ------------------------------------------------------------------------------------------------
# for people


def describe() -> list[dict[str, Any]]:
    """The stored choices, for `natcupy doctor`: device, class, choice, and the times measured."""
    found = []
    for told, image in default_store().find(engine=ENGINE):
        with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
            record = json.loads(image)
            times = [float(record[name]) for name in ("seconds", "default")]
            if all(map(isfinite, times)):
                found.append(
                    {
                        "device": str(told.get("device")),
                        "class": str(told.get("class")),
                        "choice": [str(part)[:20] for part in record["choice"]],
                        "seconds": times[0],
                        "default": times[1],
                        "current": told.get("kernels") == _kernels(),
                    }
                )
    return sorted(found, key=lambda line: (line["device"], line["class"]))


def clear() -> int:
    """Forget every choice, stored or settled; how many were stored."""
    count = default_store().discard_all(engine=ENGINE)
    _forget(lambda choice: True)
    return count


def _forget(which: Callable[[plan.Choice | None], bool]) -> None:
    for key, settled in list(_settled.items()):
        if which(settled):
            _settled.pop(key, None)
    plan.forget()
