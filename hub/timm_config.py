"""The config.json that timm itself writes for a model of `natcupy.timm`.

In: the values of such a file: a name that `natcupy.timm` registers, the arguments it was given, and
facts about weights and pictures. Out: `(ModelConfig, pretrained_cfg)`, under the same closed schema
as natcupy's own files: timm's bookkeeping is known by name and ignored, anything else is an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from natcupy import zoo
from natcupy.hub import schema
from natcupy.hub.schema import PretrainedCfg
from natcupy.zoo.config import FAMILIES, MAX_PARAMETERS, SINGLE_LEVEL, ConfigError, ModelConfig

# fmt: off
_KEYS = frozenset({
    "architecture", "global_pool", "label_descriptions", "label_names", "model_args", "num_classes",
    "num_features", "pretrained_cfg",
})
_FACTS_IGNORED = frozenset({
    "custom_load", "description", "label_descriptions", "label_names", "label_offset",
    "min_input_size", "notes", "origin_url", "paper_ids", "paper_name", "pool_size",
    "test_crop_pct", "test_input_size", "test_pool_size",
})
# fmt: on
_ARGS = frozenset(ModelConfig.__dataclass_fields__) - {"family", "out_indices"}
_FAMILY_NAMES = {f"natcupy_{family}": family for family in FAMILIES}

ZERO_RATES = ("drop_rate", "attn_drop_rate", "proj_drop_rate")  # no model here has them


# ---------------------------------------------------------------- names and their numbers


@cache
def zoo_config(name: str) -> ModelConfig | None:
    """The numbers of a classifier of the zoo, None for any other name."""
    return zoo.model_config(name) if name in zoo.MODELS else None


def is_entry(name: object) -> bool:
    """Whether `natcupy.timm` registers a model under this name."""
    return isinstance(name, str) and (name in zoo.MODELS or name in _FAMILY_NAMES)


def entry_config(
    name: str, changes: Mapping[str, Any], max_parameters: int = MAX_PARAMETERS
) -> ModelConfig:
    """The numbers of the model that `natcupy.timm` builds under a name.

    Args:
        name: of the zoo, where `changes` replace numbers, or `natcupy_<family>`, where they are
            the numbers.
        changes: fields of `ModelConfig`.
        max_parameters: refuse larger models.

    Raises:
        ConfigError: a field is missing or breaks a rule, or the model is too large.
    """
    base = zoo_config(name)
    if base is not None:
        return ModelConfig.from_dict({**base.to_dict(), **changes}, max_parameters)
    family = _FAMILY_NAMES[name]
    given: dict[str, Any] = {"family": family, **changes}
    if family in SINGLE_LEVEL:
        given.setdefault("img_size", 224)
    if family == "vitrpb":
        given["kernel_size"] = None
    return ModelConfig.from_dict(given, max_parameters)


# ---------------------------------------------------------------- the file


def read(values: dict[str, Any], max_parameters: int) -> tuple[ModelConfig, PretrainedCfg]:
    """The model and the facts of a file whose `architecture` is a name of `natcupy.timm`.

    As in timm, model_args count before num_classes and input_size, which stand beside them.
    """
    schema.closed(values, _KEYS)
    name = values["architecture"]
    stated = schema.mapping("pretrained_cfg", values.get("pretrained_cfg") or {})
    size = _size(stated.get("input_size"))
    fields = _beside(values, size) | _args(values.get("model_args") or {})
    single = _family(name) in SINGLE_LEVEL
    side = fields.pop("img_size", None)
    if single and side is not None:  # the others take pictures of any size
        fields["img_size"] = _side(side)
    config = entry_config(name, fields, max_parameters)
    facts = {key: value for key, value in stated.items() if key not in _FACTS_IGNORED}
    # Some versions of timm leave here what was true of the weights that training began with.
    facts |= {"architecture": name, "num_classes": config.num_classes, "fixed_input_size": single}
    if size is not None:
        sides = [config.img_size] * 2 if single else size[1:]
        facts["input_size"] = [config.in_chans, *sides]
    cfg = schema.check_pretrained_cfg(facts, config)
    labels = _labels(values.get("label_names") or stated.get("label_names"))
    if labels is not None:
        cfg["label_names"] = schema.labels("label_names", labels, config.num_classes)
    return config, cfg


def _family(name: str) -> str:
    base = zoo_config(name)
    return base.family if base is not None else _FAMILY_NAMES[name]


def _beside(values: Mapping[str, Any], size: list[int] | None) -> dict[str, Any]:
    """The numbers that stand outside model_args."""
    fields = {} if size is None else {"in_chans": size[0], "img_size": size[1:]}
    if values.get("num_classes") is not None:
        fields["num_classes"] = values["num_classes"]
    return fields


def _args(given: object) -> dict[str, Any]:
    """The fields of a ModelConfig among model_args."""
    fields = {}
    for key, value in schema.mapping("model_args", given).items():
        if key == "global_pool" or (key in ZERO_RATES and not value):
            continue
        if key not in _ARGS:
            raise ConfigError(
                f"model_args may hold {', '.join(sorted(_ARGS))} and rates of zero, got "
                f"{key[:60]!r}. Build the model without it and save it again."
            )
        fields[key] = value
    return fields


def _size(value: object) -> list[int] | None:
    """input_size, where it is stated."""
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != 3:
        raise ConfigError(
            f"pretrained_cfg.input_size must be [channels, height, width], got {str(value)[:60]}."
        )
    return [schema.integer("pretrained_cfg.input_size", entry, 1, 8192) for entry in value]


def _side(value: object) -> object:
    """One side of img_size, which timm writes as two."""
    if not isinstance(value, list):
        return value
    if len(value) != 2 or value[0] != value[1]:
        raise ConfigError(f"img_size must be square, got {str(value)[:60]}.")
    return value[0]


def _labels(given: object) -> object:
    """Names in order. timm also has a table by number; one with gaps is left out."""
    if not isinstance(given, dict):
        return given
    numbers = [str(index) for index in range(len(given))]
    return [given[number] for number in numbers] if given.keys() == set(numbers) else None
