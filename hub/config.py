"""config.json in and out: a closed schema, so that a file can describe a model and nothing more.

In: the bytes of a config.json, in natcupy's layout, in that of transformers' NAT and DiNAT or in
the one that timm writes. Out: `(ModelConfig, pretrained_cfg)`; and back, one text that natcupy,
timm and transformers each find their own keys in.

Every key is known by name, either with its type and bounds or as one to be ignored; anything else
is an error. In particular no key can name code, a module, a repository or an address: there is
nothing to follow. Parameters are counted by arithmetic before anything is built.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from natcupy.hub import dense_config, schema, timm_config
from natcupy.hub.schema import PretrainedCfg
from natcupy.zoo.config import MAX_PARAMETERS, SINGLE_LEVEL, ConfigError, ModelConfig
from natcupy.zoo.dense import DenseConfig

# What transformers' classes assume when a key is absent (files only state what differs).
_THEIR_DEFAULTS: dict[str, Any] = {
    "embed_dim": 64,
    "depths": [3, 4, 6, 5],
    "num_heads": [2, 4, 8, 16],
    "kernel_size": 7,
    "mlp_ratio": 3.0,
    "drop_path_rate": 0.1,
    "layer_scale_init_value": 0.0,
    "num_channels": 3,
    "num_labels": 2,
}
_THEIR_DILATIONS = [[1, 8, 1], [1, 4, 1, 4], [1, 2, 1, 2, 1, 2], [1, 1, 1, 1, 1]]
# Keys whose only value these models have; another one describes a model that does not exist here.
_FIXED: dict[str, Any] = {
    "patch_size": 4,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
    "qkv_bias": True,
}
# Inert bookkeeping. hidden_size is in the list because released files carry a wrong one.
# fmt: off
_IGNORED = frozenset({
    "_attn_implementation_autoset", "_commit_hash", "_name_or_path", "add_cross_attention",
    "architectures", "attention_probs_dropout_prob", "bad_words_ids", "begin_suppress_tokens",
    "bos_token_id", "chunk_size_feed_forward", "cross_attention_hidden_size",
    "decoder_start_token_id", "diversity_penalty", "do_sample", "dtype", "early_stopping",
    "encoder_no_repeat_ngram_size", "eos_token_id", "exponential_decay_length_penalty",
    "finetuning_task", "forced_bos_token_id", "forced_eos_token_id", "global_pool",
    "hidden_dropout_prob", "hidden_size", "id2label", "initializer_range", "is_composition",
    "is_decoder", "is_encoder_decoder", "label2id", "length_penalty", "max_length", "min_length",
    "model_type", "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_features",
    "num_labels", "num_layers", "num_return_sequences", "out_features", "output_attentions",
    "output_hidden_states", "output_scores", "pad_token_id", "path_norm", "prefix", "problem_type",
    "pruned_heads", "remove_invalid_values", "repetition_penalty", "return_dict",
    "return_dict_in_generate", "sep_token_id", "stage_names", "suppress_tokens",
    "task_specific_params", "temperature", "tf_legacy_loss", "tie_encoder_decoder",
    "tie_word_embeddings", "tokenizer_class", "top_k", "top_p", "torch_dtype", "torchscript",
    "transformers_version", "typical_p", "use_bfloat16", "use_cache",
})
# fmt: on
_OWN_FIELDS = tuple(ModelConfig.__dataclass_fields__)
_OWN_KEYS = frozenset(
    {*_OWN_FIELDS, "natcupy_version", "architecture", "label_names", "pretrained_cfg", "model_args"}
    | {"layer_scale_init_value", "num_channels", "feature_indices"}
) - {"out_indices"}


# ---------------------------------------------------------------- reading


def parse_config(
    data: bytes, where: object = "config.json", max_parameters: int = MAX_PARAMETERS
) -> tuple[ModelConfig | DenseConfig, PretrainedCfg]:
    """Read a config.json of any of the layouts; natcupy's may describe a `DenseConfig`.

    Args:
        data: the file's bytes, at most 4 MB.
        where: how errors call the file.
        max_parameters: refuse configs that describe a larger model.

    Returns:
        The model's numbers, and the facts about weights and pictures that the file states (not
        filled up with defaults).

    Raises:
        ConfigError: names the key that breaks a rule.
    """
    values = schema.parse_json(data, where)
    try:
        if "natcupy_version" in values and "dense" in values:
            return dense_config.read(values, max_parameters)
        if "natcupy_version" in values:
            return _read_own(values, max_parameters)
        if values.get("model_type") in ("nat", "dinat"):
            return _read_theirs(values, max_parameters)
        if timm_config.is_entry(values.get("architecture")):
            return timm_config.read(values, max_parameters)
        raise ConfigError(
            "a model config has 'natcupy_version', or model_type 'nat' or 'dinat', or timm's "
            "'architecture' with a name of natcupy.timm, got model_type "
            f"{str(values.get('model_type'))[:40]!r} and architecture "
            f"{str(values.get('architecture'))[:40]!r}"
        )
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def _read_own(values: dict[str, Any], limit: int) -> tuple[ModelConfig, PretrainedCfg]:
    schema.closed(values, _OWN_KEYS | _IGNORED | _FIXED.keys() | {"out_indices"})
    fields = {key: values[key] for key in _OWN_FIELDS if key in values and key != "out_indices"}
    if "feature_indices" in values:
        fields["out_indices"] = values["feature_indices"]
    config = ModelConfig.from_dict(fields, limit)
    _agree("layer_scale_init_value", values, config.layer_scale or 0.0)
    _agree("num_channels", values, config.in_chans)
    labels = values.get("id2label")
    if (
        labels is not None
        and config.num_classes
        and len(schema.mapping("id2label", labels))
        not in (
            0,
            config.num_classes,
        )
    ):
        raise ConfigError(
            f"id2label must have num_classes={config.num_classes} entries, got {len(labels)}."
        )
    cfg = schema.check_pretrained_cfg(values.get("pretrained_cfg", {}), config)
    if "architecture" in values:
        cfg.setdefault("architecture", schema.word("architecture", values["architecture"]))
    if values.get("label_names") is not None:
        cfg["label_names"] = schema.labels("label_names", values["label_names"], config.num_classes)
    return config, cfg


def _read_theirs(values: dict[str, Any], limit: int) -> tuple[ModelConfig, PretrainedCfg]:
    known = _THEIR_DEFAULTS.keys() | _FIXED.keys() | _IGNORED | {"dilations", "out_indices"}
    schema.closed(values, known)
    for key, only in _FIXED.items():
        if key in values and values[key] != only:
            raise ConfigError(
                f"{key} must be {only!r}, as in every released model, got "
                f"{str(values[key])[:40]!r}."
            )
    get = {**_THEIR_DEFAULTS, **values}
    kind = _kind(values)
    labels = _their_labels(values)
    count = (
        len(labels)
        if labels
        else schema.integer("num_labels", get["num_labels"], 0, schema.MAX_LABELS)
    )
    scale = get["layer_scale_init_value"]
    default = _THEIR_DILATIONS if values["model_type"] == "dinat" else None
    fields = {
        "family": "nat",
        **{key: get[key] for key in ("embed_dim", "depths", "num_heads", "kernel_size")},
        **{key: get[key] for key in ("mlp_ratio", "drop_path_rate")},
        "dilations": values.get("dilations", default) if default else None,
        "layer_scale": None if scale == 0 and not isinstance(scale, bool) else scale,
        "in_chans": get["num_channels"],
        "num_classes": count if kind == "ForImageClassification" else 0,
        "out_indices": _their_stages(values) if kind == "Backbone" else None,
    }
    config = ModelConfig.from_dict(fields, limit)
    named = labels and kind == "ForImageClassification" and not _placeholders(labels)
    return config, ({"label_names": labels} if named else {})


def _kind(values: dict[str, Any]) -> str:
    """Which of the three model classes wrote the file."""
    names = values.get("architectures") or ["NatForImageClassification"]
    prefix = "Nat" if values["model_type"] == "nat" else "Dinat"
    kinds = {prefix + kind: kind for kind in ("ForImageClassification", "Backbone", "Model")}
    if not isinstance(names, list) or len(names) != 1 or str(names[0]) not in kinds:
        if "architectures" not in values or values["architectures"] is None:
            return "ForImageClassification"
        raise ConfigError(
            f"architectures must hold one of {', '.join(kinds)}, got {str(names)[:80]}."
        )
    return kinds[names[0]]


def _their_stages(values: dict[str, Any]) -> list[int]:
    """transformers counts the stem as stage 0, natcupy counts levels."""
    stages = values.get("out_indices")
    if stages is None and isinstance(values.get("out_features"), list):
        names = values["out_features"]
        stages = [int(n[5:]) for n in names if isinstance(n, str) and re.fullmatch(r"stage\d", n)]
        if len(stages) != len(names):
            raise ConfigError(f"out_features must be stage1, stage2, …, got {str(names)[:80]}.")
    if stages is None:
        depths = values.get("depths", _THEIR_DEFAULTS["depths"])
        stages = [len(depths) if isinstance(depths, list) else 1]
    if not isinstance(stages, list) or not all(type(s) is int and s >= 1 for s in stages):
        raise ConfigError(f"out_indices must be stages counted from 1, got {str(stages)[:80]}.")
    return [stage - 1 for stage in stages]


def _their_labels(values: dict[str, Any]) -> list[str] | None:
    """id2label as a list, None when absent; its keys must be 0, 1, 2, …"""
    if values.get("id2label") is None:
        return None
    table = schema.mapping("id2label", values["id2label"])
    if set(table) != {str(index) for index in range(len(table))}:
        raise ConfigError(f"id2label must number its {len(table)} labels from '0' up.")
    names = [table[str(index)] for index in range(len(table))]
    return schema.labels("id2label", names, len(names)) if names else None


def _placeholders(labels: list[str]) -> bool:
    return all(label == f"LABEL_{index}" for index, label in enumerate(labels))


def _agree(key: str, values: dict[str, Any], own: float) -> None:
    if key in values and values[key] != own:
        raise ConfigError(
            f"{key} contradicts the rest: got {str(values[key])[:40]!r} beside {own!r}."
        )


# ---------------------------------------------------------------- writing


def config_text(config: ModelConfig | DenseConfig, cfg: Mapping[str, Any], version: str) -> str:
    """The config.json that natcupy, timm and transformers all read.

    Args:
        config: the model's numbers.
        cfg: the model's pretrained_cfg; only keys of the schema are written.
        version: of natcupy.

    Raises:
        ConfigError: a value that could not be read back.
    """
    if isinstance(config, DenseConfig):
        return dense_config.text(config, cfg, version)
    kept = schema.clean_pretrained_cfg(cfg, config)
    labels = kept.pop("label_names", None)
    values = {
        "natcupy_version": version,
        **_timm_keys(config, kept.setdefault("architecture", config.family)),
        **_transformers_keys(config, labels),
        **{key: value for key, value in config.to_dict().items() if key != "out_indices"},
        "num_features": config.dims[-1],
        "global_pool": "avg",
        "pretrained_cfg": {key: schema.plain(value) for key, value in kept.items()},
    }
    if config.out_indices is not None:
        values["feature_indices"] = list(config.out_indices)
    if labels:
        values["label_names"] = labels
    text = json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    return schema.within_limit(text)


def _timm_keys(config: ModelConfig, name: str) -> dict[str, Any]:
    """Which entry point of `natcupy.timm` builds the model, and with which arguments.

    The name that natcupy calls the model by is in pretrained_cfg.
    """
    known = timm_config.zoo_config(name)
    mine, base = config.to_dict(), known.to_dict() if known else {}
    if known is None or known.family != config.family:
        name, base = f"natcupy_{config.family}", {}
    aside = ("family", "num_classes", "in_chans", "out_indices")
    args = {k: v for k, v in mine.items() if k not in aside and (not base or v != base[k])}
    return {"architecture": name, **({"model_args": args} if args else {})}


def model_type(config: ModelConfig) -> str:
    """The word transformers knows the architecture by."""
    if config.family != "nat":
        return config.family
    plain = config.dilations is None or all(d == 1 for row in config.dilations for d in row)
    return "nat" if plain else "dinat"


def _transformers_keys(config: ModelConfig, labels: list[str] | None) -> dict[str, Any]:
    kind = model_type(config)
    ending = "ForImageClassification" if config.num_classes else "Model"
    if config.out_indices is not None:
        ending = "Backbone"
    values: dict[str, Any] = {
        "model_type": kind,
        "architectures": ["".join(part.title() for part in kind.split("_")) + ending],
        "layer_scale_init_value": config.layer_scale or 0.0,
        "num_channels": config.in_chans,
        "hidden_size": config.dims[-1],
    }
    if config.family not in SINGLE_LEVEL and config.out_indices is not None:
        values["out_features"] = [f"stage{index + 1}" for index in config.out_indices]
    if config.num_classes and config.out_indices is None:
        values["num_labels"] = config.num_classes
        if labels:
            values["id2label"] = {str(index): name for index, name in enumerate(labels)}
            values["label2id"] = {name: index for index, name in enumerate(labels)}
    return values
