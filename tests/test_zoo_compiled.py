"""Compiled models: pictures of any size, and memory layouts that Inductor leaves alone."""

import os
import shutil

import pytest
import torch
from tolerances import close
from torch import nn
from torch._dynamo.backends.common import aot_autograd

from natcupy.zoo import create_model, layers
from natcupy.zoo.layers import ConvDownsampler, ConvTokenizer

NUMBERS = {"embed_dim": 16, "depths": (1, 1), "num_heads": (1, 1), "kernel_size": 3}
CONVOLUTION = torch.ops.aten.convolution.default
needs_compiler = pytest.mark.skipif(
    not (os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")),
    reason="Inductor needs a C++ compiler on a CPU",
)


def small():
    torch.manual_seed(0)
    return create_model("nat_mini", num_classes=3, **NUMBERS)


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("rows", [1, 2, 5, 8])
@pytest.mark.parametrize("columns", [1, 4, 7])
def test_the_product_is_the_convolution(monkeypatch, rows, columns):
    torch.manual_seed(rows * 10 + columns)
    module = ConvDownsampler(6).double()
    x = torch.randn(2, rows, columns, 6, dtype=torch.float64, requires_grad=True)
    leaves = x, *module.parameters()
    plain = module(x)
    weights = torch.randn_like(plain)
    expected = torch.autograd.grad((plain * weights).sum(), leaves)
    monkeypatch.setattr(layers, "_is_laid_out_anew", lambda x: True)
    product = module(x)
    torch.testing.assert_close(product, plain)
    found = torch.autograd.grad((product * weights).sum(), leaves)
    torch.testing.assert_close(found, expected)


def convolutions(call):
    """How many a compiler is given for `call(compile)`'s forward graph."""
    counted = []

    def count(graph, _):
        counted.append(sum(node.target is CONVOLUTION for node in graph.graph.nodes))
        return graph.forward

    backend = aot_autograd(fw_compiler=count, bw_compiler=lambda graph, _: graph.forward)
    call(lambda model: torch.compile(model, backend=backend, fullgraph=True))
    return counted


@pytest.mark.parametrize("grad", [True, False])
def test_no_convolution_follows_the_blocks(grad):
    """Inductor would lay out again all maps before one."""
    model = small().train(grad)
    with torch.set_grad_enabled(grad):
        counted = convolutions(lambda compile: compile(model)(torch.randn(2, 3, 32, 32)))
    stem = sum(isinstance(m, nn.Conv2d) for m in model.patch_embed.modules())
    assert counted == [stem]


@pytest.mark.skipif(not hasattr(torch.compiler, "is_exporting"), reason="this torch cannot tell")
def test_an_exported_model_keeps_its_convolutions():
    model = small().eval()
    program = torch.export.export(model, (torch.randn(2, 3, 32, 32),))
    found = sum("conv2d" in str(node.target) for node in program.graph.nodes)
    assert found == sum(isinstance(m, nn.Conv2d) for m in model.modules())


@needs_compiler
def test_pictures_of_several_sizes():
    """torch.compile takes the size for a variable when it sees a second one."""
    torch.manual_seed(0)
    model = nn.Sequential(ConvTokenizer(3, 16), ConvDownsampler(16)).double()
    compiled = torch.compile(model)
    with torch.no_grad():
        for size in ((64, 64), (72, 40)):
            x = torch.randn(2, 3, *size, dtype=torch.float64)
            close(compiled(x), model(x), torch.float64, f"maps at {size}")
