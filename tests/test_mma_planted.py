"""Mistakes planted in the tensor-core kernels for any window: each must be found."""

import importlib.util
from dataclasses import replace

import pytest
import test_mma
from kernel_cases import F16, F32
from planted import Spoilt, spoil
from ptxsim.errors import PtxCheckError
from test_kernels import Interpreter, check
from test_mma import case

from natcupy.cuda import mma, plan

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("cupy") is None, reason="NVRTC comes with CuPy, which is not installed"
)

FORWARD, QUERIES, KEYS = "na_mma_fwd.cu", "na_mma_bwd_dq.cu", "na_mma_bwd_dkv.cu"
WAIT = "        copies_done();\n        __syncthreads();"
DEEP = WAIT.replace("        ", "            ")
MISTAKES = {
    # how a turn comes
    "forward: no wait for copies": (FORWARD, WAIT, "        __syncthreads();"),
    "forward: no barrier": (FORWARD, WAIT, "        copies_done();"),
    "queries: no wait for copies": (QUERIES, DEEP, "            __syncthreads();"),
    "queries: no barrier": (QUERIES, DEEP, "            copies_done();"),
    "keys: no wait for copies": (KEYS, WAIT, "        __syncthreads();"),
    "keys: no barrier": (KEYS, WAIT, "        copies_done();"),
    "one buffer for all turns": (
        FORWARD, "staged + (now + 1) % 2 * STAGED", "staged + now % 2 * STAGED"),
    "rows past the halo are read": (
        "mma.cuh", "real &= token < walk.extent[a];", "real &= token < walk.extent[a] + 1;"),
    "dim: numbers past the row are read": (
        "mma.cuh", "real && part * D + chunk * CHUNK < dim", "real"),
    "dim: numbers past the row are written": (
        "mma_rows.cuh", "j * 8 + stored(c) < numbers", "numbers > 0"),
    "float: numbers past the row are written": (
        "mma_rows.cuh", "if ((4 * n + c) * CHUNK < numbers)", "if (numbers > 0)"),
    "dim: numbers past an own row are read": (
        "mma_rows.cuh", "if (there && at < dim)", "if (there)"),
    "the walk loses a carry": ("mma.cuh", "at[a] += step[a] + carry;", "at[a] += step[a];"),
    "the walk ends a line late": ("mma.cuh", "carry = at[a] >= length;", "carry = at[a] > length;"),
    "a turn too few": (
        "mma.cuh", "(blocks + TURN_BLOCKS - 1) / TURN_BLOCKS", "(blocks - 1) / TURN_BLOCKS"),
    "the swizzle of another row": (
        "mma.cuh", "place(chunk, row) * 16", "place(chunk, row + 2) * 16"),
    # what is seen
    "a window too wide": (
        "mma.cuh", "first[side] + e < extent[side]", "first[side] + e <= extent[side]"),
    "lines are not masked": (
        "mma.cuh", "if (near) tokens |= 1 << i;", "tokens |= 1 << i;"),
    "all see what most see": (
        "mma.cuh", "column + 8 <= sight.all_end", "column + 7 <= sight.all_end"),
    "skipped too early": ("mma.cuh", "column + 8 > sight.any_begin", "column > sight.any_begin"),
    "skipped too late": ("mma.cuh", "column < sight.any_end &&", "column + 8 < sight.any_end &&"),
    "the spans of another token": ("mma.cuh", "tokens <<= first;", "tokens <<= first ^ 4;"),
    "tokens that are not there": ("mma.cuh", "token_of<INVERSE>(g, item, slot, position, seen);",
                                  "(token_of<INVERSE>(g, item, slot, position, seen), true);"),
    # numbers
    "extras: no mask": (FORWARD, "if (now == turns.window) sight.set_line(p.extras);", ""),
    "extras: a bias": (FORWARD, "sees && in_window)", "sees)"),
    "extras: of the window": (
        "mma.cuh", "if (now + 1 == window) {", "if (now == window) {"),
    "sums keep their size": (FORWARD, "sums.total[side] *= factor;", ""),
    "outputs keep their size": (FORWARD, "sums.out[part][j][2 * side + e] *= factor;", ";"),
    "lse without its reference": (
        FORWARD, "(sums.reference[side] + log_2(sums.total[side]))", "log_2(sums.total[side])"),
    "bias of the neighbour": ("mma.cuh", "offset + STEP * e]", "offset]"),
    "bias the other way": ("mma.cuh", "enum { STEP = FORWARDS ? 1 : -1 };", "enum { STEP = 1 };"),
    "delta added": (
        QUERIES, "minus_delta[side] = -delta;", "minus_delta[side] = delta;"),
    "delta not told": (
        QUERIES, "if (threadIdx.x % 4 == 0) p.delta", "if (threadIdx.x % 4 == 4) p.delta"),
    "no gradient of log-sum-exp": (QUERIES, "if (p.d_lse) delta", "if (false) delta"),
    "keys: delta of the neighbour": (KEYS, "(DELTAS + h * 8 + e) * 4", "(DELTAS + h * 8) * 4"),
    "keys: the first head's queries": (
        KEYS, "queries.base += p.query.head * (long long)sizeof(scalar_t);", ""),
    "keys: the first head's numbers": (KEYS, "all.next_head(g);", ""),
    "keys: weights in place of dS": (
        KEYS, "add_weighted(d_key, weights_of(d)", "add_weighted(d_key, weights_of(t)"),
    # the gradient of the bias
    "bias: rows in place of diagonals": (
        QUERIES, "pairs[diagonal.from + 9 * i]", "pairs[diagonal.from + 8 * i]"),
    "bias: a pair too few": (QUERIES, "i < diagonal.pairs", "i + 1 < diagonal.pairs"),
    "bias: half of the lines": (
        QUERIES, "count = 16 / width * of_a_line;", "count = 8 / width * of_a_line;"),
    "bias: of other queries": (
        QUERIES, "rpb_index(halo.begin[a], sight.owned->position[query][a], k);",
        "rpb_index(halo.begin[a], sight.owned->position[0][a], k);"),
    "bias: what is not seen": (QUERIES, "if (sum != 0) table", "table"),
    "bias: a warp left out": (QUERIES, "int w = 0; w < WARPS; ++w", "int w = 1; w < WARPS; ++w"),
    "far: another warp's table": (
        QUERIES, "blockIdx.x / p.heads * WARPS + warp;", "blockIdx.x / p.heads * WARPS;"),
    "far: another head's table": (
        QUERIES, "(slice * p.heads + blockIdx.x % p.heads)", "(slice * p.heads)"),
    "bias: tables that are not cleared": (
        QUERIES, "for (int n = threadIdx.x % 32; n < biases; n += 32) table[n] = 0;", ""),
    "extras: among the biases": (
        QUERIES, "if (RPB_GRAD && in_window)", "if (RPB_GRAD)"),
}  # fmt: skip

PLAIN = case(
    "planted", (3, 7, 21), (2, 5, 6), "", dtype=F16, heads=2, kv_heads=1, batch=1, rpb=True
)
EXTRAS = case("planted, extras", (30,), 5, "", dtype=F16, extras=3, rpb=True)
DIM = case("planted, dim", (30,), 9, "", dtype=F16, dim=40)
FLOAT = case("planted, float", (30,), 9, "", dtype=F32, dim=20)
LONG = case("planted, long", (400,), 303, "", dtype=F16)


@pytest.fixture
def engine(tmp_path):
    """Runs what `tmp_path` holds."""
    engine = Interpreter()
    engine.launcher = Spoilt(tmp_path)
    with plan.use_family("mma"):
        yield engine
    plan.forget()


def check_all(given, engine):
    """With a bias and its gradient, and without."""
    check(given, engine)
    check(replace(given, rpb=False), engine)


def given_for(mistake):
    if mistake.split(":")[0] in ("extras", "dim", "float"):
        return {"extras": EXTRAS, "dim": DIM, "float": FLOAT}[mistake.split(":")[0]]
    wide = ("all see", "skipped", "sums keep", "outputs keep", "lse without", "one buffer")
    return LONG if mistake.startswith(wide) else PLAIN


@pytest.mark.parametrize("mistake", MISTAKES)
def test_planted_mistakes_are_found(mistake, engine, tmp_path, monkeypatch):
    if mistake.startswith("far"):
        monkeypatch.setattr(mma, "is_far", lambda p: True)
        plan.forget()
    spoil(tmp_path, *MISTAKES[mistake])
    with pytest.raises((PtxCheckError, AssertionError)):
        check_all(given_for(mistake), engine)


def test_a_nan_that_is_let_pass_is_found(engine, tmp_path):
    spoil(tmp_path, FORWARD, "if (!spoilt(sums, sight)) {", "if (true) {")
    with pytest.raises(AssertionError):
        test_mma.test_nan_reaches_its_windows_and_nothing_else("value", 0, engine)


@pytest.mark.parametrize("given", [PLAIN, EXTRAS, DIM, FLOAT, LONG], ids=str)
def test_the_kernels_as_they_are_pass(given, engine, tmp_path):
    spoil(tmp_path)
    check_all(given, engine)
