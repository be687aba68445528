"""`python -m benchmarks.compiling`: seconds to compile the kernels of NAT-Tiny, from nothing.

In: architectures. Out: a record with the time of each kernel alone (the median of rounds in which
all are compiled one after another) and of all of them at once, forward and backward, as a first
training step or `natcupy.warmup` compiles them.
No GPU is needed: the compiler is NVRTC, the time is the CPU's. Beside the seconds that pass are
those of the CPU, which others on the machine stretch less.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch

from benchmarks import record
from natcupy import cache
from natcupy.cuda import jit, plan
from natcupy.neighborhood import Neighborhood

ROUNDS = 5
LEVELS = ((56, 2), (28, 4), (14, 8), (7, 16))  # side of the map, heads; head_dim 32, 7 x 7 windows


def main(argv: Sequence[str] | None = None) -> Path:
    """Run the command; the path of its record."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compiling", description=__doc__)
    parser.add_argument("--arch", nargs="+", default=["80", "90a"], help="default: 80 90a")
    parser.add_argument("--dtype", choices=("BF16", "F16", "F32"), default="BF16")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", type=Path, help="the JSON file; by default in benchmarks/results")
    arguments = parser.parse_args(argv)
    made = record.new("compiling", torch.device("cpu"))
    kit = jit.toolkit()
    made["compiler"] = f"NVRTC {kit.version[0]}.{kit.version[1]}"
    made["workers"], made["rows"] = arguments.workers, []
    for arch in arguments.arch:
        made["rows"].append(measure(arch, arguments.dtype, arguments.workers))
        print(told(made["rows"][-1]))
    path = arguments.out or record.path_of(made)
    record.write(path, made)
    return path


def measure(arch: str, dtype: str, workers: int) -> dict[str, Any]:
    """Seconds of every kernel for `arch` alone, and of all with `workers` compilers at once."""
    specs = specs_of(int(arch.rstrip("af")), dtype)
    rounds: dict[str, list[dict[str, float]]] = {str(spec): [] for spec in specs}
    for spec in specs * ROUNDS:
        begun = _now()
        jit.compile_spec(spec, arch)
        rounds[str(spec)].append(_since(begun))
    alone = {
        name: {kind: median(one[kind] for one in times) for kind in times[0]}
        for name, times in rounds.items()
    }
    with tempfile.TemporaryDirectory() as folder:
        store = cache.Store(Path(folder) / "binaries")
        with mock.patch.object(jit, "default_store", lambda: store):
            begun = _now()
            jit.compile_many(specs, arch, workers)
            together = _since(begun)
    return {"case": f"nat-tiny, {dtype}, sm_{arch}", "alone": alone, "together": together}


def _now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def _since(begun: tuple[float, float]) -> dict[str, float]:
    """Seconds that passed, and of them those of this process on all CPUs."""
    passed, used = (now - then for now, then in zip(_now(), begun, strict=True))
    return {"seconds": round(passed, 3), "cpu_seconds": round(used, 3)}


def specs_of(arch: int, dtype: str) -> list[jit.Spec]:
    """The kernels of a training step of NAT-Tiny, each once."""
    found: dict[jit.Spec, None] = {}
    for side, heads in LEVELS:
        shape, rows = (side, side), (8, side, side, heads, 32)
        names = ("query", "key", "value", "out", "d_out")
        p = plan.Problem(
            dtype=dtype, batch=8, shape=shape, heads=heads, kv_heads=heads, head_dim=32,
            value_dim=32, extras=0, hood=Neighborhood((7, 7), (1, 1), (1, 1), (False, False)),
            scale=32**-0.5, rpb=True, arch=arch, alignment=16,
            strides=tuple((name, plan.contiguous(rows)) for name in names),
        )  # fmt: skip
        for made in (plan.forward(p), plan.backward(p, True, True, False)):
            found |= dict.fromkeys(recipe.spec for recipe in made.recipes)
    return list(found)


def told(row: dict[str, Any]) -> str:
    """A row in words."""
    parts = []
    for kind in ("seconds", "cpu_seconds"):
        times = [one[kind] for one in row["alone"].values()]
        parts.append(
            f"slowest {max(times):.2f}, one after another {sum(times):.2f}, all at once "
            f"{row['together'][kind]:.2f} {kind.replace('_', ' ')}"
        )
    return f"{row['case']}, {len(row['alone'])} kernels: {'; '.join(parts)}"


if __name__ == "__main__":
    main()
