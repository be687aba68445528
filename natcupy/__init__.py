"""natcupy: neighborhood attention for torch, with the NAT and DiNAT models and their weights.

`natcupy.na2d(query, key, value, kernel_size=7)` is the operation, `NeighborhoodAttention2D` the
layer, `natcupy.from_pretrained("nat-tiny")` a model. Importing this package imports torch and
nothing else; the zoo and the Hub are loaded when first used.
"""

from importlib import import_module

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
from natcupy.modules import (
    NeighborhoodAttention1D,
    NeighborhoodAttention2D,
    NeighborhoodAttention3D,
)

__version__ = "0.1.0"

_LATER = {
    "create_model": "natcupy.zoo",
    "list_models": "natcupy.zoo",
    "is_model": "natcupy.zoo",
    "from_pretrained": "natcupy.hub",
    "save_pretrained": "natcupy.hub",
}

__all__ = [
    "NeighborhoodAttention1D",
    "NeighborhoodAttention2D",
    "NeighborhoodAttention3D",
    "__version__",
    "na1d",
    "na1d_av",
    "na1d_qk",
    "na2d",
    "na2d_av",
    "na2d_qk",
    "na3d",
    "na3d_av",
    "na3d_qk",
    *_LATER,
]


def __getattr__(name: str):
    if name in _LATER:
        return getattr(import_module(_LATER[name]), name)
    if name in ("zoo", "hub"):
        return import_module(f"natcupy.{name}")
    raise AttributeError(f"module 'natcupy' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "zoo", "hub"})
