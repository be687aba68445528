"""The rule of `golden_fill` for models with batch norms, and the noise that heads are fed alone.

In: a dense model. Out: the same model with every float tensor drawn by the rule.
"""

from __future__ import annotations

import numpy as np
import torch
from golden_fill import _normal, _values, fill
from torch import Tensor, nn

BOX_SEED, MASK_SEED = 20260102, 20260103


def fill_dense(model: nn.Module) -> nn.Module:
    """As `fill`; a batch norm's weight is 1 + 0.02 n and its running variance 1 + 0.02 |n|."""
    fill(model)
    state = model.state_dict()
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            for leaf, shape in (("weight", np.asarray), ("running_var", np.abs)):
                key = f"{name}.{leaf}"
                small = shape(_values(key, tuple(state[key].shape), hot=False))
                state[key] = torch.from_numpy(np.float32(1) + small)
    model.load_state_dict(state, strict=True)
    return model


def noise(seed: int, *shape: int) -> Tensor:
    """Standard normal float32."""
    return torch.from_numpy(_normal(seed, shape))
