"""Neighborhood attention as functions: `na1d`, `na2d`, `na3d` and their unfused halves.

In: tensors and a user's ints. Out: tensors. Arguments are checked here, once; then one backend is
chosen and called. Backends trust what they are given.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from natcupy import backends, known_calls, reference
from natcupy.arguments import (
    FLOATS,
    BoolOrAxes,
    IntOrAxes,
    check_additional,
    check_extra,
    check_fits,
    check_key_value,
    check_kv_pair,
    check_query,
    check_rpb,
    neighborhood,
    resolve_scale,
)
from natcupy.interop import accepts_arrays


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
    check_query(query, rank)
    check_key_value("key", key, query, query.shape[-1])
    check_key_value("value", value, query, None)
    check_kv_pair(key, value)
    check_additional(additional_keys, additional_values, key, value)
    check_rpb(rpb, query, hood)
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
    check_query(query, rank)
    check_key_value("key", key, query, query.shape[-1])
    check_extra("additional_keys", extra, key)
    check_rpb(rpb, query, hood)
    check_fits(query.shape[1:-2], hood)
    scale = resolve_scale(scale, query.shape[-1])
    with _as_given(query):
        return reference.qk(query, key, hood, scale, rpb, extra)


def _av(rank, attn, value, kernel_size, stride, dilation, is_causal, extra):
    hood = neighborhood(rank, kernel_size, stride, dilation, is_causal)
    attn, value, extra = _autocast(attn, value, extra)
    check_query(attn, rank, "attn", "taps")
    check_key_value("value", value, attn, None)
    check_extra("additional_values", extra, value)
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


def _autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Under autocast, its dtype for every tensor but float64, as torch's own attention does."""
    device = _device_type(tensors)
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        t.to(dtype) if isinstance(t, Tensor) and t.dtype in FLOATS[:3] else t for t in tensors
    )


def _device_type(tensors: tuple[Tensor | None, ...]) -> str:
    for x in tensors:  # a plain loop: torch.compile traces it, in torch 2.6 too
        if isinstance(x, Tensor):
            return x.device.type
    return "cpu"


def _as_given(x: Tensor):
    """Inside a backend autocast is off: logits and sums keep the precision chosen for them."""
    if x.device.type == "meta" or not torch.is_autocast_enabled(x.device.type):
        return nullcontext()
    return torch.autocast(x.device.type, enabled=False)
