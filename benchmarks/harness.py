"""One measurement loop for operations and models: what to run comes in, rows of numbers go out.

A failure of one way (out of memory, not supported) is a row that says why, never the end.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import record, report, timing
from benchmarks.roofline import Roofline, measure_roofline
from benchmarks.timing import Timing, measure, measure_together

DTYPES = {name: getattr(torch, name) for name in ("float16", "bfloat16", "float32", "float64")}
GPU_CLOCKS = {  # what is measured on a GPU, by the kind of record
    "op": "the GPU's time, all work of a call queued before it begins",
    "model": "the GPU's time, its waiting for the host included",
}
Say = Callable[[str], None]


def row(
    case: str,
    way: str,
    exact: bool,
    step: str,
    dtype: torch.dtype,
    *,
    run: Callable[[], object] | None = None,
    why_not: str | None = None,
    device: torch.device,
    roofline: Roofline,
    flops: int,
    moved: int | None,
    seconds: float,
    error: float | None = None,
    timed: tuple[Timing, float] | Exception | None = None,
    alone: bool = False,
) -> dict[str, Any]:
    """One row: times and rates of `run`, or `why_not` it did not; `timed` if that is done.

    `alone`: see `measure`.
    """
    made: dict[str, Any] = {
        "case": case,
        "way": way,
        "exact": exact,
        "pass": step,
        "dtype": str(dtype).removeprefix("torch."),
        "why_not": why_not,
        "error": error,
        **dict.fromkeys(
            ("ms", "ratio", "host_ms", "gb_s", "tflop_s", "share", "peak_bytes", "timing")
        ),
    }
    if run is None or why_not is not None:
        return made
    try:
        timed = timed or (measure(run, device, seconds, alone=alone), None)
    except Exception as failure:  # other libraries raise whatever they like
        timed = failure
    if isinstance(timed, Exception):
        return made | {"why_not": reason(timed)}
    timing, ratio = timed
    ms = timing.median
    return made | {
        "ms": ms,
        "ratio": ratio,
        "host_ms": timing.host,
        "gb_s": None if moved is None else moved / ms / 1e6,
        "tflop_s": flops / ms / 1e9,
        "share": None if moved is None else roofline.floor(flops, moved) / ms,
        "peak_bytes": timing.peak_bytes,
        "timing": timing.as_dict(),
    }


def together(
    asked: list[dict[str, Any]], device: torch.device, seconds: float, alone: bool = False
) -> list[dict]:
    """A row for each set of arguments of `row`; on a CPU their runs are timed side by side."""
    able = [one for one in asked if one.get("run") is not None and one.get("why_not") is None]
    if device.type == "cpu":
        found = measure_together([one["run"] for one in able], seconds)
        for one, timed in zip(able, found, strict=True):
            one["timed"] = timed
    made = [row(**one, device=device, seconds=seconds, alone=alone) for one in asked]
    own = next((r["ms"] for r in made if r["way"] == f"natcupy {device.type}"), None)
    for one in made:
        if device.type != "cpu" and own is not None and one["ms"] is not None:
            one["ratio"] = one["ms"] / own
    return made


def finite(error: float) -> tuple[float | None, str | None]:
    """An error for the record, or why its way is not timed: a record holds finite numbers only."""
    return (error, None) if math.isfinite(error) else (None, "its results are not finite")


def reason(failure: BaseException) -> str:
    """The first line of an error, and its kind."""
    text = (str(failure).strip().splitlines() or [""])[0][:200].rstrip(". ")
    return f"{type(failure).__name__}: {text}" if text else type(failure).__name__


def parser(what: str, told: str) -> argparse.ArgumentParser:
    """The arguments that both commands share."""
    made = argparse.ArgumentParser(prog=f"python -m benchmarks.{what}", description=told)
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    made.add_argument("--dtype", choices=DTYPES, help="bfloat16 on a GPU, float32 on a CPU")
    made.add_argument("--batch", type=int, nargs="+", default=[1, 8], metavar="N")
    made.add_argument("--case", help="only cases whose name holds this")
    made.add_argument("--way", help="only these ways to attend, parts of names with commas")
    made.add_argument("--forward-only", action="store_true")
    made.add_argument("--threads", type=int, help="of torch on a CPU (default: as it comes)")
    made.add_argument(
        "--cpu-time",
        action="store_true",
        help="on a CPU, the thread's own time in place of the wall's; needs --threads 1",
    )
    made.add_argument(
        "--full-caches",
        action="store_true",
        help="on a CPU, each call right after one of its own instead of with empty caches",
    )
    made.add_argument("--append", action="store_true", help="add to the record already there")
    made.add_argument("--seconds", type=float, default=0.3, help="for each row (default 0.3)")
    made.add_argument("--out", type=Path, help="the JSON file; by default in benchmarks/results")
    made.add_argument("--no-plot", action="store_true")
    return made


def settings(arguments: argparse.Namespace) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of a run; its GPU is the current one, whose stream is timed.

    Raises ValueError for a GPU that is not there.
    """
    device = torch.device(arguments.device)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.cpu_time:
        if arguments.threads != 1:
            raise ValueError("--cpu-time is the time of one thread; use it with --threads 1.")
        timing.use_cpu_time()
    if arguments.full_caches:
        if device.type != "cpu":
            raise ValueError("--full-caches is for a CPU; a GPU's cache is always flushed.")
        timing.use_full_caches()
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        found = f"torch finds {torch.cuda.device_count()}"
        raise ValueError(f"--device {device} needs a GPU that is there, {found}; use --device cpu.")
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)
    default = torch.bfloat16 if device.type == "cuda" else torch.float32
    return device, DTYPES[arguments.dtype] if arguments.dtype else default


def start(
    kind: str,
    device: torch.device,
    dtype: torch.dtype,
    arguments: argparse.Namespace | None = None,
    **sizes: Any,
) -> dict[str, Any]:
    """A record with its ceilings measured and no rows, or with `--append` the one there is.

    A long run may so be cut into slices of whole cases; every case has all its ways in one slice.
    """
    made = record.new(kind, device)
    if device.type == "cpu":
        made["caches"] = timing.caches()
    path = getattr(arguments, "out", None) or record.path_of(made)
    if getattr(arguments, "append", False) and path.exists():
        there = json.loads(path.read_text(encoding="utf-8"))
        if there.get("caches") != made.get("caches"):
            raise ValueError(
                f"{path} was made with {there.get('caches')} caches, this run has "
                f"{made.get('caches')} ones; leave --append out or choose another --out."
            )
        return there
    made["clock"] = timing.clock()
    if device.type == "cuda":
        made["clock"] = GPU_CLOCKS.get(kind, "the GPU's time")
    made["roofline"] = measure_roofline(device, dtype, **sizes).as_dict()
    made["rows"] = []
    return made


def finish(made: dict[str, Any], arguments: argparse.Namespace) -> Path:
    """Write JSON, Markdown and plot beside each other; print the tables."""
    path = save(made, arguments)
    if not arguments.no_plot:
        report.plot(made, path.with_suffix(".png"))
    print(report.speed(made))
    return path


def save(made: dict[str, Any], arguments: argparse.Namespace) -> Path:
    """JSON and Markdown of what there is so far."""
    path = arguments.out or record.path_of(made)
    # measured again, a row takes the place of the one before
    rows = {(row["case"], row["way"], row["pass"]): row for row in made["rows"]}
    made["rows"] = list(rows.values())
    record.write(path, made)
    record.write_text(path.with_suffix(".md"), report.speed(made))
    return path


def say(text: str) -> None:
    """Progress, apart from the tables."""
    print(text, file=sys.stderr, flush=True)
