"""`natcupy classify`: pictures in, answers out, as a table or JSON.

Exit status 1 if any file or folder could not be read; the others are answered all the same.
"""

from __future__ import annotations

import argparse
import sys

from tqdm import tqdm

from natcupy.cli import console, pictures, runtime
from natcupy.cli.parser import DEFAULT_MODEL
from natcupy.cli.runtime import Outcome


def run(arguments: argparse.Namespace) -> int:
    """Classify the files and folders named."""
    files, status = pictures.named(arguments.images)
    device = runtime.pick_device(arguments.device)
    model = runtime.load_classifier(arguments.model, device)
    stream = runtime.classify(model, files, arguments.topk, arguments.batch_size)
    # No bar for a single picture, nor where stderr is not a terminal (disable=None).
    quiet = True if len(files) == 1 else None
    outcomes = list(tqdm(stream, total=len(files), unit="picture", leave=False, disable=quiet))
    if arguments.json:
        console.print_json(_as_json(arguments.model, str(device), outcomes))
    else:
        _print_table(outcomes, runtime.describe(model, arguments.model, device), arguments.model)
    return max(status, report_errors(outcomes))


def report_errors(outcomes: list[Outcome]) -> int:
    """Name the files that could not be read on stderr; the exit status."""
    bad = [outcome for outcome in outcomes if outcome.error]
    for outcome in bad:
        print(f"natcupy: error: {outcome.file}: {outcome.error}", file=sys.stderr)
    return 1 if bad else 0


def _print_table(outcomes: list[Outcome], running: str, model: str) -> None:
    answered = [outcome for outcome in outcomes if outcome.answers]
    if not answered:
        return
    rows = [
        (
            outcome.file,
            outcome.answers[0].label,
            percent(outcome.answers[0].probability),
            ", ".join(f"{a.label} {percent(a.probability)}" for a in outcome.answers[1:]),
        )
        for outcome in answered
    ]
    headings = ("file", "answer", "confidence", "next")
    if not any(row[3] for row in rows):
        headings, rows = headings[:3], [row[:3] for row in rows]
    print(console.table(headings, rows))
    print()
    print(running)
    if model == DEFAULT_MODEL:
        print(
            f"{DEFAULT_MODEL} is the default and knows drawn digits only; for photographs: "
            "--model nat-tiny (fetched from the Hub once)"
        )


def _as_json(model: str, device: str, outcomes: list[Outcome]) -> dict[str, object]:
    return {
        "model": model,
        "device": device,
        "results": [
            {"file": outcome.file, "error": outcome.error}
            if outcome.error
            else {
                "file": outcome.file,
                "seconds": outcome.seconds,
                "answers": [vars(answer) for answer in outcome.answers],
            }
            for outcome in outcomes
        ],
    }


def percent(share: float) -> str:
    """A probability as text, without the pretence of certainty."""
    return ">99.9 %" if share >= 0.9995 else f"{100 * share:.1f} %"
