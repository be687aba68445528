"""`natcupy demo`: the bundled model on the bundled pictures, offline, shown step by step.

Exit status 0 if it ran and every answer was right.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch.nn.functional as F

from natcupy.cli import console, runtime
from natcupy.cli.classify import percent, report_errors
from natcupy.cli.parser import DEFAULT_MODEL
from natcupy.cli.runtime import Outcome
from natcupy.zoo import ImageModel

SAMPLES = Path(__file__).parent / "samples"
PER_ROW = 6
SHOWN = 12  # pixels a side of the small pictures


def run(arguments: argparse.Namespace) -> int:
    """Load, look, answer, compare."""
    begun = time.perf_counter()
    device = runtime.pick_device(arguments.device)
    model = runtime.load_classifier(DEFAULT_MODEL, device)
    loaded = time.perf_counter()
    files = sorted(SAMPLES.glob("*.png"))
    outcomes = list(runtime.classify(model, files, topk=2, batch_size=1))
    taken = time.perf_counter() - loaded
    right = sum(is_right(outcome) for outcome in outcomes)
    if arguments.json:
        console.print_json(_as_json(outcomes, str(device), taken))
    else:
        print(f"1. Loaded {runtime.describe(model, DEFAULT_MODEL, device)}")
        print(f"   in {loaded - begun:.2f} s, from the package itself: no network was used.\n")
        print(f"2. Prepared {len(files)} bundled pictures. This is what the model sees:\n")
        print(_gallery(model, files))
        print("\n3. Asked the model:\n")
        print(_table(outcomes))
        print(f"\n{right} of {len(outcomes)} right, in {taken:.2f} s.")
        print("Next: natcupy classify YOUR.png   natcupy attend YOUR.png   natcupy doctor")
    return report_errors(outcomes) or int(right < len(outcomes))


def truth(file: str) -> str:
    """What a bundled picture shows: the first letter of its name."""
    return Path(file).name[0]


def is_right(outcome: Outcome) -> bool:
    """Whether the first answer is the truth."""
    return bool(outcome.answers) and outcome.answers[0].label == truth(outcome.file)


def _table(outcomes: list[Outcome]) -> str:
    rows = []
    for outcome in outcomes:
        best = outcome.answers[0] if outcome.answers else None
        rows.append(
            (
                Path(outcome.file).name,
                truth(outcome.file),
                best.label if best else "-",
                percent(best.probability) if best else "-",
                f"{outcome.seconds * 1e3:.1f} ms",
                "right" if is_right(outcome) else "WRONG",
            )
        )
    return console.table(("file", "shows", "answer", "confidence", "time", ""), rows)


def _gallery(model: ImageModel, files: list[Path]) -> str:
    """The prepared pictures, coarsely, with what they show below."""
    rows = []
    for start in range(0, len(files), PER_ROW):
        rows.append(console.beside([_thumbnail(model, file) for file in files[start:][:PER_ROW]]))
    return "\n\n".join(rows)


def _thumbnail(model: ImageModel, file: Path) -> list[str]:
    picture = model.preprocess(file).mean(1, keepdim=True).float().cpu()
    picture = (picture - picture.min()) / (picture.max() - picture.min())
    # A maximum keeps strokes whole that a mean would thin out.
    small = F.adaptive_max_pool2d(picture, SHOWN)[0, 0].numpy()
    return console.blocks(small)


def _as_json(outcomes: list[Outcome], device: str, seconds: float) -> dict[str, object]:
    return {
        "model": DEFAULT_MODEL,
        "device": device,
        "seconds": seconds,
        "right": sum(map(is_right, outcomes)),
        "results": [
            {
                "file": Path(outcome.file).name,
                "shows": truth(outcome.file),
                "answer": outcome.answers[0].label if outcome.answers else None,
                "confidence": outcome.answers[0].probability if outcome.answers else None,
                "seconds": outcome.seconds,
            }
            for outcome in outcomes
        ],
    }
