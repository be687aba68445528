"""The CPU backend: kernels generated as LLVM IR, compiled in process, run on torch's threads.

In: checked tensors and a `Neighborhood`. Out: attention outputs and log-sum-exp, with history.

`plan` turns sizes into a table, with `classes`, `rows` and `cuts`. `micro`, `pack` and `sums`
write the inner functions with `emit`, gathered in `common`; `task`, `block`, `forward` and
`backward` what calls them. `host` compiles both, `threads` runs them, `launch` is one call, `ops`
its face towards torch. Importing this package loads none of them; llvmlite is needed only when a
kernel runs.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from natcupy.neighborhood import Neighborhood


def unsupported_reason(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    hood: Neighborhood,
    rpb: Tensor | None,
    additional_keys: Tensor | None,
    additional_values: Tensor | None,
) -> str | None:
    """None if `attention` can run this call, else a sentence that says why and what to do.

    Every combination of parameters, shapes and dtypes runs; only the device and what is installed
    decide. `head_dim` and `value_dim` are at most 1024, the length of generated code.
    """
    if query.device.type != "cpu":
        return f'the tensors are on {query.device}; move them with .to("cpu").'
    if max(query.shape[-1], value.shape[-1]) > 1024:
        return (
            "head_dim and value_dim must be at most 1024, got "
            f'{query.shape[-1]} and {value.shape[-1]}; use backend="torch".'
        )
    from natcupy.cpu import host

    return host.missing


def plain_attention(hood: Neighborhood, scale: float) -> Callable:
    """`attention` for plain calls (see `natcupy.eager`) with tensors of one layout.

    It takes (query, key, value, rpb, additional_keys, additional_values) and `return_lse`.
    """
    from natcupy.cpu import ops

    return ops.Plain(hood, scale)


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
) -> tuple[Tensor, Tensor | None]:  # [B, *spatial, H, Dv], [B, *spatial, H]
    """Output in the inputs' dtype, and if asked natural log-sum-exp in the compute dtype."""
    from natcupy.cpu import ops

    return ops.attention(
        query, key, value, hood, scale, rpb, additional_keys, additional_values, return_lse
    )
