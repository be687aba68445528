"""Backward passes whose gradients of keys are added up: pair by pair, or a few heads at a time."""

from itertools import product

import pytest
import torch
from cpu_problems import PLAIN, PROBLEMS, STRIPES, VIDEO, ask_oracle, draw_cotangents, run
from hypothesis import given
from hypothesis import strategies as st
from strategies import tensors
from tolerances import close

from natcupy.cpu import kernels, launch, rounds


@given(batch=st.integers(1, 70), heads=st.integers(1, 40), pairs=st.integers(1, 3000))
def test_rounds_hold_each_pair_once_and_enough_of_them(batch, heads, pairs):
    found = rounds.cut_rounds(batch, heads, pairs)
    held = [pair for entry, head in found for pair in product(range(*entry), range(*head))]
    assert sorted(held) == list(product(range(batch), range(heads)))
    sizes = [(b - a) * (d - c) for (a, b), (c, d) in found]
    assert min(sizes) >= min(pairs, batch * heads)
    # and no more than that, but for what whole entries and even parts round up
    whole = pairs if pairs <= heads else -(-pairs // heads) * heads
    assert max(sizes) < 2 * whole + max(1, heads if pairs > heads else 1)


MANY = {  # problems with gradients that are added up, for several entries and key heads
    "stripes": STRIPES.but(batch=3, kv_heads=5),
    "video": VIDEO.but(batch=2, kv_heads=3, groups=2, extra=3),
    "line": PROBLEMS["long"].but(batch=2, kv_heads=3),
    "shared key heads": PLAIN.but(batch=5, kv_heads=3),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("p", MANY.values(), ids=MANY)
def test_same_bits_in_rounds_of_any_size(monkeypatch, p, dtype):
    counts, cut = [], rounds.cut_rounds
    monkeypatch.setattr(rounds, "cut_rounds", lambda *of: counts.append(len(cut(*of))) or cut(*of))
    monkeypatch.setattr(kernels, "SMALL", 0)
    monkeypatch.setattr(rounds, "BYTES", 1)
    monkeypatch.setattr(rounds, "EACH", 10**6)  # no pair is one task
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    inputs = tensors(p, dtype, requires_grad=True)
    expected, cotangents = ask_oracle(p, inputs)
    monkeypatch.setattr(rounds, "TASKS", 10**6)
    whole = run(p, inputs, cotangents)
    for i, (a, b) in enumerate(zip(whole, expected, strict=True)):
        close(a, b, torch.float32 if i == 1 else dtype, f"result {i}", backward=i > 1)
    for tasks in (1, 3, 8, 20):
        monkeypatch.setattr(rounds, "TASKS", tasks)
        for a, b in zip(run(p, inputs, cotangents), whole, strict=True):
            assert torch.equal(a, b)
    assert counts[0] == 1 < counts[1]
    assert counts == sorted(counts[:1]) + sorted(counts[1:], reverse=True)


@pytest.fixture
def whole_pairs(monkeypatch):
    """The calls in which each pair was one task: (pairs, threads) of each."""
    seen, run_whole = [], launch.Call.run_whole
    monkeypatch.setattr(
        launch.Call, "run_whole", lambda *given: seen.append(given[1:]) or run_whole(*given)
    )
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("p", MANY.values(), ids=MANY)
def test_same_bits_where_pairs_are_tasks(monkeypatch, whole_pairs, p, dtype):
    monkeypatch.setattr(kernels, "SMALL", 0)
    monkeypatch.setattr(rounds, "PAIR_BYTES", 8 << 20)
    inputs = tensors(p, dtype, requires_grad=True)
    cotangents = draw_cotangents(p, inputs)
    monkeypatch.setattr(rounds, "EACH", 10**6)
    apart = run(p, inputs, cotangents)
    pairs = p.batch * p.kv_heads
    monkeypatch.setattr(rounds, "EACH", pairs // 2)
    threads = 1, 2, 3
    for count in threads:
        monkeypatch.setattr(torch, "get_num_threads", lambda count=count: count)
        for a, b in zip(run(p, inputs, cotangents), apart, strict=True):
            assert torch.equal(a, b)
    assert whole_pairs == [(pairs, count) for count in threads[:-1]]


def test_a_pair_with_large_sums_is_no_task(monkeypatch, whole_pairs):
    p = MANY["line"].but(batch=8)
    for dtype, limit, expected in (
        (torch.bfloat16, rounds.PAIR_BYTES, 1),
        (torch.bfloat16, 1, 0),
        (torch.float32, 1, 1),  # added up in the results themselves
    ):
        monkeypatch.setattr(rounds, "PAIR_BYTES", limit)
        inputs = tensors(p, dtype, requires_grad=True)
        run(p, inputs, draw_cotangents(p, inputs))
        assert len(whole_pairs) == expected
        whole_pairs.clear()
