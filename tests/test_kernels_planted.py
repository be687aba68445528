"""Mistakes planted in the portable kernels: the checks or the oracle must find every one.

A line of a kernel is spoilt, the kernels that contain it are compiled and run in the interpreter.
Those about barriers leave the numbers right and are found by the checks alone.
"""

import importlib.util

import pytest
from kernel_cases import F32, Case
from planted import Spoilt, spoil
from ptxsim.errors import PtxCheckError
from test_kernels import Interpreter, check, few_blocks  # noqa: F401 (a fixture)

from natcupy.cuda import plan

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("cupy") is None, reason="NVRTC comes with CuPy, which is not installed"
)

CASE = Case(
    "planted", (40,), 3, "borders, shared heads, extra keys, several warps", heads=2, head_dim=6,
    value_dim=10, extras=2, rpb=True, dtype=F32,
)  # fmt: skip
MISTAKES = {
    "small boxes: no barrier before staging": (
        "na_fwd.cu", "__syncthreads();\n            stage_rows", "stage_rows"),
    "small boxes: no barrier before staging for queries": (
        "na_bwd_dq.cu", "__syncthreads();\n            stage_rows", "stage_rows"),
    "small boxes: no barrier before staging for keys": (
        "na_bwd_dkv.cu", "__syncthreads();\n            stage_rows", "stage_rows"),
    "no barrier after staging": (
        "na_fwd.cu", "            __syncthreads();\n\n            walk", "\n            walk"),
    "the zero row not cleared": ("na_fwd.cu", "clear_row<QK_CHUNKS>(keys, g.capacity);", ""),
    "a bias for additional keys": (
        "na_fwd.cu", "if (RPB && valid && in_window)", "if (RPB && valid)"),
    "log-sum-exp of the wrong head": (
        "na_fwd.cu", "item.batch * p.heads + head;", "item.batch * p.heads;"),
    "no gradient of the log-sum-exp": ("na_bwd_dq.cu", "if (p.d_lse) delta", "if (false) delta"),
    "bias sums read too early": (
        "na_bwd_dq.cu", "                __syncthreads();\n                collect",
        "                collect"),
    "bias sums not reset": ("na_bwd_dq.cu", "table[i] = 0;", "table[i] += 0;"),
    "one query head of the group": (
        "na_bwd_dkv.cu", "p.queries_per_kv + b / boxes;", "p.queries_per_kv;"),
    "log-sum-exp in the wrong base": (
        "na_bwd_dkv.cu", "lses[row] = p.lse[token] * (acc_t)LOG2_E;", "lses[row] = p.lse[token];"),
    "rows stored past their end": ("na_bwd_extra.cu", "if (at < dim) row", "row"),
    "queries beyond the image": ("na_bwd_extra.cu", "active && token < tokens", "active"),
    "no barrier between the stages of a sum": (
        "reduce_partials.cu", "__syncthreads();\n            if (threadIdx.y", "if (threadIdx.y"),
    "windows one too far right": (
        "neighborhood.cuh", "length - kernel_size), 0)", "length - kernel_size + 1), 0)"),
    "inverse windows one group short": (
        "neighborhood.cuh", "/ stride + 1) * stride", "/ stride) * stride"),
}  # fmt: skip


@pytest.fixture
def engine(tmp_path, few_blocks, request, monkeypatch):  # noqa: F811
    """Runs what `tmp_path` holds; with small boxes, a tile sees more than is staged at once."""
    if request.node.callspec.id.startswith("small boxes"):
        monkeypatch.setattr(plan, "SHARED", 2500)
    engine = Interpreter()
    engine.launcher = Spoilt(tmp_path)
    with plan.use_family("portable"):
        yield engine


@pytest.mark.parametrize("mistake", MISTAKES)
def test_planted_mistakes_are_found(mistake, engine, tmp_path):
    spoil(tmp_path, *MISTAKES[mistake])
    with pytest.raises((PtxCheckError, AssertionError)):
        check(CASE, engine)


@pytest.mark.parametrize("boxes", ["large boxes", "small boxes"])
def test_the_kernels_as_they_are_pass(boxes, engine, tmp_path):
    spoil(tmp_path)
    check(CASE, engine)
