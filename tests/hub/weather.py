"""Bad lines for the local Hub, drawn by a seed: which request fails, and how.

In: a rate and a seed. Out: a function for `LocalHub.weather`. The tests use it in small numbers,
`benchmarks/hub_faults.py` in large ones.
"""

import random
import threading
from collections import Counter

from server import Fault

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
