"""The rule that fills models and inputs for the stored outputs in `tests/goldens`.

In: a model (or a shape). Out: the same model with every float tensor drawn from a generator seeded
by the tensor's name, so that an output stored years ago can be computed again without its weights.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

INPUT_SEED = 20260101


def fill(model: nn.Module, hot: bool = False) -> nn.Module:
    """Overwrite every floating-point tensor of the state dict by the rule; integers stay.

    `hot` makes attention peaked: bias tables of deviation 1 and larger qkv weights.
    """
    state = model.state_dict()
    for name, tensor in state.items():
        if tensor.is_floating_point():
            state[name] = torch.from_numpy(_values(name, tuple(tensor.shape), hot))
    model.load_state_dict(state, strict=True)
    return model


def picture(shape: Sequence[int]) -> Tensor:
    """The input of a stored case, float32."""
    return torch.from_numpy(_normal(INPUT_SEED, tuple(int(n) for n in shape)))


def _values(name: str, shape: tuple[int, ...], hot: bool) -> np.ndarray:
    draw = _normal(zlib.crc32(name.encode()), shape)
    small = np.float32(0.02) * draw
    module, _, leaf = name.rpartition(".")
    if leaf in ("gamma1", "gamma2"):
        return np.float32(0.1) + small
    if leaf == "weight" and draw.ndim == 1 and module.rpartition(".")[2].startswith("norm"):
        return np.float32(1) + small
    if hot and leaf == "rpb":
        return draw
    if hot and name.endswith("attn.qkv.weight"):
        return np.float32(0.1) * draw
    return small


def _normal(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    generator = np.random.Generator(np.random.PCG64(seed))
    return generator.standard_normal(shape, dtype=np.float32)
