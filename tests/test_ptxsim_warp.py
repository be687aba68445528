"""What threads do together: shuffles, votes, reductions and barriers."""

import numpy as np
import pytest
from ptxsim import PtxFaultError, PtxParseError, load
from ptxsim.harness import run, warp, warp_kernel

RNG = np.random.default_rng(3)
LANE = np.arange(32)


def shuffled(mode, values, b, clamp, segment):
    """The PTX manual's description of shfl, thread by thread."""
    out, flags = [], []
    for lane in range(32):
        most = (lane & segment) | (clamp & ~segment & 31)
        least = lane & segment
        j, ok = {
            "up": (lane - b, lane - b >= most),
            "down": (lane + b, lane + b <= most),
            "bfly": (lane ^ b, (lane ^ b) <= most),
            "idx": (least | (b & ~segment & 31), (least | (b & ~segment & 31)) <= most),
        }[mode]
        out.append(values[j if ok else lane])
        flags.append(ok)
    return np.array(out), np.array(flags)


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
@pytest.mark.parametrize("width", [32, 16, 8, 1])
@pytest.mark.parametrize("by", [0, 1, 5, 16])
def test_shfl(mode, width, by):
    values = RNG.integers(0, 2**32, 32).astype(np.uint32)
    clamp = 0 if mode == "up" else 31
    c = clamp | (32 - width & 31) << 8
    body = f"shfl.sync.{mode}.b32 %o|%p1, %a, {by}, {c}, -1; selp.u32 %q, 1, 0, %p1;"
    got, flag = warp(body, values)
    want, ok = shuffled(mode, values, by, clamp, 32 - width & 31)
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(flag, ok)


def test_shfl_with_a_distance_per_thread():
    values, by = (RNG.integers(0, 32, 32).astype(np.uint32) for _ in range(2))
    got, _ = warp("shfl.sync.idx.b32 %o, %a, %b, 31, -1;", values, by)
    np.testing.assert_array_equal(got, values[by])


def test_shfl_within_half_of_a_warp():
    values = RNG.integers(0, 2**32, 32).astype(np.uint32)
    body = (
        "setp.ge.u32 %p1, %l, 16; @%p1 bra SKIP;\n"
        "shfl.sync.bfly.b32 %o, %a, 3, 31, 0xFFFF;\nSKIP:\n"
    )
    got, _ = warp(body, values)
    np.testing.assert_array_equal(got, np.where(LANE < 16, values[LANE ^ 3], 0))


def test_threads_that_come_late_are_waited_for():
    """One half reaches the shuffle through a longer path that lies behind it in the text."""
    values = RNG.integers(0, 2**32, 32).astype(np.uint32)
    body = (
        "setp.ge.u32 %p1, %l, 16; @%p1 bra FAR;\nbra MEET;\n"
        "MEET: mov.u32 %r1, 1;\nshfl.sync.bfly.b32 %o, %a, 16, 31, -1; bra END;\n"
        "FAR: mov.u32 %r2, 2; bra MEET2;\nMEET2: bra MEET;\nEND:\n"
    )
    got, _ = warp(body, values)
    np.testing.assert_array_equal(got, values[LANE ^ 16])


def test_votes_and_masks():
    a = RNG.integers(0, 4, 32).astype(np.int32)
    got, q = warp("setp.eq.s32 %p1, %a, 1; vote.sync.ballot.b32 %o, %p1, -1; activemask.b32 %q;", a)
    want = sum(1 << int(k) for k in np.flatnonzero(a == 1))
    assert (got == want).all() and (q == 0xFFFFFFFF).all()
    for mode, fn in (("all", np.all), ("any", np.any)):
        for value in (a, np.ones_like(a), np.zeros_like(a)):
            body = (
                f"setp.eq.s32 %p1, %a, 1; vote.sync.{mode}.pred %p2, %p1, -1;"
                "selp.u32 %o, 1, 0, %p2; vote.sync.uni.pred %p3, !%p1, -1; selp.u32 %q, 1, 0, %p3;"
            )
            got, q = warp(body, value)
            assert (got == fn(value == 1)).all()
            assert (q == (len(set(value == 1)) == 1)).all()


def test_activemask_of_a_branch():
    body = "setp.lt.u32 %p1, %l, 5; @!%p1 bra SKIP;\nactivemask.b32 %o;\nSKIP:\n"
    got, _ = warp(body, np.zeros(32, np.uint32))
    np.testing.assert_array_equal(got, np.where(LANE < 5, 31, 0))


def test_match():
    a = RNG.integers(0, 5, 32).astype(np.uint32)
    got, _ = warp("match.any.sync.b32 %o, %a, -1;", a)
    want = [sum(1 << int(k) for k in np.flatnonzero(a == v)) for v in a]
    assert got.tolist() == want
    body = "match.all.sync.b32 %o|%p1, %a, -1; selp.u32 %q, 1, 0, %p1;"
    for values, truth in ((a, 0), (np.full(32, 7, np.uint32), 1)):
        got, q = warp(body, values)
        assert (q == truth).all() and (got == (0xFFFFFFFF if truth else 0)).all()


@pytest.mark.parametrize("name", ["add", "min", "max", "and", "or", "xor"])
def test_redux(name):
    a = RNG.integers(-1000, 1000, 32).astype(np.int32)
    kind = "b32" if name in ("and", "or", "xor") else "s32"
    got, _ = warp(f"redux.sync.{name}.{kind} %o, %a, -1;", a)
    fn = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and,
          "or": np.bitwise_or, "xor": np.bitwise_xor}[name]  # fmt: skip
    assert (got.view(np.int32) == fn.reduce(a)).all()


def test_elect_and_lane_masks():
    got, q = warp(
        "elect.sync %o|%p1, -1; selp.u32 %q, 1, 0, %p1; mov.u32 %r1, %lanemask_lt;"
        "popc.b32 %r2, %r1; add.u32 %o, %o, %r2;",
        np.zeros(32, np.uint32),
    )
    np.testing.assert_array_equal(q, LANE == 0)
    np.testing.assert_array_equal(got, LANE)


@pytest.mark.parametrize("seed", [None, 1, 2])
def test_barrier_carries_values_between_warps(seed):
    a = RNG.integers(0, 2**32, 128).astype(np.uint32)
    body = (
        "shl.b32 %r1, %l, 2; mov.u32 %r2, sh; add.u32 %r1, %r1, %r2; st.shared.b32 [%r1], %a;\n"
        "bar.sync 0;\nxor.b32 %r3, %l, 96; shl.b32 %r3, %r3, 2; add.u32 %r3, %r3, %r2;"
        "ld.shared.b32 %o, [%r3];"
    )
    got, _ = warp(body, a, threads=128, shared=512, seed=seed)
    np.testing.assert_array_equal(got, a[np.arange(128) ^ 96])


@pytest.mark.parametrize("seed", [None, 4])
def test_named_barrier_and_arrive(seed):
    """Warp 0 produces and only arrives; warp 1 waits for it; the others stay away."""
    body = (
        "shl.b32 %r1, %l, 2; mov.u32 %r2, sh; add.u32 %r4, %r1, %r2; shr.u32 %r5, %l, 5;\n"
        "setp.ne.u32 %p1, %r5, 0; @%p1 bra CONSUME;\n"
        "st.shared.b32 [%r4], %a; bar.arrive 3, 64; bra END;\n"
        "CONSUME: setp.ne.u32 %p2, %r5, 1; @%p2 bra END;\n"
        "bar.sync 3, 64; ld.shared.b32 %o, [%r4+-128];\nEND:\n"
    )
    a = RNG.integers(1, 2**32, 128).astype(np.uint32)
    got, _ = warp(body, a, threads=128, shared=512, seed=seed)
    np.testing.assert_array_equal(got[32:64], a[:32])
    assert not got[64:].any() and not got[:32].any()


@pytest.mark.parametrize("kind", ["popc", "and", "or"])
def test_bar_red(kind):
    a = RNG.integers(0, 3, 128).astype(np.int32)
    if kind == "popc":
        body = "setp.eq.s32 %p1, %a, 1; bar.red.popc.u32 %o, 0, %p1;"
        want = np.count_nonzero(a == 1)
    else:
        body = f"setp.eq.s32 %p1, %a, 1; bar.red.{kind}.pred %p2, 0, !%p1; selp.u32 %o, 1, 0, %p2;"
        want = {"and": np.all, "or": np.any}[kind](a != 1)
    got, _ = warp(body, a, threads=128)
    assert (got == want).all()


def test_threads_that_ended_do_not_hold_a_barrier():
    body = "setp.ge.u32 %p1, %l, 40; @%p1 ret;\nbar.sync 0; mov.u32 %o, 5; mov.u32 %q, 6;"
    n = 64
    arrays = {"o": (np.zeros(n, np.uint32), "inout"), "q": (np.zeros(n, np.uint32), "inout")}
    got, machine = run(warp_kernel(body, 0), (1, 1, 1), (n, 1, 1), arrays)
    assert not machine.issues.kinds()
    np.testing.assert_array_equal(got["o"], np.where(np.arange(n) < 40, 5, 0))


def test_what_is_not_known_is_refused_with_its_line():
    with pytest.raises(PtxParseError, match=r"PTX line \d+: instruction not handled: frobnicate"):
        load(warp_kernel("frobnicate.b32 %o, %a;"))
    with pytest.raises(PtxParseError, match="neither register, literal nor variable"):
        load(warp_kernel("add.u32 %o, %a, %nothing;"))
    with pytest.raises(PtxParseError, match="no entry 'other'"):
        load(warp_kernel(""), "other")


def test_wrong_arguments_are_refused():
    arrays = {"o": (np.zeros(32, np.uint32), "out")}
    with pytest.raises(PtxFaultError, match="takes 2 parameters, got 1"):
        run(warp_kernel("", 0), (1, 1, 1), (32, 1, 1), arrays)
