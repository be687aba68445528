"""What the tensor-core kernels for any window move and execute, by the interpreter's counters.

No bank conflict, every row moved as often as the tiles say, and no more instructions for a token
than there were.
"""

import importlib.util
from itertools import product
from math import prod

import pytest
from kernel_cases import F32, cotangents, inputs
from ptxsim import Checks
from ptxsim.launcher import PtxLauncher
from test_kernels import Interpreter, run
from test_mma import case

from natcupy.cuda import mma, plan
from natcupy.neighborhood import inverse_window, window

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("cupy") is None, reason="NVRTC comes with CuPy, which is not installed"
)

TRAFFIC = (
    case("line", (500,), 63, "two buffers of 64 keys"),
    case("volume", (4, 14, 15), (3, 7, 5), "short lines", dim=64),
    case("strided", (40, 41), (9, 11), "far windows of keys", dim=64, dilation=(1, 2),
         stride=(3, 1)),
    case("two parts", (200,), 41, "longer rows", dim=128, heads=2, kv_heads=1),
    case("float", (200,), 41, "rows of 128 bytes", dtype=F32),
    case("float 64", (6, 7, 8), (3, 3, 5), "rows of 256 bytes", dim=64, dtype=F32),
)  # fmt: skip


def counts(given, arch="90a"):
    """Counters by entry."""
    engine = Interpreter(arch)
    checks = Checks(races=False, uninitialised=False, traffic=True)
    engine.launcher = PtxLauncher(arch, checks=checks)
    with plan.use_family("mma"):
        run(given, engine, inputs(given), *cotangents(given))
    return {r.recipe.spec.entry: r.counters for r in engine.launcher.records}


def tokens_moved(given, sees):
    """(own, seen) tokens of all tiles of all groups of one image and head."""
    hood = given.hood
    groups = tuple(-(-n // d) for n, d in zip(given.shape, hood.dilation, strict=True))
    tile, _ = mma._tile(groups, hood.kernel_size, hood.stride)
    axes = []
    for a, (n, d) in enumerate(zip(given.shape, hood.dilation, strict=True)):
        rule, found = (hood.kernel_size[a], hood.stride[a], hood.is_causal[a]), []
        for length in (-(-(n - g) // d) for g in range(d)):
            for begin in range(0, length, tile[a]):
                last = min(begin + tile[a], length) - 1
                found.append(
                    (last + 1 - begin, sees(last, length, *rule)[1] - sees(begin, length, *rule)[0])
                )
        axes.append(found)
    boxes = [tuple(map(prod, zip(*box, strict=True))) for box in product(*axes)]
    return tuple(map(sum, zip(*boxes, strict=True)))


@pytest.mark.parametrize("given", TRAFFIC, ids=str)
def test_traffic(given):
    row = given.head_dim * given.dtype.itemsize // 32
    own, keys = (given.heads * n for n in tokens_moved(given, window))
    mine, queries = tokens_moved(given, inverse_window)
    read = {
        "na_mma_fwd": row * (own + 2 * keys),
        "na_mma_bwd_dq": row * (3 * own + 2 * keys),
        "na_mma_bwd_dkv": row * (2 * mine * given.kv_heads + 2 * queries * given.heads),
    }
    written = {
        "na_mma_fwd": row * own,
        "na_mma_bwd_dq": row * own,
        "na_mma_bwd_dkv": row * 2 * mine * given.kv_heads,
    }
    for name, counters in counts(given).items():
        traffic = counters.traffic
        for kind in ("cp.async", "shared read", "shared write"):
            assert traffic[f"{kind} wavefronts"] == traffic[f"{kind} ideal"], (name, kind)
        # Beside rows there are log-sum-exp and delta, 4 bytes of a token each.
        for kind, sectors in (("read", read[name]), ("write", written[name])):
            actual = traffic[f"global {kind} sectors"]
            assert sectors <= actual <= 1.15 * sectors, (name, kind, actual, sectors)
        assert not any("local" in kind for kind in traffic), name


# PTX instructions of a warp for each token.
INSTRUCTIONS = (
    (case("line", (1024,), 63, ""), {"fwd": 91, "bwd_dq": 103, "bwd_dkv": 115}),
    (case("volume", (8, 28, 28), (3, 7, 7), ""), {"fwd": 371, "bwd_dq": 412, "bwd_dkv": 700}),
    (case("bias", (1024,), 63, "", rpb=True), {"fwd": 130, "bwd_dq": 185, "bwd_dkv": 155}),
)


@pytest.mark.parametrize(("given", "most"), INSTRUCTIONS, ids=["line", "volume", "bias"])
def test_instructions(given, most):
    found = counts(given)
    for side, bound in most.items():
        one = found[f"na_mma_{side}"].total / prod(given.shape)
        assert one <= bound, (side, one)
