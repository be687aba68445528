"""The torch contract of the CUDA engine: ops `natcupy::na_fwd` and `natcupy::na_bwd`.

In: checked tensors and a `Neighborhood`. Out: attention output, log-sum-exp and every gradient, as
`run` computes them.

Autograd, autocast, fake kernels and vmap are registered here. Under `torch.func` transforms
`attention` enters through a `torch.autograd.Function`, which those understand; `torch.compile`,
`torch.export` and direct callers use the ops. Second derivatives and forward-mode derivatives are
refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from natcupy.cuda import batching, jit, plan, run
from natcupy.cuda.launch import current_launcher
from natcupy.eager import is_in_memory, plain_apply
from natcupy.neighborhood import Neighborhood

REMEDY = "use backend='torch', which runs every call on any device"


def attention(
    query: Tensor,  # [B, *spatial, H, D]
    key: Tensor,  # [B, *spatial, Hkv, D]
    value: Tensor,  # [B, *spatial, Hkv, Dv]
    hood: Neighborhood,
    scale: float,
    rpb: Tensor | None,  # [H, 2K-1, ...]
    additional_keys: Tensor | None,  # [B, E, Hkv, D]
    additional_values: Tensor | None,  # [B, E, Hkv, Dv]
    return_lse: bool = True,
) -> tuple[Tensor, Tensor]:  # [B, *spatial, H, Dv], [B, *spatial, H]
    """Attention output in the inputs' dtype and natural log-sum-exp in the compute dtype.

    The kernels make the log-sum-exp anyhow, so `return_lse` changes nothing.
    """
    del return_lse
    return _entry(torch.ops.natcupy.na_fwd, _Forward, _EagerForward, _forward)(
        query, key, value, rpb, additional_keys, additional_values,
        hood.kernel_size, hood.stride, hood.dilation, hood.is_causal, scale,
    )  # fmt: skip


class _PlainAttention:
    """`attention` for plain calls (see `natcupy.eager`) with tensors of one layout."""

    def __init__(self, hood: Neighborhood, scale: float):
        self._window = (hood.kernel_size, hood.stride, hood.dilation, hood.is_causal, scale)
        self._plans: dict = {}

    def __call__(self, tensors, return_lse: bool):
        del return_lse
        if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
            return _recorded(self._plans, *tensors, *self._window)
        return _plain_forward(self._plans, *tensors, *self._window)


#: Makes what runs plain calls, of a `Neighborhood` and a scale.
plain_attention = _PlainAttention


def unsupported_reason(query, key, value, hood, rpb, additional_keys, additional_values):
    """None when this backend can run the call, else every reason and remedy in one text."""
    del key, additional_keys, additional_values
    reasons = [*_device_reasons(query.device), *_size_reasons(query, value, hood, rpb)]
    return "; ".join(reasons) + "." if reasons else None


def _device_reasons(device: torch.device) -> list[str]:
    launcher = current_launcher()
    if launcher is not None and launcher.device_type == device.type:
        return []
    if device.type != "cuda":
        remedy = "move them with .to('cuda')"
        if not torch.cuda.is_available():
            remedy = "and torch finds no CUDA GPU here"
        return [f"it needs CUDA tensors, got tensors on {device}: {remedy}"]
    reason = _machine_reason(device.type, device.index)
    return [reason] if reason else []


def _machine_reason(kind: str, index: int | None) -> str:
    """Why this machine runs no kernels on a device, "" if it does."""
    try:
        jit.arch_for(torch.device(kind, index))
    except (ImportError, RuntimeError) as error:
        return str(error).rstrip(".")
    return ""


# Asked once where torch.compile traces: the mark of `torch.compiler.assume_constant_result`, which
# itself imports the whole compiler.
_machine_reason._dynamo_marked_constant = True


def _size_reasons(query: Tensor, value: Tensor, hood: Neighborhood, rpb) -> list[str]:
    reasons = []
    if query.dtype not in run.DTYPES:
        reasons.append(f"it needs float16, bfloat16, float32 or float64, got {query.dtype}")
    if max(query.shape[-1], value.shape[-1]) > plan.LARGEST_DIM:
        reasons.append(
            f"head_dim and value_dim must be at most {plan.LARGEST_DIM}, got {query.shape[-1]} "
            f"and {value.shape[-1]}: split the heads, or {REMEDY}"
        )
    tokens, biases = 1, 1  # plain loops: torch.compile traces them
    for length in query.shape[1:-2]:
        tokens *= length
    for k in hood.kernel_size:
        biases *= 2 * k - 1
    if tokens > plan.LARGEST_IMAGE:
        reasons.append(
            f"an image must have at most {plan.LARGEST_IMAGE} tokens, got {tokens}: cut it into "
            "parts that overlap by a window"
        )
    if rpb is not None and biases > plan.LARGEST_BIAS:
        reasons.append(
            f"a head's bias table must have at most {plan.LARGEST_BIAS} entries, got {biases}: "
            "use a smaller kernel_size"
        )
    return reasons


# ------------------------------------------------------------------------------------------------
# the ops

_lib = torch.library.Library("natcupy", "FRAGMENT")
_INPUTS = (
    "Tensor query, Tensor key, Tensor value, Tensor? rpb, "
    "Tensor? additional_keys, Tensor? additional_values"
)
_HOOD = "int[] kernel_size, int[] stride, int[] dilation, bool[] is_causal, float scale"
_tags = (torch.Tag.pt2_compliant_tag,)
_lib.define(f"na_fwd({_INPUTS}, {_HOOD}) -> (Tensor, Tensor)", tags=_tags)
_lib.define(
    f"na_bwd(Tensor? d_out, Tensor? d_lse, {_INPUTS}, Tensor out, Tensor lse, {_HOOD}, "
    "bool[] wanted) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=_tags,
)


for _key in ("CUDA", "CPU"):
    _lib.impl("na_fwd", run.forward, _key)
    _lib.impl("na_bwd", run.backward, _key)
torch.library.register_fake("natcupy::na_fwd", run.fake_forward, lib=_lib)
torch.library.register_fake("natcupy::na_bwd", run.fake_backward, lib=_lib)


# ------------------------------------------------------------------------------------------------
# autograd

_FORWARD_MODE = (
    "the CUDA backend has no forward-mode derivative (jvp, jacfwd, dual numbers); "
    "pass backend='torch', or use reverse mode."
)
_SECOND = (
    "the CUDA backend has no second derivative; pass backend='torch' where a gradient is "
    "differentiated again."
)


def _below_autograd(op, *args):
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


_PLAIN = (Tensor, torch.nn.Parameter)


def _nobody_looks(args) -> bool:
    """Whether no mode, subclass, fake device or profiler would see a call of the op.

    Then its kernel may be called directly, which saves the dispatcher's time.
    """
    return (
        not torch._C._len_torch_dispatch_stack()
        and not torch._C._autograd._profiler_enabled()
        and all(
            type(x) in _PLAIN
            and is_in_memory(x)
            and x.device.type in ("cuda", "cpu")
            and not torch._C._functorch.is_legacy_batchedtensor(x)  # is_grads_batched
            for x in args
            if isinstance(x, Tensor)
        )
    )


def _forward(*args):
    """`na_fwd` below autograd."""
    if _nobody_looks(args):
        return run.forward(*args)
    return _below_autograd(torch.ops.natcupy.na_fwd.default, *args)


def _backward(*args):
    """`na_bwd` below autograd."""
    if _nobody_looks(args):
        return run.backward(*args)
    return _below_autograd(torch.ops.natcupy.na_bwd.default, *args)


def _packed_backward(*args, known: dict | None = None):
    """`na_bwd` for autograd's own graph: packed inputs get packed gradients.

    The op itself never does that: its fake kernel promises contiguous ones, and a compiled graph
    relies on it.
    """
    if _nobody_looks(args):
        return run.backward(*args, packed=True, known=known)
    return _below_autograd(torch.ops.natcupy.na_bwd.default, *args)


class _Forward(torch.autograd.Function):
    """`na_fwd` with its gradients."""

    @staticmethod
    def forward(*args):
        return _below_autograd(torch.ops.natcupy.na_fwd.default, *args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:6], *output)
        ctx.hood = inputs[6:]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, d_out, d_lse):
        return _gradients(ctx, ctx.needs_input_grad[:6], d_out, d_lse)

    @staticmethod
    def vmap(info, in_dims, *args):
        return batching.forward(_Forward.apply, info, in_dims, *args)

    @staticmethod
    def jvp(ctx, *tangents):
        raise NotImplementedError(_FORWARD_MODE)


class _Backward(torch.autograd.Function):
    """`na_bwd`, whose own derivatives are refused."""

    @staticmethod
    def forward(*args):
        return _below_autograd(torch.ops.natcupy.na_bwd.default, *args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *gradients):
        raise NotImplementedError(_SECOND)

    @staticmethod
    def vmap(info, in_dims, *args):
        return batching.backward(_Backward.apply, info, in_dims, *args)

    @staticmethod
    def jvp(ctx, *tangents):
        raise NotImplementedError(_FORWARD_MODE)


class _EagerForward(torch.autograd.Function):
    """`_Forward` in the older form, which costs a fraction of it and knows no transforms."""

    @staticmethod
    def forward(ctx, *args):
        output = _forward(*args)
        _Forward.setup_context(ctx, args, output)
        return output

    backward = staticmethod(_Forward.backward)
    jvp = staticmethod(_Forward.jvp)


class _EagerBackward(torch.autograd.Function):
    """`_Backward` in the older form."""

    @staticmethod
    def forward(ctx, *args):
        return _backward(*args)

    backward = staticmethod(_Backward.backward)
    jvp = staticmethod(_Backward.jvp)


def _plain_forward(known: dict, *args):
    """`_forward` of a plain call, whose plans are `known`: a profiler alone may look."""
    if not torch._C._autograd._profiler_enabled():
        return run.forward(*args, known=known)
    return _below_autograd(torch.ops.natcupy.na_fwd.default, *args)


class _PlainForward(torch.autograd.Function):
    """`_EagerForward` of a plain call: its plans are known to its backward pass too."""

    @staticmethod
    def forward(ctx, known, *args):
        output = _plain_forward(known, *args)
        _Forward.setup_context(ctx, args, output)
        ctx.known = known
        return output

    @staticmethod
    def backward(ctx, d_out, d_lse):
        return None, *_gradients(ctx, ctx.needs_input_grad[1:7], d_out, d_lse, ctx.known)

    @staticmethod
    def jvp(ctx, *tangents):
        raise NotImplementedError(_FORWARD_MODE)


_recorded = plain_apply(_PlainForward)


def _gradients(ctx, needed: Sequence[bool], d_out, d_lse, known: dict | None = None) -> tuple:
    """What a backward pass returns for the arguments of `na_fwd`."""
    wanted = [bool(x) for x in needed]
    if d_out is None and d_lse is None:
        return (None,) * 11
    below = _packed_backward if known is None else partial(_packed_backward, known=known)
    enter = _entry(torch.ops.natcupy.na_bwd, _Backward, _EagerBackward, below)
    gradients = enter(d_out, d_lse, *ctx.saved_tensors, *ctx.hood, wanted)
    return *(g if w else None for g, w in zip(gradients, wanted, strict=True)), *(None,) * 5


def _entry(op, transformed: type[torch.autograd.Function], eager, below):
    """The way in that fits the moment: traced, under a torch.func transform, or plain."""
    if torch.compiler.is_compiling():
        return op
    if torch._C._are_functorch_transforms_active():
        return transformed.apply
    return partial(_plain, eager, below)


def _plain(function: type[torch.autograd.Function], below, *args):
    """Record a graph only where a gradient is wanted; a dual number reaches jvp, which refuses."""
    tensors = [x for x in args if isinstance(x, Tensor)]
    recorded = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    if recorded or any(unpack_dual(x).tangent is not None for x in tensors):
        return function.apply(*args)
    return below(*args)


def _autograd(function: type[torch.autograd.Function], below):
    def kernel(*args):
        if torch._C._are_functorch_transforms_active():
            raise NotImplementedError(
                "natcupy's CUDA ops cannot be differentiated inside torch.func transforms; call "
                "natcupy.na1d, na2d or na3d there, and outside torch.compile, or with "
                "backend='torch'."
            )
        return _plain(function, below, *args)

    return kernel


_lib.impl("na_fwd", _autograd(_EagerForward, _forward), "Autograd")
_lib.impl("na_bwd", _autograd(_EagerBackward, _backward), "Autograd")


# ------------------------------------------------------------------------------------------------
# autocast: its dtype for every row tensor but float64 ones, as the public functions do


def _autocast(device_type: str):
    def kernel(*args):
        dtype = torch.get_autocast_dtype(device_type)
        narrow = (torch.float16, torch.bfloat16, torch.float32)
        cast = [
            x.to(dtype) if i != 3 and isinstance(x, Tensor) and x.dtype in narrow else x
            for i, x in enumerate(args[:6])
        ]
        with torch.autocast(device_type, enabled=False):
            return torch.ops.natcupy.na_fwd(*cast, *args[6:])

    return kernel


_lib.impl("na_fwd", _autocast("cuda"), "AutocastCUDA")
_lib.impl("na_fwd", _autocast("cpu"), "AutocastCPU")


# ------------------------------------------------------------------------------------------------
# vmap


def _register_vmap(name: str, rule) -> None:
    def vmap(info, in_dims: Sequence, *args):
        return rule(getattr(torch.ops.natcupy, name), info, in_dims, *args)

    torch.library.register_vmap(f"natcupy::{name}", vmap, lib=_lib)


_register_vmap("na_fwd", batching.forward)
_register_vmap("na_bwd", batching.backward)
