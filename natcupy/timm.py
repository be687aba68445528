"""natcupy's models in timm: `import natcupy.timm`, then `timm.create_model("nat_tiny.in1k")`.

In: timm's calls. Out: models of natcupy's zoo, registered under their names with the tags of the
released weights; `natcupy_nat`, `natcupy_dinat_s`, `natcupy_isotropic` and `natcupy_vitrpb` build
any other size from the fields of `natcupy.zoo.ModelConfig`. A repository or folder that natcupy or
timm saved loads as `hf-hub:owner/name` or `local-dir:path`, a bare file of weights as
`pretrained_cfg_overlay={"file": path}` beside the numbers of its model.

timm builds, wraps (`features_only`) and configures; weights come through `natcupy.hub`, so they are
verified by hash, read from shards and other layouts, and adapted as `from_pretrained` does. Needs
the extra "timm".
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable
from typing import Any

try:
    from timm.models import (
        build_model_with_cfg,
        generate_default_cfgs,
        register_model,
        resolve_pretrained_cfg,
    )
except ImportError as error:
    raise ImportError(
        f"natcupy.timm registers natcupy's models in timm, which is not to be had here ({error}). "
        "Install it with: pip install 'natcupy[timm]'."
    ) from error
except RuntimeError as error:  # a torchvision that was built for another torch
    raise ImportError(
        f"timm is installed but cannot be imported ({error}). torch and torchvision must be of one "
        "build, both for the CPU or both for the same CUDA, and of releases that belong together: "
        "install them again together."
    ) from error

import torch

from natcupy import zoo
from natcupy.hub import WEIGHTS, convert
from natcupy.hub.client import Access
from natcupy.hub.errors import CheckpointError, some
from natcupy.hub.files import sha256_file
from natcupy.hub.likeness import FREE, HIDDEN, differences
from natcupy.hub.locate import Located, locate
from natcupy.hub.pretrained import Source, compare, load, read_state
from natcupy.hub.timm_config import ZERO_RATES, entry_config
from natcupy.zoo import ImageModel, ModelConfig
from natcupy.zoo.config import FAMILIES, SINGLE_LEVEL

log = logging.getLogger("natcupy.hub")

__all__: list[str] = []  # register_model fills it

_PASSED = ("interpolation", "crop_mode", "crop_pct", "mean", "std", "fixed_input_size",
           "first_conv", "classifier", "input_size", "num_classes")  # fmt: skip
# With these a file's tensors are still those of the named model, but for what loading adapts.
_ADAPTED = frozenset({"num_classes", "in_chans", "img_size", "drop_path_rate"})
_MAYBE_NONE = ("dilations", "layer_scale")  # None is a number like another: without


def _default_cfgs() -> dict[str, Any]:
    """timm's table: one row per released set of weights, and per architecture without any."""
    rows = {}
    for row in WEIGHTS.values():
        with torch.device("meta"):
            facts = zoo.create_model(row.arch).pretrained_cfg
        rows[row.tag] = {
            **{key: facts[key] for key in _PASSED},
            "license": row.license,
            # timm completes only names of its own organisation, so this is the whole one.
            **({"hf_hub_id": row.repo} if row.repo else {}),
        }
    return rows | {
        f"natcupy_{family}": {"classifier": "head", "fixed_input_size": family in SINGLE_LEVEL}
        for family in FAMILIES
    }


# What a file's model must have in common with the name it is loaded under.
_SAME = ("family", "embed_dim", "depths", "num_heads", "kernel_size", "dilations")

default_cfgs = generate_default_cfgs(_default_cfgs())


def _entry(name: str, fixed: bool) -> Callable[..., Any]:
    """timm's constructor of one name; `fixed`: its models take one picture size only."""

    def create(pretrained: bool = False, **kwargs: Any) -> Any:
        cfg = resolve_pretrained_cfg(
            name, kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay")
        ).to_dict()

        def build(**wishes: Any) -> ImageModel:
            global_pool = wishes.pop("global_pool", None)
            _check_known(name, wishes)
            wishes = _understood(wishes, fixed)
            if pretrained:
                model = _load(name, cfg, wishes, cache_dir)
            else:
                model = zoo.build_model(entry_config(name, wishes), {"architecture": name})
            if global_pool is not None:
                model.set_global_pool(global_pool)
            return model

        cache_dir = kwargs.pop("cache_dir", None)
        features = {"feature_cls": "getter"}
        if kwargs.get("features_only") and "out_indices" not in kwargs:
            config = entry_config(name, _understood(kwargs, fixed))
            features["out_indices"] = tuple(range(config.num_stages))
        model = build_model_with_cfg(build, name, False, feature_cfg=features, **kwargs)
        _state_facts(model)
        return model

    create.__name__ = create.__qualname__ = name
    create.__module__ = __name__
    create.__doc__ = f"{name} of natcupy's zoo."
    return create


def _state_facts(model: Any) -> None:
    """Make timm's facts those of the model: it copies them from the weights it began with.

    A model is prepared for and saved by its pretrained_cfg, so this must fit its numbers.
    """
    inner = model if isinstance(model, ImageModel) else model.model  # of features_only
    config = inner.config
    for cfg in (inner.pretrained_cfg, model.pretrained_cfg):
        _, *sides = cfg["input_size"]
        if config.img_size is not None:
            sides = [config.img_size] * 2
        cfg["input_size"] = (config.in_chans, *sides)
        cfg["fixed_input_size"] = config.img_size is not None
        if len(cfg.get("label_names") or ()) != config.num_classes:
            cfg.pop("label_names", None)
        if "num_classes" in cfg:  # timm leaves it out for features
            cfg["num_classes"] = config.num_classes


def _check_known(name: str, wishes: dict[str, Any]) -> None:
    """A misspelled argument would build another model than the one that was meant."""
    fields = ModelConfig.__dataclass_fields__
    for key, value in wishes.items():
        if value is not None and key not in fields and key not in ZERO_RATES:
            near = difflib.get_close_matches(key, fields, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(fields)}."
            raise TypeError(f"{name} has no argument {key!r}; {hint}")


def _understood(wishes: dict[str, Any], fixed: bool) -> dict[str, Any]:
    """The arguments that are fields of a ModelConfig; what cannot be honoured is an error."""
    fields = ModelConfig.__dataclass_fields__
    given = {
        key: value
        for key, value in wishes.items()
        if key in fields and (value is not None or key in _MAYBE_NONE)
    }
    for key in ZERO_RATES:
        if wishes.get(key):
            raise ValueError(
                f"natcupy's models have no {key}, got {wishes[key]}; use drop_path_rate."
            )
    size = given.get("img_size")
    if isinstance(size, list | tuple):
        if len(set(size)) != 1:
            raise ValueError(f"img_size must be square, got {tuple(size)}.")
        given["img_size"] = size[0]
    if not fixed:
        given.pop("img_size", None)  # any size goes in
    return given


def _load(name: str, cfg: dict[str, Any], wishes: dict[str, Any], cache_dir: Any) -> ImageModel:
    """The model with the weights that a timm config points to."""
    where = cfg.get("file") or cfg.get("hf_hub_id")
    if not where:
        name = cfg.get("architecture", "this model")
        raise RuntimeError(f"no weights were released for {name}; use pretrained=False.")
    found = locate(str(where), None, Access(cache_dir=cache_dir))
    of_zoo = name in zoo.MODELS
    if found.config is None and not (of_zoo and wishes.keys() <= _ADAPTED):
        return _load_as_stated(name, found, wishes).train()
    model = load(found, wishes, name if found.config is None else None, dtype=torch.float32)
    if of_zoo:
        _check_same(name, entry_config(name, wishes), model.config, where)
    return model.train()


def _load_as_stated(name: str, found: Located, wishes: dict[str, Any]) -> ImageModel:
    """The model that the caller's numbers describe, where nothing else describes the file."""
    state = read_state(found)
    seen, want = convert.infer_config(state), entry_config(name, wishes)
    # Loading adapts the tables to another window, if one was asked for.
    free = (*FREE, "kernel_size") if "kernel_size" in wishes else FREE
    wrong = differences(seen, want, (*HIDDEN, *free, "mlp_ratio"))
    if wrong:
        raise CheckpointError(
            f"{found.weights} must hold the model whose numbers are given, it has "
            f"{'; '.join(wrong)}. Give its numbers, or put its config.json beside it."
        )
    have = want.replace(**{field: getattr(seen, field) for field in free})
    fitted, fresh = convert.fit(state, have, want)
    model = zoo.build_model(want, {"architecture": name})
    compare(fitted, model.state_dict(), fresh, found.weights)
    model.load_state_dict(fitted, strict=False)  # the difference is exactly `fresh`
    if fresh:
        log.warning(
            "not taken from %s, initialised afresh: %s.", found.weights.name, some(sorted(fresh))
        )
    model.source = Source(found.kind, str(found.weights), sha256_file(found.weights))
    return model


def _check_same(name: str, wanted: ModelConfig, got: ModelConfig, where: object) -> None:
    """A file may describe another model than the name."""
    wrong = [
        f"{field}={getattr(got, field)} instead of {getattr(wanted, field)}"
        for field in _SAME
        if getattr(got, field) != getattr(wanted, field)
    ]
    if wrong:
        raise ValueError(
            f"{where} must hold a {name}, it has {', '.join(wrong)}; create the model it is of, or "
            "natcupy.from_pretrained(path)."
        )


for _name in zoo.MODELS:
    _fixed = default_cfgs[_name].default.fixed_input_size
    globals()[_name] = register_model(_entry(_name, _fixed))
for _family in FAMILIES:
    _name = f"natcupy_{_family}"
    globals()[_name] = register_model(_entry(_name, _family in SINGLE_LEVEL))
