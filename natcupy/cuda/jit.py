"""Text -> cubin -> kernel -> launch. A `Spec` or a `Launch` comes in; a kernel runs.

This room knows no attention: it could launch a vector add. It ties four smaller ones together:
`source` (the text), `nvrtc` (the compiler), `arch` (for which chip), `launch` (on which stream),
and keeps binaries in `natcupy.cache`, so that a kernel is compiled once per machine.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from natcupy.cache import default_store
from natcupy.cuda.arch import DeviceError, Target, choose_target, with_suffix
from natcupy.cuda.launch import (
    CuPyLauncher,
    CuPyRuntime,
    Launch,
    Launcher,
    LaunchError,
    current_launcher,
    nothing_to_do,
    use_launcher,
)
from natcupy.cuda.nvrtc import (
    Compiled,
    CompileError,
    Usage,
    compile_text,
    compiler_options,
    extra,
    import_cupy,
    resource_usage,
    toolkit,
)
from natcupy.cuda.source import WORDS, Spec, source_text, use_sources

__all__ = [
    "WORDS",
    "CompileError",
    "Compiled",
    "CuPyLauncher",
    "DeviceError",
    "Launch",
    "LaunchError",
    "Launcher",
    "Spec",
    "Target",
    "Usage",
    "arch_for",
    "binary",
    "choose_target",
    "compile_many",
    "compile_spec",
    "compile_text",
    "import_cupy",
    "launch",
    "prepare",
    "probe",
    "resource_usage",
    "source_text",
    "toolkit",
    "use_launcher",
    "use_sources",
    "with_suffix",
]

PATIENCE = 2.0  # seconds of compiling after which the user is told what takes so long

_log = logging.getLogger("natcupy")


def compile_spec(spec: Spec, arch: str, *, ptx: bool = False, line_info: bool = False) -> Compiled:
    """Compile `spec` for `arch` ("75", "80", "90a", ...) with NVRTC; no GPU or driver is needed.

    `ptx=True` gives PTX text, `line_info=True` adds source lines to it. Nothing is cached. Raises
    CompileError with the spec and the end of the log.
    """
    text = source_text(spec)
    return compile_text(
        text, spec.source, arch, ptx=ptx, line_info=line_info, what=f"{spec} for sm_{arch}"
    )


def ingredients(spec: Spec, target: Target, text: str | None = None) -> dict[str, str]:
    """Everything that decides the binary of `spec`, by name: the key of its cache entry."""
    kit = toolkit()
    return {
        "engine": "cuda",
        "entry": spec.entry,
        "constants": " ".join(f"{name}={value}" for name, value in spec.constants),
        "text": source_text(spec) if text is None else text,
        "arch": target.arch,
        "form": "ptx" if target.ptx else "cubin",
        "options": " ".join(compiler_options(target.arch, ptx=target.ptx)),
        "compiler": f"NVRTC {kit.version[0]}.{kit.version[1]}",
        "build": kit.build,
    }


def binary(spec: Spec, target: Target) -> bytes:
    """The machine code (or PTX) of `spec` for `target`: from the cache, or compiled and kept."""
    key = ingredients(spec, target)

    def build() -> bytes:
        with _Patience(spec, target):
            return compile_spec(spec, target.arch, ptx=target.ptx).image

    return default_store().get_or_build(key, build)


def _discard(spec: Spec, target: Target) -> None:
    default_store().discard(ingredients(spec, target))


class _Patience:
    """Say after `PATIENCE` seconds what is being compiled, and at the end how long it took."""

    def __init__(self, spec: Spec, target: Target):
        self._what = f"{spec} for {target}"
        self._timer = threading.Timer(PATIENCE, self._tell)
        self._timer.daemon = True
        self._told = False

    def _tell(self) -> None:
        self._told = True
        _log.warning("natcupy: compiling %s; the result is kept for later runs.", self._what)

    def __enter__(self) -> None:
        self._start = time.perf_counter()
        self._timer.start()

    def __exit__(self, *failure: object) -> None:
        self._timer.cancel()
        if self._told:
            took = time.perf_counter() - self._start
            _log.warning("natcupy: %s took %.1f s.", self._what, took)


_default = CuPyLauncher(binary, _discard)


def launch(recipe: Launch, device: torch.device, keep_alive: Iterable[Any] = ()) -> None:
    """Run `recipe` on `device` through the launcher in place.

    An empty grid does nothing at all. `keep_alive` holds the tensors whose pointers are in the
    arguments: they live until the kernel is queued, after which torch's allocator keeps the order.
    """
    if not nothing_to_do(recipe):
        launcher = current_launcher() or _default
        if hasattr(launcher, "observe"):  # one that checks accesses asks which tensors are meant
            launcher.observe(tuple(keep_alive))
        launcher.launch(recipe, device)


def prepare(spec: Spec, device: torch.device, shared: int = 0) -> None:
    """Compile and load `spec` on `device` ahead of its first launch (a launcher may skip it)."""
    launcher = current_launcher() or _default
    if hasattr(launcher, "prepare"):
        launcher.prepare(spec, device, shared)


def arch_for(device: torch.device) -> Target:
    """What kernels for `device` are compiled for; warns once where the GPU is newer than NVRTC."""
    return (current_launcher() or _default).target(device)


def compile_many(
    specs: Iterable[Spec],
    target: Target | str,
    workers: int | None = None,
    progress: Callable[[int, int, Spec], None] | None = None,
) -> dict[Spec, bytes]:
    """Compile `specs` for `target` in parallel into the cache; `progress(done, total, spec)`.

    Each spec is built once however often it is named. The first failure is raised after the
    compiles that are under way have ended; those not begun are given up.
    """
    target = Target(target) if isinstance(target, str) else target
    wanted = list(dict.fromkeys(specs))
    workers = workers or min(len(os.sched_getaffinity(0)) if _LINUX else os.cpu_count() or 1, 16)
    toolkit()
    done: dict[Spec, bytes] = {}
    with ThreadPoolExecutor(max_workers=max(1, workers), thread_name_prefix="natcupy") as pool:
        jobs = {pool.submit(binary, spec, target): spec for spec in wanted}
        try:
            for job in as_completed(jobs):
                done[jobs[job]] = job.result()
                if progress is not None:
                    progress(len(done), len(wanted), jobs[job])
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    return {spec: done[spec] for spec in wanted}


_LINUX = hasattr(os, "sched_getaffinity")


def probe() -> dict[str, Any]:
    """What the engine finds here, for `natcupy doctor`: problems are sentences, not exceptions."""
    facts: dict[str, Any] = {"problems": [], "torch": torch.__version__}
    facts["torch_cuda"] = torch.version.cuda
    facts["cupy_packages"] = packages = _cupy_packages()
    if len(packages) > 1:
        facts["problems"].append(
            f"several CuPy packages are installed ({', '.join(sorted(packages))}); they overwrite "
            f"each other: uninstall all of them, then pip install '{extra()}'."
        )
    try:
        kit = toolkit()
        facts["cupy"] = import_cupy().__version__
        built_for = import_cupy("cupy_backends.cuda.api.driver").get_build_version() // 1000
    except ImportError as error:
        facts["problems"].append(str(error))
        return facts
    facts.update(
        nvrtc=".".join(map(str, kit.version)),
        nvrtc_build=kit.build,
        nvrtc_path=_library("libnvrtc.so", "nvrtc64"),
        nvrtc_archs=list(kit.archs),
        cuda_major_of_cupy=built_for,
    )
    facts["problems"] += _mismatch(torch.version.cuda, built_for, kit.version)
    facts["devices"] = _devices(facts)
    return facts


def _cupy_packages() -> dict[str, str]:
    """Installed distributions that provide CuPy, with their versions."""
    names = metadata.packages_distributions().get("cupy", ())
    return {name: metadata.version(name) for name in sorted(set(names))}


def _mismatch(torch_cuda: str | None, cupy: int, nvrtc: tuple[int, int]) -> list[str]:
    """What the CUDA versions of torch, CuPy and the compiler mean for each other."""
    if torch_cuda is None:
        return ["this torch was built without CUDA, so CUDA tensors cannot exist here."]
    if int(torch_cuda.split(".")[0]) == cupy == nvrtc[0]:
        return []
    return [
        f"torch was built for CUDA {torch_cuda}, CuPy for CUDA {cupy}, and its compiler is NVRTC "
        f"{nvrtc[0]}.{nvrtc[1]}; kernels run where the driver serves all of them, and "
        f"pip install '{extra()}' makes them agree."
    ]


def _devices(facts: dict[str, Any]) -> list[dict[str, Any]]:
    """One record per GPU: name, capability, and the target chosen or why there is none."""
    try:
        driver = CuPyRuntime().driver_version()
    except Exception as error:
        facts["problems"].append(f"the driver cannot be asked: {error}")
        return []
    facts["driver_cuda"] = ".".join(map(str, driver)) if driver else None
    if driver is None:
        facts["problems"].append("no NVIDIA driver was found; the CPU and torch backends work.")
    records = []
    for index in range(torch.cuda.device_count() if driver else 0):
        record: dict[str, Any] = {"index": index}
        try:
            record["name"] = torch.cuda.get_device_name(index)
            record["capability"] = torch.cuda.get_device_capability(index)
            record["target"] = str(_default.target(torch.device("cuda", index)))
        except RuntimeError as error:
            record["problem"] = str(error)
        records.append(record)
    return records


def _library(*names: str) -> str | None:
    """The path of a loaded library, where the system tells (Linux)."""
    if not sys.platform.startswith("linux"):
        return None
    for line in Path("/proc/self/maps").read_text().splitlines():
        path = line.rpartition(" ")[2]
        if any(Path(path).name.startswith(name) for name in names):
            return path
    return None
