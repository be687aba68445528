"""Which version a call was written for, and what its arguments are called there.

In: the arguments as a caller gave them. Out: the same by name. Where two versions would read one
call differently, the rule is stated at the function that decides.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

FUSED_0_17 = (
    "dilation", "is_causal", "rpb", "scale", "additional_keys", "additional_values",
    "xformers_kwargs",
)  # fmt: skip
FUSED_0_20 = (
    "stride", "dilation", "is_causal", "scale", "additional_keys", "additional_values",
    "attention_kwargs", "backend", "q_tile_shape", "kv_tile_shape", "backward_q_tile_shape",
    "backward_kv_tile_shape", "backward_kv_splits", "backward_use_pt_reduction",
    "run_persistent_kernel", "kernel_schedule", "torch_compile", "return_lse",
)  # fmt: skip
_TUNING = {"xformers_kwargs", "backend", *FUSED_0_20[6:17]}  # how to compute, never what

_FIRST = ("dim", "num_heads", "kernel_size")
LAYER_0_14 = (*_FIRST, "dilation", "bias", "qkv_bias", "qk_scale", "attn_drop", "proj_drop")
LAYER_0_17 = (
    *_FIRST, "dilation", "is_causal", "rel_pos_bias", "qkv_bias", "qk_scale", "attn_drop",
    "proj_drop", "use_experimental_ops",
)  # fmt: skip
LAYER_0_20 = (
    *_FIRST, "stride", "dilation", "is_causal", "qkv_bias", "qk_scale", "proj_drop",
)  # fmt: skip


def by_name(
    what: str, order: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Positional and keyword arguments as one dict. Raises TypeError for unknown or double ones."""
    if len(args) > len(order):
        raise TypeError(f"{what} takes {', '.join(order)}, got {len(args)} positional arguments.")
    given = dict(zip(order, args, strict=False))
    wrong = given.keys() & kwargs.keys() | kwargs.keys() - set(order)
    if wrong:
        raise TypeError(f"{what} takes {', '.join(order)}, each once, got {sorted(wrong)} besides.")
    return {**given, **kwargs}


def window(what: str, side: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """`kernel_size` and `dilation` of a `natten…` call.

    From 0.14.5 on both are required. A call with one of them is older, has only the dilation, and
    its window is `side`, what the bias or the weights are made for.
    """
    if len(args) + len(kwargs) == 1 and "kernel_size" not in kwargs:
        return side, *by_name(what, ("dilation",), args, kwargs).values()
    given = by_name(what, ("kernel_size", "dilation"), args, kwargs)
    if len(given) < 2:
        raise TypeError(f"{what} needs kernel_size and dilation, got {sorted(given)}.")
    return given["kernel_size"], given["dilation"]


def volume(
    what: str, names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """The arguments of a 3-D operator: `names` as in 0.17, or with depth values as in 0.15.

    It is 0.15's if a depth value is named, or if there are more than two ints in front: 0.17 has
    a tensor or a bool in the third place.
    """
    numbers = sum(type(argument) is int for argument in args[:4])
    old = "kernel_size_d" in kwargs or "dilation_d" in kwargs or numbers > 2
    depth_first = ("kernel_size_d", "kernel_size", "dilation_d", "dilation")
    given = by_name(what, (*depth_first, *names[2:]) if old else names, args, kwargs)
    if "kernel_size" not in given:
        raise TypeError(f"{what} needs kernel_size.")
    given.setdefault("dilation", 1)
    if old:
        for name in ("kernel_size", "dilation"):
            plane = given[name]
            given[name] = (given.pop(f"{name}_d", plane), plane, plane)
    return given


def fused(what: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """What follows `kernel_size` in a fused call of 0.17 or of 0.20 and newer.

    It is the newer one's if it names anything that 0.17 lacks, or if two values come by position
    and the second is no bool. One value alone is 0.17's dilation, with a warning.
    """
    newer = bool(kwargs.keys() & set(FUSED_0_20) - set(FUSED_0_17))
    newer |= "dilation" in kwargs and len(args) > 0
    newer |= len(args) > 1 and not _bools(args[1])
    older = bool(kwargs.keys() & set(FUSED_0_17) - set(FUSED_0_20))
    if len(args) == 1 and not newer and not older and not _ones(args[0]):
        warnings.warn(
            f"{what}: the argument after kernel_size is read as the dilation, as in 0.17; from "
            "0.20 on it is the stride. Write dilation= or stride=.",
            stacklevel=3,
        )
    return without_tuning(by_name(what, FUSED_0_20 if newer else FUSED_0_17, args, kwargs))


def without_tuning(given: dict[str, Any]) -> dict[str, Any]:
    """What a fused call computes, without how: that is natcupy's own choice."""
    return {name: value for name, value in given.items() if name not in _TUNING}


def layer(what: str, rank: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """natcupy's arguments for a layer of 0.14, 0.15, 0.17 or 0.20 and newer."""
    kwargs = dict(kwargs)
    if "embed_dim" in kwargs:
        kwargs["dim"] = kwargs.pop("embed_dim")
        order = LAYER_0_20
    else:
        order = _layer_order(what, rank, args, kwargs)
    depth = {}
    if rank == 3:
        depth = {name: kwargs.pop(f"{name}_d", None) for name in ("kernel_size", "dilation")}
    given = by_name(what, order, args, kwargs)
    missing = [name for name in _FIRST if name not in given]
    if missing:
        raise TypeError(f"{what} needs {', '.join(missing)}.")
    given["embed_dim"] = given.pop("dim")
    given["dilation"] = given.get("dilation") or 1
    for name, value in depth.items():
        if value is not None:
            given[name] = (value, given[name], given[name])
    given.pop("use_experimental_ops", None)
    if order is LAYER_0_14:
        given["rel_pos_bias"] = given.pop("bias", True)
    return {"small_maps": "pad" if order is LAYER_0_14 else "raise", **given}


def _layer_order(
    what: str, rank: int, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[str, ...]:
    """The version that a constructor call is of: by its names, then by the types of its values."""
    if rank == 3 and len(args) > 3:
        raise TypeError(
            f"{what}: the argument after kernel_size is kernel_size_d in 0.15, dilation in 0.17 "
            "and stride from 0.20 on. Write its name."
        )
    for order, names in (
        (LAYER_0_20, {"stride"}),
        (LAYER_0_17, {"is_causal", "rel_pos_bias", "use_experimental_ops"}),
        (LAYER_0_14, {"bias", "kernel_size_d", "dilation_d"}),
    ):
        if names & kwargs.keys():
            return order
    if len(args) > 4 and not isinstance(args[4], bool):
        return LAYER_0_17 if _bools(args[4]) else LAYER_0_20
    if len(args) > 6 and isinstance(args[6], bool):
        return LAYER_0_17
    warnings.warn(
        f"{what}: this call fits several versions and is read as 0.14's: with a bias (rpb), the "
        "value after kernel_size as the dilation. Write bias=True for just that, "
        "rel_pos_bias=False as in 0.17 without a bias, or stride= as from 0.20 on.",
        stacklevel=4,
    )
    return LAYER_0_14


def _bools(value: Any) -> bool:
    return all(isinstance(v, bool) for v in _axes(value))


def _ones(value: Any) -> bool:
    return all(v == 1 for v in _axes(value))


def _axes(value: Any) -> Sequence[Any]:
    return value if isinstance(value, tuple | list) else (value,)
