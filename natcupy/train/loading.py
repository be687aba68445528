"""A model made ready for other labels, another window, another picture size.

In: a name, or a loaded model, and the classes of the data. Out: an `ImageModel` whose head, bias
tables, input size and label names are those of the run. Nothing is replaced that was not asked for.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from natcupy.hub import from_pretrained
from natcupy.train import checkpoint, randomness, rows, run
from natcupy.train.config import TrainConfig, TrainError
from natcupy.zoo import ImageModel, create_model
from natcupy.zoo.config import SINGLE_LEVEL, ConfigError
from natcupy.zoo.layers import Block, drop_path_rates

if TYPE_CHECKING:
    from natcupy.zoo.dense import DenseModel

log = logging.getLogger("natcupy.train")

UNCROPPED_FROM = 384  # pixels: the released models of this size take the whole picture


def load_model(
    name: str,
    config: TrainConfig,
    *,
    pretrained: bool = True,
    kernel_size: int | None = None,
    **wishes: Any,
) -> ImageModel:
    """A model to finetune, by name.

    Args:
        name: as `natcupy.from_pretrained` takes it.
        config: for the picture size, and the seed of what is not in the weights.
        pretrained: False for fresh weights.
        kernel_size: another window; bias tables are resized (bicubic).
        **wishes: more arguments of `natcupy.from_pretrained`, or fields of the model's config.
    """
    if kernel_size is not None:
        wishes["kernel_size"] = kernel_size
    with randomness.drawn_from(config.seed, 4):
        model = _made(name, pretrained, wishes)
        side = config.image_size
        if side and model.config.family in SINGLE_LEVEL and side != model.config.img_size:
            model = _made(name, pretrained, {**wishes, "img_size": side})
    return model


def prepare(model: nn.Module, classes: Sequence[str], config: TrainConfig) -> ImageModel:
    """Give a model the head, names, picture size and stochastic depth of the run, in place.

    Returns the model itself, or the one inside, where another library (PEFT) has wrapped it.

    Raises:
        ConfigError: the model cannot have what the config wants.
        TrainError: it is no classifier of the zoo.
    """
    wrapped = hasattr(model, "get_base_model")
    bare = model.get_base_model() if wrapped else model
    if not isinstance(bare, ImageModel) or bare.config.out_indices is not None:
        raise TrainError(
            f"classification trains a classifier of natcupy's zoo, got {type(bare).__name__}"
            f"{'' if not isinstance(bare, ImageModel) else ' that gives feature maps'}."
        )
    check_dtype(bare, config)
    _fit_head(bare, tuple(classes), config, wrapped)
    _fit_pictures(bare, config)
    if config.drop_path is not None:
        bare.config = bare.config.replace(drop_path_rate=config.drop_path)
        blocks = [module for module in bare.modules() if isinstance(module, Block)]
        for block, rate in zip(blocks, drop_path_rates(bare.config), strict=True):
            block.drop_path.rate = rate
    return bare


def is_first() -> bool:
    """Whether this is the first process of a run, or the only one."""
    return int(os.environ.get("RANK", "0")) == 0


def check_dtype(model: nn.Module, config: TrainConfig) -> None:
    """Raise TrainError where weights are not of the pictures' dtype, float32."""
    dtype = next(model.parameters()).dtype
    if dtype != torch.float32 and config.mixed_precision == "no":
        raise TrainError(
            f"a model is trained in float32, got weights in {dtype}. Train model.float(); "
            "mixed_precision makes its computations narrower."
        )


def _made(name: str, pretrained: bool, wishes: dict[str, Any]) -> ImageModel:
    if pretrained:
        return from_pretrained(name, **wishes)
    options = {"cache_dir", "revision", "token", "local_files_only"}
    fields = {key: value for key, value in wishes.items() if key not in options}
    try:
        return create_model(name, **fields)
    except ValueError:
        # A bundled or own model has no name in the zoo: its config, without its weights.
        like = from_pretrained(name, **wishes)
    from natcupy.zoo import build_model

    facts = {k: v for k, v in like.pretrained_cfg.items() if k not in ("tag", "license")}
    return build_model(like.config, facts)


def _fit_head(
    model: ImageModel, classes: tuple[str, ...], config: TrainConfig, wrapped: bool
) -> None:
    named = model.pretrained_cfg.get("label_names")
    fits = model.num_classes == len(classes)
    if wrapped and config.head == "fresh":
        raise ConfigError("head must be 'auto' or 'keep' for a wrapped model, got 'fresh'.")
    if (wrapped or config.head == "keep") and not fits:
        raise ConfigError(
            f"a head that is kept must have a row per class, got {model.num_classes} for "
            f"{len(classes)} classes. "
            + (
                "Load the model with num_classes before wrapping it."
                if wrapped
                else "Set head to 'auto'."
            )
        )
    keeps = wrapped or config.head == "keep"
    same = named is not None and tuple(named) == classes and fits
    if not keeps and (config.head == "fresh" or not same):
        _replace_head(model, classes, config)
    model.pretrained_cfg["label_names"] = list(classes)


def _replace_head(model: ImageModel, classes: tuple[str, ...], config: TrainConfig) -> None:
    """Another classifier, with the rows of the classes that the one before knows by name."""
    had, before = model.head.state_dict(), model.num_classes
    places = known_rows(model, classes, config) if isinstance(model.head, nn.Linear) else {}
    with randomness.drawn_from(config.seed, 3):
        model.reset_classifier(len(classes))
    rows.take_over(model.head.state_dict(), had, places, len(classes), before)
    model.pretrained_cfg["tag"] = ""  # the tag named complete weights


def known_rows(
    model: ImageModel | DenseModel, classes: tuple[str, ...], config: TrainConfig
) -> rows.Places:
    """Which rows of a classifier that is replaced go on; a line says so, of weights with a source.

    Not where a run is continued, whose checkpoint has the classifier.
    """
    if config.head == "fresh":
        return {}
    places = rows.known(classes, model.pretrained_cfg.get("label_names"), model.num_classes)
    if getattr(model, "source", None) is not None and is_first() and not _goes_on(config):
        log.warning("%s", rows.told(classes, places, model.num_classes))
    return places


def _goes_on(config: TrainConfig) -> bool:
    state = Path(config.output).expanduser() / run.CHECKPOINT / checkpoint.STATE
    return config.resume and state.is_file()


def _fit_pictures(model: ImageModel, config: TrainConfig) -> None:
    side = config.image_size
    if side is None:
        return
    if model.config.img_size not in (None, side):
        raise ConfigError(
            f"image_size must be {model.config.img_size}, the only size that this model takes, got "
            f"{side}. Load it by name, or with img_size={side}."
        )
    channels = model.config.in_chans
    model.pretrained_cfg["input_size"] = (channels, side, side)
    if side >= UNCROPPED_FROM:
        model.pretrained_cfg["crop_pct"] = 1.0


def unwrapped(model: nn.Module) -> ImageModel:
    """A trained model as the zoo has it: adapters of PEFT are merged into the weights."""
    if hasattr(model, "merge_and_unload"):
        model = model.merge_and_unload()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return model


def describe(model: ImageModel) -> dict[str, Any]:
    """The config of a model as JSON values, for the record of a run."""
    return dataclasses.asdict(model.config)
