"""Bad lines for the local Hub, drawn by a seed: which request fails, and how.

In: a rate and a seed. Out: a function for `LocalHub.weather`; and what became of many pulls, of
many processes at once, and of pushes that are cut. The tests use these in small numbers,
`benchmarks/hub_faults.py` in large ones.
"""

import os
import random
import subprocess
import sys
import threading
from collections import Counter
from itertools import count
from pathlib import Path

from server import Fault
from small import invented, same

from natcupy.hub.errors import Offline, Unavailable

ROOT = Path(__file__).parents[2]
ALICE = "hf_alice"
KINDS = ("status", "retry-after", "cut", "drop", "lost", "flip", "whole")


class Storm:
    """A share `rate` of all requests fails; `kinds` counts the ways."""

    def __init__(self, rate, seed=0, kinds=KINDS):
        self.rate, self.choices, self.kinds = rate, kinds, Counter()
        self._random, self._lock = random.Random(seed), threading.Lock()

    def __call__(self, method, path):
        with self._lock:
            if self._random.random() >= self.rate:
                return None
            kind = self._random.choice(self.choices)
            self.kinds[kind] += 1
            return self._fault(kind)

    def _fault(self, kind):
        what = {
            "status": {"status": self._random.choice((500, 502, 503, 504, 408))},
            "retry-after": {"status": 429, "headers": {"Retry-After": "1"}},
            "cut": {"cut": self._random.randrange(4000)},
        }.get(kind, {kind: True})
        return Fault("", 1, **what)


def pull_in_a_storm(hub, load, expected, rate, times, seed=0):
    """Pull a repository `times` times with an empty cache.

    `load(number)` pulls and returns a state dict or raises; `expected` is what is right. Returns
    how many succeeded, were wrong, and failed with which error.
    """
    import torch

    from natcupy.hub import HubError

    storm = hub.weather = Storm(rate, seed)
    good = wrong = 0
    errors = Counter()
    try:
        for number in range(times):
            try:
                state = load(number)
            except HubError as error:
                errors[type(error).__name__] += 1
                continue
            right = state.keys() == expected.keys() and all(
                torch.equal(state[name], expected[name]) for name in expected
            )
            good, wrong = good + right, wrong + (not right)
    finally:
        hub.weather = lambda method, path: None
    return {
        "pulls": times, "right": good, "corrupt_accepted": wrong, "errors": dict(errors),
        "requests": len(hub.requests), "faults": dict(storm.kinds),
    }  # fmt: skip


# ---------------------------------------------------------------- many at once

COLD = """
import os, sys, torch
from natcupy import hub
torch.set_num_threads(1)
count, cache, results = int(sys.argv[1]), sys.argv[2], sys.argv[3]
ready, go = os.pipe()
for number in range(count):
    if not os.fork():
        os.close(go)
        os.read(ready, 1)  # all start when the parent closes the pipe
        model = hub.from_pretrained("me/mine", cache_dir=cache)
        with open(f"{results}/{number}", "w") as file:
            file.write(f"{model.source.sha256} {model.source.commit}")
        os._exit(0)
os.close(go)
print(sum(os.wait()[1] == 0 for _ in range(count)))
"""


def cold_cache(hub, count, folder):
    """Processes that load `me/mine` at the same moment with one empty cache.

    Returns what each got (hash and commit), and how often the weights came down.
    """
    results = folder / "results"
    results.mkdir()
    del hub.requests[:]
    done = subprocess.run(
        [sys.executable, "-c", COLD, str(count), folder / "cache", results],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout.strip() == str(count), done.stderr[-2000:]
    bodies = [path for method, path, *_ in hub.requests if method == "GET" and "/blobs/" in path]
    return [path.read_text() for path in sorted(results.iterdir())], len(bodies)


# ---------------------------------------------------------------- a push that is cut


def cut_at_every_request(hub, load, case, how):
    """The line dies at request n for good: the remote is as before or complete. Then again.

    `load(name)` pulls a model. Returns the number of requests cut at and which outcomes were seen.
    """
    model, old = invented("dinat", 2), invented("dinat", 1)
    options = {"branch": {"branch": "dev"}, "shards": {"max_shard_bytes": 8000},
               "request": {"create_pr": True}}.get(case, {})  # fmt: skip
    branch = {"branch": "dev", "request": "refs/pr/1"}.get(case, "main")
    cuts, seen = 0, set()
    # A push may take a request less than the one before (files go up side by side, connections are
    # used again), so that none was cut at its commit.
    again = iter(range(5)) if how == "lost" else iter(())
    for run in count():
        name = f"me/{case}-{how}-{run}"
        if case != "new":
            old.push_to_hub(name, token=ALICE)
        before = hub.tree(name)
        start = len(hub.requests)

        def weather(method, path, start=start, cut=cuts):
            now = len(hub.requests) - start
            return Fault("", 1, **{how if now == cut else "drop": True}) if now >= cut else None

        hub.weather = weather
        try:
            model.push_to_hub(name, token=ALICE, **options)
            finished = True
        except (Unavailable, Offline):
            finished = False
        hub.weather = lambda method, path: None
        after = hub.tree(name, branch)
        if finished and "after" not in seen and next(again, None) is not None:
            cuts -= 1
            continue
        if finished:
            return cuts, seen
        complete = "model.safetensors" in after or "model.safetensors.index.json" in after
        if complete and after.get("config.json") and after != before:
            same(load(f"{name}@{branch}").state_dict(), model.state_dict())
            seen.add("after")
        else:
            assert after in ({}, before) or set(after) == {".gitattributes"}, sorted(after)
            seen.add("before")
        done = model.push_to_hub(name, token=ALICE, **options)
        assert hub.repos[name].refs[done.branch] == done.commit
        same(load(f"{name}@{done.branch}").state_dict(), model.state_dict())
        assert case != "request" or len(hub.repos[name].requests) == 1
        cuts += 1
        assert cuts < 60
