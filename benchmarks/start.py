"""`python -m benchmarks.start`: the first call of a CPU kernel, compiled and from the cache.

In: nothing. Out: a record in JSON and its table. Every case and direction is some pairs of fresh
processes that share a new cache folder and have an empty PATH: the first plans and compiles, the
second finds the object. What the processes time is their first call, less a second one; a backward
pass comes after a forward one, as it always does. The record has the median of the pairs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import torch

from benchmarks import harness, record, report
from benchmarks.cases import OP_CASES, pick

ROOT = Path(__file__).parents[1]
CODE = """
import json, time, torch
from benchmarks.cases import OP_CASES, pick
from natcupy.cpu import launch
torch.set_num_threads(1)
case, = pick(OP_CASES, {name!r})
q, k, v, rpb = case.tensors(torch.float32, torch.device("cpu")).values()
common = (q, k, v, case.hood, case.scale, rpb, None, None)
def call():
    if {backward}:
        return launch.backward(q, None, *common, (True, True, rpb is not None))
    return launch.Forward(case.hood, case.scale)((q, k, v, rpb, None, None))
if {backward}:
    launch.Forward(case.hood, case.scale)((q, k, v, rpb, None, None))
times = []
for _ in range(2):
    wall, cpu = time.perf_counter(), time.thread_time()
    call()
    times.append((time.perf_counter() - wall, time.thread_time() - cpu))
print(json.dumps([1e3 * (first - second) for first, second in zip(*times)]))
"""


def main(argv: Sequence[str] | None = None) -> Path:
    """Run the command; the path of its record."""
    arguments = argparse.ArgumentParser(prog="python -m benchmarks.start", description=__doc__)
    arguments.add_argument("--case", help="only cases whose name holds this")
    arguments.add_argument("--pairs", type=int, default=3, help="of processes (%(default)s)")
    arguments.add_argument("--out", type=Path)
    given = arguments.parse_args(argv)
    torch.set_num_threads(1)
    made = record.new("start", torch.device("cpu"))
    made["pairs"], made["rows"] = given.pairs, []
    for case in pick(OP_CASES, given.case):
        for backward in (False, True):
            harness.say(f"{case.label}, {'backward' if backward else 'forward'}")
            pairs = [_pair(case.label, backward) for _ in range(given.pairs)]
            first, later = (
                [median(call[clock] for call in calls) for clock in range(2)]
                for calls in zip(*pairs, strict=True)
            )
            made["rows"].append(
                {
                    "case": case.label,
                    "pass": "backward" if backward else "forward",
                    "compiled_ms": {"wall": first[0], "cpu": first[1]},
                    "cached_ms": {"wall": later[0], "cpu": later[1]},
                }
            )
    path = given.out or record.path_of(made)
    record.write(path, made)
    record.write_text(path.with_suffix(".md"), _table(made))
    print(_table(made))
    return path


def _pair(name: str, backward: bool) -> list[list[float]]:
    """The first calls of two processes, one after the other, with a cache that starts empty."""
    with tempfile.TemporaryDirectory() as folder:
        return [_first_call(name, backward, folder) for _ in range(2)]


def _first_call(name: str, backward: bool, folder: str) -> list[float]:
    """[wall, CPU] milliseconds of a fresh process's first call beyond its second."""
    settings = {"NATCUPY_CACHE_DIR": folder, "PATH": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", CODE.format(name=name, backward=backward)],
        env=os.environ | settings,
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def _table(made) -> str:
    headings = ("case", "pass", "compiled, ms", "CPU", "from the cache, ms", "CPU")
    cells = [
        (
            row["case"],
            row["pass"],
            *(f"{row[kind][clock]:.1f}" for kind in KINDS for clock in ("wall", "cpu")),
        )
        for row in made["rows"]
    ]
    note = (
        "First call of a fresh process less its second, one thread, an empty PATH; "
        f"median of {made['pairs']}."
    )
    return f"{report.where(made)}\n\n{note}\n\n{report.table(headings, cells)}\n"


KINDS = ("compiled_ms", "cached_ms")

if __name__ == "__main__":
    main()
