"""How well pulls, pushes and loads stand faults: the numbers that the tests check in small.

In: counts on the command line. Out: one JSON file in `benchmarks/results` with what was counted.
The real client talks to the local Hub of the tests; pauses between retries are skipped, not slept.

    python benchmarks/hub_faults.py --pulls 1000 --flips 1000
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import random
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "hub")]
TOKEN = "hf_alice"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pulls", type=int, default=1000)
    parser.add_argument("--flips", type=int, default=1000)
    parser.add_argument("--rate", type=float, default=0.1, help="share of requests that fail")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/hub-faults.json")
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as home:
        record = measure(options, Path(home))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


def measure(options: argparse.Namespace, home: Path) -> dict[str, object]:
    from server import LocalHub

    hub = LocalHub()
    # Before the client is imported: it reads its environment once.
    os.environ.update(hub.environment(str(home)))
    os.environ.pop("HF_TOKEN", None)
    from small import invented

    model = invented("dinat")
    model.push_to_hub("me/mine", token=TOKEN)
    time.sleep = lambda seconds: None
    record = {
        "environment": versions(),
        "pulls": pulls(hub, model, options, home),
        "flipped_bits": flips(hub, options, home),
    }
    hub.close()
    return record


def pulls(hub, model, options: argparse.Namespace, home: Path) -> dict[str, object]:
    """Whole loads, each with an empty cache, on a line where a share of requests fails."""
    from weather import pull_in_a_storm

    import natcupy

    def load(number: int):
        with tempfile.TemporaryDirectory(dir=home) as cache:
            return natcupy.from_pretrained("me/mine", cache_dir=cache).state_dict()

    del hub.requests[:]
    begun = time.perf_counter()
    result = pull_in_a_storm(
        hub, load, model.state_dict(), options.rate, options.pulls, options.seed
    )
    seconds = time.perf_counter() - begun
    return {"rate": options.rate, **result, "milliseconds_each": 1000 * seconds / options.pulls}


def flips(hub, options: argparse.Namespace, home: Path) -> dict[str, object]:
    """One bit of the cached weights changed at random; the Hub then sends the same damage."""
    from natcupy.hub import HubError, download
    from natcupy.hub.client import Access

    draw = random.Random(options.seed)
    access = Access(cache_dir=home / "flips")
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


def versions() -> dict[str, str]:
    import huggingface_hub
    import torch

    import natcupy

    return {
        "natcupy": natcupy.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "huggingface_hub": huggingface_hub.__version__,
    }


if __name__ == "__main__":
    main()
