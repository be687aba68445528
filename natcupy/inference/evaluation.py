"""How right a model is on labelled pictures.

In: a classifier and a `Source`. Out: `Result`, the same for any number of processes and workers:
batches are cut from the data before they are handed out, every picture is looked at by exactly one
process, and sums are kept in integers.
"""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from natcupy.data import Data, DataError, Source, find_split
from natcupy.inference import classes, ranks
from natcupy.inference.feed import feed, loaded, outputs, pick_workers, placed, recipe_of, warm
from natcupy.zoo import ImageModel

LOSS_UNIT = 2.0**-30  # losses are summed as multiples of this
LARGEST_LOSS = 2.0**20  # beyond this the sum is given up: it would not fit


@dataclass(frozen=True)
class ClassResult:
    """One class: how many pictures, how many named right by the first answer and by five."""

    name: str
    pictures: int
    right: int
    right5: int


@dataclass(frozen=True)
class Result:
    """What an evaluation found.

    Attributes:
        pictures: how many were looked at; `bad` ones are not among them.
        top1: share whose class is the model's first answer.
        top5: share whose class is among five answers; None where the model has five or fewer.
        loss: mean cross-entropy in nats; NaN where one is no number or beyond 2^20.
        classes: the data's classes with their own counts.
        bad: (where, reason) of pictures that could not be read.
        seconds: wall time, without loading and warming the model.
        pictures_per_second: of all processes together.
        processes, workers, batch_size: how it was run.
        data: name of the data.
        notes: how classes were matched, what was left out.
    """

    pictures: int
    top1: float
    top5: float | None
    loss: float
    classes: tuple[ClassResult, ...]
    bad: tuple[tuple[str, str], ...]
    seconds: float
    pictures_per_second: float
    processes: int
    workers: int
    batch_size: int
    data: str = ""
    notes: tuple[str, ...] = ()


@dataclass
class _Counts:
    """Integers of one process: per class `[3, classes]`, and `[loss, lost]`."""

    per_class: Tensor
    losses: Tensor

    def add(self, logits: Tensor, labels: Tensor, places: Tensor) -> None:
        """Count a batch: logits `[B, C]`, the model's class and the data's class of each."""
        own = logits.gather(1, labels[:, None])
        index = torch.arange(logits.shape[1])
        ahead = (logits > own) | ((logits == own) & (index < labels[:, None]))
        finite = logits.isfinite().all(1)
        position = ahead.sum(1).where(finite, logits.shape[1])
        for row, counted in enumerate((torch.ones_like(finite), position < 1, position < 5)):
            self.per_class[row] += torch.bincount(
                places[counted], minlength=self.per_class.shape[1]
            )
        losses = logits.double().logsumexp(1) - own[:, 0].double()
        good = losses < LARGEST_LOSS  # not true of NaN
        self.losses[0] += (losses[good] / LOSS_UNIT).round().long().sum()
        self.losses[1] += (~good).sum()


def evaluate(
    model: ImageModel | str | os.PathLike[str],
    source: Source | Data,
    *,
    split: str | None = None,
    batch_size: int = 64,
    workers: int | None = None,
    class_map: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> Result:
    """Top-1, top-5, loss, and the same per class.

    Under torchrun every process calls this and gets the whole result.

    Args:
        model: a classifier in eval mode, on its device, in its dtype; or a name for
            `from_pretrained`.
        source: labelled pictures, or data as `natcupy.data.find_split` understands it.
        split: which part of such data.
        batch_size: pictures at a time.
        workers: processes that prepare pictures; default by the number of cores, 0 for none.
        class_map: a file that says which class of the model each class of the data is; see
            `natcupy.inference.classes.match`.
        progress: show a bar where stderr is a terminal.

    Raises DataError (a ValueError) for data that cannot be used, ValueError for a model without
    classes.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    notes: tuple[str, ...] = ()
    name = ""
    if not isinstance(source, Source):
        part = find_split(source, split)
        source, name, notes = part.source, part.name, part.notes
    elif split is not None:
        raise ValueError("split chooses a part of a folder or dataset, got it with a Source.")
    model = loaded(model)
    if model.num_classes < 1 or model.config.out_indices is not None or model.global_pool != "avg":
        raise ValueError(f"evaluation needs a classifier, got {model.name} without classes.")
    if not len(source):
        raise DataError(f"evaluation needs pictures, got none in {name or 'the source'}.")
    mapping, how = classes.match(
        source.classes,
        model.pretrained_cfg.get("label_names"),
        model.num_classes,
        Path(class_map) if class_map is not None else None,
        empty=np.flatnonzero(source.counts() == 0).tolist(),
    )
    group = ranks.group(placed(model)["device"])
    found = _run(model, source, torch.tensor(mapping), batch_size, workers, progress, group)
    return Result(**found, data=name, notes=(*notes, how))


def _run(
    model: ImageModel,
    source: Source,
    mapping: Tensor,
    batch_size: int,
    workers: int | None,
    progress: bool,
    group: ranks.Group,
) -> dict[str, Any]:
    count = -(-len(source) // batch_size)
    mine = range(group.rank, count, group.world)
    workers = pick_workers(workers, len(source) // group.world, ranks.local_world_size())
    warm(model, min(batch_size, len(source)))
    counts = _Counts(
        torch.zeros(3, len(source.classes), dtype=torch.long), torch.zeros(2, dtype=torch.long)
    )
    bad: list[tuple[int, str]] = []
    begun = time.perf_counter()
    rows_of = partial(rows_of_batch, batch_size, len(source))
    pin = placed(model)["device"].type == "cuda"
    quiet = None if progress and group.rank == 0 else True  # None: where stderr is a terminal
    with tqdm(total=sum(len(rows_of(n)) for n in mine), unit="picture", disable=quiet) as bar:
        for batch in feed(source, recipe_of(model), rows_of, mine, workers=workers, pin=pin):
            bad += batch.bad
            if batch.rows:
                places = torch.from_numpy(source.labels[batch.rows])
                counts.add(outputs(model, batch.pictures)[0], mapping[places], places)
            bar.update(len(batch.rows) + len(batch.bad))
    per_class = group.sum(counts.per_class)
    loss, lost = group.sum(counts.losses).tolist()
    bad = sorted(entry for part in group.gather(bad) for entry in part)
    seconds = time.perf_counter() - begun
    total, right, right5 = per_class.sum(1).tolist()
    if not total:
        raise DataError(
            f"none of the {len(source):,} pictures could be read; the first: "
            f"{source.where(bad[0][0])}: {bad[0][1]}."
        )
    return {
        "pictures": total,
        "top1": right / total,
        "top5": right5 / total if model.num_classes > 5 else None,
        "loss": math.nan if lost else loss * LOSS_UNIT / total,
        "classes": tuple(
            ClassResult(name, *numbers)
            for name, numbers in zip(source.classes, per_class.T.tolist(), strict=True)
        ),
        "bad": tuple((source.where(index), reason) for index, reason in bad),
        "seconds": seconds,
        "pictures_per_second": total / seconds,
        "processes": group.world,
        "workers": workers,
        "batch_size": batch_size,
    }


def rows_of_batch(batch_size: int, total: int, number: int) -> range:
    """The pictures of a batch when `total` pictures are cut into batches."""
    return range(number * batch_size, min((number + 1) * batch_size, total))
