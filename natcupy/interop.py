"""Arrays of other libraries at the public edge: CuPy and numpy arrays in, the same kind out.

In: a function of tensors, and a call of it in which every array has `__dlpack__` and none is a
torch tensor. Out: the results as arrays of the library that the inputs came from. Memory is shared
both ways, nothing is copied, and that library is not imported: whoever holds its arrays has done
so already.

DLPack orders the streams. `torch.from_dlpack` hands torch's current stream to the producer, which
makes that stream wait for whatever fills the array; the library's own `from_dlpack` hands torch its
current stream, which then waits for the result. No gradient flows through.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.nn import Parameter

P = ParamSpec("P")
R = TypeVar("R")

_USUAL = frozenset((Tensor, Parameter, int, float, bool, tuple, str, type(None)))
_NOT_ARRAYS = (Tensor, int, float, str, bytes, list, tuple, dict, type(None))


def is_foreign(x: Any) -> bool:
    """Whether `x` is an array that speaks DLPack and is not a torch tensor."""
    return not isinstance(x, _NOT_ARRAYS) and hasattr(x, "__dlpack__")


def accepts_arrays(function: Callable[P, R]) -> Callable[P, R]:
    """`function`, whose tensor arguments may also all be arrays of one other library.

    It then returns that library's arrays (in a tuple where it returned a tuple of tensors). Calls
    with tensors go straight through. Raises TypeError when arrays of two libraries, or arrays and
    tensors, meet in one call, or an array is not of floats, and ValueError for an array that torch
    cannot take. Autocast is for tensors: an array's own dtype decides.
    """

    signature = inspect.signature(function)
    tensors = {name for name, p in signature.parameters.items() if "Tensor" in str(p.annotation)}

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        if (
            not torch.compiler.is_compiling()  # torch 2.6 cannot trace what follows
            and _USUAL.issuperset(map(type, args))
            and _USUAL.issuperset(map(type, kwargs.values()))
        ):
            return function(*args, **kwargs)
        if not any(map(is_foreign, (*args, *kwargs.values()))):
            return function(*args, **kwargs)
        given = signature.bind(*args, **kwargs).arguments
        arrays = {name: x for name, x in given.items() if name in tensors and is_foreign(x)}
        if not arrays:
            return function(*args, **kwargs)
        _check_one_library(function.__name__, [x for name, x in given.items() if name in tensors])
        _check_floats(arrays)
        leave = _exporter(next(iter(arrays.values())))
        entered = {name: _enter(x) for name, x in arrays.items()}
        with torch.autocast(next(iter(entered.values())).device.type, enabled=False):
            result = function(**(given | entered))
        return tuple(map(leave, result)) if isinstance(result, tuple) else leave(result)

    return wrapper


def _check_one_library(name: str, values: Sequence[Any]) -> None:
    kinds = {_library(x) for x in values if is_foreign(x) or isinstance(x, Tensor)}
    if len(kinds) > 1:
        raise TypeError(
            f"all arrays of a call must come from one library, got {' and '.join(sorted(kinds))} "
            f"in one call of {name}; convert some of them, for instance with "
            "torch.from_dlpack(array), which copies nothing."
        )


def _check_floats(arrays: dict[str, Any]) -> None:
    """Said here, in the words of the array's own library: a tensor has no `astype`."""
    for name, x in arrays.items():
        if getattr(getattr(x, "dtype", None), "kind", "f") in "biuc":
            raise TypeError(
                f"{name} must be float16, float32 or float64, got {_library(x)}'s {x.dtype}; "
                'convert it with .astype("float32").'
            )


def _library(x: Any) -> str:
    if isinstance(x, Tensor):  # a Parameter too, and a subclass from anywhere
        return "torch"
    return type(x).__module__.partition(".")[0]


def _enter(x: Any) -> Any:
    """A tensor over the array's memory."""
    if any(stride < 0 for stride in getattr(x, "strides", None) or ()):
        raise ValueError(  # torch has no such tensors, and some versions end the process on them
            f"an array must not run backward in memory, got strides {x.strides}; make it "
            "contiguous, for instance with numpy.ascontiguousarray."
        )
    try:
        return torch.from_dlpack(x)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"an array must be one that torch.from_dlpack takes, got {type(x).__module__}."
            f"{type(x).__qualname__} ({reason}); pass an array of a float type on the CPU or a "
            "CUDA device."
        ) from error


def _exporter(array: Any) -> Callable[[Any], Any]:
    """What turns a resulting tensor into an array of the library that `array` came from."""
    take = _from_dlpack_of(array)
    if take is None:
        raise TypeError(
            "the result is returned through the input library's from_dlpack, got an array of "
            f"{type(array).__module__}, which has none; pass torch.from_dlpack(array) and "
            "convert the result yourself."
        )
    return lambda x: take(x) if isinstance(x, Tensor) else x


def _from_dlpack_of(array: Any) -> Callable[[Any], Any] | None:
    """`from_dlpack` of the array's namespace (the array API), or of its module."""
    if hasattr(array, "__array_namespace__"):
        return getattr(array.__array_namespace__(), "from_dlpack", None)
    return getattr(sys.modules.get(_library(array)), "from_dlpack", None)
