"""What a test in this folder runs on: a GPU, or the simulated one, with the same face.

In: the name of a rig. Out: a `Rig`: `device` for tensors, `cuda` with torch.cuda's names, sizes
that fit (`size`, `many`), and `note` for the record. One body serves both, so that CI executes what
a GPU will.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import time

import pytest
import torch

NAMES = ("simulated", "gpu")
NO_GPU = "no CUDA GPU here"
NO_NVRTC = "NVRTC comes with CuPy, which is not installed"
SECONDS = float(os.environ.get("NATCUPY_GPU_SECONDS", "20"))  # of one time-boxed test on a GPU


def param(rig, *values, id=None):
    """A pytest parameter that runs `values` on `rig`, and skips with a reason where it cannot."""
    has_cupy = importlib.util.find_spec("cupy") is not None
    marks = [pytest.mark.skipif(not has_cupy, reason=NO_NVRTC)]
    if rig == "gpu":
        missing = not torch.cuda.is_available()
        marks += [pytest.mark.gpu, pytest.mark.skipif(missing, reason=NO_GPU)]
    return pytest.param(rig, *values, marks=marks, id=f"{rig}-{id}" if id else rig)


def on(names, rows, simulated):
    """`@pytest.mark.parametrize` over rows: all of them on a GPU, those with a number in
    `simulated` (or all, for None) in CI."""
    rows = [row if isinstance(row, tuple) else (row,) for row in rows]
    params = [
        param(rig, *row, id="-".join(map(_label, row)))
        for rig in NAMES
        for number, row in enumerate(rows)
        if rig == "gpu" or simulated is None or number in simulated
    ]
    return pytest.mark.parametrize(("rig", *names), params, indirect=["rig"])


def _label(value):
    return str(value).removeprefix("torch.").replace(" ", "_")


both = pytest.mark.parametrize("rig", [param(name) for name in NAMES], indirect=True)
only_gpu = pytest.mark.parametrize("rig", [param("gpu")], indirect=True)


class Rig:
    """A device under test."""

    def __init__(self, name, *, notes=None, seed=None, raises=False):
        self.name, self._notes = name, [] if notes is None else notes
        self.simulated = name == "simulated"
        if self.simulated:
            from simulated import SimulatedGpu

            self.gpu = SimulatedGpu(seed=seed, raises=raises)
            self.device, self.cuda = torch.device("cpu"), self.gpu.cuda
        else:
            self.device, self.cuda = torch.device("cuda", torch.cuda.current_device()), torch.cuda

    def active(self):
        """Inside, natcupy runs here."""
        return self.gpu.active() if self.simulated else contextlib.nullcontext()

    def note(self, **values):
        """Put numbers into the record of this test."""
        self._notes.extend(values.items())

    def size(self, full, small):
        """`full` on a GPU, `small` on the interpreter."""
        return small if self.simulated else full

    def many(self, count, small, seconds=None):
        """0, 1, 2, ...: `count` of them as far as the time goes on a GPU, or `small`; noted."""
        end, done = time.monotonic() + (seconds or SECONDS), 0
        while done < self.size(count, small) and (self.simulated or time.monotonic() < end):
            yield done
            done += 1
        self.note(runs=done)

    def queue(self, job):
        """Do `job` in the order of the current stream."""
        if self.simulated:
            self.cuda.current_stream().put(job)
        else:
            job()
