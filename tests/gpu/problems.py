"""What the GPU tests run: features, layers of the zoo, random calls; and how a call is checked.

In: nothing. Out: tables of `kernel_cases.Case`, `draw` for random ones, and `check`, which runs a
case in every family of kernels that can and holds it to the error rule.
"""

import contextlib
from dataclasses import replace
from itertools import product

import torch
import truth
from kernel_cases import BF16, F16, F32, F64, Case, cotangents, inputs
from tolerances import by_rule, close

import natcupy
from natcupy.cuda import jit, plan
from natcupy.cuda import run as operators
from natcupy.zoo.config import PATCH_SIZE

DTYPES = (F16, BF16, F32, F64)
SHAPES = {
    "full": {1: (41,), 2: (14, 15), 3: (6, 7, 8)},
    "small": {1: (9,), 2: (5, 6), 3: (4, 3, 5)},
}
FEATURES = {
    "plain": {},
    "bias": {"rpb": True},
    "even window": {"kernel_size": 2, "rpb": True},
    "stride": {"stride": 2, "rpb": True},
    "dilation": {"kernel_size": 2, "dilation": 2, "rpb": True},
    "causal": {"is_causal": True, "rpb": True},
    "grouped heads": {"heads": 4, "kv_heads": 2, "rpb": True},
    "additional keys": {"extras": 3, "rpb": True},
    "wider values": {"value_dim": 48},
    "odd dims": {"head_dim": 33, "value_dim": 7},
    "large dim": {"head_dim": 256, "value_dim": 256},
    "packed": {"heads": 2, "kv_heads": 2, "layout": "packed"},
    "unaligned": {"layout": "offset", "rpb": True},
    "heads first": {"heads": 2, "kv_heads": 2, "layout": "heads first"},
    "everything": {
        "stride": 2, "is_causal": True, "heads": 4, "kv_heads": 2, "extras": 3, "batch": 2,
        "rpb": True, "scale": -0.3,
    },
}  # fmt: skip


def feature(name, rank, dtype, size="full"):
    """A small problem with one feature, or all of them."""
    chosen = {"kernel_size": 3, "head_dim": 32, "value_dim": 32, **FEATURES[name]}
    return Case(f"{name}, {rank} axes", SHAPES[size][rank], why="", dtype=dtype, **chosen)


def zoo_layers():
    """(side, kernel size, dilation) of every attention layer in the zoo, as the operators see it.

    Windows of 7 and 11, pictures of 224 and 384, dilation 1 and the largest that fits; a map
    smaller than its window arrives padded.
    """
    found = set()
    for (pixels, dilated_for), k in product(((224, 224), (224, 384), (384, 384)), (7, 11)):
        for level in range(4):
            side, largest = pixels // 4 >> level, max((dilated_for // 4 >> level) // k, 1)
            found |= {(max(side, k * d), k, d) for d in (1, largest)}
    return tuple(sorted(found))


def layers_of(config):
    """The same of one model's config, at the size of its pictures."""
    patch, found = PATCH_SIZE[config.family], set()
    for level, depth in enumerate(config.depths):
        side, k = (config.img_size or 224) // patch >> level, config.kernel_size
        dilations = config.dilations[level] if config.dilations else (1,) * depth
        found |= {(max(side, k * d), k, d) for d in dilations}
    return found


def layer(side, kernel_size, dilation, dtype, rpb=True):
    """One layer: as many heads as are worth computing."""
    heads = 2 if side < 60 else 1
    return Case(
        f"{side} k{kernel_size} d{dilation}", (side, side), kernel_size, "", dilation=dilation,
        heads=heads, kv_heads=heads, head_dim=32, value_dim=32, rpb=rpb, dtype=dtype,
    )  # fmt: skip


# Few head dims and windows, since each compiles kernels of its own; many of everything else.
HEAD_DIMS = (32, 32, 32, 64, 64, 16, 80, 5)
WINDOWS = (1, 2, 3, 5, 7, 7, 9)
LENGTHS = (7, 8, 9, 15, 16, 17, 31, 32, 33, 56, 63, 64, 65)  # around the edges of tiles


def draw(rng, dtype, tokens, number=0):
    """A random call of at most about `tokens` tokens, near the edges of tiles and windows."""
    rank = rng.choice((1, 2, 2, 2, 3))
    most = max(2, round(tokens ** (1 / rank)))
    axes = []
    for _ in range(rank):
        d = rng.choice((1, 1, 1, 2, 3))
        wide = (13, 32, 37) if rank == 1 else ()
        k = rng.choice([k for k in (*WINDOWS, *wide) if k * d <= most] or [1])
        d = d if k * d <= most else 1
        lengths = [n for n in LENGTHS if k * d <= n <= most]
        near = (k * d, k * d + 1, k * d + rng.randint(0, most), *lengths)
        s = rng.choice((1, 1, rng.randint(1, k)))
        axes.append((min(rng.choice(near), max(most, k * d)), k, s, d, rng.random() < 0.2))
    shape, kernel, stride, dilation, causal = (tuple(column) for column in zip(*axes, strict=True))
    kv_heads, dim = rng.choice((1, 1, 2)), rng.choice(HEAD_DIMS)
    return Case(
        f"random {number}", shape, kernel, "", stride, dilation, causal,
        heads=kv_heads * rng.choice((1, 1, 2, 3)), kv_heads=kv_heads, head_dim=dim,
        value_dim=rng.choice((dim, dim, dim, 32)), extras=rng.choice((0, 0, 0, 2)),
        batch=rng.choice((1, 1, 2)), rpb=rng.random() < 0.6, dtype=dtype,
        layout=rng.choice(("contiguous", "contiguous", "heads first")),
    )  # fmt: skip


def run(case, tensors, d_out=None, d_lse=None):
    """(out, lse, gradients by name) of the public function; no gradients without cotangents."""
    attend, hood = getattr(natcupy, f"na{len(case.shape)}d"), case.hood
    given = {n: x for n, x in tensors.items() if x is not None}
    with torch.set_grad_enabled(d_out is not None):
        out, lse = attend(
            *(given[n] for n in ("query", "key", "value")), hood.kernel_size, hood.stride,
            hood.dilation, hood.is_causal, case.scale, tensors["rpb"], tensors["additional_keys"],
            tensors["additional_values"], return_lse=True, backend="cuda",
        )  # fmt: skip
    if d_out is None:
        return out, lse, {}
    gradients = torch.autograd.grad([out, lse], list(given.values()), [d_out, d_lse])
    return out, lse, dict(zip(given, gradients, strict=True))


class _Planner:
    """A launcher that only notes what would be launched."""

    def __init__(self, target, device_type):
        self._target, self.device_type, self.specs = target, device_type, {}

    def target(self, device):
        return self._target

    def launch(self, recipe, device):
        self.specs[recipe.spec] = None


def prepare(cases, rig, backward=True):
    """Compile in parallel what `check` of these cases will launch; how many kernels that are."""
    target = jit.arch_for(rig.device)
    with jit.use_launcher(_Planner(target, "meta")) as planner:
        pairs = [(case, family) for case in cases for family in families(case)]
        for case, family in pairs:
            tensors = {
                n: None if x is None else x.detach() for n, x in inputs(case, "meta").items()
            }
            hood, given = case.hood, tuple(tensors.values())
            rest = (hood.kernel_size, hood.stride, hood.dilation, hood.is_causal, case.factor)
            with plan.use_family(family), contextlib.suppress(ValueError):
                out, lse = operators.forward(*given, *rest)
                if backward:
                    wanted = [x is not None for x in given]
                    operators.backward(out, lse, *given, out, lse, *rest, wanted)
    jit.compile_many(planner.specs, target)
    return len(planner.specs)


def families(case):
    """Families of kernels to plan with; what is chosen by itself is always one of them."""
    halves, alike = case.dtype in (F16, BF16), case.heads == case.kv_heads
    joined = halves and alike and case.head_dim == 32 and len(case.shape) == 2
    # What small windows have kernels for is tried by others in tests/test_mma.py.
    other = () if is_small(case) else ("mma",)
    return ("portable", *other, "small", *(("apart",) if joined else ()))


def is_small(case):
    """Whether the small-window kernels take a case, but for its dtype and layout."""
    hood = case.hood
    plain = set(hood.stride) == {1} and not any(hood.is_causal) and not case.extras
    alike = case.head_dim == case.value_dim and case.head_dim in (32, 64)
    return len(case.shape) == 2 and plain and alike and max(hood.kernel_size) <= 13


def check(case, rig, seed=0, backward=True, tensors=None, kind=None):
    """Run `case` in every family that can; returns the largest error over the allowed one."""
    tensors = inputs(case, rig.device, seed) if tensors is None else tensors
    d_out, d_lse = cotangents(case, rig.device, seed + 1)
    true = truth.outcome(case, tensors, d_out, d_lse, F64, backward)
    plain = truth.runs(case, tensors, d_out, d_lse, case.dtype, backward)
    worst, ran = 0.0, 0
    for family in families(case):
        with plan.use_family(family):
            try:
                out, lse, gradients = run(case, tensors, *([d_out, d_lse] if backward else []))
            except ValueError as error:
                if "cannot run this call" not in str(error):
                    raise
                continue
        ran += 1
        what = f"{case} ({case!r}) by {family}"
        runs = [run[0] for run in plain]
        worst = max(worst, by_rule(out, true[0], runs, f"{what}: out", kind or "forward"))
        close(lse, true[1], lse.dtype, f"{what}: lse")
        for name, gradient in gradients.items():
            found = gradient, true[2][name], [run[2][name] for run in plain]
            assert gradient.dtype == tensors[name].dtype
            worst = max(worst, by_rule(*found, f"{what}: d_{name}", kind or "backward"))
    assert ran, f"no family of kernels ran {case!r}"
    return worst


def but(case, **changes):
    """The case with changes."""
    return replace(case, **changes)
