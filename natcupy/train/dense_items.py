"""Items of segmentation and detection: varied for training, prepared as at test time to examine.

In: `LabelledMaps` or `CocoPictures`, a model's `Recipe` and the views of its training. Out: items
by index for torch's loaders, and batches of them. Held-out pictures keep their own sizes, so a
batch of those is a list.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from natcupy.data.coco import CocoPictures
from natcupy.data.dense_augment import DetectionViews, SegmentationViews
from natcupy.data.label_maps import LabelledMaps
from natcupy.zoo.dense.images import Frame, Prepared, Recipe, resize_pixels, stack
from natcupy.zoo.dense.targets import Objects


@dataclass(frozen=True)
class HeldOut:
    """A picture to examine.

    Attributes:
        prepared: as the model takes it.
        index: of the picture in its data set.
        truth: its labels `[H, W]`, or None for detection, where the data set has the truth.
    """

    prepared: Prepared
    index: int
    truth: Tensor | None = None


@dataclass(frozen=True)
class MapViews:
    """Views of labelled pictures: (`[3, h, w]` normalised, `[h, w]` labels), all of one size."""

    source: LabelledMaps
    recipe: Recipe
    views: SegmentationViews

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        item = self.source[index]
        pixels, labels = self.views(item.pixels, item.labels)
        return self.views.fill(self.recipe.normalise(pixels)[0], labels)


@dataclass(frozen=True)
class ObjectViews:
    """Views of pictures with objects: (`Prepared`, `Objects` in its pixels), of any size."""

    source: CocoPictures
    recipe: Recipe
    views: DetectionViews

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Prepared, Objects]:
        scene = self.source[index]
        pixels, objects = self.views(scene.pixels, scene.objects)
        size = tuple(pixels.shape[:2])
        return Prepared(self.recipe.normalise(pixels), Frame(size, size)), objects


@dataclass(frozen=True)
class HeldOutPictures:
    """The pictures of either kind of data set, as `HeldOut`."""

    source: LabelledMaps | CocoPictures
    recipe: Recipe

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> HeldOut:
        item = self.source[index]
        size = self.recipe.target_size(*item.pixels.shape[:2])
        pixels = self.recipe.normalise(resize_pixels(item.pixels, size))
        frame = Frame(size, tuple(item.pixels.shape[:2]))
        return HeldOut(Prepared(pixels, frame), index, getattr(item, "labels", None))


def batch_of(items: Sequence[Any]) -> Any:
    """Items of one kind as a batch: tensors, (pictures, frames, objects), or the list itself."""
    if isinstance(items[0], HeldOut):
        return list(items)
    first, second = zip(*items, strict=True)
    if isinstance(first[0], Prepared):
        pictures, frames = stack(first)
        return pictures, frames, list(second)
    return torch.stack(first), torch.stack(second)
