"""`natcupy info MODEL`: one model's numbers, counted here and as published, and its weights.

In: a name (nothing is fetched for the zoo's own names), a Hub repository, a folder or a file.
Out: a list of facts or JSON.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

import torch

from natcupy.cli import console, dense_info
from natcupy.cli.models import source, weights_row
from natcupy.hub import from_pretrained
from natcupy.hub.weights import ORIGINAL_HOST, embedded
from natcupy.zoo import PUBLISHED, ModelConfig, count_macs, create_model, is_model, num_parameters
from natcupy.zoo.dense import DenseConfig, dense_name


def run(arguments: argparse.Namespace) -> int:
    """Print the facts."""
    found = gather(arguments.model)
    if arguments.json:
        console.print_json(found)
    else:
        print(console.facts(_readable(found)))
    return 0


def gather(name: str) -> dict[str, Any]:
    """All facts about a model, JSON-able."""
    dense = dense_name(name.strip().lower())
    if dense is not None:
        return dense_info.released(dense)
    if is_model(name) and not embedded(name):
        return _of_the_zoo(name.strip().lower().partition(".")[0].replace("_", "-"))
    model = from_pretrained(name)
    weights = vars(model.source) | {"licence": model.pretrained_cfg.get("license")}
    weights.pop("license")
    count = dense_info.counted if isinstance(model.config, DenseConfig) else _counted
    return count(name, model.config, model.pretrained_cfg) | {
        "published": None,
        "weights": weights,
    }


def _of_the_zoo(name: str) -> dict[str, Any]:
    with torch.device("meta"):
        model = create_model(name)
    printed = PUBLISHED[name.replace("-", "_")]
    row = weights_row(name)
    return _counted(name, model.config, model.pretrained_cfg) | {
        "published": {
            "parameters_millions": printed.params,
            "gmacs": printed.gmacs,
            "top1": printed.top1,
            "note": printed.note or None,
        },
        "weights": {
            "kind": source(row),
            "tag": row.tag if row else None,
            "repo": row.repo if row else None,
            "file": f"{ORIGINAL_HOST}{row.original}" if row and not row.repo else None,
            "size_mb": row.size_mb if row else None,
            "licence": row.license if row else None,
        },
    }


def _counted(name: str, config: ModelConfig, cfg: Mapping[str, Any]) -> dict[str, Any]:
    _, height, width = cfg["input_size"]
    macs = count_macs(config, height, width)
    pictures = {
        key: cfg[key]
        for key in ("input_size", "crop_mode", "crop_pct", "interpolation", "mean", "std")
        if key in cfg
    }
    return {
        "name": name,
        "task": "classification" if config.num_classes else "features",
        "config": config.to_dict(),
        "channels": list(config.dims),
        "parameters": num_parameters(config),
        "macs": {"plain": macs.plain, "papers": macs.papers, "at": [height, width]},
        "pictures": pictures,
    }


def _readable(found: dict[str, Any]) -> list[tuple[str, object]]:
    whole, weights = found["config"], found["weights"]
    if "backbone" in whole:
        config = whole["backbone"]
        pairs = [
            *dense_info.readable(found),
            ("backbone", config["family"]),
            *_sizes(found, config),
        ]
    else:
        config = whole
        pairs = [*_classifier(found, config), *_published(found["published"])]
    pairs.append(("weights", weights["kind"]))
    size = weights.get("size_mb")
    shown = {**weights, "size": f"{size} MB" if size else None}
    pairs += [
        (key, shown[key])
        for key in ("tag", "repo", "file", "path", "sha256", "size", "licence")
        if shown.get(key)
    ]
    return pairs


def _classifier(found: dict[str, Any], config: dict[str, Any]) -> list[tuple[str, object]]:
    macs = found["macs"]
    return [
        ("model", found["name"]),
        ("family", config["family"]),
        ("parameters", f"{found['parameters']:,}"),
        (
            "MACs",
            f"{_giga(macs['plain'])} at {macs['at'][0]} x {macs['at'][1]} (convolutions, linear "
            "layers, attention)",
        ),
        ("", f"{_giga(macs['papers'])} by the papers' counting (with biases, norms, pooling)"),
        *_sizes(found, config),
        ("classes", config["num_classes"]),
        ("pictures", _pictures(found["pictures"])),
    ]


def _sizes(found: dict[str, Any], config: dict[str, Any]) -> list[tuple[str, object]]:
    return [
        ("channels", _list(found["channels"])),
        ("blocks", _list(config["depths"])),
        ("heads", _list(config["num_heads"])),
        ("window", config["kernel_size"] or "the whole map"),
        ("dilations", _dilations(config["dilations"])),
        ("MLP ratio", f"{config['mlp_ratio']:g}"),
        ("layer scale", "none" if config["layer_scale"] is None else config["layer_scale"]),
    ]


def _published(printed: dict[str, Any] | None) -> list[tuple[str, object]]:
    if printed is None or printed["parameters_millions"] is None:
        return [("published", "no numbers")]
    text = f"{printed['parameters_millions']} M parameters, {printed['gmacs']} GMACs"
    text += f", ImageNet-1K top-1 {printed['top1']} %"
    pairs: list[tuple[str, object]] = [("published", text)]
    if printed["note"]:
        pairs.append(("", f"note: {printed['note']}"))
    return pairs


def _giga(count: int) -> str:
    return f"{count / 1e9:.2f} G" if count >= 1e8 else f"{count / 1e6:.2f} M"


def _dilations(rows: list[list[int]] | None) -> str:
    return "1" if rows is None else "; ".join(_list(row) for row in rows)


def _pictures(recipe: dict[str, Any]) -> str:
    channels, height, width = recipe["input_size"]
    kind = {1: "grey", 3: "colour"}.get(channels, f"{channels} channels")
    how = {"ink": "the drawing found and framed", "squash": "resized whole"}.get(
        recipe.get("crop_mode", "center"), f"centre crop of {recipe.get('crop_pct', 1):g}"
    )
    return f"{height} x {width} {kind}, {how}"


def _list(values: list[int]) -> str:
    return ", ".join(map(str, values))
