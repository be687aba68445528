"""backend="torch" (both of its paths) against the float64 oracle, over every parameter."""

from functools import partial

import oracle
import pytest
import torch
from hypothesis import given, settings
from strategies import Problem, problems, tensors
from tolerances import close

import natcupy
from natcupy import reference, tiles

na1d, na2d, na3d = (partial(f, backend="torch") for f in (natcupy.na1d, natcupy.na2d, natcupy.na3d))
NA = {1: na1d, 2: na2d, 3: na3d}
QK = {1: natcupy.na1d_qk, 2: natcupy.na2d_qk, 3: natcupy.na3d_qk}
AV = {1: natcupy.na1d_av, 2: natcupy.na2d_av, 3: natcupy.na3d_av}

PLAIN_2D = Problem((6, 7), (3, 3), (1, 1), (2, 1), (False, False), rpb=True, extra=2, groups=2)
MIXED_2D = Problem(
    (7, 9), (3, 4), (2, 3), (2, 1), (True, False), batch=2, kv_heads=2, groups=2, rpb=True, extra=1
)


@pytest.fixture(params=["tiles", "gather"])
def path(request, monkeypatch):
    """Run the test on each of the two implementations behind backend="torch"."""
    monkeypatch.setattr(tiles, "applicable", lambda *_: request.param == "tiles")
    return request.param


@settings(max_examples=300, deadline=None)
@given(p=problems())
@pytest.mark.parametrize("tiled", [True, False])
def test_forward_equals_the_oracle(p, tiled):
    inputs = tensors(p)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "applicable", lambda *_: tiled)
        out, lse = NA[p.rank](**inputs, **p.window, return_lse=True)
    expected, expected_lse = oracle.attention(**inputs, **p.window)
    close(out, expected, torch.float64)
    close(lse, expected_lse, torch.float64, "lse")


@settings(max_examples=150, deadline=None)
@given(p=problems())
@pytest.mark.parametrize("tiled", [True, False])
def test_gradients_equal_the_oracle(p, tiled):
    inputs = tensors(p, requires_grad=True)
    leaves = {name: x for name, x in inputs.items() if isinstance(x, torch.Tensor)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "applicable", lambda *_: tiled)
        results = NA[p.rank](**inputs, **p.window, return_lse=True)
    expected = oracle.attention(**inputs, **p.window)
    gen = torch.Generator().manual_seed(p.seed)
    cotangents = [torch.randn(r.shape, generator=gen, dtype=torch.float64) for r in expected]
    got = torch.autograd.grad(results, list(leaves.values()), cotangents)
    want = torch.autograd.grad(expected, list(leaves.values()), cotangents)
    for name, a, b in zip(leaves, got, want, strict=True):
        close(a, b, torch.float64, f"gradient of {name}", backward=True)


@settings(max_examples=60, deadline=None)
@given(p=problems())
def test_unfused_pair_equals_the_oracle(p):
    inputs = tensors(p)
    values = inputs.pop("value"), inputs.pop("additional_values", None)
    logits = QK[p.rank](**inputs, **p.window)
    out = AV[p.rank](logits.softmax(-1), values[0], **p.window, additional_values=values[1])
    inputs |= {"value": values[0]}
    if p.extra:
        inputs["additional_values"] = values[1]
    expected, lse = oracle.attention(**inputs, **p.window)
    close(out, expected, torch.float64)
    close(logits.logsumexp(-1), lse, torch.float64, "logits")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("p", [PLAIN_2D, MIXED_2D], ids=["plain", "mixed"])
def test_dtypes(p, dtype, path):
    inputs = tensors(p, dtype, requires_grad=True)
    out, lse = na2d(**inputs, **p.window, return_lse=True)
    expected, expected_lse = oracle.attention(**inputs, **p.window)
    assert out.dtype == dtype and lse.dtype == torch.float32
    close(out, expected, dtype)
    close(lse, expected_lse, torch.float32, "lse")
    leaves = [x for x in inputs.values() if isinstance(x, torch.Tensor)]
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    got = torch.autograd.grad(out, leaves, cotangent)
    want = torch.autograd.grad(expected, leaves, cotangent.double())
    for a, b in zip(got, want, strict=True):
        assert a.dtype == dtype
        close(a, b.double(), dtype, "gradient", backward=True)


def test_float32_rpb_beside_half_query(path):
    inputs = tensors(PLAIN_2D, torch.bfloat16)
    inputs["rpb"] = torch.randn(inputs["rpb"].shape)
    out = na2d(**inputs, **PLAIN_2D.window)
    close(out, oracle.attention(**inputs, **PLAIN_2D.window)[0], torch.bfloat16)


@pytest.mark.parametrize("p", [PLAIN_2D, MIXED_2D], ids=["plain", "mixed"])
def test_gradcheck_and_gradgradcheck(p, path):
    p = p.but(shape=(4, 4), kernel_size=(2, 3), stride=(2, 1), batch=1, kv_heads=1, head_dim=2)
    inputs = tensors(p.but(value_dim=1, extra=1), requires_grad=True)
    scale = inputs.pop("scale")
    names = list(inputs)

    def run(*values):
        named = dict(zip(names, values, strict=True))
        return na2d(**named, **p.window, scale=scale, return_lse=True)

    assert torch.autograd.gradcheck(run, tuple(inputs.values()), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(run, tuple(inputs.values()))


def test_whole_axis_window_is_full_attention(path):
    q, k, v = torch.randn(3, 2, 5, 6, 3, 8, dtype=torch.float64)
    out = na2d(q, k, v, (5, 6))
    full = torch.nn.functional.scaled_dot_product_attention(
        *(x.flatten(1, 2).transpose(1, 2) for x in (q, k, v))
    )
    close(out, full.transpose(1, 2).unflatten(1, (5, 6)), torch.float64)


def test_stride_equal_to_kernel_is_blocked_attention(path):
    q, k, v = torch.randn(3, 2, 12, 3, 8, dtype=torch.float64)
    out = na1d(q, k, v, kernel_size=4, stride=4)
    blocks = (x.unflatten(1, (3, 4)).transpose(2, 3) for x in (q, k, v))
    expected = torch.nn.functional.scaled_dot_product_attention(*blocks)
    close(out, expected.transpose(2, 3).flatten(1, 2), torch.float64)


def test_kernel_one_returns_the_values(path):
    q, k, v = torch.randn(3, 2, 5, 6, 3, 8, dtype=torch.float64)
    assert torch.equal(na2d(q, k, v, kernel_size=1), v)


def test_border_windows_are_shifted_not_cut(path):
    """The corner query of a 3x3 window sees nine keys, the same nine as its inner neighbor."""
    v = torch.arange(25.0).view(1, 5, 5, 1, 1)
    q = torch.zeros(1, 5, 5, 1, 1)
    out = na2d(q, q, v, kernel_size=3)[0, :, :, 0, 0]
    for corner, inner, mean in ((0, 1, 6.0), (4, 3, 18.0)):
        for place in (corner, inner):
            close(out[place, place], torch.tensor(mean), torch.float32)


@pytest.mark.parametrize("backend", [None, "torch"])
@pytest.mark.parametrize("tensor", ["query", "key", "value"])
def test_nan_stays_in_its_windows(tensor, backend):
    """With the path chosen as users get it."""
    p = Problem((6, 7), (3, 2), (1, 2), (2, 1), (False, True), head_dim=3, value_dim=3)
    where = oracle.pairs(p.shape, *p.window.values())
    for token in range(0, 42, 5):
        for bad in (float("nan"), float("inf")):
            inputs = tensors(p, torch.float32)
            inputs[tensor].view(42, 3)[token, 1] = bad
            out = natcupy.na2d(**inputs, **p.window, backend=backend).view(42, 3)
            touched = {q for q, k, _ in where if token == (q if tensor == "query" else k)}
            expected = torch.zeros(42, 3, dtype=torch.bool)
            if tensor == "value":
                expected[sorted(touched), 1] = True
            else:
                expected[sorted(touched)] = True
            affected = ~out.isfinite()
            assert not (affected & ~expected).any()
            if bad != bad:
                assert torch.equal(affected, expected)


def test_large_logits_stay_finite(path):
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        inputs = tensors(PLAIN_2D.but(head_dim=32), dtype)
        for name in ("query", "key"):
            inputs[name] = inputs[name] * 1e3
        out = na2d(**inputs, **PLAIN_2D.window)
        expected, _ = oracle.attention(**inputs, **PLAIN_2D.window)
        assert out.isfinite().all()
        if dtype != torch.float32:  # float32 logits of 1e7 are too coarse to compare weights
            assert expected.isfinite().all()


@pytest.mark.parametrize("batch", [0])
def test_empty_batch_keeps_its_history(batch, path):
    inputs = tensors(PLAIN_2D.but(batch=batch), torch.float32, requires_grad=True)
    out, lse = na2d(**inputs, **PLAIN_2D.window, return_lse=True)
    assert out.shape == (0, 6, 7, 2, 4) and lse.shape == (0, 6, 7, 2)
    (out.sum() + lse.sum()).backward()
    assert inputs["query"].grad.shape == (0, 6, 7, 2, 4)
    assert torch.equal(inputs["rpb"].grad, torch.zeros_like(inputs["rpb"]))


def layouts(x):
    """The same values in other strides: transposed, sliced, offset, flipped, channels apart."""
    yield "transposed", x.transpose(1, 2).contiguous().transpose(1, 2)
    padded = torch.nn.functional.pad(x, (1, 2))
    yield "sliced", padded[..., 1:-2]
    buffer = torch.empty(x.numel() + 3, dtype=x.dtype)
    buffer[3:] = x.flatten()
    yield "offset", buffer[3:].view(x.shape)
    yield "flipped", x.flip(1).contiguous().flip(1)
    yield "heads first", x.movedim(-2, 1).contiguous().movedim(1, -2)


def test_strided_inputs_equal_contiguous_ones(path):
    inputs = tensors(PLAIN_2D, torch.float32)
    expected = na2d(**inputs, **PLAIN_2D.window)
    for name in ("query", "key", "value"):
        for layout, view in layouts(inputs[name]):
            out = na2d(**(inputs | {name: view}), **PLAIN_2D.window)
            assert torch.equal(out, expected), (name, layout)


def test_expanded_inputs_and_gradients(path):
    q = torch.randn(1, 6, 7, 1, 4, dtype=torch.float64, requires_grad=True)
    out = na2d(q.expand(2, 6, 7, 3, 4), *[q.expand(2, 6, 7, 3, 4)] * 2, 3)
    expected, _ = oracle.attention(q.expand(2, 6, 7, 3, 4), *[q.expand(2, 6, 7, 3, 4)] * 2, 3)
    (got,) = torch.autograd.grad(out.sum(), q)
    (want,) = torch.autograd.grad(expected.sum(), q)
    close(out, expected, torch.float64)
    close(got, want, torch.float64, "gradient", backward=True)


def test_inputs_are_left_alone(path):
    inputs = tensors(PLAIN_2D, torch.float32)
    before = {n: x.clone() for n, x in inputs.items() if isinstance(x, torch.Tensor)}
    out = na2d(**inputs, **PLAIN_2D.window)
    for name, x in before.items():
        assert torch.equal(inputs[name], x) and inputs[name]._version == 0
        assert out.untyped_storage().data_ptr() != inputs[name].untyped_storage().data_ptr()


def test_autocast_casts_every_input():
    inputs = tensors(PLAIN_2D, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = na2d(**inputs, **PLAIN_2D.window)
        mixed = na2d(**(inputs | {"value": inputs["value"].bfloat16()}), **PLAIN_2D.window)
        double = na2d(**tensors(PLAIN_2D), **PLAIN_2D.window)
    assert out.dtype == mixed.dtype == torch.bfloat16 and double.dtype == torch.float64
    half = {
        n: x.bfloat16() if n != "rpb" and isinstance(x, torch.Tensor) else x
        for n, x in inputs.items()
    }
    assert torch.equal(out, na2d(**half, **PLAIN_2D.window))


def test_memory_grows_with_the_window_not_with_the_map():
    """65,536 tokens: a full score matrix would need 17 GB."""
    q, k, v = torch.randn(3, 1, 65536, 1, 4)
    for finite in (True, False):
        if not finite:
            v = v.clone()
            v[0, 0] = float("nan")
        out = na1d(q, k, v, kernel_size=5, dilation=3)
        assert out[0, 100:].isfinite().all() and out.shape == q.shape


def test_inference_mode_leaves_nothing_behind(path):
    inputs = tensors(PLAIN_2D.but(shape=(8, 9)), torch.float32, requires_grad=True)
    with torch.inference_mode():
        quiet = na2d(**inputs, **PLAIN_2D.window)
    out = na2d(**inputs, **PLAIN_2D.window)
    out.sum().backward()
    assert torch.equal(out, quiet) and inputs["query"].grad is not None


def test_reference_rejects_nothing():
    assert reference.unsupported_reason(None) is None
