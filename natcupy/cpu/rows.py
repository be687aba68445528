"""The work on one stripe of query rows, as a list of steps with two query rows each.

In: the sizes of a dilation group, the stripe. Out: words of the plan's table.

The two rows of a step are neighbors and see almost the same key rows, so each packed key row is
loaded once for both. Packed key rows live in a ring of slots: a step packs what is new to it, and
hands back the slots of the rows that no later step needs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

from natcupy.neighborhood import rpb_index

# Words of a step's header; lists of packs, entries, rows of a, rows of b, retired rows follow.
STEP = ("a0", "a1", "b0", "b1", "packs", "entries", "a_rows", "b_rows", "retired")
PACK_WORDS, ENTRY_WORDS, ROW_WORDS, RETIRE_WORDS = 3, 5, 2, 4

NONE = -1, 0  # place and bias row of a key row that is not seen

Row = tuple[int, int]  # indices on the two outer axes
Windows = list[tuple[int, int]]


@dataclass
class Steps:
    """The steps of a stripe."""

    words: list[int]
    count: int
    ring: int  # slots in use at once
    most: int  # most key rows that one query row sees
    sides: int  # 2 if any step has two query rows, else 1


def steps(
    windows: tuple[Windows, Windows],
    kernel_size: tuple[int, int],
    stripe: tuple[range, range],
    earlier: Callable[[int, int], bool],
) -> Steps:
    """Steps for all query rows of `stripe`, given the windows of the two outer axes.

    `earlier(x, y)` says whether a stripe of an earlier phase has summed into that key row.
    """
    pairs: list[tuple[Row, Row | None]] = []
    for x in stripe[0]:
        for y in stripe[1][::2]:
            pairs.append(((x, y), (x, y + 1) if y + 1 in stripe[1] else None))
    keys_of = _keys_by_row(windows, kernel_size, stripe)
    seen = [tuple({} if row is None else keys_of[row] for row in pair) for pair in pairs]
    last = {key: number for number, keys in enumerate(seen) for side in keys for key in side}
    slots: dict[Row, int] = {}
    free: list[int] = []
    ring, words = 0, []
    for number, (pair, (a_keys, b_keys)) in enumerate(zip(pairs, seen, strict=True)):
        union = sorted({*a_keys, *b_keys})
        new = [key for key in union if key not in slots]
        for key in new:
            if not free:
                free.append(ring)
                ring += 1
            slots[key] = free.pop()
        done = sorted(key for key in slots if last[key] == number)
        words += [*pair[0], *(pair[1] or (-1, -1))]
        words += [len(new), len(union), len(a_keys), len(b_keys), len(done)]
        for key in new:
            words += [slots[key], *key]
        for key in union:
            (a_place, a_bias), (b_place, b_bias) = a_keys.get(key, NONE), b_keys.get(key, NONE)
            words += (slots[key], a_place, b_place, a_bias, b_bias)
        for keys in (a_keys, b_keys):
            for key, (_, bias) in keys.items():
                words += (slots[key], bias)
        for key in done:
            words += [slots[key], *key, int(earlier(*key))]
            free.append(slots.pop(key))
    most = max(len(keys) for pair in seen for keys in pair)
    sides = 1 if all(b is None for _, b in pairs) else 2
    return Steps(words, len(pairs), ring, most, sides)


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
