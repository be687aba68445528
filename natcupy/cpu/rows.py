"""The work on one stripe of query rows, as a list of steps with a few query rows each.

In: the sizes of a dilation group, the stripe. Out: words of the plan's table.

The rows of a step, its *sides*, are neighbors and see almost the same key rows, so each packed key
row is loaded once for all of them. Packed key rows live in a ring of slots: a step packs what is
new to it, and hands back the slots of the rows that no later step needs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

from natcupy.neighborhood import rpb_index

SIDES = 3  # most query rows of a step
# Words of a step's header; lists of sides, packs, entries, retired rows and rows of sides follow.
STEP = ("size", "sides", "packs", "entries", "retired")
# A query row, and the key rows that it sees: where they are listed, in words from the step's start.
SIDE = ("x", "y", "rows_at", "rows")
# A key row with the sides that see it: its slot, the first of them and their number, then for each
# its place among the key rows that the side sees, and the row of the bias table.
ENTRY_WORDS = 3 + 2 * SIDES
PACK_WORDS, ROW_WORDS, RETIRE_WORDS = 3, 2, 4

Row = tuple[int, int]  # indices on the two outer axes
Windows = list[tuple[int, int]]


@dataclass
class Steps:
    """The steps of a stripe."""

    words: list[int]
    count: int
    ring: int  # slots in use at once
    most: int  # most key rows that one query row sees
    sides: int  # most query rows of a step


def steps(
    windows: tuple[Windows, Windows],
    kernel_size: tuple[int, int],
    stripe: tuple[range, range],
    earlier: Callable[[int, int], bool],
) -> Steps:
    """Steps for all query rows of `stripe`, given the windows of the two outer axes.

    `earlier(x, y)` says whether a stripe of an earlier phase has summed into that key row.
    """
    together = [[(x, y) for y in ys] for x in stripe[0] for ys in _even_parts(stripe[1])]
    keys_of = _keys_by_row(windows, kernel_size, stripe)
    last = {key: number for number, rows in enumerate(together) for r in rows for key in keys_of[r]}
    slots: dict[Row, int] = {}
    free: list[int] = []
    ring, words = 0, []
    for number, rows in enumerate(together):
        seen = [keys_of[row] for row in rows]
        union = sorted(set().union(*seen))
        new = [key for key in union if key not in slots]
        for key in new:
            if not free:
                free.append(ring)
                ring += 1
            slots[key] = free.pop()
        done = sorted(key for key in slots if last[key] == number)
        lists = [word for key in new for word in (slots[key], *key)]
        for key in union:
            lists += _entry(slots[key], [keys.get(key) for keys in seen])
        for key in done:
            lists += [slots[key], *key, int(earlier(*key))]
        at, sides, tail = len(STEP) + len(rows) * len(SIDE) + len(lists), [], []
        for row, keys in zip(rows, seen, strict=True):
            sides += [*row, at + len(tail), len(keys)]
            tail += [word for key, (_, bias) in keys.items() for word in (slots[key], bias)]
        words += [at + len(tail), len(rows), len(new), len(union), len(done)]
        words += [*sides, *lists, *tail]
        for key in done:
            free.append(slots.pop(key))
    most = max(map(len, keys_of.values()))
    return Steps(words, len(together), ring, most, max(map(len, together)))


def _even_parts(rows: range) -> list[range]:
    """Neighboring rows, as few parts as possible, of nearly equal sizes."""
    count = -(-len(rows) // SIDES)
    return [rows[i * len(rows) // count : (i + 1) * len(rows) // count] for i in range(count)]


def _entry(slot: int, seen: list[tuple[int, int] | None]) -> list[int]:
    """The words for a key row, which sides next to each other see."""
    by_side = [found for found in seen if found is not None]
    first = next(i for i, found in enumerate(seen) if found is not None)
    assert seen[first : first + len(by_side)] == by_side
    words = [slot, first, len(by_side), *(word for found in by_side for word in found)]
    return words + [0] * (ENTRY_WORDS - len(words))


def _keys_by_row(windows, kernel_size, stripe) -> dict[Row, dict[Row, tuple[int, int]]]:
    """For each query row the key rows that it sees, in ascending order.

    With each its place among them and the row of the bias table.
    """
    outer, inner = (
        {
            query: [(key, rpb_index(key, query, size)) for key in range(*bounds[query])]
            for query in queries
        }
        for bounds, size, queries in zip(windows, kernel_size, stripe, strict=True)
    )
    bias_rows = 2 * kernel_size[1] - 1
    found = {}
    for x, y in product(*stripe):
        keys = [
            ((key_x, key_y), upper * bias_rows + lower)
            for key_x, upper in outer[x]
            for key_y, lower in inner[y]
        ]
        found[x, y] = {key: (place, bias) for place, (key, bias) in enumerate(keys)}
    return found
