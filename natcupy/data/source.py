"""What a set of labelled pictures is, wherever its pictures lie.

In: nothing; `folders` and `hf` derive from `Source`. Out: the interface, and `Subset`.
"""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from typing import Any

import numpy as np
from PIL import Image

from natcupy.data.files import why
from natcupy.zoo.preprocess import plain

LABEL_COLUMNS = ("label", "labels", "fine_label", "cls", "class")  # in tables; preferred first


class DataError(ValueError):
    """Data that cannot be used as it is: which, why, and what to do."""


class PictureSet(ABC):
    """Pictures in a fixed order. Picklable, so that workers can open them."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def where(self, index: int) -> str:
        """Where a picture lies, for messages and tables."""

    @abstractmethod
    def key(self, index: int) -> str:
        """What a picture is called within the set, the same on every machine."""

    def content(self, index: int) -> bytes:
        """What is stored of a picture whose key says nothing of it; of others nothing."""
        return b""

    @abstractmethod
    def decode(self, index: int) -> Image.Image:
        """A picture, upright, in the mode it is stored in; raises whatever its decoder raises."""

    def open(self, index: int) -> Image.Image:
        """A picture, upright, in the mode it is stored in.

        Raises DataError, which names the picture, for one that cannot be read.
        """
        try:
            return self.decode(index)
        except Exception as error:  # decoders raise nearly anything for broken data
            raise DataError(f"{self.where(index)} cannot be read: {why(error)}.") from None

    def picture(self, index: int) -> Image.Image:
        """A picture, upright, as "RGB" or "L", without transparency. Raises DataError."""
        opened = self.open(index)
        try:
            return plain(opened)
        except Exception as error:
            raise DataError(f"{self.where(index)} cannot be read: {why(error)}.") from None


class Source(PictureSet):
    """Pictures with labels.

    Attributes:
        classes: the label names; a label is an index into them.
        labels: `[len]` int64, the label of every picture.
    """

    classes: tuple[str, ...]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def label(self, index: int) -> int:
        """The label of a picture."""
        return int(self.labels[index])

    def counts(self) -> np.ndarray:
        """`[classes]`, how many pictures each class has."""
        return np.bincount(self.labels, minlength=len(self.classes))


class Subset(Source):
    """Some of another source's pictures.

    Args:
        source: the whole.
        indices: which of it, in the order wanted.
    """

    def __init__(self, source: Source, indices: np.ndarray) -> None:
        self._source = source
        self._indices = np.asarray(indices, dtype=np.int64)
        self.classes = source.classes
        self.labels = source.labels[self._indices]

    def where(self, index: int) -> str:
        """Where a picture lies."""
        return self._source.where(int(self._indices[index]))

    def key(self, index: int) -> str:
        """What a picture is called within the set."""
        return self._source.key(int(self._indices[index]))

    def content(self, index: int) -> bytes:
        """What is stored of a picture whose key says nothing of it."""
        return self._source.content(int(self._indices[index]))

    def decode(self, index: int) -> Image.Image:
        """A picture as it is stored."""
        return self._source.decode(int(self._indices[index]))


def refuse_unlabelled(where: str, values: list[Any]) -> None:
    """Raises DataError where a picture has no label; `where` says which table and column."""
    bad = sum(v is None or v == -1 for v in values)
    if bad:
        raise DataError(
            f"every picture must have a label, got {bad:,} of {len(values):,} without in {where}. "
            "Use a split with labels."
        )


def indexed(where: str, values: list[Any]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Labels, whole numbers or texts, as indices into their sorted names.

    Raises DataError for other values and missing ones; `where` says which table and column.
    """
    refuse_unlabelled(where, values)
    kinds = {str if isinstance(v, str) else int if isinstance(v, int) else None for v in values}
    if None in kinds or len(kinds) > 1:
        raise DataError(
            f"labels must be whole numbers or texts, got other values, or both, in {where}."
        )
    known = sorted(set(values))
    place = {value: index for index, value in enumerate(known)}
    return np.array([place[v] for v in values], dtype=np.int64), tuple(map(str, known))


def refuse_shared(train: Any, held_out: Any) -> None:
    """Raises DataError where held-out pictures are trained on, too: their scores would flatter.

    Both are sets of files: they have a length, and `where` gives a picture's path.
    """
    trained = {os.path.abspath(train.where(index)) for index in range(len(train))}
    named = map(held_out.where, range(len(held_out)))
    shared = [name for name in named if os.path.abspath(name) in trained]
    if shared:
        raise DataError(
            f"held-out pictures must be others than those trained on, got {len(shared):,} of "
            f"{len(held_out):,} that are the same: {', '.join(shared[:5])}. Name other data as "
            "val, or leave it out, to hold out a share of the pictures."
        )


def stratified(source: Source, fraction: float, seed: int) -> tuple[Subset, Subset]:
    """Two parts of a source; the second has `fraction` of every class, rounded, at least one.

    A picture's place depends on its key and the seed alone, not on a random generator, so every
    machine splits alike and few pictures move when others are added. A class with one picture
    stays in the first part.
    """
    second = np.zeros(len(source), dtype=bool)
    for label in range(len(source.classes)):
        members = np.flatnonzero(source.labels == label)
        if len(members) < 2:
            continue
        count = min(max(round(len(members) * fraction), 1), len(members) - 1)
        ranked = sorted(members, key=lambda index: _rank(source.key(int(index)), seed))
        second[ranked[:count]] = True
    return Subset(source, np.flatnonzero(~second)), Subset(source, np.flatnonzero(second))


def _rank(key: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}/{key}".encode("utf-8", "surrogateescape")).digest()
