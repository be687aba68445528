"""Records of runs: where it ran, on which kernels, when; written whole or not at all.

In: facts. Out: JSON files in `benchmarks/results`. A kernel's hash is that of its complete source,
headers pasted in, so any edit that reaches the compiler makes its records stale.
"""

from __future__ import annotations

import datetime
import hashlib
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import torch

import natcupy
from natcupy.cuda.source import Spec, source_text

RESULTS = Path(__file__).parent / "results"
SCHEMA = 1
PACKAGES = ("torch", "numpy", "triton", "natten", "numba", "timm", "llvmlite")


def kernel_hashes() -> dict[str, str]:
    """SHA-256 of every kernel's source by file name."""
    names = sorted(
        entry.name
        for entry in resources.files("natcupy.kernels").iterdir()
        if entry.name.endswith(".cu")
    )
    return {
        name: hashlib.sha256(source_text(Spec(name)).encode("utf-8")).hexdigest() for name in names
    }


def plans_hash() -> str:
    """SHA-256 of the rooms that plan and launch CUDA kernels."""
    return _hash_of("cuda")


def _hash_of(folder: str) -> str:
    digest = hashlib.sha256()
    for path in sorted(Path(natcupy.__file__).parent.joinpath(folder).glob("*.py")):
        digest.update(f"{path.name}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def environment(device: torch.device) -> dict[str, Any]:
    """Device, driver and versions, JSON-able."""
    found: dict[str, Any] = {
        "device": device_name(device),
        "device_type": device.type,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "torch_cuda": torch.version.cuda,
        "versions": versions(),
    }
    if device.type == "cpu":
        # torch's vectors, and ours; ATEN_CPU_CAPABILITY may ask for less than the processor has
        found["instructions"] = torch.backends.cpu.get_cpu_capability()
        found["instructions_asked"] = os.environ.get("ATEN_CPU_CAPABILITY")
        found["cpu_kernels"] = _hash_of("cpu")  # of what generates, plans and launches them
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "capability": list(torch.cuda.get_device_capability(device)),
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
            "driver": driver_version(),
        }
    return found


def versions() -> dict[str, str]:
    """Installed versions of what matters to the numbers."""
    cupy = metadata.packages_distributions().get("cupy", ())
    found = {"natcupy": natcupy.__version__}
    for name in (*PACKAGES, *sorted(set(cupy))):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            if name == "natten" and (version := _natten_version()) is not None:
                found[name] = version
    return found


def _natten_version() -> str | None:
    """Of a build on the path that nothing was installed from."""
    if importlib.util.find_spec("natten") is None:
        return None
    try:
        return str(importlib.import_module("natten").__version__)
    except Exception:  # a build for another torch fails in ways of its own
        return None


def driver_version() -> str | None:
    """The NVIDIA driver's version, as Linux or nvidia-smi tells it."""
    ask = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        try:
            text = subprocess.run(ask, capture_output=True, text=True, timeout=20).stdout
        except (OSError, subprocess.SubprocessError):
            return None
    found = re.search(r"\b\d{3,}\.\d+(?:\.\d+)?\b", text)
    return found[0] if found else None


def device_name(device: torch.device) -> str:
    """The GPU's name, or the CPU's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if sys.platform.startswith("linux"):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def today() -> str:
    """The date, in UTC, as YYYY-MM-DD."""
    return datetime.datetime.now(datetime.timezone.utc).date().isoformat()


def slug(text: str) -> str:
    """Letters, digits and dashes: "NVIDIA H100 80GB" is "nvidia-h100-80gb"."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def new(kind: str, device: torch.device) -> dict[str, Any]:
    """A record without results."""
    return {
        "schema": SCHEMA,
        "kind": kind,
        "date": today(),
        "environment": environment(device),
        "kernels": kernel_hashes(),
    }


def path_of(record: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Where a record belongs: what was measured, on what, how and when name it."""
    environment = record["environment"]
    parts = [record["kind"], slug(environment["device"])]
    if environment["device_type"] == "cpu":
        parts += [slug(environment["instructions"]), f"{environment['threads']}-threads"]
    if record.get("caches") == "full":
        parts.append("full-caches")
    return folder / f"{'-'.join([*parts, record['date']])}.json"


def write(path: Path, record: dict[str, Any]) -> None:
    """Put the file in place in one step, so that a crash leaves the one before."""
    write_text(path, json.dumps(record, indent=1, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Put the text in place in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_all(kind: str, folder: Path = RESULTS) -> list[dict[str, Any]]:
    """Records of a kind, oldest first; a file that is none is an error worth seeing."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    return sorted((r for r in found if r.get("kind") == kind), key=lambda r: r["date"])
