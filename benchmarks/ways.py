"""A way to attend, as the benchmark sees it: one face for natcupy and for everything beside it.

In: query, key, value `[B, *spatial, H, D]`, a `Neighborhood`, a scale and a bias `[H, 2K-1, ...]`
or None. Out: `[B, *spatial, H, D]`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from natcupy.neighborhood import Neighborhood

Attend = Callable[[Tensor, Tensor, Tensor, Neighborhood, float, "Tensor | None"], Tensor]
DENSE_BYTES = {"cuda": 8 << 30, "cpu": 2 << 30}  # the most a way's own tensors may take


@dataclass(frozen=True)
class Way:
    """One way to attend: `why_not(query, hood, rpb, backward)` is None where it can run."""

    name: str
    exact: bool
    attend: Attend
    why_not: Callable[[Tensor, Neighborhood, Tensor | None, bool], str | None]


def flat(x: Tensor) -> Tensor:
    """[B, *spatial, H, D] as [B, H, N, D], a view where it can be."""
    return x.flatten(1, -3).transpose(1, 2)


def unflat(x: Tensor, like: Tensor) -> Tensor:
    """The way back, with the map's shape taken from `like`."""
    return x.transpose(1, 2).unflatten(1, like.shape[1:-2])


def anything(query, hood, rpb, backward) -> None:
    """`why_not` of a way that runs everything."""
    return None
