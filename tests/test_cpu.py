"""backend="cpu" against the float64 oracle: every parameter, dtype, layout, number of threads."""

import multiprocessing
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import oracle
import pytest
import torch
from cpu_problems import attend, cpu_problems
from hypothesis import given, settings
from strategies import Problem, tensors
from tolerances import close

import natcupy
from natcupy.cpu import host, kernels, launch, threads
from natcupy.layouts import joined
from natcupy.neighborhood import Neighborhood

ROOT = Path(__file__).parents[1]
FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
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


def run(p, inputs, cotangents=None):
    """(out, lse, *gradients) of the CPU backend."""
    out, lse = attend(p, inputs, return_lse=True)
    leaves = [x for x in inputs.values() if isinstance(x, torch.Tensor)]
    if cotangents is None:
        return out, lse
    return out, lse, *torch.autograd.grad((out, lse), leaves, cotangents)


def ask_oracle(p, inputs):
    """(expected, cotangents) for `run`."""
    doubles = {
        n: x.detach().double().requires_grad_() if isinstance(x, torch.Tensor) else x
        for n, x in inputs.items()
    }
    results = oracle.attention(**doubles, **p.window)
    gen = torch.Generator().manual_seed(p.seed)
    leaves = [x for x in doubles.values() if isinstance(x, torch.Tensor)]
    dtype = inputs["query"].dtype
    dtypes = dtype, kernels.compute_dtype(dtype)
    cotangents = [
        torch.randn(r.shape, generator=gen, dtype=torch.float64).to(d)
        for r, d in zip(results, dtypes, strict=True)
    ]
    grads = torch.autograd.grad(results, leaves, [c.double() for c in cotangents])
    return (*results, *grads), cotangents


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
    ("p", "adds"),
    [(NAT, False), (PLAIN, True), (TALL, True), (PROBLEMS["long"], True)],
    ids=["one item", "shared key heads", "stripes", "tiles"],
)
def test_gradients_are_stored_in_a_half_type_only_where_nothing_is_added(monkeypatch, p, adds):
    made, empty = [], launch._empty
    monkeypatch.setattr(launch, "_empty", lambda *like: made.append(like) or empty(*like))
    compare(p, torch.bfloat16)
    shape = tensors(p, torch.bfloat16)["key"].shape
    assert ((shape, torch.float32) in made) == adds


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


# ------------------------------------------------------------------------------------------------
# threads and processes


@pytest.fixture
def any_size(monkeypatch):
    """Use all threads for small problems too; put the number of threads back."""
    before = torch.get_num_threads()
    monkeypatch.setattr(kernels, "SMALL", 0)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("p", [STRIPES, VIDEO, PROBLEMS["dilated"], PROBLEMS["long"]], ids=str)
def test_same_bits_for_any_number_of_threads(any_size, p):
    inputs = tensors(p, torch.float32, requires_grad=True)
    _, cotangents = ask_oracle(p, inputs)
    torch.set_num_threads(1)
    expected = run(p, inputs, cotangents)
    for count in (2, 3, 5, 5, 16):
        torch.set_num_threads(count)
        for a, b in zip(run(p, inputs, cotangents), expected, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("p", [STRIPES.but(batch=3), PROBLEMS["long"].but(batch=3)], ids=str)
def test_same_bits_for_any_split_of_the_batch(p):
    inputs = tensors(p, torch.float32, requires_grad=True)
    _, cotangents = ask_oracle(p, inputs)
    whole = run(p, inputs, cotangents)
    names = ["out", "lse", *(n for n, x in inputs.items() if isinstance(x, torch.Tensor))]
    for i in range(3):
        part = {
            n: x[i : i + 1].detach().requires_grad_()
            if isinstance(x, torch.Tensor) and n != "rpb"
            else x
            for n, x in inputs.items()
        }
        one = run(p, part, [c[i : i + 1] for c in cotangents])
        for name, a, b in zip(names, one, whole, strict=True):
            if name != "rpb":  # summed over the batch
                assert torch.equal(a, b[i : i + 1]), name


def test_own_pool_equals_torchs_team(any_size, monkeypatch):
    inputs = tensors(STRIPES, torch.float32)
    torch.set_num_threads(3)
    expected = attend(STRIPES, inputs)
    monkeypatch.setattr(threads, "_forked", True)
    assert torch.equal(attend(STRIPES, inputs), expected)


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads as Linux lists them")
def test_no_threads_beside_torchs(any_size):
    if threads._openmp() is None:
        pytest.skip("torch's OpenMP runtime cannot be reached here")
    inputs = tensors(STRIPES, torch.float32)
    torch.set_num_threads(3)
    torch.randn(300, 300) @ torch.randn(300, 300)
    torch.randn(1 << 18).exp()  # wakes the whole team
    before = len(os.listdir("/proc/self/task"))
    attend(STRIPES, inputs)
    assert len(os.listdir("/proc/self/task")) == before


def _child(inputs, connection):
    connection.send_bytes(attend(STRIPES, inputs).numpy().tobytes())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_forked_process(any_size):
    """After torch's team has worked in the parent; its own operators would wait for ever here."""
    torch.set_num_threads(2)
    inputs = tensors(STRIPES, torch.float32)
    expected = attend(STRIPES, inputs)
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    child = context.Process(target=_child, args=(inputs, there))
    child.start()
    try:
        assert here.poll(60), "the forked process gave no answer within 60 s"
        assert here.recv_bytes() == expected.numpy().tobytes()
    finally:
        child.kill()
        child.join()


class _Outputs(torch.utils.data.Dataset):
    def __init__(self, inputs):
        self.inputs = inputs

    def __len__(self):
        return 4

    def __getitem__(self, i):
        return attend(NAT, self.inputs)


def test_data_loader_workers():
    inputs = tensors(NAT, torch.float32)
    expected = attend(NAT, inputs)
    for batch in torch.utils.data.DataLoader(_Outputs(inputs), batch_size=2, num_workers=2):
        assert all(torch.equal(x, expected) for x in batch)


def test_a_backward_pass_compiles_only_what_the_forward_pass_did_not(monkeypatch, tmp_path):
    monkeypatch.setenv("NATCUPY_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(host, "_functions", {})
    compiled = []
    compile_ = host._compile

    def note(part):
        compiled.append(part)
        return compile_(part)

    monkeypatch.setattr(host, "_compile", note)
    x = torch.ones(1, 9, 9, 1, 11, requires_grad=True)
    natcupy.na2d(x, x, x, 5, backend="cpu").sum().backward()
    common = compiled[0]
    assert compiled == [common, host.Spec(False, common), host.Spec(True, common)]


def test_64_threads_call_a_new_kernel_at_once(monkeypatch):
    monkeypatch.setattr(host, "_functions", {})
    kernels.kernel.cache_clear()
    loads = []
    load = host._load
    monkeypatch.setattr(host, "_load", lambda spec: loads.append(spec) or load(spec))
    inputs = tensors(PLAIN, torch.float32)
    with ThreadPoolExecutor(64) as pool:
        results = list(pool.map(lambda _: attend(PLAIN, inputs), range(64)))
    assert all(torch.equal(x, results[0]) for x in results)
    assert len(loads) == 1


def test_the_gil_is_released(any_size):
    """A Python thread makes progress while another waits inside a kernel."""
    q, k, v = torch.randn(3, 4, 96, 96, 4, 32)
    p = Problem((96, 96), (31, 31), (1, 1), (1, 1), (False, False))
    torch.set_num_threads(1)
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(attend, p, {"query": q, "key": k, "value": v})
        turns = 0
        while not call.done():
            turns += 1
    assert turns > 1000


# ------------------------------------------------------------------------------------------------
# what is installed


def run_python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    ).stdout


def test_an_llvmlite_that_cannot_be_loaded_is_as_none(monkeypatch):
    """Its library raises OSError where a folder is mounted noexec or a system library is absent."""

    class Broken:
        def find_spec(self, name, path=None, target=None):
            if name == "llvmlite.binding":
                raise OSError("Could not find/load shared object file 'libllvmlite.so'")

    monkeypatch.delitem(sys.modules, "llvmlite.binding", raising=False)
    monkeypatch.delattr("llvmlite.binding", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    assert "libllvmlite.so" in host._find_missing() and "backend=" in host._find_missing()


def test_without_llvmlite_the_reason_names_the_remedy():
    out = run_python(
        "import sys; sys.modules['llvmlite'] = None\n"
        "import torch, natcupy.cpu\n"
        "x = torch.zeros(1, 4, 1, 2)\n"
        "print(natcupy.cpu.unsupported_reason(x, x, x, None, None, None, None))"
    )
    assert "natcupy[cpu]" in out and 'backend="torch"' in out


def test_importing_the_package_loads_no_compiler():
    out = run_python(
        "import sys, natcupy.cpu; print('llvmlite' in sys.modules, 'numpy.testing' in sys.modules)"
    )
    assert out.split() == ["False", "False"]


def test_second_process_takes_the_object_from_the_cache_and_needs_no_tools(tmp_path):
    code = (
        "import torch, natcupy.cpu\n"
        "from natcupy.cpu import host\n"
        "from natcupy.neighborhood import Neighborhood\n"
        "{}\n"
        "x = torch.ones(1, 8, 8, 1, 8)\n"
        "hood = Neighborhood((3, 3), (1, 1), (1, 1), (False, False))\n"
        "out, _ = natcupy.cpu.attention(x, x, x, hood, 1.0, None, None, None)\n"
        "print(torch.equal(out, x))"
    )
    where = {"NATCUPY_CACHE_DIR": str(tmp_path), "PATH": "", "NATCUPY_DEBUG": "1"}
    assert run_python(code.format(""), **where).split() == ["True"]
    texts = {file.name.split("-")[0]: file.read_text() for file in (tmp_path / "ir").glob("*.ll")}
    assert "define void @run" in texts["forward"] and "define void @logits1" in texts["common"]
    assert run_python(code.format("host._compile = None"), **where).split() == ["True"]
