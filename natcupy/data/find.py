"""What DATA means: a folder per class, a folder with parts, or a Hugging Face dataset.

In: what the user typed, or a dataset in memory. Out: a `Split` to train on, one part to look at
(`find_split`), or pictures without labels (`find_pictures`).
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from natcupy.data import folders, hf, metadata
from natcupy.data.files import is_picture_name, shown
from natcupy.data.folders import HELD_OUT_NAMES, TRAIN_NAMES, Files, FolderSource
from natcupy.data.source import DataError, PictureSet, Source, refuse_shared, stratified

Data = str | os.PathLike[str] | hf.Tables


@dataclass(frozen=True)
class Split:
    """Pictures to train on and to examine on.

    Attributes:
        train: the training pictures.
        val: the held-out pictures, with the same classes; None if none were wanted.
        classes: the label names.
        name: of the data, for cards and logs.
        notes: what the reader of a log should know: how it was split, what was left out.
    """

    train: Source
    val: Source | None
    classes: tuple[str, ...]
    name: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Part:
    """One part of the data.

    Attributes:
        source: its pictures.
        name: which data and part.
        notes: as in `Split`.
    """

    source: Source
    name: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Data:
    """Data before its pictures are listed: every part, and how to list it."""

    name: str
    parts: dict[str, Callable[[], Source]]
    whole: Callable[[], Source] | None  # data without parts
    notes: tuple[str, ...] = ()
    alone: str = ""  # what a dataset calls its only part, which is the whole


def find(
    data: Data,
    *,
    seed: int = 0,
    val_fraction: float = 0.1,
    val: Source | Data | None = None,
) -> Split:
    """The pictures to train on, and those to examine on.

    Args:
        data: a folder with one folder of pictures per class; a folder with `train` and `val` (or
            `validation`, `test`) that hold such folders; either with a `metadata.csv` (or
            `.jsonl`, `.parquet`) of file names and labels instead of class folders; a folder saved
            by `datasets`; a dataset's name on the Hub (`org/name`, `org/name:config`,
            `...@revision`); or a `datasets.Dataset` or `DatasetDict`.
        seed: of the split, where the data has no held-out part.
        val_fraction: of every class, held out where the data has no held-out part; in 0..0.9.
        val: a part of the data by name, or other data, to hold out instead; or its pictures.

    Raises:
        DataError: no pictures, fewer than two classes, an empty class, a class in val that train
            does not have, pictures in both; with what to do.
        ImportError: a dataset's name without the `datasets` library.
    """
    if not 0 <= val_fraction <= 0.9:
        raise ValueError(f"val_fraction must be in 0..0.9, got {val_fraction}.")
    found = _look(data)
    train_name = next((name for name in TRAIN_NAMES if name in found.parts), None)
    if found.parts and train_name is None:
        raise DataError(
            f"{found.name} must have a part called train, got {', '.join(found.parts)}."
        )
    train = found.parts[train_name]() if train_name else found.whole()
    if len(train.classes) < 2:
        raise DataError(
            f"training needs at least two classes, got {len(train.classes)} in {found.name}"
            f"{': ' + train.classes[0] if train.classes else ''}. Add a folder per class."
        )
    missing = [train.classes[i] for i in np.flatnonzero(train.counts() == 0)]
    if missing:
        raise DataError(
            f"every class must have a picture to train on, got {len(missing)} without any in "
            f"{found.name}: {', '.join(missing[:10])}."
        )
    held_out, notes = _held_out(found, train_name, val)
    if held_out is not None:
        held_out = aligned(held_out, train.classes)
        if val is not None and all(isinstance(s, FolderSource) for s in (train, held_out)):
            refuse_shared(train, held_out)
    elif val_fraction:
        train, held_out = stratified(train, val_fraction, seed)
        notes += (
            f"{len(held_out):,} of {len(train) + len(held_out):,} pictures are held out: "
            f"{100 * val_fraction:g} % of every class, by seed {seed}",
        )
        if not len(held_out):
            raise DataError(
                "a class must have two pictures for one to be held out, got one in every class "
                f"of {found.name}. Add pictures, name other data as val, or set val_fraction to 0 "
                "to hold none out."
            )
    absent = [] if held_out is None else np.flatnonzero(held_out.counts() == 0)
    if len(absent):
        some = ", ".join(train.classes[i] for i in absent[:10])
        notes += (f"no picture is held out of {len(absent)} of the classes: {some}",)
    return Split(train, held_out, train.classes, found.name, (*found.notes, *notes))


def _held_out(
    found: _Data, train_name: str | None, val: Source | Data | None
) -> tuple[Source | None, tuple[str, ...]]:
    if isinstance(val, Source):
        return val, ()
    if isinstance(val, str | os.PathLike) and str(val).lower() in found.parts:
        if str(val).lower() == train_name:
            raise DataError(f"val must be another part than {train_name}, got {val}.")
        return found.parts[str(val).lower()](), ()
    if val is not None:
        part = find_split(val)
        return part.source, part.notes
    name = next((name for name in HELD_OUT_NAMES if name in found.parts), None)
    if name is None:
        return None, ()
    try:
        return found.parts[name](), (f"examined on {name!r}",)
    except DataError as error:
        raise DataError(f"{error} Without {name}, a share of every class is held out.") from None


def find_split(data: Data, split: str | None = None) -> Part:
    """One part of the data, for evaluation.

    Args:
        data: as in `find`.
        split: the part's name; default the first of `val`, `validation`, `valid`, `test`, else all
            of data that is not split.

    Raises DataError where there is no such part.
    """
    found = _look(data)
    names = [found.alone] if found.alone else list(found.parts)
    if found.whole is not None and (split is None or split.lower() == found.alone):
        return Part(found.whole(), found.name, found.notes)
    if split is None:
        split = next((name for name in HELD_OUT_NAMES if name in found.parts), None)
        split = names[0] if split is None and len(names) == 1 else split
    if split is None or split.lower() not in found.parts:
        had = f"the parts {', '.join(names)}" if names else "no parts"
        raise DataError(
            f"a split must be one of the data's parts, got {split or 'none'}; {found.name} has "
            f"{had}."
        )
    name = split.lower()
    return Part(found.parts[name](), f"{found.name}, {name}", found.notes)


def find_pictures(
    data: Data | Iterable[str | os.PathLike[str]], split: str | None = None
) -> PictureSet:
    """Pictures without labels.

    Args:
        data: files and folders (with what is below), or one dataset: saved, on the Hub, or a
            `datasets.Dataset` or `DatasetDict`.
        split: the part of a dataset with several.

    Raises DataError where there are none.
    """
    tables = hf.given(data)
    if tables is not None:
        return _table_pictures(_name(tables), _lowered(tables), split)
    paths = [data] if isinstance(data, str | os.PathLike) else list(data)
    if len(paths) == 1 and _is_dataset(os.fspath(paths[0])):
        return _table_pictures(*_tables(paths[0]), split)
    if split is not None:
        raise DataError(f"a split is of a dataset, got {split} with files or folders.")
    if len(paths) == 1 and not os.path.lexists(paths[0]):
        raise DataError(f"there is no file or folder {shown(paths[0])}. Check the path.")
    files = Files(paths)
    if not len(files) and not files.problems:
        raise DataError("there must be pictures, got none.")
    return files


def _table_pictures(name: str, tables: dict[str, Any], split: str | None) -> PictureSet:
    if split is None and len(tables) == 1:
        split = next(iter(tables))
    if split is None or split.lower() not in tables:
        raise DataError(
            f"a split must be one of the data's parts, got {split or 'none'}; {name} has the "
            f"parts {', '.join(tables)}."
        )
    return hf.hf_pictures(f"{name}, {split.lower()}", tables[split.lower()])


def _is_dataset(text: str) -> bool:
    if os.path.lexists(text):
        return os.path.isdir(text) and hf.is_saved(Path(text))
    return hf.is_name(text) and not is_picture_name(os.path.basename(text))


def aligned(source: Source, classes: tuple[str, ...]) -> Source:
    """The source with its labels as indices into other classes, matched by name.

    Raises DataError for pictures of a class that is not among them.
    """
    if source.classes == classes:
        return source
    place = {name: index for index, name in enumerate(classes)}
    counts = source.counts()
    unknown = [i for i in np.flatnonzero(counts) if source.classes[i] not in place]
    if unknown:
        some = ", ".join(f"{source.classes[i]} ({counts[i]:,})" for i in unknown[:10])
        raise DataError(
            f"every class of the held-out pictures must be among the {len(classes)} classes "
            f"trained on, got {len(unknown)} that are not: {some}. Add training pictures of "
            "them, or remove these."
        )
    table = np.array([place.get(name, -1) for name in source.classes], dtype=np.int64)
    other = copy.copy(source)
    other.classes, other.labels = classes, table[source.labels]
    return other


def _look(data: Data) -> _Data:
    """What the data is."""
    tables = hf.given(data)
    if tables is not None:
        return _dataset(_name(tables), _lowered(tables))
    if not isinstance(data, str | os.PathLike):
        raise TypeError(
            "data must be a folder, a dataset's name, a datasets.Dataset or a DatasetDict, got "
            f"{type(data).__name__}."
        )
    path = Path(data)
    if path.is_dir():
        if hf.is_saved(path):
            return _dataset(*_tables(path))
        return _folder(path)
    if path.exists():
        raise DataError(f"DATA must be a folder or a dataset's name, got the file {shown(path)}.")
    text = os.fspath(data)
    if not hf.is_name(text):
        raise DataError(f"there is no folder {shown(path)}. Check the path.")
    return _dataset(*_tables(text))


def _folder(path: Path) -> _Data:
    name = shown(path.resolve().name)
    try:
        parts = folders.parts(path)
        table = metadata.table_in(path)
        tables = {part: table or metadata.table_in(place) for part, place in parts.items()}
        loose = 0 if table else folders.loose_pictures(path)
    except OSError as error:
        raise DataError(f"{shown(path)} cannot be listed: {error.strerror or error}.") from None
    notes = (f"{loose:,} pictures in {shown(path)} itself were left out",) if loose else ()
    for each in dict.fromkeys(found for found in (table, *tables.values()) if found):
        notes += (f"pictures and labels are those that {shown(each)} lists",)
        if left_out := metadata.left_out(each):
            notes += (f"{left_out:,} pictures that {shown(each)} does not list were left out",)
    if not parts:
        whole = partial(metadata.listed, table) if table else partial(folders.class_folders, path)
        return _Data(name, {}, whole, notes)
    listed = {part: partial(_part, path, place, tables[part]) for part, place in parts.items()}
    return _Data(name, listed, None, notes)


def _part(path: Path, place: Path, table: Path | None) -> Source:
    """A part of a folder, as the table in it or beside it lists it, if there is one."""
    if table is None:
        return folders.class_folders(place, (path,))
    return metadata.listed(table, place.name if table.parent == path else "")


def _dataset(name: str, tables: dict[str, Any]) -> _Data:
    parts = {
        part: lambda part=part, table=table: hf.hf_source(f"{name}, {part}", table)
        for part, table in tables.items()
    }
    if len(parts) == 1:  # such as a single saved Dataset: nothing is set apart in it
        ((alone, whole),) = parts.items()
        return _Data(name, {}, whole, alone=alone)
    return _Data(name, parts, None)


def _name(tables: dict[str, Any]) -> str:
    """What a dataset in memory is called; one made by hand has no name."""
    return next(iter(tables.values())).info.dataset_name or "the dataset"


def _tables(data: str | os.PathLike[str]) -> tuple[str, dict[str, Any]]:
    """A dataset's name, and its splits."""
    path = Path(data)
    if path.is_dir():
        return shown(path.resolve().name), _lowered(hf.splits(path))
    return os.fspath(data), _lowered(hf.splits(os.fspath(data)))


def _lowered(tables: dict[str, Any]) -> dict[str, Any]:
    return {name.lower(): table for name, table in tables.items()}
