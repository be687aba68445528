"""CuPy arrays at the public edge: in as tensors over the same memory, out as arrays again.

In: a call's tensor arguments, some of them CuPy arrays. Out: tensors, and a function that turns
results back. Memory is shared through DLPack, which also orders the two libraries' streams: a
tensor is ready on torch's current stream, a result on CuPy's. No gradient flows through.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from natcupy.cuda.nvrtc import import_cupy


def is_cupy_array(x: Any) -> bool:
    """Whether `x` is a CuPy array, found without importing CuPy."""
    kind = type(x)
    return kind.__module__.partition(".")[0] == "cupy" and kind.__name__ == "ndarray"


def enter(*arguments: Any) -> tuple[tuple[Any, ...], Callable[[Tensor], Any]]:
    """The arguments with CuPy arrays as tensors, and what to do with each resulting tensor.

    Without CuPy arrays both are what they were. Raises TypeError when CuPy arrays meet tensors.
    """
    found = [is_cupy_array(x) for x in arguments]
    if not any(found):
        return arguments, _keep
    if any(isinstance(x, Tensor) for x in arguments):
        raise TypeError(
            "a call takes CuPy arrays or torch tensors, got both; convert one side with "
            "torch.from_dlpack(array) or cupy.from_dlpack(tensor)."
        )
    converted = (
        torch.from_dlpack(x) if is_array else x
        for x, is_array in zip(arguments, found, strict=True)
    )
    return tuple(converted), to_cupy


def to_cupy(tensor: Tensor) -> Any:
    """A CuPy array over `tensor`'s memory, ready on CuPy's current stream."""
    return import_cupy("cupy").from_dlpack(tensor.detach())


def _keep(x: Any) -> Any:
    return x
