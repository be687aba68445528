"""config.json of segmentation and detection models, in and out, under the same closed schema.

In: the parsed JSON object, or a model's numbers and facts. Out: `(DenseConfig, pretrained_cfg)`, or
the file's text. The numbers stand under "dense"; neither timm nor transformers builds these models,
so no key pretends that they could.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from natcupy.hub import schema
from natcupy.hub.schema import PretrainedCfg
from natcupy.zoo.config import ConfigError
from natcupy.zoo.dense import DenseConfig, num_dense_parameters

_KEYS = frozenset(
    {"natcupy_version", "architecture", "architectures", "model_type", "task", "dense"}
    | {"num_labels", "id2label", "label2id", "label_names", "pretrained_cfg"}
)


def read(values: dict[str, Any], limit: int) -> tuple[DenseConfig, PretrainedCfg]:
    """The numbers of a file, and the facts it states.

    Raises ConfigError, which names the key that breaks a rule.
    """
    schema.closed(values, _KEYS)
    config = DenseConfig.from_dict(schema.mapping("dense", values["dense"]))
    count = num_dense_parameters(config)
    if count > limit:
        raise ConfigError(
            f"the model must have at most {limit:,} parameters, the config describes {count:,}; "
            "pass a larger max_parameters if that is meant."
        )
    if values.get("task", config.task) != config.task:
        raise ConfigError(
            f"task must be {config.task!r} for {config.architecture}, got "
            f"{str(values['task'])[:40]!r}."
        )
    cfg = schema.check_pretrained_cfg(values.get("pretrained_cfg", {}), config)
    if "architecture" in values:
        cfg.setdefault("architecture", schema.word("architecture", values["architecture"]))
    if values.get("label_names") is not None:
        cfg["label_names"] = schema.labels("label_names", values["label_names"], config.num_classes)
    return config, cfg


def text(config: DenseConfig, cfg: Mapping[str, Any], version: str) -> str:
    """The file's text.

    Args:
        config: the model's numbers.
        cfg: the model's pretrained_cfg; only keys of the schema are written.
        version: of natcupy.

    Raises ConfigError for a value that could not be read back.
    """
    kept = schema.clean_pretrained_cfg(cfg, config)
    labels = kept.pop("label_names", None)
    values: dict[str, Any] = {
        "natcupy_version": version,
        "architecture": kept.setdefault("architecture", config.architecture),
        "model_type": f"natcupy_{config.architecture}",
        "task": config.task,
        "dense": config.to_dict(),
        "num_labels": config.num_classes,
    }
    if labels:
        values["id2label"] = {str(index): name for index, name in enumerate(labels)}
        values["label_names"] = labels
    values["pretrained_cfg"] = {key: schema.plain(value) for key, value in kept.items()}
    written = json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    return schema.within_limit(written)
