"""The model card: a README.md that says only what is known.

In: a checked config, a checked pretrained_cfg and checked facts. Out: Markdown with the metadata
block that the Hub reads. Every value that enters has passed the closed schema or the checks of
`facts`, so neither a hostile config nor a hostile argument can put markup or links into a card.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from natcupy.hub import dense_card
from natcupy.hub.config import model_type
from natcupy.hub.dense import Config
from natcupy.hub.facts import Converted, Facts, Metric
from natcupy.zoo import count_macs
from natcupy.zoo.config import ModelConfig, num_parameters
from natcupy.zoo.dense import DenseConfig

_SEAL = "<!-- written by natcupy, unedited: {} -->"
# The sentences and rows below that `stated` reads back.
_ROW = re.compile(r"^\| (?!---)([^|\n]+) \| ([^|\n]+) \|$", re.MULTILINE)
_CONVERTED = re.compile(
    r"Converted from `(?P<file>[^`\n]+)`(?: of `(?P<repo>[\w./\-]+)`)?, SHA-256 "
    r"`(?P<sha256>[0-9a-f]{64})`"
)
_STARTED = re.compile(r"Started from the weights of `[^`\n]+`, commit `(?P<commit>[0-9a-f]{40})`")
_UNDER = re.compile(r"The weights it started from are under `(?P<license>[a-z0-9_.\-]+)`")
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


def render(config: Config, cfg: Mapping[str, Any], facts: Facts) -> str:
    """The card's text; its last line lets `is_generated` see whether somebody edited it.

    Args:
        config: the model's numbers.
        cfg: a pretrained_cfg that passed the schema.
        facts: what the author states.
    """
    name = facts.repo.split("/")[1] if facts.repo else cfg.get("architecture", _kind(config))
    sections = [
        _metadata(config, name, facts),
        f"# {name}",
        _what(config, cfg),
        _use(config, facts.repo),
        _results(facts.metrics),
        _training(facts),
        _pictures(config, cfg),
        _origin(facts),
        _citation(config),
    ]
    text = "\n\n".join(section for section in sections if section) + "\n"
    return f"{text}\n{_SEAL.format(_hash(text))}\n"


def is_generated(text: str) -> bool:
    """Whether a card is as `render` made it, so that a newer one may replace it."""
    body, _, last = text.removesuffix("\n").rpartition("\n")
    return last == _SEAL.format(_hash(body.removesuffix("\n") + "\n"))


def stated(text: str) -> dict[str, Any]:
    """What a card that `render` made says of the facts: its metadata, and where the text knows more
    `training`, `converted`, `base_commit`, `base_license`. Unchecked values.
    """
    values = {}
    head, _, body = text.partition("\n---\n")
    for line in head.splitlines()[1:]:
        key, _, value = line.partition(": ")
        values[key] = json.loads(value)
    return values | _told(body)


def _told(body: str) -> dict[str, Any]:
    """The facts in the sections that `_training` and `_origin` write."""
    found: dict[str, Any] = {}
    training = dict(_ROW.findall(_section(body, "Training")))
    if training:
        found["training"] = training
    origin = _section(body, "Origin and licence")
    if match := _CONVERTED.search(origin):
        found["converted"] = Converted(match["file"], match["sha256"], match["repo"])
    if match := _STARTED.search(origin):
        found["base_commit"] = match["commit"]
    if match := _UNDER.search(origin):
        found["base_license"] = match["license"]
    return found


def _section(body: str, heading: str) -> str:
    return body.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _kind(config: Config) -> str:
    return config.architecture if isinstance(config, DenseConfig) else config.family


def _backbone(config: Config) -> ModelConfig:
    return config.backbone if isinstance(config, DenseConfig) else config


def _task(config: Config) -> str:
    if isinstance(config, DenseConfig):
        return dense_card.PIPELINES[config.task]
    return "image-classification" if _classifies(config) else "image-feature-extraction"


def _metadata(config: Config, name: str, facts: Facts) -> str:
    task = _task(config)
    values: list[tuple[str, Any]] = [("library_name", "natcupy"), ("pipeline_tag", task)]
    if facts.license:
        values.append(("license", facts.license))
    if facts.base_model:
        values.append(("base_model", facts.base_model))
    if facts.datasets:
        values.append(("datasets", list(facts.datasets)))
    own = ["natcupy", "neighborhood-attention", model_type(_backbone(config))]
    if isinstance(config, DenseConfig):
        own.append(dense_card.TAGS[config.architecture])
    values.append(("tags", list(dict.fromkeys((*own, *facts.tags)))))
    if facts.metrics:
        results = [_result(metric, task) for metric in facts.metrics]
        values.append(("model-index", [{"name": name, "results": results}]))
    # JSON is YAML, and quotes whatever needs quoting.
    return "\n".join(["---", *(f"{key}: {json.dumps(value)}" for key, value in values), "---"])


def _result(metric: Metric, task: str) -> dict[str, Any]:
    dataset = {"type": metric.dataset, "name": metric.dataset_name or metric.dataset}
    if metric.split:
        dataset["split"] = metric.split
    measured = {"type": metric.type, "value": metric.value, "name": metric.name or metric.type}
    return {"task": {"type": task}, "dataset": dataset, "metrics": [measured]}


def _classifies(config: ModelConfig) -> bool:
    return config.num_classes > 0 and config.out_indices is None


def _what(config: Config, cfg: Mapping[str, Any]) -> str:
    if isinstance(config, DenseConfig):
        inner = config.backbone
        text, rows = dense_card.what(config, cfg, _family(inner))
        return f"{text}\n\n" + _table(rows + _sizes(inner))
    rows = [("parameters", f"{num_parameters(config):,}"), *_work(config, cfg), *_sizes(config)]
    job = f"classifies pictures into {config.num_classes} classes"
    if not _classifies(config):
        job = "turns pictures into features"
    return f"{_family(config)} that {job}.\n\n" + _table(rows)


def _family(config: ModelConfig) -> str:
    if config.family == "vitrpb":
        return "ViT with relative positional bias"
    return {"nat": "NAT", "dinat": "DiNAT", "dinat_s": "DiNAT-s"}.get(
        model_type(config), "Isotropic neighborhood attention transformer"
    )


def _sizes(config: ModelConfig) -> list[tuple[str, str]]:
    return [
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


def _work(config: ModelConfig, cfg: Mapping[str, Any]) -> list[tuple[str, str]]:
    if config.out_indices is not None or "input_size" not in cfg:
        return []
    _, height, width = cfg["input_size"]
    macs = count_macs(config, height, width).papers
    amount = f"{macs / 1e9:.2f} G" if macs >= 1e8 else f"{macs / 1e6:.2f} M"
    return [(f"multiply-adds at {height} x {width}", amount)]


def _use(config: Config, repo: str | None) -> str:
    if isinstance(config, DenseConfig):
        return dense_card.use(config, repo)
    last = (
        "print(model(model.preprocess(image)).softmax(-1).topk(min(5, model.num_classes)))"
        if _classifies(config)
        else "print(model(model.preprocess(image)))"
    )
    name = repo or "path/to/this/folder"
    text = (
        "## Use\n\n```python\nimport natcupy\n\n"
        f'model = natcupy.from_pretrained("{name}")\nimage = "picture.png"\n{last}\n```'
    )
    if repo is None:
        return text
    kind = "AutoModelForImageClassification" if config.num_classes else "AutoModel"
    if config.out_indices is not None:
        kind = "AutoBackbone"
    text += (
        "\n\nThe same with transformers:\n\n```python\nimport natcupy.transformers\n"
        f"from transformers import AutoImageProcessor, {kind}\n\n"
        f'processor = AutoImageProcessor.from_pretrained("{repo}")\n'
        f'model = {kind}.from_pretrained("{repo}")\n```'
    )
    if config.out_indices is None:
        text += (
            "\n\nAnd with timm:\n\n```python\nimport natcupy.timm\nimport timm\n\n"
            f'model = timm.create_model("hf-hub:{repo}", pretrained=True).eval()\n```'
        )
    return text


def _results(metrics: tuple[Metric, ...]) -> str:
    if not metrics:
        return ""
    lines = ["## Results", "", "| dataset | metric | value |", "| --- | --- | --- |"]
    for metric in metrics:
        where = metric.dataset_name or metric.dataset
        where += f", {metric.split}" if metric.split else ""
        lines.append(f"| {where} | {metric.name or metric.type} | {metric.value:g} |")
    return "\n".join(lines)


def _training(facts: Facts) -> str:
    return "## Training\n\n" + _table(list(facts.training)) if facts.training else ""


def _pictures(config: Config, cfg: Mapping[str, Any]) -> str:
    if isinstance(config, DenseConfig):
        rows = dense_card.pictures(config, cfg)
        return "## Pictures\n\n`model.recipe` prepares them so:\n\n" + _table(rows)
    keys = ("input_size", "crop_mode", "crop_pct", "interpolation", "mean", "std")
    rows = [
        (key, _numbers(cfg[key]) if isinstance(cfg[key], list | tuple) else str(cfg[key]))
        for key in keys
        if key in cfg
    ]
    return "## Pictures\n\n`model.preprocess(image)` prepares them so:\n\n" + _table(rows)


def _origin(facts: Facts) -> str:
    lines = ["## Origin and licence", ""]
    if facts.converted:
        place = f" of `{facts.converted.repo}`" if facts.converted.repo else ""
        lines.append(
            f"Converted from `{facts.converted.file}`{place}, SHA-256 "
            f"`{facts.converted.sha256}`: the same numbers under natcupy's names."
        )
    elif facts.base_model:
        commit = facts.base_commit
        at = f", commit `{commit}`" if commit and re.fullmatch(r"[0-9a-f]{40}", commit) else ""
        lines.append(f"Started from the weights of `{facts.base_model}`{at}.")
    if facts.datasets:
        lines.append("Trained on " + ", ".join(f"`{name}`" for name in facts.datasets) + ".")
    lines.append(
        f"Licence of the weights: `{facts.license}`."
        if facts.license
        else "No licence is stated for these weights."
    )
    if facts.base_license and facts.base_license != facts.license:
        lines.append(f"The weights it started from are under `{facts.base_license}`.")
    return "\n".join(lines)


def _citation(config: Config) -> str:
    parts = [_NAT] if model_type(_backbone(config)) == "nat" else [_NAT, _DINAT]
    return "## Citation\n\n```bibtex\n" + "\n\n".join(parts) + "\n```"


def _numbers(values: Any) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _table(rows: list[tuple[str, str]]) -> str:
    return "\n".join(["| | |", "| --- | --- |", *(f"| {key} | {value} |" for key, value in rows)])
