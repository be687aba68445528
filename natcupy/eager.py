"""Whether a call is plain: nothing traces, records or transforms its operators.

In: a call's tensors. Out: yes or no. Plain calls need none of the dispatcher's services, which cost
more than a small map's whole attention. Few functions on the way, for the same reason: with cold
caches each costs microseconds.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active as _are_transforms_active
from torch._C._functorch import is_functorch_wrapped_tensor as _is_functorch_wrapped
from torch.autograd import Function, forward_ad
from torch.nn import Parameter

OWN = (Tensor, Parameter)


def is_plain(tensors: tuple) -> bool:
    """True where the kernels may be called directly; entries that are None do not matter."""
    return not is_watched() and all(x is None or is_own(x) for x in tensors)


def plain_apply(function: type[Function]):
    """`function.apply` for plain calls: torch's Python before it asks what `is_plain` answered."""
    return super(Function, function).apply


def is_watched() -> bool:
    """Whether something traces, records or transforms whatever is called."""
    if torch.compiler.is_compiling() or torch._C._is_tracing() or _are_transforms_active():
        return True
    return torch._C._len_torch_dispatch_stack() > 0 or forward_ad._current_level >= 0


def is_own(x) -> bool:
    """Whether a tensor is torch's own kind, and its memory holds what it is."""
    if type(x) not in OWN or x.is_neg() or x._is_zerotensor():  # `is_in_memory`, without a call
        return False
    return not _is_functorch_wrapped(x)


def is_in_memory(x: Tensor) -> bool:
    """False for the lazy negatives that parts of conjugates are, and for zeros without memory."""
    return not (x.is_neg() or x._is_zerotensor())


def in_memory(x: Tensor | None) -> Tensor | None:
    """The tensor, or a copy that is in memory."""
    return x if x is None or is_in_memory(x) else x.clone()
