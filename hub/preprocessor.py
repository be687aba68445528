"""preprocessor_config.json in and out: how pictures are prepared, in transformers' words.

In: the bytes of such a file, or a pretrained_cfg. Out: the pretrained_cfg keys it amounts to, or
the text of a file that transformers' image processors and pipelines read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from natcupy.hub import schema
from natcupy.hub.schema import PretrainedCfg
from natcupy.zoo.config import ConfigError, ModelConfig
from natcupy.zoo.preprocess import Preprocess

PROCESSOR_CLASS = "NatcupyImageProcessor"
_FILTERS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # Pillow's numbers


def parse_preprocessor(data: bytes, where: object) -> PretrainedCfg:
    """The pretrained_cfg that a transformers preprocessor_config.json amounts to.

    Its image processors resize the whole picture to the wanted size, unless they crop.
    """
    values = schema.parse_json(data, where)
    try:
        return _preprocessor(values)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def _preprocessor(values: dict[str, Any]) -> PretrainedCfg:
    crops = values.get("do_center_crop") is True
    out: PretrainedCfg = {"crop_mode": "center" if crops else "squash"}
    sides = resized = _sides("size", values.get("size", 224))
    if crops:
        sides = _sides("crop_size", values.get("crop_size", resized[0]))
        out["crop_pct"] = _crop_pct(min(sides), min(resized))
    out["input_size"] = (3, *sides)
    out |= _scales(values)
    if values.get("resample") is not None:
        out["interpolation"] = _FILTERS[schema.integer("resample", values["resample"], 0, 5)]
    return out


def _sides(name: str, value: object) -> tuple[int, int]:
    """Height and width, of which a number, or the shorter side, stands for both."""
    if not isinstance(value, dict):
        value = {"shortest_edge": value}
    height, width = (value.get(side, value.get("shortest_edge")) for side in ("height", "width"))
    return schema.integer(name, height, 1, 8192), schema.integer(name, width, 1, 8192)


def _crop_pct(crop: int, resized: int) -> float:
    """The quotient, or the next number below that `Preprocess` finds the same size by."""
    found = min(1.0, crop / resized)
    while math.floor(crop / found) < resized:
        found = math.nextafter(found, 0)
    return found


def _scales(values: dict[str, Any]) -> PretrainedCfg:
    """Mean and deviation for values in 0..1, by which everything after the crop can be said."""
    factor = values.get("rescale_factor")
    scale = 1.0 if factor is None else 255 * schema.number("rescale_factor", factor, 1e-6, 1e4)
    if values.get("do_rescale") is False:
        scale = 255.0
    out: PretrainedCfg = {}
    for theirs, ours in (("image_mean", "mean"), ("image_std", "std")):
        if values.get(theirs) is not None:
            out[ours] = schema.per_channel(theirs, values[theirs], None)
    if values.get("do_normalize") is False:
        out |= {"mean": (0.0,), "std": (1.0,)}
    if not math.isclose(scale, 1):
        out = {name: tuple(x / scale for x in numbers) for name, numbers in out.items()}
    return out


def preprocessor_text(config: ModelConfig, cfg: Mapping[str, Any]) -> str:
    """The file's text for a model.

    The sizes are those that make an ordinary resize-and-crop processor come close; `input_size`,
    `crop_pct` and `crop_mode` say it exactly, for the processor that natcupy registers.
    """
    recipe = Preprocess.from_pretrained_cfg(dict(cfg), config)
    _, height, width = recipe.input_size
    whole = {"height": height, "width": width}
    crops = recipe.crop_mode == "center"
    shorter = math.floor(min(height, width) / recipe.crop_pct)
    values = {
        "image_processor_type": PROCESSOR_CLASS,
        "do_resize": True,
        "size": {"shortest_edge": shorter} if crops else whole,
        "do_center_crop": crops,
        **({"crop_size": whole} if crops else {}),
        "resample": _FILTERS.index(recipe.interpolation),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(recipe.mean),
        "image_std": list(recipe.std),
        "input_size": list(recipe.input_size),
        "crop_pct": recipe.crop_pct,
        "crop_mode": recipe.crop_mode,
    }
    return json.dumps(values, indent=2) + "\n"
