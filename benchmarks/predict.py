"""What the tensor-core kernels should take on a GPU: arithmetic on counts, nothing measured.

In: the PTX interpreter's counts of one image and one head, scaled to a batch, and what a GPU can do
per second. Out: a record of kind "prediction" with a table: for each kernel and layer of NAT-Tiny
and DiNAT-Tiny, a line and a video the time of every unit, and a range for the whole.
`python -m benchmarks.predict` writes both to `benchmarks/results`; a measurement is to be held
against them. Lines and videos also have what the portable kernels would take.

The lower end of the range takes all units to work at once, the upper end adds the busiest unit on
the chip to the time of main memory, as where one block of threads has a multiprocessor to itself.
PTX instructions stand for machine instructions, of which there are more or fewer.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path
from unittest import mock

import torch

from benchmarks import record

WARPS_OF_EXP = 0.5  # warp instructions a clock: 16 lanes


@dataclass(frozen=True)
class Gpu:
    """Bytes a second of main memory (as copied, not as printed) and from L2; clock, processors."""

    name: str
    memory: float
    cache: float
    clock: float
    processors: int
    multiply_adds: int  # a clock and processor, dense, in halves; floats in TF32 half of that
    reached: float  # share of it that mma.sync reaches


GPUS = (
    Gpu("H100", 3.0e12, 5.5e12, 1.755e9, 132, 2048, 0.62),
    Gpu("H200", 4.3e12, 5.5e12, 1.755e9, 132, 2048, 0.62),
)
LAYERS = (  # (shape, window, heads, dilation): of NAT-Tiny, of DiNAT-Tiny, a line, a video
    ((56, 56), 7, 2, 1), ((28, 28), 7, 4, 1), ((14, 14), 7, 8, 1), ((7, 7), 7, 16, 1),
    ((56, 56), 7, 2, 8), ((28, 28), 7, 4, 4), ((14, 14), 7, 8, 2),
    ((4096,), 63, 4, 1), ((8, 28, 28), (3, 7, 7), 4, 1),
)  # fmt: skip
# Read or written at least once.
TENSORS = {"fwd": 4, "bwd": 8, "bwd_dq": 6, "bwd_dkv": 6, "bwd_dense": 8}


def count(shape, window, dilation: int, dtype: torch.dtype) -> dict[str, dict[str, float]]:
    """Counts of one image, per image and head, by kernel."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    from kernel_cases import Case, cotangents, inputs
    from ptxsim import Checks
    from ptxsim.launcher import PtxLauncher
    from test_kernels import run

    from natcupy.cuda import heuristics, plan

    small, dense = len(shape) == 2, shape == (7 * dilation,) * 2
    heads = 4 if dense else 1
    case = Case("", shape, window, "", dilation=dilation, heads=heads, kv_heads=heads,
                head_dim=32, value_dim=32, rpb=small, dtype=dtype)  # fmt: skip
    launcher = PtxLauncher("90a", checks=Checks(races=False, uninitialised=False, traffic=True))
    # Backward in one launch, and where that is done also in two.
    families = ("small",) if dense or dtype == torch.float32 else ("small", "apart")
    # One image on a sliver of a chip is cut as many images are on a whole one.
    chip = {90: replace(heuristics.architecture(90), multiprocessors=1e-3)}
    with mock.patch.dict(heuristics.ARCHITECTURES, chip):
        for family in families if small else ("mma", "portable"):
            with plan.use_family(family):
                run(case, launcher, inputs(case), *cotangents(case))
    return {
        made.recipe.spec.entry: {name: value / heads for name, value in _of(made.counters).items()}
        for made in launcher.records
        if made.recipe.spec.entry != "reduce_partials"
    }


def tensors_of(kernel: str) -> int:
    """Tensors that a kernel has to move."""
    return TENSORS[kernel.removeprefix("na2d_small_").removeprefix("na_").removeprefix("mma_")]


def _of(counters) -> dict[str, float]:
    casts = counters.instructions["mov.b32"]  # of floats to words: no machine has them
    found = {"instructions": counters.total - casts, "exponentials": 0, "multiply_adds": 0}
    for opcode, runs in counters.instructions.items():
        if opcode.startswith("ex2"):
            found["exponentials"] += runs
        elif opcode.startswith("mma"):
            k = int(opcode.split("m16n8k")[1].split(".")[0])
            found["multiply_adds"] += runs * 16 * 8 * k * (2 if "tf32" in opcode else 1)
    kinds = ("cp.async wavefronts", "shared read wavefronts", "shared write wavefronts")
    traffic = counters.traffic
    return found | {
        "wavefronts": sum(traffic[kind] for kind in kinds),
        "sectors": traffic["global read sectors"] + traffic["global write sectors"],
    }


def predict(counts: dict[str, float], moved: float, gpu: Gpu) -> dict[str, float]:
    """Microseconds of every unit, and the range; `moved` bytes of main memory, whole launch."""
    chip = gpu.clock * gpu.processors
    units = {
        "memory": moved / gpu.memory,
        "cache": 32 * counts["sectors"] / gpu.cache,
        "products": counts["multiply_adds"] / (gpu.multiply_adds * gpu.reached * chip),
        "exponentials": counts["exponentials"] / (WARPS_OF_EXP * chip),
        "shared": counts["wavefronts"] / chip,
        "issue": counts["instructions"] / (4 * chip),
    }
    least = max(units.values())
    most = units["memory"] + max(units[name] for name in units if name != "memory")
    return {name: 1e6 * t for name, t in (units | {"least": least, "most": most}).items()}


def rows(batch: int, layers=LAYERS):
    """One row per layer, dtype, kernel and GPU."""
    for dtype in (torch.bfloat16, torch.float32):
        for shape, window, heads, dilation in layers:
            for kernel, one in count(shape, window, dilation, dtype).items():
                whole = {name: value * batch * heads for name, value in one.items()}
                tensor = batch * prod(shape) * heads * 32 * dtype.itemsize
                for gpu in GPUS:
                    yield {
                        "layer": f"{'x'.join(map(str, shape))} d{dilation}",
                        "dtype": str(dtype).removeprefix("torch."),
                        "kernel": kernel,
                        "gpu": gpu.name,
                        "counts": whole,
                        "us": predict(whole, tensors_of(kernel) * tensor, gpu),
                    }


UNITS = ("memory", "cache", "products", "exponentials", "shared", "issue")


def table(made) -> str:
    """The record as a page."""
    lines = [
        f"# Predicted, not measured: batch {made['batch']}, {made['date']}",
        "",
        "Microseconds, by `python -m benchmarks.predict`: how long each unit of a GPU is busy by",
        "the interpreter's counts, and the range between all units at work at once and main memory",
        "followed by the busiest other one. No kernel ran on a GPU for this table.",
        "",
        f"| layer | dtype | kernel | GPU | {' | '.join(UNITS)} | predicted |",
        f"|{'---|' * (len(UNITS) + 5)}",
    ]
    for row in made["rows"]:
        us = row["us"]
        units = " | ".join(f"{us[unit]:.0f}" for unit in UNITS)
        lines.append(
            f"| {row['layer']} | {row['dtype']} | `{row['kernel']}` | {row['gpu']} | {units} "
            f"| **{us['least']:.0f}–{us['most']:.0f}** |"
        )
    return "\n".join(lines) + "\n"


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.predict", description=__doc__)
    parser.add_argument("--batch", type=int, default=128, help="images (default 128)")
    parser.add_argument("--out", type=Path, default=record.RESULTS, help="folder of the record")
    given = parser.parse_args(args)
    made = record.new("prediction", torch.device("cpu"))
    made |= {"batch": given.batch, "gpus": [asdict(gpu) for gpu in GPUS]}
    made["rows"] = list(rows(given.batch))
    name = f"prediction-{made['date']}"
    record.write(given.out / f"{name}.json", made)
    record.write_text(given.out / f"{name}.md", table(made))
    print(table(made))


if __name__ == "__main__":
    main()
