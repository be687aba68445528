"""The interpreter as a launcher: torch tensors in place, guarded, compiled once."""

import ast
import struct
import sys
from pathlib import Path
from types import SimpleNamespace

import ptxsim
import pytest
import torch
from ptxsim import PtxCheckError
from ptxsim.harness import compile_cuda, why_no_nvrtc
from ptxsim.launcher import PtxLauncher

pytestmark = pytest.mark.skipif(bool(why_no_nvrtc()), reason=why_no_nvrtc())

SOURCE = """
struct Params { const float* x; float* y; int n; int skip; };
extern "C" __global__ void add_one(const Params p) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < p.n && i != p.skip) p.y[i] = p.x[i] + 1.f;
}
extern "C" __global__ void double_it(const Params p) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < p.n) p.y[i] = p.y[i] * 2.f;
}
"""
CPU = torch.device("cpu")


def recipe(entry, x, y, n=None, skip=-1):
    args = struct.pack("<QQii", x.data_ptr(), y.data_ptr(), x.numel() if n is None else n, skip)
    return SimpleNamespace(spec=Spec(entry), grid=(2, 1, 1), block=(64, 1, 1), shared=0, args=args)


class Spec(str):
    """A spec is anything hashable with an entry."""

    @property
    def entry(self):
        return str(self)


compiles = []


def compile_ptx(spec, arch):
    compiles.append((spec, arch))
    return compile_cuda(SOURCE, arch)


def launcher(**options):
    return PtxLauncher(compile_ptx=compile_ptx, **options)


def test_kernels_write_the_tensors_memory():
    run = launcher()
    x, y = torch.randn(100), torch.zeros(100)
    run.observe([x, y, None, "no tensor"])
    run.launch(recipe("add_one", x, y), CPU)
    assert torch.equal(y, x + 1)
    (record,) = run.records
    assert record.issues == () and record.counters.total > 0 and record.seconds > 0
    assert run.device_type == "cpu"


def test_a_spec_is_compiled_once():
    x, y = torch.randn(100), torch.zeros(100)
    run = launcher(buffers=[(x, False), (y, True)])
    before = len(compiles)
    for _ in range(3):
        run.launch(recipe("add_one", x, y), CPU)
    launcher(buffers=[(x, False), (y, True)]).launch(recipe("add_one", x, y), CPU)
    assert len(compiles) <= before + 1


def test_only_the_launch_s_tensors_are_reachable():
    run = launcher()
    x, y = torch.randn(100), torch.zeros(100)
    run.observe([y])
    with pytest.raises(PtxCheckError, match="out-of-bounds") as caught:
        run.launch(recipe("add_one", x, y), CPU)
    assert {i.kind for i in caught.value.issues} == {"out-of-bounds"}
    run.observe([x, y])
    with pytest.raises(PtxCheckError, match=r"out-of-bounds.*sample.cu:5"):
        run.launch(recipe("add_one", x, y, n=101), CPU)


def test_a_view_bounds_its_own_bytes():
    whole = torch.zeros(64)
    x, y = torch.randn(40), whole[8:40]
    run = launcher(strict=False)
    run.observe([x, y])
    run.launch(recipe("add_one", x, y, n=33), CPU)
    (issue,) = run.records[-1].issues
    assert issue.kind == "out-of-bounds" and issue.thread == (32, 0, 0)
    assert torch.equal(y, x[:32] + 1) and not whole[:8].any() and not whole[40:].any()


def test_overlapping_views_are_one_buffer():
    packed = torch.randn(100, 3)
    x, y = packed[:, 0], packed[:, 1]
    run = launcher()
    run.observe([x, y, packed])
    args = recipe("add_one", packed, packed, n=100)
    run.launch(args, CPU)


def test_inputs_are_guarded():
    x, y = torch.randn(100), torch.zeros(100)
    run = launcher(buffers=[(y, False)])
    run.observe([x])
    with pytest.raises(PtxCheckError, match="read-only"):
        run.launch(recipe("add_one", x, y), CPU)
    run = launcher()
    run.protect(y)
    run.observe([x, y])
    with pytest.raises(PtxCheckError, match="read-only"):
        run.launch(recipe("add_one", x, y), CPU)
    assert not y.any()


def test_empty_tensors_count_as_unwritten():
    x = torch.randn(100)
    run = launcher()
    with run.watch_empty():
        y = torch.empty(100)
        assert y.isnan().all()
        z = x.new_empty(100)
    run.observe([x, y])
    with pytest.raises(PtxCheckError, match="uninitialised"):
        run.launch(recipe("double_it", x, y), CPU)
    run.observe([x, z])
    run.launch(recipe("add_one", x, z, skip=7), CPU)
    run.observe([x, z])
    with pytest.raises(PtxCheckError, match=r"uninitialised.*thread \(7, 0, 0\)"):
        run.launch(recipe("double_it", x, z), CPU)
    z[7] = 1.0  # written by torch
    run.observe([x, z])
    run.launch(recipe("double_it", x, z), CPU)
    assert type(torch.empty).__name__ == "builtin_function_or_method"


def test_natcupy_launches_through_it():
    from natcupy.cuda import jit

    a, b, out = torch.randn(100), torch.randn(100), torch.empty(100)
    spec = jit.Spec("vector_add.cu", (("SCALE", 3),))
    args = struct.pack("<QQQq", a.data_ptr(), b.data_ptr(), out.data_ptr(), 100)
    launch = jit.Launch(spec, (2, 1, 1), (64, 1, 1), 0, args)
    run = PtxLauncher()
    with jit.use_sources(Path(__file__).parent), run.active() as active:
        assert active is run and jit.arch_for(CPU).arch == "80"
        jit.launch(launch, CPU, keep_alive=(a, b, out))
        torch.testing.assert_close(out, a + 3 * b)
        with pytest.raises(PtxCheckError, match=r"out-of-bounds.*vector_add.cu:6"):
            jit.launch(launch, CPU, keep_alive=(a, out))
    assert [bool(r.issues) for r in run.records] == [False, True]


def test_the_interpreter_stands_alone():
    """numpy and the standard library; torch for the launcher; natcupy where they are joined."""
    folder = Path(ptxsim.__file__).parent
    for path in folder.glob("*.py"):
        tree = ast.parse(path.read_text())
        top = {id(node) for node in tree.body}
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            for name in (name.split(".")[0] for name in names):
                joined = path.name == "launcher.py" and name == "natcupy" and id(node) not in top
                allowed = {"numpy", *sys.stdlib_module_names}
                allowed |= {"torch"} if path.name == "launcher.py" else set()
                allowed |= {"cupy", "cupy_backends"} if path.name == "harness.py" else set()
                assert name in allowed or joined, f"{path.name}:{node.lineno} imports {name}"
