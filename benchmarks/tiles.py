"""`python -m benchmarks.tiles`: how long every tile takes, as rows of the table of tiles cite it.

In: the layers below and one CUDA GPU. Out: a record of kind "tiles": for each layer and each side
of the attention (forward, both sides backward, each alone) the microseconds of every choice that
the plan ranks high, the portable kernels' own among them.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks import record
from natcupy import cache
from natcupy.arguments import neighborhood
from natcupy.cuda import ops, plan, tuning
from natcupy.cuda.heuristics import BOTH, FORWARD, KEYS, QUERIES

SIDES = (FORWARD, BOTH, QUERIES, KEYS)
NOTE = (
    "Microseconds of every choice of a side, median of 15 with an empty second-level cache; "
    "bfloat16, with bias and its gradient."
)
# (side of the map, heads, dilation, head_dim, window, images), most valuable first.
LAYERS = (
    (56, 2, 1, 32, 7, 128), (28, 4, 1, 32, 7, 128), (14, 8, 1, 32, 7, 128), (7, 16, 1, 32, 7, 128),
    (112, 2, 1, 32, 7, 16), (56, 2, 8, 32, 7, 128), (28, 4, 4, 32, 7, 128), (14, 8, 2, 32, 7, 128),
    (200, 2, 1, 32, 7, 16), (28, 4, 1, 32, 11, 128), (56, 2, 1, 64, 7, 128),
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tiles", description=__doc__)
    parser.add_argument("--out", type=Path, help="the JSON file; by default in benchmarks/results")
    parser.add_argument("--seconds", type=float, default=120, help="budget (default %(default)s)")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("torch finds no CUDA GPU here.", file=sys.stderr)
        return 2
    device, end = torch.device("cuda"), time.monotonic() + arguments.seconds
    made = record.new("tiles", device) | {"note": NOTE, "rows": []}
    path = arguments.out or record.path_of(made, record.RESULTS)
    for layer in LAYERS:
        if time.monotonic() > end:
            break
        made["rows"] += rows(layer, device)
        record.write(path, made)
        for row in made["rows"][-len(SIDES) :]:
            print(row["case"], row["us"], flush=True)
    return 0


def rows(layer: tuple[int, ...], device: torch.device) -> list[dict[str, Any]]:
    """One row per side that the layer has."""
    side, heads, dilation, dim, window, images = layer
    name = f"{side}x{side} h{heads} d{dilation} dim{dim} k{window} b{images}"
    return [
        {"case": f"{name}, {which}", "us": times}
        for which, times in measured(layer, device).items()
    ]


def measured(layer: tuple[int, ...], device: torch.device) -> dict[str, dict[str, float]]:
    """{side: {choice: microseconds}}."""
    side, heads, dilation, dim, window, images = layer
    hood = neighborhood(2, window, 1, dilation, False)
    make = torch.Generator(device).manual_seed(0)
    qkv = torch.randn(
        (images, side, side, 3, heads, dim), generator=make, device=device, dtype=torch.bfloat16
    ).requires_grad_()
    spans = (2 * window - 1, 2 * window - 1)
    rpb = torch.zeros((heads, *spans), device=device, requires_grad=True)
    with gathered() as found:
        out, _ = ops.attention(*qkv.unbind(-3), hood, dim**-0.5, rpb, None, None)
        out.backward(torch.ones_like(out))
        if BOTH in found:  # the two sides apart, too
            del out
            plan.forget()
            with mock.patch.object(plan, "joins", return_value=False):
                out, _ = ops.attention(*qkv.unbind(-3), hood, dim**-0.5, rpb, None, None)
                out.backward(torch.ones_like(out))
    return {which: found[which] for which in SIDES if which in found}


@contextlib.contextmanager
def gathered() -> Iterator[dict[str, dict[str, float]]]:
    """What autotuning measures inside the block, in a cache of its own; by side."""
    found: dict[str, dict[str, float]] = {}
    measure = tuning._measure

    def watched(p, side, rpb, device, clock, trial) -> bytes:
        times = found.setdefault(side, {})

        class Watch:
            """The clock, which notes what it says for the choices in their order."""

            names = iter(plan.choices(p, side))

            def seconds(self, run, where):
                name = next(self.names)
                spent = clock.seconds(run, where)
                times["/".join(map(str, name))] = round(1e6 * spent, 1)
                return spent

        return measure(p, side, rpb, device, Watch(), trial)

    with (
        tempfile.TemporaryDirectory(prefix="natcupy-tiles-") as folder,
        mock.patch.dict(os.environ, {cache.FOLDER_VARIABLE: folder}),
        mock.patch.object(tuning, "_measure", watched),
        tuning.measuring(),
    ):
        tuning._forget(lambda choice: True)
        yield found


if __name__ == "__main__":
    sys.exit(main())
