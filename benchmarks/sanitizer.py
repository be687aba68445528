"""compute-sanitizer over the tests' tables of kernel cases: commands go out, logs come in.

`find()` says where the tool is; `stage(...)` runs its four checkers side by side; `findings(log)`
counts what a log reports, for each of our kernels and for all others together.
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path
from typing import Any

from benchmarks.record import kernel_hashes
from benchmarks.stages import Stage

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
EXIT = 86  # status of a run with findings
_SCRIPT = "tests/gpu/sanitized.py"
_BLOCK = re.compile(r"^=========\s*$")
_NOISE = re.compile(
    r"=========\s+(COMPUTE-SANITIZER|ERROR SUMMARY|RACECHECK SUMMARY|LEAK SUMMARY|$)"
)


def find(tool: str = "compute-sanitizer") -> str | None:
    """The path of a tool: on PATH, or where the toolkit puts it."""
    places = (shutil.which(tool), f"/usr/local/cuda/bin/{tool}")
    return next((place for place in places if place and Path(place).exists()), None)


def stage(tool: str, logs: Path, seconds: float, part: int = 0, of: int = 1) -> Stage:
    """The checkers at once, each over every `of`-th case, in processes of their own.

    Torch's caching allocator is off, since an overrun inside a cached block is invisible.
    """
    commands = tuple(
        (
            tool, "--tool", checker, "--error-exitcode", str(EXIT), "--print-limit", "200",
            "--log-file", str(log_of(logs, checker)),
            sys.executable, _SCRIPT, "gpu", str(part), str(of),
        )
        for checker in TOOLS
    )  # fmt: skip
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONUNBUFFERED": "1"}
    return Stage("sanitizers", commands, seconds, 60.0, environment)


def log_of(logs: Path, checker: str) -> Path:
    """Where a checker writes what it finds."""
    return logs / f"{checker}.log"


def findings(text: str) -> dict[str, Any]:
    """`kernels`: reports for each of our kernels; `others`: reports without one; `summary`: lines.

    A report is a block of lines; which kernel it is about is found by name, since the form of the
    line that says so differs between versions of the tool.
    """
    names = [name.removesuffix(".cu") for name in kernel_hashes()]
    named = re.compile(rf"\bat\b.*?\b({'|'.join(sorted(names, key=len, reverse=True))})\b")
    ours: dict[str, int] = {}
    others, first, blocks = 0, {}, [[]]
    for line in text.splitlines():
        if _BLOCK.match(line):
            blocks.append([])
        elif line.startswith("=========") and not _NOISE.match(line):
            blocks[-1].append(line)
    for block in filter(None, blocks):
        match = next(filter(None, map(named.search, block)), None)
        if match is None:
            others += 1
            continue
        ours[match[1]] = ours.get(match[1], 0) + 1
        first.setdefault(match[1], "\n".join(block[:6]))
    summary = [line.strip("= ") for line in text.splitlines() if "SUMMARY" in line]
    return {"kernels": ours, "others": others, "first": first, "summary": summary}
