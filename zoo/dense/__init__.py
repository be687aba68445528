"""Segmentation and detection: UPerNet, Mask R-CNN and Cascade Mask R-CNN on the zoo's backbones.

In: a name and overrides, or a `DenseConfig`. Out: a model. The layers' names and the behaviour are
those of the released NAT and DiNAT checkpoints.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

from natcupy.zoo.dense import named
from natcupy.zoo.dense.base import DenseModel
from natcupy.zoo.dense.cascade import CascadeMaskRCNN
from natcupy.zoo.dense.config import DenseConfig
from natcupy.zoo.dense.detections import Detections
from natcupy.zoo.dense.detector import Detector
from natcupy.zoo.dense.flops import DenseMacs, count_dense_macs
from natcupy.zoo.dense.images import Prepared, Recipe
from natcupy.zoo.dense.mask_rcnn import MaskRCNN
from natcupy.zoo.dense.parameters import num_dense_parameters
from natcupy.zoo.dense.published import DENSE_PUBLISHED, DensePublished
from natcupy.zoo.dense.segment import Segmentation
from natcupy.zoo.dense.upernet import MULTI_SCALE, UPerNet

DENSE_MODELS: dict[str, Callable[..., DenseModel]] = {
    "upernet_nat_mini": named.upernet_nat_mini,
    "upernet_nat_tiny": named.upernet_nat_tiny,
    "upernet_nat_small": named.upernet_nat_small,
    "upernet_nat_base": named.upernet_nat_base,
    "upernet_dinat_mini": named.upernet_dinat_mini,
    "upernet_dinat_tiny": named.upernet_dinat_tiny,
    "upernet_dinat_small": named.upernet_dinat_small,
    "upernet_dinat_base": named.upernet_dinat_base,
    "upernet_dinat_large": named.upernet_dinat_large,
    "upernet_dinat_s_tiny": named.upernet_dinat_s_tiny,
    "upernet_dinat_s_small": named.upernet_dinat_s_small,
    "upernet_dinat_s_base": named.upernet_dinat_s_base,
    "upernet_dinat_s_large": named.upernet_dinat_s_large,
    "mask_rcnn_nat_mini": named.mask_rcnn_nat_mini,
    "mask_rcnn_nat_tiny": named.mask_rcnn_nat_tiny,
    "mask_rcnn_nat_small": named.mask_rcnn_nat_small,
    "mask_rcnn_dinat_mini": named.mask_rcnn_dinat_mini,
    "mask_rcnn_dinat_tiny": named.mask_rcnn_dinat_tiny,
    "mask_rcnn_dinat_small": named.mask_rcnn_dinat_small,
    "mask_rcnn_dinat_s_tiny": named.mask_rcnn_dinat_s_tiny,
    "mask_rcnn_dinat_s_small": named.mask_rcnn_dinat_s_small,
    "cascade_mask_rcnn_nat_mini": named.cascade_mask_rcnn_nat_mini,
    "cascade_mask_rcnn_nat_tiny": named.cascade_mask_rcnn_nat_tiny,
    "cascade_mask_rcnn_nat_small": named.cascade_mask_rcnn_nat_small,
    "cascade_mask_rcnn_nat_base": named.cascade_mask_rcnn_nat_base,
    "cascade_mask_rcnn_dinat_mini": named.cascade_mask_rcnn_dinat_mini,
    "cascade_mask_rcnn_dinat_tiny": named.cascade_mask_rcnn_dinat_tiny,
    "cascade_mask_rcnn_dinat_small": named.cascade_mask_rcnn_dinat_small,
    "cascade_mask_rcnn_dinat_base": named.cascade_mask_rcnn_dinat_base,
    "cascade_mask_rcnn_dinat_large": named.cascade_mask_rcnn_dinat_large,
    "cascade_mask_rcnn_dinat_s_tiny": named.cascade_mask_rcnn_dinat_s_tiny,
    "cascade_mask_rcnn_dinat_s_small": named.cascade_mask_rcnn_dinat_s_small,
    "cascade_mask_rcnn_dinat_s_base": named.cascade_mask_rcnn_dinat_s_base,
    "cascade_mask_rcnn_dinat_s_large": named.cascade_mask_rcnn_dinat_s_large,
}

_CLASSES: dict[str, type[DenseModel]] = {
    "upernet": UPerNet,
    "mask_rcnn": MaskRCNN,
    "cascade_mask_rcnn": CascadeMaskRCNN,
}


def build_dense_model(
    config: DenseConfig, pretrained_cfg: dict[str, Any] | None = None
) -> DenseModel:
    """A model from its numbers; `pretrained_cfg` adds or replaces facts about its weights."""
    return _CLASSES[config.architecture](config, pretrained_cfg)


def create_dense_model(name: str, **overrides: Any) -> DenseModel:
    """A model by name: `create_dense_model("upernet-nat-tiny", num_classes=4)`.

    Args:
        name: a key of `DENSE_MODELS`, with hyphens or underscores.
        overrides: `num_classes`, `channels`, `aux_channels` or `fc_channels`, and any field of the
            backbone's `ModelConfig` (`drop_path_rate`, `dilations`, `depths`, ...).

    Raises ValueError for an unknown name, with the nearest; TypeError for an unknown override.
    """
    key = dense_name(name)
    if key is None:
        near = difflib.get_close_matches(str(name).replace("-", "_"), DENSE_MODELS, n=3, cutoff=0.4)
        hint = f"the nearest are {', '.join(near)}" if near else f"known: {', '.join(DENSE_MODELS)}"
        hint = hint.replace("_", "-")
        raise ValueError(f"there is no segmentation or detection model {name!r}; {hint}.")
    return DENSE_MODELS[key](**overrides)


def names_of_task(task: str) -> list[str]:
    """The keys of `DENSE_MODELS` for "segmentation" or "detection"."""
    return [n for n in DENSE_MODELS if (n.startswith("upernet")) == (task == "segmentation")]


def dense_name(name: str) -> str | None:
    """The key of `DENSE_MODELS` that a name with hyphens or underscores means, or None."""
    key = name.replace("-", "_") if isinstance(name, str) else None
    return key if key in DENSE_MODELS else None


__all__ = [
    "DENSE_MODELS",
    "DENSE_PUBLISHED",
    "MULTI_SCALE",
    "CascadeMaskRCNN",
    "DenseConfig",
    "DenseMacs",
    "DenseModel",
    "DensePublished",
    "Detections",
    "Detector",
    "MaskRCNN",
    "Prepared",
    "Recipe",
    "Segmentation",
    "UPerNet",
    "build_dense_model",
    "count_dense_macs",
    "create_dense_model",
    "dense_name",
    "names_of_task",
    "num_dense_parameters",
]
