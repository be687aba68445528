"""What only a GPU can answer, in numbers: launch cost, compile, load and cache times.

`python -m benchmarks.questions --json FILE` on a GPU; with `--interpreter` the same steps run on
the tests' simulated GPU, whose times mean nothing. A question that fails says why; others go on.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import natcupy
from benchmarks import record
from benchmarks.harness import reason
from natcupy.cuda import jit, launch
from natcupy.cuda.launch import Launch
from natcupy.cuda.source import Spec

FOLDER = Path(__file__).parent
CALLS = 2_000  # of one timing of host costs


def microseconds(run: Callable[[], object], wait: Callable[[], object], calls: int) -> float:
    """Host time of one call that queues work, the device idle before: the best of three medians."""
    run()
    best = float("inf")
    for _ in range(3):
        wait()
        times = []
        for _ in range(max(1, calls // 3)):
            begun = time.perf_counter()
            run()
            times.append(time.perf_counter() - begun)
        best = min(best, statistics.median(times))
        wait()
    return round(best * 1e6, 2)


def milliseconds(run: Callable[[], object]) -> float:
    begun = time.perf_counter()
    run()
    return round((time.perf_counter() - begun) * 1e3, 3)


class Questions:
    """The questions, for one device; every public method is one and returns numbers by name."""

    def __init__(self, device: torch.device, cuda: Any, calls: int = CALLS, side: int = 14):
        self.device, self.cuda, self.calls = device, cuda, calls
        self.launcher = launch.current_launcher() or jit._default
        self.target = jit.arch_for(device)
        make = torch.Generator().manual_seed(0)
        size = (3, 1, side, side, 1, 32)
        self.qkv = torch.randn(size, generator=make).to(device, torch.float16)

    def _time(self, run: Callable[[], object]) -> float:
        return microseconds(run, self.cuda.synchronize, self.calls)

    def host_microseconds(self) -> dict[str, float]:
        """Of a launch, of its parts, and of whole calls."""
        out = torch.zeros(4, device=self.device)
        step = Launch(Spec("empty.cu"), (1, 1, 1), (32, 1, 1), 0, bytes(512))
        query, key, value = self.qkv
        leaves = [x.clone().requires_grad_() for x in self.qkv]
        d_out = torch.ones_like(query)

        def forward():
            with torch.inference_mode():
                return natcupy.na2d(query, key, value, 3, backend="cuda")

        def both():
            made = natcupy.na2d(*leaves, 3, backend="cuda")
            return torch.autograd.grad(made, leaves, d_out)

        with jit.use_sources(FOLDER):
            empty = self._time(lambda: jit.launch(step, self.device, (out,)))
        return {
            "empty kernel": empty,
            "stream look-up": self._time(lambda: self.cuda.current_stream().cuda_stream),
            "na2d forward": self._time(forward),
            "na2d forward and backward": self._time(both),
            "torch add_, for scale": self._time(lambda: out.add_(1)),
        }

    def compile_milliseconds(self) -> dict[str, float]:
        """Of NVRTC alone, nothing cached."""
        return {
            str(spec): milliseconds(
                lambda spec=spec: jit.compile_spec(spec, self.target.arch, ptx=self.target.ptx)
            )
            for spec in self._specs()
        }

    def load_milliseconds(self) -> dict[str, dict[str, float]]:
        """From the cache's file to bytes, and from bytes to a function on the device."""
        runtime, found = self.launcher.runtime, {}
        with runtime.guard(self.device):
            for spec in self._specs():
                image = jit.binary(spec, self.target)
                found[str(spec)] = {
                    "bytes": len(image),
                    "read": milliseconds(lambda spec=spec: jit.binary(spec, self.target)),
                    "load": milliseconds(lambda s=spec, i=image: runtime.load(i, s.entry)),
                    "load again": milliseconds(lambda s=spec, i=image: runtime.load(i, s.entry)),
                }
        return found

    def memory(self) -> dict[str, int]:
        """Bytes in CuPy's pool, which must stay empty, and in torch's."""
        pool = jit.import_cupy().get_default_memory_pool().total_bytes()
        return {"cupy_pool": pool, "torch": self.cuda.memory_allocated()}

    def _specs(self) -> list[Spec]:
        return [spec for spec, _ in list(self.launcher._loaded) if spec.source != "empty.cu"]

    def answers(self) -> dict[str, Any]:
        """All of them; a failure is its reason."""
        found: dict[str, Any] = {}
        for name in ("host_microseconds", "compile_milliseconds", "load_milliseconds", "memory"):
            try:
                found[name] = getattr(self, name)()
            except Exception as failure:
                found[name] = {"failed": reason(failure)}
        return found


@contextlib.contextmanager
def simulated() -> Iterator[tuple[torch.device, Any]]:
    """The device and `torch.cuda` of the tests' simulated GPU."""
    tests = FOLDER.parent / "tests"
    sys.path[:0] = [str(tests / "gpu"), str(tests)]
    from rigs import Rig

    rig = Rig("simulated")
    with rig.active():
        yield rig.device, rig.cuda


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.questions", description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--interpreter", action="store_true")
    arguments = parser.parse_args(argv)
    if arguments.interpreter:
        with simulated() as (device, cuda):
            found = Questions(device, cuda, calls=3, side=4).answers()
    else:
        device = torch.device("cuda", torch.cuda.current_device())
        found = Questions(device, torch.cuda).answers()
    record.write_text(arguments.json, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
