"""Pictures of a run: its curves, and which classes were taken for which.

In: rows of the log, a matrix of counts. Out: PNG files, put in place in one step; without
matplotlib, nothing and a word about it.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from natcupy.hub.files import write_folder

log = logging.getLogger("natcupy.train")

MOST_NAMES = 40  # more would not be readable


def curves(history: Sequence[Mapping[str, Any]], scores: Sequence[str], path: Path) -> None:
    """Losses to the left, scores to the right, the rate below, by epoch."""
    figure = _figure((10, 6))
    if figure is None:
        return
    names = list(dict.fromkeys(name for row in history for name in row))
    losses = [name for name in names if "loss" in name]
    others = [name for name in names if name in scores and name not in losses]
    panels = [(losses, "loss"), (others, "score"), (["lr"], "learning rate"),
              (["items_per_s"], "items per second")]  # fmt: skip
    for number, (shown, title) in enumerate(panels, 1):
        axes = figure.add_subplot(2, 2, number)
        for name in shown:
            rows = [row for row in history if row.get(name) is not None]
            epochs = [row["epoch"] for row in rows]
            axes.plot(epochs, [row[name] for row in rows], marker=".", label=name)
        axes.set(xlabel="epoch", title=title)
        axes.grid(alpha=0.3)
        if len(shown) > 1:
            axes.legend()
    _write(figure, path)


def confusion(counts: np.ndarray, classes: Sequence[str], path: Path) -> None:
    """Shares of each class's pictures by answer; few classes with names and counts."""
    named = len(classes) <= MOST_NAMES
    side = 3 + 0.35 * len(classes) if named else 10
    figure = _figure((side + 1.5, side))
    if figure is None:
        return
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    axes = figure.add_subplot()
    image = axes.imshow(shares, vmin=0, vmax=1, cmap="Blues")
    figure.colorbar(image, label="share of the class")
    axes.set(xlabel="answer", ylabel="class")
    if named:
        places = range(len(classes))
        axes.set_xticks(places, classes, rotation=90)
        axes.set_yticks(places, classes)
        for row, column in np.argwhere(counts > 0):
            dark = shares[row, column] > 0.5
            axes.text(
                column, row, int(counts[row, column]), ha="center", va="center", fontsize=7,
                color="white" if dark else "black",
            )  # fmt: skip
    _write(figure, path)


def _figure(size: tuple[float, float]) -> Any:
    """An empty figure that needs no screen; None without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        log.warning("no plots: matplotlib is not installed (pip install 'natcupy[train]').")
        return None
    return Figure(figsize=size, layout="constrained")


def _write(figure: Any, path: Path) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    write_folder(path.parent, {path.name: lambda file: file.write_bytes(buffer.getvalue())})
