"""backend="cpu" on many threads, in other processes, and without its compiler."""

import multiprocessing
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from cpu_problems import NAT, PLAIN, PROBLEMS, STRIPES, VIDEO, ask_oracle, attend, run
from strategies import Problem, tensors

import natcupy
from natcupy.cpu import host, kernels, threads

ROOT = Path(__file__).parents[1]


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
    attend(p, {"query": q[:1], "key": k[:1], "value": v[:1]})  # compiles
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
