"""Random numbers that depend on the place in the run alone: (seed, epoch, picture) or (seed, step).

In: whole numbers. Out: Python's, NumPy's and torch's generators, set. Every picture and every step
sets them anew, so a run that is continued anywhere draws what it would have drawn, on every process
and with any number of workers, and there is no generator's state that a checkpoint could miss.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Iterator

import numpy as np
import torch


def mixed(*numbers: int) -> int:
    """63 bits that look random, the same for the same numbers everywhere."""
    text = ",".join(map(str, numbers)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def set_all(*numbers: int) -> None:
    """Set every generator, those of GPUs included."""
    seed = mixed(*numbers)
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.manual_seed(seed)


@contextlib.contextmanager
def drawn_from(*numbers: int) -> Iterator[None]:
    """Set the generators of the CPU for a while; then they go on as if nothing had been."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seed = mixed(*numbers)
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


@contextlib.contextmanager
def restored() -> Iterator[None]:
    """Whatever happens to the generators inside, the caller's go on as before."""
    states = random.getstate(), np.random.get_state()
    gpus = range(torch.cuda.device_count())  # torch warns of several that are not named
    with torch.random.fork_rng(gpus or None):
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
