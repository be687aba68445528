"""Which memory CPU kernels ask for early: every prefetch of `view.ask` is written down instead.

A row that is not asked for costs only time, and so does one that is asked for in vain: nothing else
would notice a wrong view.
"""

import numpy as np
import pytest
import torch

from natcupy.cpu import common, emit, host, kernels, launch
from natcupy.cpu.view import LINE
from natcupy.neighborhood import Neighborhood

MOST = 1 << 16  # addresses in the log, behind their number


@pytest.fixture
def log(monkeypatch):
    """Addresses that kernels compiled from here on ask for, behind their number."""
    if host.missing:
        pytest.skip(host.missing)
    found = np.zeros(1 + MOST, dtype=np.int64)
    base = f"inttoptr (i64 {found.ctypes.data} to ptr)"

    def write_down(b, pointer, nearness):
        if nearness == 2:
            number = b.op(f"atomicrmw add ptr {base}, i64 1 monotonic")
            place = b.add(b.least(number, MOST - 1), 1)  # `check` says that there were too many
            place = b.op(f"getelementptr i64, ptr {base}, i64 {place}")
            b.do(f"store ptr {pointer}, ptr {place}, align 8")

    def forget():
        host._functions.clear()
        kernels.kernel.cache_clear()
        common.common_functions.cache_clear()

    monkeypatch.setattr(emit.Builder, "prefetch", write_down)
    monkeypatch.setattr(host, "object_code", host._compile)
    before = dict(host._functions)
    forget()
    yield found
    forget()
    host._functions.update(before)


def lines_of(x):
    """{address: (batch entry, first index, head)} of the lines of a tensor [B, *spatial, H, D]."""
    start, size, found = x.data_ptr(), x.element_size(), {}
    for index in np.ndindex(*x.shape[:-1]):
        at = start + size * sum(i * stride for i, stride in zip(index, x.stride(), strict=False))
        for byte in range(0, size * x.shape[-1], LINE):
            found[at + byte] = index[0], index[1], index[-1]
    return found


def check(log, tensors, first_rows):
    """All lines are asked for but those of the first step, in the first batch entry and head.

    And little else: at most 7 columns behind a row.
    """
    count, asked = log[0], set(log[1 : 1 + log[0]].tolist())
    assert 0 < count <= MOST
    for x in tensors:
        for at, (batch, row, head) in lines_of(x).items():
            assert at in asked or ((batch, head) == (0, 0) and row < first_rows)
    ends = [(x.data_ptr(), x.data_ptr() + x.element_size() * x.numel()) for x in tensors]
    far = 7 * max(x.element_size() * x.stride(-3) for x in tensors)
    assert all(any(a <= at < z + far for a, z in ends) for at in asked)


def inputs(*shape):
    torch.manual_seed(0)
    return [torch.randn(shape) for _ in range(3)]


def run_forward(hood, q, k, v, log):
    run = launch.Forward(hood, 0.2)
    log[:] = 0
    out, _ = run((q, k, v, None, None, None), False)
    return out


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a thread then guesses its next task right
    yield
    torch.set_num_threads(threads)


def hood(size, dilation=1, rank=2):
    return Neighborhood((size,) * rank, (1,) * rank, (dilation,) * rank, (False,) * rank)


def test_rows_of_a_map_are_asked_for(log):
    q, k, v = inputs(2, 20, 24, 2, 32)
    out = run_forward(hood(7), q, k, v, log)
    check(log, (q, k, v, out), first_rows=9)


def test_so_are_those_of_dilation_groups(log):
    """Groups of one task come one after the other; only the first one has no task before it."""
    q, k, v = inputs(1, 14, 16, 2, 32)
    out = run_forward(hood(7, dilation=2), q, k, v, log)
    check(log, (q, k, v, out), first_rows=14)
    missing = {at for x in (q, k, v) for at in lines_of(x)} - set(log[1 : 1 + log[0]].tolist())
    assert len(missing) <= 3 * 7 * 8 * 2  # of one group: 7 x 8 columns of two lines each


def test_strided_inputs_in_place(log):
    """Queries, keys and values of one tensor, rows of channels that no line begins with."""
    packed = torch.randn(1, 18, 16, 3, 2, 24)
    q, k, v = packed.unbind(-3)
    out = run_forward(hood(5), q, k, v, log)
    assert log[0] > 0
    asked = np.unique(log[1 : 1 + log[0]])
    starts = [at for x in (q, k, v, out) for at, (_, row, _) in lines_of(x).items() if row >= 7]
    assert np.isin(starts, asked).all()


def test_backward_asks_for_its_gradients_too(log):
    q, k, v = inputs(2, 20, 24, 2, 32)
    grad_out = torch.randn_like(q)
    grads = launch.backward(
        grad_out, None, q, k, v, hood(7), 0.2, None, None, None, (True, True, False)
    )
    check(log, (q, k, v, grad_out, grads[0]), first_rows=9)


def test_nothing_is_asked_for_a_gradient_that_nobody_wants(log):
    q, k, v = inputs(1, 20, 24, 2, 32)
    launch.backward(q, None, q, k, v, hood(7), 0.2, None, None, None, (False, True, False))
    asked = log[1 : 1 + log[0]]
    assert asked.min() > 1 << 20  # no address near 0, where the missing tensor would be
