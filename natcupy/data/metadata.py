"""Pictures whose labels stand in a file beside them: `metadata.csv`, `.jsonl` or `.parquet`.

In: a folder laid out for Hugging Face's `imagefolder`: the file has a column `file_name`, paths
from the file's folder, and a column of labels. Out: a `FolderSource`.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from natcupy.data import hf
from natcupy.data.files import Names, identity, list_pictures, shown, subfolders
from natcupy.data.folders import FolderSource
from natcupy.data.source import LABEL_COLUMNS, DataError, indexed

METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
_FILE = "file_name"


def table_in(folder: Path) -> Path | None:
    """The file in a folder that lists its pictures, None without one.

    Beside folders, which may be the classes, it counts only if it gives labels.
    """
    for path in (folder / name for name in METADATA):
        if path.is_file() and (not subfolders(folder) or _gives_labels(path)):
            return path
    return None


def _gives_labels(table: Path) -> bool:
    try:
        columns = next(_rows(table)).keys()
    except (DataError, ImportError):  # then it was meant for something else
        return False
    return _FILE in columns and _label_column(columns) is not None


def listed(table: Path, part: str = "") -> FolderSource:
    """The pictures that such a file lists.

    Args:
        table: the file.
        part: a folder beside it: only the pictures below that.

    Raises DataError for a file that cannot be used or lists pictures that are not there.
    """
    rows = list(_rows(table))
    column = _label_column(rows[0].keys())
    if column is None or _FILE not in rows[0]:
        raise DataError(
            f"{shown(table)} must have a column {_FILE} and one of labels (called "
            f"{', '.join(LABEL_COLUMNS)}), got {', '.join(map(str, rows[0]))}. Rename its columns, "
            "or remove it and sort the pictures into a folder per class."
        )
    if part:
        rows = [row for row in rows if str(row.get(_FILE)).startswith(f"{part}/")]
    names = [str(row.get(_FILE) or "") for row in rows]
    _refuse_missing(table, names)
    values = _numbers([row.get(column) for row in rows])
    labels, classes = indexed(f"{shown(table)}, column {column!r}", values)
    return FolderSource(os.fspath(table.parent), Names(names), labels, classes)


def left_out(table: Path) -> int:
    """How many pictures in its folder and below such a file does not list.

    0 for a file that cannot be used; `listed` says why.
    """
    try:
        names = {str(row[_FILE]) for row in _rows(table)}
        there = set(list_pictures(table.parent, []))
        # Links, case, accents and "./" let a file be spelled in other ways than its folder does.
        others = there - names
        listed_as = {identity(table.parent / name) for name in names - there} if others else ()
        return sum(identity(table.parent / name) not in listed_as for name in others)
    except (DataError, ImportError, KeyError, OSError):
        return 0


def _label_column(columns: Any) -> str | None:
    return next((name for name in LABEL_COLUMNS if name in columns), None)


def _refuse_missing(table: Path, names: list[str]) -> None:
    if not names:
        raise DataError(f"{shown(table)} must list pictures, got none for this part of the data.")
    gone = [name for name in names if not os.path.isfile(table.parent / name)]
    if gone:
        raise DataError(
            f"{shown(table)} must list pictures that are there, got {len(gone):,} of "
            f"{len(names):,} that are not: {', '.join(map(repr, gone[:5]))}. Its {_FILE} is a path "
            "from the folder it lies in."
        )


def _numbers(values: list[Any]) -> list[Any]:
    """Values as numbers if all are written as such: in a CSV file everything is text."""
    plain = all(isinstance(v, str) and v.isdecimal() and str(int(v)) == v for v in values)
    return [int(v) for v in values] if plain else [None if v == "" else v for v in values]


def _rows(table: Path) -> Iterator[dict[str, Any]]:
    """The file's rows, at least one."""
    read = {".csv": _csv, ".jsonl": _jsonl, ".parquet": hf.parquet_rows}[table.suffix]
    count = 0
    try:
        for row in read(table):
            count += 1
            yield row
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(
            f"{shown(table)} cannot be read: {error}. Save it anew, text as UTF-8."
        ) from None
    if not count:
        raise DataError(f"{shown(table)} must list pictures, got no rows.")


def _csv(table: Path) -> Iterator[dict[str, Any]]:
    with open(table, encoding="utf-8-sig", newline="") as file:
        yield from csv.DictReader(file)


def _jsonl(table: Path) -> Iterator[dict[str, Any]]:
    with open(table, encoding="utf-8-sig") as file:
        for row in (json.loads(line) for line in file if line.strip()):
            if not isinstance(row, dict):
                raise ValueError(f"every line must be an object, got {row!r:.40}")
            yield row
