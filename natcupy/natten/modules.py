"""The old layers, with the constructor arguments of 0.14, 0.15, 0.17 and of 0.20 and newer.

In: `[batch, *spatial, dim]`. Out: the same shape, from natcupy's layers; state-dict keys `qkv`,
`proj`, `rpb` as they always were.
"""

from __future__ import annotations

from typing import Any

from natcupy import modules as ours
from natcupy.natten import arguments


class _Legacy:
    """The constructors of all versions in front of natcupy's layer."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(**arguments.layer(type(self).__name__, self.rank, args, kwargs))


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
