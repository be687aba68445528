"""Random neighborhood attention problems for hypothesis, and the tensors that go with one.

In: hypothesis' draw. Out: a `Problem` (plain numbers, printable) and `tensors(problem)`.
"""

from dataclasses import dataclass, replace

import torch
from hypothesis import strategies as st


@dataclass(frozen=True)
class Problem:
    shape: tuple
    kernel_size: tuple
    stride: tuple
    dilation: tuple
    is_causal: tuple
    batch: int = 1
    kv_heads: int = 1
    groups: int = 1
    head_dim: int = 4
    value_dim: int = 4
    rpb: bool = False
    extra: int = 0
    scale: float | None = None
    seed: int = 0

    @property
    def rank(self):
        return len(self.shape)

    @property
    def heads(self):
        return self.kv_heads * self.groups

    @property
    def window(self):
        return {
            "kernel_size": self.kernel_size,
            "stride": self.stride,
            "dilation": self.dilation,
            "is_causal": self.is_causal,
        }

    def but(self, **changes):
        return replace(self, **changes)


@st.composite
def problems(draw, ranks=(1, 2, 3), max_length=(26, 11, 6)):
    rank = draw(st.sampled_from(ranks))
    axes = []
    for _ in range(rank):
        length = draw(st.integers(1, max_length[rank - 1]))
        dilation = draw(st.integers(1, min(length, 4)))
        kernel = draw(st.integers(1, length // dilation))
        axes.append((length, kernel, draw(st.integers(1, kernel)), dilation, draw(st.booleans())))
    shape, kernel, stride, dilation, causal = (tuple(column) for column in zip(*axes, strict=True))
    return Problem(
        shape,
        kernel,
        stride,
        dilation,
        causal,
        batch=draw(st.integers(1, 2)),
        kv_heads=draw(st.integers(1, 2)),
        groups=draw(st.integers(1, 2)),
        head_dim=draw(st.integers(1, 6)),
        value_dim=draw(st.integers(1, 6)),
        rpb=draw(st.booleans()),
        extra=draw(st.integers(0, 3)),
        scale=draw(st.sampled_from([None, 0.0, 0.7, -1.3])),
        seed=draw(st.integers(0, 999)),
    )


def tensors(p, dtype=torch.float64, requires_grad=False, device="cpu"):
    """Inputs of `na{rank}d` as keyword arguments, without the window parameters.

    Queries are smaller where a scale is larger than the default one, so that logits spread alike:
    where one key takes all, P (dP - delta) cancels, and no backend's gradient is as exact.
    """
    gen = torch.Generator().manual_seed(p.seed)
    steepness = 1.0 if p.scale is None else max(1.0, abs(p.scale) * p.head_dim**0.5)

    def normal(*shape, over=1.0):
        x = torch.randn(*shape, generator=gen, dtype=torch.float64).div(over).to(device, dtype)
        return x.requires_grad_(requires_grad)

    inputs = {
        "query": normal(p.batch, *p.shape, p.heads, p.head_dim, over=steepness),
        "key": normal(p.batch, *p.shape, p.kv_heads, p.head_dim),
        "value": normal(p.batch, *p.shape, p.kv_heads, p.value_dim),
        "scale": p.scale,
    }
    if p.rpb:
        inputs["rpb"] = normal(p.heads, *(2 * k - 1 for k in p.kernel_size))
    if p.extra:
        inputs["additional_keys"] = normal(p.batch, p.extra, p.kv_heads, p.head_dim)
        inputs["additional_values"] = normal(p.batch, p.extra, p.kv_heads, p.value_dim)
    return inputs
