"""Planted bugs: a right kernel passes, and each of these small mistakes is caught.

Every entry of the table changes the sample's CUDA source or its PTX in one place and names what
must show it: a kind of issue, a wrong number, or bank conflicts.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from ptxsim import Checks, Machine, Memory, PtxError, load
from ptxsim.harness import compile_cuda, why_no_nvrtc
from ptxsim.numerics import bf16_to_f32, f32_to_bf16
from ptxsim.tensormap import TensorMap

pytestmark = pytest.mark.skipif(bool(why_no_nvrtc()), reason=why_no_nvrtc())

SAMPLES = Path(__file__).parent / "ptxsim" / "samples"
ATTENTION = (SAMPLES / "attention.cu").read_text()
HOPPER = (SAMPLES / "hopper.cu").read_text()
LENGTH, HEADS, WINDOW, D = 200, 2, 131, 32
WRONG = "wrong numbers"
SLOW = "bank conflicts"


@dataclass(frozen=True)
class Bug:
    """`count`-th occurrence (from 0) of `old` becomes `new`; all occurrences if None."""

    name: str
    old: str
    new: str
    caught_by: str
    count: int | None = 0
    in_ptx: bool = False
    seed: int | None = None


BUGS = [
    Bug("no barrier after the wait (read after write)", "__syncthreads();  // the tile is there",
        "", "race"),
    Bug("no barrier before the next copy (write after read)",
        "__syncthreads();  // the stage may be overwritten", "", "race"),
    Bug("waits for one group too few", "wait<1>()", "wait<2>()", "uninitialised"),
    Bug("does not wait at all", "wait<1>();", "", "uninitialised"),
    Bug("tail rows are read", "const bool valid = j < count;", "const bool valid = j < TILE * 9;",
        "out-of-bounds"),
    Bug("rows of shared memory misaligned", "(D + 8)", "(D + 4)", "misaligned"),
    Bug("mask one key too wide", "< begin[h] + window;", "< begin[h] + window + 1;", WRONG),
    Bug("mask one key too narrow", "< begin[h] + window;", "< begin[h] + window - 1;", WRONG),
    Bug("window starts one late", "i - window / 2", "i - window / 2 + 1", WRONG),
    Bug("B fragments swapped", "multiply(score[2 * n], a[s], b[0], b[1]);",
        "multiply(score[2 * n], a[s], b[1], b[0]);", WRONG),
    Bug("stores of rows past the end", "if (row < length) {", "if (true) {", "out-of-bounds"),
    Bug("barrier not reached by one warp", "__syncthreads();  // the stage may be overwritten",
        "if (thread < 96) __syncthreads();", "race"),
    Bug("named barrier with a wrong count", "__syncthreads();  // the stage may be overwritten",
        'if (thread < 96) asm volatile("bar.sync 1, 128;" ::: "memory"); __syncthreads();',
        "deadlock"),
    Bug("barrier in half a warp", "__syncthreads();  // the stage may be overwritten",
        "if (lane < 16) __syncthreads();", "divergent"),
    Bug("shuffle in half a warp",
        "now[h] = fmaxf(now[h], __shfl_xor_sync(0xffffffffu, now[h], 1));",
        "if (lane < 16) now[h] = fmaxf(now[h], __shfl_xor_sync(0xffffffffu, now[h], 1));",
        "divergent"),
    Bug("tensor core in half a warp", "multiply(acc[2 * n], p, b[0], b[1]);",
        "if (lane < 16) multiply(acc[2 * n], p, b[0], b[1]);", "divergent"),
    Bug("copies into the stage that is in use", "bring(tile + 1, stage ^ 1)",
        "bring(tile + 1, stage)", "uninitialised"),
    Bug("reads the other stage", "const u16* keys = stages + stage", "const u16* keys = stages + "
        "(stage ^ 1)", "uninitialised"),
    Bug("key rows one too far", "const int row = n * 16 + (lane & 7)",
        "const int row = n * 16 + 1 + (lane & 7)", WRONG),
    Bug("value rows past the end of shared memory", "(s * 16 + (lane & 15)) * PITCH + n",
        "(s * 16 + 1 + (lane & 15)) * PITCH + n", "out-of-bounds"),
    Bug("a value stored by four threads", "if (quad == 0) lse[at]", "lse[at]", "race"),
    Bug("two blocks store the same rows", "blockIdx.x * TILE", "blockIdx.x * (TILE - 8)", "race"),
    Bug("an input is written", "const u16* keys = stages", "((u16*)q)[first * heads * D] = 0;\n"
        "const u16* keys = stages", "read-only"),
    Bug("the queries are not copied", "copy16(queries + row * PITCH + column, q + at, valid);", "",
        "uninitialised"),
    Bug("the output is added to", "if (quad == 0) lse[at] =", "if (quad == 0) lse[at] +=",
        "uninitialised"),
    Bug("copies still in flight at the end",
        "wait<1>();\n        __syncthreads();  // the tile is there",
        "wait<0>();\n        __syncthreads();\n"
        "        if (tile + 1 == tiles) { bring(0, stage ^ 1); commit(); }",
        "unwaited copy"),
    Bug("sums not joined across the quad", "sum[h] += __shfl_xor_sync(0xffffffffu, sum[h], 2);", "",
        WRONG),
    Bug("rows not padded", "(D + 8)", "D", SLOW),
    Bug("halves of a pair swapped", '"f"(high), "f"(low)', '"f"(low), "f"(high)', WRONG),
    Bug("A registers swapped", '"r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3])',
        '"r"(a[0]), "r"(a[2]), "r"(a[1]), "r"(a[3])', WRONG),
    Bug("transposition forgotten", ".x4.trans.shared", ".x4.shared", WRONG),
    Bug("wrong operand type of the product", "f32.bf16.bf16.f32", "f32.f16.f16.f32", WRONG),
    Bug("a barrier is lost in the PTX", "bar.sync", "// bar.sync", "race", 1, in_ptx=True),
    Bug("a predicate is lost in the PTX", r"setp.le.ftz.f32", "setp.ge.ftz.f32", WRONG, 0,
        in_ptx=True),
    Bug("a conversion of the wrong kind", "cvt.rn.bf16x2.f32", "cvt.rn.f16x2.f32", WRONG, None,
        in_ptx=True),
]  # fmt: skip


def altered(text, bug):
    parts = text.split(bug.old)
    assert len(parts) > 1, f"{bug.name}: {bug.old!r} is not in the sample"
    if bug.count is None:
        return bug.new.join(parts)
    at = bug.count + 1
    return bug.old.join(parts[:at]) + bug.new + bug.old.join(parts[at:])


def reference(q, k, v, scale):
    start = np.clip(np.arange(LENGTH) - WINDOW // 2, 0, LENGTH - WINDOW)
    key = np.arange(LENGTH)
    seen = (key >= start[:, None]) & (key < start[:, None] + WINDOW)
    logits = np.einsum("ihd,jhd->hij", q, k) * scale
    logits = np.where(seen, logits, -np.inf)
    top = logits.max(-1, keepdims=True)
    p = np.exp2(logits - top)
    out = np.einsum("hij,jhd->ihd", p / p.sum(-1, keepdims=True), v)
    return out, (top[..., 0] + np.log2(p.sum(-1))).T


def launch(ptx, *, seed=None, checks=None, pitch=D + 8):
    """Run the sample; returns (error of out, error of lse, machine, fault)."""
    rng = np.random.default_rng(0)
    q, k, v = (f32_to_bf16(rng.standard_normal((LENGTH, HEADS, D))) for _ in range(3))
    out, lse = np.zeros((LENGTH, HEADS, D), np.uint16), np.zeros((LENGTH, HEADS), np.float32)
    memory = Memory()
    inputs = [memory.alloc(x, n, "in") for x, n in ((q, "q"), (k, "k"), (v, "v"))]
    outs = [memory.alloc(x, n, "out") for x, n in ((out, "out"), (lse, "lse"))]
    scale = np.float32(D**-0.5 * np.log2(np.e))
    machine = Machine(load(ptx), memory, (128, 1, 1), 5 * 64 * pitch * 2, checks=checks, seed=seed)
    fault = None
    scalars = [np.int32(LENGTH), np.int32(HEADS), np.int32(WINDOW), scale]
    try:
        machine.run(
            ((LENGTH + 63) // 64, HEADS, 1), [*(np.uint64(a) for a in inputs + outs), *scalars]
        )
    except PtxError as error:
        fault = error
    want, want_lse = reference(*(bf16_to_f32(x).astype(np.float64) for x in (q, k, v)), scale)
    got = bf16_to_f32(memory.read(outs[0], out))
    error = np.abs(np.nan_to_num(got, nan=9.0) - want).max()
    lse_error = np.abs(np.nan_to_num(memory.read(outs[1], lse), nan=9.0) - want_lse).max()
    return error, lse_error, machine, fault


def right(error, lse_error):
    return error < 0.02 and lse_error < 1e-4


@pytest.mark.parametrize("arch", ["80", "90a", "120a"])
@pytest.mark.parametrize("seed", [None, 1])
def test_the_kernel_itself_is_right_and_clean(arch, seed):
    ptx = compile_cuda(ATTENTION, arch, ("-ftz=true",))
    error, lse_error, machine, fault = launch(ptx, seed=seed, checks=Checks(traffic=True))
    assert fault is None and list(map(str, machine.issues)) == []
    assert right(error, lse_error)
    traffic = machine.counters.traffic
    assert traffic["shared read wavefronts"] == traffic["shared read ideal"] > 0
    assert traffic["global read bytes"] > 0 and traffic["local read bytes"] == 0
    assert machine.counters.instructions[
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
    ] == 2 * 4 * 32 * sum(tiles_of(b) for b in range(4))


def tiles_of(block):
    first, last = block * 64, min(block * 64 + 64, LENGTH) - 1
    start = [min(max(i - WINDOW // 2, 0), LENGTH - WINDOW) for i in (first, last)]
    return -(-(start[1] + WINDOW - start[0]) // 64)


def test_copies_that_land_at_once_change_nothing():
    ptx = compile_cuda(ATTENTION, "80", ("-ftz=true",))
    error, lse_error, machine, fault = launch(ptx, checks=Checks(late_copies=False))
    assert fault is None and not machine.issues.kinds() and right(error, lse_error)


@pytest.mark.parametrize("bug", BUGS, ids=lambda b: b.name)
def test_planted_bug_is_caught(bug):
    source = ATTENTION if bug.in_ptx else altered(ATTENTION, bug)
    ptx = compile_cuda(source, "80", ("-ftz=true",)).decode()
    if bug.in_ptx:
        ptx = altered(ptx, bug)
    pitch = {"(D + 4)": D + 4, "D": D}.get(bug.new, D + 8)
    error, lse_error, machine, fault = launch(
        ptx, seed=bug.seed, pitch=pitch, checks=Checks(traffic=bug.caught_by == SLOW)
    )
    kinds = machine.issues.kinds()
    if bug.caught_by == WRONG:
        assert not right(error, lse_error), (kinds, fault)
    elif bug.caught_by == SLOW:
        traffic = machine.counters.traffic
        assert traffic["shared read wavefronts"] > 2 * traffic["shared read ideal"]
    else:
        assert bug.caught_by in kinds, (kinds, fault, error)
        issue = next(i for i in machine.issues if i.kind == bug.caught_by)
        assert re.fullmatch(r"sample\.cu:\d+", issue.source) and issue.ptx_line > 0
        assert issue.block is not None and issue.thread is not None


LOST_BARRIERS = [bug for bug in BUGS if bug.name.startswith("no barrier")]


@pytest.mark.parametrize("bug", LOST_BARRIERS, ids=lambda b: b.name)
def test_races_are_seen_even_where_the_numbers_are_right(bug):
    """A lost barrier often does no harm in one order; the check does not depend on luck."""
    ptx = compile_cuda(altered(ATTENTION, bug), "80", ("-ftz=true",))
    for seed in (None, 1):
        _, _, machine, _ = launch(ptx, seed=seed, checks=Checks(late_copies=False))
        assert "race" in machine.issues.kinds()


# -- sm_90 ----------------------------------------------------------------------------------------


def hopper(ptx, span=128, seed=None, late=True):
    """Run the sm_90 sample; returns (largest error, machine, fault)."""
    rng = np.random.default_rng(0)
    batch, rows, depth, row_a, row_b = 3, 150, 64, 100, -5
    a, b = (f32_to_bf16(rng.standard_normal((batch, rows, depth))) for _ in range(2))
    out = np.zeros((batch, 64, 64), np.float32)
    memory = Memory()
    at = [memory.alloc(x, n, m) for x, n, m in ((a, "a", "in"), (b, "b", "in"), (out, "o", "out"))]
    maps = [
        TensorMap(x, (depth, rows, batch), (2, depth * 2, rows * depth * 2), (64, 64, 1), 2, span)
        for x in at[:2]
    ]
    machine = Machine(
        load(ptx), memory, (160, 1, 1), 16448, seed=seed, checks=Checks(late_copies=late)
    )
    fault = None
    args = [*(m.encode() for m in maps), np.uint64(at[2]), np.int32(row_a), np.int32(row_b)]
    try:
        machine.run((batch, 1, 1), args)
    except PtxError as error:
        fault = error

    def tile(x, first):
        full = np.zeros((batch, 64, depth))
        for i in range(64):
            if 0 <= first + i < rows:
                full[:, i] = bf16_to_f32(x[:, first + i])
        return full

    want = tile(a, row_a) @ tile(b, row_b).swapaxes(1, 2)
    got = np.nan_to_num(memory.read(at[2], out), nan=1e3)
    return np.abs(got - want).max(), machine, fault


def hopper_ptx():
    return compile_cuda(HOPPER, "90a").decode()


@pytest.mark.parametrize("seed", [None, 5])
@pytest.mark.parametrize("late", [True, False])
def test_tensor_maps_and_wgmma(seed, late):
    error, machine, fault = hopper(hopper_ptx(), seed=seed, late=late)
    assert fault is None and list(map(str, machine.issues)) == [] and error < 1e-4


def test_planted_bugs_of_sm_90():
    error, _, _ = hopper(hopper_ptx(), span=0)
    assert error > 1, "a tensor map without the swizzle the product expects"
    unawaited = re.sub(
        r"mbarrier.try_wait.parity.shared::cta.b64 (\w+), [^;]*;",
        r"setp.eq.u32 \1, 1, 1;",
        hopper_ptx(),
    )
    _, machine, _ = hopper(unawaited)
    assert "uninitialised" in machine.issues.kinds()
    _, machine, fault = hopper(hopper_ptx().replace("16384", "16400"))
    assert machine.issues.kinds() == {"deadlock"} and "try_wait" in str(fault)
    _, machine, fault = hopper(re.sub(r"mbarrier\.init[^;]*;", "", hopper_ptx()))
    assert machine.issues.kinds() == {"mbarrier"} and fault is not None
