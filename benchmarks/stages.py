"""Commands under a time budget: stages in order of value come in, what became of each goes out.

A stage is a process of its own (one that crashes or hangs takes nothing along), or several at once.
When the budget is spent, stages not begun are dropped and say so; one that runs is ended at its
limit, and what it had written stays.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

GRACE = 5.0  # seconds a process has to end by itself


@dataclass(frozen=True)
class Stage:
    """What to run, side by side, for `most` seconds; not begun with less than `least` left."""

    name: str
    commands: tuple[tuple[str, ...], ...]
    most: float
    least: float = 10.0
    environment: Mapping[str, str] = field(default_factory=dict)


def run_stages(
    stages: Sequence[Stage],
    budget: float,
    folder: Path,
    log: Path,
    say: Callable[[str], None],
    clock: Callable[[], float] = time.monotonic,
) -> list[dict[str, Any]]:
    """Run them in order, in `folder`, output to `log`; one record for each.

    `outcome` is "ran", "failed", "cut" at a limit, or "dropped" for want of time; `status` the exit
    statuses, -n for signal n.
    """
    end, found = clock() + budget, []
    for stage in stages:
        left = end - clock()
        made: dict[str, Any] = {"stage": stage.name, "outcome": "dropped", "seconds": 0.0}
        found.append(made)
        if left < stage.least:
            made["why"] = f"{max(left, 0):.0f} s were left, it needs {stage.least:.0f}"
            say(f"{stage.name}: dropped, {made['why']}")
            continue
        say(f"{stage.name}: at most {min(stage.most, left):.0f} s")
        begun = clock()
        try:
            status, cut = _run(stage, folder, log, min(stage.most, left))
        except OSError as error:
            made |= {"outcome": "failed", "why": str(error)}
            continue
        made["seconds"] = round(clock() - begun, 1)
        made["status"] = status
        made["outcome"] = "cut" if cut else "failed" if any(status) else "ran"
        say(f"{stage.name}: {made['outcome']} after {made['seconds']} s")
    return found


def _run(stage: Stage, folder: Path, log: Path, limit: float) -> tuple[list[int], bool]:
    """Exit statuses, and whether the limit ended a process."""
    with log.open("a", encoding="utf-8") as out:
        out.write(f"\n===== {stage.name}\n")
        out.flush()
        environment = os.environ | stage.environment
        running = [
            subprocess.Popen(
                command, cwd=folder, env=environment, stdout=out, stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            for command in stage.commands
        ]  # fmt: skip
        cut, end = False, time.monotonic() + limit
        for process in running:
            try:
                process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                cut = True
                _end(process)
        return [process.returncode for process in running], cut


def _end(process: subprocess.Popen) -> None:
    """Interrupt the process and its children, then kill what is left of them."""
    for number in (signal.SIGINT, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            continue
    process.wait()
