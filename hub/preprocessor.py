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
    out: PretrainedCfg = {}
    size = values.get("size", 224)
    crops = values.get("do_center_crop") is True
    if isinstance(size, dict):
        size = size.get("height", size.get("shortest_edge"))
    size = schema.integer("size", size, 1, 8192)
    final = size
    if crops:
        crop = values.get("crop_size", size)
        final = schema.integer(
            "crop_size", crop.get("height") if isinstance(crop, dict) else crop, 1, 8192
        )
        out["crop_pct"] = min(1.0, final / size)
    out["crop_mode"] = "center" if crops else "squash"
    out["input_size"] = (3, final, final)
    for theirs, ours in (("image_mean", "mean"), ("image_std", "std")):
        if values.get(theirs) is not None:
            out[ours] = schema.per_channel(theirs, values[theirs], None)
    if values.get("resample") is not None:
        out["interpolation"] = _FILTERS[schema.integer("resample", values["resample"], 0, 5)]
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
