"""Pictures with objects in COCO's format: a JSON file and a folder of pictures.

In: the file's path. Out: `CocoPictures`: every picture, its objects in its own pixels, and the
whole as pycocotools wants it for evaluation. Everything in the file is checked before the first
picture is opened; what cannot be used is an error, what COCO's own tools leave out is counted in
`notes`.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from natcupy.data.files import shown, why
from natcupy.data.source import DataError
from natcupy.zoo.dense.images import read_pixels
from natcupy.zoo.dense.targets import Objects

MAX_BYTES = 4 * 1024**3
Annotation = dict[str, Any]


@dataclass(frozen=True)
class Scene:
    """One picture and the truth about it, in its own pixels.

    Attributes:
        pixels: `[H, W, 3]` uint8.
        objects: boxes, labels and masks `[n, H, W]` bool of what is to be learned: no crowds.
    """

    pixels: Tensor
    objects: Objects


class CocoPictures:
    """The pictures of a COCO file, by index. Picklable, so that workers can open pictures.

    Args:
        annotations: the JSON file with `images`, `annotations`, `categories`.
        images: the folder that `file_name` counts from; default: the file's own folder, `images`
            beside it, or as COCO lies: `val2017` beside the folder of `instances_val2017.json`.
        classes: label names in the model's order, each a category's name; default: the file's
            categories by id.

    Attributes:
        classes: label names; a label is an index into them.
        notes: what was left out, for logs.
        dataset: the file's content, as `pycocotools.coco.COCO` holds it.

    Raises DataError where the file, or anything in it, breaks the format.
    """

    def __init__(
        self,
        annotations: str | os.PathLike[str],
        images: str | os.PathLike[str] | None = None,
        classes: Sequence[str] | None = None,
    ) -> None:
        self.path = Path(annotations).expanduser()
        self.dataset = _read(self.path)
        self.folder = _folder(self.path, images, self.dataset["images"])
        self._images = _checked_images(self.path, self.dataset["images"])
        self.classes, self._labels = _classes(self.path, self.dataset["categories"], classes)
        self.notes: tuple[str, ...] = ()
        self._objects = self._grouped()
        self._all_there()

    def __len__(self) -> int:
        return len(self._images)

    def key(self, index: int) -> str:
        """What a picture is called within the set, the same on every machine."""
        return self._images[index]["file_name"]

    def subset(self, indices: Sequence[int]) -> CocoPictures:
        """The same with some of the pictures; also for evaluation."""
        other = object.__new__(CocoPictures)
        other.__dict__ |= self.__dict__
        other._images = [self._images[index] for index in indices]
        other._objects = [self._objects[index] for index in indices]
        ids = {image["id"] for image in other._images}
        own = [a for a in self.dataset["annotations"] if a["image_id"] in ids]
        other.dataset = {**self.dataset, "images": other._images, "annotations": own}
        return other

    def where(self, index: int) -> str:
        """Where a picture lies, for messages."""
        return shown(self.folder / self._images[index]["file_name"])

    def image_id(self, index: int) -> int:
        """The file's id of a picture."""
        return self._images[index]["id"]

    def category_id(self, label: int) -> int:
        """The file's id of a class."""
        return next(key for key, value in self._labels.items() if value == label)

    def size(self, index: int) -> tuple[int, int]:
        """Height and width of a picture."""
        return self._images[index]["height"], self._images[index]["width"]

    def counts(self) -> list[int]:
        """How many objects each class has."""
        found = Counter(self._labels[a["category_id"]] for each in self._objects for a in each)
        return [found[label] for label in range(len(self.classes))]

    def __getitem__(self, index: int) -> Scene:
        """A picture with its objects. Raises DataError, which names it, if it cannot be read."""
        size = self.size(index)
        try:
            pixels = read_pixels(os.fspath(self.folder / self._images[index]["file_name"]))
        except Exception as error:  # decoders raise nearly anything for broken data
            raise DataError(f"{self.where(index)} cannot be read: {why(error)}.") from None
        if tuple(pixels.shape[:2]) != size:
            raise DataError(
                f"{self.where(index)} must have the size that {self.path.name} states, "
                f"{size[1]} x {size[0]}, got {pixels.shape[1]} x {pixels.shape[0]}. Export the "
                "annotations for this picture again."
            )
        return Scene(pixels, self._truth(index, size))

    def _truth(self, index: int, size: tuple[int, int]) -> Objects:
        own = self._objects[index]
        boxes = torch.tensor([_corners(a["bbox"], size) for a in own]).reshape(-1, 4)
        labels = torch.tensor([self._labels[a["category_id"]] for a in own], dtype=torch.int64)
        masks = torch.zeros(len(own), *size, dtype=torch.bool)
        for number, annotation in enumerate(own):
            masks[number] = decode_mask(annotation["segmentation"], size, self._what(annotation))
        return Objects(boxes, labels, masks)

    # -- checks ------------------------------------------------------------------------------------

    def _grouped(self) -> list[list[Annotation]]:
        """The objects to learn, per picture; crowds and boxes without area are counted out."""
        place = {image["id"]: number for number, image in enumerate(self._images)}
        grouped: list[list[Annotation]] = [[] for _ in self._images]
        left_out: Counter[str] = Counter()
        seen: set[Any] = set()
        for annotation in self.dataset["annotations"]:
            if annotation.get("id") in seen:
                raise DataError(f"{self._what(annotation)}: two annotations have this id.")
            seen.add(annotation.get("id"))
            index = place.get(annotation.get("image_id"))
            if index is None:
                raise DataError(
                    f"{self._what(annotation)} must belong to a picture of the file, got image_id "
                    f"{annotation.get('image_id')!r}."
                )
            reason = self._reason(annotation, self.size(index))
            if reason:
                left_out[reason] += 1
            else:
                grouped[index].append(annotation)
        self.notes = tuple(f"left out: {count} {reason}" for reason, count in left_out.items())
        return grouped

    def _reason(self, annotation: Annotation, size: tuple[int, int]) -> str:
        """Why an annotation is not learned from, "" if it is. Raises where it is wrong."""
        category = annotation.get("category_id")
        if not _is_number(category) or category not in self._labels:
            if _is_number(category) and category in {c["id"] for c in self.dataset["categories"]}:
                return "objects of other classes"
            raise DataError(
                f"{self._what(annotation)} must have one of the file's category ids, got "
                f"{category!r}."
            )
        box = annotation.get("bbox")
        if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
            raise DataError(
                f"{self._what(annotation)} must have bbox [x, y, width, height] of finite numbers, "
                f"got {str(box)[:60]}."
            )
        area = annotation.get("area")
        if area is not None and not _is_number(area):
            raise DataError(
                f"{self._what(annotation)} must have an area that is a finite number, or none, "
                f"got {str(area)[:40]}."
            )
        if annotation.get("iscrowd"):
            _check_mask(annotation.get("segmentation"), size, self._what(annotation))
            return "crowds (they count in the evaluation, as regions where nothing is wrong)"
        x1, y1, x2, y2 = _corners(box, size)
        if box[2] < 1 or box[3] < 1 or x2 <= x1 or y2 <= y1:
            return "boxes smaller than a pixel or outside their picture (in the evaluation: missed)"
        if area is not None and area <= 0:
            return "objects of area 0"
        _check_mask(annotation.get("segmentation"), size, self._what(annotation))
        return ""

    def _what(self, annotation: Mapping[str, Any]) -> str:
        return f"{self.path.name}: annotation {annotation.get('id')!r}"

    def _all_there(self) -> None:
        names = [image["file_name"] for image in self._images]
        missing = [name for name in names if not (self.folder / name).is_file()]
        if missing:
            raise DataError(
                f"{shown(self.folder)} must hold the pictures that {self.path.name} names; "
                f"{len(missing)} of {len(names)} are missing: {', '.join(missing[:5])}"
                f"{' …' if len(missing) > 5 else ''}. Name the right folder."
            )


# ---------------------------------------------------------------- the file


def _read(path: Path) -> dict[str, Any]:
    if path.is_dir():
        raise DataError(f"{shown(path)} must be a file of annotations in COCO's JSON, is a folder.")
    try:
        if path.stat().st_size > MAX_BYTES:
            raise DataError(f"{shown(path)} may take {MAX_BYTES:,} bytes; split it.")
        values = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"{shown(path)} cannot be read: {why(error)}.") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{shown(path)} is not valid JSON ({str(error)[:80]}).") from None
    wanted = ("images", "annotations", "categories")
    lists = isinstance(values, dict) and all(
        isinstance(values.get(key), list) and all(isinstance(each, dict) for each in values[key])
        for key in wanted
    )
    if not lists:
        raise DataError(
            f"{shown(path)} must be in COCO's format: an object with lists of objects named "
            f"{', '.join(wanted)}."
        )
    return values


def _checked_images(path: Path, images: list[dict[str, Any]]) -> list[dict[str, Any]]:
    if not images:
        raise DataError(f"{path.name} must list pictures, got none.")
    seen: set[Any] = set()
    for image in images:
        name, sides = image.get("file_name"), (image.get("height"), image.get("width"))
        fine = isinstance(name, str) and name and not _leads_out(name)
        if not fine or not all(type(side) is int and 1 <= side <= 10**6 for side in sides):
            raise DataError(
                f"{path.name}: a picture must have file_name, within its folder, and whole height "
                f"and width, got {str({k: image.get(k) for k in ('id', 'file_name')})[:120]} with "
                f"height and width {sides}."
            )
        if image.get("id") in seen or type(image.get("id")) is not int:
            raise DataError(
                f"{path.name}: every picture must have a whole id of its own, got "
                f"{image.get('id')!r} for {name}."
            )
        seen.add(image["id"])
    return images


def _leads_out(name: str) -> bool:
    return os.path.isabs(name) or ".." in Path(name).parts


def _classes(
    path: Path, categories: list[dict[str, Any]], wanted: Sequence[str] | None
) -> tuple[tuple[str, ...], dict[int, int]]:
    """The label names, and the label of every category id that is learned."""
    ids: dict[str, int] = {}
    for category in categories:
        name, number = category.get("name"), category.get("id")
        if not isinstance(name, str) or not name or type(number) is not int:
            raise DataError(
                f"{path.name}: a category must have a whole id and a name, got "
                f"{str(category)[:80]}."
            )
        if name in ids or number in ids.values():
            raise DataError(f"{path.name}: category {number} ({name}) is there twice.")
        ids[name] = number
    if not ids:
        raise DataError(f"{path.name} must list categories, got none.")
    if wanted is None:
        names = sorted(ids, key=ids.__getitem__)
    else:
        names = list(wanted)
        missing = [name for name in names if name not in ids]
        if missing:
            raise DataError(
                f"{path.name} must have the categories {', '.join(missing[:5])}, it has "
                f"{', '.join(sorted(ids)[:10])}."
            )
    return tuple(names), {ids[name]: label for label, name in enumerate(names)}


def _folder(
    path: Path, images: str | os.PathLike[str] | None, listed: list[dict[str, Any]]
) -> Path:
    if images is not None:
        folder = Path(images).expanduser()
        if not folder.is_dir():
            raise DataError(f"the folder of pictures {shown(folder)} is not there.")
        return folder
    first = str(listed[0].get("file_name", "")) if listed else ""
    above, part = path.parent.parent, path.stem.rpartition("_")[-1]
    near = (path.parent, path.parent / "images", above / "images", above, above / part)
    return next((folder for folder in near if first and (folder / first).is_file()), path.parent)


# ---------------------------------------------------------------- boxes and masks


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _corners(box: Sequence[float], size: tuple[int, int]) -> tuple[float, float, float, float]:
    """(x, y, width, height) as corners, cut to the picture."""
    x, y, width, height = map(float, box)
    right, bottom = min(x + width, size[1]), min(y + height, size[0])
    return max(x, 0.0), max(y, 0.0), right, bottom


def _check_mask(segmentation: object, size: tuple[int, int], what: str) -> None:
    """Raise where a mask cannot be decoded, or is of another picture's size."""
    if isinstance(segmentation, dict):
        stated = segmentation.get("size")
        if stated != list(size):
            raise DataError(
                f"{what}: a mask must have its picture's size [{size[0]}, {size[1]}], got "
                f"{str(stated)[:40]}."
            )
        counts = segmentation.get("counts")
        runs = isinstance(counts, list) and all(type(n) is int and n >= 0 for n in counts)
        total = sum(counts) if runs else _pixels(counts) if isinstance(counts, str) else None
        if total != size[0] * size[1]:
            got = "none" if total is None else f"{total:,}"
            raise DataError(
                f"{what}: the runs of a mask, whole numbers or text, must add up to its "
                f"{size[0] * size[1]} pixels, got {got}. Export the annotations again."
            )
        return
    polygons = isinstance(segmentation, list) and segmentation
    if not polygons or not all(
        isinstance(p, list) and len(p) >= 6 and len(p) % 2 == 0 and all(map(_is_number, p))
        for p in segmentation
    ):
        raise DataError(
            f"{what} must have a segmentation: run lengths, or polygons of at least three points "
            f"[x, y, x, y, x, y, ...], got {str(segmentation)[:60]}."
        )


def is_mask(segmentation: object, size: tuple[int, int]) -> bool:
    """Whether a segmentation is one that `decode_mask` takes."""
    try:
        _check_mask(segmentation, size, "")
    except DataError:
        return False
    return True


def _pixels(text: str) -> int | None:
    """What the runs of compressed text add up to; None where it is no such text.

    pycocotools does not look: with runs that end early it leaves the rest of a mask undefined.
    A number is bytes of five bits, least first, with a mark where more follow; the last bit is its
    sign. From the fourth on it is the difference to the number before the last.
    """
    codes = np.frombuffer(text.encode("utf-8", "replace"), dtype=np.uint8).astype(np.int64) - 48
    if not codes.size:
        return 0
    ends = np.flatnonzero(codes & 32 == 0)
    if codes.min() < 0 or codes.max() > 63 or not ends.size or ends[-1] != codes.size - 1:
        return None
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > 7:  # more than 32 bits
        return None
    places = np.arange(codes.size) - np.repeat(starts, lengths)
    runs = np.add.reduceat((codes & 31) << (5 * places), starts)
    runs -= np.where(codes[ends] & 16, 1 << (5 * lengths), 0)
    for first in (1, 2):
        runs[first::2] = runs[first::2].cumsum()
    return int(runs.sum()) if runs.min() >= 0 else None


def decode_mask(segmentation: Any, size: tuple[int, int], what: str = "a mask") -> Tensor:
    """A segmentation as bool `[H, W]`: run lengths exactly, polygons as COCO fills them.

    Raises DataError for one that is none, or of another size.
    """
    try:
        from pycocotools import mask as codec
    except ImportError:
        raise ImportError(
            "masks in COCO's format need pycocotools: pip install 'natcupy[train]'."
        ) from None
    height, width = size
    _check_mask(segmentation, size, what)
    try:
        if isinstance(segmentation, list):
            coded = codec.merge(codec.frPyObjects(segmentation, height, width))
        elif isinstance(segmentation["counts"], list):
            coded = codec.frPyObjects(segmentation, height, width)
        else:
            coded = {"size": [height, width], "counts": segmentation["counts"].encode()}
        decoded = codec.decode(coded)
    except Exception as error:  # the C library's binding raises several kinds
        raise DataError(f"{what}: the mask cannot be decoded ({error}).") from None
    return torch.from_numpy(decoded).bool()
