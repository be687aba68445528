"""What a model is trained for: the loss of a batch, how it is examined, what is left at the end.

In: a model and data. Out: what the engine asks for. The engine knows nothing else of a task, and a
task nothing of processes, checkpoints or schedules. A new task (segmentation, detection ...)
derives from `Task`, gives `training_items`, `loss`, `examine` and `score`, and is handed to
`natcupy.train.train(model, task, config)`; `finish` then writes what its users want to have.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

PICTURES = "names and labels of the pictures"  # a fact of a run
_SAMPLES = 16  # pictures of a set, at most, whose content is looked at


@dataclass
class Loss:
    """What a batch gives.

    Attributes:
        total: scalar to minimise, the mean over the batch.
        count: items in the batch.
        parts: further scalars to log, means over the batch, without gradient (say "accuracy").
    """

    total: Tensor
    count: int
    parts: dict[str, Tensor] = field(default_factory=dict)


class Task(ABC):
    """One kind of training.

    Attributes:
        name: in logs and cards.
        metric: the score by which epochs are compared; more is better, and of equals the one with
            the lower loss (`is_better`).
        fewest: items that a forward pass in training must have.
        why_fewest: the reason, where it is more than one.
        shown: names of what the bar and the curves show, from `Loss.parts` and `score`.
        training_items, held_out_items: indexable, with a length; items come from worker processes
            and may draw from Python's, NumPy's and torch's generators, which are set for each item.
            Without held-out items (None) the last weights are kept.
    """

    name: str
    metric: str
    shown: tuple[str, ...] = ()
    fewest: int = 1
    why_fewest: str = ""
    training_items: Any
    held_out_items: Any | None

    def facts(self) -> dict[str, Any]:
        """JSON values that a continued run must share with the run it continues."""
        return {"training items": len(self.training_items)}

    def is_better(self, row: Mapping[str, Any], best: Mapping[str, Any] | None) -> bool:
        """Whether the epoch of one row of the log is better than that of another.

        By `metric`; equals by the lower `val_loss`, or by the lower `train_loss` where the task
        has no other. Of epochs that are equal in that too the first is kept. A row that was not
        examined is never better.
        """
        score = row.get(self.metric)
        if score is None or best is None or score != best[self.metric]:
            return score is not None and (best is None or score > best[self.metric])
        loss = "val_loss" if "val_loss" in row and "val_loss" in best else "train_loss"
        return row[loss] < best[loss]

    def collate(self, items: list[Any]) -> Any:
        """Items to a batch, in the worker."""
        return torch.utils.data.default_collate(items)

    def to_device(self, batch: Any, device: torch.device) -> Any:
        """The batch, with its tensors on the device."""
        return _moved(batch, device)

    @abstractmethod
    def loss(self, model: nn.Module, batch: Any) -> Loss:
        """The loss of a batch, in training mode and under autocast."""

    @abstractmethod
    def examine(self, model: nn.Module, batches: Iterable[tuple[Any, int]]) -> Any:
        """What one process found on its share: lists, numbers, arrays; gathered as it is.

        Batches come with the number of their first items that count; the model is in eval mode.
        """

    @abstractmethod
    def score(self, found: list[Any]) -> dict[str, float]:
        """The scores of what all processes found, `metric` among them."""

    @abstractmethod
    def finish(
        self,
        model: nn.Module,
        folder: Path,
        scores: Mapping[str, float],
        found: list[Any] | None,
        told: Mapping[str, str],
    ) -> None:
        """On the first process, after the last epoch: write the model and what belongs to it.

        Args:
            model: on the CPU, in eval mode, with the weights to keep.
            folder: of the run.
            scores: of these weights on the held-out items; empty without any.
            found: what `examine` gave for them.
            told: data, recipe and versions, as plain text for a card.
        """


def facts_of_pictures(
    classes: Sequence[str], training_items: Any, held_out_items: Any | None
) -> dict[str, Any]:
    """What a continuation must share: the classes, which pictures there are and how many.

    Args:
        classes: label names.
        training_items, held_out_items: as of a `Task`, each over the data set `source`.
    """
    held_out = [] if held_out_items is None else [held_out_items.source]
    return {
        "held-out items": sum(map(len, held_out)),
        "classes": list(classes),
        PICTURES: _fingerprint(training_items.source, *held_out),
    }


def _fingerprint(*sets: Any) -> str:
    """A hash over the pictures' names and, where each has one, their labels.

    The names are those within a set, so its folder may be moved between two runs. Rows of a data
    set have numbers alone, so that the content of some is hashed, too.
    """
    digest = hashlib.sha256()
    for pictures in sets:
        label = getattr(pictures, "label", lambda index: "")
        for index in range(len(pictures)):
            line = f"{label(index)}/{pictures.key(index)}\0"
            digest.update(line.encode("utf-8", "surrogateescape"))
        content = getattr(pictures, "content", lambda index: b"")
        for index in range(0, len(pictures), len(pictures) // _SAMPLES + 1):
            digest.update(content(index))
        digest.update(b"\n")
    return digest.hexdigest()[:16]


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, Mapping):
        return {key: _moved(each, device) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_moved(each, device) for each in value)
    return value
