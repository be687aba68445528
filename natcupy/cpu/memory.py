"""Memory for results, new in each call, and scratch memory, which calls share.

In: shapes and sizes. Out: tensors that hold anything.

Large blocks are often new pages, which Linux fills with zeros one by one as they are first written
to: from 32 MiB on glibc maps them anew each time, and it gives back what is free at the end of its
heap. For gradients that can take longer than the attention. The system is asked for its huge pages
there, 512 in one, where it has them to give.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

CPU = torch.device("cpu")
ALIGNMENT = 64  # bytes, of scratch memory
LARGE = 4 << 20  # bytes of a block that huge pages are asked for

_idle: list[Tensor] = []  # scratch memory between calls


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Memory for a result, whatever torch's default device is."""
    found = torch.empty(shape, dtype=dtype, device=CPU)
    if found.numel() * dtype.itemsize >= LARGE:
        _ask_for_huge_pages(found)
    return found


def _ask_for_huge_pages(x: Tensor) -> None:
    """A wish: a system without such pages refuses, and nothing is lost."""
    madvise = _madvise()
    if madvise is None:
        return
    start, end = x.data_ptr(), x.data_ptr() + x.nbytes
    start += -start % mmap.PAGESIZE
    if start < end:
        madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_HUGEPAGE)


@functools.cache
def _madvise() -> Callable | None:
    """Linux's function, where this Python can call it and knows of huge pages."""
    if sys.platform != "linux" or not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    try:
        return ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return None


def take_scratch(size: int) -> Tensor:
    """Idle memory of at least this size, or new memory; one ALIGNMENT more for its start."""
    try:
        found = _idle.pop()
    except IndexError:
        found = None
    if found is None or found.numel() < size + ALIGNMENT:
        found = None  # freed before there is more
        found = torch.empty(size + ALIGNMENT, dtype=torch.uint8, device=CPU)
    return found


def give_back(scratch: Tensor) -> None:
    """Keep scratch memory for another call."""
    _idle.append(scratch)


def forget() -> None:
    """Free the scratch memory that no call uses."""
    _idle.clear()
