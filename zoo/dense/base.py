"""What segmentation and detection models share: a backbone, their numbers, facts about their
weights.

In: a checked `DenseConfig`. Out: `DenseModel`, from which UPerNet and the detectors are derived.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from natcupy.zoo.base import ImageModel, _hub
from natcupy.zoo.config import ModelConfig
from natcupy.zoo.dense.config import DenseConfig
from natcupy.zoo.dense.images import Recipe
from natcupy.zoo.dense.names import ADE20K, COCO
from natcupy.zoo.dinat_s import DiNATS
from natcupy.zoo.nat import NAT

_CLASSES: dict[str, type[ImageModel]] = {"nat": NAT, "dinat_s": DiNATS}
_LABELS = {"segmentation": ADE20K, "detection": COCO}


class DenseModel(nn.Module):
    """A feature backbone and, in the subclasses, heads on its maps.

    Attributes:
        config: the numbers the model was built from.
        pretrained_cfg: facts about the weights, the pictures' preparation and the classes' names.
        name: such as "upernet_nat_tiny".
        backbone: pictures `[B, 3, H, W]` to a list of normalised maps of strides 4, 8, 16, 32.
        num_classes: classes told apart (background not counted).
    """

    def __init__(self, config: DenseConfig, pretrained_cfg: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.config = config
        self.pretrained_cfg = {**_default_pretrained_cfg(config), **(pretrained_cfg or {})}
        self.name: str = self.pretrained_cfg["architecture"]
        self.num_classes = config.num_classes
        self.backbone = _CLASSES[config.backbone.family](config.backbone)
        self.backbone.pictures_from = "model.recipe.prepare(image).pixels"

    @property
    def default_cfg(self) -> dict[str, Any]:
        """timm's other name for `pretrained_cfg`."""
        return self.pretrained_cfg

    @property
    def label_names(self) -> tuple[str, ...]:
        """One name per class: those in `pretrained_cfg`, or "class 0", "class 1", ..."""
        names = self.pretrained_cfg.get("label_names")
        if names is not None and len(names) == self.num_classes:
            return tuple(names)
        return tuple(f"class {index}" for index in range(self.num_classes))

    @property
    def recipe(self) -> Recipe:
        """How this model's pictures are resized, padded and normalised."""
        config = self.config
        return Recipe.from_pretrained_cfg(self.pretrained_cfg, config.task, config.in_chans)

    def load_classifier(self, state: dict[str, Tensor], config: ModelConfig) -> None:
        """Start the backbone from a classifier's tensors; its norms for the heads start fresh.

        Args:
            state: a classifier's state dict with the original names.
            config: the numbers of that classifier; all but dilations, rates and outputs must agree.

        Raises ValueError where the shapes do not fit.
        """
        own = self.config.backbone
        same = (
            "family",
            "embed_dim",
            "depths",
            "num_heads",
            "kernel_size",
            "mlp_ratio",
            "in_chans",
        )
        for field in same:
            if getattr(config, field) != getattr(own, field):
                raise ValueError(
                    f"the classifier must have the backbone's {field}={getattr(own, field)}, got "
                    f"{getattr(config, field)}; take the classifier that {self.name} is named "
                    "after, or build a model with this one's numbers."
                )
        if (config.layer_scale is None) != (own.layer_scale is None):
            raise ValueError(
                f"the classifier and the backbone must agree on layer scale, got "
                f"{config.layer_scale} and {own.layer_scale}."
            )
        kept = {
            key: value for key, value in state.items() if not key.startswith(("norm.", "head."))
        }
        fresh = {key: value for key, value in self.backbone.state_dict().items() if key not in kept}
        fresh = {
            key: torch.full_like(value, key.endswith("weight"))
            for key, value in fresh.items()
            if key.startswith("norm")
        }
        self.backbone.load_state_dict({**kept, **fresh})

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block's activations in the backward pass instead of keeping them."""
        self.backbone.set_grad_checkpointing(enable)

    def no_weight_decay(self) -> set[str]:
        """Names that the papers' recipes do not decay: those with `rpb` or `norm` in them.

        The heads' batch norms are called `bn` and are therefore decayed.
        """
        names = (name for name, _ in self.named_parameters())
        return {name for name in names if "rpb" in name or "norm" in name}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that put parameters into ordered layer groups, for layer-wise learning rates.

        The backbone's own layers; what they do not name, neck and heads, is the last layer.
        """
        inner = self.backbone.group_matcher(coarse)
        return {name: _under_backbone(patterns) for name, patterns in inner.items()}

    def save_pretrained(self, folder: Any, **kwargs: Any) -> Any:
        """Write `config.json` and `model.safetensors`; see `natcupy.hub.save_pretrained`."""
        return _hub().save_pretrained(self, folder, **kwargs)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:
        """Upload to the Hugging Face Hub; see `natcupy.hub.push_to_hub`."""
        return _hub().push_to_hub(self, repo_id, **kwargs)

    def check_pictures(self, x: Tensor) -> None:
        """Raise ValueError or TypeError for what are no pictures of this model."""
        self.backbone.check_pictures(x)
        if 0 in x.shape:
            raise ValueError(
                f"{self.name} takes pictures that are not empty, got {tuple(x.shape)}."
            )


def _under_backbone(patterns: Any) -> Any:
    """A group's pattern, or its list of (pattern, suffix), for names that begin with "backbone"."""
    if isinstance(patterns, str):
        return r"^backbone\." + patterns.removeprefix("^")
    return [(_under_backbone(pattern), suffix) for pattern, suffix in patterns]


def _default_pretrained_cfg(config: DenseConfig) -> dict[str, Any]:
    labels = _LABELS[config.task]
    facts = {"architecture": config.architecture, "tag": "", "num_classes": config.num_classes}
    facts |= {"task": config.task, **Recipe.for_task(config.task).to_dict()}
    if len(labels) == config.num_classes:
        facts["label_names"] = labels
    return facts
