"""Times of backend="cpu" beside its peers, all in one process, taking turns.

In: nothing; names of rows, `--threads`, `--rounds` are optional. Out: a table, a row per layer:
medians in ms of forward and of forward + backward, how many times slower each peer is, and the
share of the matrix multiplication peak measured in the same run.

    python benchmarks/cpu.py --threads 2 56 1D

Every call starts with caches full of what the others left, as inside a network. Useful work is
4 * queries * window * head_dim floating point operations forward, 3.5 times that with backward.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass
from statistics import median

import torch
from torch.nn.functional import scaled_dot_product_attention

import natcupy
from natcupy.neighborhood import Neighborhood, neighbor_table

NA = {1: natcupy.na1d, 2: natcupy.na2d, 3: natcupy.na3d}
DENSE_LIMIT = 64 << 20  # largest mask of the dense peer, in elements


@dataclass(frozen=True)
class Layer:
    shape: tuple[int, ...]
    heads: int
    head_dim: int
    kernel_size: tuple[int, ...]
    batch: int = 1
    dilation: int = 1
    rpb: bool = True

    @property
    def operations(self) -> float:
        tokens = self.batch * self.heads * math.prod(self.shape)
        return 4.0 * tokens * math.prod(self.kernel_size) * self.head_dim


def nat_layers():
    for batch in (1, 8):
        for side, heads in ((56, 2), (28, 4), (14, 8), (7, 16)):
            yield f"{side} b{batch}", Layer((side, side), heads, 32, (7, 7), batch)
        for side, heads, dilation in ((56, 2, 8), (28, 4, 4), (14, 8, 2)):
            layer = Layer((side, side), heads, 32, (7, 7), batch, dilation)
            yield f"{side} d{dilation} b{batch}", layer


LAYERS = dict(nat_layers()) | {
    "1D 4096 k63": Layer((4096,), 8, 64, (63,), rpb=False),
    "3D 8x28x28 k3,7,7": Layer((8, 28, 28), 4, 32, (3, 7, 7), rpb=False),
}


def contestants(layer: Layer, dtype: torch.dtype):
    """Functions of (query, key, value, rpb) by name."""
    rank = len(layer.shape)

    def natcupy_on(backend):
        options = {"kernel_size": layer.kernel_size, "dilation": layer.dilation}
        return lambda q, k, v, rpb: NA[rank](q, k, v, **options, rpb=rpb, backend=backend)

    found = {"cpu": natcupy_on("cpu"), "torch": natcupy_on("torch")}
    tokens = math.prod(layer.shape)
    if tokens**2 * layer.heads <= DENSE_LIMIT:
        mask = dense_mask(layer, dtype)

        def dense(q, k, v, rpb):
            """A constant mask: the bias' gradient is left out, which favors this peer."""
            q, k, v = (x.flatten(1, -3).transpose(1, 2) for x in (q, k, v))
            return scaled_dot_product_attention(q, k, v, mask).transpose(1, 2)

        found["dense"] = dense
    return found


def dense_mask(layer: Layer, dtype: torch.dtype) -> torch.Tensor:
    rank, tokens = len(layer.shape), math.prod(layer.shape)
    hood = Neighborhood(layer.kernel_size, (1,) * rank, (layer.dilation,) * rank, (False,) * rank)
    index, _, _ = neighbor_table(layer.shape, hood, "cpu")
    seen = torch.full((tokens, tokens), -math.inf, dtype=dtype)
    seen.scatter_(1, index, 0.0)
    return seen.expand(1, layer.heads, tokens, tokens)


def problem(layer: Layer, dtype: torch.dtype):
    """Query, key and value as a layer makes them, views of one tensor; and the bias."""
    qkv = torch.randn(layer.batch, *layer.shape, 3, layer.heads, layer.head_dim).to(dtype)
    rpb = torch.randn(layer.heads, *(2 * k - 1 for k in layer.kernel_size)) * 0.02
    return qkv, rpb.to(dtype) if layer.rpb else None


def forward(function, qkv, rpb):
    with torch.inference_mode():
        function(*qkv.unbind(-3), rpb)


def both(function, qkv, rpb, cotangent):
    q, k, v = (x.detach().requires_grad_() for x in qkv.unbind(-3))
    rpb = rpb.detach().requires_grad_() if rpb is not None else None
    out = function(q, k, v, rpb)
    leaves = [q, k, v] if rpb is None else [q, k, v, rpb]
    torch.autograd.grad(out, leaves, cotangent.view(out.shape), allow_unused=True)


def measure(calls: dict, rounds: int, clock) -> dict[str, float]:
    """Median seconds of each call, taken in turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            start = clock()
            call()
            times[name].append(clock() - start)
    return {name: median(seconds) for name, seconds in times.items()}


def matmul_peak(clock, rounds: int = 20) -> float:
    """Floating point operations per second of a large float32 matrix multiplication."""
    a = torch.randn(1024, 1024)
    best = math.inf
    for _ in range(rounds):
        start = clock()
        a @ a
        best = min(best, clock() - start)
    return 2 * 1024**3 / best


def row(name: str, layer: Layer, dtype: torch.dtype, rounds: int, clock) -> str:
    qkv, rpb = problem(layer, dtype)
    cotangent = torch.randn(layer.batch, *layer.shape, layer.heads, layer.head_dim).to(dtype)
    named = contestants(layer, dtype)
    peak = matmul_peak(clock)
    text = f"{name:18s}"
    for factor, call in ((1.0, lambda f: forward(f, qkv, rpb)), (3.5, None)):
        if call is None:

            def call(f):
                both(f, qkv, rpb, cotangent)

        calls = {n: (lambda f=f, call=call: call(f)) for n, f in named.items()}
        seconds = measure(calls, rounds, clock)
        share = factor * layer.operations / seconds["cpu"] / peak
        text += f" | {seconds['cpu'] * 1e3:8.3f} ms {share:5.0%}"
        for peer in ("torch", "dense"):
            ratio = f"{seconds[peer] / seconds['cpu']:6.1f}x" if peer in seconds else "      -"
            text += f" {peer} {ratio}"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("rows", nargs="*", help="parts of row names; all rows by default")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="time spent on the processor instead of time passed; for one thread on a busy machine",
    )
    options = parser.parse_args()
    clock = time.process_time if options.cpu_time else time.perf_counter
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    dtype = getattr(torch, options.dtype)
    print(f"{options.threads} threads, {options.dtype}: forward | forward + backward")
    for name, layer in LAYERS.items():
        if not options.rows or any(part in name for part in options.rows):
            print(row(name, layer, dtype, options.rounds, clock), flush=True)


if __name__ == "__main__":
    main()
