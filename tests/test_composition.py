"""The table of docs/reliability.md, cell by cell: each backend under each of torch's ways.

A cell says "yes" or "raises", and the test does it and sees. The CUDA backend runs on the
simulated GPU.
"""

import copy
import gc
import importlib.util
import re
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from tolerances import close
from torch.autograd import forward_ad

import natcupy

DOC = Path(__file__).parent.parent / "docs" / "reliability.md"
BACKENDS = ("torch", "cpu", "cuda")
NEEDS = {"cpu": "llvmlite", "cuda": "cupy"}


def table():
    """{(row, backend): cell}."""
    text = re.search(r"<!-- composition.*?-->\n(.*?)<!-- end", DOC.read_text(), re.DOTALL)[1]
    rows = [[cell.strip() for cell in line.strip("| \n").split("|")] for line in text.splitlines()]
    head, _, *body = rows
    assert head[-3:] == [f'`"{name}"`' for name in BACKENDS]
    return {(row[0], name): row[1 + i] for row in body for i, name in enumerate(BACKENDS)}


TABLE = table()


@pytest.fixture
def device(request):
    """Where a backend's tensors live here: a backend that is not installed skips."""
    backend = request.node.callspec.params["backend"]
    needed = NEEDS.get(backend)
    if needed and importlib.util.find_spec(needed) is None:
        pytest.skip(f"{needed} is not installed")
    place = nullcontext()
    if backend == "cuda":
        sys.path.insert(0, str(Path(__file__).parent / "gpu"))
        from simulated import SimulatedGpu

        sys.path.pop(0)
        place = SimulatedGpu().active()
    with place:
        yield


def tensors(grad=False):
    make = torch.Generator().manual_seed(0)
    return [torch.randn(1, 5, 1, 4, generator=make).requires_grad_(grad) for _ in range(3)]


def attend(backend, query, key, value):
    return natcupy.na1d(query, key, value, 3, backend=backend)


def define(query, key, value):
    return natcupy.na1d(*(x.double() for x in (query, key, value)), 3, backend="torch")


def autocast(backend):
    with torch.autocast("cpu", torch.bfloat16):
        out = attend(backend, *tensors())
    assert out.dtype == torch.bfloat16
    close(out, define(*tensors()), torch.bfloat16, backward=True)


def double_backward(backend):
    given = tensors(grad=True)

    def second(run):
        (first,) = torch.autograd.grad(run(*given).square().sum(), given[0], create_graph=True)
        return torch.autograd.grad(first.square().sum(), given[0])[0]

    actual = second(lambda *x: attend(backend, *x))
    close(actual, second(define), torch.float32, backward=True)


def jvp(backend):
    query, key, value = tensors()
    _, actual = torch.func.jvp(lambda q: attend(backend, q, key, value), (query,), (value,))
    doubles = [x.double() for x in (query, key, value)]
    _, true = torch.func.jvp(lambda q: define(q, *doubles[1:]), (doubles[0],), (doubles[2],))
    close(actual, true, torch.float32, backward=True)


def vmap(backend):
    query, key, value = tensors()
    queries = torch.stack([query, 2 * query])
    actual = torch.func.vmap(lambda q: attend(backend, q, key, value))(queries)
    true = torch.stack([define(q, key, value) for q in queries])
    close(actual, true, torch.float32)


def inside_a_transform_of_other_tensors(backend):
    """Nothing of a call is wrapped: its tensors only lie where a transformed function sees them."""
    given, x = tensors(grad=True), torch.arange(3.0)

    def outer(x):
        return (x * attend(backend, *given).square().sum()).sum()

    for _ in range(2):  # known calls too
        found = torch.func.grad(outer)(x)
        true = define(*given).square().sum()
        close(found, true.expand(3), torch.float32)
        close(torch.func.vmap(outer)(x), x * true, torch.float32)
        actual, expected = (torch.autograd.grad(y, given) for y in (found.sum(), 3 * true))
        for a, b in zip(actual, expected, strict=True):
            close(a, b, torch.float32, backward=True)


def backward_under_vmap(backend):
    """A vectorized jacobian of a graph that was made outside."""
    given = tensors(grad=True)
    cotangents = torch.randn(3, 1, 5, 1, 4, generator=torch.Generator().manual_seed(1))

    def pull_back(out, cotangents):
        return torch.func.vmap(lambda x: torch.autograd.grad(out, given, x, retain_graph=True))(
            cotangents
        )

    actual = pull_back(attend(backend, *given), cotangents)
    for a, b in zip(actual, pull_back(define(*given), cotangents.double()), strict=True):
        close(a, b, torch.float32, backward=True)


def forward_mode_over_a_backward_pass(backend):
    given = tensors(grad=True)

    def tangents(out):
        with forward_ad.dual_level():
            cotangent = forward_ad.make_dual(torch.ones_like(out), out.detach())
            found = torch.autograd.grad(out, given, cotangent)
            return [forward_ad.unpack_dual(x).tangent for x in found]

    for a, b in zip(tangents(attend(backend, *given)), tangents(define(*given)), strict=True):
        close(a, b, torch.float32, backward=True)


def compiled_jvp(backend):
    torch._dynamo.reset()
    query, key, value = tensors()

    def tangent(query, key, value, run):
        return torch.func.jvp(lambda q: run(q, key, value), (query,), (value,))[1]

    compiled = torch.compile(tangent, backend="eager")
    actual = compiled(query, key, value, lambda *x: attend(backend, *x))
    true = tangent(*(x.double() for x in (query, key, value)), define)
    close(actual, true, torch.float32, backward=True)


def compile_full_graph(backend):
    torch._dynamo.reset()
    compiled = torch.compile(lambda *x: attend(backend, *x), backend="aot_eager", fullgraph=True)
    close(compiled(*tensors()), define(*tensors()), torch.float32)


def export(backend):
    class Net(torch.nn.Module):
        def forward(self, query, key, value):
            return attend(backend, query, key, value)

    program = torch.export.export(Net(), tuple(tensors()))
    close(program.module()(*tensors()), define(*tensors()), torch.float32)


def ddp(backend):
    """One rank is enough to see that hooks and buckets take the gradients."""
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    if not dist.is_available():
        pytest.skip("this torch has no torch.distributed")

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.query = torch.nn.Parameter(tensors()[0])

        def forward(self, key, value):
            return attend(backend, self.query, key, value)

    query, key, value = tensors(grad=True)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = DistributedDataParallel(Net())
        model(key, value).square().sum().backward()
        found = model.module.query.grad
        # Whoever lets go of the group last joins its threads. A model must not: it would do so
        # with Python's lock, which one of them may wait for.
        del model
        gc.collect()
    finally:
        dist.destroy_process_group()
    (true,) = torch.autograd.grad(define(query, key, value).square().sum(), query)
    close(found, true, torch.float32, backward=True)


WAYS = {
    "autocast": autocast,
    "double backward": double_backward,
    "jvp": jvp,
    "vmap": vmap,
    "inside a transform of other tensors": inside_a_transform_of_other_tensors,
    "backward pass under vmap": backward_under_vmap,
    "forward mode over a backward pass": forward_mode_over_a_backward_pass,
    "jvp, compiled": compiled_jvp,
    "compile, full graph": compile_full_graph,
    "export": export,
    "DDP": ddp,
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("way", WAYS)
def test_a_cell_says_what_happens(way, backend, device):
    cell = TABLE[way, backend]
    if cell == "raises":
        with pytest.raises(NotImplementedError, match="backend='torch'"):
            WAYS[way](backend)
    else:
        assert cell == "yes"
        WAYS[way](backend)


def test_no_cell_is_blank():
    """Graphs of the CUDA backend are captured in tests/gpu, on the simulated GPU too."""
    assert all(TABLE.values())
    assert {row for row, _ in TABLE} == {*WAYS, "CUDA graphs"}
    assert TABLE["CUDA graphs", "cuda"] == "yes"


@pytest.mark.parametrize("name", ["nat-mini", "dinat-s-tiny"])
def test_levels_are_sharded_beside_their_downsamplers(name):
    import torch.distributed as dist

    fsdp = pytest.importorskip("torch.distributed.fsdp")
    if not hasattr(torch.cpu.Stream, "record_event"):
        pytest.skip("fully_shard on a CPU needs torch 2.7")
    numbers = {"embed_dim": 8, "depths": (1, 1), "num_heads": (1, 2), "kernel_size": 3}
    whole = natcupy.create_model(name, num_classes=3, **numbers).eval()
    sharded = copy.deepcopy(whole)
    pictures = torch.randn(2, 3, 32, 32)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        for level in sharded.stages:
            for part in filter(None, (level.downsample, level)):
                fsdp.fully_shard(part, mesh=mesh)
        fsdp.fully_shard(sharded, mesh=mesh)
        out = sharded(pictures)
        out.square().sum().backward()
        found = {n: p.grad.full_tensor() for n, p in sharded.named_parameters()}
    finally:
        dist.destroy_process_group()
    true = whole(pictures)
    true.square().sum().backward()
    assert torch.equal(out, true)
    assert all(torch.equal(found[n], p.grad) for n, p in whole.named_parameters())
