"""`python -m benchmarks.counters`: what warps wait for, as Nsight Compute counts it.

In: `ncu`, which comes with CUDA, and one GPU. Out: a record of kind "counters": for each launch of
NAT-Tiny's layers at batch 128, forward and backward, its duration, instructions, occupancy, traffic
and the warps that wait per instruction issued, by what they wait for. `--run` is what is profiled.
"""

from __future__ import annotations

import argparse
import csv
import io
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import record, sanitizer
from benchmarks.cases import OP_CASES

METRICS = (
    "gpu__time_duration.sum", "smsp__inst_executed.sum",
    "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "sm__warps_active.avg.per_cycle_active", "launch__registers_per_thread",
    "launch__occupancy_limit_registers", "launch__occupancy_limit_shared_mem",
    "dram__bytes.sum", "lts__t_bytes.sum", "l1tex__data_pipe_lsu_wavefronts.sum",
    "smsp__inst_executed_pipe_tensor.sum", "smsp__inst_executed_pipe_xu.sum",
    "regex:smsp__average_warps_issue_stalled_.*_per_issue_active",
)  # fmt: skip
LAYERS = ("level 1", "level 2", "level 3", "level 4")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 2 without a GPU or without the tool."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.counters", description=__doc__)
    parser.add_argument("--out", type=Path, help="the JSON file; by default in benchmarks/results")
    parser.add_argument("--batch", type=int, default=128, help="images (default %(default)s)")
    parser.add_argument("--run", action="store_true", help="be what is profiled")
    arguments = parser.parse_args(argv)
    tool = sanitizer.find("ncu")
    if not torch.cuda.is_available() or (tool is None and not arguments.run):
        print("it needs a CUDA GPU and ncu, which comes with CUDA.", file=sys.stderr)
        return 2
    if arguments.run:
        run(arguments.batch)
        return 0
    command = (
        tool, "--csv", "--page", "raw", "--clock-control", "none", "--profile-from-start", "off",
        "--kernel-name",
        "regex:na2d_small|reduce_partials", "--metrics", ",".join(METRICS), sys.executable, "-m",
        "benchmarks.counters", "--run", "--batch", str(arguments.batch),
    )  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    made = record.new("counters", torch.device("cuda"))
    made |= {"batch": arguments.batch, "launches": list(parse(done.stdout))}
    record.write(arguments.out or record.path_of(made, record.RESULTS), made)
    for launch in made["launches"]:
        print(launch)
    if not made["launches"]:
        print(done.stdout[-2000:], done.stderr[-2000:], file=sys.stderr)
    return 0 if made["launches"] else 1


def run(batch: int) -> None:
    """Each layer once forward and backward under the profiler, after a first time without it."""
    import natcupy

    device = torch.device("cuda")
    cases = [case.at(batch) for case in OP_CASES if any(name in case.name for name in LAYERS)]
    for profiled in (False, True):
        for case in cases:
            tensors = case.tensors(torch.bfloat16, device)
            tensors = {n: None if x is None else x.requires_grad_() for n, x in tensors.items()}
            if profiled:
                torch.cuda.synchronize()
                torch.cuda.profiler.start()
            out = natcupy.na2d(
                tensors["query"], tensors["key"], tensors["value"], case.kernel_size,
                dilation=case.dilation, rpb=tensors["rpb"],
            )  # fmt: skip
            out.backward(torch.ones_like(out))
            torch.cuda.synchronize()
            if profiled:
                torch.cuda.profiler.stop()


def parse(text: str) -> Iterator[dict[str, Any]]:
    """Launches in the tool's table: a line of names, one of units, one for each launch."""
    lines = text.splitlines()
    begin = next((n for n, line in enumerate(lines) if line.startswith('"ID"')), None)
    if begin is None:
        return
    rows = list(csv.reader(io.StringIO("\n".join(lines[begin:]))))
    for row in rows[2:]:
        if len(row) != len(rows[0]):
            continue
        told = dict(zip(rows[0], row, strict=True))
        units = dict(zip(rows[0], rows[1], strict=True))
        yield {
            "kernel": told.get("Kernel Name", ""),
            **{
                _short(name): f"{value} {units[name]}".strip()
                for name, value in told.items()
                if _asked(name) and value
            },
        }


_WAITS, _RATIO = "smsp__average_warps_issue_stalled_", "_per_issue_active.ratio"


def _asked(name: str) -> bool:
    """Whether a column is one of METRICS: the tool adds hundreds of the machine's and others."""
    return name in METRICS or (name.startswith(_WAITS) and name.endswith(_RATIO))


def _short(name: str) -> str:
    return name.replace(_WAITS, "waits for ").replace(_RATIO, "")


if __name__ == "__main__":
    sys.exit(main())
