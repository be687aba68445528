"""`python -m benchmarks.op`: attention alone, forward and with its gradients, in every way here.

In: a device, a dtype, batches. Out: a record in JSON, its tables in Markdown, a plot.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness
from benchmarks.cases import NAMES, OP_CASES, OpCase, pick
from benchmarks.peers import Way, pick_ways
from benchmarks.roofline import YARDSTICK, Roofline, yardstick

TRUTH_BATCH = 1  # pictures of a case on which errors are measured
PASSES = {False: "forward", True: "forward + backward"}


def main(argv: Sequence[str] | None = None) -> Path:
    """Run the command; the path of its record."""
    arguments = harness.parser("op", __doc__).parse_args(argv)
    device, dtype = harness.settings(arguments)
    cases = [c.at(n) for c in pick(OP_CASES, arguments.case) for n in arguments.batch]
    ways = pick_ways(arguments.way)
    made = harness.start("op", device, dtype, arguments)
    for case in cases:
        harness.say(case.label)
        made["rows"] += rows(
            case, ways, device, dtype, Roofline(**made["roofline"]),
            forward_only=arguments.forward_only, seconds=arguments.seconds,
        )  # fmt: skip
        harness.save(made, arguments)
    return harness.finish(made, arguments)


def rows(
    case: OpCase,
    ways: Sequence[Way],
    device: torch.device,
    dtype: torch.dtype,
    roofline: Roofline,
    *,
    forward_only: bool = False,
    seconds: float = 0.3,
) -> list[dict[str, Any]]:
    """Every way on one case: forward without gradients, and forward with all gradients."""
    truth = _truth(case, dtype, device)
    tensors = case.tensors(dtype, device)
    found = []
    for backward in (False,) if forward_only else (False, True):
        asked = []
        for way in ways:
            why_not = way.why_not(tensors["query"], case.hood, tensors["rpb"], backward)
            run, error = None, None
            if why_not is None:
                run = (_step if backward else _attending)(way, case, tensors)
                error, why_not = _error(way, case, dtype, device, truth)
            asked.append(
                {
                    "case": case.label,
                    "way": way.name,
                    "exact": way.exact,
                    "step": PASSES[backward],
                    "dtype": dtype,
                    "run": run,
                    "why_not": why_not,
                    "roofline": roofline,
                    "flops": case.flops(backward),
                    "moved": case.bytes(dtype, backward),
                    "error": error,
                }
            )
        if device.type == "cpu":
            asked += _beside(case, ways, dtype, asked[0], backward)
        with nullcontext() if backward else torch.inference_mode():
            found += harness.together(asked, device, seconds, alone=True)
    return found


def _beside(case: OpCase, ways: Sequence[Way], dtype: torch.dtype, like: dict, backward: bool):
    """On a CPU: a matrix product, and natcupy's own backend in bfloat16, in the same rounds."""
    run, flops = yardstick(dtype)
    common = like | {"exact": False, "error": None, "why_not": None}
    found = [common | {"way": YARDSTICK, "run": run, "flops": flops, "moved": None}]
    own = next((way for way in ways if way.name == "natcupy cpu"), None)
    if own is not None and dtype == torch.float32:
        tensors = case.tensors(torch.bfloat16, torch.device("cpu"))
        run = (_step if backward else _attending)(own, case, tensors)
        moved = case.bytes(torch.bfloat16, backward)
        name = f"{own.name}, bfloat16"
        found.append(common | {"way": name, "run": run, "flops": like["flops"], "moved": moved})
    return found


def _attending(way: Way, case: OpCase, tensors) -> Callable[[], torch.Tensor]:
    """A call of a way, with all that is not part of it done before."""
    query, key, value, rpb = (tensors[name] for name in NAMES)
    return partial(way.attend, query, key, value, case.hood, case.scale, rpb)


def _step(way: Way, case: OpCase, tensors) -> Callable[[], object]:
    leaves = {n: None if x is None else x.detach().requires_grad_() for n, x in tensors.items()}
    given = [x for x in leaves.values() if x is not None]
    make = torch.Generator().manual_seed(1)
    d_out = torch.randn(tensors["query"].shape, generator=make).to(tensors["query"])
    attend = _attending(way, case, leaves)

    def run():
        # a way that leaves the bias out has no gradient for it
        return torch.autograd.grad(attend(), given, d_out, allow_unused=not way.exact)

    return run


def _truth(case: OpCase, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The definition in float64, from the very numbers that the ways get."""
    tensors = case.at(TRUTH_BATCH).tensors(dtype, device)
    double = {n: None if x is None else x.double() for n, x in tensors.items()}
    plain = next(way for way in pick_ways("natcupy torch"))
    with torch.inference_mode():
        return _attending(plain, case.at(TRUTH_BATCH), double)()


def _error(way: Way, case: OpCase, dtype, device, truth) -> tuple[float | None, str | None]:
    """Largest difference from the truth of an exact way; or why it cannot run after all."""
    if not way.exact:
        return None, None
    small = case.at(TRUTH_BATCH)
    try:
        with torch.inference_mode():
            out = _attending(way, small, small.tensors(dtype, device))()
    except Exception as failure:  # other libraries raise whatever they like
        return None, harness.reason(failure)
    return harness.finite((out.double() - truth).abs().max().item())


if __name__ == "__main__":
    main()
