"""Window formulas against windows found by moving step by step, in both directions."""

import oracle
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from natcupy.neighborhood import (
    Neighborhood,
    axis_table,
    inverse_window,
    neighbor_table,
    rpb_index,
    window,
)


@st.composite
def axes(draw, max_length=40, max_dilation=5):
    length = draw(st.integers(1, max_length))
    dilation = draw(st.integers(1, min(length, max_dilation)))
    kernel = draw(st.integers(1, length // dilation))
    return length, kernel, draw(st.integers(1, kernel)), dilation, draw(st.booleans())


@settings(max_examples=400)
@given(axis=axes(max_dilation=1))
def test_window_and_its_inverse(axis):
    length, kernel, stride, _, causal = axis
    seen = oracle.seen_on_axis(*axis)
    for query in range(length):
        start, end = window(query, length, kernel, stride, causal)
        assert list(range(start, end)) == sorted(seen[query])
        assert all(
            rpb_index(key, query, kernel) == bias and 0 <= bias <= 2 * kernel - 2
            for key, bias in seen[query].items()
        )
    for key in range(length):
        start, end = inverse_window(key, length, kernel, stride, causal)
        assert list(range(start, end)) == [q for q in range(length) if key in seen[q]]


def test_inverse_is_exact_for_every_small_axis():
    for length in range(1, 15):
        for kernel in range(1, length + 1):
            for stride in range(1, kernel + 1):
                for causal in (False, True):
                    seen = oracle.seen_on_axis(length, kernel, stride, 1, causal)
                    for key in range(length):
                        found = range(*inverse_window(key, length, kernel, stride, causal))
                        assert list(found) == [q for q in range(length) if key in seen[q]]


@settings(max_examples=200, deadline=None)
@given(axis=axes())
def test_axis_table(axis):
    length, kernel, *_, causal = axis
    seen = oracle.seen_on_axis(*axis)
    index, bias, valid = axis_table(*axis, torch.device("cpu"))
    assert index.shape == bias.shape == (length, kernel)
    assert (valid is None) == (not causal)
    for query in range(length):
        slots = range(kernel) if valid is None else valid[query].nonzero().flatten().tolist()
        found = {int(index[query, t]): int(bias[query, t]) for t in slots}
        assert found == seen[query]
        assert 0 <= int(index[query].min()) and int(index[query].max()) < length


def test_windows_hold_the_query_and_exactly_kernel_size_keys():
    for length in range(1, 20):
        for kernel in range(1, length + 1):
            for query in range(length):
                start, end = window(query, length, kernel)
                assert 0 <= start <= query < end <= length and end - start == kernel


def test_worked_example():
    """By hand: nine tokens, dilation 2; token 1 is second group's first, of four members."""
    index, bias, _ = axis_table(9, 3, 1, 2, False, torch.device("cpu"))
    assert index[0].tolist() == [0, 2, 4] and bias[0].tolist() == [2, 3, 4]
    assert index[4].tolist() == [2, 4, 6] and bias[4].tolist() == [1, 2, 3]
    assert index[7].tolist() == [3, 5, 7] and bias[7].tolist() == [0, 1, 2]
    even, _, _ = axis_table(6, 4, 1, 1, False, torch.device("cpu"))
    assert even[3].tolist() == [1, 2, 3, 4]  # one key more on the left


def test_several_axes_are_a_product():
    hood = Neighborhood((2, 3), (1, 2), (2, 1), (False, True))
    index, bias, valid = neighbor_table((5, 4), hood, torch.device("cpu"))
    found = {
        (q, int(index[q, t]), int(bias[q, t])) for q in range(20) for t in range(6) if valid[q, t]
    }
    expected = oracle.pairs((5, 4), (2, 3), (1, 2), (2, 1), (False, True))
    assert found == {(q, k, a * 5 + b) for q, k, (a, b) in expected}
