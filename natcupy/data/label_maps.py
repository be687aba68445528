"""Pictures with a map of class numbers each: a folder of pictures and a folder of masks.

In: two folders, or one that holds them. Out: `LabelledMaps`: every picture and the class of every
pixel. Maps are grey or palette PNGs of the picture's size; their numbers are the labels.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from natcupy.data.files import list_pictures, shown, why
from natcupy.data.source import DataError
from natcupy.zoo.dense.images import read_pixels
from natcupy.zoo.dense.upernet import IGNORE_INDEX

IMAGES = ("images", "image", "img", "JPEGImages")
MASKS = ("masks", "annotations", "labels", "SegmentationClass")
CLASSES = "classes.txt"
FEW = 32  # maps that are looked at, where names are given
_GREY = ("1", "L", "P", "I;16", "I;16B", "I")


@dataclass(frozen=True)
class Labelled:
    """A picture, `pixels` `[H, W, 3]` uint8, and `labels` `[H, W]` int64, 255 where none count."""

    pixels: Tensor
    labels: Tensor


class LabelledMaps:
    """Pictures and their maps, by index. Picklable, so that workers can open them.

    Args:
        images, masks: folders; a picture's map has its name, but for the suffix.
        classes: label names; None: the lines of `classes.txt` in `images` or above it, else as
            many numbered ones as the maps need (which reads them all).
        reduce_zero_label: 0 in a map means "no class", 1 the first one, as in ADE20K.
        root: the highest folder where `classes.txt` is looked for; default: the lowest that holds
            both folders.

    Attributes:
        classes: label names; a label is an index into them.
        notes: what the reader of a log should know.

    Raises DataError for folders that do not fit together.
    """

    def __init__(
        self,
        images: str | os.PathLike[str],
        masks: str | os.PathLike[str],
        classes: Sequence[str] | None = None,
        reduce_zero_label: bool = False,
        root: str | os.PathLike[str] | None = None,
    ) -> None:
        self.images, self.masks = Path(images).expanduser(), Path(masks).expanduser()
        self.reduce_zero_label = reduce_zero_label
        self._pairs = _paired(self.images, self.masks)
        self._seen: set[int] | None = None  # numbers in the maps, where all were read
        self._few: tuple[set[int], int] | None = None  # numbers in some of the maps, of how many
        self._names_file: Path | None = None
        if classes is None:
            self._names_file = _names_file(self.images, self.masks, root)
        self.classes = tuple(classes) if classes is not None else self._named()
        self.notes = self._told()

    def __len__(self) -> int:
        return len(self._pairs)

    def where(self, index: int) -> str:
        """Where a picture lies, for messages."""
        return shown(self.images / self._pairs[index][0])

    def subset(self, indices: Sequence[int]) -> LabelledMaps:
        """The same with some of the pictures."""
        other = object.__new__(LabelledMaps)
        other.__dict__ |= self.__dict__
        other._pairs = [self._pairs[index] for index in indices]
        return other

    def key(self, index: int) -> str:
        """What a picture is called within the set, the same on every machine."""
        return self._pairs[index][0]

    def __getitem__(self, index: int) -> Labelled:
        """A picture and its map. Raises DataError, which names the file that is wrong."""
        picture, mask = self._pairs[index]
        try:
            pixels = read_pixels(os.fspath(self.images / picture))
        except Exception as error:  # decoders raise nearly anything for broken data
            raise DataError(f"{self.where(index)} cannot be read: {why(error)}.") from None
        labels = self.labels(index)
        if labels.shape != pixels.shape[:2]:
            raise DataError(
                f"{shown(self.masks / mask)} must be as large as its picture, "
                f"{pixels.shape[1]} x {pixels.shape[0]}, got {labels.shape[1]} x "
                f"{labels.shape[0]}. Export it again."
            )
        wrong = (labels < 0) | (labels >= len(self.classes)) & (labels != IGNORE_INDEX)
        if wrong.any():
            raise DataError(
                f"{shown(self.masks / mask)} must hold numbers in 0..{len(self.classes) - 1} or "
                f"{IGNORE_INDEX} (no class), got {int(labels[wrong][0])} in {int(wrong.sum())} "
                "pixels. Name all classes, or map the numbers to this range."
            )
        return Labelled(pixels, labels)

    def labels(self, index: int) -> Tensor:
        """The map of one picture as int64 `[H, W]`; larger numbers are not refused."""
        path = self.masks / self._pairs[index][1]
        try:
            with Image.open(path) as image:
                mode, values = image.mode, np.array(image)
        except Exception as error:
            raise DataError(f"{shown(path)} cannot be read: {why(error)}.") from None
        if mode not in _GREY or values.ndim != 2:
            raise DataError(
                f"{shown(path)} must be a grey or palette picture whose values are class numbers, "
                f"got mode {mode!r}. Save the numbers, not their colours."
            )
        labels = torch.from_numpy(values.astype(np.int64))
        if self.reduce_zero_label:
            none = (labels == 0) | (labels == IGNORE_INDEX)
            labels = torch.where(none, IGNORE_INDEX, labels - 1)
        return labels

    def _named(self) -> tuple[str, ...]:
        if self._names_file is not None:
            return _read_names(self._names_file)
        seen: set[int] = set()
        for index in range(len(self)):
            seen |= set(self.labels(index).unique().tolist())
        largest = max(seen - {IGNORE_INDEX}, default=-1)
        if largest < 0:
            raise DataError(
                f"{shown(self.masks)} must name a class of some pixel, got maps of "
                f"{IGNORE_INDEX} (no class) alone."
            )
        self._seen = seen
        return tuple(f"class {number}" for number in range(largest + 1))

    def _told(self) -> tuple[str, ...]:
        """Where names come from, or which numbers no pixel has, perhaps meant otherwise."""
        if self._names_file is not None:
            named = f"{len(self.classes)} class names from {shown(self._names_file)}"
            return (named, *self._told_of_few())
        numbers = range(len(self.classes)) if self._seen is not None else ()
        absent = [str(number) for number in numbers if number not in self._seen]
        return (f"no pixel has class {', '.join(absent[:10])}",) if absent else ()

    def _told_of_few(self) -> tuple[str, ...]:
        """A note if some maps look as if 255 were meant as a class."""
        if self.reduce_zero_label:  # 255 may be a 0 of the file
            return ()
        if self._few is None:
            step = -(-len(self) // FEW)
            maps = [self.labels(index) for index in range(0, len(self), step)]
            self._few = set().union(*(map_.unique().tolist() for map_ in maps)), len(maps)
        numbers, count = self._few
        if IGNORE_INDEX not in numbers or numbers - {0, IGNORE_INDEX} or len(self.classes) < 2:
            return ()
        others = "0 and " if 0 in numbers else ""
        return (
            f"{count} of {len(self)} maps were looked at and hold {others}{IGNORE_INDEX} alone, "
            f"which means no class: what is a class must be saved as 0..{len(self.classes) - 1}",
        )


def _names_file(images: Path, masks: Path, root: str | os.PathLike[str] | None) -> Path | None:
    """The nearest `classes.txt` from the pictures' folder up to the root, and no higher."""
    images, masks = Path(os.path.abspath(images)), Path(os.path.abspath(masks))
    root = Path(os.path.commonpath([images, masks]) if root is None else os.path.abspath(root))
    within = (each for each in (images, *images.parents) if each.is_relative_to(root))
    return next((each / CLASSES for each in within if (each / CLASSES).is_file()), None)


def _read_names(path: Path) -> tuple[str, ...]:
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{shown(path)} must be UTF-8 text, got {error}. Save it so.") from None
    return tuple(line.strip() for line in lines if line.strip())


def find_maps(
    data: str | os.PathLike[str],
    *,
    classes: Sequence[str] | None = None,
    reduce_zero_label: bool = False,
) -> dict[str, LabelledMaps]:
    """The parts of a data set by name: "train" and perhaps "val", or "" where it has no parts.

    Args:
        data: a folder with `images` and `masks` (or `annotations`), either with parts inside
            (`images/training`, `masks/training`) or inside parts (`train/images`, `train/masks`).
        classes, reduce_zero_label: as for `LabelledMaps`.
    """
    root = Path(data).expanduser()
    options = {"classes": classes, "reduce_zero_label": reduce_zero_label, "root": root}
    pair = _pair_in(root)
    if pair is not None:
        parts = {p.name for p in pair[0].iterdir() if p.is_dir() and (pair[1] / p.name).is_dir()}
        named = {_part(name): name for name in sorted(parts) if _part(name)}
        if "train" in named:
            folders = {part: (pair[0] / n, pair[1] / n) for part, n in named.items()}
        else:
            folders = {"": pair}
    else:
        inside = sorted(p for p in root.iterdir() if p.is_dir()) if root.is_dir() else []
        found = {_part(p.name): _pair_in(p) for p in inside if _part(p.name)}
        folders = {part: each for part, each in found.items() if each is not None}
    if not folders:
        raise DataError(
            f"{shown(root)} must hold a folder of pictures ({', '.join(IMAGES)}) and one of masks "
            f"({', '.join(MASKS)}), or parts (train, val) that do."
        )
    parts = {part: LabelledMaps(*pair, **options) for part, pair in folders.items()}
    names = max((part.classes for part in parts.values()), key=len)  # of numbered ones, all
    for part in parts.values():
        part.classes = names
        part.notes = part._told()
    return parts


def _part(name: str) -> str:
    word = name.lower()
    if word in ("train", "training"):
        return "train"
    return "val" if word in ("val", "validation", "valid", "test") else ""


def _pair_in(folder: Path) -> tuple[Path, Path] | None:
    def first(names: Sequence[str]) -> Path | None:
        return next((folder / name for name in names if (folder / name).is_dir()), None)

    images, masks = first(IMAGES), first(MASKS)
    return (images, masks) if images is not None and masks is not None else None


def _paired(images: Path, masks: Path) -> list[tuple[str, str]]:
    """Names of the pictures with those of their maps, each in its folder."""
    for folder in (images, masks):
        if not folder.is_dir():
            raise DataError(f"the folder {shown(folder)} is not there.")
    of_stem: dict[str, str] = {}
    for name in list_pictures(masks):
        stem = os.path.splitext(name)[0]
        if stem in of_stem:
            raise DataError(f"{shown(masks)} has two maps for {stem}: {of_stem[stem]} and {name}.")
        of_stem[stem] = name
    pairs = []
    for name in list_pictures(images):
        mask = of_stem.pop(os.path.splitext(name)[0], None)
        if mask is None:
            raise DataError(
                f"{shown(images / name)} must have a map of the same name in {shown(masks)}, got "
                "none. Add it, or take the picture out."
            )
        pairs.append((name, mask))
    if of_stem:
        raise DataError(
            f"{shown(masks)} has maps without a picture: {', '.join(list(of_stem.values())[:5])}."
        )
    if not pairs:
        raise DataError(f"{shown(images)} must hold pictures, got none.")
    return pairs
