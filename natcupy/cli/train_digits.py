"""`natcupy train-digits`: make the bundled model anew, from pictures to card.

In: a folder and, if wanted, other numbers than the shipped recipe's. Out: the folder, filled; the
held-out accuracies on stdout.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from tqdm import tqdm

from natcupy.cli import console
from natcupy.digits.datasets import require_sources
from natcupy.digits.training import Recipe, make


def run(arguments: argparse.Namespace) -> int:
    """Draw, train, examine, write."""
    begun = time.perf_counter()
    given = {name: getattr(arguments, name) for name in ("pictures", "epochs", "seed")}
    recipe = Recipe(**{name: value for name, value in given.items() if value is not None})
    require_sources()
    folder = Path(arguments.output)
    folder.mkdir(parents=True, exist_ok=True)  # an output that cannot be is told before the work
    print(f"Drawing {recipe.pictures:,} pictures ...", flush=True)
    bar: tqdm | None = None

    def report(step: int, steps: int, loss: float) -> None:
        nonlocal bar
        if bar is None:
            bar = tqdm(total=steps, unit="step", disable=None)
        bar.update()
        if step % 20 == 0 or step == steps:
            bar.set_postfix(loss=f"{loss:.3f}")

    scores = make(recipe, folder, report)
    if bar is not None:
        bar.close()
    rows = [(name, f"{100 * score:.1f} %") for name, score in scores.items()]
    print(console.table(("held-out set", "accuracy"), rows))
    print(f"\nWritten to {folder} in {time.perf_counter() - begun:.0f} s.")
    return 0
