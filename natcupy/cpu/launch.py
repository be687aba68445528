"""One call of a kernel: new tensors for the results, every address into the argument block, run.

In: checked tensors and a `Neighborhood`. Out: new tensors. No autograd here.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from natcupy.cpu import memory, rounds, threads
from natcupy.cpu.kernels import COUNTERS, PLACE, Kernel, compute_dtype, kernel
from natcupy.cpu.memory import ALIGNMENT
from natcupy.cpu.spec import BIAS_READ, BIAS_WIDENED, TENSORS
from natcupy.layouts import are_joined
from natcupy.neighborhood import Neighborhood

INPUTS = ("query", "key", "value", "rpb", "extra_keys", "extra_values")
STRIDES_AT = {name: PLACE[f"{name}_batch"] for name in TENSORS}
OUT, LSE = PLACE["out"], PLACE["lse"]
SCRATCH, THREAD_COUNT = PLACE["scratch"], PLACE["thread_count"]
DRAWN, STARTED = COUNTERS  # tasks, and threads
TASKS, FIRST_ITEM, ITEMS = PLACE["tasks"], PLACE["first_item"], PLACE["phase_items"]

Tensors = tuple[Tensor | None, ...]  # the inputs: three tensors, and three that may be None


class Forward:
    """Forward calls with tensors of the same shapes, dtypes and strides.

    All that their addresses do not decide is found by the first one.
    """

    def __init__(self, hood: Neighborhood, scale: float):
        self.hood, self.scale = hood, scale
        self._ready: dict[int, _Ready] = {}  # by the number of threads

    def __call__(self, tensors: Tensors, want_lse: bool = True) -> tuple[Tensor, Tensor | None]:
        """(out, lse) for (query, key, value, rpb, additional_keys, additional_values)."""
        count = torch.get_num_threads()
        ready = self._ready.get(count)
        if ready is None:
            ready = self._ready[count] = _Ready(tensors, self.hood, self.scale, count)
        return ready.run(tensors, want_lse)


class _Ready:
    """`Forward` on so many threads."""

    def __init__(self, tensors: Tensors, hood: Neighborhood, scale: float, threads: int):
        query, key, value, rpb, extra_keys, extra_values = tensors
        batch, *lengths, heads, head_dim = query.shape
        self._out = (*query.shape[:-1], value.shape[-1]), query.dtype
        self._lse = tuple(query.shape[:-1]), compute_dtype(query.dtype)
        self._is_empty = 0 in self._out[0]
        if self._is_empty:
            return
        extra = 0 if extra_keys is None else extra_keys.shape[1]
        sizes = (head_dim, value.shape[-1], extra, query.dtype)
        stripes = -(-2 * threads // (batch * heads))
        self._kernel = use = kernel(tuple(lengths), hood, *sizes, False, stripes)
        self._tasks, self._workers = batch * heads, use.workers(batch * heads, threads)
        call = Call(use)
        call.sizes(heads, key.shape[-2], scale)
        read = [call.rows(name, x) for name, x in zip(INPUTS[:3], tensors[:3], strict=True)]
        read += call.parameters(rpb, extra_keys, extra_values)
        call.strides("out", _contiguous(self._out[0]))
        call.lse_strides(_contiguous(self._lse[0]))
        self._block = call.block
        self._calls: list[Call] = []  # idle ones; threads take and return them in one operation
        ways = (_rows, _rows, _rows, use.bias, _rows, _rows)
        #: place, number and way to read it of each input; no way where it is read as it is
        self._inputs = [
            (PLACE[name], i, None if read[i] is x else ways[i])
            for i, (name, x) in enumerate(zip(INPUTS, tensors, strict=True))
            if x is not None
        ]

    def run(self, tensors: Tensors, want_lse: bool) -> tuple[Tensor, Tensor | None]:
        """One call."""
        out = memory.empty(*self._out)
        lse = memory.empty(*self._lse) if want_lse else None
        if self._is_empty:
            return out, lse
        try:
            call = self._calls.pop()
        except IndexError:  # all in use, by other threads
            call = Call(self._kernel, self._block)
        block, copies = call.block, []
        for place, i, way in self._inputs:
            x = tensors[i]
            if way is not None:
                x = way(x)
                copies.append(x)
            block[place] = x.data_ptr()
        block[OUT] = out.data_ptr()
        block[LSE] = lse.data_ptr() if want_lse else 0
        call.run(self._tasks, self._workers)
        self._calls.append(call)
        return out, lse


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    hood: Neighborhood,
    scale: float,
    rpb: Tensor | None,
    extra_keys: Tensor | None,
    extra_values: Tensor | None,
    want: tuple[bool, bool, bool],  # query; key, value and the additional ones; rpb
    packed: bool = False,
) -> tuple[Tensor | None, ...]:
    """Gradients of (query, key, value, rpb, additional_keys, additional_values), None if unwanted.

    Where `rpb`, `extra_keys`, `extra_values` are None their gradients are too. `packed` lets those
    of query, key and value lie in one tensor where the three themselves do.
    """
    want_query, want_key_value, want_rpb = want[0], want[1], want[2] and rpb is not None
    want_extra = want_key_value and extra_keys is not None
    batch, *lengths, heads, head_dim = query.shape
    kv_heads, value_dim, compute = key.shape[-2], value.shape[-1], compute_dtype(query.dtype)
    if grad_out.numel() == 0:
        given = (query, key, value, rpb, extra_keys, extra_values)
        wanted = (want_query, want_key_value, want_key_value, want_rpb, want_extra, want_extra)
        return tuple(torch.zeros_like(x) if w else None for x, w in zip(given, wanted, strict=True))
    extra = 0 if extra_keys is None else extra_keys.shape[1]
    sizes = (head_dim, value_dim, extra, query.dtype)
    use = kernel(tuple(lengths), hood, *sizes, True, 0, grouped=heads != kv_heads)
    call = Call(use)
    call.sizes(heads, kv_heads, scale)
    for name, x in (("query", query), ("key", key), ("value", value), ("grad_out", grad_out)):
        call.rows(name, x)
    if grad_lse is not None:
        grad_lse = call.address("grad_lse", grad_lse.to(compute).contiguous())
        call.lse_strides(grad_lse.stride())
    call.parameters(rpb, extra_keys, extra_values)

    grad_query = grad_key = grad_value = rpb_shares = None
    extra_shares: list[Tensor | None] = [None, None]
    parts = batch * use.plan.items
    if packed and want_query and want_key_value and are_joined(query, key, value):
        whole = (*query.shape[:-2], 3, heads, head_dim)
        grad_query, grad_key, grad_value = memory.empty(whole, query.dtype).unbind(-3)
    else:
        if want_query:
            grad_query = memory.empty(query.shape, query.dtype)
        if want_key_value:
            grad_key, grad_value = (memory.empty(x.shape, x.dtype) for x in (key, value))
    if want_query:
        call.rows("grad_query", grad_query)
        call.set("want_query", 1)
    if want_key_value:
        call.rows("grad_key", grad_key)
        call.rows("grad_value", grad_value)
        call.set("want_key_value", 1)
    if want_rpb:
        shape = rpb.shape if parts == 1 else (parts, *rpb.shape)
        rpb_shares = call.address("rpb_sums", memory.empty(shape, compute))
        call.set("want_rpb", 1)
    if extra:
        for i, (name, dim) in enumerate((("key", head_dim), ("value", value_dim))):
            shares = memory.empty((batch, use.plan.items, kv_heads, extra, dim), compute)
            extra_shares[i] = call.address(f"extra_{name}_grads", shares)
    workers = use.workers(batch * heads, torch.get_num_threads())
    if want_key_value and use.spec.adds:
        rounds.run(call, use, batch, kv_heads, workers)
    else:
        call.run(batch * kv_heads, workers)

    grad_rpb = rpb_shares if parts == 1 or not want_rpb else _sum(rpb_shares)
    if want_rpb and compute != rpb.dtype:
        grad_rpb = grad_rpb.to(rpb.dtype)
    grad_extras = [None, None]
    if want_extra:
        grad_extras = [
            _sum(shares.transpose(0, 1)).transpose(1, 2).to(key.dtype)
            if extra
            else torch.zeros_like(x)
            for shares, x in zip(extra_shares, (extra_keys, extra_values), strict=True)
        ]
    return grad_query, grad_key, grad_value, grad_rpb, *grad_extras


def _contiguous(shape: Sequence[int]) -> list[int]:
    """The strides of a contiguous tensor."""
    return [prod(shape[axis + 1 :]) for axis in range(len(shape))]


def _sum(parts: Tensor) -> Tensor:
    """Sum over the first axis, in place, in an order that only depends on its length."""
    while len(parts) > 1:
        half = (len(parts) + 1) // 2
        parts[: len(parts) - half].add_(parts[half:])
        parts = parts[:half]
    return parts[0]


def _rows(x: Tensor) -> Tensor:
    """The tensor, copied only if the channels of a token are not neighbors in memory."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


class Call:
    """An argument block; and what must live while it is made and used for the first time."""

    def __init__(self, use: Kernel, block: ctypes.Array | None = None):
        """`block` is that of a call with equal sizes and strides; all its addresses are old."""
        self._phases, self._thread_bytes = use.plan.phases, use.thread_bytes
        self._kernel, self._address = use, use.address
        self.block = use.block() if block is None else type(block).from_buffer_copy(block)
        self._start = ctypes.addressof(self.block)
        self.set("next", self._start + 8 * DRAWN)
        self.set("threads", self._start + 8 * STARTED)
        self._kept: list[Tensor] = []

    def sizes(self, heads: int, kv_heads: int, scale: float) -> None:
        """Numbers that the plan does not know."""
        self.set("heads", heads)
        self.set("kv_heads", kv_heads)
        self.begin_at(0, 0, kv_heads if self._kernel.spec.backward else heads)
        self.set("scale", ctypes.c_int64.from_buffer(ctypes.c_double(scale)).value)

    def begin_at(self, batch: int, head: int, heads: int) -> None:
        """Tasks begin with this batch entry and head, and take so many heads of each entry."""
        self.set("round_batch", batch)
        self.set("round_head", head)
        self.set("round_heads", heads)

    def set(self, name: str, value: int) -> None:
        """Set a word."""
        self.block[PLACE[name]] = value

    def address(self, name: str, x: Tensor) -> Tensor:
        """A tensor whose strides the kernel knows."""
        self._kept.append(x)
        self.set(name, x.data_ptr())
        return x

    def rows(self, name: str, x: Tensor) -> Tensor:
        """A tensor [batch, *spatial, heads, channels] and its strides."""
        x = self.address(name, _rows(x))
        self.strides(name, x.stride())
        return x

    def strides(self, name: str, strides: Sequence[int]) -> None:
        """Those of a tensor [batch, *spatial, heads, channels]."""
        batch, *spatial, head, _ = strides
        at = STRIDES_AT[name]
        self.block[at : at + 5] = (batch, head, *(0, 0, *spatial)[-3:])

    def lse_strides(self, strides: Sequence[int]) -> None:
        """Those of a contiguous tensor [batch, *spatial, heads]."""
        batch, *spatial, _ = strides
        at = PLACE["lse_batch"]
        self.block[at : at + 4] = (batch, *(0, 0, *spatial)[-3:])

    def parameters(
        self, rpb: Tensor | None, keys: Tensor | None, values: Tensor | None
    ) -> list[Tensor | None]:
        """The bias table, and additional keys and values [B, E, Hkv, D]; as they are read."""
        if rpb is not None:
            rpb = self.address("rpb", self._kernel.bias(rpb))
            self.set("has_rpb", BIAS_READ if rpb.dtype == self._kernel.compute else BIAS_WIDENED)
        extra = []
        for what, x in (("key", keys), ("value", values)):
            if x is not None:
                x = self.address(f"extra_{what}s", _rows(x))
                at = PLACE[f"extra_{what}_batch"]
                self.block[at : at + 3] = x.stride()[:3]
            extra.append(x)
        return [rpb, *extra]

    def run(self, tasks: int, workers: int) -> None:
        """All phases, with `tasks` per item, on at most so many threads."""
        self._run(self._phases, tasks, workers)

    def run_whole(self, tasks: int, workers: int) -> None:
        """The same with tasks of all items each, one after the other in the order of phases."""
        self.set("task_items", self._kernel.plan.items)
        self._run([(0, 1)], tasks, workers)

    def _run(self, phases: list[tuple[int, int]], tasks: int, workers: int) -> None:
        block, address, start = self.block, self._address, self._start
        scratch = memory.take_scratch(workers * self._thread_bytes)
        block[SCRATCH] = -(-scratch.data_ptr() // ALIGNMENT) * ALIGNMENT
        for first, items in phases:
            count = tasks * items
            some = workers if workers < count else count
            block[DRAWN] = block[STARTED] = 0
            block[FIRST_ITEM], block[ITEMS], block[TASKS] = first, items, count
            block[THREAD_COUNT] = some
            threads.run(address, start, some)
        memory.give_back(scratch)
