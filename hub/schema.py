"""The rules for single values of a config file, and for the facts in pretrained_cfg.

In: values from untrusted JSON. Out: the same values, of the right type and within bounds, or a
`ConfigError` that names the key. Knows nothing of layouts; `config` puts these rules together.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Container, Mapping
from typing import Any

from natcupy.zoo.config import ConfigError, ModelConfig
from natcupy.zoo.dense import DenseConfig
from natcupy.zoo.preprocess import CROP_MODES, INTERPOLATIONS

MAX_CONFIG_BYTES = 4_000_000  # 22,000 class names, in the three places that want them
MAX_DEPTH = 6
MAX_LABELS = 1_000_000

PretrainedCfg = dict[str, Any]

_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]{0,95}")
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def parse_json(data: bytes, where: object, limit: int = MAX_CONFIG_BYTES) -> dict[str, Any]:
    """A JSON object from untrusted bytes: size, depth, duplicate names and odd numbers checked."""
    if len(data) > limit:
        raise ConfigError(
            f"{where} may take {limit:,} bytes, got {len(data):,}. This is not what belongs there; "
            "fetch it again."
        )
    try:
        values = json.loads(
            data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant
        )
        too_deep = _deeper_than(values, MAX_DEPTH)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where} is not valid JSON ({str(error)[:120]}).") from None
    if not isinstance(values, dict) or too_deep:
        raise ConfigError(f"{where} must be a JSON object nested at most {MAX_DEPTH} deep.")
    return values


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a name stands twice in one object")
    return values


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is not a JSON number")


def _deeper_than(value: Any, depth: int) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return any(
        depth <= 1 or _deeper_than(v, depth - 1) for v in inner if isinstance(v, dict | list)
    )


# ---------------------------------------------------------------- facts about weights and pictures


def check_pretrained_cfg(values: object, config: ModelConfig | DenseConfig) -> PretrainedCfg:
    """The pretrained_cfg of a file, checked key by key; keys it does not state stay absent."""
    out, schema = {}, _schema(config)
    for key, value in mapping("pretrained_cfg", values).items():
        check = schema.get(key)
        if check is None:
            raise ConfigError(
                f"pretrained_cfg has no key {str(key)[:60]!r}; known: {', '.join(schema)}."
            )
        if value is not None:
            out[key] = check(f"pretrained_cfg.{key}", value, config)
    if out.get("num_classes", config.num_classes) != config.num_classes:
        raise ConfigError(
            f"pretrained_cfg.num_classes must equal num_classes={config.num_classes}, got "
            f"{out['num_classes']}."
        )
    return out


def clean_pretrained_cfg(
    cfg: Mapping[str, Any], config: ModelConfig | DenseConfig
) -> PretrainedCfg:
    """The part of a model's pretrained_cfg that a file keeps; ConfigError if unreadable."""
    kept = {key: plain(value) for key, value in cfg.items() if key in _schema(config)}
    kept["num_classes"] = config.num_classes
    return check_pretrained_cfg(kept, config)


# ---------------------------------------------------------------- one value at a time


def closed(values: dict[str, Any], known: Container[str]) -> None:
    """Refuse every key that is not known by name."""
    for key in values:
        if key not in known:
            raise ConfigError(
                f"unknown key {key[:60]!r}: natcupy reads only keys it knows and follows none to "
                "code, repositories or addresses. Remove the key, or load the weights file alone "
                "with architecture=… (`natcupy convert FILE FOLDER --architecture NAME`)"
            )


def mapping(key: str, value: object) -> dict[str, Any]:
    """A JSON object."""
    if not isinstance(value, dict) or len(value) > MAX_LABELS:
        raise ConfigError(f"{key} must be an object, got {type(value).__name__}.")
    return value


def integer(key: str, value: object, low: int, high: int) -> int:
    """An int in low..high; true and false are not ints."""
    if type(value) is not int or not low <= value <= high:
        raise ConfigError(f"{key} must be an int in {low}..{high}, got {str(value)[:40]!r}.")
    return value


def number(key: str, value: object, low: float, high: float) -> float:
    """A finite number in low..high, as a float."""
    if type(value) not in (int, float) or not math.isfinite(value) or not low <= value <= high:
        raise ConfigError(f"{key} must be a number in {low}..{high}, got {str(value)[:40]!r}.")
    return float(value)


def word(key: str, value: object, *_: object) -> str:
    """A short name without spaces, slashes or markup."""
    if not isinstance(value, str) or not _WORD.fullmatch(value):
        raise ConfigError(
            f"{key} must be a word of letters, digits, '_', '.' and '-', got {str(value)[:60]!r}."
        )
    return value


def _tag(key: str, value: object, *_: object) -> str:
    return "" if value == "" else word(key, value)


def _choice(choices: tuple[str, ...]) -> Callable[..., str]:
    def check(key: str, value: object, *_: object) -> str:
        if not isinstance(value, str) or value not in choices:
            raise ConfigError(
                f"{key} must be one of {', '.join(choices)}, got {str(value)[:40]!r}."
            )
        return value

    return check


def _flag(key: str, value: object, *_: object) -> bool:
    if not isinstance(value, bool):
        raise ConfigError(f"{key} must be true or false, got {str(value)[:40]!r}.")
    return value


def per_channel(key: str, value: object, config: ModelConfig | None) -> tuple[float, ...]:
    """Finite numbers, one for all channels or one for each."""
    count = config.in_chans if config else 3
    if not isinstance(value, list | tuple) or len(value) not in {1, 3, count}:
        raise ConfigError(f"{key} must be a list of one number per channel, got {str(value)[:60]}.")
    low = 1e-6 if key.endswith("std") else -1e4
    return tuple(number(f"{key}[{index}]", entry, low, 1e4) for index, entry in enumerate(value))


def _input_size(key: str, value: object, config: ModelConfig) -> tuple[int, ...]:
    if not isinstance(value, list | tuple) or len(value) != 3 or value[0] != config.in_chans:
        raise ConfigError(
            f"{key} must be [channels, height, width] with {config.in_chans} channels, got "
            f"{str(value)[:60]}."
        )
    return tuple(integer(f"{key}[{index}]", entry, 1, 8192) for index, entry in enumerate(value))


def labels(key: str, value: object, count: int) -> list[str]:
    """Exactly `count` printable class names."""
    if not isinstance(value, list | tuple) or len(value) != count:
        got = len(value) if isinstance(value, list | tuple) else type(value).__name__
        raise ConfigError(f"{key} must be a list of {count} names, got {got}.")
    for index, name in enumerate(value):
        if not isinstance(name, str) or len(name) > 512 or _UNPRINTABLE.search(name):
            raise ConfigError(
                f"{key}[{index}] must be printable text of at most 512 characters, got "
                f"{ascii(name)[:60]}."
            )
    return list(value)


def _side(key: str, value: object, *_: object) -> int:
    return integer(key, value, 1, 65536)


_ANY_SCHEMA: dict[str, Callable[[str, Any, Any], Any]] = {
    "architecture": word,
    "tag": _tag,
    "license": word,
    "num_classes": lambda key, value, _: integer(key, value, 0, MAX_LABELS),
    "label_names": lambda key, value, config: labels(key, value, config.num_classes),
    "mean": per_channel,
    "std": per_channel,
}

_CFG_SCHEMA: dict[str, Callable[[str, Any, ModelConfig], Any]] = {
    **_ANY_SCHEMA,
    "input_size": _input_size,
    "fixed_input_size": _flag,
    "crop_pct": lambda key, value, _: number(key, value, 0.01, 1.0),
    "crop_mode": _choice(tuple(CROP_MODES)),
    "interpolation": _choice(INTERPOLATIONS),
    "first_conv": word,
    "classifier": word,
}

_DENSE_SCHEMA: dict[str, Callable[[str, Any, DenseConfig], Any]] = {
    **_ANY_SCHEMA,
    "task": lambda key, value, config: _choice((config.task,))(key, value),
    "long_side": _side,
    "short_side": _side,
    "pad_divisor": _side,
}


def _schema(config: ModelConfig | DenseConfig) -> dict[str, Callable[[str, Any, Any], Any]]:
    return _DENSE_SCHEMA if isinstance(config, DenseConfig) else _CFG_SCHEMA


def within_limit(text: str) -> str:
    """The text of a config.json, unless it could not be read back for its length."""
    if len(text.encode()) > MAX_CONFIG_BYTES:
        raise ConfigError(
            f"config.json may take {MAX_CONFIG_BYTES:,} bytes, the class names make it "
            f"{len(text.encode()):,}; shorten label_names in the model's pretrained_cfg."
        )
    return text


def plain(value: Any) -> Any:
    """Tuples as lists, all the way down."""
    return [plain(entry) for entry in value] if isinstance(value, tuple | list) else value
