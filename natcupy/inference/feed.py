"""Pictures made ready in batches, ahead of the model, by workers; and the model over a batch.

In: a `PictureSet`, a recipe, and which pictures make a batch. Out: `Batch`es in that order. A
picture that cannot be read is reported in its batch and stops nothing.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from natcupy.data import PictureSet, why
from natcupy.data.workers import leave_with_parent, usual_workers
from natcupy.hub import from_pretrained
from natcupy.zoo import ImageModel
from natcupy.zoo.preprocess import Preprocess

FEW = 64  # pictures: starting workers takes longer than preparing these


@dataclass(frozen=True)
class Batch:
    """Some pictures, ready.

    Attributes:
        number: which batch.
        rows: the pictures' indices.
        pictures: `[len(rows), C, H, W]` float32.
        bad: (index, reason) of those that could not be read.
    """

    number: int
    rows: list[int]
    pictures: Tensor
    bad: list[tuple[int, str]]

    def pin_memory(self) -> Batch:
        """The same in memory that a GPU copies from directly; called by the loader."""
        return replace(self, pictures=self.pictures.pin_memory())


class _Ready(Dataset):
    """Whole batches by their number."""

    def __init__(
        self, pictures: PictureSet, recipe: Preprocess, rows_of: Callable[[int], range]
    ) -> None:
        self._pictures, self._recipe, self._rows_of = pictures, recipe, rows_of

    def __getitem__(self, number: int) -> Batch:
        with (
            warnings.catch_warnings()
        ):  # of large pictures; giant ones are refused, which is enough
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            return self._batch(number)

    def _batch(self, number: int) -> Batch:
        rows, ready, bad = [], [], []
        for index in self._rows_of(number):
            try:
                ready.append(self._recipe(self._pictures.decode(index)))
            except Exception as error:  # decoders raise nearly anything for broken data
                bad.append((index, why(error)))
            else:
                rows.append(index)
        pictures = torch.cat(ready) if ready else torch.empty(0, *self._recipe.input_size)
        return Batch(number, rows, pictures, bad)


def feed(
    pictures: PictureSet,
    recipe: Preprocess,
    rows_of: Callable[[int], range],
    numbers: Sequence[int],
    *,
    workers: int,
    pin: bool = False,
) -> Iterator[Batch]:
    """Batches in order.

    Args:
        pictures: where they come from.
        recipe: makes `[1, C, H, W]` of one.
        rows_of: the pictures of a batch, by its number; picklable where workers are spawned.
        numbers: which batches.
        workers: processes that prepare batches ahead; 0: this one does, when asked.
        pin: for faster copies to a GPU.
    """
    loader = DataLoader(
        _Ready(pictures, recipe, rows_of),
        batch_size=None,
        sampler=numbers,
        num_workers=workers,
        prefetch_factor=2 if workers else None,
        pin_memory=pin,
        collate_fn=_as_it_is,
        worker_init_fn=leave_with_parent,
    )
    yield from loader


def _as_it_is(batch: Batch) -> Batch:
    return batch


def pick_workers(wanted: int | None, count: int, processes: int = 1) -> int:
    """How many workers to start for so many pictures, beside `processes` like this on the machine.

    Raises ValueError for a negative number.
    """
    if wanted is not None:
        if wanted < 0:
            raise ValueError(f"workers must be at least 0, got {wanted}.")
        return wanted
    return 0 if count <= FEW else usual_workers(processes)


def loaded(model: ImageModel | str | os.PathLike[str]) -> ImageModel:
    """The model itself, or the one of that name. Raises ValueError for another kind of model."""
    if isinstance(model, str | os.PathLike):
        model = from_pretrained(model)
    if not isinstance(model, ImageModel):
        raise ValueError(
            "evaluate and predict take models that name whole pictures, got "
            f"{type(model).__name__}."
        )
    return model.eval()


def recipe_of(model: ImageModel) -> Preprocess:
    """How a model wants its pictures."""
    return Preprocess.from_pretrained_cfg(model.pretrained_cfg, model.config)


def placed(model: ImageModel) -> dict[str, Any]:
    """Device and dtype of a model, as `Tensor.to` takes them."""
    like = next(model.parameters())
    return {"device": like.device, "dtype": like.dtype}


def warm(model: ImageModel, batch_size: int) -> None:
    """Run the model once, so that kernels are there and what cannot run says so at once."""
    size = recipe_of(model).input_size
    outputs(model, torch.zeros(batch_size, *size))


@torch.inference_mode()
def outputs(model: ImageModel, pictures: Tensor) -> tuple[Tensor, Tensor]:
    """Logits `[B, num_classes]` and pooled features `[B, num_features]`, float32, on the CPU."""
    where = placed(model)
    maps = model.forward_features(pictures.to(**where, non_blocking=True))
    pooled = model.forward_head(maps, pre_logits=True)
    return model.get_classifier()(pooled).float().cpu(), pooled.float().cpu()
