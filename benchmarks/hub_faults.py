"""How well loads, pulls, pushes and saves stand faults: the numbers that the tests check in small.

In: counts on the command line. Out: one JSON file in `benchmarks/results` with what was counted,
written after each part. The real client talks to the local Hub of the tests; pauses between retries
are skipped, not slept. A wrong kind of error or a mixture of two models stops it.

    python -m benchmarks.hub_faults                       # all parts, in full
    python -m benchmarks.hub_faults --only pulls kills    # these, the others kept from the record
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import random
import resource
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks import record

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "hub")]
TOKEN = "hf_alice"
CASES = ("new", "update", "branch", "shards", "request")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--pulls", type=int, default=1000)
    parser.add_argument("--pushes", type=int, default=200)
    parser.add_argument("--flips", type=int, default=1000)
    parser.add_argument("--processes", type=int, default=16)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--tensors", type=int, default=20_000)
    parser.add_argument("--pickles", type=int, default=5000)
    parser.add_argument("--configs", type=int, default=2000)
    parser.add_argument("--models", nargs="*", help="names of the zoo (default: all)")
    parser.add_argument("--rate", type=float, default=0.1, help="share of requests that fail")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=record.RESULTS / "hub-faults.json")
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore", DeprecationWarning)  # odd escapes in damaged text
    results = json.loads(options.output.read_text()) if options.output.exists() else {}
    with tempfile.TemporaryDirectory() as home:
        hub = start(Path(home))
        for name in options.only:
            hub.reset()
            results[name] = measured(PARTS[name], hub, options, Path(home) / name)
            print(name, json.dumps(results[name]), flush=True)
            record.write(options.output, {key: results[key] for key in PARTS if key in results})
        hub.close()


def start(home: Path) -> Any:
    """The local Hub, and an environment that knows no other."""
    from server import LocalHub

    hub = LocalHub()
    # Before the client is imported: it reads its environment once.
    os.environ.update(hub.environment(str(home)))
    os.environ.update(HF_HUB_ETAG_TIMEOUT="120", HF_HUB_DOWNLOAD_TIMEOUT="120")  # a gigabyte each
    os.environ.pop("HF_TOKEN", None)
    import natcupy.hub.client

    natcupy.hub.client.time.sleep = lambda seconds: None
    return hub


def measured(part: Any, hub: Any, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """A part's counts, with date, versions, seconds, and by how much memory's peak grew."""
    folder.mkdir()
    peak, begun = memory_mb(), time.perf_counter()
    counts = part(hub, options, folder)
    return {
        **counts,
        "seconds": round(time.perf_counter() - begun, 1),
        "peak_memory_growth_mb": round(memory_mb() - peak, 1),
        "date": record.today(),
        "versions": versions(),
    }


def memory_mb() -> float:
    """The largest resident memory this process has had, in MB (Linux counts in KiB)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 20 if sys.platform == "darwin" else 1 << 10)


def versions() -> dict[str, str]:
    import huggingface_hub

    return {
        "python": platform.python_version(),
        "huggingface_hub": huggingface_hub.__version__,
        **{name: number for name, number in record.versions().items() if name != "llvmlite"},
    }


# ---------------------------------------------------------------- the network


def pulls(hub: Any, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Whole loads, each with an empty cache, on a line where a share of requests fails."""
    from small import invented
    from weather import pull_in_a_storm

    import natcupy

    model = invented("dinat")
    model.push_to_hub("me/mine", token=TOKEN)

    def load(number: int):
        with tempfile.TemporaryDirectory(dir=folder) as cache:
            return natcupy.from_pretrained("me/mine", cache_dir=cache).state_dict()

    del hub.requests[:]
    result = pull_in_a_storm(
        hub, load, model.state_dict(), options.rate, options.pulls, options.seed
    )
    return {"rate": options.rate, **result}


def pushes(hub: Any, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Pushes on such a line: what is reported done is there, the rest as before or complete."""
    from small import invented, same
    from weather import Storm

    import natcupy
    from natcupy.hub import HubError

    models = [invented("nat", seed) for seed in range(2)]
    storm, counts = Storm(options.rate, options.seed), Counter()
    for number in range(options.pushes):
        name, model = f"me/m{number % 7}", models[number // 7 % 2]
        before = hub.tree(name)
        hub.weather, commit = storm, None
        try:
            commit = model.push_to_hub(name, token=TOKEN).commit
        except HubError as error:
            counts[type(error).__name__] += 1
        hub.weather = lambda method, path: None
        after = hub.tree(name)
        if commit or (after != before and "model.safetensors" in after):
            with tempfile.TemporaryDirectory(dir=folder) as cache:
                loaded = natcupy.from_pretrained(name, cache_dir=cache)
            same(loaded.state_dict(), model.state_dict())
            counts["complete"] += 1
        else:
            assert after == before or set(after) == {".gitattributes"}, sorted(after)
            counts["as before"] += 1
    return {"rate": options.rate, "pushes": options.pushes, "outcomes": dict(counts),
            "faults": dict(storm.kinds)}  # fmt: skip


def cuts(hub: Any, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Pushes cut for good at every request there is: before or after, and the next one finishes."""
    from weather import cut_at_every_request

    import natcupy

    def load(name: str):
        with tempfile.TemporaryDirectory(dir=folder) as cache:
            return natcupy.from_pretrained(name, cache_dir=cache)

    found = {}
    for case in CASES:
        for how in ("drop", "lost"):
            hub.reset()
            count, seen = cut_at_every_request(hub, load, case, how)
            found[f"{case}, {how}"] = {"cut_at_requests": count, "remote": sorted(seen)}
    return {"cases": found}


def flips(hub: Any, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One bit of the cached weights changed at random, and a Hub that cannot send them again."""
    from small import invented

    from natcupy.hub import HubError, download
    from natcupy.hub.client import Access

    invented("dinat").push_to_hub("me/mine", token=TOKEN)
    draw, access = random.Random(options.seed), Access(cache_dir=folder)
    snapshot = download.resolve("me/mine", None, access)
    path = download.fetch(snapshot, "model.safetensors", access).resolve()
    good = path.read_bytes()
    accepted = 0
    for _ in range(options.flips):
        damaged = bytearray(good)
        damaged[draw.randrange(len(good))] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        hub.fault(r"/resolve/|/blobs/", times=100, status=404)
        try:
            download.fetch(snapshot, "model.safetensors", access)
            accepted += 1
        except HubError:
            pass
        hub.faults.clear()
    return {"flips": options.flips, "accepted": accepted}


def processes(hub: Any, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Processes that load at the same moment with one empty cache."""
    from small import invented
    from weather import cold_cache

    invented("dinat").push_to_hub("me/mine", token=TOKEN)
    seen, downloads = cold_cache(hub, options.processes, folder)
    return {"processes": len(seen), "different_results": len(set(seen)),
            "downloads_of_the_weights": downloads}  # fmt: skip


# ---------------------------------------------------------------- files


def tensors(hub: Any, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    from damage import mutated_tensors

    refused = mutated_tensors(options.tensors, options.seed)
    return {"mutants": options.tensors, "refused": refused, "valid": options.tensors - refused}


def pickles(hub: Any, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Mutants, and files that would run something: refused, and nothing ran."""
    from damage import FORMS, GADGETS, gadget_file, mutated_pickles

    from natcupy.hub.errors import UnsafePickle
    from natcupy.hub.pickles import read_pickle

    canary, refused = folder / "canary", 0
    for number in range(GADGETS):
        for form in FORMS:
            try:
                read_pickle(gadget_file(folder / "pytorch_model.bin", number, form, canary))
            except UnsafePickle:
                refused += 1
    mutants = mutated_pickles(options.pickles, options.seed, folder)
    return {
        "mutants": options.pickles,
        "refused": mutants,
        "valid": options.pickles - mutants,
        "gadget_files": GADGETS * len(FORMS),
        "gadgets_refused": refused,
        "code_ran": canary.exists(),
    }


def configs(hub: Any, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    from damage import mutated_configs, own_config

    originals = [own_config(name) for name in ("nat", "dinat", "vitrpb")]
    refused = mutated_configs(options.configs, options.seed, originals)
    return {"mutants": options.configs, "refused": refused, "valid": options.configs - refused}


def kills(hub: Any, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Saves killed by SIGKILL before a system call, or when a file has grown to a size."""
    from damage import kill_while_saving

    draw, calls = random.Random(options.seed), 16
    sizes = [-draw.randint(1, 9000) for _ in range(options.kills - calls)]
    outcomes = kill_while_saving(folder, [*range(calls), *sizes])
    return {
        "saves": len(outcomes),
        "killed": sum(dead for dead, _ in outcomes),
        "old_model_complete": sum(not new for _, new in outcomes),
        "new_model_complete": sum(new for _, new in outcomes),
    }


# ---------------------------------------------------------------- the zoo


def models(hub: Any, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Every model in its own size: create, save, push, pull, compare bit for bit."""
    import torch
    from small import same

    import natcupy

    found = {}
    for name in options.models or natcupy.list_models():
        hub.reset()
        torch.manual_seed(options.seed)
        model = natcupy.create_model(name)
        with tempfile.TemporaryDirectory(dir=folder) as place:
            saved = model.save_pretrained(Path(place) / "saved")
            same(natcupy.from_pretrained(saved).state_dict(), model.state_dict())
            model.push_to_hub("me/mine", token=TOKEN)
            pulled = natcupy.from_pretrained("me/mine", cache_dir=Path(place) / "cache")
        assert pulled.config == model.config
        same(pulled.state_dict(), model.state_dict())
        found[name] = natcupy.zoo.num_parameters(model.config)
        print(name, found[name], flush=True)
    return {"bit_equal": len(found), "parameters": found}


PARTS = {
    "pulls": pulls,
    "pushes": pushes,
    "cuts": cuts,
    "flips": flips,
    "processes": processes,
    "tensors": tensors,
    "pickles": pickles,
    "configs": configs,
    "kills": kills,
    "models": models,
}


if __name__ == "__main__":
    main()
