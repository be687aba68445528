"""natcupy: neighborhood attention for torch, with the NAT and DiNAT models and their weights.

`natcupy.na2d(query, key, value, kernel_size=7)` is the operation, `NeighborhoodAttention2D` the
layer, `natcupy.from_pretrained("nat-tiny")` a model. Everything is loaded when first used, so that
`natcupy --help` does not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from natcupy.functional import (
        na1d,
        na1d_av,
        na1d_qk,
        na2d,
        na2d_av,
        na2d_qk,
        na3d,
        na3d_av,
        na3d_qk,
    )
    from natcupy.graphs import graph
    from natcupy.hub import from_pretrained, push_to_hub, save_pretrained
    from natcupy.inference import evaluate, predict
    from natcupy.modules import (
        NeighborhoodAttention1D,
        NeighborhoodAttention2D,
        NeighborhoodAttention3D,
    )
    from natcupy.warmup import warmup
    from natcupy.zoo import create_model, is_model, list_models

__version__ = "0.1.0"

_ROOMS = {
    "natcupy.functional": (
        *("na1d", "na1d_av", "na1d_qk"),
        *("na2d", "na2d_av", "na2d_qk"),
        *("na3d", "na3d_av", "na3d_qk"),
    ),
    "natcupy.modules": tuple(f"NeighborhoodAttention{rank}D" for rank in (1, 2, 3)),
    "natcupy.zoo": ("create_model", "is_model", "list_models"),
    "natcupy.hub": ("from_pretrained", "push_to_hub", "save_pretrained"),
    "natcupy.graphs": ("graph",),
    "natcupy.warmup": ("warmup",),
    "natcupy.inference": ("evaluate", "predict"),
}
_ROOM_OF = {name: room for room, names in _ROOMS.items() for name in names}
_SUBMODULES = ("data", "functional", "hub", "inference", "modules", "zoo")

__all__ = [
    "NeighborhoodAttention1D",
    "NeighborhoodAttention2D",
    "NeighborhoodAttention3D",
    "__version__",
    "create_model",
    "evaluate",
    "from_pretrained",
    "graph",
    "is_model",
    "list_models",
    "na1d",
    "na1d_av",
    "na1d_qk",
    "na2d",
    "na2d_av",
    "na2d_qk",
    "na3d",
    "na3d_av",
    "na3d_qk",
    "predict",
    "push_to_hub",
    "save_pretrained",
    "warmup",
]


def __getattr__(name: str):
    if name in _ROOM_OF:
        value = getattr(import_module(_ROOM_OF[name]), name)
        globals()[name] = value  # found at once from now on
        return value
    if name in _SUBMODULES:
        return import_module(f"natcupy.{name}")
    import difflib

    near = difflib.get_close_matches(name, (*__all__, *_SUBMODULES), n=1, cutoff=0.8)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise AttributeError(f"module 'natcupy' has no attribute {name!r}{hint}")


def __dir__() -> list[str]:
    own = (name for name in globals() if name.startswith("__"))
    return sorted({*own, *__all__, *_SUBMODULES})
