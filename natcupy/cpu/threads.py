"""A compiled function on several threads at once.

In: its address and that of its argument block. Out: nothing; every thread has returned.

Torch's own OpenMP team is used where its runtime can be reached: its idle workers spin for a while
after each operator, and a second pool beside them would fight for the cores. Elsewhere, and in a
process forked from one whose team has worked (its workers do not survive the fork), a pool of
Python threads does it. The compiled code holds no lock and no GIL.
"""

from __future__ import annotations

import ctypes
import functools
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

_ENTRY = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_pools: dict[tuple[int, int], ThreadPoolExecutor] = {}
_forked = False


def _after_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def run(address: int, words: int, threads: int) -> None:
    """Call the function at `address` with the pointer `words` on `threads` threads."""
    if threads <= 1:
        _callable(address)(words)
        return
    parallel = None if _forked else _openmp()
    if parallel is not None:
        parallel(address, words, threads, 0)
        return
    entry = _callable(address)
    others = [_pool(threads - 1).submit(entry, words) for _ in range(threads - 1)]
    entry(words)
    for other in others:
        other.result()


@functools.lru_cache(maxsize=256)
def _callable(address: int):
    return _ENTRY(address)


@functools.cache
def _openmp():
    """`GOMP_parallel` of the OpenMP runtime that torch was linked with, or None."""
    folder = Path(torch.__file__).parent / "lib"
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        if (folder / name).exists():
            try:
                # a library's symbols include those of the libraries it depends on
                found = ctypes.CDLL(str(folder / name)).GOMP_parallel
            except (OSError, AttributeError):
                return None
            kinds = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
            found.argtypes, found.restype = kinds, None
            return found
    return None


def _pool(workers: int) -> ThreadPoolExecutor:
    key = os.getpid(), workers
    pool = _pools.get(key)
    if pool is None:
        pool = _pools.setdefault(key, ThreadPoolExecutor(workers, "natcupy-cpu"))
    return pool
