"""A backward call whose items add to each other's gradients of keys: what runs when.

In: a call with everything but where incomplete sums lie. Out: nothing; its results are filled.

With many pairs of a batch entry and a key head, each pair is one task: a thread works on its items
one after the other, and its sums are in the caches when it adds to them. With few, all threads work
on the items of a phase, and wait for each other between phases; then in half types, whose sums need
memory of their own, only some pairs at a time are worked on. No number depends on any of this.
"""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING

from natcupy.cpu import memory
from natcupy.cpu.cuts import even_parts

if TYPE_CHECKING:
    from natcupy.cpu.kernels import Kernel
    from natcupy.cpu.launch import Call

EACH = 4  # pairs for each thread, or more: with fewer, some threads would wait long for the last
TASKS = 1  # of a phase for each thread in a round, at least
BYTES = 1 << 20  # of sums in a round, about
PAIR_BYTES = 2 << 20  # most incomplete sums of a pair that is one task: a thread has them to itself

Span = tuple[int, int]  # first, end


def run(call: Call, use: Kernel, batch: int, heads: int, workers: int) -> None:
    """Run a call for so many batch entries and key heads."""
    size = use.partials * (use.head_dim + use.value_dim) * use.compute.itemsize  # of a pair
    if batch * heads >= EACH * workers and size <= PAIR_BYTES:
        _allot(call, use, workers)
        call.set("partials_of_threads", 1)
        call.run_whole(batch * heads, workers)
        return
    if not size:
        call.run(batch * heads, workers)
        return
    items = min(items for _, items in use.plan.phases)
    least = 1 if workers == 1 else -(-TASKS * workers // items)
    spans = cut_rounds(batch, heads, max(least, BYTES // size))
    _allot(call, use, max((b - a) * (d - c) for (a, b), (c, d) in spans))
    for (batch_first, batch_end), (head_first, head_end) in spans:
        entries, some = batch_end - batch_first, head_end - head_first
        call.begin_at(batch_first, head_first, some)
        call.run(entries * some, workers)


def _allot(call: Call, use: Kernel, pairs: int) -> None:
    """Memory for the incomplete sums of so many pairs."""
    if use.partials:
        for name, channels in (("key", use.head_dim), ("value", use.value_dim)):
            sums = memory.empty((pairs, use.partials, channels), use.compute)
            call.address(f"partial_{name}s", sums)


def cut_rounds(batch: int, heads: int, pairs: int) -> list[tuple[Span, Span]]:
    """Batch entries and heads of each round: at least so many pairs of them, where there are."""
    entries = even_parts(batch, max(1, batch // -(-pairs // heads)))
    return list(product(entries, even_parts(heads, max(1, heads // pairs))))
