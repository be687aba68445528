"""Plans of the tensor-core kernels for any window: which calls they take, in which tiles."""

import importlib.util
import random
from math import prod

import pytest
from kernel_cases import F16
from test_kernels import Interpreter, check
from test_mma import case
from test_plan import problem, unpacked

from natcupy.cuda import heuristics, mma, plan, small
from natcupy.cuda.heuristics import FORWARD, KEYS, QUERIES
from natcupy.neighborhood import inverse_window, window

NVRTC = pytest.mark.skipif(
    importlib.util.find_spec("cupy") is None, reason="NVRTC comes with CuPy, which is not installed"
)


def planned(**changes):
    given = {
        "shape": (4096,), "kernel_size": (63,), "stride": (1,), "dilation": (1,),
        "causal": (False,), "head_dim": 32, "value_dim": 32, "dtype": "BF16", "arch": 90,
    } | changes  # fmt: skip
    return problem(**given)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": "F64"}, "float16, or bfloat16"),
        ({"arch": 75}, "bfloat16 or float32 from sm_80 on"),
        ({"arch": 75, "dtype": "F32"}, "bfloat16 or float32 from sm_80 on"),
        ({"head_dim": 68, "dtype": "F32"}, "at most 64"),
        ({"head_dim": 136}, "at most 128"),
        ({"value_dim": 256}, "at most 128"),
        ({"head_dim": 36}, "multiples of 16 bytes"),
        ({"alignment": 8}, "multiples of 16 bytes"),
        ({"scale": -2e38}, "a scale within float32"),
        ({"head_dim": 128, "value_dim": 128, "dtype": "F16", "arch": 75}, "shared memory"),
        ({"batch": 2**20, "heads": 2**14, "kv_heads": 2**14}, "2**31 - 1 blocks"),
        ({"shape": (2**22,), "kernel_size": (2**21,), "heads": 64, "kv_heads": 64}, "2**32 bytes"),
    ],
    ids=str,
)
def test_calls_they_do_not_take(changes, reason):
    assert not mma.why_not(planned())
    p = planned(**changes)
    assert reason in mma.why_not(p)
    assert plan.forward(p).recipes[0].spec.entry == "na_fwd"
    with plan.use_family("mma"), pytest.raises(ValueError, match="cannot run this call"):
        plan.forward(p)


def test_what_runs_where():
    """Small windows on maps stay with their own kernels, short work with the portable ones."""
    lines = planned()
    assert [r.spec.entry for r in plan.forward(lines).recipes] == ["na_mma_fwd"]
    entries = [r.spec.entry for r in plan.backward(lines, True, False, False).recipes]
    assert entries == ["na_mma_bwd_dq", "na_mma_bwd_dkv"]
    nat = {"shape": (56, 56), "kernel_size": (7, 7), "stride": (1, 1), "dilation": (1, 1),
           "causal": (False, False)}  # fmt: skip
    assert plan.forward(planned(**nat)).recipes[0].spec.entry == "na2d_small_fwd"
    large = planned(**nat | {"kernel_size": (31, 31)})
    assert small.why_not(large) and plan.forward(large).recipes[0].spec.entry == "na_mma_fwd"
    for few in ({"kernel_size": (3,)}, {"kernel_size": (7,), "head_dim": 8, "value_dim": 8}):
        assert not mma.pays(planned(**few))
        assert plan.forward(planned(**few)).recipes[0].spec.entry == "na_fwd"
    assert mma.pays(planned(kernel_size=(3,), extras=64))


def test_where_the_gradient_of_a_bias_is_summed():
    """With the query's, in shared memory unless its tables are too large."""
    for kernel_size, far in ((63, 0), (4001, 1)):
        p = planned(rpb=True, kernel_size=(kernel_size,))
        made = plan.backward(p, True, True, False)
        entries = [r.spec.entry for r in made.recipes]
        assert entries == ["na_mma_bwd_dq", "reduce_partials", "na_mma_bwd_dkv"]
        assert ("FAR", far) in made.recipes[0].spec.constants
        tables = dict((name, count) for name, count, _ in made.scratch)["partial"]
        assert tables * 4 <= max(plan.SCRATCH, 8 * p.heads * p.biases * 4)
        entries = [r.spec.entry for r in plan.backward(p, True, False, False).recipes]
        assert entries == ["na_mma_bwd_dq", "na_mma_bwd_dkv"]


@NVRTC
def test_the_largest_near_and_the_smallest_far_tables():
    """At the limit of an architecture's shared memory, and one number more."""

    def p(k):
        return planned(
            shape=(90, 90), kernel_size=(k, k), stride=(1, 1), dilation=(1, 1),
            causal=(False, False), arch=86, rpb=True, dtype="F16",
        )  # fmt: skip

    first = next(k for k in range(2, 90) if mma.is_far(p(k)))
    assert all(mma.is_far(p(k)) == (k >= first) for k in range(2, 90))
    for k in (first - 1, first):
        with plan.use_family("mma"):
            given = case(f"window {k}", (k + 3, k + 2), k, "", dtype=F16, rpb=True)
            check(given, Interpreter("86"))


def test_tiles_of_blocked_windows_do_not_straddle_them():
    """Where stride = window, 16 x 8 tokens of one block see its 256 keys and no more."""
    for groups, k in (((64, 64), (16, 16)), ((16, 32, 32), (4, 8, 8))):
        tile, _ = mma._tile(groups, k, k)
        assert all(t <= n for t, n in zip(tile, k, strict=True)), tile


def random_problem(rng):
    rank = rng.choice((1, 2, 3))
    kernel, stride, dilation, shape = [], [], [], []
    for _ in range(rank):
        k, d = rng.choice((1, 2, 3, 7, 13, 31, 64)), rng.choice((1, 1, 2, 5))
        kernel.append(k)
        dilation.append(d)
        stride.append(rng.randint(1, k))
        shape.append(rng.choice((k * d, k * d + 1, k * d + rng.randint(0, 100))))
    return problem(
        shape, kernel, stride, dilation, [rng.random() < 0.3 for _ in range(rank)],
        dtype=rng.choice(("F16", "BF16")), batch=rng.choice((1, 2, 128)),
        kv_heads=2, heads=rng.choice((2, 6)), head_dim=rng.choice((8, 32, 64, 80, 128)),
        value_dim=rng.choice((8, 32, 64, 128)), extras=rng.choice((0, 3)),
        rpb=rng.random() < 0.5, arch=rng.choice((80, 86, 90, 120)),
    )  # fmt: skip


def test_every_launch_is_legal():
    """Tiles of whole fragments that reach the end of every group, in shared memory that is there,
    no larger than 32 bits can walk."""
    rng, ran = random.Random(0), 0
    for _ in range(1500):
        p = random_problem(rng)
        if mma.why_not(p):
            continue
        ran += 1
        queries, blocks = mma.query_side(p, False, 1)
        assert blocks == mma._items(p)
        launches = {FORWARD: mma.forward(p).recipes[0], QUERIES: queries}
        for side, recipe in (launches | {KEYS: mma.key_side(p).recipes[0]}).items():
            constants, values = dict(recipe.spec.constants), unpacked(recipe)
            tile = [values[f"geometry.tile.{a}"] for a in range(p.rank)]
            tiles = [values[f"geometry.tiles.{a}"] for a in range(p.rank)]
            tokens = 16 * constants["WARPS"]
            assert recipe.block == (2 * tokens, 1, 1) and tokens in (64, 128)
            part = [values[f"geometry.stage.{a}"] for a in range(p.rank)]
            assert prod(part) == 16 and all(f <= t for t, f in zip(tile, part, strict=True))
            assert tile + part == [1 << n.bit_length() - 1 for n in tile + part]
            assert tokens == prod(tile)
            items = p.batch
            for a, n in enumerate(p.groups):
                assert (tiles[a] - 1) * tile[a] < n <= tiles[a] * tile[a]
                items *= tiles[a] * p.hood.dilation[a]
            heads = p.kv_heads if side == KEYS else p.heads
            assert recipe.grid == (items * heads, 1, 1)
            dim = constants["HEAD_DIM"]
            assert 0 <= constants["QK_PARTS"] * dim - p.head_dim < dim
            assert 0 <= constants["V_PARTS"] * dim - p.value_dim < dim
            assert recipe.shared + mma.OWN_SHARED <= heuristics.block_limit(p.arch)
            assert recipe.shared >= 2 * 64 * 2 * dim * (
                constants["QK_PARTS"] + constants["V_PARTS"]
            )
    assert ran > 700


def test_the_reach_of_a_halo_is_a_bound():
    """What 32 bits of bytes have to hold, against the windows of every tile."""
    rng = random.Random(1)
    for _ in range(150):
        p = random_problem(rng)
        if mma.why_not(p):
            continue
        tile, most = mma.tile(p), [0] * p.rank
        for a, n in enumerate(p.groups):
            rule = (p.hood.kernel_size[a], p.hood.stride[a], p.hood.is_causal[a])
            for length in {n, max(n - 1, 1)}:
                for begin in range(0, length, tile[a]):
                    last = min(begin + tile[a], length) - 1
                    for sees in (window, inverse_window):
                        if length < rule[0]:
                            continue
                        extent = sees(last, length, *rule)[1] - sees(begin, length, *rule)[0]
                        most[a] = max(most[a], (extent - 1) * p.hood.dilation[a])
        for name, strides in p.strides:
            if name in ("query", "key", "value", "d_out"):
                last = sum(m * s for m, s in zip(most, strides[1:-1], strict=True))
                dim = p.head_dim if name in ("query", "key") else p.value_dim
                assert (last + dim) * 2 <= mma._reach(p), (name, p)
