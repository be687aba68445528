"""The arguments of `natcupy.functional`, checked.

In: what a user passed. Out: a `Neighborhood`, a scale; or a TypeError or ValueError that states the
rule, the values and the remedy.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from numbers import Real
from operator import index as as_int

import torch
from torch import Tensor

from natcupy.neighborhood import Neighborhood

IntOrAxes = int | Sequence[int]
BoolOrAxes = bool | Sequence[bool]

LARGEST = sys.float_info.max
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def neighborhood(
    rank: int,
    kernel_size: IntOrAxes,
    stride: IntOrAxes = 1,
    dilation: IntOrAxes = 1,
    is_causal: BoolOrAxes = False,
) -> Neighborhood:
    """Checked per-axis parameters; everything that does not depend on the input's size."""
    hood = Neighborhood(
        _per_axis("kernel_size", kernel_size, rank),
        _per_axis("stride", stride, rank),
        _per_axis("dilation", dilation, rank),
        _flags_per_axis("is_causal", is_causal, rank),
    )
    if any(s > k for s, k in zip(hood.stride, hood.kernel_size, strict=True)):
        raise ValueError(
            "stride must not exceed kernel_size on any axis, or keys would be skipped, got "
            f"stride={hood.stride}, kernel_size={hood.kernel_size}; lower the stride."
        )
    return hood


def check_fits(shape: Sequence[int], hood: Neighborhood) -> None:
    """Raise ValueError unless `kernel_size * dilation` fits every axis of `shape`."""
    for length, kernel_size, dilation in zip(shape, hood.kernel_size, hood.dilation, strict=True):
        if kernel_size * dilation > length:
            raise ValueError(
                "kernel_size * dilation must fit the input on every axis, got "
                f"kernel_size={hood.kernel_size}, dilation={hood.dilation}, "
                f"spatial shape={tuple(shape)}; use a smaller kernel_size or dilation, or pad "
                "the input (layers do so themselves with small_maps='pad'). Heads come last but "
                "one: [batch, *spatial, heads, head_dim]."
            )


def _per_axis(name: str, given: IntOrAxes, rank: int) -> tuple[int, ...]:
    if type(given) is int and given > 0:  # the usual cases first: this runs at every call
        return (given,) * rank
    entries = given if isinstance(given, (list, tuple)) else (given,) * rank
    if len(entries) != rank:
        raise ValueError(
            f"{name} must be one int or one int per axis ({rank} here), got {given!r}."
        )
    return tuple(_positive_int(name, entry, given) for entry in entries)


def _positive_int(name: str, entry, given) -> int:
    if isinstance(entry, bool):
        raise TypeError(f"{name} must be an int or one int per axis, got {given!r}.")
    try:
        number = as_int(entry)
    except TypeError:
        raise TypeError(f"{name} must be an int or one int per axis, got {given!r}.") from None
    if number < 1:
        raise ValueError(f"{name} must be at least 1 on every axis, got {given!r}.")
    return number


def _flags_per_axis(name: str, given: BoolOrAxes, rank: int) -> tuple[bool, ...]:
    entries = given if isinstance(given, (list, tuple)) else (given,) * rank
    if len(entries) != rank:
        raise ValueError(
            f"{name} must be one bool or one bool per axis ({rank} here), got {given!r}."
        )
    if not all(isinstance(entry, bool) for entry in entries):
        raise TypeError(f"{name} must be a bool or one bool per axis, got {given!r}.")
    return tuple(entries)


def resolve_scale(scale: float | None, head_dim: int) -> float:
    """The factor of the logits: `scale`, or `head_dim ** -0.5` for None."""
    if scale is None:
        return head_dim**-0.5
    if isinstance(scale, bool) or not isinstance(scale, Real):
        raise TypeError(f"scale must be a finite number or None, got {scale!r}.")
    number = scale if isinstance(scale, int) else float(scale)  # an int may be larger than floats
    if not abs(number) <= LARGEST:  # unlike math.isfinite, torch.compile can trace it
        raise ValueError(f"scale must be a finite number or None, got {scale!r}.")
    return float(number)


def _check_tensor(name: str, x, dim: int, layout: str) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(
            f"{name} must be a torch.Tensor (or an array of NumPy or CuPy, as all others then), "
            f"got {type(x).__name__}."
        )
    if x.layout != torch.strided or x.is_nested:
        raise TypeError(f"{name} must be a dense strided tensor, got layout {x.layout}.")
    if x.dtype not in FLOATS:
        raise TypeError(
            f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}; "
            "convert it with .to(torch.float32)."
        )
    if x.dim() != dim:
        raise ValueError(f"{name} must be {layout} ({dim} axes), got shape {tuple(x.shape)}.")


def check_query(query, rank: int, name: str = "query", last: str = "head_dim") -> None:
    """Raise unless it is a float tensor [batch, *spatial, heads, `last`]."""
    axes = ("length",) if rank == 1 else ("height", "width")
    spatial = ", ".join(axes if rank < 3 else ("depth", *axes))
    _check_tensor(name, query, rank + 3, f"[batch, {spatial}, heads, {last}]")
    if query.shape[-1] < 1 or query.shape[-2] < 1:
        raise ValueError(
            f"{name} must have at least one head and one entry on its last axis, got shape "
            f"{tuple(query.shape)}."
        )


def check_key_value(name: str, x, query: Tensor, head_dim: int | None) -> None:
    """Raise unless it is as the query, but for fewer heads that divide its, and the last axis."""
    _check_tensor(name, x, query.dim(), "shaped like the query but for its last two axes")
    _check_same_kind(name, x, query)
    if x.shape[:-2] != query.shape[:-2]:
        raise ValueError(
            f"{name} must have the query's batch and spatial shape, got {tuple(x.shape[:-2])} "
            f"beside {tuple(query.shape[:-2])}."
        )
    heads, kv_heads = query.shape[-2], x.shape[-2]
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(
            f"the query's heads must be a multiple of the {name}'s heads, got {heads} and "
            f"{kv_heads}; give every group of query heads one {name} head."
        )
    if head_dim is not None and x.shape[-1] != head_dim:
        raise ValueError(
            f"{name} must have the query's head_dim, got {x.shape[-1]} beside {head_dim}."
        )
    if x.shape[-1] < 1:
        raise ValueError(f"{name} must have a head_dim of at least 1, got {tuple(x.shape)}.")


def _check_same_kind(name: str, x: Tensor, query: Tensor) -> None:
    if x.dtype != query.dtype:
        raise TypeError(
            f"all tensors must have one dtype, got {name} in {x.dtype} beside {query.dtype}; "
            "convert one of them, or use torch.autocast."
        )
    if x.device != query.device:
        raise ValueError(
            f"all tensors must be on one device, got {name} on {x.device} beside "
            f"{query.device}; move one of them with .to()."
        )


def check_kv_pair(key: Tensor, value: Tensor) -> None:
    """Raise unless keys and values have the same number of heads."""
    if key.shape[-2] != value.shape[-2]:
        raise ValueError(
            "key and value must have the same number of heads, got "
            f"{key.shape[-2]} and {value.shape[-2]}."
        )


def check_additional(keys, values, key: Tensor, value: Tensor) -> None:
    """Raise unless additional keys come with as many additional values."""
    if (keys is None) != (values is None):
        given, missing = ("keys", "values") if values is None else ("values", "keys")
        raise ValueError(
            "additional_keys and additional_values go together, got only "
            f"additional_{given}; pass additional_{missing} too."
        )
    check_extra("additional_keys", keys, key)
    check_extra("additional_values", values, value)
    if keys is not None and keys.shape[1] != values.shape[1]:
        raise ValueError(
            "additional_keys and additional_values must have the same number of tokens, got "
            f"{keys.shape[1]} and {values.shape[1]}."
        )


def check_extra(name: str, extra, like: Tensor) -> None:
    """Raise unless it is None, or [batch, tokens, heads, last axis] as `like` has them."""
    if extra is None:
        return
    _check_tensor(name, extra, 4, "[batch, extra, kv_heads, head_dim]")
    _check_same_kind(name, extra, like)
    expected = (like.shape[0], extra.shape[1], *like.shape[-2:])
    if tuple(extra.shape) != expected:
        raise ValueError(
            f"{name} must be [batch, extra, kv_heads, head_dim] = {expected}, got "
            f"{tuple(extra.shape)}."
        )


def check_rpb(rpb, query: Tensor, hood: Neighborhood) -> None:
    """Raise unless it is None, or [heads, 2 * kernel_size - 1, ...] on the query's device."""
    if rpb is None:
        return
    _check_tensor("rpb", rpb, hood.rank + 1, "[heads, 2 * kernel_size - 1 per axis]")
    if rpb.dtype not in (query.dtype, torch.float32):
        raise TypeError(
            f"rpb must be float32 or in the query's dtype, got {rpb.dtype} beside {query.dtype}."
        )
    if rpb.device != query.device:
        raise ValueError(
            f"all tensors must be on one device, got rpb on {rpb.device} beside "
            f"{query.device}; move one of them with .to()."
        )
    expected = (query.shape[-2], *(2 * k - 1 for k in hood.kernel_size))
    if tuple(rpb.shape) != expected:
        raise ValueError(
            f"rpb must be [heads, 2 * kernel_size - 1 per axis] = {expected}, got "
            f"{tuple(rpb.shape)}."
        )
