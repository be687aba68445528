"""`python -m benchmarks.model`: whole models of the zoo, inference and a training step.

In: a device, a dtype, batches. Out: a record in JSON, its tables in Markdown, a plot. The models
are the same for every way to attend; only what their attention layers call is exchanged.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import natcupy
from benchmarks import harness
from benchmarks.cases import MODEL_CASES, ModelCase, pick
from benchmarks.peers import Way, pick_ways
from benchmarks.roofline import Roofline
from benchmarks.timm_models import create
from benchmarks.ways import anything
from natcupy.modules import (
    NeighborhoodAttention1D,
    NeighborhoodAttention2D,
    NeighborhoodAttention3D,
)
from natcupy.zoo import count_macs

PASSES = {False: "inference", True: "training step"}
SWIN = "swin_tiny_patch4_window7_224"  # as many parameters and operations as NAT-Tiny
NOTHING = Way("no attention, values pass", False, lambda q, k, v, *rest: v, anything)
LAYERS = (NeighborhoodAttention1D, NeighborhoodAttention2D, NeighborhoodAttention3D)


def main(argv: Sequence[str] | None = None) -> Path:
    """Run the command; the path of its record."""
    parser = harness.parser("model", __doc__)
    parser.add_argument(
        "--compiled", action="store_true",
        help="also the model and Swin-Tiny under torch.compile and, on a GPU, the model's graph",
    )  # fmt: skip
    arguments = parser.parse_args(argv)
    device, dtype = harness.settings(arguments)
    ways = (*pick_ways(arguments.way), NOTHING)
    swin = create(SWIN, device, dtype)
    made = harness.start("model", device, dtype, arguments)
    for case in pick(MODEL_CASES, arguments.case):
        model = build(case, device, dtype)
        for batch in arguments.batch:
            harness.say(f"{case.label}, batch {batch}")
            made["rows"] += rows(
                case, model, batch, ways, swin, device, dtype, Roofline(**made["roofline"]),
                forward_only=arguments.forward_only, seconds=arguments.seconds,
                compiled=arguments.compiled,
            )  # fmt: skip
            harness.save(made, arguments)
    return harness.finish(made, arguments)


def build(case: ModelCase, device: torch.device, dtype: torch.dtype, **overrides: Any) -> nn.Module:
    """The model with random weights."""
    torch.manual_seed(0)
    return natcupy.create_model(case.name, **overrides).to(device, dtype)


@contextlib.contextmanager
def attending(model: nn.Module, way: Way) -> Iterator[None]:
    """Inside, every neighborhood attention layer of `model` attends by `way`."""
    layers = [module for module in model.modules() if isinstance(module, LAYERS)]

    def by_way(layer):
        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return way.attend(query, key, value, layer.hood, layer.scale, layer.rpb)

        return attend

    for layer in layers:
        layer._attend = by_way(layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer._attend


def rows(
    case: ModelCase,
    model: nn.Module,
    batch: int,
    ways: Sequence[Way],
    swin: nn.Module | str,
    device: torch.device,
    dtype: torch.dtype,
    roofline: Roofline,
    *,
    forward_only: bool = False,
    seconds: float = 0.3,
    compiled: bool = False,
) -> list[dict[str, Any]]:
    """Every way on one model and batch, and timm's Swin-Tiny on the same pictures."""
    make = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, case.size, case.size, generator=make).to(device, dtype)
    macs = count_macs(model.config, case.size, case.size).plain
    found, truth = [], _reference(model, images[:1])
    for training in (False,) if forward_only else (False, True):
        common = {
            "case": f"{case.label}, batch {batch}",
            "step": PASSES[training],
            "dtype": dtype,
            "roofline": roofline,
            "moved": None,
        }
        passes = 3 if training else 1
        step = _training_step if training else _inference
        asked = []
        model.train(training)
        for way in ways:
            with attending(model, way):
                why_not, error = _try(way, model, images, training, truth)
            asked.append(
                common
                | {
                    "way": way.name,
                    "exact": way.exact,
                    "run": _attending(model, way, step(model, images)),
                    "why_not": why_not,
                    "flops": 2 * macs * batch * passes,
                    "error": error,
                }
            )
        asked.append(common | _swin(swin, images, step, training))
        if compiled:
            mine = common | {"flops": 2 * macs * batch * passes}
            asked += [mine | row for row in _compiled(model, swin, images, step, training, truth)]
        found += harness.together(asked, device, seconds)
        model.zero_grad(set_to_none=True)
    return found


def _attending(model: nn.Module, way: Way, run):
    def both():
        with attending(model, way):
            return run()

    return both


def _swin(
    swin: nn.Module | str,
    images: Tensor,
    step,
    training: bool,
    make=lambda model: model,
    name: str = "",
) -> dict[str, Any]:
    why_not = swin if isinstance(swin, str) else None
    if why_not is None and tuple(images.shape[2:]) != (224, 224):
        why_not = "it takes 224 x 224 pictures only"
    return {
        "way": f"timm {SWIN}{name}",
        "exact": False,
        "run": None if why_not else step(make(swin.train(training)), images),
        "why_not": why_not,
        # Swin (arXiv 2103.14030), table 1
        "flops": int(2 * 4.5e9) * len(images) * (3 if training else 1),
    }


def _compiled(
    model: nn.Module, swin: nn.Module | str, images: Tensor, step, training: bool, truth: Tensor
) -> list[dict[str, Any]]:
    """The model and Swin-Tiny as torch.compile makes them, and the model as a CUDA graph."""
    rows = []
    if not isinstance(swin, str):
        rows.append(_swin(swin, images, step, training, torch.compile, ", compiled"))
    rows.append(_made("natcupy, compiled", model, torch.compile, images, step, training, truth))
    if images.is_cuda and not training:
        graph = natcupy.graph(model.eval(), images)
        rows.append(_made("natcupy, graph", graph, lambda x: x, images, step, training, truth))
    return rows


def _made(
    name: str, model, make, images: Tensor, step, training: bool, truth: Tensor
) -> dict[str, Any]:
    """One row: `make(model)`, or why there is none."""
    made, why_not, error = make(model), None, None
    try:
        if training:
            step(made, images)()
        else:
            with torch.inference_mode():
                error, why_not = harness.finite((made(images)[:1] - truth).abs().max().item())
    except Exception as failure:  # a compiler raises whatever it likes
        why_not = harness.reason(failure)
    return {
        "way": name, "exact": not training, "run": step(made, images), "why_not": why_not,
        "error": error,
    }  # fmt: skip


def _reference(model: nn.Module, image: Tensor) -> Tensor:
    """Logits of one picture by the definition, in the model's own dtype."""
    model.eval()
    with attending(model, pick_ways("natcupy torch")[0]), torch.inference_mode():
        return model(image)


def _try(way: Way, model, images, training, truth) -> tuple[str | None, float | None]:
    """Why a way cannot run this model, or its largest difference from the definition."""
    problems: list[str] = []

    def ask(layer, inputs):
        (x,) = inputs
        query = x.unflatten(-1, (layer.num_heads, layer.head_dim))
        why_not = way.why_not(query, layer.hood, layer.rpb, training)
        if why_not is not None:
            problems.append(why_not)
            raise _Refused

    layers = [module for module in model.modules() if isinstance(module, LAYERS)]
    hooks = [layer.register_forward_pre_hook(ask) for layer in layers]
    mode = model.training
    try:
        model.eval()
        with torch.inference_mode():
            logits = model(images[:1])
            model(images)
    except _Refused:
        return problems[0], None
    except Exception as failure:  # other libraries raise whatever they like
        return harness.reason(failure), None
    finally:
        model.train(mode)
        for hook in hooks:
            hook.remove()
    if not way.exact:
        return None, None
    error, why_not = harness.finite((logits - truth).abs().max().item())
    return why_not, error


class _Refused(Exception):  # noqa: N818 (no error: an answer)
    """A layer's attention cannot be run in this way."""


def _inference(model: nn.Module, images: Tensor):
    @torch.inference_mode()
    def run():
        return model(images)

    return run


def _training_step(model: nn.Module, images: Tensor):
    """Forward, loss and all gradients, without the optimizer."""

    def run():
        model.zero_grad(set_to_none=True)
        model(images).float().square().mean().backward()

    return run


if __name__ == "__main__":
    main()
