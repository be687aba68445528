"""Rows of a classifier that go on where a model is finetuned to other classes: those it can name.

In: the classes of the data, the label names of the model, its classifiers' tensors before and now.
Out: the rows of classes with one and the same name, copied; and in words, which these are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from natcupy.hub.errors import some
from natcupy.inference.classes import alike

Places = dict[int, int]  # class of the data -> class of the model


def known(classes: Sequence[str], labels: Sequence[str] | None, count: int) -> Places:
    """Which classes the model's rows are known to stand for.

    Args:
        classes: of the data.
        labels: the model's, where its weights came with names.
        count: the model's rows.
    """
    return alike(classes, labels) if labels is not None and len(labels) == count else {}


@torch.no_grad()
def take_over(
    made: Mapping[str, Tensor], had: Mapping[str, Tensor], places: Places, now: int, before: int
) -> None:
    """Copy the rows of known classes, in place.

    Args:
        made, had: the classifiers' tensors by name: of `now` classes, and of `before`. A class has
            one row, or four where boxes are moved; rows behind those of all classes stand for the
            background.
        places: as `known` gives them; without any, nothing is copied.
    """
    if not places:
        return
    for name, new in made.items():
        old, each = had[name], 4 if ".fc_reg." in name else 1
        for place, index in places.items():
            new[each * place : each * (place + 1)] = old[each * index : each * (index + 1)]
        new[each * now :] = old[each * before :]


def told(classes: Sequence[str], places: Places, before: int) -> str:
    """What becomes of a classifier of `before` classes."""
    if not places:
        return (
            f"the classifier begins anew: the data's classes ({some(classes)}) are not the model's "
            f"{before}."
        )
    kept = some(classes[place] for place in sorted(places))
    fresh = [name for place, name in enumerate(classes) if place not in places]
    more = f" and begins anew for {len(fresh)}: {some(fresh)}" if fresh else ""
    return f"the classifier keeps its rows of {len(places)} classes by name ({kept}){more}."
