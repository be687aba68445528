"""The model card: a README.md that says only what is known.

In: a checked config, a checked pretrained_cfg and, where there is one, the source of the weights.
Out: Markdown with the metadata block that the Hub reads. Every value that enters has passed the
closed schema, so a hostile config cannot put markup or links into a card.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Protocol

from natcupy.hub.config import model_type
from natcupy.zoo.config import ModelConfig, num_parameters

_REPO = re.compile(r"[A-Za-z0-9][\w.\-]{0,95}/[A-Za-z0-9][\w.\-]{0,95}", re.ASCII)
_NAT = """@inproceedings{hassani2023neighborhood,
  title     = {Neighborhood Attention Transformer},
  author    = {Ali Hassani and Steven Walton and Jiachen Li and Shen Li and Humphrey Shi},
  booktitle = {Conference on Computer Vision and Pattern Recognition (CVPR)},
  year      = {2023},
  note      = {arXiv:2204.07143}
}"""
_DINAT = """@article{hassani2022dilated,
  title   = {Dilated Neighborhood Attention Transformer},
  author  = {Ali Hassani and Humphrey Shi},
  journal = {arXiv:2209.15001},
  year    = {2022}
}"""


class Origin(Protocol):
    """What a card needs to know of where weights came from."""

    repo: str | None
    commit: str | None
    license: str | None


def render(config: ModelConfig, cfg: Mapping[str, Any], origin: Origin | None = None) -> str:
    """The card's text.

    Args:
        config: the model's numbers.
        cfg: a pretrained_cfg that passed the schema.
        origin: the loaded weights' source; its repository becomes the base model, its licence is
            inherited.
    """
    base = origin.repo if origin and origin.repo and _REPO.fullmatch(origin.repo) else None
    license_ = cfg.get("license") or (origin.license if origin else None)
    name = cfg.get("architecture", config.family)
    sections = [
        _metadata(config, license_, base),
        f"# {name}",
        _what(config),
        _use(config),
        _pictures(config, cfg),
        _origin(base, origin.commit if base and origin else None, license_),
        _citation(config),
    ]
    return "\n\n".join(sections) + "\n"


def _metadata(config: ModelConfig, license_: str | None, base: str | None) -> str:
    task = "image-classification" if _classifies(config) else "image-feature-extraction"
    values: list[tuple[str, Any]] = [("library_name", "natcupy"), ("pipeline_tag", task)]
    if license_:
        values.append(("license", license_))
    if base:
        values.append(("base_model", base))
    values.append(("tags", ["natcupy", "neighborhood-attention", model_type(config)]))
    # JSON is YAML, and quotes whatever needs quoting.
    return "\n".join(["---", *(f"{key}: {json.dumps(value)}" for key, value in values), "---"])


def _classifies(config: ModelConfig) -> bool:
    return config.num_classes > 0 and config.out_indices is None


def _what(config: ModelConfig) -> str:
    kind = {"nat": "NAT", "dinat": "DiNAT", "dinat_s": "DiNAT-s"}.get(
        model_type(config), "Isotropic neighborhood attention transformer"
    )
    if config.family == "vitrpb":
        kind = "ViT with relative positional bias"
    job = f"classifies pictures into {config.num_classes} classes"
    if not _classifies(config):
        job = "turns pictures into features"
    rows = [
        ("parameters", f"{num_parameters(config):,}"),
        ("channels per level", _numbers(config.dims)),
        ("blocks per level", _numbers(config.depths)),
        ("heads per level", _numbers(config.num_heads)),
        (
            "window",
            "whole map"
            if config.kernel_size is None
            else f"{config.kernel_size} x {config.kernel_size}",
        ),
        (
            "dilations",
            "1"
            if config.dilations is None
            else "; ".join(_numbers(row) for row in config.dilations),
        ),
    ]
    return f"{kind} that {job}.\n\n" + _table(rows)


def _use(config: ModelConfig) -> str:
    last = (
        "print(model(model.preprocess(image)).softmax(-1).topk(min(5, model.num_classes)))"
        if _classifies(config)
        else "print(model(model.preprocess(image)))"
    )
    return (
        "## Use\n\n```python\nimport natcupy\n\n"
        'model = natcupy.from_pretrained("path/to/this/folder")  # or this repository\'s name\n'
        f'image = "picture.png"\n{last}\n```'
    )


def _pictures(config: ModelConfig, cfg: Mapping[str, Any]) -> str:
    keys = ("input_size", "crop_mode", "crop_pct", "interpolation", "mean", "std")
    rows = [
        (key, _numbers(cfg[key]) if isinstance(cfg[key], list | tuple) else str(cfg[key]))
        for key in keys
        if key in cfg
    ]
    return "## Pictures\n\n`model.preprocess(image)` prepares them so:\n\n" + _table(rows)


def _origin(base: str | None, commit: str | None, license_: str | None) -> str:
    lines = ["## Origin and licence", ""]
    if base:
        at = f", commit `{commit}`" if commit and re.fullmatch(r"[0-9a-f]{40}", commit) else ""
        lines.append(f"Started from the weights of `{base}`{at}.")
    lines.append(
        f"Licence of the weights: `{license_}`."
        if license_
        else "No licence is stated for these weights."
    )
    return "\n".join(lines)


def _citation(config: ModelConfig) -> str:
    parts = [_NAT] if model_type(config) == "nat" else [_NAT, _DINAT]
    return "## Citation\n\n```bibtex\n" + "\n\n".join(parts) + "\n```"


def _numbers(values: Any) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _table(rows: list[tuple[str, str]]) -> str:
    return "\n".join(["| | |", "| --- | --- |", *(f"| {key} | {value} |" for key, value in rows)])
