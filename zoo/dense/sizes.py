"""From a size's name and a user's changes to a dense model: what all the named functions share.

In: the backbone's function, the task's dilations, overrides. Out: a model with its
`pretrained_cfg`, or a TypeError that names the override it does not know.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import fields
from typing import Any, TypeVar

import torch

from natcupy.zoo.base import ImageModel
from natcupy.zoo.config import ModelConfig
from natcupy.zoo.dense.base import DenseModel
from natcupy.zoo.dense.config import DenseConfig

Model = TypeVar("Model", bound=DenseModel)
Pattern = tuple[tuple[int, ...], ...]  # dilations per level, repeated to the level's depth

# Larger pictures, larger dilations. DiNAT (arXiv 2209.15001), appendix; the released
# configurations.
SEGMENT: Pattern = ((1, 16), (1, 4, 1, 8), (1, 2, 1, 3, 1, 4), (1, 2))
SEGMENT_LARGE: Pattern = (
    (1, 20),
    (1, 5, 1, 10),
    (1, 2, 1, 3, 1, 4, 1, 5, 1, 2, 1, 3, 1, 4, 1, 5, 1, 5),
    (1, 2),
)
SEGMENT_S: Pattern = ((1, 16), (1, 8), (1, 2, 1, 3, 1, 4), (1, 2))
SEGMENT_S_LARGE: Pattern = ((1, 20), (1, 10), SEGMENT_LARGE[2], (1, 2))
DETECT: Pattern = ((1, 28), (1, 7, 1, 14), (1, 3, 1, 5, 1, 7), (1, 3))
DETECT_S: Pattern = ((1, 28), (1, 14), (1, 3, 1, 5, 1, 7), (1, 3))

_BACKBONE_FIELDS = tuple(
    field.name
    for field in fields(ModelConfig)
    if field.name not in ("family", "num_classes", "img_size", "out_indices")
)
_WIDTHS = {
    "upernet": {"num_classes": 150, "channels": 512, "aux_channels": 256},
    "mask_rcnn": {"num_classes": 80, "channels": 256, "fc_channels": 1024},
    "cascade_mask_rcnn": {"num_classes": 80, "channels": 256, "fc_channels": 1024},
}


def sized(
    model: type[Model],
    architecture: str,
    backbone: Callable[..., ImageModel],
    overrides: dict[str, Any],
    drop_path_rate: float,
    dilations: Pattern | None = None,
) -> Model:
    """Build a named size with some of its numbers changed.

    Args:
        model: the class to build.
        architecture: a key of `config.TASKS`.
        backbone: the zoo's function for the backbone.
        overrides: widths and classes of `DenseConfig`, and fields of the backbone's `ModelConfig`.
        drop_path_rate: of the backbone in this task.
        dilations: of the backbone in this task, repeated to each level's depth; None means 1.
    """
    name = f"{architecture}_{backbone.__name__.removesuffix('_21k')}"
    widths = _WIDTHS[architecture]
    _check_overrides(name, overrides, (*widths, *_BACKBONE_FIELDS))
    numbers = {"drop_path_rate": drop_path_rate, "dilations": None}
    numbers |= {key: value for key, value in overrides.items() if key in _BACKBONE_FIELDS}
    own = backbone_config(backbone, numbers)
    if dilations is not None and "dilations" not in overrides:
        own = own.replace(dilations=repeated(dilations, own.depths))
    heads = {key: overrides.get(key, value) for key, value in widths.items()}
    config = DenseConfig(architecture=architecture, backbone=own, **heads)
    return model(config, {"architecture": name})


def backbone_config(backbone: Callable[..., ImageModel], numbers: dict[str, Any]) -> ModelConfig:
    """The record of a feature backbone, without allocating it."""
    with torch.device("meta"):
        return backbone(features_only=True, num_classes=0, **numbers).config


def repeated(pattern: Pattern, depths: tuple[int, ...]) -> Pattern:
    """Each level's pattern over and over until it has one dilation per block."""
    rows = (pattern[min(level, len(pattern) - 1)] for level in range(len(depths)))
    return tuple(
        tuple(row[block % len(row)] for block in range(depth))
        for row, depth in zip(rows, depths, strict=True)
    )


def _check_overrides(name: str, overrides: dict[str, Any], known: tuple[str, ...]) -> None:
    for given in overrides:
        if given not in known:
            near = difflib.get_close_matches(given, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}."
            raise TypeError(f"{name.replace('_', '-')} has no option {given!r}; {hint}")
