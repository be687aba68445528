"""What must not break it: full memory, many calls, many threads, forks, lost contexts, two ranks.

On a GPU and, with the same bodies, on the simulated one. What may end a process runs in its own.
"""

import gc
import json
import os
import resource
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from kernel_cases import BF16, F16, F32, cotangents, inputs
from problems import but, check, draw, feature, layer, run
from rigs import both

CHILD = Path(__file__).with_name("child.py")


def start(rig, action, *rest, **environment):
    command = [sys.executable, str(CHILD), action, rig.name, *map(str, rest)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | environment,
    )  # fmt: skip


def answer(child):
    out, err = child.communicate(timeout=120)
    assert child.returncode == 0, err[-2000:]
    return json.loads(out.splitlines()[-1])


@both
def test_full_memory(rig):
    """Torch's own error, nothing half done, and a smaller call is right afterwards."""
    case = feature("bias", 2, F32, rig.size("full", "small"))
    large = but(layer(rig.size(56, 4), 3, 1, F16), batch=rig.size(64, 1))
    tensors = inputs(large, rig.device)
    gc.collect()
    rig.cuda.empty_cache()
    size, least, hogs = rig.cuda.mem_get_info()[0], tensors["query"].numel() // 4, []
    try:
        while size >= least:  # a driver may refuse one piece as large as what it says is free
            try:
                hogs.append(torch.empty(size, dtype=torch.uint8, device=rig.device))
            except torch.OutOfMemoryError:
                size //= 2
        with pytest.raises(torch.OutOfMemoryError):
            for _ in range(8):  # the allocator may hold a little more than the driver says
                hogs.append(run(large, tensors))
    finally:
        del hogs
    gc.collect()
    rig.cuda.empty_cache()
    check(case, rig)
    run(large, tensors, *cotangents(large, rig.device))


@both
def test_soak(rig):
    """Thousands of mixed calls: no memory, no open files, no growth."""
    import random

    rng = random.Random(0)
    cases = [draw(rng, dtype, rig.size(200, 12), 0) for dtype in (F16, BF16, F32)]
    cases = cases * rig.size(4, 1)
    given = [
        (c, inputs(c, rig.device), cotangents(c, rig.device)) for c in cases[: rig.size(12, 2)]
    ]
    marks = []
    for number in rig.many(20_000, 6, seconds=40):
        case, tensors, cotangent = given[number % len(given)]
        run(case, tensors, *(cotangent if number % 2 else ()))
        if number % rig.size(100, 2) == 0:
            gc.collect()
            rig.cuda.synchronize()
            files = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
            rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            marks.append((rig.cuda.memory_allocated(), files, rss))
    settled = marks[len(marks) // 3 :]
    assert max(m[0] for m in settled) == min(m[0] for m in settled)
    assert settled[-1][1] <= settled[0][1]
    grown = (settled[-1][2] - settled[0][2]) / 1024
    rig.note(grown_mb=round(grown, 1))
    assert rig.simulated or grown <= 8


@both
def test_first_call_from_many_threads(rig):
    """Sixteen threads make the first calls of kernels nobody has compiled; all get the same."""
    case = but(feature("bias", 2, F32, "small"), head_dim=21, value_dim=13)
    tensors = {n: None if x is None else x.detach() for n, x in inputs(case, rig.device).items()}
    count = rig.size(16, 1)  # torch's modes, which simulate, belong to one thread
    results, barrier = [None] * count, threading.Barrier(count)

    def work(number):
        barrier.wait()
        results[number] = run(case, tensors)[0]

    threads = [threading.Thread(target=work, args=(n,)) for n in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rig.cuda.synchronize()
    expected = run(case, tensors)[0]
    assert all(torch.equal(out, expected) for out in results)


@both
def test_a_lost_context_is_told(rig):
    """The fault is named at its own launch, with the remedy; other processes go on."""
    said = answer(start(rig, "lost", NATCUPY_DEBUG_SYNC="1"))["said"]
    assert "bad_store" in said[0] and "restart the process" in said[0], said
    assert said[1] != "nothing"
    check(feature("plain", 1, F32, "small"), rig)


@both
def test_a_forked_child_is_told(rig):
    found = answer(start(rig, "fork"))
    assert "spawn" in found["said"] and found["parent"] is True


@both
def test_two_ranks_on_one_gpu(rig):
    """Two processes train as one does; gloo, since NCCL wants a GPU for each."""
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [start(rig, "rank", number, port) for number in range(2)]
    for rank in ranks:
        assert answer(rank)["difference"] < 1e-5
