"""natcupy's models in timm: `import natcupy.timm`, then `timm.create_model("nat_tiny.in1k")`.

In: timm's calls. Out: models of natcupy's zoo, registered under their names with the tags of the
released weights; `natcupy_nat`, `natcupy_dinat_s`, `natcupy_isotropic` and `natcupy_vitrpb` build
any other size from the fields of `natcupy.zoo.ModelConfig`. A natcupy repository or folder loads as
`hf-hub:owner/name` or `local-dir:path`.

timm builds, wraps (`features_only`) and configures; weights come through `natcupy.hub`, so they are
verified by hash, read from shards and other layouts, and adapted as `from_pretrained` does. Needs
the extra "timm".
"""

from __future__ import annotations

import difflib
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
from natcupy.hub import WEIGHTS
from natcupy.hub.client import Access
from natcupy.hub.locate import locate
from natcupy.hub.pretrained import load
from natcupy.zoo import ImageModel, ModelConfig
from natcupy.zoo.config import FAMILIES, SINGLE_LEVEL

__all__: list[str] = []  # register_model fills it

_PASSED = ("interpolation", "crop_mode", "crop_pct", "mean", "std", "fixed_input_size",
           "first_conv", "classifier", "input_size", "num_classes")  # fmt: skip
_ZERO = ("drop_rate", "attn_drop_rate", "proj_drop_rate")  # training scripts pass them as 0


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
    return rows | {f"natcupy_{family}": {"classifier": "head"} for family in FAMILIES}


# What a file's model must have in common with the name it is loaded under.
_SAME = ("family", "embed_dim", "depths", "num_heads", "kernel_size", "dilations")

default_cfgs = generate_default_cfgs(_default_cfgs())


def _entry(
    name: str, base: Callable[[dict[str, Any]], ModelConfig], fixed: bool
) -> Callable[..., Any]:
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
                model = _load(name, base, cfg, wishes, cache_dir)
            else:
                model = zoo.build_model(base(wishes), {"architecture": name})
            if global_pool is not None:
                model.set_global_pool(global_pool)
            return model

        cache_dir = kwargs.pop("cache_dir", None)
        features = {"feature_cls": "getter"}
        if kwargs.get("features_only") and "out_indices" not in kwargs:
            features["out_indices"] = tuple(range(base(_understood(kwargs, fixed)).num_stages))
        return build_model_with_cfg(build, name, False, feature_cfg=features, **kwargs)

    create.__name__ = create.__qualname__ = name
    create.__module__ = __name__
    create.__doc__ = f"{name} of natcupy's zoo."
    return create


def _check_known(name: str, wishes: dict[str, Any]) -> None:
    """A misspelled argument would build another model than the one that was meant."""
    fields = ModelConfig.__dataclass_fields__
    for key, value in wishes.items():
        if value is not None and key not in fields and key not in _ZERO:
            near = difflib.get_close_matches(key, fields, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(fields)}."
            raise TypeError(f"{name} has no argument {key!r}; {hint}")


def _understood(wishes: dict[str, Any], fixed: bool) -> dict[str, Any]:
    """The arguments that are fields of a ModelConfig; what cannot be honoured is an error."""
    fields = ModelConfig.__dataclass_fields__
    given = {key: value for key, value in wishes.items() if key in fields and value is not None}
    for key in _ZERO:
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


def _load(
    name: str,
    base: Callable[[dict[str, Any]], ModelConfig],
    cfg: dict[str, Any],
    wishes: dict[str, Any],
    cache_dir: Any,
) -> ImageModel:
    """The model with the weights that a timm config points to."""
    where = cfg.get("file") or cfg.get("hf_hub_id")
    if not where:
        name = cfg.get("architecture", "this model")
        raise RuntimeError(f"no weights were released for {name}; use pretrained=False.")
    found = locate(str(where), None, Access(cache_dir=cache_dir))
    of_zoo = name in zoo.MODELS
    stated = None if found.config is not None or not of_zoo else name
    model = load(found, wishes, stated, dtype=torch.float32)
    if of_zoo:
        _check_same(name, base(wishes), model.config, where)
    return model.train()


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


def _of_the_zoo(name: str) -> Callable[[dict[str, Any]], ModelConfig]:
    return lambda wishes: zoo.model_config(name).replace(**wishes)


def _of_family(family: str) -> Callable[[dict[str, Any]], ModelConfig]:
    def config(wishes: dict[str, Any]) -> ModelConfig:
        given = {"family": family, **wishes}
        if family in SINGLE_LEVEL:
            given.setdefault("img_size", 224)
        if family == "vitrpb":
            given["kernel_size"] = None
        return ModelConfig.from_dict(given)

    return config


for _name in zoo.MODELS:
    _fixed = default_cfgs[_name].default.fixed_input_size
    globals()[_name] = register_model(_entry(_name, _of_the_zoo(_name), _fixed))
for _family in FAMILIES:
    _name = f"natcupy_{_family}"
    globals()[_name] = register_model(_entry(_name, _of_family(_family), _family in SINGLE_LEVEL))
