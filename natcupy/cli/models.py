"""`natcupy models`: every model by name, with the published numbers and where its weights are.

In: a wildcard pattern. Out: a table or JSON. Nothing is built or fetched.
"""

from __future__ import annotations

import argparse
import difflib
import fnmatch
from collections.abc import Iterator, Sequence
from typing import Any

from natcupy.cli import console, dense_info
from natcupy.hub import WEIGHTS, Row, embedded_names
from natcupy.zoo import MODELS, PUBLISHED, TASKS
from natcupy.zoo.dense import DENSE_MODELS, dense_name


def run(arguments: argparse.Namespace) -> int:
    """List the models that match."""
    names = matching(arguments.pattern)
    if arguments.json:
        console.print_json([record(name) for name in names])
        return 0
    print("\n\n".join(console.table(*table) for table in tables(names)))
    return 0


def tables(names: Sequence[str]) -> Iterator[tuple[tuple[str, ...], list[tuple[object, ...]]]]:
    """Headings and rows of every task that has models among these; the README shows the first."""
    records = [record(name) for name in names]
    for task in TASKS:
        rows = [_row(line) for line in records if line["task"] == task]
        scores = dense_info.SCORES.get(task, ("top-1",))
        if rows:
            yield ("name", "params", "MACs", "pixels", *scores, "weights", "licence"), rows


def _row(line: dict[str, Any]) -> tuple[object, ...]:
    size = line["image_size"]
    values = line["scores"].values() if "scores" in line else (line["top1"],)
    return (
        line["name"],
        f"{line['parameters_millions']} M" if line["parameters_millions"] else "-",
        f"{line['gmacs']} G" if line["gmacs"] else "-",
        " x ".join(map(str, size)) if isinstance(size, list) else size or "-",
        *(f"{value} %" if value else "-" for value in values),
        line["weights"],
        line["licence"] or "-",
    )


def matching(pattern: str) -> list[str]:
    """Names that match, as the zoo orders them. Raises ValueError with the nearest if none does."""
    wanted = pattern.replace("_", "-").lower()
    known = [
        *embedded_names(),
        *(name.replace("_", "-") for name in (*MODELS, *DENSE_MODELS)),
    ]
    names = [name for name in known if fnmatch.fnmatchcase(name, wanted)]
    if names:
        return names
    near = difflib.get_close_matches(wanted, known, n=3) or known[:3]
    raise ValueError(
        f"PATTERN must match a model, got {pattern!r}; near: {', '.join(near)}. "
        f'Wildcards: "dinat*".'
    )


def record(name: str) -> dict[str, Any]:
    """What is known of a model without building it."""
    dense = dense_name(name)
    if dense is not None:
        return dense_info.record(dense)
    if name in embedded_names():
        return {
            "name": name,
            "task": "classification",
            "parameters_millions": None,
            "gmacs": None,
            "image_size": None,
            "top1": None,
            "weights": "in the package",
            "licence": "mit",
        }
    printed = PUBLISHED[name.replace("-", "_")]
    row = weights_row(name)
    return {
        "name": name,
        "task": "classification",
        "parameters_millions": printed.params,
        "gmacs": printed.gmacs,
        "image_size": printed.img_size,
        "top1": printed.top1,
        "weights": source(row),
        "licence": row.license if row else None,
    }


def weights_row(name: str) -> Row | None:
    """The released weights of an architecture, if any."""
    arch = name.replace("-", "_")
    return next((row for row in WEIGHTS.values() if row.arch == arch), None)


def source(row: Row | None) -> str:
    """Where weights come from, in words."""
    if row is None:
        return "none released"
    return f"Hub: {row.repo}" if row.repo else "authors' .pth file"
