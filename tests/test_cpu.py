"""backend="cpu" against the float64 oracle: every parameter, dtype and layout."""

import oracle
import pytest
import torch
from cpu_problems import NAT, PLAIN, PROBLEMS, TALL, ask_oracle, attend, cpu_problems, run
from hypothesis import given, settings
from strategies import Problem, tensors
from tolerances import close

import natcupy
from natcupy.cpu import host, kernels, launch, rounds
from natcupy.layouts import joined
from natcupy.neighborhood import Neighborhood

FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def compare(p, dtype):
    inputs = tensors(p, dtype, requires_grad=True)
    expected, cotangents = ask_oracle(p, inputs)
    got = run(p, inputs, cotangents)
    names = [f"gradient of {n}" for n, x in inputs.items() if isinstance(x, torch.Tensor)]
    for name, a, b in zip(("out", "lse", *names), got, expected, strict=True):
        bound = kernels.compute_dtype(dtype) if name == "lse" else dtype
        assert a.dtype == bound
        close(a, b, bound, name, backward=name.startswith("grad"))


@settings(max_examples=150, deadline=None)
@given(p=cpu_problems())
def test_everything_equals_the_oracle(p):
    compare(p, torch.float32)


@settings(max_examples=25, deadline=None)
@given(p=cpu_problems(channels=((4, 4), (33, 17))))
@pytest.mark.parametrize("dtype", FLOATS[1:])
def test_dtypes_equal_the_oracle(p, dtype):
    compare(p, dtype)


@pytest.mark.parametrize("p", PROBLEMS.values(), ids=PROBLEMS)
def test_larger_maps_equal_the_oracle(p):
    compare(p, torch.float32)


@pytest.mark.parametrize(
    ("p", "places"),
    [(NAT, 0), (PLAIN, 6 * 7), (TALL, 2 * 2 * 7), (PROBLEMS["long"], 2 * 62)],
    ids=["one item", "shared key heads", "stripes", "tiles"],
)
def test_only_incomplete_gradients_of_a_half_type_are_kept_in_float(monkeypatch, p, places):
    seen, allot = [], rounds._allot
    monkeypatch.setattr(rounds, "_allot", lambda *of: seen.append(of[1].partials) or allot(*of))
    compare(p, torch.bfloat16)
    assert set(seen) == ({places} if places else set())


def test_narrow_and_wide_machines(monkeypatch):
    """Code for 16 registers of 32 bytes, 32 of 16 and 32 of 64 bytes, which every host can run."""
    for machine in (host.Machine(16, 32), host.Machine(32, 16), host.Machine(32, 64)):
        monkeypatch.setattr(host, "machine", lambda machine=machine: machine)
        monkeypatch.setattr(host, "_functions", {})
        kernels.kernel.cache_clear()
        for p in (NAT, PLAIN, PROBLEMS["long causal"]):
            compare(p, torch.float32)
        compare(PLAIN, torch.float64)
    kernels.kernel.cache_clear()


@pytest.mark.parametrize("size", [9, 11, 12, 13, 14, 15, 16, 17, 27, 28, 31, 47, 63])
def test_borders_of_lines(monkeypatch, size):
    """Windows that wrap around the ends of a line, of sizes that fill registers and do not."""
    for machine in (host.Machine(16, 32), host.Machine(32, 64)):
        monkeypatch.setattr(host, "machine", lambda machine=machine: machine)
        monkeypatch.setattr(host, "_functions", {})
        kernels.kernel.cache_clear()
        for more in (0, 5, 7, 8, 13, 32):
            compare(Problem((size + more,), (size,), (1,), (1,), (False,), rpb=True), torch.float32)
    kernels.kernel.cache_clear()


@pytest.mark.parametrize("dtype", FLOATS[1:])
def test_rpb_in_float32_beside_another_dtype(dtype):
    inputs = tensors(PLAIN, dtype)
    inputs["rpb"] = torch.randn(inputs["rpb"].shape, requires_grad=True)
    out = attend(PLAIN, inputs)
    close(out, oracle.attention(**inputs, **PLAIN.window)[0], dtype)
    (grad,) = torch.autograd.grad(out.sum(), inputs["rpb"])
    assert grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", FLOATS[2:])
def test_a_bias_in_a_half_type_is_widened_by_the_kernel(dtype):
    inputs = tensors(NAT, dtype)
    wide = inputs | {"rpb": inputs["rpb"].float()}
    assert torch.equal(attend(NAT, inputs), attend(NAT, wide))
    hood = Neighborhood(NAT.kernel_size, NAT.stride, NAT.dilation, NAT.is_causal)
    use = kernels.kernel(NAT.shape, hood, 32, 32, 0, dtype, False, 1)
    assert use.bias(inputs["rpb"]) is inputs["rpb"]
    shorter = use.bias(inputs["rpb"][..., 7:])  # than the vectors that it reads
    assert shorter.dtype == torch.float32 and torch.equal(shorter, wide["rpb"][..., 7:])


def test_kernel_one_returns_the_values():
    q, k, v = torch.randn(3, 2, 5, 6, 3, 8)
    p = PROBLEMS["one key"]
    assert torch.equal(attend(p, {"query": q, "key": k, "value": v}), v)


@pytest.mark.parametrize("tensor", ["query", "key", "value"])
@pytest.mark.parametrize("shape", [(6, 7), (9, 21)])
def test_nan_stays_in_its_windows(tensor, shape):
    p = Problem(shape, (3, 2), (1, 2), (2, 1), (False, True), head_dim=3, value_dim=3)
    where = oracle.pairs(p.shape, *p.window.values())
    tokens = shape[0] * shape[1]
    for token in range(0, tokens, 5):
        inputs = tensors(p, torch.float32)
        inputs[tensor].view(tokens, 3)[token, 1] = float("nan")
        out = attend(p, inputs).view(tokens, 3)
        touched = sorted({q for q, k, _ in where if token == (q if tensor == "query" else k)})
        expected = torch.zeros(tokens, 3, dtype=torch.bool)
        expected[touched, 1 if tensor == "value" else slice(None)] = True
        assert torch.equal(out.isnan(), expected)


def test_nan_gradients_stay_in_their_windows():
    p = Problem((6, 9), (3, 3), (1, 1), (1, 1), (False, False), head_dim=8, value_dim=8)
    where = oracle.pairs(p.shape, *p.window.values())
    inputs = tensors(p, torch.float32, requires_grad=True)
    out = attend(p, inputs)
    cotangent = torch.ones_like(out)
    cotangent.view(54, 8)[31] = float("nan")
    grads = torch.autograd.grad(out, [inputs[n] for n in ("query", "key", "value")], cotangent)
    seen = sorted({k for q, k, _ in where if q == 31})
    for grad, touched in zip(grads, ([31], seen, seen), strict=True):
        expected = torch.zeros(54, dtype=torch.bool)
        expected[touched] = True
        assert torch.equal(grad.view(54, 8).isnan().any(1), expected)


@pytest.mark.parametrize("dtype", FLOATS)
def test_large_logits_stay_finite(dtype):
    inputs = tensors(PLAIN.but(head_dim=32), dtype)
    for name in ("query", "key"):
        inputs[name] = inputs[name] * 1e3
    assert attend(PLAIN, inputs).isfinite().all()


def test_empty_batch_keeps_its_history():
    inputs = tensors(PLAIN.but(batch=0), torch.float32, requires_grad=True)
    out, lse = attend(PLAIN, inputs, return_lse=True)
    assert out.shape == (0, 6, 7, 2, 4) and lse.shape == (0, 6, 7, 2)
    (out.sum() + lse.sum()).backward()
    assert inputs["query"].grad.shape == (0, 6, 7, 2, 4)
    assert torch.equal(inputs["rpb"].grad, torch.zeros_like(inputs["rpb"]))


# ------------------------------------------------------------------------------------------------
# layouts


def layouts(x):
    yield "transposed", x.transpose(1, 2).contiguous().transpose(1, 2)
    padded = torch.nn.functional.pad(x, (1, 2))
    yield "sliced", padded[..., 1:-2]
    buffer = torch.empty(x.numel() + 3, dtype=x.dtype)
    buffer[3:] = x.flatten()
    yield "offset", buffer[3:].view(x.shape)
    yield "flipped", x.flip(1).contiguous().flip(1)
    yield "heads first", x.movedim(-2, 1).contiguous().movedim(1, -2)
    yield "channels apart", x.movedim(-1, 1).contiguous().movedim(1, -1)
    yield "every second", torch.stack((x, x), -1).flatten(-2)[..., ::2]


def test_strided_inputs_equal_contiguous_ones():
    inputs = tensors(PLAIN, torch.float32, requires_grad=True)
    _, cotangents = ask_oracle(PLAIN, inputs)
    expected = run(PLAIN, inputs, cotangents)
    names = [n for n, x in inputs.items() if isinstance(x, torch.Tensor) and x.dim() > 3]
    for name in names:
        for layout, view in layouts(inputs[name].detach()):
            moved = inputs | {name: view.requires_grad_()}
            for a, b in zip(run(PLAIN, moved, cotangents), expected, strict=True):
                assert torch.equal(a, b), (name, layout)
    for i, cotangent in enumerate(cotangents):
        for _, view in layouts(cotangent):
            changed = [view if j == i else c for j, c in enumerate(cotangents)]
            for a, b in zip(run(PLAIN, inputs, changed), expected, strict=True):
                assert torch.equal(a, b)


def test_packed_qkv_is_read_in_place(monkeypatch):
    qkv = torch.randn(2, 9, 10, 3, 4, 16)
    copies = []
    rows = launch._rows
    monkeypatch.setattr(launch, "_rows", lambda x: copies.append(rows(x) is not x) or rows(x))
    p = Problem((9, 10), (3, 5), (1, 1), (1, 1), (False, False))
    query, key, value = qkv.unbind(3)
    out = attend(p, {"query": query, "key": key, "value": value})
    assert copies and not any(copies)
    expected = oracle.attention(query, key, value, **p.window)[0]
    close(out, expected, torch.float32)


def test_packed_inputs_get_packed_gradients():
    parts = torch.randn(2, 9, 8, 3, 2, 8).unbind(-3)
    rpb, weight = torch.randn(2, 9, 9), torch.randn(2, 9, 8, 2, 8)

    def gradients(inputs):
        inputs = [x.detach().requires_grad_() for x in (*inputs, rpb)]
        out = natcupy.na2d(*inputs[:3], 5, rpb=inputs[3], backend="cpu")
        return torch.autograd.grad(out, inputs, weight)

    packed, apart = gradients(parts), gradients([x.clone() for x in parts])
    assert joined(*packed[:3]) is not None and joined(*apart[:3]) is None
    assert all(torch.equal(a, b) for a, b in zip(packed, apart, strict=True))


def test_expanded_inputs_and_gradients():
    p = Problem((6, 7), (3, 3), (1, 1), (1, 1), (False, False))
    x = torch.randn(1, 6, 7, 1, 4, dtype=torch.float64, requires_grad=True)
    wide = x.expand(2, 6, 7, 3, 4)
    out = attend(p, {"query": wide, "key": wide, "value": wide})
    expected, _ = oracle.attention(wide, wide, wide, 3)
    close(out, expected, torch.float64)
    (got,) = torch.autograd.grad(out.sum(), x)
    (want,) = torch.autograd.grad(expected.sum(), x)
    close(got, want, torch.float64, "gradient", backward=True)


def test_strides_past_two_gigabytes():
    """Tokens 2.5 GB apart; only a few pages of the 5 GB are ever touched."""
    p = Problem((5, 6), (3, 3), (1, 1), (1, 1), (False, False), batch=2, head_dim=8, value_dim=8)
    apart = 5 * 2**27
    storage = torch.empty(apart + 4096)
    inputs = tensors(p, torch.float32)
    expected = attend(p, inputs)
    far = storage.as_strided((2, 5, 6, 1, 8), (apart, 48, 8, 8, 1))
    far.copy_(inputs["key"])
    assert torch.equal(attend(p, inputs | {"key": far}), expected)
