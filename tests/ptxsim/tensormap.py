"""Tensor maps for TMA: a stand-in for the driver's CUtensorMap.

In: the shape a kernel's tensor map describes. Out: 128 bytes to pass as the kernel parameter (they
say the same in a layout of our own), and the boxes that loads through them bring.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np

_FORMAT = "<QIBBH5I5q5H"
_MAGIC = 0x7E45012A
SWIZZLES = {0: 0, 32: 1, 64: 3, 128: 7}


def swizzle(address: np.ndarray, span: int) -> np.ndarray:
    """Where a byte lands under a 32-, 64- or 128-byte swizzle (0: where it is)."""
    return address ^ (((address >> 7) & SWIZZLES[span]) << 4)


@dataclass(frozen=True)
class TensorMap:
    """A tensor of up to 5 axes, innermost first; strides in bytes, the innermost is the element."""

    base: int
    dims: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    element: int
    span: int = 128

    def __post_init__(self) -> None:
        rank = len(self.dims)
        if not (1 <= rank <= 5 and len(self.strides) == len(self.box) == rank):
            raise ValueError(
                f"a tensor map has 1 to 5 axes, dims, strides and box alike, got {self}"
            )
        if self.span not in SWIZZLES or self.strides[0] != self.element:
            raise ValueError(f"swizzle must be one of {sorted(SWIZZLES)} and the last axis dense")
        if self.span and self.box[0] * self.element > self.span:
            raise ValueError(f"the inner box must fit the {self.span}-byte swizzle, got {self.box}")

    def encode(self) -> bytes:
        """The 128 bytes of the kernel parameter."""

        def five(values: tuple[int, ...]) -> tuple[int, ...]:
            return (*values, *(0,) * (5 - len(values)))

        raw = struct.pack(
            _FORMAT, self.base, _MAGIC, len(self.dims), self.element, self.span,
            *five(self.dims), *five(self.strides), *five(self.box),
        )  # fmt: skip
        return raw.ljust(128, b"\0")

    @classmethod
    def decode(cls, raw: bytes) -> TensorMap:
        """Read back what `encode` wrote."""
        base, magic, rank, element, span, *rest = struct.unpack_from(_FORMAT, raw)
        if magic != _MAGIC:
            raise ValueError("these bytes are no tensor map of this interpreter")
        dims, strides, box = rest[:rank], rest[5 : 5 + rank], rest[10 : 10 + rank]
        return cls(base, tuple(dims), tuple(strides), tuple(box), element, span)

    @property
    def nbytes(self) -> int:
        """Bytes that one load brings."""
        return int(np.prod(self.box)) * self.element

    def gather(self, coordinates: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """(addresses, inside) of the box's elements at these coordinates, innermost fastest."""
        axes = [np.arange(b) + c for b, c in zip(self.box, coordinates, strict=True)]
        grids = np.meshgrid(*axes[::-1], indexing="ij")[::-1]
        inside = np.ones(grids[0].shape, bool)
        address = np.full(grids[0].shape, self.base, np.int64)
        for grid, length, stride in zip(grids, self.dims, self.strides, strict=True):
            inside &= (grid >= 0) & (grid < length)
            address += grid * stride
        return address.reshape(-1), inside.reshape(-1)
