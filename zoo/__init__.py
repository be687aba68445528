"""The model zoo: NAT, DiNAT, DiNAT-s and the isotropic models, by name.

In: a name and overrides. Out: a model, or a list of names. The zoo knows no weights and no network:
`create_model(..., pretrained=True)` hands over to `natcupy.hub`. Segmentation and detection models
live in `natcupy.zoo.dense`; their names work here too and load that room when they are used.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch

from natcupy.zoo.base import ImageModel, _hub
from natcupy.zoo.config import ConfigError, ModelConfig, num_parameters
from natcupy.zoo.dinat_s import (
    DiNATS,
    dinat_s_base,
    dinat_s_large,
    dinat_s_large_21k,
    dinat_s_large_384,
    dinat_s_small,
    dinat_s_tiny,
)
from natcupy.zoo.flops import Macs, count_macs
from natcupy.zoo.isotropic import (
    Isotropic,
    dinat_isotropic_base,
    dinat_isotropic_small,
    nat_isotropic_base,
    nat_isotropic_small,
    vitrpb_base,
    vitrpb_small,
)
from natcupy.zoo.nat import (
    NAT,
    dinat_base,
    dinat_large,
    dinat_large_21k,
    dinat_large_21k_11x11,
    dinat_large_384,
    dinat_large_384_11x11,
    dinat_mini,
    dinat_small,
    dinat_tiny,
    nat_base,
    nat_mini,
    nat_small,
    nat_tiny,
)
from natcupy.zoo.preprocess import Preprocess
from natcupy.zoo.published import PUBLISHED, Published

if TYPE_CHECKING:
    from natcupy.zoo.dense.base import DenseModel

TASKS = ("classification", "segmentation", "detection")

MODELS: dict[str, Callable[..., ImageModel]] = {
    "nat_mini": nat_mini,
    "nat_tiny": nat_tiny,
    "nat_small": nat_small,
    "nat_base": nat_base,
    "dinat_mini": dinat_mini,
    "dinat_tiny": dinat_tiny,
    "dinat_small": dinat_small,
    "dinat_base": dinat_base,
    "dinat_large": dinat_large,
    "dinat_large_384": dinat_large_384,
    "dinat_large_384_11x11": dinat_large_384_11x11,
    "dinat_large_21k": dinat_large_21k,
    "dinat_large_21k_11x11": dinat_large_21k_11x11,
    "dinat_s_tiny": dinat_s_tiny,
    "dinat_s_small": dinat_s_small,
    "dinat_s_base": dinat_s_base,
    "dinat_s_large": dinat_s_large,
    "dinat_s_large_384": dinat_s_large_384,
    "dinat_s_large_21k": dinat_s_large_21k,
    "nat_isotropic_small": nat_isotropic_small,
    "nat_isotropic_base": nat_isotropic_base,
    "dinat_isotropic_small": dinat_isotropic_small,
    "dinat_isotropic_base": dinat_isotropic_base,
    "vitrpb_small": vitrpb_small,
    "vitrpb_base": vitrpb_base,
}

_DENSE = ("upernet_", "mask_rcnn_", "cascade_mask_rcnn_")

_CLASSES: dict[str, type[ImageModel]] = {
    "nat": NAT,
    "dinat_s": DiNATS,
    "isotropic": Isotropic,
    "vitrpb": Isotropic,
}


def build_model(config: ModelConfig, pretrained_cfg: dict[str, Any] | None = None) -> ImageModel:
    """A model from its numbers; `pretrained_cfg` adds or replaces facts about its weights."""
    return _CLASSES[config.family](config, pretrained_cfg)


def create_model(name: str, pretrained: bool = False, **overrides: Any) -> ImageModel | DenseModel:
    """A model by name: `create_model("nat-tiny", num_classes=10)`.

    Args:
        name: a name of `list_models(task=None)`, with hyphens or underscores, and perhaps its
            weights' tag ("nat-tiny.in1k"). Of a segmentation or detection model
            ("upernet-nat-tiny"), `natcupy.zoo.dense.create_dense_model` explains the overrides.
        pretrained: load released weights; then `natcupy.hub.from_pretrained(name, **overrides)`
            does the work and `name` may be anything it knows.
        overrides: any field of `ModelConfig` (num_classes, in_chans, drop_path_rate, kernel_size,
            dilations, ...), `features_only=True` and/or `out_indices` for a backbone that returns
            feature maps, `global_pool` ("avg" or "").

    Raises ValueError for a name or tag that does not exist, with the nearest that do; TypeError for
    an unknown override; ConfigError for a bad value.
    """
    if pretrained:
        return _hub().from_pretrained(name, **overrides)
    if _is_dense(name):
        return _dense().create_dense_model(_plain(name), **overrides)
    if _is_bundled(name):
        return _hub().pretrained.create_bundled(name, **overrides)
    return MODELS[_resolve(name)](**overrides)


def model_config(name: str, **overrides: Any) -> ModelConfig:
    """The numbers of a named model, without allocating it."""
    with torch.device("meta"):
        return create_model(name, **overrides).config


def list_models(
    pattern: str | Sequence[str] = "*",
    *,
    pretrained: bool = False,
    exclude_filters: str | Sequence[str] = (),
    task: str | None = "classification",
) -> list[str]:
    """Sorted names that match one of the wildcard patterns and none of those excluded.

    Names are spelled with underscores, as Python and timm do (`nat_tiny`); the command line and the
    README write `nat-tiny`, and every call takes both. Patterns may use either, too:
    `list_models("dinat-s*")`.

    Args:
        pattern, exclude_filters: one wildcard pattern, or several.
        pretrained: only names whose weights `create_model(name, pretrained=True)` finds by itself,
            with their tags.
        task: "classification" (the zoo's families), "segmentation" ("upernet_nat_mini", ...) or
            "detection"; None for everything that `create_model` takes: those of all tasks, and
            "nat_digits", the small model inside the package.
    """
    if task is not None and task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)} or None, got {task!r}.")
    if pretrained:  # of the others, none is on the Hub
        names = _pretrained_names() if task in (None, "classification") else ()
    else:
        names = _names_of_task(task)
    found = (name for name in names if _matches(name, pattern))
    return sorted(name for name in found if not _matches(name, exclude_filters))


def _names_of_task(task: str | None) -> list[str]:
    if task is None:
        every = (name for each in TASKS for name in _names_of_task(each))
        return [*_bundled_names(), *every]
    return list(MODELS) if task == "classification" else _dense().names_of_task(task)


def is_model(name: str) -> bool:
    """Whether `create_model` knows the name (hyphens, underscores, tag)."""
    if _is_dense(name) or _is_bundled(name):
        return True
    try:
        _resolve(name)
    except ValueError:
        return False
    return True


def _plain(name: str) -> str:
    return name.strip().lower().replace("-", "_")


def _is_dense(name: object) -> bool:
    """Whether a segmentation or detection model is meant; their room is loaded for such names."""
    if not isinstance(name, str) or not _plain(name).startswith(_DENSE):
        return False
    return _plain(name) in _dense().DENSE_MODELS


def _is_bundled(name: object) -> bool:
    """Whether the model ships in the package; the hub is loaded for names unknown to the zoo."""
    if not isinstance(name, str) or _plain(name).partition(".")[0] in MODELS:
        return False
    return _plain(name) in _bundled_names()


def _bundled_names() -> list[str]:
    return [_plain(name) for name in _hub().embedded_names()]


def _dense() -> Any:
    return import_module("natcupy.zoo.dense")


def _resolve(name: str) -> str:
    if not isinstance(name, str):
        raise TypeError(f"a model's name must be a string, got {type(name).__name__}.")
    architecture, _, tag = _plain(name).partition(".")
    if architecture.startswith(_DENSE):
        _dense().create_dense_model(name)  # raises, with the nearest
    if architecture not in MODELS:
        known = [*_bundled_names(), *MODELS]
        near = difflib.get_close_matches(architecture, known, n=3, cutoff=0.4)
        near = ", ".join(near).replace("_", "-")
        hint = f"the nearest are {near}" if near else "see natcupy.list_models()"
        raise ValueError(f"there is no model {name!r}; {hint}.")
    if tag and tag != PUBLISHED[architecture].tag:
        spelled = architecture.replace("_", "-")
        raise ValueError(
            f"there is no tag {tag!r} of {spelled}, got {name!r}; use "
            f"{spelled}.{PUBLISHED[architecture].tag} or no tag."
        )
    return architecture


def __getattr__(name: str) -> Any:
    if name.startswith(_DENSE) and name in _dense().DENSE_MODELS:
        return _dense().DENSE_MODELS[name]
    raise AttributeError(f"module 'natcupy.zoo' has no attribute {name!r}")


def _pretrained_names() -> list[str]:
    hub = _hub()
    return [*_bundled_names(), *(tag for tag, row in hub.WEIGHTS.items() if row.repo)]


def _matches(name: str, patterns: str | Sequence[str]) -> bool:
    """Whether the name, with or without its tag, matches a pattern in either spelling."""
    patterns = [patterns] if isinstance(patterns, str) else patterns
    spelled = {spelling for p in patterns for spelling in (p, p.replace("-", "_"))}
    name = name.replace("-", "_")
    forms = (name, name.partition(".")[0])
    return any(fnmatch.fnmatchcase(form, p) for form in forms for p in spelled)


__all__ = [
    "MODELS",
    "NAT",
    "PUBLISHED",
    "ConfigError",
    "DiNATS",
    "ImageModel",
    "Isotropic",
    "Macs",
    "ModelConfig",
    "Preprocess",
    "Published",
    "build_model",
    "count_macs",
    "create_model",
    "is_model",
    "list_models",
    "model_config",
    "num_parameters",
    *MODELS,
]
