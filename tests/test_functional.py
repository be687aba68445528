"""Arguments of the public functions: what is accepted, what raises, and in which words."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import Problem, tensors

import natcupy
from natcupy import backends

P = Problem((6, 7), (3, 3), (1, 1), (2, 1), (False, False), batch=2, kv_heads=2, groups=2)


def call(window=None, **changes):
    inputs = tensors(P, torch.float32) | changes
    return natcupy.na2d(**inputs, **({"kernel_size": 3} | (window or {})))


def bad_windows():
    for name in ("kernel_size", "stride", "dilation"):
        for value in (0, -1, (3, 0), (3,), (3, 3, 3), []):
            yield name, value, ValueError
        for value in (1.0, "3", None, True, (3, 2.0), (True, 3), ..., {3}):
            yield name, value, TypeError
    for value in ((True,), (True, False, True)):
        yield "is_causal", value, ValueError
    for value in (0, 1, "yes", None, (True, 1)):
        yield "is_causal", value, TypeError
    yield "kernel_size", 8, ValueError
    yield "kernel_size", (7, 7), ValueError
    yield "kernel_size", 2**70, ValueError
    yield "dilation", 3, ValueError
    yield "stride", 4, ValueError
    yield "stride", (1, 4), ValueError


@pytest.mark.parametrize(("name", "value", "error"), list(bad_windows()), ids=str)
def test_bad_window(name, value, error):
    with pytest.raises(error, match=name):
        call({name: value})


@pytest.mark.parametrize("kernel", [3, [3, 3], (3, 3), np.int64(3), torch.tensor(3)])
def test_ways_to_say_an_int(kernel):
    assert torch.equal(call({"kernel_size": kernel}), call())


def bad_tensors():
    good = tensors(P, torch.float32)
    q, k, v = good["query"], good["key"], good["value"]
    yield "query", q.numpy(), TypeError
    yield "query", q.long(), TypeError
    yield "query", q.to(torch.complex64), TypeError
    yield "query", q.to_sparse(), TypeError
    yield "query", q[0], ValueError
    yield "query", q[..., None], ValueError
    yield "query", q[..., :0], ValueError
    yield "query", q[..., :0, :], ValueError
    yield "query", q.double(), TypeError
    yield "query", q[:1], ValueError
    yield "query", q[:, :5], ValueError
    yield "query", q[..., :3], ValueError
    yield "query", q[..., :3, :], ValueError
    yield "query", q.to("meta"), ValueError
    yield "key", None, TypeError
    yield "key", k.half(), TypeError
    yield "key", k.to("meta"), ValueError
    yield "key", k[..., :3], ValueError
    yield "key", k[:, :, :5], ValueError
    yield "key", k[..., :1, :], ValueError
    yield "key", k[..., :0, :], ValueError
    yield "value", v.bfloat16(), TypeError
    yield "value", v[:, :5], ValueError
    yield "value", v[..., :0], ValueError
    yield "value", v[..., :1, :], ValueError
    yield "scale", "1", TypeError
    yield "scale", True, TypeError
    yield "scale", torch.tensor(1.0), TypeError
    yield "scale", float("nan"), ValueError
    yield "scale", float("inf"), ValueError
    yield "rpb", torch.zeros(4, 5, 4), ValueError
    yield "rpb", torch.zeros(2, 5, 5), ValueError
    yield "rpb", torch.zeros(4, 25), ValueError
    yield "rpb", torch.zeros(4, 5, 5).double(), TypeError
    yield "rpb", torch.zeros(4, 5, 5).half(), TypeError
    yield "rpb", torch.zeros(4, 5, 5, device="meta"), ValueError
    yield "rpb", [[0.0]], TypeError
    yield "additional_keys", torch.zeros(2, 3, 2, 4), ValueError
    yield "additional_values", torch.zeros(2, 3, 2, 4), ValueError
    yield "return_lse", 1, TypeError
    yield "backend", "nope", ValueError
    yield "backend", 3, ValueError


@pytest.mark.parametrize(("name", "value", "error"), list(bad_tensors()))
def test_bad_argument(name, value, error):
    with pytest.raises(error, match=rf"(?s){name}|the query's heads|all tensors|one library"):
        call(**{name: value})


@pytest.mark.parametrize(
    ("keys", "values"),
    [
        ((2, 3, 2, 4), (2, 4, 2, 4)),
        ((1, 3, 2, 4), (2, 3, 2, 4)),
        ((2, 3, 1, 4), (2, 3, 2, 4)),
        ((2, 3, 2, 5), (2, 3, 2, 4)),
        ((2, 3, 4), (2, 3, 2, 4)),
    ],
)
def test_bad_additional(keys, values):
    with pytest.raises(ValueError, match="additional"):
        call(additional_keys=torch.zeros(keys), additional_values=torch.zeros(values))


def test_messages_state_rule_values_and_remedy():
    with pytest.raises(ValueError) as error:
        call({"kernel_size": 7, "dilation": (1, 2)})
    text = str(error.value)
    assert "kernel_size * dilation must fit the input" in text
    assert "kernel_size=(7, 7)" in text and "dilation=(1, 2)" in text and "(6, 7)" in text
    assert "pad" in text


def test_nothing_runs_before_the_checks(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "__matmul__", None)
    with pytest.raises(ValueError):
        call({"kernel_size": 9})


@pytest.mark.parametrize("shape", [(2, 8, 4, 3), (2, 6, 7, 4, 3), (1, 2, 6, 7, 4, 3)])
def test_wrong_rank_names_the_layout(shape):
    rank = len(shape) - 3
    other = natcupy.na1d if rank != 1 else natcupy.na2d
    with pytest.raises(ValueError, match=r"query must be \[batch, "):
        other(*[torch.zeros(shape)] * 3, 3)


def test_bad_attention_weights():
    v = torch.zeros(2, 6, 7, 2, 4)
    for attn, error in (
        (torch.zeros(2, 6, 7, 4, 8), ValueError),
        (torch.zeros(2, 6, 7, 3, 9), ValueError),
        (torch.zeros(2, 6, 7, 4, 9).double(), TypeError),
        (torch.zeros(2, 6, 6, 4, 9), ValueError),
    ):
        with pytest.raises(error):
            natcupy.na2d_av(attn, v, 3)
    with pytest.raises(ValueError, match="additional values"):
        natcupy.na2d_av(torch.zeros(2, 6, 7, 4, 9), v, 3, additional_values=torch.zeros(2, 1, 2, 4))


WORDS = st.one_of(
    st.text(max_size=20),
    st.sampled_from(['3"', "7;", "7\n#include", "*/", "__asm__", "3;}"]),
    st.binary(max_size=8),
    st.floats(),
    st.none(),
)


@settings(max_examples=300, deadline=None)
@given(
    name=st.sampled_from(["kernel_size", "stride", "dilation", "is_causal", "scale", "backend"]),
    word=WORDS,
)
def test_hostile_words_never_pass(name, word):
    if (name == "scale" and isinstance(word, float)) or (word is None and name != "is_causal"):
        word = b"3"
    if name == "backend" and word in backends.BACKENDS:
        word += ";"
    with pytest.raises((TypeError, ValueError)):
        call({name: word})


def test_checked_windows_are_known_by_more_than_equality():
    good = {"kernel_size": (1, 3), "is_causal": (True, False)}
    for _ in range(2):
        call(good)
    for name, equal in (("kernel_size", (True, 3)), ("is_causal", (1, 0))):
        assert equal == good[name]
        with pytest.raises(TypeError):
            call(good | {name: equal})


def test_backend_torch_is_always_there():
    assert torch.equal(call(backend="torch"), call(backend="torch"))


def test_zero_scale_is_a_scale():
    inputs = tensors(P.but(scale=0.0), torch.float64)
    out = natcupy.na2d(**inputs, kernel_size=(6, 7))
    mean = inputs["value"].mean((1, 2), keepdim=True).repeat_interleave(2, -2)
    assert torch.allclose(out, mean.expand_as(out))
