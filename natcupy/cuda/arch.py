"""Which binary a GPU gets: GPU, compiler and driver come in, a `Target` goes out.

Pure arithmetic over version numbers, so that every combination can be tried without a GPU.

A cubin for the very chip is the rule, with the "a" suffix where the chip has one (wgmma and its
kin exist only there). A GPU that the compiler does not know yet gets PTX, which its driver turns
into machine code; that needs a driver at least as new as the compiler.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

OLDEST = 75  # the oldest architecture the kernels are written for
SUFFIX_FROM = 90  # from here on every chip has an "a" variant


class DeviceError(RuntimeError):
    """GPU, driver and compiler cannot run the kernels together; the text says what to change."""


@dataclass(frozen=True)
class Target:
    """What to compile for: `arch` ("80", "90a", ...), as PTX or not, and what to tell the user."""

    arch: str
    ptx: bool = False
    note: str = ""

    @property
    def capability(self) -> int:
        """The number of the architecture without its suffix: 90 for "90a"."""
        return int(self.arch.rstrip("af"))

    def __str__(self) -> str:
        return f"{'compute' if self.ptx else 'sm'}_{self.arch}"


def with_suffix(capability: int) -> str:
    """The real architecture of a chip: 80 is "80", 90 is "90a"."""
    return f"{capability}a" if capability >= SUFFIX_FROM else str(capability)


def choose_target(
    device: tuple[int, int],
    supported: Sequence[int],
    compiler: tuple[int, int],
    driver: tuple[int, int] | None,
    *,
    force_ptx: bool = False,
) -> Target:
    """Choose the binary for a GPU of capability `device`.

    `supported` are the architectures NVRTC of version `compiler` knows, `driver` is the newest CUDA
    version the driver serves (None where there is no driver). Raises DeviceError with the remedy.
    """
    capability = device[0] * 10 + device[1]
    name = f"compute capability {device[0]}.{device[1]}"
    usable = sorted(arch for arch in supported if arch >= OLDEST)
    if driver is None:
        raise DeviceError(
            "no NVIDIA driver was found, so the CUDA kernels cannot run; "
            "install the driver, or use backend='cpu' or backend='torch'."
        )
    if not usable:
        raise DeviceError(
            f"NVRTC {_dot(compiler)} knows no architecture from sm_{OLDEST} on, it knows "
            f"{_names(supported)}; install a newer CuPy with its CUDA libraries."
        )
    if capability < OLDEST or capability < usable[0]:
        raise DeviceError(
            f"this GPU has {name}; the CUDA kernels with NVRTC {_dot(compiler)} need one of "
            f"{_names(usable)} or newer. {_older_help(capability)}"
        )
    if capability in usable:
        _check_driver(compiler, driver, ptx=force_ptx, name=name)
        note = "PTX was asked for by NATCUPY_PTX=1." if force_ptx else ""
        return Target(with_suffix(capability), force_ptx, note)
    nearest = max(arch for arch in usable if arch < capability)
    _check_driver(compiler, driver, ptx=True, name=name)
    note = (
        f"this GPU has {name}, which NVRTC {_dot(compiler)} does not know; the kernels are built "
        f"as PTX for compute_{nearest} and finished by the driver, without what is new in this "
        "GPU. A newer NVRTC (a newer CuPy with its CUDA libraries) removes this warning."
    )
    return Target(str(nearest), True, note)


def _check_driver(
    compiler: tuple[int, int], driver: tuple[int, int], *, ptx: bool, name: str
) -> None:
    """A cubin runs on any driver of the compiler's major version; PTX needs the minor one too."""
    enough = driver >= compiler if ptx else driver[0] >= compiler[0]
    if enough:
        return
    needed = _dot(compiler) if ptx else f"{compiler[0]}.0"
    other = f"a CuPy and NVRTC for CUDA {driver[0]} (pip install 'natcupy[cuda{driver[0]}]')"
    if driver[0] == compiler[0]:
        other = f"an NVRTC not newer than {_dot(driver)} that knows this GPU"
    elif driver[0] < 12:
        other = "the CPU backend (backend='cpu')"
    raise DeviceError(
        f"NVRTC {_dot(compiler)} needs a driver for CUDA {needed} or newer "
        f"{'to run PTX ' if ptx else ''}on this GPU ({name}); the driver found serves CUDA "
        f"{_dot(driver)}. Update the driver, or use {other}."
    )


def _older_help(capability: int) -> str:
    if capability >= OLDEST:
        return "pip install 'natcupy[cuda12]' brings a compiler that still knows it."
    return "Use backend='cpu' or backend='torch' on this machine."


def _names(archs: Sequence[int]) -> str:
    return ", ".join(f"sm_{arch}" for arch in archs) or "none"


def _dot(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"
