"""Folders of pictures: one folder per class, or such folders below `train`, `val`, ...

In: a folder. Out: its parts by name, each a `FolderSource`.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from natcupy.data.files import (
    Names,
    is_folder,
    is_picture_name,
    list_pictures,
    shown,
    subfolders,
    why,
)
from natcupy.data.source import DataError, PictureSet, Source
from natcupy.zoo.preprocess import open_picture

TRAIN_NAMES = ("train", "training")
HELD_OUT_NAMES = ("val", "validation", "valid", "test", "testing")  # preferred first


class FolderSource(Source):
    """Pictures below one folder.

    Args:
        root: the folder.
        names: the pictures, relative to it.
        labels: `[len(names)]` integers.
        classes: what the labels stand for.
    """

    def __init__(self, root: str, names: Names, labels: np.ndarray, classes: tuple[str, ...]):
        self.root, self.names = root, names
        self.labels, self.classes = np.asarray(labels, dtype=np.int64), classes

    def where(self, index: int) -> str:
        """The picture's path."""
        return shown(os.path.join(self.root, self.names[index]))

    def key(self, index: int) -> str:
        """The picture's path within the folder."""
        return self.names[index]

    def decode(self, index: int) -> Image.Image:
        """A picture as it is stored."""
        return open_picture(os.path.join(self.root, self.names[index]))


class Files(PictureSet):
    """Picture files without labels: those named, and of folders those in them and below.

    Args:
        paths: files and folders, in the order wanted.

    Attributes:
        problems: (path, reason) of every folder below that cannot be listed.

    Raises DataError where a folder holds no pictures.
    """

    problems: list[tuple[str, str]]

    def __init__(self, paths: Iterable[str | os.PathLike[str]]) -> None:
        self.problems = []
        self._names = Names(name for path in paths for name in self._listed(os.fspath(path)))

    def _listed(self, path: str) -> list[str]:
        if not os.path.isdir(path):
            return [path]
        problems: list[tuple[str, str]] = []
        inside = list_pictures(path, problems)
        self.problems += [(shown(os.path.join(path, name)), reason) for name, reason in problems]
        if not inside and not problems:
            raise DataError(f"a folder must hold pictures, got {shown(path)} without any.")
        return [os.path.join(path, name) for name in inside]

    def __len__(self) -> int:
        return len(self._names)

    def where(self, index: int) -> str:
        """The picture's path."""
        return shown(self._names[index])

    def key(self, index: int) -> str:
        """The picture's path."""
        return self._names[index]

    def decode(self, index: int) -> Image.Image:
        """A picture as it is stored."""
        return open_picture(self._names[index])


def parts(folder: Path) -> dict[str, Path]:
    """The parts of a data folder by their names in lower case; {} if it is not split.

    It is split where there is nothing but parts; or `train` and a held-out part among other
    folders, if these two hold folders. Else `train` is a class like any other.
    """
    names = subfolders(folder)
    known = [n for n in names if n.lower() in (*TRAIN_NAMES, *HELD_OUT_NAMES)]
    both = {n.lower() in TRAIN_NAMES for n in known} == {True, False}
    alone = len(known) == len(names)
    if not known or not (alone or (both and any(subfolders(folder / name) for name in known))):
        return {}
    found = {name.lower(): folder / name for name in known}
    if len(found) < len(known):
        raise DataError(
            f"{shown(folder)} must hold every part once, got {', '.join(known)}. Merge them."
        )
    return found


def class_folders(folder: Path, beyond: tuple[Path, ...] = ()) -> FolderSource:
    """The pictures of a folder with one folder per class; classes sorted by code points.

    Args:
        folder: where the class folders are.
        beyond: folders that links must not lead back into.

    Raises DataError without class folders, or where one cannot be read or has no pictures.
    """
    try:
        folders = subfolders(folder)
        if not folders:
            raise DataError(_no_classes(folder, part=bool(beyond)))
        listed = [list_pictures(folder / name, beyond=(*beyond, folder)) for name in folders]
    except OSError as error:
        raise DataError(
            f"{shown(error.filename or folder)} cannot be listed: {why(error)}."
        ) from None
    _refuse_empty(
        folder, [name for name, inside in zip(folders, listed, strict=True) if not inside]
    )
    classes = tuple(unicodedata.normalize("NFC", shown(name)) for name in folders)
    if len(set(classes)) < len(classes):
        twice = sorted({name for name in classes if classes.count(name) > 1})
        raise DataError(
            f"{shown(folder)} must hold one folder per class, got folders whose names differ only "
            f"in how accents are encoded: {', '.join(twice)}. Merge them."
        )
    labels = np.repeat(np.arange(len(folders)), [len(inside) for inside in listed])
    names = Names(
        f"{name}/{file}" for name, inside in zip(folders, listed, strict=True) for file in inside
    )
    return FolderSource(os.fspath(folder), names, labels, classes)


def loose_pictures(folder: Path) -> int:
    """How many pictures lie in a folder itself, belonging to no class."""
    with os.scandir(folder) as entries:
        return sum(is_picture_name(entry.name) and not is_folder(entry) for entry in entries)


def _no_classes(folder: Path, part: bool) -> str:
    loose = loose_pictures(folder)
    got = f"{loose:,} pictures and no folder" if loose else "no folder and no pictures"
    split = "" if part else " (or `train` and `val` with such folders)"
    return (
        f"{shown(folder)} must hold one folder per class with the class's pictures in it{split}, "
        f"got {got}. Sort the pictures so, or list them in a metadata.csv beside them with the "
        "columns file_name and label."
    )


def _refuse_empty(folder: Path, empty: list[str]) -> None:
    if not empty:
        return
    some = ", ".join(map(shown, empty[:10])) + (" ..." if len(empty) > 10 else "")
    raise DataError(
        f"every class folder must hold a picture, got {len(empty)} without any in {shown(folder)}: "
        f"{some}. Add pictures or remove the folder."
    )
