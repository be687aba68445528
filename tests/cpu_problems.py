"""Problems for the tests of backend="cpu", and that backend by name.

In: hypothesis' draw. Out: problems whose channel counts come from a short list, so that few
different kernels are compiled; every other parameter is drawn from the whole space.
"""

import pytest
from hypothesis import strategies as st
from strategies import problems

import natcupy

NA = {1: natcupy.na1d, 2: natcupy.na2d, 3: natcupy.na3d}
CHANNELS = [(1, 1), (4, 4), (5, 3), (8, 8), (16, 40), (32, 32), (33, 17)]

pytest.importorskip("llvmlite", reason="the CPU kernels are compiled by llvmlite")


@st.composite
def cpu_problems(draw, channels=tuple(CHANNELS), **sizes):
    head_dim, value_dim = draw(st.sampled_from(channels))
    return draw(problems(**sizes)).but(head_dim=head_dim, value_dim=value_dim)


def attend(p, inputs, **options):
    return NA[p.rank](**inputs, **p.window, backend="cpu", **options)
