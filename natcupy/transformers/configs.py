"""The configs: natcupy's numbers with transformers' names, and config.json for both.

In: the keys of a config.json of either kind. Out: config classes, one per model type, and
`zoo_config`, which makes natcupy's own record of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from transformers import PreTrainedConfig
from transformers.backbone_utils import BackboneConfigMixin

from natcupy import __version__
from natcupy.hub.config import config_text
from natcupy.zoo import ModelConfig

_FAMILIES = {"nat": "nat", "dinat": "nat"}  # model type -> family; else they are called the same
_DILATIONS = ((1, 8, 1), (1, 4, 1, 4), (1, 2, 1, 2, 1, 2), (1, 1, 1, 1, 1))
_WRITTEN_BY_THEM = ("architectures", "id2label", "label2id", "num_labels")


class NatcupyConfig(BackboneConfigMixin, PreTrainedConfig):
    """The numbers of a model, with transformers' names for those that have one.

    Args:
        embed_dim, depths, num_heads, kernel_size, dilations, mlp_ratio, drop_path_rate, img_size:
            as in `natcupy.zoo.ModelConfig`.
        layer_scale_init_value: 0 leaves the layer scale out.
        num_channels: of the picture.
        out_features, out_indices: stages of a backbone; `stage1` is the first, with index 1, and
            negative indices count from the end.
        num_classes: natcupy's word for `num_labels`.
    """

    model_type = "natcupy"

    def __init__(
        self,
        embed_dim: int = 64,
        depths: Iterable[int] = (3, 4, 6, 5),
        num_heads: Iterable[int] = (2, 4, 8, 16),
        kernel_size: int | None = 7,
        dilations: Iterable[Iterable[int]] | None = None,
        mlp_ratio: float = 3.0,
        layer_scale_init_value: float = 0.0,
        drop_path_rate: float = 0.1,
        num_channels: int = 3,
        img_size: int | None = None,
        out_features: list[str] | None = None,
        out_indices: list[int] | None = None,
        num_classes: int | None = None,
        **kwargs: Any,
    ) -> None:
        self.embed_dim, self.depths, self.num_heads = embed_dim, list(depths), list(num_heads)
        self.kernel_size, self.mlp_ratio = kernel_size, mlp_ratio
        self.dilations = None if dilations is None else [list(row) for row in dilations]
        self.layer_scale_init_value, self.drop_path_rate = layer_scale_init_value, drop_path_rate
        self.num_channels, self.img_size = num_channels, img_size
        self.num_classes = num_classes
        for key in ("family", "in_chans", "layer_scale", "feature_indices", "stage_names"):
            kwargs.pop(key, None)  # said by the fields above
        if num_classes and kwargs.get("id2label") is None:
            kwargs.setdefault("num_labels", num_classes)
        super().__init__(**kwargs)
        config = zoo_config(self, 0)
        self.hidden_size = config.dims[-1]
        self.stage_names = ["stem", *(f"stage{i + 1}" for i in range(config.num_stages))]
        self.set_output_features_output_indices(out_features=out_features, out_indices=out_indices)

    def to_dict(self) -> dict[str, Any]:
        """What is saved: natcupy's config.json and transformers' bookkeeping in one."""
        theirs = super().to_dict()
        kind = (self.architectures or ["ForImageClassification"])[0]
        stages = stages_of(self) if kind.endswith("Backbone") else None
        config = zoo_config(self, 0 if kind.endswith("Model") else self.num_labels, stages)
        ours = json.loads(config_text(config, _pretrained_cfg(self, config), __version__))
        ours = {key: value for key, value in ours.items() if key not in _WRITTEN_BY_THEM}
        return {**theirs, "label_names": None, **ours}


class NatConfig(NatcupyConfig):
    """NAT."""

    model_type = "nat"

    # transformers gives every config class without an __init__ one of its own making.
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)


class DinatConfig(NatcupyConfig):
    """DiNAT; the released files leave default dilations out."""

    model_type = "dinat"

    def __init__(self, dilations: Iterable[Iterable[int]] | None = None, **kwargs: Any) -> None:
        super().__init__(dilations=_DILATIONS if dilations is None else dilations, **kwargs)


class DinatSConfig(NatcupyConfig):
    """DiNAT-s."""

    model_type = "dinat_s"

    def __init__(self, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24), embed_dim=96, **kwargs: Any):
        super().__init__(embed_dim=embed_dim, depths=depths, num_heads=num_heads, **kwargs)


class IsotropicConfig(NatcupyConfig):
    """Isotropic NAT and DiNAT."""

    model_type = "isotropic"

    def __init__(
        self, depths=(12,), num_heads=(6,), embed_dim=384, img_size: int = 224, **kwargs: Any
    ) -> None:
        super().__init__(
            embed_dim=embed_dim, depths=depths, num_heads=num_heads, img_size=img_size, **kwargs
        )


class VitRpbConfig(IsotropicConfig):
    """ViT with relative positional bias."""

    model_type = "vitrpb"

    def __init__(self, kernel_size: None = None, **kwargs: Any) -> None:
        super().__init__(kernel_size=kernel_size, **kwargs)


def zoo_config(
    config: PreTrainedConfig, num_classes: int, out_indices: tuple[int, ...] | None = None
) -> ModelConfig:
    """natcupy's record of the same numbers. Raises ConfigError where they make no model."""
    return ModelConfig(
        family=_FAMILIES.get(config.model_type, config.model_type),
        embed_dim=config.embed_dim,
        depths=tuple(config.depths),
        num_heads=tuple(config.num_heads),
        kernel_size=config.kernel_size,
        dilations=config.dilations and tuple(map(tuple, config.dilations)),
        mlp_ratio=config.mlp_ratio,
        layer_scale=config.layer_scale_init_value or None,
        drop_path_rate=config.drop_path_rate,
        num_classes=num_classes,
        in_chans=config.num_channels,
        img_size=getattr(config, "img_size", None),
        out_indices=out_indices,
    )


def stages_of(config: PreTrainedConfig) -> tuple[int, ...]:
    """The stages in `out_features`, counted from 0; the stem is -1.

    By name, since `out_indices` may count from the end.
    """
    return tuple(config.stage_names.index(name) - 1 for name in config.out_features)


def _pretrained_cfg(config: PreTrainedConfig, numbers: ModelConfig) -> dict[str, Any]:
    """The facts about pictures and classes that a saved config keeps."""
    cfg = dict(getattr(config, "pretrained_cfg", None) or {})
    cfg.pop("num_classes", None)
    if "input_size" in cfg:
        cfg["input_size"] = (numbers.in_chans, *cfg["input_size"][1:])
    names = [config.id2label[i] for i in range(config.num_labels)]
    named = any(name != f"LABEL_{i}" for i, name in enumerate(names))
    if named and numbers.num_classes == len(names):
        cfg["label_names"] = names
    return cfg
