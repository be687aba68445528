"""Neighborhood attention as layers: linear projections around `na1d`, `na2d`, `na3d`.

In: `[batch, *spatial, embed_dim]`. Out: the same shape. State-dict keys are those of the original
NAT and DiNAT checkpoints: `qkv`, `proj`, `rpb`.
"""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.forward_ad import unpack_dual

from natcupy import functional as F
from natcupy.dtype_errors import explained
from natcupy.layouts import joined

# What the argument is called in NATTEN, timm and elsewhere.
_MEANT = {
    "dim": "embed_dim",
    "channels": "embed_dim",
    "heads": "num_heads",
    "window_size": "kernel_size",
    "causal": "is_causal",
    "bias": "rel_pos_bias",
    "rpb": "rel_pos_bias",
    "scale": "qk_scale",
    "dropout": "attn_drop",
}


def _in_the_layers_name(init: Callable[..., None]) -> Callable[..., None]:
    """Arguments that the constructor does not take are told in the public class's name."""
    signature = inspect.signature(init)
    known = [*signature.parameters][1:]

    @functools.wraps(init)
    def wrapper(self, *args: Any, **kwargs: Any) -> None:
        name = f"NeighborhoodAttention{self.rank}D"
        for given in kwargs:
            if given not in known:
                near = _MEANT.get(given) or "".join(difflib.get_close_matches(given, known, n=1))
                hint = f"did you mean {near!r}?" if near else f"known: {', '.join(known)}."
                raise TypeError(
                    f"{name} has no argument {given!r}; {hint} (natcupy.natten.{name} takes the "
                    "arguments of NATTEN's layers.)"
                )
        try:
            signature.bind(self, *args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{name} takes {', '.join(known)}: {error}.") from None
        init(self, *args, **kwargs)

    return wrapper


class _NeighborhoodAttention(nn.Module):
    """Shared body of the three public classes."""

    rank: int

    @_in_the_layers_name
    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        kernel_size: F.IntOrAxes,
        stride: F.IntOrAxes = 1,
        dilation: F.IntOrAxes = 1,
        is_causal: F.BoolOrAxes = False,
        rel_pos_bias: bool = False,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        small_maps: str = "pad",
    ) -> None:
        super().__init__()
        _check_heads(embed_dim, num_heads)
        if small_maps not in ("pad", "raise"):
            raise ValueError(f"small_maps must be 'pad' or 'raise', got {small_maps!r}.")
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.head_dim = embed_dim // num_heads
        self.hood = F.neighborhood(self.rank, kernel_size, stride, dilation, is_causal)
        self.scale = F.resolve_scale(qk_scale, self.head_dim)
        self.small_maps = small_maps
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim, bias=qkv_bias)
        self.proj = nn.Linear(embed_dim, embed_dim)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj_drop = nn.Dropout(proj_drop)
        if rel_pos_bias:
            spans = (2 * k - 1 for k in self.hood.kernel_size)
            self.rpb = nn.Parameter(torch.empty(num_heads, *spans))
        else:
            self.register_parameter("rpb", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the bias table anew, as after `to_empty`; `qkv` and `proj` do so themselves."""
        if self.rpb is not None:
            nn.init.trunc_normal_(self.rpb, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, *spatial, embed_dim]` to the same shape."""
        if x.dim() != self.rank + 2 or x.shape[-1] != self.embed_dim:
            raise ValueError(
                f"the input must be [batch, {self.rank} spatial axes, embed_dim="
                f"{self.embed_dim}], got shape {tuple(x.shape)}."
            )
        shape = x.shape[1:-1]
        padded = self._pad(x)
        qkv = self._project(padded).unflatten(-1, (3, self.num_heads, self.head_dim))
        query, key, value = _split(qkv)
        out = self._attend(query, key, value).flatten(-2)
        if padded is not x:
            for axis, length in enumerate(shape, 1):
                out = out.narrow(axis, 0, length)
        return self.proj_drop(self.proj(out))

    def _project(self, x: Tensor) -> Tensor:
        """`qkv(x)`; an error that comes of another dtype says so."""
        if torch.compiler.is_compiling():
            return self.qkv(x)
        try:
            return self.qkv(x)
        except RuntimeError as error:
            told = explained(error, self.qkv, x, ("the layer", "input", "layer"))
            if told is None:
                raise
            raise told from error

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        hood = self.hood
        fused, qk, av = _OPS[self.rank]
        window = (hood.kernel_size, hood.stride, hood.dilation, hood.is_causal)
        if self.training and self.attn_drop.p > 0:
            attn = qk(query, key, *window, scale=self.scale, rpb=self.rpb).softmax(-1)
            return av(self.attn_drop(attn), value, *window)
        return fused(query, key, value, *window, scale=self.scale, rpb=self.rpb)

    def _pad(self, x: Tensor) -> Tensor:
        """Zeros at the far end of every axis shorter than `kernel_size * dilation`.

        The pads go through the projection and are attended: the released models were trained so.
        """
        if self.small_maps == "raise":
            F.check_fits(x.shape[1:-1], self.hood)
            return x
        needed = [k * d for k, d in zip(self.hood.kernel_size, self.hood.dilation, strict=True)]
        missing = [max(n - length, 0) for n, length in zip(needed, x.shape[1:-1], strict=True)]
        if not any(missing):
            return x
        pads = [0, 0]
        for count in reversed(missing):
            pads += [0, count]
        return nn.functional.pad(x, pads)

    def extra_repr(self) -> str:
        """The constructor's arguments that differ from their defaults."""
        hood = self.hood
        parts = [f"embed_dim={self.embed_dim}", f"num_heads={self.num_heads}"]
        parts.append(f"kernel_size={hood.kernel_size}")
        if set(hood.stride) != {1}:
            parts.append(f"stride={hood.stride}")
        if set(hood.dilation) != {1}:
            parts.append(f"dilation={hood.dilation}")
        if any(hood.is_causal):
            parts.append(f"is_causal={hood.is_causal}")
        parts.append(f"rel_pos_bias={self.rpb is not None}")
        return ", ".join(parts)


class NeighborhoodAttention1D(_NeighborhoodAttention):
    """Neighborhood attention over sequences `[batch, length, embed_dim]`.

    Arguments as in `NeighborhoodAttention2D`.
    """

    rank = 1


class NeighborhoodAttention2D(_NeighborhoodAttention):
    """Neighborhood attention over maps `[batch, height, width, embed_dim]`.

    Args:
        embed_dim: channels of input and output, a multiple of `num_heads`.
        num_heads: attention heads.
        kernel_size: window per axis; this and the next three may be one value or one per axis.
        stride: queries per shared window.
        dilation: gap between the keys of a window.
        is_causal: True for an axis on which a query must not see later keys.
        rel_pos_bias: learn a relative positional bias, parameter `rpb`.
        qkv_bias: bias of the query/key/value projection.
        qk_scale: factor of the logits, `head_dim ** -0.5` when None.
        attn_drop: dropout of attention weights while training (takes the unfused path).
        proj_drop: dropout after the output projection.
        small_maps: what to do with an axis shorter than `kernel_size * dilation`: `"pad"` with
            zeros at its far end before the projection, attended, and crop afterwards, as the
            released NAT and DiNAT models were trained; or `"raise"` a ValueError.
    """

    rank = 2


class NeighborhoodAttention3D(_NeighborhoodAttention):
    """Neighborhood attention over volumes `[batch, depth, height, width, embed_dim]`.

    Arguments as in `NeighborhoodAttention2D`.
    """

    rank = 3


_OPS = {
    1: (F.na1d, F.na1d_qk, F.na1d_av),
    2: (F.na2d, F.na2d_qk, F.na2d_av),
    3: (F.na3d, F.na3d_qk, F.na3d_av),
}


def _split(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`[..., 3, heads, head_dim]` as three views, whose gradients need not be joined by a copy."""
    plain = torch.is_grad_enabled() and qkv.requires_grad and type(qkv) is Tensor
    if not plain or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return qkv.unbind(-3)
    if torch._C._are_functorch_transforms_active() or torch._C._len_torch_dispatch_stack():
        return qkv.unbind(-3)
    if unpack_dual(qkv).tangent is not None:
        return qkv.unbind(-3)
    return _Split.apply(qkv)


class _Split(torch.autograd.Function):
    """`unbind(-3)`; gradients that lie in one tensor, as the kernels make them, stay."""

    @staticmethod
    def forward(ctx, qkv):
        return qkv.unbind(-3)

    @staticmethod
    def backward(ctx, *gradients):
        # A recorded or batched backward pass needs torch's own operator.
        watched = torch.is_grad_enabled() or torch._C._are_functorch_transforms_active()
        whole = None if watched else joined(*gradients)
        return torch.stack(gradients, -3) if whole is None else whole


def _check_heads(embed_dim: int, num_heads: int) -> None:
    for name, given in (("embed_dim", embed_dim), ("num_heads", num_heads)):
        if isinstance(given, bool) or not isinstance(given, int):
            raise TypeError(f"{name} must be an int, got {given!r}.")
        if given < 1:
            raise ValueError(f"{name} must be at least 1, got {given}.")
    if embed_dim % num_heads:
        raise ValueError(
            f"embed_dim must be a multiple of num_heads, got embed_dim={embed_dim}, "
            f"num_heads={num_heads}; choose a divisor of {embed_dim}."
        )
