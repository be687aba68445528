"""Calls that repeat an earlier one skip its checks: never what belongs to this one alone."""

import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from natcupy import known_calls, na2d
from natcupy.cpu import memory
from tests import oracle
from tests.tolerances import close


def inputs(batch=2, dtype=torch.float32):
    torch.manual_seed(5)
    query, key, value = (torch.randn(batch, 9, 10, 2, 16, dtype=dtype) for _ in range(3))
    return query, key, value, torch.randn(2, 5, 9, dtype=dtype)


def attend(query, key, value, rpb, **rest):
    return na2d(query, key, value, (3, 5), rpb=rpb, backend="cpu", **rest)


def expected(query, key, value, rpb):
    window = {"kernel_size": (3, 5), "stride": (1, 1), "dilation": (1, 1)}
    return oracle.attention(query, key, value, **window, is_causal=(False, False), rpb=rpb)


def layouts(x):
    yield x
    yield x.transpose(1, 2).contiguous().transpose(1, 2)
    yield torch.stack((x, x), -1).flatten(-2)[..., ::2]
    yield torch.cat((x, x), 0)[: len(x)]


def test_every_layout_is_a_call_of_its_own():
    query, key, value, rpb = inputs()
    first = attend(query, key, value, rpb)
    for _ in range(2):  # the second time all are known
        for place in range(4):
            for x in layouts((query, key, value, rpb)[place]):
                given = [query, key, value, rpb]
                given[place] = x
                assert torch.equal(attend(*given), first)
    other = attend(query + 1, key, value - 1, rpb)
    assert not torch.equal(other, first)
    close(other, expected(query + 1, key, value - 1, rpb)[0], torch.float32)


def test_results_of_known_calls_do_not_share_memory():
    given = inputs()
    first = attend(*given)
    kept = first.clone()
    second = attend(given[0] * 2, *given[1:])
    assert first.data_ptr() != second.data_ptr() and torch.equal(first, kept)


@pytest.mark.parametrize("history", [False, True])
def test_the_log_sum_exp_is_made_where_it_is_asked_for(monkeypatch, history):
    given = [x.requires_grad_(history) for x in inputs()]
    made, empty = [], memory.empty
    monkeypatch.setattr(memory, "empty", lambda *like: made.append(like) or empty(*like))
    for _ in range(2):
        made.clear()
        alone = attend(*given)
        assert len(made) == 1
        out, lse = attend(*given, return_lse=True)
        assert len(made) == 3
        assert torch.equal(out, alone)
        close(lse, expected(*given)[1], torch.float32)
        if history:
            gradients = [torch.autograd.grad(x.sum(), given) for x in (alone, out)]
            for a, b in zip(*gradients, strict=True):
                assert torch.equal(a, b)


def test_biases_of_other_kinds_are_read_again_at_each_call():
    query, key, value, rpb = inputs()
    for make in (lambda x: x.mT.contiguous().mT, lambda x: x):
        for _ in range(2):
            rpb = rpb + 1
            query16, key16, value16 = (x.bfloat16() for x in (query, key, value))
            out = attend(query16, key16, value16, make(rpb.bfloat16()))
            close(out, expected(query16, key16, value16, rpb.bfloat16())[0], torch.bfloat16)
            close(
                attend(query, key, value, make(rpb)),
                expected(query, key, value, rpb)[0],
                torch.float32,
            )


def test_threads_may_change_between_calls():
    given, threads = inputs(batch=40), torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 3, 1, 2):
            torch.set_num_threads(count)
            found.append(attend(*given))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(x, found[0]) for x in found)


def test_many_threads_make_one_known_call_at_once():
    batches = [[x + i for x in inputs()] for i in range(24)]
    alone = [attend(*given) for given in batches]
    with ThreadPoolExecutor(8) as pool:
        found = pool.map(lambda given: attend(*given), batches * 4)
        for a, b in zip(found, alone * 4, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_of_a_known_call_are_let_go(dtype):
    given = [x.mT.contiguous().mT for x in inputs(dtype=dtype)]  # all are copied
    attend(*given)
    seen = [weakref.ref(x) for x in given]
    del given
    assert known_calls._good and not any(x() is not None for x in seen)


def test_empty_batches():
    query, key, value, rpb = (x[:0] if x.dim() > 3 else x for x in inputs())
    for _ in range(2):
        out, lse = attend(query, key, value, rpb, return_lse=True)
        assert out.shape == query.shape and lse.shape == query.shape[:-1]


def test_what_only_looks_like_a_known_call_is_checked():
    query, key, value, rpb = inputs()
    zeros = torch.zeros(()).expand(query.shape)
    attend(zeros, key, value, rpb)
    sparse = torch.zeros(query.shape).to_sparse()
    assert sparse.stride() == zeros.stride()
    with pytest.raises(TypeError, match="dense strided"):
        attend(sparse, key, value, rpb)
    with pytest.raises(ValueError, match="one device"):
        attend(query, key.to("meta"), value, rpb)
    for window in ((True, 5), (3.0, 5)):
        attend(query, key, value, rpb)
        with pytest.raises(TypeError, match="kernel_size"):
            na2d(query, key, value, window, rpb=rpb, backend="cpu")


def test_a_missing_tensor_is_told():
    given = inputs()
    attend(*given)
    for place, name in enumerate(("query", "key", "value")):
        lacking = [None if i == place else x for i, x in enumerate(given)]
        with pytest.raises(TypeError, match=f"{name} must be a torch.Tensor"):
            attend(*lacking)


def test_known_calls_are_bounded(monkeypatch):
    monkeypatch.setattr(known_calls, "MOST", 3)
    for length in range(5, 12):
        x = torch.randn(1, length, length, 1, 8)
        na2d(x, x, x, 3, backend="cpu")
        assert 1 <= len(known_calls._good) <= 3


@pytest.mark.parametrize("place", range(4))
def test_tensors_that_stand_for_the_negative_of_their_memory(place):
    given = list(inputs())
    true = attend(*[-x if i == place else x for i, x in enumerate(given)])
    lazy = [torch._neg_view(x) if i == place else x for i, x in enumerate(given)]
    assert lazy[place].is_neg() and lazy[place].data_ptr() == given[place].data_ptr()
    for _ in range(2):
        attend(*given)
        assert torch.equal(attend(*lazy), true)


def test_zeros_without_memory():
    query, key, value, rpb = inputs()
    zeros = torch._efficientzerotensor(value.shape)
    assert zeros.data_ptr() == 0
    for _ in range(2):
        attend(query, key, value, rpb)
        assert not attend(query, key, zeros, rpb).any()
    out = attend(query, key, value.requires_grad_(), rpb)
    assert not torch.autograd.grad(out, value, torch._efficientzerotensor(out.shape))[0].any()


def test_gradients_that_stand_for_the_negative_of_their_memory():
    given = [x.requires_grad_() for x in inputs()]
    out = attend(*given)
    cotangent = torch.randn_like(out)
    true = torch.autograd.grad(out, given, -cotangent, retain_graph=True)
    found = torch.autograd.grad(out, given, torch._neg_view(cotangent))
    assert all(torch.equal(a, b) for a, b in zip(found, true, strict=True))


def test_autocast_makes_no_known_call_of_what_it_casts():
    query, key, value, rpb = inputs()
    half = [x.bfloat16() for x in (query, key, value)]
    expected_half = attend(*half, rpb)
    plain = attend(query, key, value, rpb)
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            known = len(known_calls._good)
            assert torch.equal(attend(query, key, value, rpb), expected_half)
            assert torch.equal(attend(*half, rpb), expected_half)
            assert len(known_calls._good) == known
    assert torch.equal(attend(query, key, value, rpb), plain)


def test_autocast_knows_calls_that_it_leaves_alone():
    known_calls._good.clear()
    given = [x.bfloat16().requires_grad_() for x in inputs()[:3]]
    rpb = inputs()[3].requires_grad_()
    found = []
    for cast in (False, True, True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            out = attend(*given, rpb)
        found.append([out, *torch.autograd.grad(out.float().square().sum(), [*given, rpb])])
        assert len(known_calls._good) == 1
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))
