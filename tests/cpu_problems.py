"""Problems for the tests of backend="cpu", and that backend by name.

In: hypothesis' draw. Out: problems whose channel counts come from a short list, so that few
different kernels are compiled; every other parameter is drawn from the whole space. And larger ones
by name; what the backend and the oracle make of a problem.
"""

import oracle
import pytest
import torch
from hypothesis import strategies as st
from strategies import Problem, problems

import natcupy
from natcupy.cpu import kernels

NA = {1: natcupy.na1d, 2: natcupy.na2d, 3: natcupy.na3d}
CHANNELS = [(1, 1), (4, 4), (5, 3), (8, 8), (16, 40), (32, 32), (33, 17)]

pytest.importorskip("llvmlite", reason="the CPU kernels are compiled by llvmlite")

PLAIN = Problem((6, 7), (3, 3), (1, 1), (2, 1), (False, False), rpb=True, extra=2, groups=2)
NAT = Problem((14, 14), (7, 7), (1, 1), (1, 1), (False, False), rpb=True, head_dim=32, value_dim=32)
STRIPES = NAT.but(shape=(113, 9), kv_heads=2, groups=2, extra=1, batch=2)
# 256 channels fill the ring of packed rows, so that planes are cut as well as rows
VIDEO = Problem(
    (8, 20, 9), (3, 3, 3), (1, 2, 1), (1, 1, 1), (False, True, False), head_dim=256, value_dim=256
)
TALL = Problem((90, 7), (3, 3), (1, 1), (1, 1), (False, False))
PROBLEMS = {
    "NAT level": NAT.but(shape=(28, 28), kv_heads=2),
    "last level": NAT.but(shape=(7, 7), kv_heads=3),
    "odd width": NAT.but(shape=(15, 29)),
    "dilated": NAT.but(shape=(30, 33), dilation=(4, 3)),
    "blocked": Problem((20, 24), (5, 4), (5, 4), (1, 2), (False, False), head_dim=8, value_dim=8),
    "causal video": Problem(
        (5, 9, 11), (2, 3, 5), (1, 2, 1), (1, 1, 2), (True, False, True), rpb=True
    ),
    "long": Problem((700,), (63,), (1,), (1,), (False,), head_dim=64, value_dim=64, rpb=True),
    "long causal": Problem((333,), (40,), (3,), (2,), (True,), head_dim=16, value_dim=40, extra=9),
    "stripes": STRIPES,
    "tall video": Problem((6, 41, 5), (3, 3, 3), (1, 1, 1), (1, 1, 1), (False, False, False)),
    "large video": VIDEO,
    "one key": Problem((5, 40), (1, 1), (1, 1), (1, 1), (False, False), head_dim=8, value_dim=8),
    "wide window": Problem((9, 50), (1, 41), (1, 7), (1, 1), (False, False), rpb=True),
    "many extra": PLAIN.but(extra=100),
}


@st.composite
def cpu_problems(draw, channels=tuple(CHANNELS), **sizes):
    head_dim, value_dim = draw(st.sampled_from(channels))
    return draw(problems(**sizes)).but(head_dim=head_dim, value_dim=value_dim)


def attend(p, inputs, **options):
    return NA[p.rank](**inputs, **p.window, backend="cpu", **options)


def run(p, inputs, cotangents=None):
    """(out, lse, *gradients) of the CPU backend."""
    out, lse = attend(p, inputs, return_lse=True)
    leaves = [x for x in inputs.values() if isinstance(x, torch.Tensor)]
    if cotangents is None:
        return out, lse
    return out, lse, *torch.autograd.grad((out, lse), leaves, cotangents)


def draw_cotangents(p, inputs):
    """Random numbers for `run`, of the shapes and dtypes of its output and log-sum-exp."""
    gen = torch.Generator().manual_seed(p.seed)
    rows, dtype = inputs["query"].shape[:-1], inputs["query"].dtype
    shapes = (*rows, inputs["value"].shape[-1]), rows
    return [
        torch.randn(shape, generator=gen, dtype=torch.float64).to(d)
        for shape, d in zip(shapes, (dtype, kernels.compute_dtype(dtype)), strict=True)
    ]


def ask_oracle(p, inputs):
    """(expected, cotangents) for `run`."""
    doubles = {
        n: x.detach().double().requires_grad_() if isinstance(x, torch.Tensor) else x
        for n, x in inputs.items()
    }
    results = oracle.attention(**doubles, **p.window)
    leaves = [x for x in doubles.values() if isinstance(x, torch.Tensor)]
    cotangents = draw_cotangents(p, inputs)
    grads = torch.autograd.grad(results, leaves, [c.double() for c in cotangents])
    return (*results, *grads), cotangents
