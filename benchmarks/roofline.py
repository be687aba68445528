"""What this device can do at most, measured: bytes through memory, operations in matrix products.

In: a device and a dtype. Out: a `Roofline`, and the share of it that a measurement reached.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from benchmarks.timing import measure

SIZES = {"cuda": (1 << 30, 8192), "cpu": (256 << 20, 1536)}  # bytes copied, side of the matrices


@dataclass(frozen=True)
class Roofline:
    """`bandwidth` in bytes a second (read and written), `peak` in operations a second."""

    bandwidth: float
    peak: float
    dtype: str

    def floor(self, flops: int, moved: int) -> float:
        """No run of so many operations and bytes can take fewer milliseconds."""
        return 1e3 * max(flops / self.peak, moved / self.bandwidth)

    def as_dict(self) -> dict[str, float | str]:
        return asdict(self)


YARDSTICK = "matrix product"  # the name of its rows


def yardstick(dtype: torch.dtype, side: int = 1024) -> tuple[Callable[[], object], int]:
    """A matrix product to be timed beside other runs on a CPU, and its operations.

    What a shared machine gives changes from minute to minute: a share of a ceiling that was
    measured once, at the beginning, means little there.
    """
    a, b = (torch.randn(side, side).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out), 2 * side**3


def measure_roofline(
    device: torch.device, dtype: torch.dtype, sizes: tuple[int, int] | None = None
) -> Roofline:
    """A large copy counts each byte twice; a large product of random matrices 2 n^3 operations."""
    room, side = sizes or SIZES[device.type]
    source = torch.randint(0, 100, (room,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    copied = measure(lambda: target.copy_(source), device, 0.3, memory=False)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    multiplied = measure(lambda: torch.mm(a, b, out=out), device, 0.5, memory=False)
    return Roofline(
        bandwidth=2e3 * room / copied.median,
        peak=2e3 * side**3 / multiplied.median,
        dtype=str(dtype).removeprefix("torch."),
    )
