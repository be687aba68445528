"""The old layers, with the constructor arguments of 0.14, 0.15, 0.17 and of 0.20 and newer.

In: `[batch, *spatial, dim]`. Out: the same shape, from natcupy's layers; state-dict keys `qkv`,
`proj`, `rpb` as they always were, and the attributes of 0.17 and newer.
"""

from __future__ import annotations

from typing import Any

from natcupy import functional as F
from natcupy import modules as ours
from natcupy.natten import arguments

_WINDOW = ("kernel_size", "stride", "dilation", "is_causal")


def _of_the_window(name: str, text: str) -> property:
    """One parameter of the window; what is assigned to it counts from the next call on."""

    def get(self: Any) -> Any:
        return getattr(self.hood, name)

    def put(self: Any, value: Any) -> None:
        window = {each: getattr(self.hood, each) for each in _WINDOW}
        self.hood = F.neighborhood(self.rank, **{**window, name: value})

    return property(get, put, doc=text)


class _Legacy:
    """The constructors and attributes of all versions in front of natcupy's layer."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(**arguments.layer(type(self).__name__, self.rank, args, kwargs))

    # One value per axis, as from 0.17 on; before, one int for all.
    kernel_size = _of_the_window("kernel_size", "Window per axis.")
    stride = _of_the_window("stride", "Queries per shared window, per axis.")
    dilation = _of_the_window("dilation", "Gap between the keys of a window, per axis.")
    is_causal = _of_the_window("is_causal", "Per axis, whether later keys are hidden.")

    @property
    def na_dim(self) -> int:
        """Number of spatial axes."""
        return self.rank

    @property
    def attn_drop_rate(self) -> float:
        """Dropout of attention weights."""
        return self.attn_drop.p


class NeighborhoodAttention1D(_Legacy, ours.NeighborhoodAttention1D):
    """Neighborhood attention over `[batch, length, dim]`, with the old arguments.

    * 0.14, 0.15: `(dim, num_heads, kernel_size, dilation=1, bias=True, qkv_bias=True,
      qk_scale=None, attn_drop=0.0, proj_drop=0.0)`. The bias is a relative positional one, maps
      smaller than the window are padded. A call that fits several versions is of this kind, with
      a warning.
    * 0.17: `(dim, num_heads, kernel_size, dilation=1, is_causal=False, rel_pos_bias=False,
      qkv_bias=True, qk_scale=None, attn_drop=0.0, proj_drop=0.0, use_experimental_ops=False)`.
      No bias by default, small maps raise ValueError. Known by `is_causal`, `rel_pos_bias` or
      `use_experimental_ops`, or by a bool in the place of `qkv_bias`.
    * 0.20 and newer: `(embed_dim, num_heads, kernel_size, stride=1, dilation=1, is_causal=False,
      qkv_bias=True, qk_scale=None, proj_drop=0.0)`. Known by `stride` or `embed_dim`, or by an
      int in the fifth place.

    `kernel_size`, `stride`, `dilation` and `is_causal` are attributes, tuples of one value per
    axis however they were given; so are `embed_dim`, `num_heads`, `head_dim`, `scale`, `na_dim`,
    `attn_drop_rate`, and `rpb` (None without a bias).
    """


class NeighborhoodAttention2D(_Legacy, ours.NeighborhoodAttention2D):
    """Neighborhood attention over `[batch, height, width, dim]`, with the old arguments.

    Arguments as in `NeighborhoodAttention1D`.
    """


class NeighborhoodAttention3D(_Legacy, ours.NeighborhoodAttention3D):
    """Neighborhood attention over `[batch, depth, height, width, dim]`, with the old arguments.

    Arguments as in `NeighborhoodAttention1D`, and `kernel_size_d`, `dilation_d` of 0.15. What
    follows `kernel_size` must be named: the versions put three different things there.
    """
