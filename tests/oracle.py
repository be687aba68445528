"""Neighborhood attention by the book: dense float64 attention under a mask built by plain loops.

In: tensors and parameters as `na1d`, `na2d`, `na3d` take them. Out: (out, lse) in float64, with
autograd history. Written apart from the library on purpose: it shares no window formula with it.
"""

from functools import lru_cache
from itertools import product
from math import prod

import torch


def seen_on_axis(length, kernel_size, stride, dilation, is_causal):
    """`{query: {key: bias index}}` for one axis, found by moving windows one step at a time."""
    seen = {}
    for group in range(dilation):
        members = list(range(group, length, dilation))
        for block in range(0, len(members), stride):
            queries = list(range(block, min(block + stride, len(members))))
            # the leader of a group of queries that share one window
            if is_causal:
                leader = min(block + stride - 1, len(members) - 1)
                window = [j for j in range(len(members)) if leader - kernel_size < j <= leader]
            else:
                leader = min(block + stride // 2, len(members) - 1)
                window = [leader - kernel_size // 2 + t for t in range(kernel_size)]
                while window[0] < 0:
                    window = [j + 1 for j in window]
                while window[-1] >= len(members):
                    window = [j - 1 for j in window]
            for i in queries:
                keys = [j for j in window if not is_causal or j <= i]
                seen[members[i]] = {members[j]: j - i + kernel_size - 1 for j in keys}
    return seen


def pairs(shape, kernel_size, stride, dilation, is_causal):
    """`[(query, key, bias index per axis)]` over a whole map, tokens numbered row-major."""
    axes = [
        seen_on_axis(*row)
        for row in zip(shape, kernel_size, stride, dilation, is_causal, strict=True)
    ]

    def number(token):
        n = 0
        for place, length in zip(token, shape, strict=True):
            n = n * length + place
        return n

    found = []
    for query in product(*(range(length) for length in shape)):
        windows = [axis[place].items() for axis, place in zip(axes, query, strict=True)]
        for choice in product(*windows):
            key = tuple(k for k, _ in choice)
            found.append((number(query), number(key), tuple(b for _, b in choice)))
    return found


@lru_cache(maxsize=32)
def tables(shape, kernel_size, stride, dilation, is_causal):
    """Per query and key: whether the query sees it, and the place in the flat bias table."""
    tokens = prod(shape)
    seen = torch.zeros(tokens, tokens, dtype=torch.bool)
    where = torch.zeros(tokens, tokens, dtype=torch.long)
    found = pairs(shape, kernel_size, stride, dilation, is_causal)
    queries = torch.tensor([query for query, _, _ in found], dtype=torch.long)
    keys = torch.tensor([key for _, key, _ in found], dtype=torch.long)
    places = torch.tensor([place for _, _, place in found], dtype=torch.long).view(-1, len(shape))
    flat = torch.zeros_like(queries)
    for axis, k in enumerate(kernel_size):
        flat = flat * (2 * k - 1) + places[:, axis]
    seen[queries, keys] = True
    where[queries, keys] = flat
    return seen, where


def per_axis(value, rank):
    return tuple(value) if isinstance(value, (tuple, list)) else (value,) * rank


def attention(
    query,
    key,
    value,
    kernel_size,
    stride=1,
    dilation=1,
    is_causal=False,
    scale=None,
    rpb=None,
    additional_keys=None,
    additional_values=None,
):
    rank = query.dim() - 3
    shape = query.shape[1:-2]
    params = [per_axis(p, rank) for p in (kernel_size, stride, dilation, is_causal)]
    heads, head_dim = query.shape[-2:]
    repeat = heads // key.shape[-2]
    scale = head_dim**-0.5 if scale is None else scale

    def flat(x, dim=1):  # [B, *spatial, heads, D] to [B, H, N, D] in float64
        x = x.double().flatten(dim, x.dim() - 3).transpose(1, 2)
        return x.repeat_interleave(heads // x.shape[1], 1)

    seen, where = tables(tuple(shape), *params)
    logits = flat(query) @ flat(key).mT * scale
    if rpb is not None:
        logits = logits + rpb.double().flatten(1)[:, where]
    logits = logits.masked_fill(~seen, float("-inf"))
    values = flat(value)
    if additional_keys is not None:
        extra_k = additional_keys.double().transpose(1, 2).repeat_interleave(repeat, 1)
        extra_v = additional_values.double().transpose(1, 2).repeat_interleave(repeat, 1)
        logits = torch.cat([logits, flat(query) @ extra_k.mT * scale], -1)
        values = torch.cat([values, extra_v], 2)
    out = logits.softmax(-1) @ values
    lse = logits.logsumexp(-1)
    return out.transpose(1, 2).unflatten(1, shape), lse.transpose(1, 2).unflatten(1, shape)
