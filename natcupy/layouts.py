"""Three tensors in one: whether query, key and value lie packed, as a projection leaves them.

In: tensors [..., H, D]. Out: the tensor [..., 3, H, D] whose three parts they are, in place.
"""

from __future__ import annotations

from torch import Tensor


def joined(query: Tensor, key: Tensor, value: Tensor) -> Tensor | None:
    """The contiguous [..., 3, H, D] that `unbind(-3)` cut into the three, or None."""
    shape, strides = query.shape, query.stride()
    if not (shape == key.shape == value.shape and strides == key.stride() == value.stride()):
        return None
    *rows, heads, dim = shape
    part, step, expected = heads * dim, 3 * heads * dim, [1, dim]
    for extent in reversed(rows):
        expected.append(step)
        step *= extent
    starts = [x.storage_offset() for x in (query, key, value)]
    if strides != tuple(reversed(expected)) or starts[1:] != [starts[0] + part, starts[1] + part]:
        return None
    if len({x.untyped_storage().data_ptr() for x in (query, key, value)}) != 1:
        return None
    return query.as_strided((*rows, 3, heads, dim), (*strides[:-2], part, dim, 1))
