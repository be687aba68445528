"""The old operators, under the names of 0.14, 0.15, 0.17 and of 0.20 and newer.

In: heads-first tensors `[batch, heads, *spatial, head_dim]`, queries that the caller has scaled;
heads-last ones for the fused three. Out: what those operators gave, by `natcupy.functional`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from natcupy import functional as F
from natcupy.arguments import BoolOrAxes, IntOrAxes
from natcupy.natten import arguments

_FUSED = {1: F.na1d, 2: F.na2d, 3: F.na3d}
_QK = {1: F.na1d_qk, 2: F.na2d_qk, 3: F.na3d_qk}
_AV = {1: F.na1d_av, 2: F.na2d_av, 3: F.na3d_av}


# ---------------------------------------------------------------- heads-first, one call for all


def _qk(
    rank: int,
    query: Tensor,
    key: Tensor,
    kernel_size: IntOrAxes,
    dilation: IntOrAxes | None,
    is_causal: BoolOrAxes = False,
    rpb: Tensor | None = None,
    additional_keys: Tensor | None = None,
) -> Tensor:
    _check_rank("query", query, rank)
    _check_rank("key", key, rank)
    logits = _QK[rank](
        query.movedim(1, -2),
        key.movedim(1, -2),
        kernel_size,
        dilation=1 if dilation is None else dilation,
        is_causal=is_causal,
        scale=1.0,
        rpb=rpb,
        additional_keys=_heads_last(additional_keys),
    )
    return logits.movedim(-2, 1)


def _av(
    rank: int,
    attn: Tensor,
    value: Tensor,
    kernel_size: IntOrAxes,
    dilation: IntOrAxes | None,
    is_causal: BoolOrAxes = False,
    additional_values: Tensor | None = None,
) -> Tensor:
    _check_rank("attn", attn, rank)
    _check_rank("value", value, rank)
    out = _AV[rank](
        attn.movedim(1, -2),
        value.movedim(1, -2),
        kernel_size,
        dilation=1 if dilation is None else dilation,
        is_causal=is_causal,
        additional_values=_heads_last(additional_values),
    )
    return out.movedim(-2, 1)


def _heads_last(extra: Tensor | None) -> Tensor | None:
    """Additional keys or values: `[B, heads, E, D]` to `[B, E, heads, D]`."""
    return None if extra is None else extra.transpose(1, 2)


def _check_rank(name: str, tensor: Tensor, rank: int) -> None:
    if tensor.dim() != rank + 3:
        raise ValueError(
            f"{name} must be heads-first, [batch, heads, {rank} spatial axes, last], got shape "
            f"{tuple(tensor.shape)}."
        )


# ---------------------------------------------------------------- 0.14: natten…


def _natten_qk(rank: int) -> Callable[..., Tensor]:
    def operator(
        query: Tensor, key: Tensor, kernel_size: IntOrAxes, dilation: IntOrAxes = 1
    ) -> Tensor:
        return _qk(rank, query, key, kernel_size, dilation)

    return _named(
        operator,
        f"natten{rank}dqk",
        "Logits of the window's keys, without a bias.\n\n"
        "    Heads-first query and key, `(query, key, kernel_size, dilation)`.",
    )


def _natten_qkrpb(rank: int) -> Callable[..., Tensor]:
    name = f"natten{rank}dqkrpb"

    def operator(
        query: Tensor, key: Tensor, rpb: Tensor | None, *args: Any, **kwargs: Any
    ) -> Tensor:
        side = 0 if rpb is None else (rpb.shape[-1] + 1) // 2
        kernel_size, dilation = arguments.window(name, side, args, kwargs)
        return _qk(rank, query, key, kernel_size, dilation, rpb=rpb)

    return _named(
        operator,
        name,
        "Logits of the window's keys plus a relative positional bias.\n\n"
        "    `(query, key, rpb, kernel_size, dilation)`; up to 0.14.4 without `kernel_size`.",
    )


def _natten_av(rank: int) -> Callable[..., Tensor]:
    name = f"natten{rank}dav"

    def operator(attn: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        side = round(attn.shape[-1] ** (1 / rank))
        kernel_size, dilation = arguments.window(name, side, args, kwargs)
        return _av(rank, attn, value, kernel_size, dilation)

    return _named(
        operator,
        name,
        "Sum of the window's values under given weights.\n\n"
        "    `(attn, value, kernel_size, dilation)`; up to 0.14.5 without `kernel_size`.",
    )


def _named(operator: Callable[..., Tensor], name: str, text: str) -> Callable[..., Tensor]:
    operator.__name__ = operator.__qualname__ = name
    operator.__doc__ = text
    return operator


natten1dqk, natten2dqk = _natten_qk(1), _natten_qk(2)
natten1dqkrpb, natten2dqkrpb = _natten_qkrpb(1), _natten_qkrpb(2)
natten1dav, natten2dav = _natten_av(1), _natten_av(2)


# ---------------------------------------------------------------- 0.15 and 0.17: na…d_qk, na…d_av


def na1d_qk(
    query: Tensor,
    key: Tensor,
    kernel_size: IntOrAxes,
    dilation: IntOrAxes = 1,
    additional_keys: Tensor | None = None,
    is_causal: BoolOrAxes = False,
    rpb: Tensor | None = None,
) -> Tensor:
    """Logits, heads-first: `[B, heads, L, K (+ extra)]`; the query is not scaled."""
    return _qk(1, query, key, kernel_size, dilation, is_causal, rpb, additional_keys)


def na2d_qk(
    query: Tensor,
    key: Tensor,
    kernel_size: IntOrAxes,
    dilation: IntOrAxes = 1,
    additional_keys: Tensor | None = None,
    is_causal: BoolOrAxes = False,
    rpb: Tensor | None = None,
) -> Tensor:
    """Logits, heads-first: `[B, heads, H, W, K * K (+ extra)]`; the query is not scaled."""
    return _qk(2, query, key, kernel_size, dilation, is_causal, rpb, additional_keys)


def na3d_qk(query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Logits, heads-first: `[B, heads, T, H, W, taps (+ extra)]`; the query is not scaled.

    Further arguments as in `na2d_qk`, or `kernel_size_d, kernel_size, dilation_d, dilation,
    additional_keys` as in 0.15.
    """
    names = ("kernel_size", "dilation", "additional_keys", "is_causal", "rpb")
    return _qk(3, query, key, **arguments.volume("na3d_qk", names, args, kwargs))


def na1d_av(
    attn: Tensor,
    value: Tensor,
    kernel_size: IntOrAxes,
    dilation: IntOrAxes = 1,
    additional_values: Tensor | None = None,
    is_causal: BoolOrAxes = False,
) -> Tensor:
    """Sum of values under weights, heads-first: `[B, heads, L, D]`."""
    return _av(1, attn, value, kernel_size, dilation, is_causal, additional_values)


def na2d_av(
    attn: Tensor,
    value: Tensor,
    kernel_size: IntOrAxes,
    dilation: IntOrAxes = 1,
    additional_values: Tensor | None = None,
    is_causal: BoolOrAxes = False,
) -> Tensor:
    """Sum of values under weights, heads-first: `[B, heads, H, W, D]`."""
    return _av(2, attn, value, kernel_size, dilation, is_causal, additional_values)


def na3d_av(attn: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Sum of values under weights, heads-first: `[B, heads, T, H, W, D]`.

    Further arguments as in `na2d_av`, or with separate depth values as in 0.15.
    """
    names = ("kernel_size", "dilation", "additional_values", "is_causal")
    return _av(3, attn, value, **arguments.volume("na3d_av", names, args, kwargs))


def na1d_qk_with_bias(
    query: Tensor,
    key: Tensor,
    bias: Tensor | None,
    kernel_size: IntOrAxes,
    dilation: IntOrAxes = 1,
    additional_keys: Tensor | None = None,
) -> Tensor:
    """`na1d_qk` with a relative positional bias `[heads, 2K - 1]` (0.15)."""
    return na1d_qk(query, key, kernel_size, dilation, additional_keys, rpb=bias)


def na2d_qk_with_bias(
    query: Tensor,
    key: Tensor,
    bias: Tensor | None,
    kernel_size: IntOrAxes,
    dilation: IntOrAxes = 1,
    additional_keys: Tensor | None = None,
) -> Tensor:
    """`na2d_qk` with a relative positional bias `[heads, 2K - 1, 2K - 1]` (0.15)."""
    return na2d_qk(query, key, kernel_size, dilation, additional_keys, rpb=bias)


def na3d_qk_with_bias(
    query: Tensor, key: Tensor, bias: Tensor | None, *args: Any, **kwargs: Any
) -> Tensor:
    """`na3d_qk` with a relative positional bias `[heads, 2Kd - 1, 2K - 1, 2K - 1]` (0.15)."""
    return na3d_qk(query, key, *args, rpb=bias, **kwargs)


def _volume_qk(query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return na3d_qk(query, key, *args, **kwargs)


def _volume_qkrpb(query: Tensor, key: Tensor, rpb: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return na3d_qk_with_bias(query, key, rpb, *args, **kwargs)


def _volume_av(attn: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return na3d_av(attn, value, *args, **kwargs)


natten3dqk = _named(_volume_qk, "natten3dqk", "`na3d_qk` under its older name.")
natten3dqkrpb = _named(_volume_qkrpb, "natten3dqkrpb", "`na3d_qk_with_bias`, by its older name.")
natten3dav = _named(_volume_av, "natten3dav", "`na3d_av` under its older name.")


# ---------------------------------------------------------------- 0.17 and newer: fused, heads-last


def _fused(rank: int) -> Callable[..., Any]:
    name = f"na{rank}d"

    def operator(
        query: Tensor, key: Tensor, value: Tensor, kernel_size: IntOrAxes, *args: Any, **kwargs: Any
    ) -> Any:
        given = arguments.fused(name, args, kwargs)
        return _FUSED[rank](query, key, value, kernel_size, **given)

    return _named(
        operator,
        name,
        "Fused neighborhood attention, heads-last: `[B, *spatial, heads, D]`.\n\n"
        "    After `kernel_size` 0.17 has `dilation, is_causal, rpb, scale, additional_keys,\n"
        "    additional_values, xformers_kwargs`, 0.20 and newer `stride, dilation, is_causal,\n"
        "    scale, additional_keys, additional_values`, tuning arguments and `return_lse`. One\n"
        "    value by position is 0.17's dilation, with a warning. `scale` defaults to\n"
        "    `D ** -0.5`; tuning arguments and backend names have no meaning here.",
    )


na1d, na2d, na3d = _fused(1), _fused(2), _fused(3)


def neighborhood_attention_generic(
    query: Tensor, key: Tensor, value: Tensor, kernel_size: IntOrAxes, *args: Any, **kwargs: Any
) -> Any:
    """`na1d`, `na2d` or `na3d` of 0.20 and newer, by the number of axes of the query.

    Raises ValueError for a query that is not `[B, *1 to 3 spatial axes, heads, D]`.
    """
    rank = query.dim() - 3
    if rank not in _FUSED:
        raise ValueError(
            "query must be [batch, *spatial, heads, head_dim] with 1 to 3 spatial axes, got shape "
            f"{tuple(query.shape)}."
        )
    what = "neighborhood_attention_generic"
    given = arguments.without_tuning(arguments.by_name(what, arguments.FUSED_0_20, args, kwargs))
    return _FUSED[rank](query, key, value, kernel_size, **given)


def merge_attentions(
    outputs: Sequence[Tensor],
    lse_tensors: Sequence[Tensor],
    torch_compile: bool = True,
    use_autograd_fix: bool = True,
) -> tuple[Tensor, Tensor]:
    """One attention over the keys of several, from their outputs and log-sum-exps.

    Args:
        outputs: `[..., heads, D]`, of the same queries over keys that no two share.
        lse_tensors: their natural log-sum-exps, `[..., heads]`.
        torch_compile: accepted, with nothing to switch.
        use_autograd_fix: accepted, with nothing to switch. The gradient goes through outputs and
            log-sum-exps, and is right for every attention whose log-sum-exp has one, as
            natcupy's have; a log-sum-exp without a gradient is a constant.

    Returns:
        The same two of all keys. Older versions returned the output alone: take the first.

    Raises:
        ValueError: lists of different lengths or shapes.
    """
    if not outputs or len(outputs) != len(lse_tensors):
        raise ValueError(
            "merge_attentions takes as many log-sum-exps as outputs, at least one, got "
            f"{len(outputs)} outputs and {len(lse_tensors)} log-sum-exps."
        )
    shapes = {tuple(x.shape) for x in outputs}
    if len(shapes) > 1 or any(x.shape != outputs[0].shape[:-1] for x in lse_tensors):
        raise ValueError(
            "outputs must have one shape [..., heads, head_dim] and log-sum-exps that without the "
            f"last axis, got {sorted(shapes)} and {sorted({tuple(x.shape) for x in lse_tensors})}."
        )
    lses = torch.stack(tuple(lse_tensors))
    weights = lses.softmax(0).unsqueeze(-1)
    out = (torch.stack(tuple(outputs)).to(lses.dtype) * weights).sum(0)
    return out.to(outputs[0].dtype), lses.logsumexp(0)
