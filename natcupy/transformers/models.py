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
from transformers.integrations.peft import maybe_load_adapters
from transformers.modeling_outputs import (
    BackboneOutput,
    BaseModelOutputWithPooling,
    ImageClassifierOutput,
)

from natcupy.hub import download
from natcupy.hub.client import Access
from natcupy.hub.locate import locate
from natcupy.hub.pretrained import read_state
from natcupy.transformers.configs import NatConfig, stages_of, zoo_config
from natcupy.zoo import ImageModel, ModelConfig, build_model
from natcupy.zoo.layers import Block, init_weights

_ELSEWHERE = ("subfolder", "variant", "gguf_file", "state_dict")  # transformers' own ways to load
_CHECKPOINTING = {"use_reentrant": False, "preserve_rng_state": True}  # what blocks do, always


class _State(dict):
    """Tensors by name that know where they are from, and learn how transformers loads them."""

    def __init__(self, tensors: dict[str, Tensor], source: str) -> None:
        super().__init__(tensors)
        self.source = source
        self.load_config: Any = None


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
        """transformers' method, with weights that natcupy fetches, verifies and renames.

        A PEFT adapter's folder or repository gives the model that it was trained on, and the
        adapter in it.
        """
        if name is None or any(kwargs.get(key) for key in _ELSEWHERE):
            return super().from_pretrained(name, *args, **kwargs)
        place = {key: kwargs.pop(key, None) for key in ("token", "cache_dir")}
        place["local_files_only"] = bool(kwargs.pop("local_files_only", False))
        revision, adapter_name = kwargs.pop("revision", None), kwargs.pop("adapter_name", "default")
        adapter, name, adapter_kwargs = _find_adapter(
            name, {**place, "revision": revision}, kwargs.pop("adapter_kwargs", None) or {}
        )
        found = locate(name, _hub_revision(name, revision), Access(**place))
        config = kwargs.pop("config", None)
        if not isinstance(config, PreTrainedConfig):  # the one beside the weights: of their commit
            config, kwargs = cls.config_class.from_pretrained(
                config or found.config or name, return_unused_kwargs=True, **kwargs
            )
        state = _State(read_state(found), str(name))
        made = super().from_pretrained(None, *args, config=config, state_dict=state, **kwargs)
        model = made[0] if isinstance(made, tuple) else made  # with output_loading_info
        model.name_or_path = model.config.name_or_path = str(name)
        if adapter is None:
            return made
        info = model.load_adapter(
            adapter,
            adapter_name=adapter_name,
            load_config=state.load_config,
            adapter_kwargs=adapter_kwargs,
        )
        return (model, info.to_dict() if info else made[1]) if isinstance(made, tuple) else model

    @staticmethod
    def _load_pretrained_model(
        model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any, **kwargs: Any
    ) -> Any:
        """transformers' method, told where a state dict of `from_pretrained` is from.

        It takes no name beside a state dict, and its report would say that all is from "None".
        """
        if isinstance(state_dict, _State):
            # Frozen, and filled in afterwards in this way by transformers' load_adapter, too.
            vars(load_config).update(pretrained_model_name_or_path=state_dict.source)
            state_dict.load_config = load_config
        return PreTrainedModel._load_pretrained_model(
            model, state_dict, checkpoint_files, load_config, **kwargs
        )

    def _replicate_for_data_parallel(self) -> Any:
        """A replica for nn.DataParallel, whose natcupy model runs the replica's modules."""
        replica = super()._replicate_for_data_parallel()
        model = self.natcupy._replicate_for_data_parallel()
        model._modules = replica._modules
        replica.__dict__["_model"] = model
        return replica

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether any block is recomputed in the backward pass; where transformers asks for it."""
        return any(block.grad_checkpointing for block in self._blocks())

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: Any = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """Recompute every nth block in the backward pass.

        Raises ValueError for a wish that the blocks, which checkpoint themselves, do not fulfil.
        """
        _check_checkpointing(activation_checkpointing_kwargs or {}, every_n_layers, offload)
        for number, block in enumerate(self._blocks()):
            block.grad_checkpointing = number % every_n_layers == 0

    def activation_checkpointing_disable(self) -> None:
        """Keep activations again."""
        self.natcupy.set_grad_checkpointing(False)

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: Any = None, **kwargs: Any
    ) -> None:
        """The older name of `activation_checkpointing_enable`."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **kwargs)

    def gradient_checkpointing_disable(self) -> None:
        """The older name of `activation_checkpointing_disable`."""
        self.activation_checkpointing_disable()

    def _blocks(self) -> list[Block]:
        return [module for module in self.modules() if isinstance(module, Block)]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """One module's initialisation, by `nn.init` alone.

        transformers calls it for modules with loaded tensors, too, and keeps these by making the
        functions of `nn.init` pass over them.
        """
        init_weights(module)
        if isinstance(module, nn.Conv2d):
            module.reset_parameters()
        if getattr(module, "rpb", None) is not None:
            nn.init.trunc_normal_(module.rpb, std=0.02)
        if isinstance(module, Block) and self.config.layer_scale_init_value:
            for gamma in (module.gamma1, module.gamma2):
                nn.init.constant_(gamma, self.config.layer_scale_init_value)

    def _maps(self, pixel_values: Tensor | None, wanted: bool) -> tuple[Tensor, tuple | None]:
        """The last map `[B, h, w, C]`, normalised, and all maps `[B, C, h, w]` where wanted."""
        _check_given(pixel_values)
        if not wanted:
            return self.natcupy.forward_features(pixel_values), None
        maps = self._all_maps(pixel_values)
        return self.natcupy.norm(maps[-1]), _channels_first(maps)

    def _all_maps(self, pixel_values: Tensor) -> list[Tensor]:
        """The maps `[B, h, w, C]` of the stem and of every stage before its downsampler."""
        model = self.natcupy
        x = model.forward_stem(pixel_values)
        maps = [x]
        for stage in model.stages:
            x = stage(x)
            maps.append(x)
            if stage.downsample is not None:
                x = stage.downsample(x)
        return maps

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
        stages = stages_of(config)
        if -1 in stages:
            raise ValueError(
                f"out_features must be stages, the stem's map is not handed out; got "
                f"{config.out_features}."
            )
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
        _check_given(pixel_values)
        if wanted:
            maps, states = self._features(pixel_values)
        else:
            maps, states = self.natcupy(pixel_values), None
        out = BackboneOutput(feature_maps=tuple(maps), hidden_states=states, attentions=None)
        return out if as_dict else out.to_tuple()

    def _features(self, pixel_values: Tensor) -> tuple[tuple, tuple]:
        """Feature maps, and the maps of stem and stages that they are norms of, in one pass."""
        maps = self._all_maps(pixel_values)
        stages = self.natcupy.config.out_indices
        normed = [getattr(self, f"norm{stage}")(maps[stage + 1]) for stage in stages]
        return _channels_first(normed), _channels_first(maps)


def _set_stages(config: PreTrainedConfig, numbers: ModelConfig) -> None:
    """Backbones of a config that was made without stage names (a plain DinatConfig has them)."""
    if not getattr(config, "stage_names", None):
        config.stage_names = ["stem", *(f"stage{i + 1}" for i in range(numbers.num_stages))]


def _check_given(pixel_values: Tensor | None) -> None:
    if pixel_values is None:
        raise ValueError("pixel_values are missing; the image processor makes them.")


def _channels_first(maps: list[Tensor]) -> tuple[Tensor, ...]:
    return tuple(x.permute(0, 3, 1, 2) for x in maps)


def _check_checkpointing(how: dict[str, Any], every_n_layers: int, offload: bool) -> None:
    """Blocks checkpoint in one way; a wish for another must not be lost in silence."""
    if not isinstance(every_n_layers, int) or every_n_layers < 1:
        raise ValueError(f"every_n_layers must be an int from 1, got {every_n_layers!r}.")
    if offload:
        raise ValueError(
            f"offload must be False, got {offload!r}: blocks keep what they recompute from on the "
            "device. Leave it out."
        )
    for name, value in how.items():
        if name not in _CHECKPOINTING or value != _CHECKPOINTING[name]:
            raise ValueError(
                f"blocks are checkpointed with {_CHECKPOINTING} and nothing else, got "
                f"{name}={value!r}. Leave it out."
            )


def _find_adapter(
    name: Any, place: dict[str, Any], given: dict[str, Any]
) -> tuple[str | None, Any, dict[str, Any]]:
    """The PEFT adapter that a name stands for, the model that it is for, and how to fetch it.

    As in transformers' own classes: an Auto class has looked already and names the model. Without
    an adapter, or without PEFT, the name itself is the model.
    """
    how = {**place, **given}
    adapter = how.pop("_adapter_model_path", None)
    if adapter is not None:
        return str(adapter), name, how
    at, revision = _where_adapters_are(name)
    if at is None:
        return None, name, {}
    how["revision"] = revision or how["revision"]
    adapter, base, _ = maybe_load_adapters(at, dict(place), **how)
    return adapter, name if base == at else base, how


def _where_adapters_are(name: Any) -> tuple[str | None, str | None]:
    """A folder, or a repository and its revision; not natcupy's short names, or single files."""
    if Path(str(name)).exists():
        return (str(name), None) if Path(str(name)).is_dir() else (None, None)
    return (download.parse_name(name) if isinstance(name, str) else None) or (None, None)


def _hub_revision(name: Any, revision: str | None) -> str | None:
    """The revision where it means something: of a repository, not of a folder.

    An Auto class has resolved it to the commit that its config is of; the weights must be, too.
    """
    return None if Path(str(name)).is_dir() else getattr(revision, "resolved", revision)
