"""Which pictures a folder holds, in one order on every machine, and why a file is none.

In: folders, and the errors of opening. Out: names relative to the folder, `/` between their parts;
reasons in a user's words.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from natcupy.zoo.preprocess import MISSING, OUTSIDE_FORMATS, UNKNOWN


class Names(Sequence):
    """Any number of file names, one after the other in one piece of memory.

    A list of as many `str` would take several times the memory, and be copied by every worker.
    """

    def __init__(self, names: Iterable[str]) -> None:
        encoded = [os.fsencode(name) for name in names]
        self._bytes = b"".join(encoded)
        self._ends = np.cumsum([len(name) for name in encoded], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> str:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index must be in 0..{len(self) - 1}, got {index}.")
        index %= len(self)
        start = int(self._ends[index - 1]) if index else 0
        return os.fsdecode(self._bytes[start : int(self._ends[index])])


@lru_cache(maxsize=1)
def suffixes() -> frozenset[str]:
    """The file suffixes of pictures that can be opened, in lower case."""
    extensions = Image.registered_extensions().items()
    return frozenset(s for s, kind in extensions if kind in Image.OPEN.keys() - {*OUTSIDE_FORMATS})


def is_picture_name(name: str) -> bool:
    """Whether a file of this name should be a picture. Hidden files are none."""
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in suffixes()


def order(name: str) -> tuple[str, str]:
    """The sort key of a name: by code points, alike for composed and decomposed letters."""
    return unicodedata.normalize("NFC", name), name


def shown(path: str | os.PathLike[str]) -> str:
    """A path as text that every encoding can hold: bytes that are no UTF-8 as `\\xNN`."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder; one that cannot be looked at (a link in a circle) is none."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def subfolders(folder: str | os.PathLike[str]) -> list[str]:
    """Names of the folders in a folder, sorted, without hidden ones."""
    with os.scandir(folder) as entries:
        names = [e.name for e in entries if not e.name.startswith(".") and is_folder(e)]
    return sorted(names, key=order)


def list_pictures(
    folder: str | os.PathLike[str],
    problems: list[tuple[str, str]] | None = None,
    *,
    beyond: Iterable[str | os.PathLike[str]] = (),
) -> list[str]:
    """The pictures in a folder and below, by their suffix, as names relative to it.

    A folder's own pictures come first, then those of its folders, each sorted by code points.
    Links are followed, but no folder is listed twice, so that loops end; hidden files and folders
    are left out.

    Args:
        folder: where to look.
        problems: gets (name, reason) of every folder that cannot be listed; without it, that
            raises OSError. One that vanishes meanwhile is none.
        beyond: folders that links must not lead back into, such as the one above.
    """
    return list(_walk(folder, problems, beyond))


def has_pictures(folder: str | os.PathLike[str]) -> bool:
    """Whether there is a picture, by its suffix, in a folder or below."""
    return next(_walk(folder, [], ()), None) is not None


def _walk(
    folder: str | os.PathLike[str],
    problems: list[tuple[str, str]] | None,
    beyond: Iterable[str | os.PathLike[str]],
) -> Iterator[str]:
    seen = {identity(path) for path in beyond}
    waiting = [""]
    while waiting:  # a list, since Python's own recursion ends before the longest path does
        inside = waiting.pop()
        path = os.path.join(folder, inside) if inside else os.fspath(folder)
        try:
            this = identity(path)
            if this in seen:
                continue
            seen.add(this)
            files, folders = _entries(path)
        except OSError as error:
            if inside and isinstance(error, FileNotFoundError):
                continue  # it was removed meanwhile
            if problems is None:
                raise
            problems.append((inside, why(error)))
            continue
        prefix = f"{inside}/" if inside else ""
        yield from (prefix + name for name in files)
        waiting += [prefix + name for name in reversed(folders)]


def _entries(path: str) -> tuple[list[str], list[str]]:
    """Names of a folder's pictures (whatever they turn out to be) and of its folders, sorted."""
    files, folders = [], []
    with os.scandir(path) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if is_folder(entry):
                folders.append(entry.name)
            elif is_picture_name(entry.name):
                files.append(entry.name)
    return sorted(files, key=order), sorted(folders, key=order)


def identity(path: str | os.PathLike[str]) -> tuple[int, int]:
    """What two paths have in common that lead to the same file or folder. Raises OSError."""
    found = os.stat(path)
    return found.st_dev, found.st_ino


def named_files(paths: Iterable[Path], problems: list[tuple[str, str]]) -> Iterator[Path]:
    """Files as they are named; of a folder, the pictures in it and below.

    Args:
        paths: files and folders.
        problems: gets (path, reason) of every folder that cannot be listed.

    Raises ValueError for a folder without pictures.
    """
    for path in paths:
        if not os.path.isdir(path):  # unlike Path's, never an error
            yield path
            continue
        closed: list[tuple[str, str]] = []
        inside = list_pictures(path, closed)
        problems += [(shown(path / name), reason) for name, reason in closed]
        if not inside and not closed:
            raise ValueError(f"a folder must hold pictures, got {path} without any.")
        yield from (path / name for name in inside)


def why(error: BaseException) -> str:
    """The reason why a picture could not be read, on one line."""
    if isinstance(error, FileNotFoundError):
        return MISSING
    if isinstance(error, Image.UnidentifiedImageError):
        return UNKNOWN
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__
