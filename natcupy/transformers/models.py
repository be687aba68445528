"""The models: transformers' classes around natcupy's modules, under natcupy's names.

In: a config of `configs` (or transformers' own DinatConfig) and pictures. Out: transformers' output
records. Weights come through `natcupy.hub`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.backbone_utils import BackboneMixin
from transformers.modeling_outputs import (
    BackboneOutput,
    BaseModelOutputWithPooling,
    ImageClassifierOutput,
)

from natcupy.hub.client import Access
from natcupy.hub.locate import locate
from natcupy.hub.pretrained import read_state
from natcupy.transformers.configs import NatConfig, zoo_config
from natcupy.zoo import ImageModel, ModelConfig, build_model
from natcupy.zoo.layers import Block, init_weights

_ELSEWHERE = ("subfolder", "variant", "gguf_file", "state_dict")  # transformers' own ways to load


class _Model(PreTrainedModel):
    """natcupy's modules, directly below this one, and natcupy's model to run them."""

    base_model_prefix = ""
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]  # noqa: RUF012  (as transformers declares it)

    def __init__(self, config: PreTrainedConfig, numbers: ModelConfig) -> None:
        super().__init__(config)
        model = build_model(numbers, getattr(config, "pretrained_cfg", None))
        for name, child in model.named_children():
            self.add_module(name, child)
        # One table of modules for both, so that one replaced here (a new head) is used there too.
        model._modules = self._modules
        self.__dict__["_model"] = model
        self.post_init()

    @property
    def natcupy(self) -> ImageModel:
        """The model of natcupy's zoo that shares these modules."""
        return self.__dict__["_model"]

    @classmethod
    def from_pretrained(cls, name: Any, *args: Any, **kwargs: Any) -> Any:
        """transformers' method, with weights that natcupy fetches, verifies and renames."""
        if name is None or any(kwargs.get(key) for key in _ELSEWHERE):
            return super().from_pretrained(name, *args, **kwargs)
        place = {key: kwargs.pop(key, None) for key in ("token", "cache_dir")}
        access = Access(**place, local_files_only=bool(kwargs.pop("local_files_only", False)))
        found = locate(name, _hub_revision(name, kwargs.pop("revision", None)), access)
        config = kwargs.pop("config", None)
        if not isinstance(config, PreTrainedConfig):  # the one beside the weights: of their commit
            config, kwargs = cls.config_class.from_pretrained(
                config or found.config or name, return_unused_kwargs=True, **kwargs
            )
        state = read_state(found)
        made = super().from_pretrained(None, *args, config=config, state_dict=state, **kwargs)
        model = made[0] if isinstance(made, tuple) else made  # with output_loading_info
        model.name_or_path = model.config.name_or_path = str(name)
        return made

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Any = None) -> None:
        """Recompute blocks in the backward pass."""
        self.natcupy.set_grad_checkpointing(True)

    def gradient_checkpointing_disable(self) -> None:
        """Keep activations again."""
        self.natcupy.set_grad_checkpointing(False)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        init_weights(module)
        if isinstance(module, nn.Conv2d):
            module.reset_parameters()
        if getattr(module, "rpb", None) is not None:
            nn.init.trunc_normal_(module.rpb, std=0.02)
        if isinstance(module, Block) and self.config.layer_scale_init_value:
            for gamma in (module.gamma1, module.gamma2):
                gamma.fill_(self.config.layer_scale_init_value)

    def _maps(self, pixel_values: Tensor | None, wanted: bool) -> tuple[Tensor, tuple | None]:
        """The last map `[B, h, w, C]`, normalised, and all maps `[B, C, h, w]` where wanted."""
        if pixel_values is None:
            raise ValueError("pixel_values are missing; the image processor makes them.")
        if not wanted:
            return self.natcupy.forward_features(pixel_values), None
        last, maps = self.natcupy.forward_intermediates(pixel_values)
        return last, tuple(maps)

    def _wants(self, output_hidden_states: bool | None, return_dict: bool | None) -> tuple:
        config = self.config
        states = (
            config.output_hidden_states if output_hidden_states is None else output_hidden_states
        )
        return bool(states), config.return_dict if return_dict is None else return_dict


class NatModel(_Model):
    """The model without its classifier: the last map and its mean."""

    config_class = NatConfig

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config, zoo_config(config, 0))

    def forward(
        self,
        pixel_values: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling | tuple:
        """Pictures `[B, C, H, W]` to `last_hidden_state` `[B, h, w, dim]` and `pooler_output`."""
        wanted, as_dict = self._wants(output_hidden_states, return_dict)
        last, maps = self._maps(pixel_values, wanted)
        out = BaseModelOutputWithPooling(last, last.mean(dim=(1, 2)), maps)
        return out if as_dict else out.to_tuple()


class NatForImageClassification(_Model):
    """The whole model: logits, and a loss where labels are given."""

    config_class = NatConfig

    def __init__(self, config: PreTrainedConfig) -> None:
        self.num_labels = config.num_labels
        super().__init__(config, zoo_config(config, config.num_labels))

    def forward(
        self,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> ImageClassifierOutput | tuple:
        """Pictures `[B, C, H, W]` to logits `[B, num_labels]`."""
        wanted, as_dict = self._wants(output_hidden_states, return_dict)
        last, maps = self._maps(pixel_values, wanted)
        logits = self.natcupy.forward_head(last)
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        out = ImageClassifierOutput(loss, logits, maps)
        return out if as_dict else out.to_tuple()


class NatBackbone(BackboneMixin, _Model):
    """Feature maps of the stages in `config.out_features`, each with a norm of its own."""

    config_class = NatConfig
    has_attentions = False

    def __init__(self, config: PreTrainedConfig) -> None:
        wanted = zoo_config(config, 0)
        _set_stages(config, wanted)
        if 0 in config.out_indices:
            raise ValueError(
                f"out_features must be stages, the stem's map is not handed out; got "
                f"{config.out_features}."
            )
        stages = tuple(index - 1 for index in config.out_indices)
        super().__init__(config, wanted.replace(out_indices=stages))
        dims = [wanted.stage_dim(stage) for stage in range(wanted.num_stages)]
        self.num_features = [config.embed_dim, *dims]

    def forward(
        self,
        pixel_values: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BackboneOutput | tuple:
        """Pictures `[B, C, H, W]` to `feature_maps`, one `[B, C, h, w]` per stage asked for."""
        wanted, as_dict = self._wants(output_hidden_states, return_dict)
        states = self._maps(pixel_values, True)[1] if wanted else None
        maps = tuple(self.natcupy(pixel_values))
        out = BackboneOutput(feature_maps=maps, hidden_states=states, attentions=None)
        return out if as_dict else out.to_tuple()


def _set_stages(config: PreTrainedConfig, numbers: ModelConfig) -> None:
    """Backbones of a config that was made without stage names (a plain DinatConfig has them)."""
    if not getattr(config, "stage_names", None):
        config.stage_names = ["stem", *(f"stage{i + 1}" for i in range(numbers.num_stages))]


def _hub_revision(name: Any, revision: str | None) -> str | None:
    """The revision where it means something: of a repository, not of a folder.

    An Auto class has resolved it to the commit that its config is of; the weights must be, too.
    """
    return None if Path(str(name)).is_dir() else getattr(revision, "resolved", revision)
