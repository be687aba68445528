"""Which model a set of weights is: from its config.json, or from its shapes and a name.

In: a `Located` and the shapes of its tensors. Out: the `ModelConfig` that the weights were made
for, and a complete pretrained_cfg.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from natcupy import zoo
from natcupy.hub import convert, preprocessor, schema
from natcupy.hub.config import parse_config
from natcupy.hub.errors import CheckpointError
from natcupy.hub.files import read_bytes
from natcupy.hub.locate import Located
from natcupy.hub.weights import Row
from natcupy.zoo.config import ConfigError, ModelConfig, num_parameters

# What shapes cannot show, and what a finetuned copy may change freely.
_HIDDEN = ("dilations", "drop_path_rate", "layer_scale", "img_size")
_FREE = ("num_classes", "in_chans", "out_indices")


def describe(
    found: Located, shapes: Mapping[str, Tensor], architecture: str | None, max_parameters: int
) -> tuple[ModelConfig, dict[str, Any]]:
    """The numbers of the weights at hand, and the facts about them.

    Args:
        found: where weights and config are.
        shapes: the file's tensors in natcupy's names, on any device.
        architecture: the caller's word for it; wins over config.json.
        max_parameters: refuse larger models.

    Raises:
        ConfigError: config.json breaks a rule, or the model is too large.
        CheckpointError: the architecture cannot be told, or is not the one named.
    """
    if architecture is not None or found.config is None:
        config, name = _from_shapes(found, shapes, architecture)
        _limit(config, max_parameters)
        return config, _facts(config, name, found.row, {})
    data = read_bytes(found.config, schema.MAX_CONFIG_BYTES)
    config, stated = parse_config(data, found.config, max_parameters)
    if found.preprocessor is not None and "input_size" not in stated:
        limit = schema.MAX_CONFIG_BYTES
        recipe = preprocessor.parse_preprocessor(
            read_bytes(found.preprocessor, limit), found.preprocessor
        )
        stated = {**recipe, **stated}
    name = stated.get("architecture") or (found.row.arch if found.row else _named(config))
    return config, _facts(config, name, found.row, stated)


def _limit(config: ModelConfig, max_parameters: int) -> None:
    count = num_parameters(config)
    if count > max_parameters:
        raise ConfigError(
            f"the model must have at most {max_parameters:,} parameters, its shapes ask for "
            f"{count:,}; pass a larger max_parameters if that is meant."
        )


def _facts(
    config: ModelConfig, name: str | None, row: Row | None, stated: Mapping[str, Any]
) -> dict[str, Any]:
    """pretrained_cfg: the architecture's own, the table's, then what the file states."""
    facts = dict(_default_facts(name)) if name in zoo.MODELS else {}
    if row is not None and row.arch == name:
        facts |= {"architecture": row.arch, "tag": row.data, "license": row.license}
    facts |= stated
    _, height, width = facts.get("input_size", (0, 224, 224))
    if config.img_size is not None:
        height = width = config.img_size
    facts["input_size"] = (config.in_chans, height, width)
    if name is not None:
        facts["architecture"] = name
    return facts


@cache
def _default_facts(name: str) -> dict[str, Any]:
    with torch.device("meta"):
        return zoo.create_model(name).pretrained_cfg


@cache
def _named_configs() -> dict[str, ModelConfig]:
    return {name: zoo.model_config(name) for name in zoo.MODELS}


def _named(config: ModelConfig) -> str | None:
    """The zoo's name for these numbers, whatever the head and the drop path rate."""
    for name, known in _named_configs().items():
        if _differences(config, known, (*_FREE, "drop_path_rate", "layer_scale")) == [] and (
            (config.layer_scale is None) == (known.layer_scale is None)
        ):
            return name
    return None


def _from_shapes(
    found: Located, shapes: Mapping[str, Tensor], architecture: str | None
) -> tuple[ModelConfig, str | None]:
    seen = convert.infer_config(shapes)
    name = architecture or (found.row.arch if found.row else None)
    if name is None:
        name = _only_candidate(seen, found)
    if not zoo.is_model(name):
        raise ValueError(
            f"architecture must be one of natcupy.list_models(), got {name!r}; weights of other "
            "numbers need a config.json beside them."
        )
    name = name.replace("-", "_").partition(".")[0]
    known = zoo.model_config(name)
    wrong = _shape_differences(seen, known)
    if wrong:
        raise CheckpointError(
            f"{found.weights} does not hold the tensors of {name}: {'; '.join(wrong)}. Pass the "
            f"right architecture; fitting by shape: {', '.join(_candidates(seen)) or 'none'}."
        )
    return known.replace(**{field: getattr(seen, field) for field in _FREE}), name


def _only_candidate(seen: ModelConfig, found: Located) -> str:
    names = _candidates(seen)
    if len(names) == 1:
        return names[0]
    if not names:
        raise CheckpointError(
            f"{found.weights} has the shapes of no model of the zoo (family {seen.family}, "
            f"embed_dim {seen.embed_dim}, depths {seen.depths}). Put the config.json it was saved "
            "with beside it."
        )
    raise CheckpointError(
        f"{found.weights} fits {', '.join(names)}: they differ in dilations, which have no "
        f"parameters. Say which one it is, e.g. architecture={names[0]!r}."
    )


def _candidates(seen: ModelConfig) -> list[str]:
    return [name for name, known in _named_configs().items() if not _shape_differences(seen, known)]


def _shape_differences(seen: ModelConfig, known: ModelConfig) -> list[str]:
    wrong = _differences(seen, known, (*_HIDDEN, *_FREE, "mlp_ratio"))
    if (seen.layer_scale is None) != (known.layer_scale is None):
        wrong.append(f"layer scale {'absent' if seen.layer_scale is None else 'present'}")
    if int(seen.embed_dim * seen.mlp_ratio) != int(known.embed_dim * known.mlp_ratio):
        wrong.append(f"mlp_ratio {seen.mlp_ratio:g} instead of {known.mlp_ratio:g}")
    return wrong


def _differences(one: ModelConfig, other: ModelConfig, ignored: tuple[str, ...]) -> list[str]:
    mine, theirs = one.to_dict(), other.to_dict()
    return [
        f"{key} {mine[key]} instead of {theirs[key]}"
        for key in mine
        if key not in ignored and mine[key] != theirs[key]
    ]
