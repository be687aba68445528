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
| `neighborhood_attention_generic`, `merge_attentions` | 0.20 and newer |
| `NeighborhoodAttention1D`, `2D`, `3D` | all |
| `use_fused_na` and other switches, `has_cuda` and other questions | 0.17 and newer |

The unfused operators are heads-first: `[batch, heads, *spatial, head_dim]`, logits and weights
`[batch, heads, *spatial, taps (+ extra)]`; the query is not scaled, the caller does that. The fused
ones are heads-last. How a call is told from that of another version stands at each name: a layer
that names nothing is 0.14's (with a bias), one value after `kernel_size` of a fused call is 0.17's
dilation; both are said in a warning. Modules: `natten`, `natten.functional`, `natten.modules`. Not
here: `attention`, the operators by backend, `natten.utils` and other inner modules, the FLOP
counter, the profiler.

`__version__` is not natcupy's own: it is the newest version whose calls are understood, for code
that chooses its calls by it.
"""

from typing import Any

import torch

from natcupy.natten.functional import (
    merge_attentions,
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
    neighborhood_attention_generic,
)
from natcupy.natten.modules import (
    NeighborhoodAttention1D,
    NeighborhoodAttention2D,
    NeighborhoodAttention3D,
)

__version__ = "0.21.7"


def has_cuda() -> bool:
    """Whether a GPU can be used."""
    return torch.cuda.is_available()


def _yes(*_device: Any) -> bool:
    """True: whatever the device, there is a way to run it."""
    return True


has_bfloat = has_fna = has_fused_na = has_half = is_fused_na_enabled = _yes


def use_fused_na(mode: bool = True, kv_parallel: bool = True) -> None:
    """Accepted, with nothing to switch: layers always fuse, save where weights are dropped."""


def use_kv_parallelism_in_fused_na(mode: bool = True) -> None:
    """Accepted, with nothing to switch: gradients are bit-reproducible in any case."""


def set_memory_usage_preference(pref: str = "default") -> None:
    """Accepted, with nothing to switch: no kernel trades memory for speed."""


def __getattr__(name: str) -> Any:
    raise AttributeError(
        f"natcupy.natten has no {name!r}; it has {', '.join(__all__)}. natcupy itself has the "
        "operation in `natcupy.functional` and layers in `natcupy.modules`."
    )


__all__ = [
    "NeighborhoodAttention1D",
    "NeighborhoodAttention2D",
    "NeighborhoodAttention3D",
    "has_bfloat",
    "has_cuda",
    "has_fna",
    "has_fused_na",
    "has_half",
    "is_fused_na_enabled",
    "merge_attentions",
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
    "neighborhood_attention_generic",
    "set_memory_usage_preference",
    "use_fused_na",
    "use_kv_parallelism_in_fused_na",
]
