"""A few seconds that tell whether a device computes neighborhood attention rightly.

In: a device and a backend. Out: a record for each of four small calls (1-D, 2-D twice, 3-D; forward
and every gradient), compared with the plain torch backend in float64 on the CPU.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import natcupy
from natcupy.cuda import jit, launch

# Largest difference from float64, over the largest true number, that a dtype may show.
ALLOWED = {torch.float32: 1e-5, torch.float16: 1e-2}
NAMES = ("output", "d_query", "d_key", "d_value", "d_bias")


@dataclass(frozen=True)
class Call:
    """One call: what the record names it by, and its numbers."""

    label: str
    shape: tuple[int, ...]
    kernel_size: int
    dtype: torch.dtype
    dilation: int = 1
    is_causal: bool = False


CALLS = (
    Call("na1d, 9 keys, dilated, causal", (40,), 9, torch.float32, 2, True),
    Call("na2d, 7 x 7 keys", (14, 14), 7, torch.float32),
    Call("na2d, 7 x 7 keys, half precision", (14, 14), 7, torch.float16),
    Call("na3d, 3 x 3 x 3 keys", (4, 6, 5), 3, torch.float32),
)


@contextlib.contextmanager
def exact_products() -> Iterator[None]:
    """Inside, torch's setting allows no TF32: what is judged are kernels, not that setting."""
    matmul = torch.backends.cuda.matmul
    new = hasattr(matmul, "fp32_precision")  # from torch 2.9 on
    name, exact = ("fp32_precision", "ieee") if new else ("allow_tf32", False)
    before = getattr(matmul, name)
    setattr(matmul, name, exact)
    try:
        yield
    finally:
        setattr(matmul, name, before)


def self_test(device: torch.device, backend: str) -> list[dict[str, Any]]:
    """A record per call: `error` over the allowed one (up to 1 is right), or why it `failed`."""
    return [_try(call, device, backend) for call in CALLS]


def _try(call: Call, device: torch.device, backend: str) -> dict[str, Any]:
    made = {"call": call.label, "dtype": str(call.dtype).removeprefix("torch.")}
    begun, kernels = time.perf_counter(), []
    try:
        inputs, d_out = _inputs(call)
        with _noting(kernels):
            found = _run(call, inputs, d_out, device, call.dtype, backend)
        true = _run(call, inputs, d_out, torch.device("cpu"), torch.float64, "torch")
    except (RuntimeError, ImportError) as failure:
        return made | {"failed": " ".join(str(failure).split()), "kernels": kernels}
    errors = {
        name: _error(x, y) / ALLOWED[call.dtype]
        for name, x, y in zip(NAMES, found, true, strict=True)
    }
    worst = max(errors, key=errors.__getitem__)
    seconds = round(time.perf_counter() - begun, 2)
    return made | {
        "error": errors[worst], "where": worst, "seconds": seconds, "kernels": kernels
    }  # fmt: skip


def _error(x: Tensor, true: Tensor) -> float:
    """The largest difference; infinite for a number that is none."""
    x = x.detach().double().cpu()
    if not x.isfinite().all():
        return float("inf")
    return ((x - true).abs().max() / true.abs().max()).item()


def _inputs(call: Call) -> tuple[list[Tensor], Tensor]:
    """Query, key, value and bias, and the gradient of the output, rounded to the call's dtype."""
    make = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=make).to(call.dtype)

    rows = (1, *call.shape, 2, 32)
    bias = random(2, *(2 * call.kernel_size - 1,) * len(call.shape))
    return [random(*rows), random(*rows), random(*rows), bias], random(*rows)


def _run(call: Call, inputs, d_out, device, dtype, backend) -> list[Tensor]:
    leaves = [x.to(device, dtype).requires_grad_() for x in inputs]
    attend = getattr(natcupy, f"na{len(call.shape)}d")
    out = attend(
        *leaves[:3], call.kernel_size, dilation=call.dilation, is_causal=call.is_causal,
        rpb=leaves[3], backend=backend,
    )  # fmt: skip
    return [out, *torch.autograd.grad(out, leaves, d_out.to(device, dtype))]


class _Noting:
    """A launcher that writes down the kernels that pass it."""

    def __init__(self, inner: Any, kernels: list[str]):
        self._inner, self._kernels = inner, kernels

    def launch(self, recipe: launch.Launch, device: torch.device) -> None:
        if recipe.spec.entry not in self._kernels:
            self._kernels.append(recipe.spec.entry)
        self._inner.launch(recipe, device)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


@contextlib.contextmanager
def _noting(kernels: list[str]) -> Iterator[None]:
    with jit.use_launcher(_Noting(launch.current_launcher() or jit._default, kernels)):
        yield
