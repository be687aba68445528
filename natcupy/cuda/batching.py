"""vmap rules of the ops: a mapped axis joins the batch, and the call runs once.

In: the op to call, torch's vmap info and arguments. Out: results and their mapped dims. What has no
batch (a mapped bias) or sums over it (the bias gradient) is computed one by one instead.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _fold(x, dim: int | None, count: int):
    """[count, B, ...] as [count * B, ...]."""
    if not isinstance(x, Tensor):
        return x
    x = x.unsqueeze(0).expand(count, *x.shape) if dim is None else x.movedim(dim, 0)
    return x.reshape(count * x.shape[1], *x.shape[2:])


def _fold_all(args, dims, count: int, shared: int) -> list:
    """Every tensor folded but number `shared`, the bias, which has no batch."""
    return [x if i == shared else _fold(x, dims[i], count) for i, x in enumerate(args)]


def _unfold(x: Tensor, count: int) -> Tensor:
    return x.unflatten(0, (count, x.shape[0] // count))


def _one_by_one(call, count: int, in_dims, args):
    results = []
    for i in range(count):
        one = [
            x.select(dim, i) if isinstance(x, Tensor) and dim is not None else x
            for x, dim in zip(args, in_dims, strict=True)
        ]
        results.append(call(*one))
    return tuple(torch.stack(parts) for parts in zip(*results, strict=True)), (0,) * len(results[0])


def _dims(in_dims, args) -> list[int | None]:
    """One dim per argument; a list argument (kernel_size, ...) has none."""
    dims = (d if isinstance(x, Tensor) else None for d, x in zip(in_dims, args, strict=True))
    return list(dims)


def forward(call, info, in_dims, *args):
    """`na_fwd` over a mapped axis: (results, their mapped dims)."""
    dims, count = _dims(in_dims, args), info.batch_size
    if dims[3] is not None:
        return _one_by_one(call, count, dims, args)
    folded = _fold_all(args, dims, count, shared=3)
    out, lse = call(*folded)
    return (_unfold(out, count), _unfold(lse, count)), (0, 0)


def backward(call, info, in_dims, *args):
    """`na_bwd` over a mapped axis: (gradients, their mapped dims)."""
    dims, count, wanted = _dims(in_dims, args), info.batch_size, args[-1]
    if dims[5] is not None or wanted[3]:
        return _one_by_one(call, count, dims, args)
    folded = _fold_all(args, dims, count, shared=5)
    gradients = call(*folded)
    pairs = zip(gradients, wanted, strict=True)
    return tuple(_unfold(g, count) if w else g for g, w in pairs), tuple(
        0 if w else None for w in wanted
    )
