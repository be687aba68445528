"""How long something takes: a function comes in, times go out.

On a GPU, device time by events around each call, the L2 cache flushed before it, and apart from it
the host's time to queue a call. A device that waits for its host counts the waiting, as in a model,
unless a call's own time is asked for. On a CPU, wall time with the caches flushed in the same way,
or, if asked for, right after another call of the same. Medians throughout; what is compiled on
first use falls into a warm-up, whose time is told too.
"""

from __future__ import annotations

import contextlib
import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

import torch

from natcupy.cpu import memory as cpu_memory

WARM_UP = 3  # calls before anything is timed, fewer where they are slow
LEAST, MOST = 3, 200  # timed calls
LEAST_ROUNDS = 5  # of runs that are timed together
CPU_CACHE = 64 << 20  # bytes written to empty a CPU's caches
# Seconds before a call: threads of another library's team wait for work a while, busily.
REST = 0.02
MOST_FLUSHES = 300  # of a GPU's cache before one call: fewer than a stream queues at once
SPARE = 1.0  # milliseconds


@dataclass(frozen=True)
class Timing:
    """Milliseconds: `median` and the quartiles around it, the `host`'s share, the `first` call."""

    median: float
    low: float
    high: float
    host: float
    first: float
    calls: int
    peak_bytes: int | None  # allocated through torch by a call, results included

    def as_dict(self) -> dict[str, float | int | None]:
        return asdict(self)


_cpu_clock = time.perf_counter


def use_cpu_time() -> None:
    """From here on, on a CPU, the calling thread's own time: for one thread on a shared machine."""
    global _cpu_clock
    _cpu_clock = time.thread_time


_caches = "empty"


def use_full_caches() -> None:
    """From here on, on a CPU, each call follows one of its own that is not timed."""
    global _caches
    _caches = "full"


def caches() -> str:
    """What a CPU's caches are when a call begins: "empty" or "full"."""
    return _caches


def clock() -> str:
    """Which time is measured."""
    return "CPU time" if _cpu_clock is time.thread_time else "wall time"


def measure(
    run: Callable[[], object],
    device: torch.device,
    seconds: float = 0.5,
    memory: bool = True,
    alone: bool = False,
) -> Timing:
    """Time `run` for about `seconds`, at least `LEAST` times, and weigh it if asked to.

    `alone`: on a GPU, the time of its work when all of it is queued before it begins.
    """
    on_gpu = device.type == "cuda"
    wait = torch.cuda.synchronize if on_gpu else _nothing
    begun = time.perf_counter()
    run()
    wait()
    first = time.perf_counter() - begun
    for _ in range(WARM_UP - 1):
        if time.perf_counter() - begun < seconds + 1.0:
            run()
    wait()
    peak = None
    if memory:
        peak = _gpu_peak(run, device) if on_gpu else _cpu_peak(run)
    if on_gpu:
        times, host = _gpu_times(run, device, seconds, alone)
    else:
        times, host = _cpu_times(run, device, seconds)
    quarters = statistics.quantiles(times, n=4, method="inclusive")
    low, high = quarters[0], quarters[2]
    middle = statistics.median(times)
    return Timing(middle, low, high, statistics.median(host), first * 1e3, len(times), peak)


def _nothing() -> None:
    pass


def _gpu_peak(run, device: torch.device) -> int:
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _cpu_peak(run) -> int:
    """The most that torch's allocator held for a call at one time, from the profiler's events."""
    cpu_memory.forget()  # scratch memory kept from the calls before counts too
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        results = run()
    del results
    events = profile.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    held = most = 0
    for _, change in sorted(changes, key=lambda event: event[0]):
        held += change
        most = max(most, held)
    return most


def _gpu_times(
    run, device: torch.device, seconds: float, alone: bool
) -> tuple[list[float], list[float]]:
    """Device milliseconds per call from events, and host milliseconds to queue one."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    flush = torch.empty(2 * cache, dtype=torch.int8, device=device)
    flushes = _flushes_that_hide(run, flush, device) if alone else 1
    host, queued, begun = [], [], time.perf_counter()
    while len(queued) < MOST and (len(queued) < LEAST or time.perf_counter() - begun < seconds):
        for _ in range(flushes):
            flush.zero_()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        before = time.perf_counter()
        events[0].record()
        run()
        events[1].record()
        host.append((time.perf_counter() - before) * 1e3)
        queued.append(events)
        # else the host runs far ahead, and a full queue blocks it
        if alone or len(queued) % 8 == 0:
            torch.cuda.synchronize(device)
    torch.cuda.synchronize(device)
    return [start.elapsed_time(end) for start, end in queued], host


def _flushes_that_hide(run, flush: torch.Tensor, device: torch.device) -> int:
    """How often to flush, so that the device is busy for long after the host has queued a call.

    The host takes longer at times: where the device is busy, or other threads are.
    """
    host, flushed = [], []
    for _ in range(LEAST):
        torch.cuda.synchronize(device)
        before = time.perf_counter()
        run()
        host.append((time.perf_counter() - before) * 1e3)
        torch.cuda.synchronize(device)
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        flush.zero_()  # for the first event to wait for
        events[0].record()
        flush.zero_()
        events[1].record()
        torch.cuda.synchronize(device)
        flushed.append(events[0].elapsed_time(events[1]))
    needed = (4 * statistics.median(host) + SPARE) / statistics.median(flushed)
    return min(1 + math.ceil(needed), MOST_FLUSHES)


def measure_together(
    runs: Sequence[Callable[[], object]], seconds: float
) -> list[tuple[Timing, float] | Exception]:
    """Time several runs on a CPU, one call of each after the other in any order, round by round.

    Neighbours on the machine so disturb all of them alike. Out, for each: its `Timing` and the
    median over the rounds of its time in times that of the first run; or what it failed with.
    """
    failed: dict[int, Exception] = {}
    first, peaks = {}, {}
    for i, run in enumerate(runs):
        begun = time.perf_counter()
        try:
            run()
            first[i] = (time.perf_counter() - begun) * 1e3
            peaks[i] = _cpu_peak(run)
        except Exception as failure:  # other libraries raise whatever they like
            failed[i] = failure
    alive = [i for i in range(len(runs)) if i not in failed]
    flush = torch.empty(CPU_CACHE, dtype=torch.int8)
    times: dict[int, list[float]] = {i: [] for i in alive}
    order, shuffle = alive.copy(), random.Random(0).shuffle
    begun, rounds = time.perf_counter(), 0
    with _no_garbage_collection():
        while rounds < LEAST_ROUNDS or time.perf_counter() - begun < seconds * len(alive):
            shuffle(order)  # what always follows one of its own kind would find its code cached
            for i in order:
                times[i].append(_cpu_time(runs[i], flush, rounds))
            rounds += 1
    found: list[tuple[Timing, float] | Exception] = []
    for i in range(len(runs)):
        if i in failed:
            found.append(failed[i])
            continue
        low, middle, high = statistics.quantiles(times[i], n=4, method="inclusive")
        timing = Timing(middle, low, high, middle, first[i], rounds, peaks[i])
        pairs = zip(times[i], times[alive[0]], strict=True)
        found.append((timing, statistics.median(mine / other for mine, other in pairs)))
    return found


def _cpu_times(run, device: torch.device, seconds: float) -> tuple[list[float], list[float]]:
    flush = torch.empty(CPU_CACHE, dtype=torch.int8)
    times, begun = [], time.perf_counter()
    with _no_garbage_collection():
        while len(times) < MOST and (len(times) < LEAST or time.perf_counter() - begun < seconds):
            times.append(_cpu_time(run, flush, len(times)))
    return times, times


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Python's collector stops whatever call it falls into, for up to a third of a second."""
    gc.collect()
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _cpu_time(run, flush: torch.Tensor, number: int) -> float:
    """Milliseconds of one call, on cores that nobody waits on; see `caches`."""
    time.sleep(REST)
    if _caches == "full":
        run()
    else:
        flush.fill_(number % 100)
    before = _cpu_clock()
    run()
    return (_cpu_clock() - before) * 1e3
