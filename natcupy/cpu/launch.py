"""One call of a kernel: new tensors for the results, every address into the argument block, run.

In: checked tensors and a `Neighborhood`. Out: new tensors. No autograd here.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from natcupy.cpu import threads
from natcupy.cpu.kernels import ALIGNMENT, COUNTERS, PLACE, Kernel, compute_dtype, kernel
from natcupy.cpu.spec import TENSORS
from natcupy.layouts import joined
from natcupy.neighborhood import Neighborhood

SMALL = 1_000_000  # multiply-adds of the logits below which one thread is faster than two
STRIDES_AT = {name: PLACE[f"{name}_batch"] for name in TENSORS}

_idle: list[Tensor] = []  # scratch memory between calls


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    hood: Neighborhood,
    scale: float,
    rpb: Tensor | None,
    extra_keys: Tensor | None,
    extra_values: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(out, lse)."""
    batch, *lengths, heads, head_dim = query.shape
    out = _empty((*query.shape[:-1], value.shape[-1]), query.dtype)
    lse = _empty(query.shape[:-1], compute_dtype(query.dtype))
    if out.numel() == 0:
        return out, lse
    extra = 0 if extra_keys is None else extra_keys.shape[1]
    sizes = (head_dim, value.shape[-1], extra, query.dtype)
    stripes = -(-2 * torch.get_num_threads() // (batch * heads))
    use = kernel(tuple(lengths), hood, *sizes, False, stripes)
    call = _Call(use, heads, key.shape[-2], scale)
    for name, x in (("query", query), ("key", key), ("value", value), ("out", out)):
        call.rows(name, x)
    call.lse("lse", lse)
    call.parameters(rpb, extra_keys, extra_values)
    call.run(batch * heads, batch * heads)
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
    use = kernel(tuple(lengths), hood, head_dim, value_dim, extra, query.dtype, True, 0)
    call = _Call(use, heads, kv_heads, scale)
    for name, x in (("query", query), ("key", key), ("value", value), ("grad_out", grad_out)):
        call.rows(name, x)
    if grad_lse is not None:
        call.lse("grad_lse", grad_lse.to(compute).contiguous())
    call.parameters(rpb, extra_keys, extra_values)

    grad_query = grad_key = grad_value = rpb_shares = None
    extra_shares: list[Tensor | None] = [None, None]
    parts = batch, use.plan.items
    one = packed and want_query and want_key_value and compute == query.dtype
    whole = joined(query, key, value) if one else None
    if whole is not None:
        grad_query, grad_key, grad_value = _empty(whole.shape, compute).unbind(-3)
    if want_query:
        if whole is None:
            grad_query = _empty(query.shape, query.dtype)
        call.rows("grad_query", grad_query)
        call.set("want_query", 1)
    if want_key_value:
        if whole is None:
            grad_key, grad_value = _empty(key.shape, compute), _empty(value.shape, compute)
        call.rows("grad_key", grad_key)
        call.rows("grad_value", grad_value)
        call.set("want_key_value", 1)
    if want_rpb:
        rpb_shares = call.address("rpb_sums", _empty((*parts, *rpb.shape), compute))
        call.set("want_rpb", 1)
    if extra:
        for i, (name, dim) in enumerate((("key", head_dim), ("value", value_dim))):
            shares = _empty((*parts, kv_heads, extra, dim), compute)
            extra_shares[i] = call.address(f"extra_{name}_grads", shares)
    call.run(batch * kv_heads, batch * heads)

    if want_key_value:
        grad_key, grad_value = grad_key.to(key.dtype), grad_value.to(key.dtype)
    grad_rpb = _sum(rpb_shares.flatten(0, 1)).to(rpb.dtype) if want_rpb else None
    grad_extras = [None, None]
    if want_extra:
        grad_extras = [
            _sum(shares.transpose(0, 1)).transpose(1, 2).to(key.dtype)
            if extra
            else torch.zeros_like(x)
            for shares, x in zip(extra_shares, (extra_keys, extra_values), strict=True)
        ]
    return grad_query, grad_key, grad_value, grad_rpb, *grad_extras


def _empty(shape, dtype: torch.dtype) -> Tensor:
    """Memory for a result."""
    return torch.empty(shape, dtype=dtype)


def _sum(parts: Tensor) -> Tensor:
    """Sum over the first axis, in place, in an order that only depends on its length."""
    while len(parts) > 1:
        half = (len(parts) + 1) // 2
        parts[: len(parts) - half] += parts[half:]
        parts = parts[:half]
    return parts[0]


def _rows(x: Tensor) -> Tensor:
    """The tensor, copied only if the channels of a token are not neighbors in memory."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


class _Call:
    """The argument block of one call, and what must live until it is over."""

    def __init__(self, use: Kernel, heads: int, kv_heads: int, scale: float):
        self._kernel, self._block = use, use.block()
        self._kept: list[Tensor] = []
        self.set("heads", heads)
        self.set("kv_heads", kv_heads)
        self.set("scale", ctypes.c_int64.from_buffer(ctypes.c_double(scale)).value)

    def set(self, name: str, value: int) -> None:
        """Set a word."""
        self._block[PLACE[name]] = value

    def address(self, name: str, x: Tensor) -> Tensor:
        """A tensor whose strides the kernel knows."""
        self._kept.append(x)
        self._block[PLACE[name]] = x.data_ptr()
        return x

    def rows(self, name: str, x: Tensor) -> Tensor:
        """A tensor [batch, *spatial, heads, channels] and its strides."""
        x = self.address(name, _rows(x))
        batch, *spatial, head, _ = x.stride()
        at = STRIDES_AT[name]
        self._block[at : at + 5] = (batch, head, *(0, 0, *spatial)[-3:])
        return x

    def lse(self, name: str, x: Tensor) -> None:
        """A contiguous tensor [batch, *spatial, heads]."""
        self.address(name, x)
        batch, *spatial, _ = x.stride()
        at = PLACE["lse_batch"]
        self._block[at : at + 4] = (batch, *(0, 0, *spatial)[-3:])

    def parameters(self, rpb: Tensor | None, keys: Tensor | None, values: Tensor | None) -> None:
        """The bias table in the compute type, and additional keys and values [B, E, Hkv, D]."""
        if rpb is not None:
            self.address("rpb", rpb.to(self._kernel.compute).contiguous())
            self.set("has_rpb", 1)
        for what, x in (("key", keys), ("value", values)):
            if x is not None:
                x = self.address(f"extra_{what}s", _rows(x))
                at = PLACE[f"extra_{what}_batch"]
                self._block[at : at + 3] = x.stride()[:3]

    def run(self, tasks: int, heads: int) -> None:
        """All phases. `tasks` per item; `heads` is the number of (batch, query head) pairs."""
        use, block = self._kernel, self._block
        count = torch.get_num_threads() if use.work * heads >= SMALL else 1
        scratch = _take_scratch(count * use.thread_bytes)
        self.set("scratch", -(-scratch.data_ptr() // ALIGNMENT) * ALIGNMENT)
        start = ctypes.addressof(block)
        self.set("next", start + 8 * COUNTERS[0])
        self.set("threads", start + 8 * COUNTERS[1])
        for first, items in use.plan.phases:
            block[COUNTERS[0]] = block[COUNTERS[1]] = 0
            self.set("first_item", first)
            self.set("phase_items", items)
            self.set("tasks", tasks * items)
            threads.run(use.address, start, min(count, tasks * items))
        _idle.append(scratch)


def _take_scratch(size: int) -> Tensor:
    """Idle memory of at least this size, or new memory; one ALIGNMENT more for its start."""
    try:
        found = _idle.pop()
    except IndexError:
        found = None
    if found is None or found.numel() < size + ALIGNMENT:
        found = torch.empty(size + ALIGNMENT, dtype=torch.uint8)
    return found
