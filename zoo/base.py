"""What every model of the zoo can do: the methods that users of timm know, over a stem and stages.

In: a checked `ModelConfig`. Out: `ImageModel`, which turns pictures `[B, C, H, W]` into logits,
feature maps or pooled features. A subclass makes `patch_embed` and its stages and calls `_finish`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from natcupy.dtype_errors import explained
from natcupy.zoo import features
from natcupy.zoo.config import ModelConfig, pick_stages
from natcupy.zoo.features import FeatureInfo
from natcupy.zoo.layers import Block, init_weights
from natcupy.zoo.preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocess

Indices = int | Sequence[int] | None


class ImageModel(nn.Module):
    """Stem, stages, norm, pooling and linear classifier; or feature maps (`config.out_indices`).

    Attributes:
        config: the numbers the model was built from.
        pretrained_cfg: facts about the weights and how pictures are prepared, with timm's keys.
        name: the architecture's name, such as "nat_tiny".
        num_features, head_hidden_size: channels of the last map and of the pooled features.
        feature_info: channels, reduction and module of every stage's map.
    """

    stages_name: str  # where the stages live in the state dict: "levels" or "layers"
    pictures_from: str = "model.preprocess(image)"  # for errors; within a dense model, its own way
    config: ModelConfig
    pretrained_cfg: dict[str, Any]

    def __init__(self, config: ModelConfig, pretrained_cfg: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.config = config
        self.pretrained_cfg = {**_default_pretrained_cfg(config), **(pretrained_cfg or {})}
        self.name: str = self.pretrained_cfg["architecture"]
        self.global_pool = "avg"

    def _finish(self) -> None:
        """The end of a subclass's constructor: what follows the stages, then the initialisation."""
        config = self.config
        self.num_classes = config.num_classes
        self.num_features = self.head_hidden_size = config.dims[-1]
        self.feature_info = FeatureInfo.of(config, self.stages_name)
        self.pretrained_cfg["first_conv"] = next(
            name for name, module in self.named_modules() if isinstance(module, nn.Conv2d)
        )
        self.norm: nn.Module = nn.Identity()
        self.head: nn.Module = nn.Identity()
        if config.out_indices is None:
            self.norm = nn.LayerNorm(config.dims[-1])
            if config.num_classes:
                self.head = nn.Linear(config.dims[-1], config.num_classes)
        else:
            for stage in config.out_indices:
                self.add_module(f"norm{stage}", nn.LayerNorm(config.stage_dim(stage)))
        self.apply(init_weights)

    @property
    def stages(self) -> nn.ModuleList | nn.Sequential:
        """The modules whose outputs are the feature maps."""
        return getattr(self, self.stages_name)

    # -- forward ---------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Pictures `[B, C, H, W]` to logits `[B, num_classes]`, or to a backbone's NCHW maps."""
        if self.config.out_indices is None:
            return self.forward_head(self.forward_features(x))
        return self.forward_intermediates(
            x, self.config.out_indices, norm=True, stop_early=True, intermediates_only=True
        )

    def forward_stem(self, x: Tensor) -> Tensor:
        """Pictures `[B, C, H, W]`, checked, to the first stage's input `[B, h, w, embed_dim]`.

        Where torch refuses the pictures' dtype, the error names both dtypes.
        """
        self.check_pictures(x)
        if torch.compiler.is_compiling():
            return self.patch_embed(x)
        try:
            return self.patch_embed(x)
        except RuntimeError as error:
            told = explained(error, self.patch_embed, x, (self.name, "pictures", "model"))
            if told is None:
                raise
            raise told from error

    def forward_features(self, x: Tensor) -> Tensor:
        """Pictures `[B, C, H, W]` to the last, normalised map `[B, h, w, num_features]`."""
        return self.norm(self._run_stages(x)[0])

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The map of `forward_features` to logits, or with `pre_logits` to pooled features.

        With `global_pool=""` nothing is pooled and the classifier runs at every position.
        """
        if self.global_pool == "avg":
            x = x.mean(dim=(1, 2))
        return x if pre_logits else self.head(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: Indices = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Feature maps of chosen stages, each before its downsampler.

        Args:
            x: pictures `[B, C, H, W]`.
            indices: stages by number, negative ones counted from the end; an int n means the last
                n; None means all.
            norm: apply the final norm to the maps it fits (the last one; for single-level models
                all); on a feature backbone, each stage's own norm.
            stop_early: skip the stages after the last one asked for.
            output_fmt: "NCHW" or "NHWC".
            intermediates_only: return the list alone, not (features, list). The features are those
                of `forward_features`, or, stopped early, the last map reached.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NHWC', got {output_fmt!r}.")
        take = pick_stages(indices, len(self.stages))
        last = take[-1] if stop_early else len(self.stages) - 1
        x, maps = self._run_stages(x, take, last)
        if norm:
            maps = [self._norm_for(s)(m) for s, m in zip(take, maps, strict=True)]
        if output_fmt == "NCHW":
            # Views in channels-last memory, which convolutions take without a copy.
            maps = [m.permute(0, 3, 1, 2) for m in maps]
        if intermediates_only:
            return maps
        return (self.norm(x) if last == len(self.stages) - 1 else x), maps

    def _run_stages(
        self, x: Tensor, take: Sequence[int] = (), last: int | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """The map after stage `last` (default: the final one), and the maps of those in `take`."""
        last = len(self.stages) - 1 if last is None else last
        maps = []
        x = self.forward_stem(x)
        for index in range(last + 1):
            stage = self.stages[index]
            x = stage(x)
            if index in take:
                maps.append(x)
            if stage.downsample is not None and index < last:
                x = stage.downsample(x)
        return x, maps

    def _norm_for(self, stage: int) -> nn.Module:
        if self.config.out_indices is not None:
            return getattr(self, f"norm{stage}", self.norm)
        fits = self.config.stage_dim(stage) == self.num_features
        return self.norm if fits else nn.Identity()

    def check_pictures(self, x: Tensor) -> None:
        """Raise ValueError or TypeError for what are no pictures of this model."""
        config = self.config
        if x.dim() != 4 or x.shape[1] != config.in_chans:
            raise ValueError(
                f"{self.name} takes pictures [batch, {config.in_chans}, height, width], got shape "
                f"{tuple(x.shape)}; {self.pictures_from} makes them."
            )
        if not x.is_floating_point():
            raise TypeError(
                f"{self.name} takes floating-point pictures, got {x.dtype}; "
                f"{self.pictures_from} makes them."
            )
        if config.img_size is not None and tuple(x.shape[2:]) != (config.img_size,) * 2:
            raise ValueError(
                f"{self.name} takes {config.img_size} x {config.img_size} pictures only, got "
                f"{x.shape[2]} x {x.shape[3]}; resize them (model.preprocess does) or build the "
                f"model with another img_size."
            )

    # -- classifier and layers -------------------------------------------------------------------

    def get_classifier(self) -> nn.Module:
        """The last linear layer, or an identity where there is none."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh classifier of `num_classes` rows (0: none), on the device and dtype of the model.

        `global_pool`: "avg", "" (no pooling), or None to keep what is set.
        """
        if self.config.out_indices is not None:
            raise ValueError(
                f"{self.name} was built with out_indices={self.config.out_indices} and has no "
                f"classifier to reset; create it without features_only and out_indices."
            )
        config = self.config.replace(num_classes=num_classes)
        if global_pool is not None:
            self.set_global_pool(global_pool)
        self.head = nn.Identity()
        if num_classes:
            like = next(self.patch_embed.parameters())
            self.head = nn.Linear(
                self.num_features, num_classes, device=like.device, dtype=like.dtype
            )
            init_weights(self.head)
        self.config, self.num_classes = config, num_classes
        self.pretrained_cfg["num_classes"] = num_classes
        self.pretrained_cfg.pop("label_names", None)  # they named the old rows

    def set_global_pool(self, global_pool: str) -> None:
        """How the head pools: "avg" (mean over positions) or "" (not at all)."""
        if global_pool not in ("avg", ""):
            raise ValueError(f"global_pool must be 'avg' or '', got {global_pool!r}.")
        self.global_pool = global_pool

    def prune_intermediate_layers(
        self, indices: Indices = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages after the last one in `indices` and return the indices without signs.

        `prune_norm` drops the final norm (as does losing the stage it was made for), `prune_head`
        the classifier. `config` keeps describing the whole model.
        """
        take = pick_stages(indices, len(self.stages))
        stages = self.stages[: take[-1] + 1]
        stages[-1].downsample = None
        setattr(self, self.stages_name, stages)
        fits = self.config.stage_dim(take[-1]) == self.num_features
        if prune_norm or not fits:
            self.norm = nn.Identity()
        if prune_head or not fits:
            self.head = nn.Identity()
            self.num_classes = 0
        self.num_features = self.head_hidden_size = self.config.stage_dim(take[-1])
        return list(take)

    # -- training --------------------------------------------------------------------------------

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block's activations in the backward pass instead of keeping them."""
        for module in self.modules():
            if isinstance(module, Block):
                module.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Names of the relative positional bias tables, which are customarily not decayed."""
        return {name for name, _ in self.named_parameters() if name.endswith(".rpb")}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that put parameters into ordered layer groups, for layer-wise learning rates."""
        return features.group_matcher(self.config.family, self.stages_name, coarse)

    # -- pictures and files ----------------------------------------------------------------------

    @property
    def default_cfg(self) -> dict[str, Any]:
        """timm's other name for `pretrained_cfg`."""
        return self.pretrained_cfg

    @default_cfg.setter
    def default_cfg(self, cfg: dict[str, Any]) -> None:
        self.pretrained_cfg = cfg

    def preprocess(self, image: Any) -> Tensor:
        """One picture as this model wants it: `[1, C, H, W]` on the model's device, in its dtype.

        Args:
            image: a path, a PIL picture, a NumPy array `[H, W]` or `[H, W, C]`, or a tensor
                `[C, H, W]`, `[H, W, C]` or `[H, W]`; uint8, or floats in 0..1.
        """
        recipe = Preprocess.from_pretrained_cfg(self.pretrained_cfg, self.config)
        like = next(self.patch_embed.parameters())
        return recipe(image).to(device=like.device, dtype=like.dtype)

    def save_pretrained(self, folder: Any, **kwargs: Any) -> Any:
        """Write `config.json` and `model.safetensors`; see `natcupy.hub.save_pretrained`."""
        return _hub().save_pretrained(self, folder, **kwargs)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:
        """Upload to the Hugging Face Hub; see `natcupy.hub.push_to_hub`."""
        return _hub().push_to_hub(self, repo_id, **kwargs)


def _default_pretrained_cfg(config: ModelConfig) -> dict[str, Any]:
    side = config.img_size or 224
    return {
        "architecture": config.family,
        "tag": "",
        "input_size": (config.in_chans, side, side),
        "fixed_input_size": config.img_size is not None,
        "crop_pct": 0.875,
        "crop_mode": "center",
        "interpolation": "bicubic",
        "mean": IMAGENET_MEAN,
        "std": IMAGENET_STD,
        "num_classes": config.num_classes,
        "classifier": "head",
    }


def _hub() -> Any:
    """The hub, which knows the zoo: the only place where the zoo looks up to it, and late."""
    from natcupy import hub

    return hub
