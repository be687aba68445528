"""Parts of timm that recipes ask for by name: policies, Mixup and CutMix, random erasing.

In: a `TrainConfig`. Out: timm's objects, or None where the config does not want them. timm is
imported when it is wanted; it needs a torchvision that fits the installed torch.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from natcupy.train.config import TrainConfig
from natcupy.zoo.preprocess import Preprocess


def policy(config: TrainConfig, recipe: Preprocess) -> Callable[[Any], Any] | None:
    """RandAugment and its like, on PIL pictures, set up as `timm.data.create_transform` does."""
    name = config.auto_augment
    if not name:
        return None
    module = _timm("timm.data.auto_augment", "auto_augment", name)
    side = min(recipe.input_size[1:])
    parameters: dict[str, Any] = {
        "translate_const": int(side * 0.45),
        "img_mean": tuple(min(255, round(255 * value)) for value in recipe.mean),
    }
    if config.interpolation != "random":
        transforms = _timm("timm.data.transforms", "auto_augment", name)
        parameters["interpolation"] = transforms.str_to_pil_interp(recipe.interpolation)
    if name.startswith("rand"):
        return module.rand_augment_transform(name, parameters)
    if name.startswith("augmix"):
        return module.augment_and_mix_transform(name, {**parameters, "translate_pct": 0.3})
    return module.auto_augment_transform(name, parameters)


def erasing(config: TrainConfig) -> Callable[[Any], Any] | None:
    """Random erasing with noise per pixel, on a normalised picture `[C, H, W]`."""
    if not config.random_erasing:
        return None
    module = _timm("timm.data.random_erasing", "random_erasing", config.random_erasing)
    return module.RandomErasing(config.random_erasing, mode="pixel", max_count=1, device="cpu")


def mixer(config: TrainConfig, classes: int) -> Callable[[Any, Any], Any] | None:
    """Mixup and CutMix of a batch: (pictures, labels) to (pictures, soft targets)."""
    if not (config.mixup or config.cutmix):
        return None
    module = _timm("timm.data.mixup", "mixup, cutmix", (config.mixup, config.cutmix))
    return module.Mixup(
        mixup_alpha=config.mixup,
        cutmix_alpha=config.cutmix,
        prob=config.mix_prob,
        switch_prob=config.mix_switch,
        mode="batch",
        label_smoothing=config.label_smoothing,
        num_classes=classes,
    )


def _timm(module: str, field: str, value: Any) -> Any:
    try:
        return import_module(module)
    except (ImportError, RuntimeError) as error:  # a torchvision for another torch raises either
        raise ImportError(
            f"{field}={value!r} comes from timm, which is not to be had here ({error}). Install "
            "it with: pip install 'natcupy[train]' (with a torchvision that fits torch), or set "
            "the field to nothing; the recipe 'finetune' needs neither."
        ) from None
