"""A call becomes launches: tensors come in, results go out, `plan` says what runs in between.

Torch owns all memory; results are fresh and contiguous (the log-sum-exp lies head by head), the
same bits on every run. Tensors whose last axis is contiguous are read in place, others are copied
first. This room knows tensors and launches, but no autograd.
"""

from __future__ import annotations

import torch
from torch import Tensor

from natcupy.cuda import jit, plan, tuning
from natcupy.cuda.heuristics import BOTH, FORWARD, KEYS, QUERIES
from natcupy.cuda.launch import current_launcher, refuse_forked
from natcupy.layouts import joined
from natcupy.neighborhood import Neighborhood

DTYPES = {
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
}


LAYOUTS = 4096  # calls whose plans are kept; as many image sizes as a dataset may have
VARIANTS = 64  # plans kept for calls that are equal but for their addresses

_plans: dict[tuple, plan.Plan] = {}


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _readable(x: Tensor | None) -> Tensor | None:
    """`x`, or a copy where its last axis is not contiguous."""
    if x is None or x.stride(-1) == 1 or x.shape[-1] == 1:
        return x
    return x.contiguous()


def _headwise(x: Tensor) -> Tensor:
    """[B, *spatial, H] laid out as contiguous [B, H, *spatial], copied only if it is not."""
    return x.movedim(-1, 1).contiguous()


def _new_lse(query: Tensor) -> Tensor:
    """[B, *spatial, H], laid out head by head."""
    batch, *spatial, heads, _ = query.shape
    steps = [1]
    for extent in reversed(spatial):
        steps.append(steps[-1] * extent)
    tokens = steps.pop()
    return torch.empty_strided(
        (batch, *spatial, heads),
        (heads * tokens, *reversed(steps), tokens),
        dtype=_sum_dtype(query.dtype),
        device=query.device,
    )


def _tf32_allowed() -> bool:
    """Whether torch's own setting lets float32 matrix products on CUDA round to TF32."""
    matmul = torch.backends.cuda.matmul
    precision = getattr(matmul, "fp32_precision", None)  # from torch 2.9 on the one that counts
    return matmul.allow_tf32 if precision is None else precision == "tf32"


def _problem(tensors: dict[str, Tensor | None], hood, scale, rpb, arch, alignment) -> plan.Problem:
    """The call in numbers; `tensors` are those with rows, inputs and results."""
    query, key, value, extra = (tensors[n] for n in ("query", "key", "value", "extra_key"))
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
        arch=arch,
        alignment=alignment,
        strides=tuple((n, x.stride()[:-1]) for n, x in tensors.items() if x is not None),
        tf32=query.dtype == torch.float32 and _tf32_allowed(),
    )


def _planned(
    what, tensors, window, scale: float, rpb: bool, make, known=None, varying=None
) -> plan.Plan:
    """The plan of a call, found by its layout; `make(problem)` where it is met the first time.

    `what` tells apart what else decides: forward, or which gradients are wanted. `known` are the
    plans of calls that differ from this one in addresses alone, and in what `varying` tells.
    """
    query, address = tensors["query"], 16
    for x in tensors.values():
        if x is not None:
            address |= x.data_ptr()
    alignment = address & -address
    tf32 = query.dtype == torch.float32 and _tf32_allowed()
    if known is None:
        return _by_layout(what, tensors, window, scale, rpb, make, alignment, tf32)
    brief = what, alignment, tf32, plan.generation(), varying
    found = known.get(brief)
    if found is None:
        if len(known) >= VARIANTS:
            known.clear()
        found = _by_layout(what, tensors, window, scale, rpb, make, alignment, tf32)
        known[brief] = found
    return found


def _by_layout(what, tensors, window, scale, rpb, make, alignment, tf32) -> plan.Plan:
    device, dtype = tensors["query"].device, tensors["query"].dtype
    layout = [None if x is None else (x.shape, x.stride()) for x in tensors.values()]
    target = jit.arch_for(device)
    window = tuple(map(tuple, window))
    key = (
        what, tf32, dtype, device, target.arch, alignment, scale, rpb, plan.generation(),
        window, *layout,
    )  # fmt: skip
    found = _plans.get(key)
    if found is None:
        hood = Neighborhood(*window)
        problem = _problem(tensors, hood, scale, rpb, target.capability, alignment)
        found = make(problem)
        if len(_plans) >= LAYOUTS:
            _plans.clear()
        _plans[key] = found
    return found


def _run(recipes, tensors: dict[str, Tensor | None], device: torch.device) -> None:
    pointers = {name: x.data_ptr() for name, x in tensors.items() if x is not None}
    for recipe in recipes:
        jit.launch(plan.fill(recipe, pointers), device, keep_alive=tensors.values())


def _trial(tensors: dict[str, Tensor | None], p: plan.Problem, device: torch.device):
    """What runs one side of a call on its own tensors, to be timed; results are overwritten."""

    def run(part: plan.Plan) -> None:
        scratch = {
            name: torch.zeros(count, dtype=tensors["lse"].dtype, device=device)
            for name, count, _ in (plan.delta_of(p), *part.scratch)
        }
        _run(part.recipes, {**scratch, **tensors}, device)

    return run


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


def forward(
    query, key, value, rpb, extra_k, extra_v,
    kernel_size, stride, dilation, causal, scale, known=None,
):  # fmt: skip
    """(out, lse) of `na_fwd`.

    `known` holds the plans of checked calls with tensors of these shapes, strides and dtypes.
    """
    refuse_forked(query.device)
    if known is None:
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
    rest = {"lse": lse, "rpb": None if rpb is None else rpb.to(lse.dtype).contiguous()}

    def make(p: plan.Problem) -> plan.Plan:
        trial = _trial({**tensors, **rest}, p, query.device)
        return plan.forward(p, tuning.choice(p, FORWARD, False, query.device, trial))

    window = (kernel_size, stride, dilation, causal)
    todo = _planned(FORWARD, tensors, window, scale, rpb is not None, make, known)
    _run(todo.recipes, {**tensors, **rest}, query.device)
    return out, lse


def backward(
    d_out, d_lse, query, key, value, rpb, extra_k, extra_v, out, lse,
    kernel_size, stride, dilation, causal, scale, wanted, packed=False, known=None,
):  # fmt: skip
    """Gradients of the six inputs of `na_fwd`, empty where `wanted` is False.

    `packed` lets those of query, key and value lie in one tensor where the three themselves do, so
    that whoever cut it need not join them again. `known` is that of the forward pass.
    """
    refuse_forked(query.device)
    _check(query, key, value, extra_k, extra_v, out, d_out)
    inputs = (query, key, value, rpb, extra_k, extra_v)
    if query.numel() == 0 or not any(wanted):
        return _zero_gradients(inputs, wanted)
    if extra_k is not None and extra_k.shape[1] == 0:
        extra_k = extra_v = None
    keys, extras = wanted[1] or wanted[2], extra_k is not None and (wanted[4] or wanted[5])
    if packed and keys and (whole := joined(query, key, value)) is not None:
        d_query, d_key, d_value = torch.empty_like(whole).unbind(-3)
    else:
        d_query = torch.empty_like(query, memory_format=torch.contiguous_format)
        d_key, d_value = _like_if(keys, key), _like_if(keys, value)
    d_extra_k, d_extra_v = _like_if(extras, extra_k), _like_if(extras, extra_v)
    d_rpb = rpb.new_empty(rpb.shape, dtype=lse.dtype) if wanted[3] else None
    tensors = {
        "query": _readable(query),
        "key": _readable(key),
        "value": _readable(value),
        "extra_key": _readable(extra_k),
        "extra_value": _readable(extra_v),
        "out": _readable(out),
        "d_out": torch.zeros_like(out) if d_out is None else _readable(d_out),
        "d_query": d_query,
        "d_key": d_key,
        "d_value": d_value,
    }
    rest = {
        "rpb": None if rpb is None else rpb.to(lse.dtype).contiguous(),
        "lse": _headwise(lse),
        "d_lse": None if d_lse is None else _headwise(d_lse.to(lse.dtype)),
        "d_extra_key": d_extra_k,
        "d_extra_value": d_extra_v,
        "d_rpb": d_rpb,
    }

    def make(p: plan.Problem) -> plan.Plan:
        if plan.fuses(p, keys):
            return plan.backward(p, keys, bool(wanted[3]), extras)
        trial = _trial({**tensors, **rest}, p, query.device)
        if plan.joins(p, keys):
            both = tuning.choice(p, BOTH, bool(wanted[3]), query.device, trial)
            if both != plan.APART:
                return plan.backward(p, keys, bool(wanted[3]), extras, both=both)
        queries = tuning.choice(p, QUERIES, bool(wanted[3]), query.device, trial)
        chosen = tuning.choice(p, KEYS, False, query.device, trial) if keys else None
        return plan.backward(p, keys, bool(wanted[3]), extras, queries, chosen, plan.APART)

    window = (kernel_size, stride, dilation, causal)
    what = (keys, bool(wanted[3]), extras)
    varying = None  # what autograd saved may come back in another layout, as from save_on_cpu
    if known is not None:
        varying = tuple(None if x is None else x.stride() for x in tensors.values())
    todo = _planned(what, tensors, window, scale, rpb is not None, make, known, varying)
    tensors |= rest
    for name, count, zeroed in todo.scratch:
        new = torch.zeros if zeroed else torch.empty
        tensors[name] = new(count, dtype=lse.dtype, device=query.device)
    _run(todo.recipes, tensors, query.device)
    d_rpb = d_rpb.to(rpb.dtype) if wanted[3] else None
    made = (d_query, d_key, d_value, d_rpb, d_extra_k, d_extra_v)
    pairs = zip(made, inputs, wanted, strict=True)
    return tuple(_none(query) if not w else _zeros(x) if m is None else m for m, x, w in pairs)


def _zeros(x: Tensor) -> Tensor:
    return torch.zeros_like(x, memory_format=torch.contiguous_format)


def _none(query: Tensor) -> Tensor:
    return query.new_empty((0,))


def _like_if(wanted: bool, x: Tensor | None) -> Tensor | None:
    return torch.empty_like(x, memory_format=torch.contiguous_format) if wanted else None


def _zero_gradients(inputs, wanted) -> tuple[Tensor, ...]:
    return tuple(_zeros(x) if w else _none(inputs[0]) for x, w in zip(inputs, wanted, strict=True))


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
