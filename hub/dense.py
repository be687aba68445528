"""Weights of segmentation and detection models: whose they are, and fitted to a wish.

In: state dicts with the names of mmsegmentation 0.20 and mmdetection 2.19, which are natcupy's own
for these models. Out: state dicts, a `DenseConfig` from shapes, the zoo's names that fit. All of it
works on meta tensors; nothing is read or built but on the meta device.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from natcupy.hub import convert
from natcupy.hub.convert import State
from natcupy.hub.errors import CheckpointError
from natcupy.hub.likeness import shape_differences
from natcupy.zoo import ImageModel, build_model, num_parameters
from natcupy.zoo.config import ModelConfig
from natcupy.zoo.dense import (
    DENSE_MODELS,
    DenseConfig,
    DenseModel,
    Detector,
    build_dense_model,
    create_dense_model,
    num_dense_parameters,
)

Config = ModelConfig | DenseConfig
Model = ImageModel | DenseModel

# A tensor that only this architecture has.
_MARKS = {
    "upernet": "decode_head.fpn_bottleneck.conv.weight",
    "mask_rcnn": "roi_head.bbox_head.fc_cls.weight",
    "cascade_mask_rcnn": "roi_head.bbox_head.0.fc_cls.weight",
}
CLASSIFIERS = re.compile(r".*\.(conv_seg|fc_cls|fc_reg|conv_logits)\.(weight|bias)")
_BACKBONE_FIELDS = tuple(ModelConfig.__dataclass_fields__)
_DENSE_FIELDS = tuple(DenseConfig.__dataclass_fields__)


def architecture_of(names: Iterable[str]) -> str | None:
    """ "upernet", "mask_rcnn" or "cascade_mask_rcnn" where a whole one is there, else None."""
    names = set(names)
    if not any(name.startswith("backbone.") for name in names):
        return None
    return next((kind for kind, mark in _MARKS.items() if mark in names), None)


def to_natcupy(state: Mapping[str, Tensor]) -> State:
    """Without the second copy that mmcv keeps of averaged weights; with all batch norm counters.

    mmcv saves a model under averaging with the averaged numbers in place and the others beside
    them, as `ema_` and the name with underscores. Counters are missing in files of old torch.
    """
    out = {name: tensor for name, tensor in state.items() if not _is_copy(name)}
    for name, tensor in state.items():
        if name.endswith(".running_var") and not _is_copy(name):
            counter = f"{name.removesuffix('running_var')}num_batches_tracked"
            out.setdefault(counter, tensor.new_zeros((), dtype=torch.int64))
    return out


def _is_copy(name: str) -> bool:
    return name.startswith("ema_") and "." not in name


def renamed(state: Mapping[str, Tensor], config: Config) -> State:
    """Tensors of any known layout in natcupy's names, for a model of this config."""
    whole = isinstance(config, DenseConfig)
    return to_natcupy(state) if whole else convert.to_natcupy(state)


# ---------------------------------------------------------------- numbers from shapes


def infer_config(state: Mapping[str, Tensor]) -> DenseConfig:
    """Every number that shapes can tell; dilations and the drop path rate are not among them.

    Raises:
        CheckpointError: a tensor that decides a number is missing or misshapen.
    """
    kind = architecture_of(state)
    if kind is None:
        marks = ", ".join(_MARKS.values())
        raise CheckpointError(
            f"a segmentation or detection checkpoint has tensors named backbone.… and one of "
            f"{marks}; got none of these. Check that this is the right file."
        )
    shape = convert.Shapes(state)
    backbone = convert.infer_config(convert.from_backbone(state))
    if kind == "upernet":
        classes, channels = shape("decode_head.conv_seg.weight", 4)[:2]
        widths = {"aux_channels": shape("auxiliary_head.convs.0.conv.weight", 4)[0]}
    else:
        rows, hidden = shape(_MARKS[kind], 2)
        classes, channels = rows - 1, shape("rpn_head.rpn_conv.weight", 4)[0]
        widths = {"fc_channels": hidden}
    return DenseConfig(kind, backbone, num_classes=classes, channels=channels, **widths)


@cache
def named_config(name: str) -> DenseConfig:
    """The numbers of a released model."""
    with torch.device("meta"):
        return create_dense_model(name).config


def candidates(seen: DenseConfig) -> list[str]:
    """The released models whose shapes these are, whatever the classes."""
    prefix = f"{seen.architecture}_"
    names = [name for name in DENSE_MODELS if name.startswith(prefix)]
    return [name for name in names if not differences(seen, named_config(name))]


def differences(seen: DenseConfig, known: DenseConfig) -> list[str]:
    """What shapes tell apart, in words; the number of classes and of input channels is free."""
    wrong = [
        f"{key} {getattr(seen, key)} instead of {getattr(known, key)}"
        for key in ("architecture", "channels", "aux_channels", "fc_channels")
        if getattr(seen, key) != getattr(known, key)
    ]
    return wrong + shape_differences(seen.backbone, known.backbone)


def name_of(config: DenseConfig) -> str | None:
    """The released model with these numbers, whatever the classes and the drop path rate."""
    for name in candidates(config):
        known = named_config(name).backbone
        if _dilations(config.backbone) == _dilations(known):
            return name
    return None


def _dilations(config: ModelConfig) -> tuple[tuple[int, ...], ...]:
    return config.dilations or tuple((1,) * depth for depth in config.depths)


# ---------------------------------------------------------------- models and wishes


def build(config: Config, cfg: dict[str, Any] | None = None) -> Model:
    """A model of either kind from its numbers."""
    if isinstance(config, DenseConfig):
        return build_dense_model(config, cfg)
    return build_model(config, cfg)


def count_parameters(config: Config) -> int:
    """Parameters of a model of either kind, by arithmetic."""
    if isinstance(config, DenseConfig):
        return num_dense_parameters(config)
    return num_parameters(config)


def wanted(have: DenseConfig, wishes: Mapping[str, Any]) -> DenseConfig:
    """The config with the caller's wishes: its own fields, and those of its backbone."""
    own = {key: value for key, value in wishes.items() if key in _DENSE_FIELDS}
    inner = {
        key: value
        for key, value in wishes.items()
        if key in _BACKBONE_FIELDS and key not in (*own, "family", "img_size", "out_indices")
    }
    unknown = sorted(wishes.keys() - own.keys() - inner.keys())
    if unknown or {"architecture", "backbone"} & own.keys():
        raise TypeError(
            f"{have.architecture} takes num_classes, in_chans, kernel_size, dilations, "
            f"drop_path_rate … , got {', '.join(unknown) or 'architecture or backbone'}."
        )
    if inner:
        own["backbone"] = have.backbone.replace(**inner)
    return have.replace(**own)


def fit(
    state: Mapping[str, Tensor], have: DenseConfig, want: DenseConfig
) -> tuple[State, frozenset[str]]:
    """Weights of config `have`, changed as far as `want` asks for it; and the names left fresh.

    Another `num_classes` leaves out every classifier (and the deltas, which are per class); the
    backbone is fitted as `convert.fit` does.
    """
    inner, fresh = convert.fit(convert.from_backbone(state), have.backbone, want.backbone)
    out = {name: tensor for name, tensor in state.items() if not name.startswith("backbone.")}
    out = convert.to_backbone(inner) | out
    left = {f"backbone.{name}" for name in fresh}
    if have.num_classes != want.num_classes:
        left |= {name for name in out if CLASSIFIERS.fullmatch(name)}
        out = {name: tensor for name, tensor in out.items() if name not in left}
    return out, frozenset(left)


@torch.inference_mode()
def outputs(model: nn.Module, picture: Tensor) -> list[Tensor]:
    """Everything a model computes from a picture `[1, C, H, W]`, whatever it would decide."""
    if not isinstance(model, Detector):
        result = model(picture)
        return result if isinstance(result, list) else [result]
    maps = model.pyramid(picture)
    logits, deltas = model.rpn_head(maps)
    height, width = picture.shape[2:]
    box = picture.new_tensor([[0.0, 0.0, width, height]])
    boxes, scores = model.classify(maps[:-1], [box], model._frames(picture, None))[0]
    label = torch.zeros(1, dtype=torch.int64, device=picture.device)
    masks = model.mask_probabilities(maps[:-1], [box], label)
    return [*maps, *logits, *deltas, boxes, scores, masks]
