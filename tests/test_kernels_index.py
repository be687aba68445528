"""The device's index arithmetic against Python's: windows, and offsets past 2**31 and 2**40."""

import importlib.util
import random
from importlib import resources

import pytest
import torch
from ptxsim.launcher import PtxLauncher

from natcupy import neighborhood
from natcupy.cuda import jit, params

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("cupy") is None, reason="NVRTC comes with CuPy, which is not installed"
)

WINDOWS = """
#include "neighborhood.cuh"
struct Params { const int* cases; int* out; int count; };
extern "C" __global__ void windows(const Params p) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= p.count) return;
    const int* c = p.cases + 6 * i;
    const Interval seen = window(c[0], c[1], c[2], c[3], c[4]);
    const Interval back = inverse_window(c[0], c[1], c[2], c[3], c[4]);
    int* o = p.out + 5 * i;
    o[0] = seen.begin; o[1] = seen.end; o[2] = back.begin; o[3] = back.end;
    o[4] = rpb_index(c[5], c[0], c[2]);
}
"""

OFFSETS = """
#include "common.cuh"
#include "neighborhood.cuh"
#include "tile.cuh"
struct Params { Geometry geometry; View view; const long long* cases; long long* out; int count; };
extern "C" __global__ void offsets(const Params p) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= p.count) return;
    const long long* c = p.cases + 3 * i;
    const Geometry& g = p.geometry;
    Item item;
    find_item(g, c[0], item);
    int position[RANK];
    Interval seen[RANK];
    const bool inside = own_token<false>(g, item, (int)c[2], position, seen);
    long long* o = p.out + 3 * i;
    const Rows rows = rows_of(p.view, g, item, (int)c[1]);
    o[0] = inside ? (long long)rows.at(position) - (long long)p.view.data : -1;
    o[1] = inside ? token_number(g, item, position) : -1;
    o[2] = tokens_per_image(g);
}
"""


def launch(tmp_path, name, text, constants, fields, values, tensors, count):
    """Compile `text` beside the package's headers and run it on one thread per case."""
    for header in ("common.cuh", "neighborhood.cuh", "tile.cuh"):
        text_of = (resources.files("natcupy.kernels") / header).read_text()
        (tmp_path / header).write_text(text_of)
    (tmp_path / f"{name}.cu").write_text(text)
    params.PARAMS[name] = fields
    try:
        args, pointers = params.pack(name, values)
    finally:
        del params.PARAMS[name]
        params.layout.cache_clear()
    args = bytearray(args)
    for pointer, offset in pointers:
        address = tensors[pointer].data_ptr() if pointer in tensors else 0
        args[offset : offset + 8] = address.to_bytes(8, "little")
    spec = jit.Spec(f"{name}.cu", constants)
    with jit.use_sources(tmp_path), jit.use_launcher(PtxLauncher("80")):
        jit.launch(
            jit.Launch(spec, (-(-count // 128), 1, 1), (128, 1, 1), 0, bytes(args)),
            torch.device("cpu"),
            keep_alive=tensors.values(),
        )


def test_windows_are_pythons(tmp_path):
    """Every position of every axis up to 20 tokens, and random ones on long axes."""
    rng, cases = random.Random(0), []
    for length in range(1, 21):
        for kernel_size in range(1, length + 1):
            stride = rng.randint(1, kernel_size)
            causal = rng.random() < 0.5
            cases += [(p, length, kernel_size, stride, causal) for p in range(length)]
    for _ in range(2000):
        length = rng.randint(1, 2**30)
        kernel_size = rng.randint(1, length)
        stride = rng.randint(1, kernel_size)
        cases.append((rng.randrange(length), length, kernel_size, stride, rng.random() < 0.5))
    expected = []
    for p, length, k, s, causal in cases:
        seen = neighborhood.window(p, length, k, s, causal)
        back = neighborhood.inverse_window(p, length, k, s, causal)
        expected.append((*seen, *back, neighborhood.rpb_index(seen[0], p, k)))
    rows = [(*case, e[0]) for case, e in zip(cases, expected, strict=True)]
    given = torch.tensor(rows, dtype=torch.int32)
    out = torch.zeros(len(cases), 5, dtype=torch.int32)
    fields = (("cases", "pointer", 1), ("out", "pointer", 1), ("count", "int", 1))
    launch(tmp_path, "windows", WINDOWS, (), fields, {"count": len(cases)},
           {"cases": given, "out": out}, len(cases))  # fmt: skip
    assert torch.equal(out, torch.tensor(expected, dtype=torch.int32))


@pytest.mark.parametrize(
    ("shape", "dilation", "tile", "strides"),
    [
        ((2**15, 2**15), (3, 5), (8, 16), (2**47, 2**32 + 2**20, 2**16 + 2, 2**9)),
        ((2**16 + 1, 2**13 + 3), (1, 1), (7, 9), (2**46, 2**31 + 32, 2**15, 64)),
        ((2**9, 2**10, 2**11), (2, 1, 7), (2, 4, 8), (2**44, 2**36, 2**24 + 8, 2**12, 128)),
        ((2**30,), (2**7,), (256,), (2**45, 2**12 + 2, 96)),
    ],
    ids=["dilated", "65537", "volume", "line"],
)
def test_offsets_are_exact(shape, dilation, tile, strides, tmp_path):
    """2,500 random tokens of maps with up to 2**30 tokens and strides up to 2**47."""
    rng, rank, count = random.Random(3), len(shape), 2500
    batch, *axes, head = strides
    groups = [-(-n // d) for n, d in zip(shape, dilation, strict=True)]
    tiles = [-(-n // t) for n, t in zip(groups, tile, strict=True)]
    per_image = 1
    for n, d in zip(tiles, dilation, strict=True):
        per_image *= n * d
    slots = 1
    for t in tile:
        slots *= t
    cases, expected = [], []
    for _ in range(count):
        image, h, slot = rng.randrange(16), rng.randrange(64), rng.randrange(slots)
        number = rng.randrange(per_image)
        cases.append((image * per_image + number, h, slot))
        rest, group, begin = number, [0] * rank, [0] * rank
        for a in reversed(range(rank)):
            rest, group[a] = divmod(rest, dilation[a])
        for a in reversed(range(rank)):
            rest, at = divmod(rest, tiles[a])
            begin[a] = at * tile[a]
        token = []
        for a in reversed(range(rank)):
            slot, at = divmod(slot, tile[a])
            token.insert(0, (begin[a] + at) * dilation[a] + group[a])
        if any(t >= n for t, n in zip(token, shape, strict=True)):
            expected.append((-1, -1))
            continue
        place = 0
        for t, n in zip(token, shape, strict=True):
            place = place * n + t
        offset = image * batch + h * head + sum(t * s for t, s in zip(token, axes, strict=True))
        expected.append((offset * 2, place))  # two bytes per number
    tokens = 1
    for n in shape:
        tokens *= n

    def per_axis(name, entries):
        entries = [*entries, *[1] * (3 - rank)]
        return {f"{name}.{a}": entry for a, entry in enumerate(entries)}

    values = {
        **per_axis("geometry.length", shape),
        **per_axis("geometry.kernel_size", [3] * rank),
        **per_axis("geometry.stride", [1] * rank),
        **per_axis("geometry.dilation", dilation),
        **per_axis("geometry.causal", [0] * rank),
        **per_axis("geometry.tile", tile),
        **per_axis("geometry.tiles", tiles),
        **per_axis("geometry.stage", [1] * rank),
        "geometry.capacity": 1,
        "view.batch": batch,
        "view.head": head,
        **per_axis("view.axis", axes),
        "count": count,
    }
    given = torch.tensor(cases, dtype=torch.int64)
    out = torch.zeros(count, 3, dtype=torch.int64)
    fields = (
        ("geometry", "Geometry", 1), ("view", "View", 1), ("cases", "pointer", 1),
        ("out", "pointer", 1), ("count", "int", 1),
    )  # fmt: skip
    constants = (("SCALAR", "F16"), ("ACCESS", 16), ("LANES", 4), ("RANK", rank))
    launch(tmp_path, "offsets", OFFSETS, constants, fields, values,
           {"cases": given, "out": out}, count)  # fmt: skip
    assert out.tolist() == [[*e, tokens] for e in expected]
