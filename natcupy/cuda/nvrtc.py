"""From text to machine code: source and architecture come in, a cubin (or PTX) and its log go out.

The compiler is NVRTC, reached through CuPy's low-level binding: it needs neither a GPU nor a
driver, so every architecture can be built anywhere. Other rooms import CuPy by `import_cupy`.
"""

from __future__ import annotations

import atexit
import functools
import importlib
import importlib.util
import os
import re
import shutil
import struct
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

OPTIONS = ("-std=c++17",)
LOG_LINES = 40

_ARCH = re.compile(r"\d{2,3}[af]?")
_PATH = re.compile(r"(?:[A-Za-z]:)?(?:[\\/][^\\/\s:()'\"]+)*[\\/](?=[^\\/\s:()'\"]+)")
_WARNING = re.compile(r"\bwarning\s*(?:#\S+)?\s*:|\(C7\d{3}\)")
_importing = threading.Lock()


@dataclass(frozen=True)
class Compiled:
    """What NVRTC made of one source: `image` (a cubin, or PTX text as bytes) and its `log`."""

    image: bytes
    log: str

    @property
    def warnings(self) -> tuple[str, ...]:
        """Lines of the log that warn: of the front end, of ptxas, and its lost-speed notes."""
        return tuple(line for line in self.log.splitlines() if _WARNING.search(line))


@dataclass(frozen=True)
class Usage:
    """What ptxas says of one kernel; sizes in bytes, `compile_ms` in milliseconds."""

    arch: str
    registers: int
    barriers: int
    shared: int
    stack: int
    spill_stores: int
    spill_loads: int
    compile_ms: float


class CompileError(RuntimeError):
    """NVRTC refused a source; the text holds the spec, the log's end and the remedy."""


@dataclass(frozen=True)
class Toolkit:
    """The compiler at hand: `version` (13, 0), `archs` (75, 80, ...), `build` its own banner."""

    nvrtc: ModuleType
    version: tuple[int, int]
    archs: tuple[int, ...]
    build: str


def extra() -> str:
    """The pip extra that fits this torch: natcupy[cuda12] or natcupy[cuda13]."""
    major = (torch.version.cuda or "13").split(".")[0]
    return "natcupy[cuda12]" if major == "12" else "natcupy[cuda13]"


def import_cupy(name: str = "cupy") -> ModuleType:
    """Import CuPy, or a module of it, or say in one sentence what is missing (ImportError).

    While CuPy is imported it creates its cache folder, and dies where it cannot. Where that is so
    it gets a private folder that lives as long as this process. natcupy keeps its binaries apart.
    """
    with _importing:
        if "cupy" not in sys.modules:
            _import_first()
    return importlib.import_module(name)


def _import_first() -> None:
    wanted = os.environ.get("CUPY_CACHE_DIR") or os.path.expanduser("~/.cupy/kernel_cache")
    before = os.environ.get("CUPY_CACHE_DIR")
    try:
        if _is_installed():  # else nothing is left behind
            os.makedirs(wanted, exist_ok=True)
    except OSError:
        spare = tempfile.mkdtemp(prefix="natcupy-cupy-")
        atexit.register(shutil.rmtree, spare, ignore_errors=True)
        os.environ["CUPY_CACHE_DIR"] = spare
    try:
        importlib.import_module("cupy")
    except ModuleNotFoundError as error:
        if error.name != "cupy":
            raise _broken(error) from error
        raise ImportError(
            f"the CUDA backend needs CuPy, which is not installed; pip install '{extra()}'."
        ) from None
    except Exception as error:
        raise _broken(error) from error
    finally:
        if before is None:
            os.environ.pop("CUPY_CACHE_DIR", None)
        else:
            os.environ["CUPY_CACHE_DIR"] = before


def _is_installed() -> bool:
    try:
        return importlib.util.find_spec("cupy") is not None
    except ImportError:
        return False


def _broken(error: Exception) -> ImportError:
    reason = (str(error).strip().splitlines() or ["no reason given"])[0]
    return ImportError(
        f"CuPy is installed but cannot be imported ({type(error).__name__}: {reason}); keep one "
        f"CuPy package only: uninstall every cupy* package, then pip install '{extra()}'."
    )


def toolkit() -> Toolkit:
    """Load NVRTC once and ask what it is; ImportError says which extra to install."""
    with _loading:  # NVRTC's very first compile fails when two threads make it
        return _load_toolkit()


_loading = threading.Lock()


@functools.lru_cache(maxsize=1)
def _load_toolkit() -> Toolkit:
    import_cupy()
    try:
        nvrtc = importlib.import_module("cupy_backends.cuda.libs.nvrtc")
        version = tuple(nvrtc.getVersion())
        archs = tuple(sorted(int(arch) for arch in nvrtc.getSupportedArchs()))
        banner = _run(nvrtc, "", "banner.cu", (f"-arch=compute_{archs[0]}",), ptx=True).image
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ImportError(
            f"CuPy is installed but finds no working NVRTC, the CUDA compiler library ({reason}); "
            f"pip install '{extra()}' brings both."
        ) from error
    build = " | ".join(
        line[2:].strip()
        for line in banner.decode(errors="replace").splitlines()
        if line.startswith("//") and line[2:].strip()
    )
    return Toolkit(nvrtc, version, archs, build)


def compiler_options(arch: str, *, ptx: bool = False, line_info: bool = False) -> tuple[str, ...]:
    """The options NVRTC gets for real architecture `arch` ("80", "90a", ...)."""
    if not isinstance(arch, str) or not _ARCH.fullmatch(arch):
        raise ValueError(f"an architecture is digits and an optional 'a', as '90a', got {arch!r}.")
    kind = "compute" if ptx else "sm"
    extras = () if ptx else ("--ptxas-options=-v",)
    lines = ("-lineinfo",) if line_info else ()
    return (f"-arch={kind}_{arch}", *OPTIONS, *extras, *lines)


def compile_text(
    text: str, name: str, arch: str, *, ptx: bool = False, line_info: bool = False, what: str = ""
) -> Compiled:
    """Compile `text`, called `name` in messages, for `arch`; CompileError tells what went wrong."""
    options = compiler_options(arch, ptx=ptx, line_info=line_info)
    kit = toolkit()
    try:
        return _run(kit.nvrtc, text, name, options, ptx)
    except _RefusedError as refused:
        raise CompileError(_explain(refused, text, name, options, what or name, kit)) from None


class _RefusedError(Exception):
    """NVRTC's status and log, before they become a message."""

    def __init__(self, status: str, log: str):
        super().__init__(status)
        self.status, self.log = status, log


def _run(nvrtc: ModuleType, text: str, name: str, options: Sequence[str], ptx: bool) -> Compiled:
    program = nvrtc.createProgram(text, name, [], [])
    try:
        nvrtc.compileProgram(program, tuple(options))
        image = nvrtc.getPTX(program) if ptx else _whole_cubin(nvrtc.getCUBIN(program))
        return Compiled(image, _log(nvrtc, program))
    except nvrtc.NVRTCError as error:
        raise _RefusedError(str(error), _log(nvrtc, program)) from None
    finally:
        nvrtc.destroyProgram(program)


def _log(nvrtc: ModuleType, program: int) -> str:
    return nvrtc.getProgramLog(program).rstrip("\0").strip()


def _whole_cubin(image: bytes) -> bytes:
    """Give back the last byte, which CuPy's getCUBIN takes for a string's end and cuts off.

    The ELF header says where the file's last table ends; only a cubin short of it is mended.
    """
    if image[:4] != b"\x7fELF" or len(image) < 64:
        return image
    program_at, section_at = struct.unpack_from("<QQ", image, 32)
    program_size, programs, section_size, sections = struct.unpack_from("<HHHH", image, 54)
    end = max(program_at + program_size * programs, section_at + section_size * sections)
    return image + b"\0" if len(image) == end - 1 else image


def _explain(
    refused: _RefusedError, text: str, name: str, options: Sequence[str], what: str, kit: Toolkit
) -> str:
    lines = refused.log.splitlines()
    tail = "\n".join(f"    {_PATH.sub('', line)}" for line in lines[-LOG_LINES:])
    left_out = f" (its last {LOG_LINES} of {len(lines)} lines)" if len(lines) > LOG_LINES else ""
    return (
        f"NVRTC {kit.version[0]}.{kit.version[1]} could not compile {what}: {refused.status}.\n"
        f"  options: {' '.join(options)}\n"
        f"  log{left_out}:\n{tail or '    (empty)'}\n"
        f"  {_keep(text, name, refused.log)}"
    )


def _keep(text: str, name: str, log: str) -> str:
    """Where the refused source lies, or how to have it kept."""
    if os.environ.get("NATCUPY_DEBUG") != "1":
        return "set NATCUPY_DEBUG=1 to keep the source and the whole log in a file."
    try:
        folder = Path(tempfile.mkdtemp(prefix="natcupy-debug-"))
        (folder / name).write_text(text, encoding="utf-8")
        (folder / f"{name}.log").write_text(log, encoding="utf-8")
    except OSError as error:
        return f"the source could not be kept: {error}."
    return f"the source and the whole log are kept in {folder}."


_ENTRY = re.compile(r"Compiling entry function '(?P<name>\w+)' for 'sm_(?P<arch>\w+)'")
_FUNCTION = re.compile(r"Function properties for (?P<name>\w+)")
_FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers(?:, used (\d+) barriers)?(?P<rest>.*)")
_SHARED = re.compile(r"(\d+) bytes smem")
_TIME = re.compile(r"Compile time = ([\d.]+) ms")


def resource_usage(log: str) -> dict[str, Usage]:
    """Read the compile log of a cubin: per kernel its registers, stack, spills and barriers."""
    found: dict[str, dict] = {}
    entry = function = None
    for line in log.splitlines():
        if match := _ENTRY.search(line):
            entry = function = match["name"]
            found[entry] = {"arch": match["arch"], "stack": 0, "spills": (0, 0)}
        elif match := _FUNCTION.search(line):
            function = match["name"]
        elif entry and function == entry and (match := _FRAME.search(line)):
            stack, stores, loads = map(int, match.groups())
            found[entry].update(stack=stack, spills=(stores, loads))
        elif entry and (match := _USED.search(line)):
            shared = _SHARED.search(match["rest"])
            found[entry].update(
                registers=int(match[1]),
                barriers=int(match[2] or 0),
                shared=int(shared[1]) if shared else 0,
            )
        elif entry and (match := _TIME.search(line)):
            found[entry]["ms"] = float(match[1])
    return {name: _usage(facts) for name, facts in found.items() if "registers" in facts}


def _usage(facts: dict) -> Usage:
    return Usage(
        arch=facts["arch"],
        registers=facts["registers"],
        barriers=facts["barriers"],
        shared=facts["shared"],
        stack=facts["stack"],
        spill_stores=facts["spills"][0],
        spill_loads=facts["spills"][1],
        compile_ms=facts.get("ms", 0.0),
    )
