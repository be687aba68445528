"""How the lanes of a block see the keys of a row: the plan's *classes*.

In: the windows of a block's queries. Out: records in the plan's table.

A class says how far from the block's first query its keys begin, which lanes see which, in which
chunks the logits of a row are computed, and which lanes take their sums together. Its logits are
either those of *taps*, distances from each lane's query, or, in a *broadcast* class, of keys that
are the same for all lanes, whichever are fewer.

At the ends of a row windows are shifted inward, and queries see keys at more distances than inside.
There a class is *wrapped*: the packed row goes on before its start with what lies one window
further, and past its end with what lies one window back, so that as many taps as inside meet every
key of every lane once, some of them one period away from their own place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import add
from typing import NamedTuple

from natcupy.cpu.cuts import cover, end_of, lane_cases

LANES = 8
FULL_MASK_AT = 8  # address of the mask of a tap that all lanes see

# Words of a class record.
SPAN, MASK_AT, ACTIVE, ORIGIN, BROADCAST, GROUPS_AT = range(6)
SHARED_AT, SHARED, SINGLES_AT, SINGLES = range(6, 10)  # chunks of taps, for several rows and one
SPREADS_AT = 10  # like GROUPS_AT, for sums of keys
PARTNERS_AT = 11  # for each tap the distance to its partner, where there is a mask
TAPS_AT, TAPS = 12, 13  # the first tap that is computed, and how many are
SUMS_MASK_AT = 14  # the mask that keeps lanes which are not active out of sums over lanes, too
# Words of the record of a group of lanes. Its windows are any, equal ones, or each one key further
# than the one before.
GROUP = ("kind", "column", "place", "keys", "runs_at", "runs", "lane", "lanes")
BY_RUNS, SAME, SHIFTED = range(3)

Windows = tuple[tuple[int, int], ...]  # first key and end of each lane's


class Found(NamedTuple):
    """A class: its address, the distance of its first tap or key, and the number of them.

    `is_plain`: each of 8 lanes sees all taps, so that two such blocks side by side share keys.
    """

    at: int
    origin: int
    span: int
    is_plain: bool


class GroupKind(NamedTuple):
    """How the windows of so many lanes lie to each other."""

    way: int
    lanes: int


def group_kinds(size: int) -> list[GroupKind]:
    """The kinds of groups of up to `size` lanes, by number.

    Number 0 takes windows as they come, where no other kind fits; the others are tried in order.
    """
    halves = [size, size // 2] if size > 2 else [size]
    alike = [GroupKind(way, lanes) for lanes in halves for way in (SAME, SHIFTED)]
    return [GroupKind(BY_RUNS, halves[-1]), *alike]


@dataclass(frozen=True)
class Tuning:
    """Choices compiled into a kernel that its table must agree with."""

    shared: tuple[int, ...]  # numbers of taps that one pass keeps in registers, for several rows
    singles: tuple[int, ...]  # for one query row
    beside: tuple[int, ...]  # for two neighboring blocks of a line; none, one block at a time
    sides: int  # most query rows of a step
    keys: int  # that every query of a group sees in a row, unless by runs; 0 for any number
    lane_group: int  # queries whose outputs are in registers together
    spread_group: int  # queries that are handed out to keys together


@dataclass
class Reach:
    """Smallest half-open interval that holds all it was shown."""

    low: int = 0
    high: int = 0

    def show(self, low: int, high: int) -> None:
        """Grow to hold low .. high - 1."""
        self.low, self.high = min(self.low, low), max(self.high, high)


class Classes:
    """The classes of one plan."""

    def __init__(
        self,
        put: Callable[[Sequence[int]], int],
        kernel_size: int,
        tuning: Tuning,
        backward: bool,
    ):
        """`put` appends words to the table and returns their address."""
        self.put, self.kernel_size = put, kernel_size
        self.tuning, self.backward = tuning, backward
        self.near: dict = {}  # by the windows, and the ends of the item's keys where they are near
        self.known: dict = {}  # by the windows, and how they are wrapped
        self.masks: dict[tuple[int, ...], int] = {(-1,) * LANES: FULL_MASK_AT}
        self.zeros = 0, 0  # address and number of some
        self.span = 0  # most taps
        self.ends, self.bias, self.mirror = Reach(), Reach(), Reach()  # see `Plan`
        self.bias.show(0, 2 * kernel_size - 1)
        self.mirror.show(0, 2 * kernel_size - 1)

    def of_extra_keys(self, count: int) -> tuple[int, int]:
        """Address of nine addresses, of the class for each number of active lanes; and its taps.

        Every lane sees every additional key.
        """
        sizes = self.tuning.singles
        taps = end_of(cover(count, sizes), sizes)
        mask_at = self._masks([(-1,) * LANES] * count + [(0,) * LANES] * (taps - count))
        addresses = [0]
        for active in range(1, LANES + 1):
            groups, spreads = self._groups(((0, count),) * active, 0)
            record = [taps, mask_at, active, 0, 1, groups, *self._chunks(count), spreads]
            record += [self._partners(taps, 0, False), 0, taps, 0]
            addresses.append(self.put(record))
        return self.put(addresses), taps

    def of(self, starts: Sequence[int], ends: Sequence[int], left: int, right: int) -> Found:
        """The class for a block's windows, from each lane's distances to its first key and end.

        The item's keys are left .. right - 1, relative to the block's first query.
        """
        tap, taps = min(starts), max(ends) - min(starts)
        item = None  # its ends, where windows may be wrapped around them
        if taps > self.kernel_size:
            far = self.kernel_size + LANES  # no window of the block, wrapped or not, comes so far
            item = max(left, starts[0] - far), min(right, ends[-1] + far)
        place = *starts, *ends, item
        if place not in self.near:
            lanes = range(len(starts))
            windows = tuple(zip(map(add, starts, lanes), map(add, ends, lanes), strict=True))
            self.near[place] = self._of(windows, tap, taps, item)
        return self.near[place]

    def _of(self, windows: Windows, tap: int, taps: int, item: tuple[int, int] | None) -> Found:
        """`of`, for windows relative to the block's first query, which see so many taps."""
        kernel = self.kernel_size
        wrap = None if item is None else self._wrap(windows, *item, tap, taps)
        known = windows, wrap
        if known in self.known:
            return self.known[known]
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
        seen = self._seen(windows, origin, span, broadcast)
        mask_at = self._masks([lanes + (-1,) * (LANES - len(windows)) for lanes in seen])
        if broadcast:  # lane i of key s has mirrored bias kernel - 1 - origin - s + i
            self.mirror.show(kernel - origin - span, kernel - 1 - origin + LANES)
        else:
            self.bias.show(kernel - 1 + origin, kernel - 1 + origin + span)
        if wrap is not None:
            self.ends.show(wrap - item[0], wrap + len(windows) - 1 + kernel - item[1])
        record = [span, mask_at, len(windows), origin, int(broadcast)]
        groups, spreads = self._groups(windows, origin)
        record += [groups, *self._chunks(count, skipped), spreads]
        record += [self._partners(span, kernel, wrap is not None) if mask_at else 0]
        computed = end_of(by_column if broadcast else by_tap, sizes)
        assert wrap is None or computed == kernel  # a tap more would spoil its partner
        record += [skipped, computed]
        idle = (0,) * (LANES - len(windows))
        record += [self._masks([lanes + idle for lanes in seen]) if self.backward else 0]
        self.span = max(self.span, span)
        is_plain = not (broadcast or mask_at) and len(windows) == LANES
        self.known[known] = Found(self.put(record), origin, span, is_plain)
        return self.known[known]

    def _wrap(self, windows: Windows, left: int, right: int, tap: int, taps: int) -> int | None:
        """The first of `kernel_size` taps that show each lane its keys, each once, or None.

        A column before `left` holds the one a period further, one from `right` on the one a period
        back.
        """
        period = self.kernel_size
        if any(b - a != period for a, b in windows):
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

    @staticmethod
    def _seen(windows: Windows, origin: int, span: int, broadcast: bool) -> list[tuple[int, ...]]:
        """For each tap, or key of a broadcast class: -1 in active lanes that see it, else 0."""
        lanes = []
        for i, (a, b) in enumerate(windows):
            first = a - origin - (0 if broadcast else i)
            lanes.append([0] * first + [-1] * (b - a) + [0] * (span - first - (b - a)))
        return list(zip(*lanes, strict=True))

    def _masks(self, taps: Sequence[tuple[int, ...]]) -> int:
        """Address of the addresses of masks, one for each tap: -1 in lanes that see it, else 0.

        None where all lanes see all.
        """
        if not any(0 in lanes for lanes in taps):
            return 0
        addresses = []
        for lanes in taps:
            if lanes not in self.masks:
                self.masks[lanes] = self.put(lanes)
            addresses.append(self.masks[lanes])
        return self.put(addresses)

    def _partners(self, span: int, period: int, wrapped: bool) -> int:
        """Address of the distance from each tap of a class to its partner."""
        if not wrapped:
            if span > self.zeros[1]:
                self.zeros = self.put([0] * span), span
            return self.zeros[0]
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
        """Address and number of the chunks of `count` taps, for several query rows and for one.

        Two blocks of a line are like two rows that share all taps but the first 8 of one block and
        the last 8 of the other.
        """
        tuning, words = self.tuning, []
        several = (tuning.shared, 0) if tuning.shared else (tuning.beside, LANES)
        for sizes, skipped in (several, (tuning.singles, 0)):
            chunks = cover(max(0, count - skipped), sizes) if sizes else []
            flat = [word for at, size in chunks for word in (first + skipped + at, size)]
            words += [self.put(flat), len(chunks)]
        return words
