"""Right numbers: every feature and dtype, every layer of the zoo, random calls, edges, big tensors.

On a GPU all of it; in CI the same bodies on the simulated GPU, on a part and in small.
"""

import importlib.util
import random
from itertools import product
from math import prod

import pytest
import torch
import truth
from kernel_cases import BF16, CASES, F16, F32, F64, Case, cotangents, inputs
from problems import (
    DTYPES,
    FEATURES,
    but,
    check,
    draw,
    feature,
    layer,
    layers_of,
    prepare,
    run,
    zoo_layers,
)
from rigs import SECONDS, both, on, only_gpu
from tolerances import by_rule, close

import natcupy
from natcupy import neighborhood
from natcupy.cuda import plan

TABLE = [(name, dtype) for name in FEATURES for dtype in DTYPES]
IN_CI = {  # the kernels themselves are proven in test_kernels; here the bodies are run
    TABLE.index(row)
    for row in (("bias", BF16), ("additional keys", F64), ("packed", F16), ("everything", F32))
}


@on(("name", "dtype"), TABLE, simulated=IN_CI)
def test_features(rig, name, dtype):
    number = list(FEATURES).index(name)
    ranks = rig.size((1, 2, 3), (1 + number % 3,))
    size = rig.size("full", "small")
    worst = max(check(feature(name, rank, dtype, size), rig) for rank in ranks)
    rig.note(worst=round(worst, 3))


PARTS = 6  # of the zoo's layers, so that one that is cut short takes no others along


@on(("dtype", "part"), tuple(product((F16, BF16, F32), range(PARTS))), simulated=[PARTS])
def test_layers_of_the_zoo(rig, dtype, part):
    """Every map, window and dilation that a model of the zoo has, with and without a bias."""
    layers = rig.size(zoo_layers()[part::PARTS], [(6, 3, 2)])
    cases = [
        layer(*sizes, dtype, rpb) for sizes in layers for rpb in rig.size((True, False), [True])
    ]
    prepare(cases, rig)
    worst = max(check(case, rig) for case in cases)
    rig.note(worst=round(worst, 3), cases=len(cases))


@pytest.mark.parametrize(
    "name", ["nat_mini", "dinat_mini", "dinat_s_tiny", "dinat_isotropic_small"]
)
def test_the_zoo_has_these_layers(name):
    assert layers_of(natcupy.zoo.model_config(name)) <= set(zoo_layers())


CHUNK = 100  # random calls whose kernels are compiled together


def random_calls(rig, dtype, count, tokens, backward):
    """As many random calls as the time allows, held to the error rule."""
    rng, worst, kernels, cases = random.Random(f"{backward} {dtype}"), 0.0, 0, []
    for number in rig.many(count, 2, seconds=2 * SECONDS):
        if number % CHUNK == 0:
            chunk = rig.size(CHUNK, 2)
            cases = [draw(rng, dtype, tokens, number + i) for i in range(chunk)]
            kernels += prepare(cases, rig, backward)
        case = cases[number % CHUNK]
        worst = max(worst, check(case, rig, seed=number, backward=backward))
    rig.note(worst=round(worst, 3), kernels_planned=kernels)


@on(("dtype",), (F16, BF16, F32), simulated=[0])
def test_random_calls_forward(rig, dtype):
    random_calls(rig, dtype, 10_000, rig.size(400, 25), backward=False)


@on(("dtype",), (F16, BF16, F32), simulated=[2])
def test_random_calls_backward(rig, dtype):
    random_calls(rig, dtype, 3_000, rig.size(300, 20), backward=True)


@on(("dtype",), (F16, BF16, F32), simulated=[0])
def test_large_logits(rig, dtype):
    """Logits in the thousands: finite where float64 is, and within the rule for them."""
    for number in range(rig.size(50, 1)):
        case = draw(random.Random(f"large {number}"), dtype, rig.size(200, 16), number)
        tensors = inputs(case, rig.device, number)
        for name in ("query", "key", "additional_keys"):
            if tensors[name] is not None:
                tensors[name] = (tensors[name].detach() * 30).requires_grad_()
        check(case, rig, backward=False, tensors=tensors, kind="overflow")


# ------------------------------------------------------------------------------------------------
# layouts, empty axes, NaNs


LAYOUTS = ("packed", "offset", "heads first")


@on(("dtype",), (F16, F32), simulated=[0])
def test_layouts_give_the_same_bits(rig, dtype):
    case = Case(
        "layout", rig.size((14, 15), (4, 4)), 3, "", heads=2, kv_heads=2, head_dim=32,
        value_dim=32, rpb=True, dtype=dtype,
    )  # fmt: skip
    cotangent = cotangents(case, rig.device)
    expected = run(case, inputs(case, rig.device), *cotangent)
    for layout in rig.size(LAYOUTS, LAYOUTS[1:]):
        other = but(case, layout=layout)
        found = run(other, inputs(other, rig.device), *cotangent)
        if layout == "offset":  # narrower rows run on other kernels: equal by the rule only
            check(other, rig)
            continue
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1]), layout
        for name, gradient in expected[2].items():
            assert torch.equal(found[2][name], gradient), (layout, name)


@both
def test_every_byte_offset(rig):
    """Bases at every multiple of an element within 32 bytes."""
    case = feature("plain", 1, F16, rig.size("full", "small"))
    for offset in rig.size(range(16), (1,)):
        tensors = inputs(case, rig.device)
        moved = {}
        for name, x in tensors.items():
            if x is not None:
                room = torch.zeros(x.numel() + offset, dtype=x.dtype, device=rig.device)
                moved[name] = room[offset:].view(x.shape).copy_(x.detach()).requires_grad_()
            else:
                moved[name] = None
        check(case, rig, tensors=moved)


@on(("axis",), ("batch", "extras"), simulated=None)
def test_empty(rig, axis):
    """Nothing to do gives empty results, and the next call is right."""
    case = feature("bias", 2, F32, rig.size("full", "small"))
    none = but(case, batch=0) if axis == "batch" else case
    tensors = inputs(none, rig.device)
    if axis == "extras":
        for name in ("additional_keys", "additional_values"):
            tensors[name] = torch.zeros(1, 0, 1, 32, device=rig.device).requires_grad_()
    out, lse, gradients = run(none, tensors, *cotangents(none, rig.device))
    assert out.shape == (none.batch, *case.shape, 1, 32) and lse.shape == out.shape[:-1]
    assert all(gradients[n].shape == x.shape for n, x in tensors.items() if x is not None)
    check(case, rig)


@on(("dtype",), (F16, F32), simulated=[1])
def test_nan_map(rig, dtype):
    """A NaN in a key or value reaches exactly the queries whose window holds it."""
    rng = random.Random(12)
    for number in range(rig.size(300, 2)):
        case = but(draw(rng, dtype, rig.size(150, 16), number), extras=0, rpb=False, batch=1)
        case = but(case, heads=1, kv_heads=1)
        tensors = {
            n: None if x is None else x.detach() for n, x in inputs(case, rig.device).items()
        }
        name = rng.choice(("query", "key", "value"))
        token = rng.randrange(prod(case.shape))
        spoilt = tensors[name].clone().flatten(1, -3)
        spoilt[0, token] = (
            rng.choice((float("nan"), float("inf"))) if name == "value" else float("nan")
        )
        tensors[name] = spoilt.unflatten(1, case.shape)
        out, _, _ = run(case, tensors)
        seen, _ = truth.tables(case.shape, case.hood, rig.device)
        expected = seen[:, token] if name != "query" else torch.arange(len(seen)) == token
        found = ~out[0, ..., 0, :].isfinite().flatten(0, -2).any(-1)
        assert torch.equal(found.cpu(), expected.cpu()), (case, name, token)


# ------------------------------------------------------------------------------------------------
# the same bits every time; the same numbers as on a CPU


@on(("dtype", "rpb"), [(F16, True), (BF16, False), (F32, True)], simulated=[0])
def test_determinism(rig, dtype, rpb):
    """250 runs of a batch of 60 with the deterministic switch on, forward and backward."""
    case = layer(rig.size(14, 5), rig.size(7, 3), 1, dtype, rpb)
    case = but(case, batch=rig.size(60, 1), kv_heads=1)
    tensors, cotangent = inputs(case, rig.device), cotangents(case, rig.device)
    torch.use_deterministic_algorithms(True)
    try:
        first = run(case, tensors, *cotangent)
        for _ in rig.many(250, 2):
            again = run(case, tensors, *cotangent)
            same = [torch.equal(a, b) for a, b in zip(first[:2], again[:2], strict=True)]
            same += [torch.equal(again[2][name], x) for name, x in first[2].items()]
            assert all(same), list(first[2])
    finally:
        torch.use_deterministic_algorithms(False)


@both
def test_cpu_and_gpu_agree(rig):
    if importlib.util.find_spec("llvmlite") is None:
        pytest.skip("the CPU backend needs llvmlite, which is not installed")
    from natcupy import cpu

    rng = random.Random(15)
    for number in range(rig.size(100, 2)):
        case = draw(rng, F32, rig.size(300, 20), number)
        tensors = inputs(case, rig.device, number)
        here = {n: None if x is None else x.detach().cpu() for n, x in tensors.items()}
        values = list(here.values())
        out, lse, _ = run(case, tensors)
        with torch.no_grad():
            expected = cpu.attention(*values[:3], case.hood, case.factor, *values[3:], True)
        close(out, expected[0], F32, f"{case!r}: out", backward=True)
        close(lse, expected[1], F32, f"{case!r}: lse", backward=True)


@only_gpu
def test_gradcheck(rig):
    """In float64, numerically; the interpreter does so in test_ops."""
    for case in (feature("everything", rank, F64, "small") for rank in (1, 2, 3)):
        small = but(case, head_dim=3, value_dim=2)
        tensors = list(inputs(small, rig.device).values())

        def call(*given, case=small):
            names = ("query", "key", "value", "rpb", "additional_keys", "additional_values")
            attend, hood = getattr(natcupy, f"na{len(case.shape)}d"), case.hood
            named = dict(zip(names, given, strict=True))
            return attend(
                *(named.pop(n) for n in names[:3]), hood.kernel_size, hood.stride, hood.dilation,
                hood.is_causal, scale=case.scale, return_lse=True, backend="cuda", **named,
            )  # fmt: skip

        assert torch.autograd.gradcheck(call, tensors, fast_mode=True)


@only_gpu
def test_the_table_of_the_interpreter(rig):
    """Every case that CI proves on the interpreter, by the same tolerances' rule."""
    worst = max(check(case, rig) for case in CASES)
    rig.note(worst=round(worst, 3), cases=len(CASES))


# ------------------------------------------------------------------------------------------------
# sizes beyond 32 bits


def part_of(tensors, part):
    """Some images of a batch; the bias belongs to all."""
    return {n: x if n == "rpb" or x is None else x[part] for n, x in tensors.items()}


def sampled(case, tensors, out, gradients, d_out, d_lse, images):
    """Some images of a large batch against the truth of those images alone."""
    for image in images:
        one, part = but(case, batch=1), slice(image, image + 1)
        here, cotangent = part_of(tensors, part), (d_out[part], d_lse[part])
        true = truth.outcome(one, here, *cotangent, F64)
        plain = truth.outcome(one, here, *cotangent, case.dtype)
        what = f"image {image}"
        by_rule(out[part], true[0], plain[0], what)
        for name in ("query", "key", "value"):
            found = gradients[name][part], true[2][name], plain[2][name]
            by_rule(*found, f"{what}: d_{name}", "backward")


def large(case, rig):
    """Random tensors made on the device, large ones too."""
    make = torch.Generator(rig.device).manual_seed(0)

    def random(*shape):
        return torch.randn(shape, dtype=case.dtype, device=rig.device, generator=make)

    rows = (case.batch, *case.shape)
    spans = (2 * k - 1 for k in case.hood.kernel_size)
    tensors = {
        "query": random(*rows, case.heads, case.head_dim),
        "key": random(*rows, case.kv_heads, case.head_dim),
        "value": random(*rows, case.kv_heads, case.value_dim),
        "rpb": random(case.heads, *spans) if case.rpb else None,
        "additional_keys": None,
        "additional_values": None,
    }
    tensors = {n: None if x is None else x.requires_grad_() for n, x in tensors.items()}
    d_out = random(*rows, case.heads, case.value_dim)
    return tensors, d_out, torch.zeros(*rows, case.heads, device=rig.device)


def need(rig, gigabytes):
    free, _ = rig.cuda.mem_get_info()
    if not rig.simulated and free < gigabytes * 1e9:
        pytest.skip(f"it needs {gigabytes} GB of free GPU memory, here are {free / 1e9:.0f}")


@on(("family",), ("portable", "auto"), simulated=[0])
def test_more_than_2_to_31_elements(rig, family):
    """Offsets past 32 bits in every tensor, forward and backward: at the edge, at the end."""
    need(rig, 60)
    side, batch = rig.size((56, 10_720), (5, 2))
    case = but(layer(side, 3, 1, BF16), batch=batch)
    tensors, d_out, d_lse = large(case, rig)
    elements = tensors["query"].numel()
    assert rig.simulated or elements > 2**31
    with plan.use_family(family):
        out, _, gradients = run(case, tensors, d_out, d_lse)
    edge = min(2**31 * batch // max(elements, 2**31), batch - 1)
    images = {0, max(0, edge - 1), edge, batch - 1}
    sampled(case, tensors, out, gradients, d_out, d_lse, images)
    rig.note(elements=elements)
    if not rig.simulated:  # the bias gradient sums over everything: by parts, in float64
        total = torch.zeros_like(gradients["rpb"], dtype=F64)
        for start in range(0, batch, 2_000):
            part = slice(start, start + 2_000)
            here = part_of(tensors, part)
            chunk = but(case, batch=len(here["query"]))
            total += run(chunk, here, d_out[part], d_lse[part])[2]["rpb"].double()
        error = (gradients["rpb"].double() - total).norm() / total.norm()
        assert error < 1e-2, error


@both
def test_one_image_past_32_bits(rig):
    """Packed q, k, v of one image: offsets within it pass 2**31 while each tensor has fewer."""
    need(rig, 40)
    height, width = rig.size((8192, 2800), (14, 14))
    case = Case("huge", (height, width), 7, "", head_dim=32, value_dim=32, dtype=BF16)
    make = torch.Generator(rig.device).manual_seed(0)
    qkv = torch.randn(1, height, width, 3, 1, 32, dtype=BF16, device=rig.device, generator=make)
    assert rig.simulated or qkv.numel() > 2**31
    tensors = dict(zip(("query", "key", "value"), qkv.unbind(-3), strict=True))
    tensors |= dict.fromkeys(("rpb", "additional_keys", "additional_values"))
    out, _, _ = run(case, tensors)
    # The last 4 rows and columns see only the last 7 (+ 6), as they would in a map of those alone.
    corner = {n: None if x is None else x[:, -13:, -13:] for n, x in tensors.items()}
    small = but(case, shape=(13, 13))
    true, plain = (truth.outcome(small, corner, None, None, d, False)[0] for d in (F64, BF16))
    by_rule(out[:, -4:, -4:], true[:, -4:, -4:], plain[:, -4:, -4:], "the far corner")


@on(("batch", "heads"), [(65_536, 1), (35_000, 2), (65_535, 1), (65_537, 1)], simulated=[1])
def test_many_images_and_heads(rig, batch, heads):
    """Batch times heads past the grid's limit of 65,535 on two of its axes."""
    case = but(
        layer(7, rig.size(7, 3), 1, F16), batch=rig.size(batch, 3), heads=heads, kv_heads=heads
    )
    tensors, d_out, d_lse = large(case, rig)
    out, _, gradients = run(case, tensors, d_out, d_lse)
    last = case.batch - 1
    sampled(case, tensors, out, gradients, d_out, d_lse, {0, last // 2, last})
    assert out.isfinite().all() and all(x.isfinite().all() for x in gradients.values())


@on(("length",), (32_767, 32_768, 65_535, 65_536, 65_537), simulated=[0])
def test_long_axes(rig, length):
    """Lengths around 2**15 and 2**16 on one axis, checked at both ends."""
    length = rig.size(length, 40)
    case = Case("long", (length,), 5, "", head_dim=32, value_dim=32, dtype=F16)
    tensors = large(case, rig)[0]
    out, _, _ = run(case, tensors)
    for side in (slice(0, 13), slice(length - 13, length)):
        ends = {n: None if x is None else x[:, side] for n, x in tensors.items()}
        small = but(case, shape=(13,))
        true, plain = (truth.outcome(small, ends, None, None, d, False)[0] for d in (F64, F16))
        keep = slice(0, 11) if side.start == 0 else slice(2, 13)
        by_rule(out[:, side][:, keep], true[:, keep], plain[:, keep], str(side))


def test_the_window_table_is_the_librarys():
    """The oracle that judges here and the library's own table agree on who sees whom."""
    rng = random.Random(3)
    for number in range(20):
        case = draw(rng, F32, 60, number)
        seen, _ = truth.tables(case.shape, case.hood, torch.device("cpu"))
        index, _, valid = neighborhood.neighbor_table(case.shape, case.hood, "cpu")
        other = torch.zeros_like(seen)
        rows = torch.arange(len(seen))[:, None].expand_as(index)
        other[rows[valid], index[valid]] = True
        assert torch.equal(seen, other), case
