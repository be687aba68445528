"""`python -m benchmarks.gpu`: everything that a GPU is needed for, in calls under ten minutes.

In: a checkout with torch, CuPy, numpy and pytest on a machine with one NVIDIA GPU; nothing is
installed or downloaded. Out, in `--out` (by default benchmarks/results): `gpu-DEVICE-DATE.json`,
the record that `benchmarks.freshness` reads, its summary in Markdown, and a log.

Stages are processes of their own, in order of value; when `--seconds` are spent the rest is dropped
and named. Nothing that fails ends the run: it is in the record. The tests are one call. `--speeds`
is another: the tables of `benchmarks.op` and `benchmarks.model` beside every peer, what the warps
wait for (`benchmarks.counters`) and every tile's time (`benchmarks.tiles`), each a record of its
own. `--sanitizer` is a third, compute-sanitizer over the tables of kernel cases; `--interpreter`
tries the script's own logic with a tiny part of everything on the tests' simulated GPU, and its
record is no record of a GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import record, report, sanitizer
from benchmarks.stages import Stage, run_stages

ROOT = Path(__file__).parent.parent
SECONDS = 540.0  # of the whole run
PYTEST = (
    sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider",
    "-p", "recording", "--continue-on-collection-errors",
)  # fmt: skip
WORKERS = 8  # processes of a stage of tests, where pytest-xdist is installed
NUMBERS, TORCH, FAULTS = (
    f"tests/gpu/test_gpu_{name}.py" for name in ("numbers", "torch", "faults")
)
OTHERS = ("tests/gpu/test_rigs.py", "tests/gpu/test_selftest.py", "tests/test_graphs.py")
SLOW = "random or layers_of_the_zoo or large_logits"  # tests of many kernels
LARGE = "more_than or past_32 or many_images"  # tests that need the card for themselves


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 1 where a test or a sanitizer failed, 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, default=record.RESULTS, help="folder of the results")
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, help="budget (default %(default)s)"
    )
    parser.add_argument("--only", help="only stages whose name holds this")
    parser.add_argument(
        "--append", action="store_true", help="add to the day's record of the same kernels"
    )
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--speeds", action="store_true", help="benchmarks instead of tests")
    mode.add_argument("--sanitizer", action="store_true", help="compute-sanitizer, own mode")
    mode.add_argument("--interpreter", action="store_true", help="try the script without a GPU")
    arguments = parser.parse_args(argv)
    if not arguments.interpreter and not torch.cuda.is_available():
        say("torch finds no CUDA GPU here; --interpreter tries the script without one.")
        return 2
    tool = sanitizer.find()
    if arguments.sanitizer and tool is None:
        say("compute-sanitizer is neither on PATH nor in /usr/local/cuda/bin; it comes with CUDA.")
        return 2
    begun = time.monotonic()
    device = torch.device("cpu" if arguments.interpreter else "cuda")
    made = new_record(arguments, device)
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = record.path_of(made, arguments.out).resolve()
    before = _json(path) if arguments.append else {}
    if before and any(before[what] != made[what] for what in ("kernels", "plans")):
        say(f"{path.name} is of other kernels or plans: --append adds to a record of the same.")
        return 2
    with tempfile.TemporaryDirectory(prefix="natcupy-gpu-") as scratch:
        work = Path(scratch)
        if arguments.sanitizer:
            stages = [sanitizer.stage(tool, work, arguments.seconds - 20)]
        elif arguments.speeds:
            stages = speed_stages(path)
        else:
            stages = plan_stages(device, made, work, path)
        stages = [s for s in stages if arguments.only is None or arguments.only in s.name]
        log = path.with_suffix(".log")
        if not before:
            log.unlink(missing_ok=True)
        made["stages"] = run_stages(stages, arguments.seconds, ROOT, log, say)
        if not arguments.speeds:
            gather(made, work, arguments.sanitizer)
    made["seconds"] = round(time.monotonic() - begun, 1)
    if before:
        made = appended(before, made)
    record.write(path, made)
    text = summary(made)
    record.write_text(path.with_suffix(".md"), text)
    print(text)
    return 1 if problems(made) else 0


def say(text: str) -> None:
    """Progress, apart from the summary."""
    print(text, file=sys.stderr, flush=True)


def new_record(arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """A record without results; a dry run's is of a kind of its own."""
    modes = {"sanitizer": arguments.sanitizer, "dry": arguments.interpreter}
    modes |= {"speeds": arguments.speeds, "gpu": True}
    kind = next(name for name, chosen in modes.items() if chosen)
    return record.new(kind, device) | {"plans": record.plans_hash()}


# ------------------------------------------------------------------------------------------------
# stages


def plan_stages(device: torch.device, made: dict[str, Any], work: Path, path: Path) -> list[Stage]:
    """The stages for a GPU, or in small for a dry run, most valuable first."""
    if device.type == "cpu":
        return dry_stages(made, work, path)
    python = (sys.executable, "-m")
    questions = (*python, "benchmarks.questions", "--json", str(work / "questions.json"))
    tables = [str(p.relative_to(ROOT)) for p in sorted((ROOT / "tests").glob("test_small*.py"))]
    tables = ["tests/test_kernels.py", "tests/test_mma.py", "tests/test_jit_launch.py", *tables]
    return [
        Stage("questions", (questions,), 60),
        tests("kernel tables", work, tables, 110),
        tests("numbers", work, [NUMBERS], 120, select=f"not ({SLOW} or {LARGE})"),
        tests("torch", work, [TORCH, *OTHERS], 150),
        tests("large tensors", work, [NUMBERS], 60, select=LARGE, workers=0),
        tests("faults", work, [FAULTS], 120, workers=0),
        tests("zoo layers", work, [NUMBERS], 150, select=f"({SLOW}) and not random"),
        tests("random calls", work, [NUMBERS], 120, select="random", seconds=20),
    ]


def speed_stages(path: Path) -> list[Stage]:
    """Benchmarks, each of which writes a record of its own beside `path`; most valuable first."""
    name = path.stem.removeprefix("speeds-")

    def stage(what: str, most: float, module: str, *arguments: str, kind: str = "") -> Stage:
        out = path.with_name(f"{kind or module}-{name}.json")
        command = (sys.executable, "-m", f"benchmarks.{module}", *arguments, "--out", str(out))
        return Stage(what, (command,), most, 20)

    table = ("--device", "cuda", "--no-plot")
    others = ("--way", "natcupy cuda,SDPA,windows,NATTEN")
    few = ("--way", "natcupy cuda")
    return [
        stage("operation", 110, "op", *table, "--batch", "128", "--seconds", "0.06", *others),
        stage("counters", 60, "counters"),
        stage("models", 60, "model", *table, "--batch", "256", "--seconds", "0.3", *few),
        stage("tiles", 120, "tiles", "--seconds", "100"),
        stage(
            "FlexAttention", 100, "op", *table, "--batch", "128", "--seconds", "0.06",
            "--case", "NAT-Tiny level", "--way", "FlexAttention,natcupy cuda", kind="flex",
        ),
        stage(
            "compiled models", 240, "model", *table, "--batch", "256", "--seconds", "0.3",
            "--case", "nat_tiny at", "--compiled", *few, kind="compiled",
        ),
    ]  # fmt: skip


def dry_stages(made: dict[str, Any], work: Path, path: Path) -> list[Stage]:
    """The same kinds of stages, a tiny part of each."""
    python = (sys.executable, "-m")
    answers = ("--interpreter", "--json", str(work / "questions.json"))
    op = path.with_name(f"op-{path.stem}.json")
    return [
        Stage("questions", ((*python, "benchmarks.questions", *answers),), 400),
        tests(
            "numbers", work, [NUMBERS], 400, select="simulated and long_axes", workers=0, mark=""
        ),
        Stage(
            "speed of the operation",
            ((*python, "benchmarks.op", "--device", "cpu", "--case", "level 4", "--batch", "1",
              "--way", "natcupy torch", "--forward-only", "--seconds", "0.01", "--no-plot",
              "--out", str(op)),), 400,
        ),
    ]  # fmt: skip


def tests(
    name: str,
    work: Path,
    files: Sequence[str],
    most: float,
    *,
    select: str = "",
    workers: int = WORKERS,
    seconds: float = 20,
    mark: str = "gpu",
) -> Stage:
    """Tests marked `gpu`, in several processes where pytest-xdist is there."""
    spread: tuple[str, ...] = ()
    if workers and importlib.util.find_spec("xdist") is not None:
        count = min(workers, len(os.sched_getaffinity(0)))
        spread = ("-n", str(count), "--dist", "worksteal")
    lines = str(work / f"{name.replace(' ', '-')}.jsonl")
    chosen = (*(("-m", mark) if mark else ()), *(("-k", select) if select else ()))
    command = (*PYTEST, "--gpu-record", lines, *spread, *chosen, *files)
    path = os.pathsep.join(filter(None, (str(ROOT / "tests/gpu"), os.environ.get("PYTHONPATH"))))
    environment = {"PYTHONPATH": path, "NATCUPY_GPU_SECONDS": str(seconds)}
    return Stage(name, (command,), most, 15, environment)


# ------------------------------------------------------------------------------------------------
# what came of it


def gather(made: dict[str, Any], work: Path, sanitized: bool) -> None:
    """Put what the stages left in `work` into the record."""
    if sanitized:
        made["sanitizers"] = {
            checker: sanitizer.findings(_text(sanitizer.log_of(work, checker)))
            for checker in sanitizer.TOOLS
        }
        return
    made["tests"] = [
        json.loads(line)
        for path in sorted(work.glob("*.jsonl"))
        for line in _text(path).splitlines()
        if line.endswith("}")  # a line cut short was never finished
    ]
    made["results"] = by_kernel(made["tests"], made["kernels"])
    text = _text(work / "questions.json")
    made["questions"] = (
        json.loads(text) if text else {"failed": "there are no answers, see the log"}
    )


def appended(before: dict[str, Any], made: dict[str, Any]) -> dict[str, Any]:
    """The record with the stages and tests of another run; what both ran is the later one's."""
    stages = {s["stage"]: s for s in before["stages"]}
    stages |= {
        s["stage"]: s
        for s in made["stages"]
        if s["outcome"] != "dropped" or s["stage"] not in stages
    }
    joined = before | {"stages": list(stages.values())}
    joined["seconds"] = round(before["seconds"] + made["seconds"], 1)
    if "tests" in made:
        tests = {t["test"]: t for t in (*before.get("tests", ()), *made["tests"])}
        joined["tests"] = list(tests.values())
        joined["results"] = by_kernel(joined["tests"], before["kernels"])
        if "failed" not in made["questions"] or "questions" not in before:
            joined["questions"] = made["questions"]
    return joined


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""


def _json(path: Path) -> dict[str, Any]:
    return json.loads(_text(path) or "{}")


def by_kernel(tests: Sequence[dict[str, Any]], kernels: dict[str, str]) -> dict[str, Any]:
    """For every kernel how many tests that launched it passed, and which failed."""
    found = {name: {"passed": 0, "failed": []} for name in kernels}
    for test in tests:
        for entry in test["kernels"]:
            mine = found.get(f"{entry}.cu")
            if mine is None:  # a kernel of the tests' own
                continue
            if test["outcome"] == "passed":
                mine["passed"] += 1
            elif test["outcome"] == "failed":
                mine["failed"].append(test["test"])
    return found


def problems(made: dict[str, Any]) -> list[str]:
    """What is wrong, in words; empty for a clean run."""
    found = [
        f"{stage['stage']}: {stage['outcome']}"
        + (f" ({stage['why']})" if "why" in stage else f", status {stage.get('status')}")
        for stage in made["stages"]
        if stage["outcome"] in ("failed", "cut")
    ]
    found += [f"{t['test']} failed" for t in made.get("tests", ()) if t["outcome"] == "failed"]
    for checker, said in made.get("sanitizers", {}).items():
        found += [f"{checker}: {count} reports in {n}" for n, count in said["kernels"].items()]
        if not said["summary"]:
            found.append(f"{checker}: it left no summary")
    return found


def summary(made: dict[str, Any]) -> str:
    """The record for people."""
    lines = [report.where(made), ""]
    rows = [
        (s["stage"], s["outcome"], s["seconds"], s.get("why") or s.get("status"))
        for s in made["stages"]
    ]
    lines += [report.table(("stage", "outcome", "seconds", "status"), rows), ""]
    if "results" in made:
        counts = {o: sum(t["outcome"] == o for t in made["tests"]) for o in _OUTCOMES}
        lines += ["Tests: " + ", ".join(f"{n} {o}" for o, n in counts.items()) + ".", ""]
        rows = [(n, r["passed"], len(r["failed"])) for n, r in made["results"].items()]
        lines += [report.table(("kernel", "tests passed", "failed"), rows), ""]
        skipped = {t["why"]: None for t in made["tests"] if t["outcome"] == "skipped"}
        lines += [f"Skipped: {why}" for why in skipped]
        host = made["questions"].get("host_microseconds", {})
        lines += [f"{name}: {value} us of the host" for name, value in host.items()]
    for checker, said in made.get("sanitizers", {}).items():
        lines.append(f"{checker}: {said['kernels'] or 'nothing in our kernels'}; {said['summary']}")
    wrong = problems(made)
    lines += ["", "Problems:" if wrong else "No problems.", *(f"- {problem}" for problem in wrong)]
    dropped = [s["stage"] for s in made["stages"] if s["outcome"] == "dropped"]
    if dropped:
        lines += ["", f"Not run for want of time: {', '.join(dropped)}."]
    return "\n".join(lines) + "\n"


_OUTCOMES = ("passed", "failed", "skipped")


if __name__ == "__main__":
    sys.exit(main())
