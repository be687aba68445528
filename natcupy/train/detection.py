"""Training to find objects: a `Task`.

In: a Mask R-CNN or its cascade, pictures in COCO's format, a `TrainConfig`. Out: the losses of all
heads, COCO's average precision of boxes and masks on held-out pictures, and at the end a folder
that `natcupy.from_pretrained` reads.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from natcupy.data.coco import CocoPictures
from natcupy.data.coco_ap import as_results, average_precision
from natcupy.data.dense_augment import DetectionViews
from natcupy.hub import Metric, save_pretrained
from natcupy.train.config import TrainConfig
from natcupy.train.dense_items import HeldOut, HeldOutPictures, ObjectViews, batch_of
from natcupy.train.task import Loss, Task, facts_of_pictures
from natcupy.zoo.dense.images import Frame, Recipe, stack
from natcupy.zoo.dense.targets import Objects

MODEL = "model"


class Detection(Task):
    """Boxes, classes and masks of objects.

    Args:
        recipe: how the model's pictures are made at test time.
        train, val: pictures with the same classes; `val` None examines nothing.
        config: `flip`.
        statements: for the card, as `natcupy.hub.save_pretrained` takes them.
        views: how pictures are varied; None: as in the papers, scaled to the recipe's size.
    """

    name = "detection"
    metric = "val_box_ap"
    shown = ("train_loss_cls", "train_loss_mask", "val_box_ap", "val_mask_ap")

    def __init__(
        self,
        recipe: Recipe,
        train: CocoPictures,
        val: CocoPictures | None,
        config: TrainConfig,
        statements: Mapping[str, Any] | None = None,
        views: DetectionViews | None = None,
    ) -> None:
        self.classes = tuple(train.classes)
        usual = DetectionViews.of_size(recipe.long_side, recipe.short_side)
        flip = 0.5 if config.flip is None else config.flip
        self.views = views or replace(usual, flip=flip)
        self.training_items = ObjectViews(train, recipe, self.views)
        self.held_out_items = None if val is None else HeldOutPictures(val, recipe)
        self.val = val
        self.statements = dict(statements or {})

    def facts(self) -> dict[str, Any]:
        """What a continuation must share: the classes, which pictures there are and how many."""
        shared = facts_of_pictures(self.classes, self.training_items, self.held_out_items)
        return {**super().facts(), **shared}

    def collate(self, items: list[Any]) -> Any:
        """Items to a batch."""
        return batch_of(items)

    def loss(self, model: nn.Module, batch: tuple[Tensor, list[Frame], list[Objects]]) -> Loss:
        """The losses of all heads and their sum; boxes are sampled with torch's own generator."""
        pictures, frames, objects = batch
        parts = model(pictures, frames, objects)
        told = {name: value.detach() for name, value in parts.items()}
        return Loss(sum(parts.values()), len(pictures), told)

    def examine(
        self, model: nn.Module, batches: Iterable[tuple[list[HeldOut], int]]
    ) -> list[dict[str, Any]]:
        """The detections of one process's share, in COCO's result format."""
        like = next(model.parameters())
        results = []
        for items, count in batches:
            for number, item in enumerate(items):  # all: sharded processes wait for each other
                pixels, frames = stack([item.prepared])
                found = model(pixels.to(like.device, like.dtype), frames)[0]
                if number < count:
                    results += as_results(found, self.val, item.index)
        return results

    def score(self, found: list[list[dict[str, Any]]]) -> dict[str, float]:
        """COCO's numbers, for boxes and masks, as fractions."""
        results = [each for part in found for each in part]
        scores = average_precision(self.val, results)
        return {f"val_{name}": value for name, value in scores.items()}

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
        words = {"val_box_ap": "Box AP", "val_box_ap50": "Box AP50", "val_mask_ap": "Mask AP"}
        data = self.statements.get("dataset") or "pictures"
        metrics = [
            Metric("mean_average_precision", scores[name], data, word)
            for name, word in words.items()
            if name in scores
        ]
        rest = {key: value for key, value in self.statements.items() if key != "dataset"}
        return {**rest, "metrics": metrics}

    def described(self) -> str:
        """How pictures are varied, in plain words."""
        sides = self.views.short_sides
        text = f"shorter side {sides[0]} to {sides[-1]} within {self.views.long_side}"
        cut = ", half of them cut out first" if self.views.cut_short_sides else ""
        return f"{text}{cut}, flip {self.views.flip:g}"
