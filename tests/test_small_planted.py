"""Mistakes planted in the small-window kernels: the checks or the oracle must find every one."""

import importlib.util
from dataclasses import replace

import pytest
from kernel_cases import F16, F32
from planted import Spoilt, spoil
from ptxsim.errors import PtxCheckError
from small_cases import case, forget_plans
from test_kernels import Interpreter, check

from natcupy.cuda import heuristics, plan, small_tiles

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("cupy") is None, reason="NVRTC comes with CuPy, which is not installed"
)

MISTAKES = {
    "no barrier after staging": (
        "na2d_small_fwd.cu", "    copies_done();\n    __syncthreads();", "    copies_done();"),
    "no wait for copies": (
        "na2d_small_fwd.cu", "    fetch(row1);\n    copies_done();\n", "    fetch(row1);\n"),
    "no wait for the next queries": (
        "na2d_small_fwd.cu", "    copies_done();\n#pragma", "#pragma"),
    "the same queries again": (
        "na2d_small_fwd.cu", "fetch(row + stride)", "fetch(row)"),
    "the next queries before these are read": (
        "na2d_small_fwd.cu", "        take(ahead, g.zero ^ sign, query);",
        "        fetch(row + stride);\n        take(ahead, g.zero ^ sign, query);"),
    "rows of queries past the map copied": (
        "na2d_small_fwd.cu", "row + side <= last);", "true);"),
    "a window one row too low": (
        "na2d_small_fwd.cu", "values + (from - top) * line}", "values + (from - top + 1) * line}"),
    "a column mask one too wide": (
        "na2d_small_fwd.cu", "key < seen.end;", "key <= seen.end;"),
    "staggered rows taken as aligned": (
        "na2d_small_fwd.cu", "{from, two, !DENSE && two &&", "{from, two, false &&"),
    "a reference that the log-sum-exp forgets": (
        "na2d_small_fwd.cu", "(log_2(sums.total[side]) - sums.low[side])",
        "log_2(sums.total[side])"),
    "biases not in units of the scale": (
        "na2d_small_fwd.cu", "fabsf(p.scale.inverse)", "1"),
    "the last step of staggered rows left out": (
        "na2d_small_fwd.cu", "if (staggered) step(", "if (false) step("),
    "a quotient of half the number": ("small.cuh", "(unsigned)n << 1", "(unsigned)n"),
    "table without its first row": ("small.cuh", "n / BIAS_PITCH - 1;", "n / BIAS_PITCH;"),
    "words swapped in a store": (
        "products.cuh", "odd ? got : low, odd ? high : got", "odd ? high : got, odd ? got : low"),
    "float: low parts of the left forgotten": (
        "instructions.cuh", "multiply_tf32(rest, a.low, h0, h1);", ""),
    "float: low parts of the right forgotten": (
        "instructions.cuh", "multiply_tf32(rest, a.high, low_part(b0, h0), low_part(b1, h1));", ""),
    "float: small terms not added": (
        "products.cuh", "? s[h][e] + rest[h][e] :", "? s[h][e] :"),
    "float: chunks of a row in order": (
        "products.cuh", "place(lane / 8 + lane / 4 % 2 * 4, token)", "place(lane / 4, token)"),
    "float: warps share their sums": (
        "small_queries.cuh", "role.warp * Sums::BYTES", "0 * Sums::BYTES"),
    "columns past the map stored": (
        "na2d_small_fwd.cu", "const bool there = column < width &&", "const bool there ="),
    "bias sums not flushed": (
        "small_queries.cuh",
        "if (distance != sums.distance || column0 != sums.column || width != sums.width)",
        "if (false)"),
    "widths: bias sums go on in a narrower group": (
        "small_queries.cuh", " || width != sums.width)", ")"),
    "widths: bias sums move on in a narrower group": (
        "small_queries.cuh", " && width == new_width &&", " &&"),
    "columns: bias sums go on in other columns": (
        "small_queries.cuh", "column0 != sums.column || ", ""),
    "columns: bias sums move on in other columns": (
        "small_queries.cuh", "column == new_column && ", ""),
    "folded bias sums read by queries that do not see": (
        "small_queries.cuh", "if (key < KW) found", "if (true) found"),
    "folded bias sums apart by too little": (
        "small_queries.cuh", "x / 8 % FOLDED * BLOCK", "0 * BLOCK"),
    "a query's part of a bias forgotten": (
        "small_queries.cuh", "query < 8; ++query) {\n                const unsigned x",
        "query < 7; ++query) {\n                const unsigned x"),
    "no barrier between tiles": (
        "small_queries.cuh", "        __syncthreads();  // the keys", "        // the keys"),
    "rows past the map weigh": (
        "small_queries.cuh", "real ? *own_number(p.lse) * -p.scale.inverse : p.scale.never",
        "real ? *own_number(p.lse) * -p.scale.inverse : 0"),
    "no gradient of the log-sum-exp": (
        "small_queries.cuh", "if (p.d_lse && real)", "if (false)"),
    "second query block forgotten": (
        "small_keys.cuh", "walked += COLUMNS", "walked += 64"),
    "query columns counted twice": ("small_keys.cuh", "query >= begin && ", ""),
    "heads of a group not staged": (
        "small_keys.cuh",
        "if (below == 0 || g.queries_per_kv > 1) {\n                const Place at = here();\n"
        "                __syncthreads();",
        "if (below == 0 && member == 0) {\n                const Place at = here();\n"
        "                __syncthreads();"),
    "rows of keys not masked": (
        "small_keys.cuh",
        "side ? query >= second : query < past;", "true;"),
    "joint: half of the blocks of keys left out": (
        "na2d_small_bwd.cu", "(place - 1) * p.query_blocks", "0 * p.query_blocks"),
    "joint: blocks of keys past the last": (
        "na2d_small_bwd.cu", "if (block < p.key_blocks) key_side", "key_side"),
    "joint: no wait for delta": (
        "small_keys.cuh", "* tokens, even);\n                    __syncthreads();",
        "* tokens, even);"),
    "joint: no wait for what delta is made of": (
        "small_keys.cuh", "                __syncthreads();\n                if constexpr",
        "                if constexpr"),
    "joint: delta of the wrong row": (
        "small_keys.cuh", "outs.at(side, (begin", "outs.at(0, (begin"),
    "joint: delta without the gradient of the log-sum-exp": (
        "small_keys.cuh", "else if (p.d_lse)\n", "else if (false)\n"),
    "joint: delta of the second row forgotten": (
        "small_keys.cuh", "if (at.c < 2 && real(n, at.c))", "if (at.c < 1 && real(n, at.c))"),
    "dense: no wait for copies": ("na2d_small_bwd_dense.cu", "        copies_done();\n", ""),
    "dense: warps share memory": (
        "na2d_small_bwd_dense.cu", "+ warp * WARP_BYTES", "+ 0 * WARP_BYTES"),
    "dense: blocks not transposed": (
        "na2d_small_bwd_dense.cu", "transposed(ds.word[h][j][0])", "ds.word[h][j][0]"),
    "dense: a row of sums lost": ("na2d_small_bwd_dense.cu", "push(row + 1, held[1]);", ";"),
    "dense: the last sums lost": (
        "na2d_small_bwd_dense.cu", "row < ROW_SUMS; ++row)", "row < 0; ++row)"),
    "dense: the row that is not there weighs": (
        "na2d_small_bwd_dense.cu", "j && alone ? staged", "false ? staged"),
    "dense: delta added": ("na2d_small_bwd_dense.cu", "start : -delta[h]", "start : delta[h]"),
    "dense: no gradient of the log-sum-exp": (
        "na2d_small_bwd_dense.cu", "if (p.d_lse) delta", "if (false) delta"),
}  # fmt: skip


@pytest.fixture
def one_multiprocessor(monkeypatch):
    """A GPU that few blocks fill, so that small maps are cut into blocks of several warps."""
    chip = replace(heuristics.architecture(80), multiprocessors=1)
    monkeypatch.setitem(heuristics.ARCHITECTURES, 80, chip)
    forget_plans()
    yield
    forget_plans()


PLAIN = case("planted", (9, 13), (3, 5), "", dtype=F16, heads=2, kv_heads=1, batch=2)
JOINT = replace(PLAIN, name="planted, joint", kv_heads=2)
FLOAT = case("planted, float", (6, 9), 3, "", dtype=F32)
WIDTHS = case("planted, two widths", (9, 15), (3, 5), "", dtype=F16, dilation=(1, 2))
COLUMNS = case("planted, narrow tiles", (9, 21), (3, 5), "", dtype=F16, batch=2)
GIVEN = {"float": FLOAT, "joint": JOINT, "widths": WIDTHS, "columns": COLUMNS}
DENSE = case("planted, dense", (3, 5), (3, 5), "", dtype=F16, heads=2, batch=2)
WIDE = case("planted, wide", (5, 26), (5, 9), "", dtype=F16)


@pytest.fixture
def engine(one_multiprocessor, tmp_path, monkeypatch):
    """Runs what `tmp_path` holds; a block takes several tiles."""
    monkeypatch.setattr(plan, "BLOCKS", 1)
    plan.forget()
    engine = Interpreter()
    engine.launcher = Spoilt(tmp_path)
    with plan.use_family("small"):
        yield engine


@pytest.mark.parametrize("mistake", MISTAKES)
def test_planted_mistakes_are_found(mistake, engine, tmp_path, monkeypatch):
    file, right, wrong = MISTAKES[mistake]
    spoil(tmp_path, file, right, wrong)
    given = (GIVEN | {"dense": DENSE}).get(mistake.split(":")[0], PLAIN)
    if given is COLUMNS:
        narrow(monkeypatch)
    if mistake == "joint: blocks of keys past the last":
        monkeypatch.setattr(plan, "BLOCKS", 3)  # for four images: two blocks find no keys
        given = replace(JOINT, batch=4)
        plan.forget()
    if (file == "small_keys.cuh" and "query" in mistake) or "apart" in mistake:
        given = WIDE
    with pytest.raises((PtxCheckError, AssertionError)):
        check(given, engine)


def narrow(monkeypatch):
    """Tiles of 8 columns and a few rows only, so that a block meets several columns."""
    every = small_tiles.tiles

    def few(p, side):
        return tuple(t for t in every(p, side) if t.blocks == 1 and t.rows <= 6)

    monkeypatch.setattr(small_tiles, "tiles", few)
    forget_plans()


@pytest.mark.parametrize("given", [PLAIN, JOINT, FLOAT, DENSE, WIDE, WIDTHS, COLUMNS], ids=str)
def test_the_kernels_as_they_are_pass(given, engine, tmp_path, monkeypatch):
    spoil(tmp_path)
    if given is COLUMNS:
        narrow(monkeypatch)
    check(given, engine)
