"""NVRTC alone, by ctypes: a second compiler beside the one that CuPy has loaded.

In: the library of a CUDA major version, as its wheel installs it, and a text. Out: cubin, log, or
why there is none. CuPy holds one NVRTC per process; this one is independent of it.
"""

from __future__ import annotations

import ctypes
import importlib.util
from pathlib import Path

from natcupy.cuda.nvrtc import Compiled


def find(major: int) -> Path | None:
    """The library of a major version in an installed `nvidia-cuda-nvrtc` wheel."""
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations if spec else ():
        found = sorted(Path(folder).glob(f"*/lib/libnvrtc.so.{major}"))
        if found:
            return found[0]
    return None


class Nvrtc:
    """One loaded library."""

    def __init__(self, path: Path):
        self._lib = ctypes.CDLL(str(path))
        self._lib.nvrtcGetErrorString.restype = ctypes.c_char_p

    @property
    def version(self) -> tuple[int, int]:
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._check(self._lib.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
        return major.value, minor.value

    @property
    def archs(self) -> tuple[int, ...]:
        count = ctypes.c_int()
        self._check(self._lib.nvrtcGetNumSupportedArchs(ctypes.byref(count)))
        numbers = (ctypes.c_int * count.value)()
        self._check(self._lib.nvrtcGetSupportedArchs(numbers))
        return tuple(numbers)

    def compile(self, text: str, name: str, options: tuple[str, ...]) -> Compiled:
        """A cubin and its log; RuntimeError with the log where the text is refused."""
        program = ctypes.c_void_p()
        create = self._lib.nvrtcCreateProgram
        given = (text.encode(), name.encode(), 0, None, None)
        self._check(create(ctypes.byref(program), *given))
        try:
            array = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
            status = self._lib.nvrtcCompileProgram(program, len(options), array)
            log = self._bytes(program, "ProgramLog").rstrip(b"\0").decode(errors="replace").strip()
            if status:
                raise RuntimeError(f"{self._text(status)}: {log[-2000:]}")
            return Compiled(self._bytes(program, "CUBIN"), log)
        finally:
            self._lib.nvrtcDestroyProgram(ctypes.byref(program))

    def _bytes(self, program: ctypes.c_void_p, what: str) -> bytes:
        size = ctypes.c_size_t()
        self._check(getattr(self._lib, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
        room = ctypes.create_string_buffer(size.value)
        self._check(getattr(self._lib, f"nvrtcGet{what}")(program, room))
        return room.raw

    def _text(self, status: int) -> str:
        return self._lib.nvrtcGetErrorString(status).decode()

    def _check(self, status: int) -> None:
        if status:
            raise RuntimeError(self._text(status))
