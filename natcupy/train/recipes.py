"""Named recipes: the numbers the papers trained with, each with its source.

In: a recipe's name. Out: fields of `TrainConfig`. A rate is that of one step as it is; the
papers' steps see 1024 pictures (8 processes of 128) or, in 22K-to-1K tuning, 512 (8 of 64).
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from natcupy.zoo.config import ConfigError


@dataclass(frozen=True)
class Recipe:
    """One recipe.

    Attributes:
        fields: of `TrainConfig`.
        about: what it is for.
        source: where the numbers are from, and what they leave open.
    """

    fields: Mapping[str, Any]
    about: str
    source: str


_SCRIPT = (
    "classification/train.py and configs/*.yml of SHI-Labs/Neighborhood-Attention-Transformer "
    "(MIT), which start from timm 0.5"
)

# The models' own drop path rates apply (0.1 to 0.5 by size), so no recipe sets one.
_IN1K: dict[str, Any] = {
    "epochs": 300,
    "cooldown_epochs": 10,
    "warmup_epochs": 20,
    "warmup_lr": 1e-6,
    "lr": 1e-3,
    "min_lr": 5e-6,
    "schedule": "cosine",
    "batch_size": 128,
    "weight_decay": 0.05,
    "decay_bias_tables": True,  # the script asked timm for exemptions under a name it ignores
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "clip_grad": 5.0,
    "layer_decay": 1.0,
    "ema_decay": 0.0,
    "label_smoothing": 0.1,
    "mixup": 0.8,
    "cutmix": 1.0,
    "mix_prob": 1.0,
    "mix_switch": 0.5,
    "auto_augment": "rand-m9-mstd0.5-inc1",
    "color_jitter": 0.4,  # the script's; without effect beside RandAugment, as in timm
    "random_erasing": 0.25,
    "crop_scale": (0.08, 1.0),
    "crop_ratio": (3 / 4, 4 / 3),
    "flip": 0.5,
    "affine": 0.0,
    "interpolation": "random",
    "mixed_precision": "fp16",
    "seed": 42,
}
# 22K to 1K: no mixing and no automatic mixed precision; everything else as the script has it.
_TUNED: dict[str, Any] = {
    **_IN1K,
    "epochs": 30,
    "cooldown_epochs": 0,
    "warmup_epochs": 0,
    "lr": 5e-5,
    "schedule": "constant",
    "batch_size": 64,
    "mixup": 0.0,
    "cutmix": 0.0,
    "mixed_precision": "no",
    "head": "fresh",
}
_TUNED_SOURCE = (
    f"{_SCRIPT}. The yml says `sched: linear`, for which the script has no branch, so the rate "
    "stays constant as shipped; --schedule linear is what was perhaps meant"
)

RECIPES: Mapping[str, Recipe] = MappingProxyType({
    "finetune": Recipe(
        {},
        "a pretrained model on another set of labels; needs neither timm nor torchvision",
        "natcupy's own defaults (AdamW, cosine, layer decay 0.8, random crops, flips, mild colour)",
    ),
    "nat-in1k": Recipe(
        _IN1K,
        "NAT and DiNAT (mini to base), DiNAT-s and isotropic small on ImageNet-1K from scratch: "
        "300 epochs and 10 of cool-down, 1024 pictures a step",
        f"{_SCRIPT}; NAT, arXiv 2204.07143, 4.1, and DiNAT, arXiv 2209.15001, 4.1",
    ),
    "nat-isotropic-base-in1k": Recipe(
        {**_IN1K, "warmup_epochs": 50, "ema_decay": 0.9998},
        "isotropic NAT, DiNAT and ViT of base size on ImageNet-1K from scratch",
        f"{_SCRIPT}; as nat-in1k with 50 epochs of warm-up and a moving average of the weights",
    ),
    "dinat-22k-to-1k-224": Recipe(
        {**_TUNED, "weight_decay": 1e-4, "image_size": 224},
        "dinat-large-21k and dinat-s-large-21k to ImageNet-1K at 224",
        _TUNED_SOURCE,
    ),
    "dinat-22k-to-1k-384": Recipe(
        {**_TUNED, "weight_decay": 1e-10, "image_size": 384},
        "dinat-large-21k to ImageNet-1K at 384 (load it with the dilations of dinat-large-384)",
        _TUNED_SOURCE,
    ),
    "dinat-s-22k-to-1k-384": Recipe(
        {**_TUNED, "weight_decay": 1e-5, "image_size": 384},
        "dinat-s-large-21k to ImageNet-1K at 384 (with the dilations of dinat-s-large-384)",
        _TUNED_SOURCE,
    ),
})  # fmt: skip


def recipe_fields(name: str) -> dict[str, Any]:
    """The fields of `TrainConfig` that a recipe sets. Raises ConfigError for an unknown name."""
    if name not in RECIPES:
        near = difflib.get_close_matches(str(name), RECIPES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(RECIPES)}."
        raise ConfigError(f"there is no recipe {str(name)[:60]!r}; {hint}")
    return dict(RECIPES[name].fields)
