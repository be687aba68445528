"""What `natcupy models` and `natcupy info` say of segmentation and detection models.

In: a name, or a model's numbers. Out: records that can be printed as JSON, and the pairs of a list.
Nothing is fetched.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from natcupy.hub import dense, dense_weights
from natcupy.hub.dense_card import PIPELINES
from natcupy.hub.weights import ORIGINAL_HOST
from natcupy.zoo.dense import (
    DENSE_PUBLISHED,
    DenseConfig,
    count_dense_macs,
    num_dense_parameters,
)
from natcupy.zoo.dense.images import Recipe

SCORES = {
    "segmentation": ("mIoU", "mIoU, scales and flips"),
    "detection": ("box AP", "mask AP"),
}


def record(name: str) -> dict[str, Any]:
    """The line of a released model, by its name with underscores."""
    printed = DENSE_PUBLISHED[name]
    row = dense_weights.find(name)
    task = row.task
    return {
        "name": name.replace("_", "-"),
        "task": task,
        "parameters_millions": printed.params,
        "gmacs": printed.gmacs,
        "image_size": list(printed.size),
        "scores": dict(zip(SCORES[task], printed.scores, strict=True)),
        "weights": "authors' .pth file",
        "licence": row.license,
    }


def released(name: str) -> dict[str, Any]:
    """All facts about a released model, by its name with underscores."""
    config, printed = dense.named_config(name), DENSE_PUBLISHED[name]
    row = dense_weights.find(name)
    line = record(name)
    return counted(line["name"], config, {"architecture": name}) | {
        "published": {
            "parameters_millions": printed.params,
            "gmacs": printed.gmacs,
            "scores": line["scores"],
        },
        "weights": {
            "kind": line["weights"],
            "tag": row.tag,
            "file": f"{ORIGINAL_HOST}{row.original}",
            "licence": row.license,
        },
    }


def counted(name: str, config: DenseConfig, cfg: Mapping[str, Any]) -> dict[str, Any]:
    """What arithmetic tells of a model: parameters, and multiply-adds at the papers' size."""
    recipe = Recipe.from_pretrained_cfg(dict(cfg), config.task)
    known = DENSE_PUBLISHED.get(cfg.get("architecture", ""))
    height, width = known.size if known else (recipe.short_side, recipe.long_side)
    macs = count_dense_macs(config, height, width)
    return {
        "name": name,
        "task": config.task,
        "config": config.to_dict(),
        "channels": list(config.backbone.dims),
        "parameters": num_dense_parameters(config),
        "macs": {"papers": macs.total, "parts": asdict(macs), "at": [height, width]},
        "pictures": recipe.to_dict(),
    }


def readable(found: dict[str, Any]) -> list[tuple[str, object]]:
    """The pairs that describe a model, but for the backbone's own and its weights."""
    config, macs, recipe = found["config"], found["macs"], found["pictures"]
    parts = ", ".join(f"{part} {count / 1e9:.1f}" for part, count in macs["parts"].items() if count)
    height, width = macs["at"]
    pairs = [
        ("model", found["name"]),
        ("task", f"{found['task']} ({PIPELINES[found['task']]} on the Hub)"),
        ("head", config["architecture"]),
        ("parameters", f"{found['parameters']:,}"),
        ("MACs", f"{macs['papers'] / 1e9:.1f} G at {height} x {width}, counted as in the papers"),
        ("", f"G by part: {parts}"),
        ("classes", config["num_classes"]),
        (
            "pictures",
            f"scaled to at most {recipe['long_side']} x {recipe['short_side']}, sides padded to "
            f"multiples of {recipe['pad_divisor']}",
        ),
    ]
    printed = found["published"]
    text = "no numbers"
    if printed:
        scores = ", ".join(f"{key} {value}" for key, value in printed["scores"].items())
        text = f"{printed['parameters_millions']} M parameters, {printed['gmacs']} GMACs, {scores}"
    return [*pairs, ("published", text)]
