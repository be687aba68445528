"""What the card of a segmentation or detection model says about the model itself.

In: a checked `DenseConfig` and a checked pretrained_cfg. Out: Markdown sections, and the Hub's word
for the task. `card` puts them together with what the author states.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from natcupy.zoo.dense import DENSE_PUBLISHED, DenseConfig, count_dense_macs, num_dense_parameters
from natcupy.zoo.dense.images import Recipe

PIPELINES = {"segmentation": "image-segmentation", "detection": "object-detection"}
TAGS = {"upernet": "upernet", "mask_rcnn": "mask-rcnn", "cascade_mask_rcnn": "cascade-mask-rcnn"}
_HEADS = {
    "upernet": "UPerNet",
    "mask_rcnn": "Mask R-CNN",
    "cascade_mask_rcnn": "Cascade Mask R-CNN",
}
_JOBS = {
    "segmentation": "names the class of every pixel, one of {}",
    "detection": "finds objects of {} classes: their boxes and their masks",
}


def what(config: DenseConfig, cfg: Mapping[str, Any], backbone: str) -> tuple[str, list]:
    """The sentence, and rows of numbers that come before the backbone's."""
    height, width = _work_size(config, cfg)
    macs = count_dense_macs(config, height, width).total
    job = _JOBS[config.task].format(config.num_classes)
    rows = [
        ("parameters", f"{num_dense_parameters(config):,}"),
        (f"multiply-adds at {height} x {width}", f"{macs / 1e9:.1f} G"),
        ("channels of the heads", f"{config.channels}"),
    ]
    return f"{_HEADS[config.architecture]} on a {backbone} backbone that {job}.", rows


def _work_size(config: DenseConfig, cfg: Mapping[str, Any]) -> tuple[int, int]:
    """The papers' size of a released model, else the largest prepared picture."""
    known = DENSE_PUBLISHED.get(cfg.get("architecture", ""))
    if known is not None:
        return known.size
    recipe = Recipe.from_pretrained_cfg(dict(cfg), config.task, config.in_chans)
    return recipe.short_side, recipe.long_side


def use(config: DenseConfig, repo: str | None) -> str:
    """How to load and run it."""
    name = repo or "path/to/this/folder"
    lines = ["import natcupy", "", f'model = natcupy.from_pretrained("{name}")']
    if config.task == "segmentation":
        lines += ['result = model.predict("picture.png")', "print(result.areas())"]
    else:
        lines += [
            'found = model.predict("picture.png").above(0.5)',
            "for label, score, box in zip(found.labels, found.scores, found.boxes):",
            "    print(found.names[label], float(score), box.tolist())",
        ]
    command = {"segmentation": "segment", "detection": "detect"}[config.task]
    shell = f"natcupy {command} picture.png --model {name} -o out.png"
    code = "\n".join(lines)
    return f"## Use\n\n```python\n{code}\n```\n\nOr on the command line:\n\n```\n{shell}\n```"


def pictures(config: DenseConfig, cfg: Mapping[str, Any]) -> list[tuple[str, str]]:
    """How pictures are prepared, as rows."""
    recipe = Recipe.from_pretrained_cfg(dict(cfg), config.task, config.in_chans).to_dict()
    return [
        (key, ", ".join(f"{v:g}" for v in value) if isinstance(value, tuple) else f"{value}")
        for key, value in recipe.items()
    ]
