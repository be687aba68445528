"""The operators and modules that research code imported before: `from natcupy import natten`.

In: calls as they were written for versions 0.14, 0.15, 0.17 and 0.20 to 0.21 of the package of
that name, which is neither needed nor installed. Out: the same results from natcupy, on any
device, with gradients.

| name | as in |
| --- | --- |
| `natten1dqkrpb`, `natten1dqk`, `natten1dav`, and `2d` | 0.14 to 0.17 |
| `natten3dqkrpb`, `natten3dqk`, `natten3dav` | 0.15 to 0.17 |
| `na1d_qk`, `na1d_av`, and `2d`, `3d` | 0.15, 0.17 |
| `na1d_qk_with_bias`, and `2d`, `3d` | 0.15 |
| `na1d`, `na2d`, `na3d` | 0.17, 0.20 and newer |
| `NeighborhoodAttention1D`, `2D`, `3D` | all |
| `use_fused_na`, `has_cuda` | 0.17 |

The unfused operators are heads-first: `[batch, heads, *spatial, head_dim]`, logits and weights
`[batch, heads, *spatial, taps (+ extra)]`; the query is not scaled, the caller does that. The fused
ones are heads-last. How a call is told from that of another version stands at each name: a layer
that names nothing is 0.14's (with a bias), one value after `kernel_size` of a fused call is 0.17's
dilation. Not here: `attention` and `merge_attentions` of 0.20, the FLOP counter, the profiler.
"""

import torch

from natcupy.natten.functional import (
    na1d,
    na1d_av,
    na1d_qk,
    na1d_qk_with_bias,
    na2d,
    na2d_av,
    na2d_qk,
    na2d_qk_with_bias,
    na3d,
    na3d_av,
    na3d_qk,
    na3d_qk_with_bias,
    natten1dav,
    natten1dqk,
    natten1dqkrpb,
    natten2dav,
    natten2dqk,
    natten2dqkrpb,
    natten3dav,
    natten3dqk,
    natten3dqkrpb,
)
from natcupy.natten.layers import (
    NeighborhoodAttention1D,
    NeighborhoodAttention2D,
    NeighborhoodAttention3D,
)


def has_cuda() -> bool:
    """Whether a GPU can be used."""
    return torch.cuda.is_available()


def use_fused_na(mode: bool = True, kv_parallel: bool = True) -> None:
    """Accepted, with nothing to switch: layers always fuse, save where weights are dropped."""


__all__ = [
    "NeighborhoodAttention1D",
    "NeighborhoodAttention2D",
    "NeighborhoodAttention3D",
    "has_cuda",
    "na1d",
    "na1d_av",
    "na1d_qk",
    "na1d_qk_with_bias",
    "na2d",
    "na2d_av",
    "na2d_qk",
    "na2d_qk_with_bias",
    "na3d",
    "na3d_av",
    "na3d_qk",
    "na3d_qk_with_bias",
    "natten1dav",
    "natten1dqk",
    "natten1dqkrpb",
    "natten2dav",
    "natten2dqk",
    "natten2dqkrpb",
    "natten3dav",
    "natten3dqk",
    "natten3dqkrpb",
    "use_fused_na",
]
