"""The table that every CUDA kernel test walks: small problems, each there for a reason.

In: nothing. Out: `CASES`, and for a case its tensors, its hood and the float64 truth.
"""

from __future__ import annotations

from dataclasses import dataclass

import oracle
import torch

from natcupy.arguments import neighborhood

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
NAMES = ("query", "key", "value", "rpb", "additional_keys", "additional_values")


@dataclass(frozen=True)
class Case:
    name: str
    shape: tuple[int, ...]
    kernel_size: int | tuple[int, ...]
    why: str
    stride: int | tuple[int, ...] = 1
    dilation: int | tuple[int, ...] = 1
    is_causal: bool | tuple[bool, ...] = False
    heads: int = 1
    kv_heads: int = 1
    head_dim: int = 8
    value_dim: int = 8
    extras: int = 0
    batch: int = 1
    rpb: bool = False
    dtype: torch.dtype = F32
    layout: str = "contiguous"  # or "packed", "offset", "heads first"
    scale: float | None = None

    @property
    def hood(self):
        return neighborhood(
            len(self.shape), self.kernel_size, self.stride, self.dilation, self.is_causal
        )

    @property
    def factor(self) -> float:
        return self.head_dim**-0.5 if self.scale is None else self.scale

    def __str__(self) -> str:
        return self.name


CASES = (
    Case("line", (11,), 3, "the plainest: one axis, borders on both sides", heads=2),
    Case("border", (9, 7), 5, "windows shifted in at every border", heads=2, rpb=True),
    Case("even", (8, 9), (4, 2), "even windows lean left", rpb=True),
    Case("one key", (5, 4), 1, "a window of the token itself"),
    Case("whole map", (5, 6), (5, 6), "window = map: dense attention", rpb=True, dtype=F64),
    Case("remainder", (11, 10), 3, "groups of unequal length", dilation=(2, 3), rpb=True),
    Case("dense groups", (14, 14), 7, "dilated and no border left", dilation=2, dtype=F16),
    Case("stride", (10, 11), (4, 5), "shared windows", stride=(3, 2), heads=2, rpb=True),
    Case("blocked", (9,), 4, "stride = window, a short last block", stride=4, rpb=True),
    Case("causal", (9, 8), (3, 4), "one causal axis", is_causal=(True, False), rpb=True),
    Case(
        "causal stride", (13,), 5, "causal, strided and dilated",
        stride=3, dilation=2, is_causal=True, heads=2, rpb=True,
    ),
    Case("long line", (150,), 37, "a window wider than a block's tile", head_dim=4, value_dim=4),
    Case("volume", (4, 5, 6), (3, 2, 5), "three axes", heads=2, rpb=True, dtype=BF16),
    Case(
        "volume, everything", (5, 4, 6), (2, 3, 3), "every feature at once",
        stride=(1, 2, 3), dilation=(2, 1, 1), is_causal=(False, True, False),
        heads=4, kv_heads=2, head_dim=6, value_dim=10, extras=3, batch=2, rpb=True,
    ),
    Case("grouped heads", (7, 8), 3, "query heads share keys", heads=6, kv_heads=2, rpb=True),
    Case("multi-query", (12,), 5, "all query heads share one key", heads=5, dtype=F16),
    Case("odd dim", (6, 7), 3, "rows of 5 and 7 halves: 2-byte access", head_dim=5, value_dim=7,
         heads=3, kv_heads=3, rpb=True, dtype=F16),
    Case("dim 1", (9,), 3, "one number per row", head_dim=1, value_dim=1, heads=2, kv_heads=2),
    Case("dim 20", (6, 6), 3, "8-byte access, idle lanes", head_dim=20, value_dim=12, dtype=BF16),
    Case("wider values", (7, 6), 3, "value_dim > head_dim", head_dim=8, value_dim=40, dtype=BF16),
    Case("wider keys", (7, 6), 3, "head_dim > value_dim", head_dim=33, value_dim=4, rpb=True),
    Case("dim 64", (8, 8), 3, "eight lanes", head_dim=64, value_dim=64, dtype=BF16, rpb=True),
    Case("dim 128", (6, 7), 3, "sixteen lanes", head_dim=128, value_dim=128, dtype=F16),
    Case("dim 512", (6,), 3, "all lanes, two chunks each", head_dim=512, value_dim=512, dtype=BF16),
    Case("dim 512, float", (6,), 3, "four chunks per lane", head_dim=512, value_dim=260),
    Case("extra", (7, 8), 3, "additional keys, no bias", extras=5, heads=2, kv_heads=2, rpb=True),
    Case("many extras", (9,), 3, "more extras than staged rows", extras=70, heads=2, dtype=F16),
    Case("nat", (14, 14), 7, "the shape of NAT", head_dim=32, value_dim=32, heads=2, kv_heads=2,
         rpb=True, dtype=BF16),
    Case("packed", (7, 7), 3, "q, k, v in one tensor, read in place", heads=2, kv_heads=2,
         head_dim=16, value_dim=16, layout="packed", rpb=True, dtype=F16),
    Case("unaligned", (7, 6), 3, "a base address off by one number", layout="offset", dtype=BF16),
    Case("unaligned float", (7, 6), 3, "the same with 4-byte access", layout="offset"),
    Case("heads first", (6, 7), 3, "[B, heads, N, D] memory", heads=2, kv_heads=2,
         layout="heads first", rpb=True),
    Case("scale", (9,), 4, "a given, negative scale", scale=-0.7, rpb=True, dtype=F64),
    Case("double", (5, 6), 3, "float64 computes in double", heads=2, head_dim=3, value_dim=5,
         extras=2, rpb=True, dtype=F64),
)  # fmt: skip


def _laid_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The same numbers, otherwise in memory."""
    if layout == "offset":
        room = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)
        return room[1:].view(x.shape).copy_(x)
    if layout == "heads first":
        return x.movedim(-2, 1).contiguous().movedim(1, -2)
    return x


def inputs(case: Case, device="cpu", seed: int = 0) -> dict[str, torch.Tensor | None]:
    """The six inputs by name, requiring grad; None where the case has none."""
    make = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(shape, generator=make, dtype=F64).to(case.dtype)

    rows = (case.batch, *case.shape)
    made = {
        "query": random(*rows, case.heads, case.head_dim),
        "key": random(*rows, case.kv_heads, case.head_dim),
        "value": random(*rows, case.kv_heads, case.value_dim),
        "rpb": random(case.heads, *(2 * k - 1 for k in case.hood.kernel_size))
        if case.rpb
        else None,
        "additional_keys": random(case.batch, case.extras, case.kv_heads, case.head_dim),
        "additional_values": random(case.batch, case.extras, case.kv_heads, case.value_dim),
    }
    if not case.extras:
        made["additional_keys"] = made["additional_values"] = None
    if case.layout == "packed":
        qkv = torch.stack([made[name] for name in NAMES[:3]], dim=-3)
        made.update(zip(NAMES[:3], qkv.to(device).unbind(-3), strict=True))
    return {
        name: None if x is None else _laid_out(x.to(device), case.layout).requires_grad_()
        for name, x in made.items()
    }


def cotangents(case: Case, device="cpu", seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Random gradients of output and log-sum-exp."""
    make = torch.Generator().manual_seed(seed)
    rows = (case.batch, *case.shape, case.heads)
    d_out = torch.randn(*rows, case.value_dim, generator=make, dtype=F64)
    d_lse = torch.randn(*rows, generator=make, dtype=F64)
    sums = F64 if case.dtype == F64 else F32
    return d_out.to(case.dtype).to(device), d_lse.to(sums).to(device)


def truth(case: Case, tensors, d_out, d_lse):
    """(out, lse, gradients by name) in float64 from the brute-force oracle."""
    double = {n: None if x is None else x.detach().cpu().double() for n, x in tensors.items()}
    given = {n: x.requires_grad_() for n, x in double.items() if x is not None}
    hood = case.hood
    out, lse = oracle.attention(
        double["query"], double["key"], double["value"],
        hood.kernel_size, hood.stride, hood.dilation, hood.is_causal, case.factor,
        double["rpb"], double["additional_keys"], double["additional_values"],
    )  # fmt: skip
    gradients = torch.autograd.grad(
        [out, lse], list(given.values()), [d_out.cpu().double(), d_lse.cpu().double()]
    )
    return out.detach(), lse.detach(), dict(zip(given, gradients, strict=True))
