"""Which model a set of weights is: from its config.json, or from its shapes and a name.

In: a `Located` and the shapes of its tensors. Out: the `ModelConfig` or `DenseConfig` that the
weights were made for, and a complete pretrained_cfg.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from natcupy import zoo
from natcupy.hub import convert, dense, preprocessor, schema, weights
from natcupy.hub.config import parse_config
from natcupy.hub.dense import Config
from natcupy.hub.dense_weights import DenseRow
from natcupy.hub.errors import CheckpointError
from natcupy.hub.files import read_bytes
from natcupy.hub.likeness import FREE, differences, shape_differences
from natcupy.hub.locate import CONFIG, Located
from natcupy.hub.weights import Row, embedded, embedded_names
from natcupy.zoo.config import ConfigError, ModelConfig
from natcupy.zoo.dense import DENSE_MODELS, DenseConfig

_OF_WEIGHTS = ("architecture", "tag", "license", "label_names")  # no checkpoint of others has these


def describe(
    found: Located,
    shapes: Mapping[str, Tensor],
    architecture: str | None,
    max_parameters: int,
    backbone_only: bool = False,
) -> tuple[Config, dict[str, Any]]:
    """The numbers of the weights at hand, and the facts about them.

    Args:
        found: where weights and config are.
        shapes: the file's tensors as they are named there, on any device.
        architecture: the caller's word for it; wins over config.json.
        max_parameters: refuse larger models.
        backbone_only: of a segmentation or detection model, take the backbone alone.

    Raises:
        ConfigError: config.json breaks a rule, or the model is too large.
        CheckpointError: the architecture cannot be told, or is not the one named.
    """
    if architecture is not None or found.config is None:
        config, name = _from_shapes(found, shapes, architecture, backbone_only)
        _limit(config, max_parameters)
        return config, _facts(config, name, found.row, {})
    data = read_bytes(found.config, schema.MAX_CONFIG_BYTES)
    config, stated = parse_config(data, found.config, max_parameters)
    if isinstance(config, DenseConfig):
        if backbone_only:
            return config.backbone, _facts(config.backbone, _named(config.backbone), None, {})
        return config, _facts(config, stated.get("architecture"), found.row, stated)
    if found.preprocessor is not None and "input_size" not in stated:
        limit = schema.MAX_CONFIG_BYTES
        recipe = preprocessor.parse_preprocessor(
            read_bytes(found.preprocessor, limit), found.preprocessor
        )
        stated = {**recipe, **stated}
    name = stated.get("architecture") or (found.row.arch if found.row else _named(config))
    return config, _facts(config, name, found.row, stated)


def _limit(config: Config, max_parameters: int) -> None:
    count = dense.count_parameters(config)
    if count > max_parameters:
        raise ConfigError(
            f"the model must have at most {max_parameters:,} parameters, its shapes ask for "
            f"{count:,}; pass a larger max_parameters if that is meant."
        )


def _facts(
    config: Config, name: str | None, row: Row | DenseRow | None, stated: Mapping[str, Any]
) -> dict[str, Any]:
    """pretrained_cfg: the architecture's own, the table's, then what the file states."""
    facts = _facts_of(name)
    if row is not None and row.arch == name:
        facts |= {"architecture": row.arch, "tag": row.data, "license": row.license}
    facts |= stated
    if name is not None:
        facts["architecture"] = name
    if isinstance(config, DenseConfig):
        return facts  # the model fills in its task's own preparation of pictures
    _, height, width = facts.get("input_size", (0, 224, 224))
    if config.img_size is not None:
        height = width = config.img_size
    facts["input_size"] = (config.in_chans, height, width)
    return facts


def _facts_of(name: str | None) -> dict[str, Any]:
    """What is usual for an architecture, of a bundled one all but what belongs to its weights."""
    if name in zoo.MODELS:
        return dict(_default_facts(name))
    _, stated = _bundled().get(name, (None, {}))
    return {key: value for key, value in stated.items() if key not in _OF_WEIGHTS}


@cache
def _default_facts(name: str) -> dict[str, Any]:
    with torch.device("meta"):
        return zoo.create_model(name).pretrained_cfg


@cache
def _zoo_configs() -> dict[str, ModelConfig]:
    return {name: zoo.model_config(name) for name in zoo.MODELS}


def _bundled() -> dict[str, tuple[ModelConfig, dict[str, Any]]]:
    """The models in the package by name: their numbers, and what their config.json states."""
    found = {}
    for name in embedded_names():
        path = embedded(name) / CONFIG
        data = read_bytes(path, schema.MAX_CONFIG_BYTES)
        found[name.replace("-", "_")] = parse_config(data, path)
    return found


def _named_configs() -> dict[str, ModelConfig]:
    """The classifiers that weights without a config may be of: the zoo's, and those bundled."""
    return _zoo_configs() | {name: config for name, (config, _) in _bundled().items()}


def _named(config: ModelConfig) -> str | None:
    """The zoo's name for these numbers, whatever the head and the drop path rate."""
    for name, known in _zoo_configs().items():
        if differences(config, known, (*FREE, "drop_path_rate", "layer_scale")) == [] and (
            (config.layer_scale is None) == (known.layer_scale is None)
        ):
            return name
    return None


def _from_shapes(
    found: Located,
    shapes: Mapping[str, Tensor],
    architecture: str | None,
    backbone_only: bool,
) -> tuple[Config, str | None]:
    name = architecture or (found.row.arch if found.row else None)
    if name is not None and not zoo.is_model(name):
        near = weights.nearest(name, weights.released_names())
        raise ValueError(
            f"architecture must be one of natcupy.list_models(task=None) (`natcupy models`), got "
            f"{name!r}{f' (near: {near[0]})' if near else ''}; weights of other numbers need a "
            "config.json beside them."
        )
    name = None if name is None else name.strip().lower().replace("-", "_").partition(".")[0]
    if dense.architecture_of(shapes) and name not in _named_configs():
        config, name = _dense_from_shapes(found, shapes, name)
        return (config.backbone, None) if backbone_only else (config, name)
    if name in DENSE_MODELS:
        raise CheckpointError(
            f"{found.weights} does not hold the heads of {_spelled(name)}; name a classifier or "
            f"backbone: {_how_to_say('nat-tiny')}."
        )
    seen = convert.infer_config(convert.to_natcupy(shapes))
    if name is None:
        name = _only_candidate(found, _candidates(seen), seen)
    known = zoo.model_config(name)
    _refuse(found, name, shape_differences(seen, known), lambda: _candidates(seen))
    return known.replace(**{field: getattr(seen, field) for field in FREE}), name


def _dense_from_shapes(
    found: Located, shapes: Mapping[str, Tensor], name: str | None
) -> tuple[DenseConfig, str]:
    seen = dense.infer_config(shapes)
    if name is None:
        name = _only_candidate(found, dense.candidates(seen), seen.backbone)
    known = dense.named_config(name)
    _refuse(found, name, dense.differences(seen, known), lambda: dense.candidates(seen))
    backbone = known.backbone.replace(in_chans=seen.in_chans)
    return known.replace(num_classes=seen.num_classes, backbone=backbone), name


def _refuse(
    found: Located, name: str, wrong: list[str], candidates: Callable[[], list[str]]
) -> None:
    if wrong:
        raise CheckpointError(
            f"{found.weights} does not hold the tensors of {_spelled(name)}: {'; '.join(wrong)}. "
            f"Fitting by shape: {_spelled(*candidates()) or 'none'}. Say which one it is with "
            f"{_how_to_say('NAME')}."
        )


def _only_candidate(found: Located, names: list[str], seen: ModelConfig) -> str:
    if len(names) == 1:
        return names[0]
    if not names:
        raise CheckpointError(
            f"{found.weights} has the shapes of no model of the zoo (family {seen.family}, "
            f"embed_dim {seen.embed_dim}, depths {seen.depths}). Put the config.json it was saved "
            "with beside it."
        )
    raise CheckpointError(
        f"{found.weights} fits {_spelled(*names)}: they differ in dilations, which have no "
        f"parameters. Say which one it is, e.g. {_how_to_say(_spelled(names[0]))}."
    )


def _how_to_say(name: str) -> str:
    """Naming the architecture, in Python and on the command line."""
    return f"architecture={name!r}, or `natcupy convert FILE FOLDER --architecture {name}`"


def _spelled(*names: str) -> str:
    """Names for people, as the Hub spells them."""
    return ", ".join(names).replace("_", "-")


def _candidates(seen: ModelConfig) -> list[str]:
    return [name for name, known in _named_configs().items() if not shape_differences(seen, known)]
