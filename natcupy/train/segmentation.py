"""Training to name the class of every pixel: a `Task`.

In: a UPerNet, pictures with maps of classes, a `TrainConfig`. Out: the losses of both heads, mean
IoU and pixel accuracy on whole held-out pictures, and at the end a folder that
`natcupy.from_pretrained` reads.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from natcupy.data.dense_augment import SegmentationViews
from natcupy.data.label_maps import LabelledMaps
from natcupy.hub import Metric, save_pretrained
from natcupy.train.config import TrainConfig
from natcupy.train.dense_items import HeldOut, HeldOutPictures, MapViews, batch_of
from natcupy.train.task import Loss, Task, facts_of_pictures
from natcupy.zoo.dense.images import Recipe
from natcupy.zoo.dense.metrics import confusion, mean_iou
from natcupy.zoo.dense.segment import Variant, combine

MODEL = "model"


class Segmentation(Task):
    """One class for every pixel.

    Args:
        recipe: how the model's pictures are made at test time.
        train, val: pictures with maps of the same classes; `val` None examines nothing.
        config: `flip`, and `color_jitter`, of which 0 leaves colours as they are.
        statements: for the card, as `natcupy.hub.save_pretrained` takes them.
        views: how pictures are varied; None: as in the papers, scaled to the recipe's size.
    """

    name = "segmentation"
    metric = "val_miou"
    shown = ("train_decode", "val_miou")
    fewest = 2
    why_fewest = (
        "the batch norm of a UPerNet needs two values, and at any picture size one of its maps has "
        "a single pixel of each picture"
    )

    def __init__(
        self,
        recipe: Recipe,
        train: LabelledMaps,
        val: LabelledMaps | None,
        config: TrainConfig,
        statements: Mapping[str, Any] | None = None,
        views: SegmentationViews | None = None,
    ) -> None:
        self.classes = tuple(train.classes)
        side = recipe.short_side
        self.views = views or SegmentationViews(
            recipe.long_side,
            side,
            crop=(side, side),
            flip=0.5 if config.flip is None else config.flip,
            photometric=config.color_jitter > 0,
        )
        self.training_items = MapViews(train, recipe, self.views)
        self.held_out_items = None if val is None else HeldOutPictures(val, recipe)
        self.statements = dict(statements or {})

    def facts(self) -> dict[str, Any]:
        """What a continuation must share: the classes, which pictures there are and how many."""
        shared = facts_of_pictures(self.classes, self.training_items, self.held_out_items)
        return {**super().facts(), **shared}

    def collate(self, items: list[Any]) -> Any:
        """Items to a batch."""
        return batch_of(items)

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Loss:
        """The losses of both heads and their sum."""
        pictures, labels = batch
        parts = model(pictures, labels)
        told = {name: value.detach() for name, value in parts.items()}
        return Loss(sum(parts.values()), len(pictures), told)

    def examine(self, model: nn.Module, batches: Iterable[tuple[list[HeldOut], int]]) -> np.ndarray:
        """Counts of pixels by true and predicted class, `[classes, classes]`."""
        like = next(model.parameters())
        total = np.zeros((len(self.classes),) * 2, dtype=np.int64)
        for items, count in batches:
            for number, item in enumerate(items):  # all: sharded processes wait for each other
                frame, pixels = item.prepared.frame, item.prepared.pixels
                logits = model(pixels.to(like.device, like.dtype), resized=False)[0]
                if number >= count:
                    continue
                variant = Variant(logits, frame.size)
                found = combine([variant], frame.original_size, self.classes).labels
                total += confusion(found.cpu(), item.truth, len(self.classes)).numpy()
        return total

    def score(self, found: list[np.ndarray]) -> dict[str, float]:
        """Mean IoU over the classes that occur, and the share of pixels that are right."""
        matrix = torch.from_numpy(sum(found))
        right = matrix.diag().sum().item() / max(matrix.sum().item(), 1)
        return {"val_miou": mean_iou(matrix)[0], "val_pixel_accuracy": right}

    def per_class(self, found: list[np.ndarray]) -> dict[str, float]:
        """The IoU of every class that occurs."""
        values = mean_iou(torch.from_numpy(sum(found)))[1].tolist()
        named = zip(self.classes, values, strict=True)
        return {name: value for name, value in named if value == value}

    def finish(
        self,
        model: nn.Module,
        folder: Path,
        scores: Mapping[str, float],
        found: list[Any] | None,
        told: Mapping[str, str],
    ) -> None:
        """The folder `model`."""
        stated = self.stated(scores)
        save_pretrained(model, folder / MODEL, overwrite_card=True, **stated, training=told)

    def stated(self, scores: Mapping[str, float]) -> dict[str, Any]:
        """What the card says, in the words of `save_pretrained`."""
        words = {"val_miou": ("mean_iou", "Mean IoU"), "val_pixel_accuracy": ("accuracy", "Pixels")}
        data = self.statements.get("dataset") or "pictures"
        metrics = [
            Metric(words[name][0], value, data, words[name][1]) for name, value in scores.items()
        ]
        rest = {key: value for key, value in self.statements.items() if key != "dataset"}
        return {**rest, "metrics": metrics}

    def described(self) -> str:
        """How pictures are varied, in plain words."""
        low, high = self.views.ratios
        text = f"scaled by {low:g} to {high:g}, cut to {self.views.crop[0]} x {self.views.crop[1]}"
        text += f", flip {self.views.flip:g}"
        return text + (", photometric" if self.views.photometric else "")
