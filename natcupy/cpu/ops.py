"""The kernels as torch operators: shapes for tracing, autograd, vmap.

In: checked tensors. Out: tensors with history. Two operators, `natcupy::cpu_attention` and
`natcupy::cpu_attention_backward`. Gradients of gradients go through the plain torch formula, which
is differentiable any number of times.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active as _are_transforms_active
from torch._C._functorch import is_legacy_batchedtensor
from torch.autograd import forward_ad

from natcupy import reference
from natcupy.cpu import kernels, launch
from natcupy.eager import in_memory, is_plain, is_watched, plain_apply
from natcupy.neighborhood import Neighborhood

_library = torch.library.Library("natcupy", "FRAGMENT")

_INPUTS = (
    "Tensor query, Tensor key, Tensor value, Tensor? rpb, Tensor? additional_keys, "
    "Tensor? additional_values"
)
_HOOD = "int[] kernel_size, int[] stride, int[] dilation, bool[] is_causal, float scale"

_library.define(f"cpu_attention({_INPUTS}, {_HOOD}) -> (Tensor, Tensor)")
_library.define(
    f"cpu_attention_backward(Tensor grad_out, Tensor? grad_lse, {_INPUTS}, {_HOOD}, "
    "bool want_query, bool want_key_value, bool want_rpb) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def attention(
    query, key, value, hood: Neighborhood, scale, rpb, extra_keys, extra_values, return_lse=True
):
    """`reference.attention` by the operators here: (out, lse), with history as there."""
    tensors = (query, key, value, rpb, extra_keys, extra_values)
    if is_plain(tensors):
        out, lse = Plain(hood, scale)(tensors, return_lse)
    elif _needs_formula(tensors):
        return reference.attention(
            query, key, value, hood, scale, rpb, extra_keys, extra_values, return_lse
        )
    else:
        out, lse = torch.ops.natcupy.cpu_attention(*tensors, *_lists(hood), scale)
    return out, lse if return_lse else None


def _lists(hood: Neighborhood) -> tuple[list, ...]:
    return list(hood.kernel_size), list(hood.stride), list(hood.dilation), list(hood.is_causal)


def _hood(kernel_size, stride, dilation, is_causal) -> Neighborhood:
    return Neighborhood(tuple(kernel_size), tuple(stride), tuple(dilation), tuple(is_causal))


class Plain:
    """Calls in which `is_plain` holds, past the dispatcher, with tensors of one layout."""

    def __init__(self, hood: Neighborhood, scale: float):
        self.forward = launch.Forward(hood, scale)

    def __call__(self, tensors, return_lse: bool):
        """(out, lse), and None for the lse if it is not asked for."""
        if torch.is_grad_enabled():
            for x in tensors:
                if x is not None and x.requires_grad:
                    return _recorded(*tensors, self.forward, return_lse)
        return self.forward(tensors, return_lse)


def _needs_formula(tensors) -> bool:
    """True under forward-mode differentiation and `torch.func.grad` and its kin.

    They have to see inside: custom operators have no rule for them.
    """
    if torch.compiler.is_compiling():  # which cannot tell `vmap` from the others
        return _are_transforms_active() or forward_ad._current_level >= 0
    present = [x for x in tensors if x is not None]
    if forward_ad._current_level >= 0 and any(
        forward_ad.unpack_dual(x).tangent is not None for x in present
    ):
        return True
    return any(_is_tracked(x) for x in present)


def _is_tracked(x: Tensor) -> bool:
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(x):
        if functorch.is_gradtrackingtensor(x):
            return True
        x = functorch.get_unwrapped(x)
    return False


# ------------------------------------------------------------------------------------------------
# the operators


def _forward(query, key, value, rpb, extra_keys, extra_values, *rest):
    *window, scale = rest
    tensors = (query, key, value, rpb, extra_keys, extra_values)
    return launch.Forward(_hood(*window), scale)(tensors)


def _backward(grad_out, grad_lse, query, key, value, rpb, extra_keys, extra_values, *rest):
    *window, scale, want_query, want_key_value, want_rpb = rest
    found = launch.backward(
        grad_out, grad_lse, query, key, value, _hood(*window), scale, rpb, extra_keys,
        extra_values, (want_query, want_key_value, want_rpb),
    )  # fmt: skip
    return tuple(query.new_empty(0) if x is None else x.contiguous() for x in found)


def _forward_shapes(query, key, value, rpb, extra_keys, extra_values, *rest):
    out = query.new_empty((*query.shape[:-1], value.shape[-1]))
    return out, query.new_empty(query.shape[:-1], dtype=kernels.compute_dtype(query.dtype))


def _backward_shapes(grad_out, grad_lse, query, key, value, rpb, extra_keys, extra_values, *rest):
    *_, want_query, want_key_value, want_rpb = rest
    wanted = (want_query, want_key_value, want_key_value, want_rpb, *[want_key_value] * 2)
    inputs = (query, key, value, rpb, extra_keys, extra_values)
    return tuple(
        x.new_empty(x.shape) if want and x is not None else query.new_empty(0)
        for x, want in zip(inputs, wanted, strict=True)
    )


_library.impl("cpu_attention", _forward, "CPU")
_library.impl("cpu_attention_backward", _backward, "CPU")
torch.library.register_fake("natcupy::cpu_attention", _forward_shapes, lib=_library)
torch.library.register_fake("natcupy::cpu_attention_backward", _backward_shapes, lib=_library)


# ------------------------------------------------------------------------------------------------
# autograd


class _Attention(torch.autograd.Function):
    """The operators' autograd without the dispatcher; same rules as below."""

    @staticmethod
    def forward(ctx, query, key, value, rpb, extra_keys, extra_values, run, return_lse):
        tensors = (query, key, value, rpb, extra_keys, extra_values)
        ctx.save_for_backward(*tensors)
        ctx.hood, ctx.scale = run.hood, run.scale
        ctx.set_materialize_grads(False)
        return run(tensors, return_lse)

    @staticmethod
    def backward(ctx, grad_out, grad_lse):
        run = _dispatched if is_watched() else _launched
        return (*_gradients(ctx, grad_out, grad_lse, ctx.hood, ctx.scale, run), None, None)


_recorded = plain_apply(_Attention)


def _launched(grad_out, grad_lse, inputs, hood, scale, wants):
    if _is_batched(grad_out) or _is_batched(grad_lse):
        return _dispatched(grad_out, grad_lse, inputs, hood, scale, wants)  # is_grads_batched
    query, key, value, *others = inputs
    return launch.backward(
        grad_out, grad_lse, query, key, value, hood, scale, *others, wants, packed=True
    )


def _is_batched(x: Tensor | None) -> bool:
    return x is not None and is_legacy_batchedtensor(x)


def _dispatched(grad_out, grad_lse, inputs, hood, scale, wants):
    return torch.ops.natcupy.cpu_attention_backward(
        grad_out, grad_lse, *inputs, *_lists(hood), scale, *wants
    )


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:6])
    *window, scale = inputs[6:]
    ctx.hood, ctx.scale = _hood(*window), scale
    ctx.set_materialize_grads(False)


def _operator_gradients(ctx, grad_out, grad_lse):
    found = _gradients(ctx, grad_out, grad_lse, ctx.hood, ctx.scale, _dispatched)
    return (*found, *[None] * 5)


def _gradients(ctx, grad_out, grad_lse, hood, scale, run):
    """Gradients of the six tensors, by `run` or where they may be differentiated by the formula."""
    inputs = ctx.saved_tensors
    needs = ctx.needs_input_grad[:6]
    grad_out, grad_lse = in_memory(grad_out), in_memory(grad_lse)
    if grad_out is None and grad_lse is None:
        return (None,) * 6
    grads = (grad_out, grad_lse)
    if torch.is_grad_enabled() and _may_be_differentiated((*inputs, *grads)):
        return _differentiable_gradients(inputs, needs, *grads, hood, scale)
    if run is _dispatched and _needs_formula((*inputs, *grads)):
        return _differentiable_gradients(inputs, needs, *grads, hood, scale)
    if grad_out is None:
        query, _, value, *_ = inputs
        grad_out = query.new_zeros((*query.shape[:-1], value.shape[-1]))
    wants = needs[0], any((*needs[1:3], *needs[4:6])), needs[3]
    found = run(grad_out, grad_lse, inputs, hood, scale, wants)
    return tuple(x if need else None for x, need in zip(found, needs, strict=True))


def _may_be_differentiated(tensors) -> bool:
    return any(x is not None and x.requires_grad for x in tensors)


def _differentiable_gradients(inputs, needs, grad_out, grad_lse, hood, scale):
    """The same gradients by plain torch, with a history of their own if one is recorded.

    `torch.func` has its own way to find them: inside a transform autograd does not see them all.
    """
    grads = [g for g in (grad_out, grad_lse) if g is not None]

    def results(*needed):
        needed = iter(needed)
        query, key, value, *others = (
            next(needed) if need else x for x, need in zip(inputs, needs, strict=True)
        )
        found = reference.attention(query, key, value, hood, scale, *others)
        return tuple(r for r, g in zip(found, (grad_out, grad_lse), strict=True) if g is not None)

    needed = [x for x, need in zip(inputs, needs, strict=True) if need]
    if _are_transforms_active():
        _, pull_back = torch.func.vjp(results, *needed)
        found = iter(pull_back(tuple(grads)))
    else:
        recorded = torch.is_grad_enabled()
        with torch.enable_grad():
            aliases = [x.view_as(x) for x in needed]
            out = results(*aliases)
        found = iter(torch.autograd.grad(out, aliases, grads, create_graph=recorded))
    return [next(found) if need else None for need in needs]


torch.library.register_autograd(
    "natcupy::cpu_attention", _operator_gradients, setup_context=_save, lib=_library
)


# ------------------------------------------------------------------------------------------------
# vmap


def _per_sample(operator, tensors, dims, size, rest):
    """One call per element, stacked: for a bias that differs between them."""
    columns = [
        [x] * size if dim is None else x.unbind(dim) for x, dim in zip(tensors, dims, strict=True)
    ]
    results = [operator(*row, *rest) for row in zip(*columns, strict=True)]
    return tuple(torch.stack(column) for column in zip(*results, strict=True))


def _into_batch(x: Tensor | None, dim: int | None, size: int) -> Tensor | None:
    """[..., size at dim, ...] or without that axis to [size * batch, ...]."""
    if x is None:
        return None
    x = x.unsqueeze(0).expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
    return x.flatten(0, 1)


def _forward_vmap(info, dims, *args):
    tensors, rest, size = args[:6], args[6:], info.batch_size
    operator = torch.ops.natcupy.cpu_attention
    if dims[3] is not None:
        return _per_sample(operator, tensors, dims[:6], size, rest), (0, 0)
    tensors = [
        x if place == 3 else _into_batch(x, dims[place], size) for place, x in enumerate(tensors)
    ]
    results = operator(*tensors, *rest)
    return tuple(x.unflatten(0, (size, -1)) for x in results), (0, 0)


def _backward_vmap(info, dims, *args):
    tensors, rest, size = args[:8], args[8:], info.batch_size
    operator = torch.ops.natcupy.cpu_attention_backward
    if tensors[5] is not None:  # gradients of the bias are sums over one sample's batch
        return _per_sample(operator, tensors, dims[:8], size, rest), (0,) * 6
    results = operator(
        *(_into_batch(x, dim, size) for x, dim in zip(tensors, dims[:8], strict=True)), *rest
    )
    split = [x.unflatten(0, (size, -1)) if x.dim() > 1 else x.expand(size, 0) for x in results]
    return tuple(split), (0,) * 6


torch.library.register_vmap("natcupy::cpu_attention", _forward_vmap, lib=_library)
torch.library.register_vmap("natcupy::cpu_attention_backward", _backward_vmap, lib=_library)
