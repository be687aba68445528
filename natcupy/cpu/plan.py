"""From a map's shape and a neighborhood to the table that the kernels follow.

In: plain numbers. Out: a `Plan`: the table of 32-bit integers, and the size of every buffer. All
window arithmetic of the CPU backend happens here, with `natcupy.neighborhood`; the kernels only
carry out what the table says, so a wrong address can only come from a wrong table.

A map has three axes here (leading ones of length 1 are added). Rows lie along the last axis. Each
dilation group is an undilated map of its own, cut into *items*: a stripe of query rows times a tile
of query columns. The work on an item is a list of *steps*, one per few neighboring query rows:
pack the key rows that are new to the ring of packed rows, compute, hand back the rows that no later
step needs. Columns are worked on in *blocks* of 8 queries; blocks whose windows look alike share a
*class*, which says how far from the block's first query its keys begin and which lanes see which.

At the ends of a row windows are shifted inward, and queries see keys at more distances than inside.
There a class is *wrapped*: the packed row goes on before its start with what lies one window
further, and past its end with what lies one window back, so that as many taps as inside meet every
key of every lane once, some of them one period away from their own place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise, product
from typing import NamedTuple

import torch

from natcupy.cpu.cuts import cover, cut, end_of, is_in, lane_cases, phases
from natcupy.cpu.rows import steps
from natcupy.neighborhood import Neighborhood, window

LANES = 8
TILE_BYTES = {False: 160 << 10, True: 320 << 10}  # aim for the packed rows of an item, by backward
LEAST_COLUMNS = 64  # of an item, where they fit
RING_BYTES = 768 << 10  # most for the packed rows of an item, as far as its window allows

# Words of a class record.
SPAN, MASK_AT, ACTIVE, ORIGIN, BROADCAST, GROUPS_AT = range(6)
SHARED_AT, SHARED, SINGLES_AT, SINGLES = range(6, 10)  # chunks of taps, for several rows and one
SPREADS_AT = 10  # like GROUPS_AT, for sums of keys
PARTNERS_AT = 11  # for each tap the distance to its partner, where there is a mask
# Words of the record of a group of lanes. Its windows are any, equal ones, or each one key further
# than the one before.
GROUP = ("kind", "column", "place", "keys", "runs_at", "runs", "lane", "lanes")
BY_RUNS, SAME, SHIFTED = range(3)
# Words of an item record.
ITEM = (
    *("group0", "group1", "group2", "steps_at", "steps", "blocks_at", "blocks"),
    *("query", "query_columns", "key", "key_columns", "segments_at", "segments", "number"),
)


Windows = tuple[tuple[int, int], ...]  # first key and end of each lane's


class GroupKind(NamedTuple):
    """How the windows of so many lanes lie to each other."""

    way: int
    lanes: int


def group_kinds(size: int) -> list[GroupKind]:
    """The kinds of groups of up to `size` lanes, by number; all but the first in order of choice.

    Windows that are not alike enough for half a group are taken as they come, so many at once.
    """
    halves = [size, size // 2] if size > 2 else [size]
    alike = [GroupKind(way, lanes) for lanes in halves for way in (SAME, SHIFTED)]
    return [GroupKind(BY_RUNS, halves[-1]), *alike]


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
        start, end = window(torch.arange(length), length, *rule)
        return list(zip(start.tolist(), end.tolist(), strict=True))


@dataclass(frozen=True)
class Tuning:
    """Choices compiled into a kernel that its table must agree with."""

    shared: tuple[int, ...]  # numbers of taps that one pass keeps in registers, for several rows
    singles: tuple[int, ...]  # for one query row
    keys: int  # that every query of a group sees in a row, unless by runs; 0 for any number
    lane_group: int  # queries whose outputs are in registers together
    spread_group: int  # queries that are handed out to keys together


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
    sides: int  # query rows of a step
    reach: tuple[int, int]  # columns that are read left and right of an item's first key
    ends: tuple[int, int]  # columns before and behind an item's keys that wrapped classes read
    bias_reach: tuple[int, int]  # of [0, 2 * kernel_size - 2], same
    mirror_reach: tuple[int, int]  # of the mirrored bias row


@dataclass
class _Reach:
    """Smallest half-open interval that holds all it was shown."""

    low: int = 0
    high: int = 0

    def show(self, low: int, high: int) -> None:
        self.low, self.high = min(self.low, low), max(self.high, high)


def make(shape: Shape, tuning: Tuning, backward: bool, item_bytes: int, wanted: int) -> Plan:
    """The plan of a forward or backward pass.

    `item_bytes` is the size of all that is kept for one key while it is packed. `wanted` is the
    number of stripes asked for in a forward pass, whose results do not depend on it; a backward
    pass has its own fixed number, because gradients of keys are summed stripe by stripe.
    """
    maker = _Maker(shape, tuning, backward)
    if shape.extra:
        maker.add_extra_classes()
    groups = [range(min(d, n)) for d, n in zip(shape.dilation, shape.lengths, strict=True)]
    for group in product(*groups):
        members = [
            -(-(n - g) // d) for n, g, d in zip(shape.lengths, group, shape.dilation, strict=True)
        ]
        maker.add_group(group, tuple(members), item_bytes, wanted)
    return maker.finish()


class _Maker:
    """Collects the table while walking over groups, stripes and tiles."""

    def __init__(self, shape: Shape, tuning: Tuning, backward: bool):
        self.shape, self.tuning, self.backward = shape, tuning, backward
        self.words: list[int] = [0] * 16  # address 0 means "none"
        self.items: list[tuple[int, list[int]]] = []  # (phase, record)
        self.pieces: dict = {}
        self.classes: dict = {}
        self.ring = self.key_columns = self.query_columns = self.rows = self.span = 0
        self.sides = 1
        self.extra_classes_at = self.extra_taps = 0
        self.reach, self.bias, self.mirror = _Reach(), _Reach(), _Reach()
        self.ends = _Reach()
        last = 2 * shape.kernel_size[2] - 1
        self.bias.show(0, last)
        self.mirror.show(0, last)

    def put(self, words: Sequence[int]) -> int:
        """Append to the table; the address."""
        at = len(self.words)
        self.words.extend(words)
        return at

    # -- additional keys --------------------------------------------------------------------------

    def add_extra_classes(self) -> None:
        """One class per number of active lanes: every lane sees every additional key."""
        count = self.shape.extra
        self.extra_taps = end_of(cover(count, self.tuning.singles), self.tuning.singles)
        mask_at = self.put([-1] * LANES * count + [0] * LANES * (self.extra_taps - count))
        addresses = [0]
        for active in range(1, LANES + 1):
            groups, spreads = self._groups(((0, count),) * active, 0)
            record = [
                self.extra_taps,
                mask_at,
                active,
                0,
                1,
                groups,
                *self._chunks(count),
                spreads,
                0,
            ]
            addresses.append(self.put(record))
        self.extra_classes_at = self.put(addresses)

    # -- groups, stripes, tiles -------------------------------------------------------------------

    def add_group(self, group, members, item_bytes: int, wanted: int) -> None:
        """Add the items of one dilation group."""
        if members not in self.pieces:
            self.pieces[members] = self._pieces(members, item_bytes, wanted)
        stripes, tiles = self.pieces[members]
        tile_phases = 1 + max(phase for phase, _ in tiles)
        for (stripe_phase, rows), (tile_phase, columns) in product(stripes, tiles):
            phase = stripe_phase * tile_phases + tile_phase
            self.items.append((phase, [*group, *rows, *columns]))

    def _pieces(self, members, item_bytes, wanted):
        """Stripes of rows and tiles of columns, each a list of (phase, words of the item)."""
        windows = [self.shape.windows(axis, length) for axis, length in enumerate(members)]
        planes = list(phases(self._planes(members[0], wanted), windows[0]))
        across = min(members[2], LEAST_COLUMNS) * item_bytes
        rows = list(phases(self._rows(members, across, wanted), windows[1]))
        row_phases = 1 + max(phase for phase, *_ in rows)
        stripes, ring = [], 0
        for plane_phase, a, b, planes_before in planes:
            for row_phase, c, d, rows_before in rows:

                def earlier(x, y, in_planes=planes_before, in_rows=rows_before):
                    return is_in(in_planes, x) or is_in(in_rows, y)

                stripe = range(a, b), range(c, d)
                found = steps(tuple(windows[:2]), self.shape.kernel_size[:2], stripe, earlier)
                phase = plane_phase * row_phases + row_phase
                stripes.append((phase, [self.put(found.words), found.count]))
                ring, self.rows = max(ring, found.ring), max(self.rows, found.most)
                self.sides = max(self.sides, found.sides)
        self.ring = max(self.ring, ring)
        width = self._columns(members[2], ring * item_bytes)
        parts = cut(members[2], -(-members[2] // width), LANES)
        tiles = [
            (phase, self._tile(windows[2], a, b, before))
            for phase, a, b, before in phases(parts, windows[2])
        ]
        return stripes, tiles

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
            count = length // max(2 * (kernel_size - 1), 2)
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
            # rows between two stripes are packed twice: many stripes are for large maps only
            around = max(kernel_size - 1, 7)
            count = max(length // (4 * around), min(2, length // (2 * around)))
        else:
            count = min(wanted, length // max(kernel_size, 4))
        return cut(length, max(1, count), 1)

    # -- columns ----------------------------------------------------------------------------------

    def _tile(self, windows, first: int, end: int, before) -> list[int]:
        """Words of an item from `blocks_at` on, for query columns first .. end - 1."""
        key, key_end = windows[first][0], windows[end - 1][1]
        blocks = []
        for column in range(first, end, LANES):
            lanes = windows[column : min(column + LANES, end)]
            relative = tuple([(a - column, b - column) for a, b in lanes])
            at, origin, span = self._class(relative, key - column, key_end - column)
            # a vector of 8 columns is read at each tap, a single column when broadcasting
            self.reach.show(column + origin - key, column + origin + span + LANES - key)
            blocks += [at, column - first]
        count = len(blocks) // 2
        segments = self._segments(key, key_end, before) if self.backward else []
        self.key_columns = max(self.key_columns, key_end - key)
        self.query_columns = max(self.query_columns, count * LANES)
        place = [first, end - first, key, key_end - key]
        return [self.put(blocks), count, *place, self.put(segments), len(segments) // 3]

    @staticmethod
    def _segments(key: int, key_end: int, before) -> list[int]:
        """Runs of keys that an earlier tile has summed into or not: (first, count, again)."""
        bounds = {key, key_end, *(bound for span in before for bound in span)}
        bounds = sorted(bound for bound in bounds if key <= bound <= key_end)
        segments: list[int] = []
        for start, end in pairwise(bounds):
            segments += [start - key, end - start, int(is_in(before, start))]
        return segments

    def _class(self, windows: Windows, left: int, right: int) -> tuple[int, int, int]:
        """Address, origin and span of the class for windows relative to a block's first query.

        The item's keys are left .. right - 1, relative to that query too.
        """
        kernel = self.shape.kernel_size[2]
        tap = min(a - i for i, (a, _) in enumerate(windows))
        taps = max(b - i for i, (_, b) in enumerate(windows)) - tap
        wrap = self._wrap(windows, left, right, tap, taps)
        known = windows, wrap
        if known in self.classes:
            return self.classes[known]
        column = windows[0][0]
        columns = windows[-1][1] - column
        count, skipped = (taps, 0) if wrap is None else (kernel, wrap - tap)
        sizes = self.tuning.shared or self.tuning.singles
        by_tap, by_column = cover(count, sizes), cover(columns, sizes)
        work = [sum(sizes[size] for _, size in chunks) for chunks in (by_tap, by_column)]
        broadcast = work[1] < work[0] or (work[1] == work[0] and wrap is not None)
        if broadcast:
            origin, count, skipped, wrap = column, columns, 0, None
            span = end_of(by_column, sizes)
        else:
            origin = tap
            span = max(taps, skipped + end_of(by_tap, sizes))
        mask = []
        for s in range(span):
            keys = [origin + s + (0 if broadcast else i) for i in range(len(windows))]
            seen = [-(a <= key < b) for key, (a, b) in zip(keys, windows, strict=True)]
            mask += seen + [0] * (LANES - len(windows))
        masked = 0 in mask
        mask_at = self.put(mask) if masked else 0
        if broadcast:  # lane i of key s has mirrored bias kernel - 1 - origin - s + i
            self.mirror.show(kernel - origin - span, kernel - 1 - origin + LANES)
        else:
            self.bias.show(kernel - 1 + origin, kernel - 1 + origin + span)
        if wrap is not None:
            self.ends.show(wrap - left, wrap + len(windows) - 1 + kernel - right)
        record = [span, mask_at, len(windows), origin, int(broadcast)]
        groups, spreads = self._groups(windows, origin)
        record += [groups, *self._chunks(count, skipped), spreads]
        record += [self._partners(span, kernel, wrap is not None) if masked else 0]
        self.span = max(self.span, span)
        self.classes[known] = self.put(record), origin, span
        return self.classes[known]

    def _wrap(self, windows: Windows, left: int, right: int, tap: int, taps: int) -> int | None:
        """The first of `kernel_size` taps that show each lane its keys, each once, or None.

        A column before `left` holds the one a period further, one from `right` on the one a period
        back.
        """
        period = self.shape.kernel_size[2]
        if taps <= period or any(b - a != period for a, b in windows):
            return None

        def sees_its_keys(first: int, a: int, b: int) -> bool:
            end = first + period
            parts = [(max(first, left), min(end, right))]
            parts.append((first + period, min(end, left) + period))
            parts.append((max(first, right) - period, end - period))
            return all(a <= low and high <= b for low, high in parts if low < high)

        for first in range(tap, tap + taps - period + 1):
            if all(sees_its_keys(first + i, *window) for i, window in enumerate(windows)):
                return first
        return None

    def _partners(self, span: int, period: int, wrapped: bool) -> int:
        """Address of the distance from each tap of a class to its partner."""
        if not wrapped:
            return self.put([0] * span)
        distances = [period if s + period < span else 0 for s in range(period)]
        return self.put([*distances, *[-period] * (span - period)])

    def _groups(self, windows, origin: int) -> tuple[int, int]:
        """Addresses of the records of the groups of lanes that are active, to sum and to spread."""
        size, spread = self.tuning.lane_group, self.tuning.spread_group
        groups = self._groups_of(size, windows, origin)
        if not self.backward or size == spread:
            return groups, groups
        return groups, self._groups_of(spread, windows, origin)

    def _groups_of(self, size: int, windows, origin: int) -> int:
        """Address of the number of groups of up to `size` lanes, and of their records behind it."""
        records, first, kinds = [], 0, group_kinds(size)
        while first < len(windows):
            number = self._next_kind(kinds, windows[first:])
            group = windows[first : first + kinds[number].lanes]
            low, keys = group[0][0], group[0][1] - group[0][0]
            runs = [] if number else self._runs(kinds[0].lanes, group, origin)
            records += [number, low, low - origin, keys, self.put(runs), len(runs) // 4]
            records += [first, len(group)]
            first += len(group)
        return self.put([len(records) // len(GROUP), *records])

    def _next_kind(self, kinds: list[GroupKind], windows) -> int:
        """The number of the kind of the next group of lanes."""
        (low, high), fixed = windows[0], self.tuning.keys
        if fixed not in (0, high - low):
            return 0
        for number, (way, lanes) in enumerate(kinds[1:], 1):
            step = int(way == SHIFTED)
            if len(windows) < lanes or (step and high - low < lanes):
                continue
            if windows[:lanes] == tuple((low + i * step, high + i * step) for i in range(lanes)):
                return number
        return 0

    def _runs(self, size: int, group, origin: int) -> list[int]:
        """The runs of a group of lanes.

        A run is consecutive keys seen by the same lanes: (column, place among the logits, number of
        keys, case), where the case names the first and last lane; see `lane_cases`.
        """
        cases = {lanes: i for i, lanes in enumerate(lane_cases(size))}
        runs: list[list[int]] = []
        for key in range(min(a for a, _ in group), max(b for _, b in group)):
            lanes = [i for i, (a, b) in enumerate(group) if a <= key < b]
            if not lanes:
                continue
            assert lanes == list(range(lanes[0], lanes[-1] + 1))
            case = cases[lanes[0], lanes[-1] + 1]
            if runs and runs[-1][3] == case and runs[-1][0] + runs[-1][2] == key:
                runs[-1][2] += 1
            else:
                runs.append([key, key - origin, 1, case])
        return [word for run in runs for word in run]

    def _chunks(self, count: int, first: int = 0) -> list[int]:
        """Address and number of the chunks of `count` taps, for several query rows and for one."""
        words = []
        for sizes in (self.tuning.shared, self.tuning.singles):
            chunks = cover(count, sizes) if sizes else []
            flat = [word for at, size in chunks for word in (first + at, size)]
            words += [self.put(flat), len(chunks)]
        return words

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
            taps=self.rows * self.span,
            span=max(self.span, self.extra_taps),
            extra_taps=self.extra_taps,
            sides=self.sides,
            reach=(self.reach.low, self.reach.high),
            ends=(-self.ends.low, self.ends.high),
            bias_reach=(self.bias.low, self.bias.high),
            mirror_reach=(self.mirror.low, self.mirror.high),
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
