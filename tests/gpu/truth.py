"""Neighborhood attention as plain torch writes it, in any dtype on any device: dense and masked.

In: a `kernel_cases.Case`, its tensors, cotangents and a dtype. Out: (out, lse, gradients by name).
In float64 that is the truth; in the case's own dtype it is what the error rule measures by. Which
keys a query sees comes from `oracle`, which shares no window formula with the library.
"""

from functools import lru_cache

import oracle
import torch

SAMPLE = 64  # numbers of a gradient whose largest error is a measure of rounding
MOST_RUNS = 12


@lru_cache(maxsize=32)
def tables(shape, hood, device):
    """(seen [N, N], index into a flattened bias [N, N]) over all pairs of tokens."""
    seen = torch.ones(1, 1, dtype=torch.bool, device=device)
    index = torch.zeros(1, 1, dtype=torch.long, device=device)
    rows = zip(shape, hood.kernel_size, hood.stride, hood.dilation, hood.is_causal, strict=True)
    for length, k, *rest in rows:
        here = torch.zeros(length, length, dtype=torch.bool)
        bias = torch.zeros(length, length, dtype=torch.long)
        for query, keys in oracle.seen_on_axis(length, k, *rest).items():
            for key, place in keys.items():
                here[query, key], bias[query, key] = True, place
        here, bias = here.to(device), bias.to(device)
        n = len(seen) * length
        seen = (seen[:, None, :, None] & here[None, :, None, :]).reshape(n, n)
        index = (index[:, None, :, None] * (2 * k - 1) + bias[None, :, None, :]).reshape(n, n)
    return seen, index


def attend(tensors, hood, scale, dtype):
    """(out, lse) of the six inputs by name, computed in `dtype`."""
    shape = tuple(tensors["query"].shape[1:-2])
    seen, index = tables(shape, hood, tensors["query"].device)
    heads = tensors["query"].shape[-2]

    def flat(x, end):  # [B, *spatial, heads, D] as [B, H, N, D]
        x = x.to(dtype).flatten(1, end).transpose(1, 2)
        return x.repeat_interleave(heads // x.shape[1], 1)

    query, key, value = (flat(tensors[n], -3) for n in ("query", "key", "value"))
    logits = query @ key.mT * scale
    if tensors["rpb"] is not None:
        logits = logits + tensors["rpb"].to(dtype).flatten(1)[:, index]
    logits = logits.masked_fill(~seen, float("-inf"))
    if tensors["additional_keys"] is not None:
        more = flat(tensors["additional_keys"], 1), flat(tensors["additional_values"], 1)
        logits = torch.cat([logits, query @ more[0].mT * scale], -1)
        value = torch.cat([value, more[1]], 2)
    out, lse = logits.softmax(-1) @ value, logits.logsumexp(-1)
    return out.transpose(1, 2).unflatten(1, shape), lse.transpose(1, 2).unflatten(1, shape)


def runs(case, tensors, d_out, d_lse, dtype, gradients=True):
    """Outcomes in several orders of the channels: the same numbers, rounded otherwise.

    Two, or more where a bias table is so small that the largest of its errors says little.
    """
    rpb = tensors["rpb"]
    has_table = gradients and rpb is not None and rpb.numel() > 0
    count = min(MOST_RUNS, max(2, -(-SAMPLE // rpb.numel()))) if has_table else 2
    return [
        _in_order(number, case, tensors, d_out, d_lse, dtype, gradients) for number in range(count)
    ]


def _in_order(number, case, tensors, d_out, d_lse, dtype, gradients):
    """The outcome with channels as they come (0), backwards (1), or shuffled."""

    def order(channels):
        if number < 2:
            return torch.arange(channels).flip(0) if number else torch.arange(channels)
        return torch.randperm(channels, generator=torch.Generator().manual_seed(number))

    def turn(x, back=False):
        to = order(x.shape[-1])
        return x.detach()[..., (to.argsort() if back else to).to(x.device)]

    turned = {n: x if x is None or n == "rpb" else turn(x) for n, x in tensors.items()}
    turned_d_out = None if d_out is None else turn(d_out)
    out, lse, made = outcome(case, turned, turned_d_out, d_lse, dtype, gradients)
    back = {n: x if n == "rpb" else turn(x, back=True) for n, x in made.items()}
    return turn(out, back=True), lse, back


def outcome(case, tensors, d_out, d_lse, dtype, gradients=True):
    """(out, lse, gradients by name); gradients in the dtype of the computation."""
    given = {n: None if x is None else x.detach().to(dtype) for n, x in tensors.items()}
    leaves = {n: x.requires_grad_(gradients) for n, x in given.items() if x is not None}
    out, lse = attend(given, case.hood, case.factor, dtype)
    if not gradients:
        return out, lse, {}
    made = torch.autograd.grad(
        [out, lse], list(leaves.values()), [d_out.to(dtype), d_lse.to(dtype)]
    )
    return out.detach(), lse.detach(), dict(zip(leaves, made, strict=True))
