"""Places for the sums of keys that stay incomplete until another item or query head adds to them.

In: which planes, rows and columns of a dilation group several parts sum into. Out: numbers of its
rows and columns. Half types need memory in the compute type for such sums, and most keys are
complete at once: only the others have places there.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from itertools import product

Row = tuple[int, int]  # indices on the two outer axes


@dataclass(frozen=True)
class Places:
    """The places of one dilation group: `rows` of `columns` each, from number 0 on."""

    rows: int
    columns: int
    #: of each key column; of one that is complete at once any number
    column_numbers: list[int]


def row_numbers(lengths: Row, planes: Collection[int], rows: Collection[int]) -> dict[Row, int]:
    """Numbers of all key rows: first those of shared planes and the shared ones of others."""
    ordered = product(*map(range, lengths))
    ordered = sorted(ordered, key=lambda row: row[0] not in planes and row[1] not in rows)
    return {row: number for number, row in enumerate(ordered)}


def places(
    lengths: tuple[int, int, int],
    planes: Collection[int],
    rows: Collection[int],
    columns: Collection[int],
    is_all: bool,
) -> Places:
    """The places of a group whose rows have the numbers above; `is_all`: no key is ever complete.

    Where whole rows are incomplete, all rows have a place for each column.
    """
    depth, height, width = lengths
    whole = len(planes) * height + (depth - len(planes)) * len(rows)
    if is_all or (whole and columns):
        return Places(depth * height, width, list(range(width)))
    if whole:
        return Places(whole, width, list(range(width)))
    numbers = {column: number for number, column in enumerate(sorted(columns))}
    found = [numbers.get(column, 0) for column in range(width)]
    return Places(depth * height if columns else 0, len(columns), found)
