"""From a map's shape and a neighborhood to the table that the kernels follow.

In: plain numbers. Out: a `Plan`: the table of 32-bit integers, and the size of every buffer. All
window arithmetic of the CPU backend happens here, with `natcupy.neighborhood`; the kernels only
carry out what the table says, so a wrong address can only come from a wrong table.

A map has three axes here (leading ones of length 1 are added). Rows lie along the last axis. Each
dilation group is an undilated map of its own, cut into *items*: a stripe of query rows times a tile
of query columns. The work on an item is a list of *steps*, one per few neighboring query rows:
pack the key rows that are new to the ring of packed rows, compute, hand back the rows that no later
step needs. Columns are worked on in *blocks* of 8 queries; blocks whose windows look alike share a
*class*; see `classes.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise, product
from operator import sub

import torch

from natcupy.cpu.classes import FULL_MASK_AT, LANES, Classes, Found, Reach, Tuning
from natcupy.cpu.cuts import cut, phases, shared, summed_when
from natcupy.cpu.partials import Row, places, row_numbers
from natcupy.cpu.rows import steps
from natcupy.neighborhood import Neighborhood, window

TILE_BYTES = {False: 160 << 10, True: 320 << 10}  # aim for the packed rows of an item, by backward
LEAST_COLUMNS = 64  # of an item, where they fit
RING_BYTES = 768 << 10  # most for the packed rows of an item, as far as its window allows

# Words of a run of key columns: the first, how many, the other phases that sum into them, and where
# the first is among the columns with incomplete sums.
SEGMENT_WORDS = 4
# Words of a block of 8 columns: its class, its first column, and whether its logits are computed
# together with a neighbor's: `ALONE`, or as one of two side by side.
BLOCK_WORDS = 3
ALONE, WITH_NEXT, WITH_LAST = range(3)
# Words of an item record; `partials` is the first of its group's rows with incomplete sums.
ITEM = (
    *("group0", "group1", "group2", "steps_at", "steps", "blocks_at", "blocks"),
    *("query", "query_columns", "key", "key_columns", "segments_at", "segments"),
    *("partials", "number"),
)


@dataclass(frozen=True)
class Shape:
    """The part of a problem's sizes that decides a plan."""

    lengths: tuple[int, int, int]
    kernel_size: tuple[int, int, int]
    stride: tuple[int, int, int]
    dilation: tuple[int, int, int]
    is_causal: tuple[bool, bool, bool]
    head_dim: int
    value_dim: int
    extra: int  # additional keys

    @classmethod
    def of(cls, lengths, hood: Neighborhood, head_dim, value_dim, extra) -> Shape:
        """Add leading axes of length 1."""
        fill = 3 - hood.rank
        return cls(
            (1,) * fill + tuple(lengths),
            (1,) * fill + hood.kernel_size,
            (1,) * fill + hood.stride,
            (1,) * fill + hood.dilation,
            (False,) * fill + hood.is_causal,
            head_dim,
            value_dim,
            extra,
        )

    @property
    def bias_rows(self) -> int:
        """Rows of one head's bias table, over the two outer axes."""
        return (2 * self.kernel_size[0] - 1) * (2 * self.kernel_size[1] - 1)

    def windows(self, axis: int, length: int) -> list[tuple[int, int]]:
        """The window of each query of a group of `length` members."""
        rule = self.kernel_size[axis], self.stride[axis], self.is_causal[axis]
        start, end = window(torch.arange(length, device="cpu"), length, *rule)
        return list(zip(start.tolist(), end.tolist(), strict=True))


@dataclass
class Plan:
    """Everything about a call but its pointers and strides."""

    words: list[int]
    phases: list[tuple[int, int]]  # first item and number of items, one phase after the other
    items: int
    extra_classes_at: int  # address of nine addresses: of the class for each number of lanes
    ring: int  # packed rows alive at once
    key_columns: int  # widest item
    query_columns: int
    taps: int  # most vectors of logits of one query row in a block, additional keys excluded
    span: int  # most taps of one key row
    extra_taps: int
    sides: int  # most query rows of a step
    logits: int  # of query rows or blocks, of which those of each are kept at once
    reach: tuple[int, int]  # columns that are read left and right of an item's first key
    ends: tuple[int, int]  # columns before and behind an item's keys that wrapped classes read
    bias_reach: tuple[int, int]  # of [0, 2 * kernel_size - 2], same
    mirror_reach: tuple[int, int]  # of the mirrored bias row
    partials: tuple[int, int]  # rows with incomplete sums of keys, and columns of each


def make(
    shape: Shape,
    tuning: Tuning,
    backward: bool,
    item_bytes: int,
    wanted: int,
    grouped: bool = False,
) -> Plan:
    """The plan of a forward or backward pass.

    `item_bytes` is the size of all that is kept for one key while it is packed. `wanted` is the
    number of stripes asked for in a forward pass, whose results do not depend on it; a backward
    pass has its own fixed number, because gradients of keys are summed stripe by stripe. `grouped`:
    query heads share key heads.
    """
    maker = _Maker(shape, tuning, backward, grouped)
    if shape.extra:
        maker.extra_classes_at, maker.extra_taps = maker.classes.of_extra_keys(shape.extra)
    groups = [range(min(d, n)) for d, n in zip(shape.dilation, shape.lengths, strict=True)]
    for group in product(*groups):
        members = [
            -(-(n - g) // d) for n, g, d in zip(shape.lengths, group, shape.dilation, strict=True)
        ]
        maker.add_group(group, tuple(members), item_bytes, wanted)
    return maker.finish()


class _Maker:
    """Collects the table while walking over groups, stripes and tiles."""

    def __init__(self, shape: Shape, tuning: Tuning, backward: bool, grouped: bool):
        self.shape, self.backward, self.most_sides = shape, backward, tuning.sides
        self.grouped = grouped
        # address 0 means "none"; some words stay 0
        self.words: list[int] = [0] * FULL_MASK_AT + [-1] * LANES
        self.items: list[tuple[int, list[int]]] = []  # (phase, record)
        self.pieces: dict = {}
        self.classes = Classes(self.put, shape.kernel_size[2], tuning, backward)
        self.ring = self.key_columns = self.query_columns = self.rows = 0
        self.sides = self.logits = 1
        self.beside = tuning.beside
        self.extra_classes_at = self.extra_taps = 0
        self.reach = Reach()
        self.partial_rows = self.partial_columns = 0

    def put(self, words: Sequence[int]) -> int:
        """Append to the table; the address."""
        at = len(self.words)
        self.words.extend(words)
        return at

    # -- groups, stripes, tiles -------------------------------------------------------------------

    def add_group(self, group, members, item_bytes: int, wanted: int) -> None:
        """Add the items of one dilation group."""
        if members not in self.pieces:
            self.pieces[members] = self._pieces(members, item_bytes, wanted)
        stripes, tiles, kept = self.pieces[members]
        tile_phases = 1 + max(phase for phase, _ in tiles)
        for (stripe_phase, rows), (tile_phase, columns) in product(stripes, tiles):
            phase = stripe_phase * tile_phases + tile_phase
            self.items.append((phase, [*group, *rows, *columns, self.partial_rows]))
        self.partial_rows += kept.rows
        self.partial_columns = max(self.partial_columns, kept.columns)

    def _pieces(self, members, item_bytes, wanted):
        """Stripes of rows and tiles of columns, each a list of (phase, words of the item)."""
        windows = [self.shape.windows(axis, length) for axis, length in enumerate(members)]
        across = min(members[2], LEAST_COLUMNS) * item_bytes
        planes, rows = self._planes(members[0], wanted), self._rows(members, across, wanted)
        doubled = shared(planes, windows[0]), shared(rows, windows[1])
        stripes, ring = self._stripes(windows, planes, rows, row_numbers(members[:2], *doubled))
        self.ring = max(self.ring, ring)
        width = self._columns(members[2], ring * item_bytes)
        parts = cut(members[2], -(-members[2] // width), LANES)
        kept = places(members, *doubled, shared(parts, windows[2]), self.grouped)
        tiles = [
            (phase, self._tile(windows[2], a, b, others, kept.column_numbers))
            for phase, a, b, others in phases(parts, windows[2])
        ]
        return stripes, tiles, kept

    def _stripes(self, windows, planes, rows, numbers: dict[Row, int]):
        """Stripes of the two outer axes, and the slots in use at once."""
        stripes, ring = [], 0
        rows = list(phases(rows, windows[1]))
        row_phases = 1 + max(phase for phase, *_ in rows)
        for plane_phase, a, b, other_planes in phases(planes, windows[0]):
            for row_phase, c, d, other_rows in rows:

                def about(x, y, in_planes=other_planes, in_rows=other_rows):
                    return summed_when(in_planes, x) | summed_when(in_rows, y), numbers[x, y]

                stripe = range(a, b), range(c, d)
                found = steps(
                    tuple(windows[:2]), self.shape.kernel_size[:2], stripe, about, self.most_sides
                )
                phase = plane_phase * row_phases + row_phase
                stripes.append((phase, [self.put(found.words), found.count]))
                ring, self.rows = max(ring, found.ring), max(self.rows, found.most)
                self.sides = max(self.sides, found.sides)
        return stripes, ring

    def _columns(self, length: int, column_bytes: int) -> int:
        """Query columns of a tile, for so many packed bytes in each key column of its ring."""
        most = RING_BYTES // column_bytes
        if length <= most:
            least = LEAST_COLUMNS
        else:  # the tile's keys are wider than its queries
            around = self.shape.kernel_size[2] - 1
            least = max(min(LEAST_COLUMNS, most - around), around // 2)
        columns = max(least, TILE_BYTES[self.backward] // column_bytes)
        return max(LANES, columns // LANES * LANES)

    def _planes(self, length: int, wanted: int) -> list[tuple[int, int]]:
        """Stripes of axis 0."""
        kernel_size = self.shape.kernel_size[0]
        if self.backward:
            # planes between two stripes are packed twice, and neighbors never worked on at once
            count = length // max(2 * (kernel_size - 1), 2)
            count = count if count > 2 else 1
        else:
            count = min(wanted, length // max(kernel_size, 2))
        return cut(length, max(1, count), 1)

    def _rows(self, members, row_bytes: int, wanted: int) -> list[tuple[int, int]]:
        """Stripes of axis 1: of a map for more tasks, of a video to bound the ring of rows."""
        length, kernel_size = members[1], self.shape.kernel_size[1]
        if members[0] > 1:
            fit = RING_BYTES // (row_bytes * min(members[0], self.shape.kernel_size[0]))
            count = -(-length // max(fit - kernel_size, kernel_size, 8))
        elif self.backward:
            # rows between two stripes are packed twice, and neighbors are never worked on at once
            count = length // (4 * max(kernel_size - 1, 7))
            count = count if count > 2 else 1
        else:
            count = min(wanted, length // max(kernel_size, 4))
        return cut(length, max(1, count), 1)

    # -- columns ----------------------------------------------------------------------------------

    def _tile(self, windows, first: int, end: int, others, numbers) -> list[int]:
        """Words of an item from `blocks_at` on, for query columns first .. end - 1."""
        key, key_end = windows[first][0], windows[end - 1][1]
        columns = range(first, end)
        starts, ends = (
            [*map(sub, bounds, columns)] for bounds in zip(*windows[first:end], strict=True)
        )
        blocks, last = [], None
        for at in range(0, end - first, LANES):
            lanes, column = slice(at, at + LANES), first + at
            found = self.classes.of(starts[lanes], ends[lanes], key - column, key_end - column)
            # a vector of 8 columns is read at each tap, a single column when broadcasting
            reach = column + found.origin - key
            self.reach.show(reach, reach + found.span + LANES)
            how = ALONE
            if last == found and self._is_shared(found):
                blocks[-1], how = WITH_NEXT, WITH_LAST
            blocks += [found.at, at, how]
            last = found if how == ALONE else None
            self.logits = max(self.logits, 2 * (how == WITH_LAST))
        count = len(blocks) // BLOCK_WORDS
        segments = self._segments(key, key_end, others, numbers) if self.backward else []
        self.key_columns = max(self.key_columns, key_end - key)
        self.query_columns = max(self.query_columns, count * LANES)
        place = [first, end - first, key, key_end - key]
        return [self.put(blocks), count, *place, self.put(segments), len(segments) // SEGMENT_WORDS]

    def _is_shared(self, found: Found) -> bool:
        """Whether two neighboring blocks of this class are worth one pass over their keys."""
        return bool(self.beside) and found.is_plain

    @staticmethod
    def _segments(key: int, key_end: int, others, numbers: list[int]) -> list[int]:
        """Runs of keys that the same other tiles sum into."""
        bounds = {key, key_end, *(bound for span in others for bound in span[:2])}
        bounds = sorted(bound for bound in bounds if key <= bound <= key_end)
        segments: list[int] = []
        for start, end in pairwise(bounds):
            segments += [start - key, end - start, summed_when(others, start), numbers[start]]
        return segments

    # -- the end ----------------------------------------------------------------------------------

    def finish(self) -> Plan:
        """Write the item records, phase by phase."""
        self.items.sort(key=lambda item: item[0])
        sizes: dict[int, int] = {}
        records = []
        for number, (phase, record) in enumerate(self.items):
            sizes[phase] = sizes.get(phase, 0) + 1
            records += [*record, number]
        bounds, first = [], 0
        for count in sizes.values():
            bounds.append((first, count))
            first += count
        if not self.backward:  # without sums over items all may run at once
            bounds = [(0, first)]
        items_at = self.put(records)
        self.words[1] = items_at
        return Plan(
            words=self.words,
            phases=bounds,
            items=first,
            extra_classes_at=self.extra_classes_at,
            ring=self.ring,
            key_columns=self.key_columns,
            query_columns=self.query_columns,
            taps=self.rows * self.classes.span,
            span=max(self.classes.span, self.extra_taps),
            extra_taps=self.extra_taps,
            sides=self.sides,
            logits=max(self.sides, self.logits),
            reach=(self.reach.low, self.reach.high),
            ends=(-self.classes.ends.low, self.classes.ends.high),
            bias_reach=(self.classes.bias.low, self.classes.bias.high),
            mirror_reach=(self.classes.mirror.low, self.classes.mirror.high),
            partials=(self.partial_rows, self.partial_columns),
        )


@dataclass(frozen=True)
class Layout:
    """Where each buffer of one thread lies in its scratch memory, in elements."""

    offsets: dict[str, int] = field(hash=False)
    size: int


def lay_out(buffers: dict[str, int]) -> Layout:
    """Offsets of buffers of the given sizes, each at a multiple of 64 bytes."""
    offsets, at = {}, 0
    for name, size in buffers.items():
        offsets[name] = at
        at += -(-size // 16) * 16
    return Layout(offsets, at)
