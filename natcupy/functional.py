"""Neighborhood attention as functions: `na1d`, `na2d`, `na3d` and their unfused halves.

In: tensors and a user's ints. Out: tensors. Arguments are checked here, once; then one backend is
chosen and called. Backends trust what they are given.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from numbers import Real
from operator import index as as_int

import torch
from torch import Tensor

from natcupy import backends, known_calls, reference
from natcupy.interop import accepts_arrays
from natcupy.neighborhood import Neighborhood

IntOrAxes = int | Sequence[int]
BoolOrAxes = bool | Sequence[bool]

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@accepts_arrays
def na1d(
    query: Tensor,  # [B, L, H, D]
    key: Tensor,  # [B, L, Hkv, D]
    value: Tensor,  # [B, L, Hkv, Dv]
    kernel_size: IntOrAxes,
    stride: IntOrAxes = 1,
    dilation: IntOrAxes = 1,
    is_causal: BoolOrAxes = False,
    scale: float | None = None,
    rpb: Tensor | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """1-D neighborhood attention over `[batch, length, heads, head_dim]`; see `na2d`."""
    return _na(
        1, query, key, value, kernel_size, stride, dilation, is_causal, scale, rpb,
        additional_keys, additional_values, return_lse, backend,
    )  # fmt: skip


@accepts_arrays
def na2d(
    query: Tensor,  # [B, H, W, heads, D]
    key: Tensor,  # [B, H, W, kv_heads, D]
    value: Tensor,  # [B, H, W, kv_heads, Dv]
    kernel_size: IntOrAxes,
    stride: IntOrAxes = 1,
    dilation: IntOrAxes = 1,
    is_causal: BoolOrAxes = False,
    scale: float | None = None,
    rpb: Tensor | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """2-D neighborhood attention: each query attends to exactly its `kernel_size` nearest keys.

    `softmax(scale * query @ key + rpb) @ value` over each query's window (Hassani et al., CVPR
    2023, eq. 2 and 3). Windows are shifted inward at borders, never cut or padded.

    Args:
        query: `[batch, height, width, heads, head_dim]`, float16, bfloat16, float32 or float64.
        key: `[batch, height, width, kv_heads, head_dim]`; `heads` is a multiple of `kv_heads`, and
            query head `h` reads key/value head `h // (heads // kv_heads)`.
        value: `[batch, height, width, kv_heads, value_dim]`.
        kernel_size: window per axis, from 1 up to `length // dilation`; odd or even (an even
            window has one key more on the left).
        stride: queries per shared window, at most `kernel_size`; `stride == kernel_size` is
            blocked attention.
        dilation: gap between the keys of a window.
        is_causal: True for an axis on which a query must not see later keys.
        scale: factor of the logits, `head_dim ** -0.5` when None.
        rpb: relative positional bias `[heads, 2 * kernel_size[0] - 1, 2 * kernel_size[1] - 1]`, in
            the query's dtype or float32, added after scaling; entry `key - query + kernel_size - 1`
            per axis, in units of the dilation.
        additional_keys: `[batch, extra, kv_heads, head_dim]`, seen by every query, without bias.
        additional_values: `[batch, extra, kv_heads, value_dim]`.
        return_lse: also return the log-sum-exp of the logits.
        backend: `"torch"`, `"cpu"` or `"cuda"`; None takes the fastest that can run this call.

    Every int or bool may also be a sequence with one entry per axis. Instead of tensors, all arrays
    may come from one other library that speaks DLPack, such as CuPy or numpy: memory is shared, and
    the results are that library's arrays, without gradients.

    Returns:
        `[batch, height, width, heads, value_dim]` in the query's dtype, and with `return_lse` also
        `[batch, height, width, heads]`, natural log, float32 (float64 for float64 inputs).

    Raises:
        TypeError: an argument of the wrong kind, mixed or unsupported dtypes.
        ValueError: shapes, devices or parameters that break a rule; the message states it.
        RuntimeError: the backend asked for cannot run this call; the message says why.
    """
    return _na(
        2, query, key, value, kernel_size, stride, dilation, is_causal, scale, rpb,
        additional_keys, additional_values, return_lse, backend,
    )  # fmt: skip


@accepts_arrays
def na3d(
    query: Tensor,  # [B, T, H, W, heads, D]
    key: Tensor,  # [B, T, H, W, kv_heads, D]
    value: Tensor,  # [B, T, H, W, kv_heads, Dv]
    kernel_size: IntOrAxes,
    stride: IntOrAxes = 1,
    dilation: IntOrAxes = 1,
    is_causal: BoolOrAxes = False,
    scale: float | None = None,
    rpb: Tensor | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """3-D neighborhood attention, `[batch, depth, height, width, heads, head_dim]`; see `na2d`."""
    return _na(
        3, query, key, value, kernel_size, stride, dilation, is_causal, scale, rpb,
        additional_keys, additional_values, return_lse, backend,
    )  # fmt: skip


@accepts_arrays
def na1d_qk(
    query: Tensor,
    key: Tensor,
    kernel_size: IntOrAxes,
    stride: IntOrAxes = 1,
    dilation: IntOrAxes = 1,
    is_causal: BoolOrAxes = False,
    scale: float | None = None,
    rpb: Tensor | None = None,
    additional_keys: Tensor | None = None,
) -> Tensor:
    """Logits of 1-D neighborhood attention; see `na2d_qk`."""
    return _qk(1, query, key, kernel_size, stride, dilation, is_causal, scale, rpb, additional_keys)


@accepts_arrays
def na2d_qk(
    query: Tensor,
    key: Tensor,
    kernel_size: IntOrAxes,
    stride: IntOrAxes = 1,
    dilation: IntOrAxes = 1,
    is_causal: BoolOrAxes = False,
    scale: float | None = None,
    rpb: Tensor | None = None,
    additional_keys: Tensor | None = None,
) -> Tensor:
    """Attention logits of 2-D neighborhood attention, for those who want the weights in hand.

    Arguments as in `na2d`. Returns `[batch, height, width, heads, taps + extra]`: the window's keys
    in row-major order, then the additional keys; -inf in the empty slots of causal windows.
    `na2d_av(na2d_qk(q, k, K).softmax(-1), v, K)` equals `na2d(q, k, v, K)`.
    """
    return _qk(2, query, key, kernel_size, stride, dilation, is_causal, scale, rpb, additional_keys)


@accepts_arrays
def na3d_qk(
    query: Tensor,
    key: Tensor,
    kernel_size: IntOrAxes,
    stride: IntOrAxes = 1,
    dilation: IntOrAxes = 1,
    is_causal: BoolOrAxes = False,
    scale: float | None = None,
    rpb: Tensor | None = None,
    additional_keys: Tensor | None = None,
) -> Tensor:
    """Logits of 3-D neighborhood attention; see `na2d_qk`."""
    return _qk(3, query, key, kernel_size, stride, dilation, is_causal, scale, rpb, additional_keys)


@accepts_arrays
def na1d_av(
    attn: Tensor,
    value: Tensor,
    kernel_size: IntOrAxes,
    stride: IntOrAxes = 1,
    dilation: IntOrAxes = 1,
    is_causal: BoolOrAxes = False,
    additional_values: Tensor | None = None,
) -> Tensor:
    """Values under given weights, 1-D; see `na2d_av`."""
    return _av(1, attn, value, kernel_size, stride, dilation, is_causal, additional_values)


@accepts_arrays
def na2d_av(
    attn: Tensor,
    value: Tensor,
    kernel_size: IntOrAxes,
    stride: IntOrAxes = 1,
    dilation: IntOrAxes = 1,
    is_causal: BoolOrAxes = False,
    additional_values: Tensor | None = None,
) -> Tensor:
    """Sum of values under given attention weights, 2-D.

    Args:
        attn: `[batch, height, width, heads, taps + extra]`, taps ordered as in `na2d_qk`.
        value: `[batch, height, width, kv_heads, value_dim]`.
        additional_values: `[batch, extra, kv_heads, value_dim]` for the last `extra` weights.

    Other arguments as in `na2d`. Returns `[batch, height, width, heads, value_dim]`.
    """
    return _av(2, attn, value, kernel_size, stride, dilation, is_causal, additional_values)


@accepts_arrays
def na3d_av(
    attn: Tensor,
    value: Tensor,
    kernel_size: IntOrAxes,
    stride: IntOrAxes = 1,
    dilation: IntOrAxes = 1,
    is_causal: BoolOrAxes = False,
    additional_values: Tensor | None = None,
) -> Tensor:
    """Values under given weights, 3-D; see `na2d_av`."""
    return _av(3, attn, value, kernel_size, stride, dilation, is_causal, additional_values)


# ------------------------------------------------------------------------------------------------
# one body for all ranks


def _na(
    rank, query, key, value, kernel_size, stride, dilation, is_causal, scale, rpb,
    additional_keys, additional_values, return_lse, backend,
):  # fmt: skip
    if not isinstance(return_lse, bool):
        raise TypeError(f"return_lse must be True or False, got {return_lse!r}.")
    window = (kernel_size, stride, dilation, is_causal)
    tensors = (query, key, value, rpb, additional_keys, additional_values)
    like = known_calls.signature(rank, window, scale, backend, tensors)
    run = known_calls.find(like)
    if run is not None:
        out, lse = run(tensors, return_lse)
        return (out, lse) if return_lse else out

    hood = neighborhood(rank, *window)
    query, key, value, additional_keys, additional_values = _autocast(
        query, key, value, additional_keys, additional_values
    )
    _check_query(query, rank)
    _check_key_value("key", key, query, query.shape[-1])
    _check_key_value("value", value, query, None)
    _check_kv_pair(key, value)
    _check_additional(additional_keys, additional_values, key, value)
    _check_rpb(rpb, query, hood)
    check_fits(query.shape[1:-2], hood)
    scale = resolve_scale(scale, query.shape[-1])
    backend = backends.choose(
        backend, query, key, value, hood, rpb, additional_keys, additional_values
    )
    known_calls.remember(like, backends.plain(backend, hood, scale), window)
    with _as_given(query):
        out, lse = backend.attention(
            query, key, value, hood, scale, rpb, additional_keys, additional_values, return_lse
        )
    return (out, lse) if return_lse else out


def _qk(rank, query, key, kernel_size, stride, dilation, is_causal, scale, rpb, extra):
    hood = neighborhood(rank, kernel_size, stride, dilation, is_causal)
    query, key, extra = _autocast(query, key, extra)
    _check_query(query, rank)
    _check_key_value("key", key, query, query.shape[-1])
    _check_extra("additional_keys", extra, key)
    _check_rpb(rpb, query, hood)
    check_fits(query.shape[1:-2], hood)
    scale = resolve_scale(scale, query.shape[-1])
    with _as_given(query):
        return reference.qk(query, key, hood, scale, rpb, extra)


def _av(rank, attn, value, kernel_size, stride, dilation, is_causal, extra):
    hood = neighborhood(rank, kernel_size, stride, dilation, is_causal)
    attn, value, extra = _autocast(attn, value, extra)
    _check_query(attn, rank, "attn", "taps")
    _check_key_value("value", value, attn, None)
    _check_extra("additional_values", extra, value)
    taps = hood.size + (0 if extra is None else extra.shape[1])
    if attn.shape[-1] != taps:
        raise ValueError(
            "attn must hold one weight per key of the window and per additional value on its last "
            f"axis, got {attn.shape[-1]} weights for {hood.size} window keys and "
            f"{taps - hood.size} additional values; use the kernel_size the logits were made with."
        )
    check_fits(value.shape[1:-2], hood)
    with _as_given(value):
        return reference.av(attn, value, hood, extra)


# ------------------------------------------------------------------------------------------------
# arguments


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
                "the input (NeighborhoodAttention modules pad by themselves)."
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
    if not abs(scale) <= sys.float_info.max:  # unlike math.isfinite, torch.compile can trace it
        raise ValueError(f"scale must be a finite number or None, got {scale!r}.")
    return float(scale)


def _autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Under autocast, its dtype for every tensor but float64, as torch's own attention does."""
    device = next((t.device.type for t in tensors if isinstance(t, Tensor)), "cpu")
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        t.to(dtype) if isinstance(t, Tensor) and t.dtype in FLOATS[:3] else t for t in tensors
    )


def _as_given(x: Tensor):
    """Inside a backend autocast is off: logits and sums keep the precision chosen for them."""
    if x.device.type == "meta" or not torch.is_autocast_enabled(x.device.type):
        return nullcontext()
    return torch.autocast(x.device.type, enabled=False)


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


def _check_query(query, rank: int, name: str = "query", last: str = "head_dim") -> None:
    axes = ("length",) if rank == 1 else ("height", "width")
    spatial = ", ".join(axes if rank < 3 else ("depth", *axes))
    _check_tensor(name, query, rank + 3, f"[batch, {spatial}, heads, {last}]")
    if query.shape[-1] < 1 or query.shape[-2] < 1:
        raise ValueError(
            f"{name} must have at least one head and one entry on its last axis, got shape "
            f"{tuple(query.shape)}."
        )


def _check_key_value(name: str, x, query: Tensor, head_dim: int | None) -> None:
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


def _check_kv_pair(key: Tensor, value: Tensor) -> None:
    if key.shape[-2] != value.shape[-2]:
        raise ValueError(
            "key and value must have the same number of heads, got "
            f"{key.shape[-2]} and {value.shape[-2]}."
        )


def _check_additional(keys, values, key: Tensor, value: Tensor) -> None:
    if (keys is None) != (values is None):
        given, missing = ("keys", "values") if values is None else ("values", "keys")
        raise ValueError(
            "additional_keys and additional_values go together, got only "
            f"additional_{given}; pass additional_{missing} too."
        )
    _check_extra("additional_keys", keys, key)
    _check_extra("additional_values", values, value)
    if keys is not None and keys.shape[1] != values.shape[1]:
        raise ValueError(
            "additional_keys and additional_values must have the same number of tokens, got "
            f"{keys.shape[1]} and {values.shape[1]}."
        )


def _check_extra(name: str, extra, like: Tensor) -> None:
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


def _check_rpb(rpb, query: Tensor, hood: Neighborhood) -> None:
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
