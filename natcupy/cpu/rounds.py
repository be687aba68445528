"""A backward call in rounds of a few heads, where gradients of keys are added up in a wider type.

In: a call with all but these two gradients, and tensors for them. Out: the tensors, filled. The
sums of a round stay in the caches, and those of the whole batch would take as much memory as all
other results together. Which rounds there are makes no difference to any number.
"""

from __future__ import annotations

from itertools import product
from math import prod
from typing import TYPE_CHECKING

from torch import Tensor

from natcupy.cpu import memory
from natcupy.cpu.cuts import even_parts

if TYPE_CHECKING:
    from natcupy.cpu.kernels import Kernel
    from natcupy.cpu.launch import Call

TASKS = 1  # of a phase for each thread, at least; four were no faster, and take more memory
BYTES = 1 << 20  # of sums, about; many smaller rounds would take longer to begin than to work on

Span = tuple[int, int]  # first, end


def run(call: Call, use: Kernel, grads: dict[str, Tensor], workers: int) -> None:
    """Fill `grads`, [batch, *spatial, heads, channels] by their names in `spec.TENSORS`."""
    batch, *lengths, heads, _ = next(iter(grads.values())).shape
    pair = sum(prod(x.shape[1:-2]) * x.shape[-1] for x in grads.values()) * use.compute.itemsize
    items = min(items for _, items in use.plan.phases)
    least = 1 if workers == 1 else -(-TASKS * workers // items)
    spans = cut_rounds(batch, heads, max(least, BYTES // pair))
    entries, some = (max(end - first for first, end in axis) for axis in zip(*spans, strict=True))
    sums = {
        name: memory.empty((entries, *lengths, some, x.shape[-1]), use.compute)
        for name, x in grads.items()
    }
    for (batch_first, batch_end), (head_first, head_end) in spans:
        entries, some = batch_end - batch_first, head_end - head_first
        call.begin_at(batch_first, head_first, some)
        for name, x in sums.items():
            call.rows_from(name, x, batch_first, head_first)
        call.run(entries * some, workers)
        for name, x in grads.items():
            found = sums[name][:entries, ..., :some, :]
            x[batch_first:batch_end, ..., head_first:head_end, :].copy_(found)


def cut_rounds(batch: int, heads: int, pairs: int) -> list[tuple[Span, Span]]:
    """Batch entries and heads of each round: at least so many pairs of them, where there are."""
    entries = even_parts(batch, max(1, batch // -(-pairs // heads)))
    return list(product(entries, even_parts(heads, max(1, heads // pairs))))
