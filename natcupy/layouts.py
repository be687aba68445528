"""Three tensors in one: whether query, key and value lie packed, as a projection leaves them.

In: tensors [..., H, D]. Out: the tensor [..., 3, H, D] whose three parts they are, in place; or
whether there is one.
"""

from __future__ import annotations

from torch import Tensor


def joined(query: Tensor, key: Tensor, value: Tensor) -> Tensor | None:
    """The contiguous [..., 3, H, D] that `unbind(-3)` cut into the three, or None."""
    if not _have_strides_of_parts(query, key, value):
        return None
    *rows, heads, dim = query.shape
    part = heads * dim
    starts = [x.storage_offset() for x in (query, key, value)]
    if starts[1:] != [starts[0] + part, starts[1] + part]:
        return None
    if len({x.untyped_storage().data_ptr() for x in (query, key, value)}) != 1:
        return None
    return query.as_strided((*rows, 3, heads, dim), (*query.stride()[:-2], part, dim, 1))


def are_joined(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether the three lie in memory as such parts do, of one tensor or neighbors by chance.

    Where only their layout matters, that makes no difference.
    """
    if not _have_strides_of_parts(query, key, value):
        return False
    start, size = query.data_ptr(), query.shape[-2] * query.shape[-1] * query.element_size()
    return key.data_ptr() == start + size and value.data_ptr() == start + 2 * size


def _have_strides_of_parts(query: Tensor, key: Tensor, value: Tensor) -> bool:
    shape, strides = query.shape, query.stride()
    if not (shape == key.shape == value.shape and strides == key.stride() == value.stride()):
        return False
    *rows, heads, dim = shape
    step, expected = 3 * heads * dim, [1, dim]
    for extent in reversed(rows):
        expected.append(step)
        step *= extent
    return strides == tuple(reversed(expected))
