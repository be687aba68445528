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

from natcupy.cpu.cuts import even_parts
from natcupy.neighborhood import rpb_index

MOST_SIDES = 4  # query rows of a step, on any machine
# Words of a step's header; lists of sides, packs, entries, retired rows and rows of sides follow.
STEP = ("size", "sides", "packs", "entries", "retired")
# A query row, and the key rows that it sees: where they are listed, in words from the step's start.
SIDE = ("x", "y", "rows_at", "rows")
# A key row with the sides that see it: its slot, the first of them and their number, then for each
# its place among the key rows that the side sees, and the row of the bias table.
ENTRY_WORDS = 3 + 2 * MOST_SIDES
PACK_WORDS, ROW_WORDS = 3, 2
# A key row that leaves: its slot, its indices, the other phases that sum into it, and its number
# among the rows with incomplete sums.
RETIRE_WORDS = 5

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
    about: Callable[[int, int], tuple[int, int]],
    most_sides: int,
) -> Steps:
    """Steps of up to `most_sides` query rows of `stripe`, given the windows of the outer axes.

    `about(x, y)` says of a key row in which other phases stripes sum into it, as in `cuts`, and its
    number among those with incomplete sums.
    """
    planes, parts = stripe[0], _even_parts(stripe[1], most_sides)
    outer = [_window(windows[0], x, kernel_size[0]) for x in planes]
    known: dict = {}
    inner = [_Part(windows[1], part, kernel_size[1], known) for part in parts]
    last_plane = {x: number for number, keys in enumerate(outer) for x, _ in keys}
    last_part = {y: number for number, part in enumerate(inner) for y in part.keys}
    bias_rows = 2 * kernel_size[1] - 1
    slots: dict[Row, int] = {}
    free: list[int] = []
    ring, words = 0, []
    for (plane, x), (number, part) in product(enumerate(planes), enumerate(inner)):
        rows = [(key, y) for key, _ in outer[plane] for y in part.keys]
        new = [row for row in rows if row not in slots]
        for row in new:
            if not free:
                free.append(ring)
                ring += 1
            slots[row] = free.pop()
        done = [r for r in rows if last_plane[r[0]] == plane and last_part[r[1]] == number]
        lists = [word for row in new for word in (slots[row], *row)]
        slots_by_plane = [[slots[key, y] for y in part.keys] for key, _ in outer[plane]]
        places = [(before, bias * bias_rows) for before, (_, bias) in enumerate(outer[plane])]
        for place, found in zip(places, slots_by_plane, strict=True):
            lists += part.lists.entries(found, place)
        for row in done:
            lists += [slots[row], *row, *about(*row)]
        at, sides, tail = len(STEP) + len(part.sides) * len(SIDE) + len(lists), [], []
        for side, (y, keys) in enumerate(part.sides):
            sides += [x, y, at + len(tail), len(outer[plane]) * len(keys)]
            for place, found in zip(places, slots_by_plane, strict=True):
                tail += part.lists.rows(side, found, place)
        words += [at + len(tail), len(part.sides), len(new), len(rows), len(done)]
        words += [*sides, *lists, *tail]
        for row in done:
            free.append(slots.pop(row))
    most = max(map(len, outer)) * max(len(keys) for part in inner for _, keys in part.sides)
    return Steps(words, len(planes) * len(parts), ring, most, max(map(len, parts)))


def _window(windows: Windows, query: int, kernel_size: int) -> list[tuple[int, int]]:
    """The keys that a query sees on one axis, with the places of their biases."""
    return [(key, rpb_index(key, query, kernel_size)) for key in range(*windows[query])]


class _Part:
    """Neighboring query rows on the inner axis, and the key rows that they see there."""

    def __init__(self, windows: Windows, rows: range, kernel_size: int, known: dict):
        """`known` is for parts whose windows may lie to each other as they do here."""
        self.sides = [(y, _window(windows, y, kernel_size)) for y in rows]
        self.keys = range(self.sides[0][1][0][0], self.sides[-1][1][-1][0] + 1)
        # of each row: its first key here, the number of its keys, and the place of their first bias
        spans = tuple((keys[0][0] - self.keys[0], len(keys), keys[0][1]) for _, keys in self.sides)
        if spans not in known:
            known[spans] = _Lists(spans, len(self.keys))
        self.lists: _Lists = known[spans]


class _Lists:
    """Words about the key rows of a part at one place of the outer axis, by their slots.

    A place is (windows of the outer axis before it, first row of the bias table there).
    """

    def __init__(self, spans: tuple[tuple[int, int, int], ...], keys: int):
        self._spans = spans
        # each word as the sum of a constant and multiples of the place's two numbers
        self._entries = [terms for key in range(keys) for terms in self._entry(key)]
        self._known: dict[tuple[int, int], list[int]] = {}

    def entries(self, slots: list[int], place: tuple[int, int]) -> list[int]:
        """The entries of all key rows, which lie in `slots`."""
        if place not in self._known:
            before, bias = place
            self._known[place] = [n + a * before + b * bias for n, a, b in self._entries]
        words = self._known[place].copy()
        words[::ENTRY_WORDS] = slots
        return words

    def rows(self, side: int, slots: list[int], place: tuple[int, int]) -> list[int]:
        """The key rows that a side sees, of those in `slots`."""
        first, size, lower = self._spans[side]
        words = [0] * (ROW_WORDS * size)
        words[::ROW_WORDS] = slots[first : first + size]
        words[1::ROW_WORDS] = range(place[1] + lower, place[1] + lower + size)
        return words

    def _entry(self, key: int) -> list[tuple[int, int, int]]:
        seen = [
            (side, key - first, size, lower)
            for side, (first, size, lower) in enumerate(self._spans)
            if first <= key < first + size
        ]
        assert seen[-1][0] - seen[0][0] == len(seen) - 1
        terms = [(0, 0, 0), (seen[0][0], 0, 0), (len(seen), 0, 0)]
        for _, at, size, lower in seen:
            terms += (at, size, 0), (lower + at, 0, 1)
        return terms + [(0, 0, 0)] * (ENTRY_WORDS - len(terms))


def _even_parts(rows: range, most: int) -> list[range]:
    """Neighboring rows, as few parts of up to `most` as possible, of nearly equal sizes."""
    return [rows[first:end] for first, end in even_parts(len(rows), -(-len(rows) // most))]
