"""Whether a call is plain: nothing traces, records or transforms its operators.

In: a call's tensors. Out: yes or no. Plain calls need none of the dispatcher's services, which cost
more than a small map's whole attention.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Parameter


def is_plain(tensors: tuple) -> bool:
    """True where the kernels may be called directly; entries that are None do not matter."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    if torch._C._len_torch_dispatch_stack() or torch.autograd.forward_ad._current_level >= 0:
        return False
    is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    for x in tensors:
        if x is not None and (type(x) not in (Tensor, Parameter) or is_wrapped(x)):
            return False
    return True
