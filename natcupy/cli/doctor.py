"""`natcupy doctor`: what is installed, which devices and backends there are, and if they are right.

In: nothing. Out: facts, as text or JSON. Exit status 1 if a backend gives wrong answers or a GPU
fails its self-test. No token is ever printed, only whether there is one.
"""

from __future__ import annotations

import argparse
import os
import platform
from importlib import import_module, metadata
from typing import Any

import torch
from torch import Tensor

import natcupy
from natcupy import backends, cache
from natcupy.cli import console, one_line, runtime
from natcupy.cli.selftest import exact_products, self_test
from natcupy.cuda import jit, tuning
from natcupy.hub import client, embedded_names
from natcupy.hub.errors import HubError

PACKAGES = ("torch", "numpy", "pillow", "safetensors", "huggingface_hub", "llvmlite")
EXTRAS = ("accelerate", "timm", "torchvision", "transformers")  # told where they are installed
KERNEL, SHAPE, DIM = 3, (7, 9), 16  # of the check
ALLOWED = 1e-4  # largest difference from float64 that the check in float32 lets pass


def run(arguments: argparse.Namespace) -> int:
    """Gather and print."""
    if arguments.forget_choices:
        tuning.clear()
    found = gather()
    if arguments.json:
        console.print_json(found)
    else:
        print("\n\n".join(_readable(found)))
    wrong = [b for b in found["backends"] if b["error"] is not None and b["error"] > ALLOWED]
    wrong += [r for records in found["self_test"].values() for r in records if not _passed(r)]
    return 1 if wrong else 0


@exact_products()
def gather() -> dict[str, Any]:
    """Everything, JSON-able."""
    devices = _devices()
    return {
        "versions": _versions(),
        "misfit": _misfit(),
        "devices": devices,
        "backends": [
            _backend(name, torch.device(device["name"]))
            for device in devices
            for name in backends.BACKENDS
        ],
        "chosen": {
            device["name"]: runtime.chosen_backend(torch.device(device["name"]))
            for device in devices
        },
        "self_test": {
            device["name"]: self_test(torch.device(device["name"]), "cuda")
            for device in devices
            if torch.device(device["name"]).type == "cuda"
            and runtime.why_not("cuda", torch.device(device["name"])) is None
        },
        "cuda": jit.probe(),
        "choices": {"mode": tuning.mode(), "measured": tuning.describe()},
        "binaries": cache.default_store().describe(),
        "hub": _hub(),
    }


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {
        "natcupy": natcupy.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
    }
    for name in (*PACKAGES, *EXTRAS):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            if name in PACKAGES:
                versions[name] = None
    return versions


def _misfit() -> str | None:
    """Why the torchvision that is installed cannot be imported: timm and transformers need it."""
    try:
        import_module("torchvision")
    except ModuleNotFoundError:
        return None
    except (ImportError, RuntimeError) as error:
        return (
            f"torchvision cannot be imported ({one_line(error)}): it must be of torch's own build, "
            "so install torch and torchvision again together, or remove torchvision "
            "if you use no timm."
        )
    return None


def _devices() -> list[dict[str, str]]:
    """The CPU and every CUDA device that torch sees."""
    threads = torch.get_num_threads()
    found = [{"name": "cpu", "what": f"{_processor()}, {threads} thread{'s' * (threads > 1)}"}]
    for index in range(torch.cuda.device_count()):
        found.append({"name": f"cuda:{index}", "what": torch.cuda.get_device_name(index)})
    return found


def _processor() -> str:
    best = torch.backends.cpu.get_cpu_capability()
    return f"{platform.machine()} with {best}"


def _backend(name: str, device: torch.device) -> dict[str, Any]:
    """Whether a backend runs na2d on a device, how far from float64; or why it does not run."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 1, *SHAPE, 2, DIM, generator=generator)
    reason = runtime.why_not(name, device)
    record = {"backend": name, "device": str(device), "why_not": reason, "error": None}
    if reason is None:
        try:
            out = natcupy.na2d(*(x.to(device) for x in (query, key, value)), KERNEL, backend=name)
        except (RuntimeError, ImportError) as failure:
            return record | {"why_not": " ".join(str(failure).split())}
        record["error"] = (out.double().cpu() - _dense(query, key, value)).abs().max().item()
    return record


def _dense(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Neighborhood attention as masked full attention in float64, apart from the backends."""
    allowed = torch.ones(1, 1, dtype=torch.bool)
    for length in SHAPE:
        place = torch.arange(length)
        start = (place - KERNEL // 2).clamp(0, length - KERNEL)[:, None]
        axis = (place >= start) & (place < start + KERNEL)
        allowed = torch.kron(allowed, axis)
    q, k, v = (x.double().flatten(1, 2).transpose(1, 2) for x in (query, key, value))
    logits = (q @ k.transpose(-1, -2) * DIM**-0.5).masked_fill(~allowed, float("-inf"))
    return (logits.softmax(-1) @ v).transpose(1, 2).unflatten(1, SHAPE)


def _hub() -> dict[str, Any]:
    """Where the Hub client keeps its files, and whether it has a token."""
    access = client.Access()
    problems = []
    folder = token = None
    try:
        folder = client.cache_root(access)
    except HubError as error:
        problems.append(one_line(error))
    try:
        token = client.has_login(access)
    except OSError as error:
        problems.append(f"the token cannot be read: {one_line(error)}")
    return {
        "cache": None if folder is None else str(folder),
        "cache_exists": folder is not None and os.path.isdir(folder),
        "token": token,
        "problems": problems,
        "offline": client.is_offline(),
        "bundled_models": embedded_names(),
    }


def _readable(found: dict[str, Any]) -> list[str]:
    store, hub = found["binaries"], found["hub"]
    versions = [(k, v or "not installed") for k, v in found["versions"].items()]
    if found["misfit"]:
        versions.append(("problem", found["misfit"]))
    return [
        "Versions\n" + _facts(versions),
        "Devices\n" + _facts((d["name"], d["what"]) for d in found["devices"]),
        "Neighborhood attention\n" + _facts(map(_backend_line, _worth_telling(found["backends"]))),
        "Chosen when nothing is asked for\n" + _facts(_chosen(found)),
        *(
            f"Self-test of {device}\n" + _facts(map(_test_line, records))
            for device, records in found["self_test"].items()
        ),
        "CUDA kernels\n" + _facts(_cuda(found["cuda"])),
        "Choices of CUDA kernels\n" + _facts(_choices(found["choices"])),
        "Files\n"
        + _facts(
            [
                ("binaries", f"{store['folder']} ({store['state']}, {store['entries']} entries)"),
                *([("", f"in memory, because {store['why']}")] if store["why"] else []),
                ("Hub cache", f"{hub['cache']}{'' if hub['cache_exists'] else ' (not there yet)'}"),
                ("Hub token", {True: "yes", False: "no", None: "unknown"}[hub["token"]]),
                *(("problem", problem) for problem in hub["problems"]),
                ("Hub offline", "yes (HF_HUB_OFFLINE)" if hub["offline"] else "no"),
                ("bundled", ", ".join(hub["bundled_models"])),
            ]
        ),
    ]


def _facts(pairs: Any) -> str:
    lines = console.facts([(str(name), value) for name, value in pairs]).splitlines()
    return "\n".join("  " + line for line in lines)


def _worth_telling(backends: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without those whose kernels are for another kind of device, which is no fault."""
    return [b for b in backends if b["backend"] != "cuda" or b["device"].startswith("cuda")]


def _backend_line(record: dict[str, Any]) -> tuple[str, str]:
    name = f"{record['backend']} on {record['device']}"
    if record["why_not"] is not None:
        return name, f"no: {record['why_not']}"
    verdict = "right" if record["error"] <= ALLOWED else "WRONG"
    return name, f"{verdict}: largest difference from float64 {record['error']:.1e}"


def _passed(record: dict[str, Any]) -> bool:
    return "failed" not in record and record["error"] <= 1


def _test_line(record: dict[str, Any]) -> tuple[str, str]:
    """What became of one call of the self-test, and which kernels ran."""
    name = f"{record['call']}, {record['dtype']}"
    kernels = f" ({', '.join(record['kernels'])})" if record["kernels"] else ""
    if "failed" in record:
        return name, f"FAILED: {record['failed']}{kernels}"
    verdict = "right" if _passed(record) else f"WRONG in {record['where']}"
    share = f"{record['error']:.2g} of the allowed error, {record['seconds']} s"
    return name, f"{verdict}: {share}{kernels}"


def _chosen(found: dict[str, Any]) -> list[tuple[str, str]]:
    """The backend that each device gets, and why it is not the one made for that device."""
    lines = []
    for device, chosen in found["chosen"].items():
        own = [
            record["why_not"]
            for record in found["backends"]
            if record["device"] == device and record["backend"] == torch.device(device).type
        ]
        because = "made for this device and fastest there"
        if chosen != torch.device(device).type:
            because = f"since {torch.device(device).type!r} cannot run: {'; '.join(map(str, own))}"
        lines.append((device, f"{chosen}: {because}"))
    return lines


def _cuda(facts: dict[str, Any]) -> list[tuple[str, object]]:
    pairs: list[tuple[str, object]] = [("torch built for CUDA", facts["torch_cuda"] or "no")]
    for key in ("cupy", "nvrtc", "driver_cuda"):
        if facts.get(key):
            pairs.append((key.replace("_", " "), facts[key]))
    for device in facts.get("devices", ()):
        text = device.get("problem") or f"{device['name']}, compiled for {device['target']}"
        pairs.append((f"cuda:{device['index']}", text))
    word = "problem" if facts.get("driver_cuda") else "missing"  # nothing is wrong without a GPU
    pairs += [(word, " ".join(str(problem).split())) for problem in facts["problems"]]
    return pairs


def _choices(found: dict[str, Any]) -> list[tuple[str, str]]:
    """What was measured on this machine, and what `NATCUPY_AUTOTUNE` does with it."""
    modes = {
        "measure": "what is met first is measured (NATCUPY_AUTOTUNE=1)",
        "use": "what was measured is used, the rest goes by the table",
        "off": "everything goes by the table (NATCUPY_AUTOTUNE=0)",
    }
    lines = [("mode", modes[found["mode"]])]
    for line in found["measured"]:
        told = f"{line['seconds'] * 1e6:.1f} us, by the table {line['default'] * 1e6:.1f} us"
        stale = "" if line["current"] else " (for other kernels than these)"
        text = f"{' '.join(line['choice'])} for {line['class']}: {told}{stale}"
        lines.append((line["device"], text))
    return lines
