"""What is measured: a table of attention problems and one of models, the same on every device.

In: nothing. Out: `OP_CASES`, `MODEL_CASES`; for an `OpCase` its tensors, its operations and bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from natcupy.arguments import neighborhood
from natcupy.neighborhood import Neighborhood

NAMES = ("query", "key", "value", "rpb")


@dataclass(frozen=True)
class OpCase:
    """One attention problem, without batch and dtype, which the command line chooses."""

    name: str
    shape: tuple[int, ...]
    heads: int
    kernel_size: int | tuple[int, ...]
    dilation: int = 1
    rpb: bool = True
    head_dim: int = 32
    batch: int = 1

    @property
    def hood(self) -> Neighborhood:
        return neighborhood(len(self.shape), self.kernel_size, 1, self.dilation, False)

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5

    @property
    def tokens(self) -> int:
        return prod(self.shape)

    @property
    def label(self) -> str:
        size = "x".join(map(str, self.shape))
        window = "x".join(map(str, self.hood.kernel_size))
        dilated = f" d{self.dilation}" if self.dilation > 1 else ""
        bias = " rpb" if self.rpb else ""
        return f"{self.name}: {self.batch}x{size}, {self.heads} heads, k{window}{dilated}{bias}"

    def at(self, batch: int) -> OpCase:
        return replace(self, batch=batch)

    def flops(self, backward: bool) -> int:
        """Floating-point operations of the products: two of them forward, five more backward."""
        one = 2 * self.batch * self.heads * self.tokens * self.hood.size * self.head_dim
        return one * (7 if backward else 2)

    def bytes(self, dtype: torch.dtype, backward: bool) -> int:
        """Fewest bytes through memory: every input read and every output written once a pass."""
        rows = self.batch * self.heads * self.tokens
        row, lse = self.head_dim * dtype.itemsize, max(4, dtype.itemsize)
        table = self.heads * prod(2 * k - 1 for k in self.hood.kernel_size) * dtype.itemsize
        forward = rows * (4 * row + lse) + self.rpb * table
        return forward + backward * (rows * (8 * row + lse) + self.rpb * 2 * table)

    def tensors(self, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor | None]:
        """Random inputs by name; query, key and value are views of one tensor, as in a layer."""
        make = torch.Generator().manual_seed(0)
        size = (self.batch, *self.shape, 3, self.heads, self.head_dim)
        qkv = torch.randn(size, generator=make).to(device, dtype)
        spans = (2 * k - 1 for k in self.hood.kernel_size)
        rpb = torch.randn(self.heads, *spans, generator=make).to(device, dtype)
        return dict(zip(NAMES, (*qkv.unbind(-3), rpb if self.rpb else None), strict=True))


OP_CASES = (
    OpCase("NAT-Tiny level 1", (56, 56), 2, 7),
    OpCase("NAT-Tiny level 2", (28, 28), 4, 7),
    OpCase("NAT-Tiny level 3", (14, 14), 8, 7),
    OpCase("NAT-Tiny level 4", (7, 7), 16, 7),
    OpCase("DiNAT-Tiny level 1", (56, 56), 2, 7, dilation=8),
    OpCase("DiNAT-Tiny level 2", (28, 28), 4, 7, dilation=4),
    OpCase("DiNAT-Tiny level 3", (14, 14), 8, 7, dilation=2),
    OpCase("line", (4096,), 4, 63, rpb=False),
    OpCase("volume", (8, 28, 28), 4, (3, 7, 7), rpb=False),
)


@dataclass(frozen=True)
class ModelCase:
    """A model of the zoo on pictures of one size."""

    name: str
    size: int = 224

    @property
    def label(self) -> str:
        return f"{self.name} at {self.size}"


MODEL_CASES = (ModelCase("nat_tiny"), ModelCase("dinat_tiny"))


def pick(cases, wanted: str | None):
    """Those whose label holds `wanted`, all for None. Raises ValueError where none does."""
    found = tuple(case for case in cases if wanted is None or wanted.lower() in case.label.lower())
    if not found:
        known = "; ".join(case.label for case in cases)
        raise ValueError(f"--case must be part of a case's name, got {wanted!r}; known: {known}.")
    return found
