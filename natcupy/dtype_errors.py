"""What torch says of an input whose dtype is not that of the weights, in words.

In: an error of a module's call. Out: a TypeError with both dtypes and the remedy, or None where the
error comes of something else.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

_OF_DTYPES = re.compile(r"same dtype|expected scalar type|Input type .* should be the same")


def explained(
    error: RuntimeError, module: nn.Module, x: Tensor, names: tuple[str, str, str]
) -> TypeError | None:
    """The error to raise instead.

    Asked only after a failure: hooks, wrappers and autocast may change either dtype before.

    Args:
        error: what `module` raised; kinds of its own, such as `OutOfMemoryError`, stay.
        module: has the weights that `x` met first.
        x: the input.
        names: of the whole module, of the input, and how the module is called in code.
    """
    weight = next(module.parameters(), None)
    if type(error) is not RuntimeError or weight is None or not _OF_DTYPES.search(str(error)):
        return None
    if weight.dtype == x.dtype or not weight.is_floating_point() or weight.device != x.device:
        return None
    if torch.is_autocast_enabled(x.device.type):
        return None
    whole, what, code = names
    other = f", {code}.to({x.dtype}) or torch.autocast" if x.is_floating_point() else ""
    owner = f"{what}'" if what.endswith("s") else f"{what}'s"
    return TypeError(
        f"{whole} must be of the {owner} dtype, its weights are {weight.dtype} and the {what} "
        f"{x.dtype}; use x.to({weight.dtype}){other}."
    )
