"""A torch `Dataset` over a `Source`.

In: a source, and what makes a tensor of a picture. Out: (tensor, label) by index.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from natcupy.data.files import why
from natcupy.data.source import DataError, Source
from natcupy.zoo.preprocess import Preprocess


class Pictures(torch.utils.data.Dataset):
    """Pictures made ready, with their labels. Picklable if the transform is.

    Args:
        source: where they come from.
        transform: a model's `Preprocess` recipe, whose batch axis is dropped; or any function of a
            PIL picture: of one "RGB" or "L", or, like a recipe, of one as it is stored if it has
            `takes_stored` set.

    Items are (what the transform gives, label). Raises DataError, naming the picture, where one
    cannot be read.
    """

    def __init__(self, source: Source, transform: Callable[[Any], Any]) -> None:
        self.source, self.transform = source, transform

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        recipe = isinstance(self.transform, Preprocess)
        stored = recipe or getattr(self.transform, "takes_stored", False)
        picture = self.source.open(index) if stored else self.source.picture(index)
        try:
            made = self.transform(picture)
        except Exception as error:  # "ink" refuses a blank picture, for one
            raise DataError(f"{self.source.where(index)}: {why(error)}") from None
        return made[0] if recipe else made, self.source.label(index)
