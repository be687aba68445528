"""A model as one CUDA graph: a model and example inputs come in, a callable of that shape goes out.

A NAT forward pass launches some 330 kernels, each a few microseconds of the host's time; a graph
launches them all at once. This is torch's own `torch.cuda.graph` with what it asks of its user:
warm-up runs on a side stream, inputs at fixed addresses, no stale autocast copies of weights, and
an error where a call does not fit. Inference only; `torch.cuda.make_graphed_callables` captures a
training step, and `torch.compile(mode="reduce-overhead")` captures what it compiles.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

WARM_UPS = 3  # runs before the capture: kernels are compiled, libraries choose their algorithms

_cuda: Any = torch.cuda  # a test puts another in its place


class Graphed:
    """A captured model. Call it with tensors of the shapes, dtypes and device it was captured with.

    Weights are read where they lay at the capture: changes in place count, replaced ones do not.
    """

    def __init__(self, graph: Any, model: nn.Module, inputs: tuple[Tensor, ...], outputs: Any):
        self._graph, self._inputs, self._outputs = graph, inputs, outputs
        # what the graph reads must not be freed: the model's own, and what may be replaced in it
        self._kept = model, _tensors(model)

    def __call__(self, *inputs: Tensor, copy: bool = True) -> Any:
        """What the model gives for `inputs`, as fresh tensors.

        With `copy=False` the results are the graph's own tensors, which the next call overwrites.
        Raises ValueError for inputs that the graph was not captured for.
        """
        self._check(inputs)
        with torch.no_grad():
            for mine, given in zip(self._inputs, inputs, strict=True):
                mine.copy_(given)
            self._graph.replay()
            return tree_map(_copied, self._outputs) if copy else self._outputs

    def _check(self, inputs: tuple[Any, ...]) -> None:
        expected, got = _told(self._inputs), _told(inputs)
        if expected != got:
            raise ValueError(
                f"this graph was captured for ({expected}), got ({got}); capture another one with "
                "natcupy.graph(model, example) for each shape, or call the model itself."
            )


def graph(model: nn.Module, *example: Tensor) -> Graphed:
    """Capture `model(*example)` as a CUDA graph, for inference.

    Args:
        model: a module in eval mode, on one CUDA device, whose work does not depend on the numbers
            in its input (no data-dependent shapes, no synchronisation). NAT and DiNAT models do.
        example: CUDA tensors of the shapes and dtypes to come. They are copied, not kept.

    Returns a `Graphed`. Call this inside `torch.autocast` if the model shall run there. The graph
    keeps the model, and the memory of one forward pass, for as long as it lives.

    Raises TypeError for an example that is no tensor, ValueError for one that is not on a CUDA
    device or a model in training mode, and what the model raises.
    """
    _check(model, example)
    device = example[0].device
    # A call writes to the inputs, which those made in inference mode allow only there.
    ordinary = torch.inference_mode(False)
    with ordinary, torch.no_grad(), _cuda.device(device), _without_autocast_cache():
        inputs = tuple(x.detach().clone() for x in example)
        side = _cuda.Stream(device)
        side.wait_stream(_cuda.current_stream(device))
        with _cuda.stream(side):
            for _ in range(WARM_UPS):
                model(*inputs)
        _cuda.current_stream(device).wait_stream(side)
        captured = _cuda.CUDAGraph()
        with _cuda.graph(captured, stream=side):  # torch's own belongs to one device, the first
            outputs = model(*inputs)
    return Graphed(captured, model, inputs, outputs)


@contextlib.contextmanager
def _without_autocast_cache() -> Iterator[None]:
    """Weights are cast inside the graph: a cached copy would be freed when autocast is left."""
    before = torch.is_autocast_cache_enabled()
    torch.clear_autocast_cache()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


def _check(model: nn.Module, example: tuple[Any, ...]) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"graph captures a torch.nn.Module, got {type(model).__name__}.")
    if not example or not all(isinstance(x, Tensor) for x in example):
        given = ", ".join(type(x).__name__ for x in example) or "none"
        raise TypeError(f"graph needs example tensors, as the model takes them, got {given}.")
    places = {x.device for x in (*example, *_tensors(model))}
    if len(places) != 1 or next(iter(places)).type != _DEVICE_TYPE:
        raise ValueError(
            "graph needs the model and its example on one CUDA device, got "
            f"{', '.join(sorted(map(str, places)))}; move them with .to('cuda')."
        )
    if any(module.training for module in model.modules()):
        raise ValueError(
            "graph captures inference, got a model in training mode; call model.eval() first, or "
            "use torch.cuda.make_graphed_callables for training."
        )


_DEVICE_TYPE = "cuda"


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def _told(inputs: tuple[Any, ...]) -> str:
    """Shapes, dtypes and devices in words."""
    return "; ".join(
        f"{list(x.shape)} {str(x.dtype).removeprefix('torch.')} on {x.device}"
        if isinstance(x, Tensor)
        else type(x).__name__
        for x in inputs
    )


def _copied(x: Any) -> Any:
    return x.clone() if isinstance(x, Tensor) else x
