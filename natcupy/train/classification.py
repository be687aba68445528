"""Training to name what is on a picture: the first `Task`.

In: a classifier, labelled pictures, a `TrainConfig`. Out: cross entropy, top-1 and top-5, a
confusion matrix, and at the end a folder that `natcupy.from_pretrained` reads.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from natcupy.data import Pictures, Source
from natcupy.hub import save_pretrained
from natcupy.train import plots, timm_parts
from natcupy.train.augment import Augment, describe
from natcupy.train.config import TrainConfig
from natcupy.train.task import Loss, Task, facts_of_pictures
from natcupy.zoo.preprocess import Preprocess

MODEL, CONFUSION_PNG = "model", "confusion.png"


class Classification(Task):
    """One label for every picture.

    Args:
        recipe: how the model's pictures are made.
        train, val: labelled pictures with the same classes; `val` None examines nothing.
        config: augmentation, mixing, label smoothing.
        statements: for the card, as `natcupy.hub.save_pretrained` takes them.
    """

    name = "classification"
    metric = "val_accuracy"
    shown = ("train_accuracy", "val_loss", "val_accuracy")

    def __init__(
        self,
        recipe: Preprocess,
        train: Source,
        val: Source | None,
        config: TrainConfig,
        statements: Mapping[str, Any] | None = None,
    ) -> None:
        self.classes = tuple(train.classes)
        self.augment = Augment(recipe, config)
        self.training_items = Pictures(train, self.augment)
        self.held_out_items = None if val is None else Pictures(val, recipe)
        self.smoothing = config.label_smoothing
        self.mixer = timm_parts.mixer(config, len(self.classes))
        self.statements = dict(statements or {})

    def facts(self) -> dict[str, Any]:
        """What a continuation must share: the classes, which pictures there are and how many."""
        shared = facts_of_pictures(self.classes, self.training_items, self.held_out_items)
        return {**super().facts(), **shared}

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Loss:
        """Cross entropy against labels, smoothed, or against those of mixed pictures."""
        pictures, labels = batch
        if self.mixer is None:
            logits = model(pictures)
            total = F.cross_entropy(logits.float(), labels, label_smoothing=self.smoothing)
        else:
            pictures, targets = self.mixer(pictures, labels)
            logits = model(pictures)
            total = F.cross_entropy(logits.float(), targets)
            labels = targets.argmax(-1)
        right = (logits.detach().argmax(-1) == labels).float().mean()
        return Loss(total, len(labels), {"accuracy": right})

    def examine(
        self, model: nn.Module, batches: Iterable[tuple[tuple[Tensor, Tensor], int]]
    ) -> dict[str, np.ndarray]:
        """Per picture: label, answer, loss, whether the label is among the first five."""
        rows = []
        for (pictures, labels), count in batches:
            logits, labels = model(pictures).float()[:count], labels[:count]
            best = logits.topk(min(5, logits.shape[-1])).indices
            losses = F.cross_entropy(logits, labels, reduction="none")
            near = (best == labels[:, None]).any(-1)
            rows.append(torch.stack([labels, best[:, 0], losses, near], dim=1).double().cpu())
        table = torch.cat(rows).numpy() if rows else np.zeros((0, 4))
        names = ("label", "answer", "loss", "near")
        return dict(zip(names, table.T, strict=True))

    def score(self, found: list[dict[str, np.ndarray]]) -> dict[str, float]:
        """Mean loss, top-1 and, beyond five classes, top-5."""
        every = _joined(found)
        scores = {
            "val_loss": float(every["loss"].mean()),
            "val_accuracy": float((every["label"] == every["answer"]).mean()),
        }
        if len(self.classes) > 5:
            scores["val_top5"] = float(every["near"].mean())
        return scores

    def confusion(self, found: list[dict[str, np.ndarray]]) -> np.ndarray:
        """`[classes, classes]`, how many pictures of each class (row) got each answer (column)."""
        every, count = _joined(found), len(self.classes)
        cells = every["label"].astype(np.int64) * count + every["answer"].astype(np.int64)
        return np.bincount(cells, minlength=count * count).reshape(count, count)

    def finish(
        self,
        model: nn.Module,
        folder: Path,
        scores: Mapping[str, float],
        found: list[Any] | None,
        told: Mapping[str, str],
    ) -> None:
        """The folder `model`, and a picture of the confusion matrix."""
        save_pretrained(
            model, folder / MODEL, overwrite_card=True, **self.stated(scores), training=told
        )
        if found is not None:
            plots.confusion(self.confusion(found), self.classes, folder / CONFUSION_PNG)

    def stated(self, scores: Mapping[str, float]) -> dict[str, Any]:
        """What the card says, in the words of `save_pretrained`."""
        names = {"val_accuracy": "accuracy", "val_top5": "top_5_accuracy"}
        metrics = {names[name]: value for name, value in scores.items() if name in names}
        return {**self.statements, "metrics": metrics}

    def described(self) -> str:
        """How pictures are varied, in plain words."""
        return describe(self.augment)


def _joined(found: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([part[name] for part in found]) for name in found[0]}
