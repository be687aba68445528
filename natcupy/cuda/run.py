"""A call becomes launches: tensors come in, results go out, `plan` says what runs in between.

Torch owns all memory; results are fresh and contiguous (the log-sum-exp lies head by head), the
same bits on every run. Tensors whose last axis is contiguous are read in place, others are copied
first. This room knows tensors and launches, but no autograd.
"""

from __future__ import annotations

import torch
from torch import Tensor

from natcupy.cuda import jit, plan
from natcupy.cuda.launch import current_launcher
from natcupy.neighborhood import Neighborhood

DTYPES = {
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
}


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _readable(x: Tensor | None) -> Tensor | None:
    """`x`, or a copy where its last axis is not contiguous."""
    if x is None or x.shape[-1] == 1 or x.stride(-1) == 1:
        return x
    return x.contiguous()


def _headwise(x: Tensor) -> Tensor:
    """[B, *spatial, H] laid out as contiguous [B, H, *spatial], copied only if it is not."""
    return x.movedim(-1, 1).contiguous()


def _new_lse(query: Tensor) -> Tensor:
    batch, *spatial, heads, _ = query.shape
    lse = query.new_empty((batch, heads, *spatial), dtype=_sum_dtype(query.dtype))
    return lse.movedim(1, -1)


def _tf32_allowed() -> bool:
    """Whether torch's own setting lets float32 matrix products on CUDA round to TF32."""
    matmul = torch.backends.cuda.matmul
    precision = getattr(matmul, "fp32_precision", None)  # from torch 2.9 on the one that counts
    return matmul.allow_tf32 if precision is None else precision == "tf32"


def _problem(tensors: dict[str, Tensor | None], hood, scale: float, rpb: bool) -> plan.Problem:
    """The call in numbers; `tensors` are those with rows, inputs and results."""
    query, key, value, extra = (tensors[n] for n in ("query", "key", "value", "extra_key"))
    address = 16
    for x in tensors.values():
        address |= 0 if x is None else x.data_ptr()
    return plan.Problem(
        dtype=DTYPES[query.dtype],
        batch=query.shape[0],
        shape=tuple(query.shape[1:-2]),
        heads=query.shape[-2],
        kv_heads=key.shape[-2],
        head_dim=query.shape[-1],
        value_dim=value.shape[-1],
        extras=0 if extra is None else extra.shape[1],
        hood=hood,
        scale=scale,
        rpb=rpb,
        arch=jit.arch_for(query.device).capability,
        alignment=address & -address,
        strides=tuple((n, x.stride()[:-1]) for n, x in tensors.items() if x is not None),
        tf32=query.dtype == torch.float32 and _tf32_allowed(),
    )


def _run(recipes, tensors: dict[str, Tensor | None], device: torch.device) -> None:
    pointers = {name: x.data_ptr() for name, x in tensors.items() if x is not None}
    for recipe in recipes:
        jit.launch(plan.fill(recipe, pointers), device, keep_alive=tensors.values())


def _check(query: Tensor, *others: Tensor | None) -> None:
    """What memory safety needs, for those who call the ops directly: one dtype, one device."""
    for x in others:
        if x is not None and (x.dtype != query.dtype or x.device != query.device):
            raise TypeError(
                "natcupy's ops need all tensors in one dtype on one device, got "
                f"{x.dtype} on {x.device} beside {query.dtype} on {query.device}."
            )
    device, launcher = query.device, current_launcher()
    if device.type == "cpu" and (launcher is None or launcher.device_type != "cpu"):
        raise RuntimeError(
            f"natcupy's CUDA ops run on CUDA tensors, got tensors on {device}; call natcupy.na1d, "
            "na2d or na3d, which choose a backend for the device."
        )


def forward(query, key, value, rpb, extra_k, extra_v, kernel_size, stride, dilation, causal, scale):
    """(out, lse) of `na_fwd`."""
    _check(query, key, value, extra_k, extra_v)
    out = query.new_empty((*query.shape[:-1], value.shape[-1]))
    lse = _new_lse(query)
    if out.numel() == 0:
        return out, lse
    if extra_k is not None and extra_k.shape[1] == 0:
        extra_k = extra_v = None
    tensors = {
        "query": _readable(query),
        "key": _readable(key),
        "value": _readable(value),
        "extra_key": _readable(extra_k),
        "extra_value": _readable(extra_v),
        "out": out,
    }
    hood = Neighborhood(tuple(kernel_size), tuple(stride), tuple(dilation), tuple(causal))
    todo = plan.forward(_problem(tensors, hood, scale, rpb is not None))
    if rpb is not None:
        rpb = rpb.to(lse.dtype).contiguous()
    _run(todo.recipes, {**tensors, "rpb": rpb, "lse": lse}, query.device)
    return out, lse


def backward(
    d_out, d_lse, query, key, value, rpb, extra_k, extra_v, out, lse,
    kernel_size, stride, dilation, causal, scale, wanted,
):  # fmt: skip
    """Gradients of the six inputs of `na_fwd`, empty where `wanted` is False."""
    _check(query, key, value, extra_k, extra_v, out, d_out)
    inputs = (query, key, value, rpb, extra_k, extra_v)
    if query.numel() == 0 or not any(wanted):
        return _zero_gradients(inputs, wanted)
    if extra_k is not None and extra_k.shape[1] == 0:
        extra_k = extra_v = None
    keys, extras = wanted[1] or wanted[2], extra_k is not None and (wanted[4] or wanted[5])
    d_query = torch.empty_like(query, memory_format=torch.contiguous_format)
    d_key, d_value = _like_if(keys, key), _like_if(keys, value)
    d_extra_k, d_extra_v = _like_if(extras, extra_k), _like_if(extras, extra_v)
    d_rpb = torch.empty_like(rpb, dtype=lse.dtype) if wanted[3] else None
    tensors = {
        "query": _readable(query),
        "key": _readable(key),
        "value": _readable(value),
        "extra_key": _readable(extra_k),
        "extra_value": _readable(extra_v),
        "out": _readable(out),
        "d_out": torch.zeros_like(out) if d_out is None else _readable(d_out),
    }
    hood = Neighborhood(tuple(kernel_size), tuple(stride), tuple(dilation), tuple(causal))
    problem = _problem(tensors, hood, scale, rpb is not None)
    todo = plan.backward(problem, keys, bool(wanted[3]), extras)
    for name, count, zeroed in todo.scratch:
        new = torch.zeros if zeroed else torch.empty
        tensors[name] = new(count, dtype=lse.dtype, device=query.device)
    tensors |= {
        "rpb": None if rpb is None else rpb.to(lse.dtype).contiguous(),
        "lse": _headwise(lse),
        "d_lse": None if d_lse is None else _headwise(d_lse.to(lse.dtype)),
        "d_query": d_query,
        "d_key": d_key,
        "d_value": d_value,
        "d_extra_key": d_extra_k,
        "d_extra_value": d_extra_v,
        "d_rpb": d_rpb,
    }
    _run(todo.recipes, tensors, query.device)
    d_rpb = d_rpb.to(rpb.dtype) if wanted[3] else None
    made = (d_query, d_key, d_value, d_rpb, d_extra_k, d_extra_v)
    zeros = _zero_gradients(inputs, wanted) if None in made else made
    pairs = zip(wanted, made, zeros, inputs, strict=True)
    return tuple(m if w and m is not None else z if w else _none(query) for w, m, z, _ in pairs)


def _none(query: Tensor) -> Tensor:
    return query.new_empty((0,))


def _like_if(wanted: bool, x: Tensor | None) -> Tensor | None:
    return torch.empty_like(x, memory_format=torch.contiguous_format) if wanted else None


def _zero_gradients(inputs, wanted) -> tuple[Tensor, ...]:
    return tuple(
        torch.zeros_like(x, memory_format=torch.contiguous_format) if w else _none(inputs[0])
        for x, w in zip(inputs, wanted, strict=True)
    )


def fake_forward(query, key, value, *_rest):
    """Shapes, strides and dtypes of `forward`, nothing computed."""
    return query.new_empty((*query.shape[:-1], value.shape[-1])), _new_lse(query)


def fake_backward(d_out, d_lse, *rest):
    """Shapes, strides and dtypes of `backward`, nothing computed."""
    del d_out, d_lse
    return tuple(
        torch.empty_like(x, memory_format=torch.contiguous_format) if w else _none(rest[0])
        for x, w in zip(rest[:6], rest[-1], strict=True)
    )
