"""From a size's name and a user's changes to a model: what all the size functions share.

In: the numbers a size states, and overrides. Out: a model with its `pretrained_cfg`, or a TypeError
that names the override it does not know.
"""

from __future__ import annotations

import difflib
from dataclasses import fields
from typing import Any, TypeVar

from natcupy.zoo.base import ImageModel
from natcupy.zoo.config import PATCH_SIZE, SINGLE_LEVEL, ModelConfig
from natcupy.zoo.published import PUBLISHED

Model = TypeVar("Model", bound=ImageModel)

_FIELDS = tuple(field.name for field in fields(ModelConfig))
_OPTIONS = ("features_only", "global_pool")


def sized(
    model: type[Model],
    name: str,
    overrides: dict[str, Any],
    dilated_for: int | None = None,
    **numbers: Any,
) -> Model:
    """Build a named size with some of its numbers changed.

    Args:
        model: the class to build.
        name: the size's name, a key of `PUBLISHED`.
        overrides: fields of `ModelConfig`, and `features_only` (a backbone that returns feature
            maps; `out_indices` alone says so too) and `global_pool` ("avg" or "").
        dilated_for: for DiNAT, the side of the pictures that its dilations are chosen for.
        numbers: the size's own fields.
    """
    _check_overrides(name, overrides)
    changes = dict(overrides)
    features_only = changes.pop("features_only", None)
    global_pool = changes.pop("global_pool", None)
    config = ModelConfig(**{**numbers, **changes})
    if dilated_for is not None and "dilations" not in overrides:
        config = config.replace(dilations=alternating_dilations(config, dilated_for))
    config = with_outputs(config, features_only)
    built = model(config, _pretrained_cfg(name, config))
    if global_pool is not None:
        built.set_global_pool(global_pool)
    return built


def alternating_dilations(config: ModelConfig, img_size: int) -> tuple[tuple[int, ...], ...]:
    """DiNAT's rule: blocks alternate between dilation 1 and the largest that fits the level's map.

    `img_size` is the side of the pictures; a config of fixed size says it itself.
    """
    side = (config.img_size or img_size) // PATCH_SIZE[config.family]
    rows = []
    for level, depth in enumerate(config.depths):
        largest = max((side >> level) // config.kernel_size, 1)
        rows.append(tuple(largest if block % 2 else 1 for block in range(depth)))
    return tuple(rows)


def _check_overrides(name: str, overrides: dict[str, Any]) -> None:
    known = (*_FIELDS, *_OPTIONS)
    for given in overrides:
        if given not in known or given == "family":
            near = difflib.get_close_matches(given, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}."
            raise TypeError(f"{name.replace('_', '-')} has no option {given!r}; {hint}")


def with_outputs(config: ModelConfig, features_only: bool | None) -> ModelConfig:
    """The config with the stages that `features_only=True` means where it names none itself."""
    if features_only is False and config.out_indices is not None:
        raise ValueError(
            f"out_indices belong to a feature backbone, got out_indices={config.out_indices} with "
            f"features_only=False; pass features_only=True."
        )
    if not features_only or config.out_indices is not None:
        return config
    # Every level, or where there is a single level its last block.
    return config.replace(out_indices=1 if config.family in SINGLE_LEVEL else config.num_stages)


def _pretrained_cfg(name: str, config: ModelConfig) -> dict[str, Any]:
    facts = PUBLISHED[name]
    side = config.img_size or facts.img_size
    return {
        "architecture": name,
        "tag": facts.tag,
        "input_size": (config.in_chans, side, side),
        "crop_pct": facts.crop_pct,
    }
