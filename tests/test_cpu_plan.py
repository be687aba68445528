"""The table that CPU kernels follow, read back word by word: nothing is compiled here.

A kernel does what the table says, so each pair of a query and a key must be in it exactly once, the
weights that are summed must lie where their logits were computed, and a gradient must be added to
what is there, and to nothing else.
"""

from itertools import product

import hypothesis.strategies as st
import torch
from hypothesis import given, settings

from natcupy.cpu import classes, plan
from natcupy.cpu.classes import BY_RUNS, GROUP, LANES, SHIFTED, Tuning, group_kinds
from natcupy.cpu.cuts import EARLIER, LATER, lane_cases
from natcupy.cpu.kernels import logit_sizes, most_sides
from natcupy.cpu.plan import BLOCK_WORDS, ITEM, SEGMENT_WORDS, WITH_LAST, WITH_NEXT, Shape
from natcupy.cpu.rows import ENTRY_WORDS, PACK_WORDS, RETIRE_WORDS, ROW_WORDS, SIDE, STEP
from natcupy.neighborhood import Neighborhood


@st.composite
def cases(draw):
    """(shape, tuning, backward, bytes for a packed key, stripes, grouped)."""
    axes = []
    maps = (3, 9), (45, 9), (60, 33)
    for most, widest in ((1, 1), (1, 1), (90, 40)) if draw(st.booleans()) else maps:
        kernel, dilation = draw(st.integers(1, widest)), draw(st.integers(1, 2))
        length = draw(st.integers(1, most))
        kernel = min(kernel, max(1, length // dilation))
        stride = draw(st.integers(1, kernel))
        dilation = dilation if kernel * dilation <= length else 1
        axes.append((length, kernel, stride, dilation, draw(st.booleans())))
    lengths, *rule = zip(*axes, strict=True)
    shape = Shape.of(lengths, Neighborhood(*rule), 8, 8, 0)
    kernel = shape.kernel_size[2]
    lanes = draw(st.sampled_from([(2, 4), (4, 4), (3, 2)]))
    together = draw(st.sampled_from([1, 2]))
    sizes = logit_sizes(shape, draw(st.sampled_from([6, 12, 26])), together)
    sides = most_sides(shape, together)
    tuning = Tuning(*sizes, sides, draw(st.sampled_from([0, kernel])), *lanes)
    size = draw(st.sampled_from([256, 1 << 13]))
    return shape, tuning, draw(st.booleans()), size, 2, draw(st.booleans())


def items_of(shape, made):
    """Each item as a dictionary, with its phase, its windows and its members."""
    at, w = made.words[1], made.words
    for number in range(made.items):
        item = dict(zip(ITEM, w[at + number * len(ITEM) :][: len(ITEM)], strict=True))
        phase = next(i for i, (first, n) in enumerate(made.phases) if first <= number < first + n)
        group = [item[f"group{axis}"] for axis in range(3)]
        windows = [
            shape.windows(axis, -(-(n - g) // d))
            for axis, (n, g, d) in enumerate(zip(shape.lengths, group, shape.dilation, strict=True))
        ]
        yield phase, tuple(group), item, windows


def records(w, at, count, size):
    return [w[at + i * size : at + (i + 1) * size] for i in range(count)]


def computed(w, record, chunks_at, sizes, column, item, period):
    """{(place, lane): key} of the logits that a kernel with these chunks leaves, None where blank.

    First the logits of a row are computed, then each is told whose it is, in the order of taps.
    """
    span, mask_at, active, origin, broadcast = record[:5]
    first, end = item["key"], item["key"] + item["key_columns"]
    found = {}
    for tap, size in records(w, record[chunks_at], record[chunks_at + 1], 2):
        for t in range(tap, tap + sizes[size]):
            assert 0 <= t < span
            for lane in range(active):
                key = column + origin + t + (0 if broadcast else lane)
                key += period if key < first else -period if key >= end else 0
                found[t, lane] = key
    if not mask_at:
        return found
    taps = range(record[classes.TAPS_AT], record[classes.TAPS_AT] + record[classes.TAPS])
    assert {t for t, _ in found} == {*taps}
    for t, lane in product(taps, range(active)):
        key = found[t, lane]
        for place in (t + w[record[classes.PARTNERS_AT] + t], t):
            found[place, lane] = key if w[w[mask_at + place] + lane] else None
    return found


def check_masks(w, record, seen, backward):
    """Idle lanes see all, so that full classes need no mask; sums over lanes leave them out."""
    span, mask_at, active = record[:3]
    for place, lane in product(range(span), range(LANES)):
        sees, idle = (place, lane) in seen, lane >= active
        assert not mask_at or w[w[mask_at + place] + lane] == -(sees or idle)
        sums_at = record[classes.SUMS_MASK_AT]
        assert not backward or (w[w[sums_at + place] + lane] if sums_at else -1) == -sees


def summed(w, groups_at, size, broadcast):
    """[(lane, key less the block's first query, place among the lane's logits)]."""
    kinds, found, seen = group_kinds(size), [], 0
    for words in records(w, groups_at + 1, w[groups_at], len(GROUP)):
        group = dict(zip(GROUP, words, strict=True))
        kind, lanes = kinds[group["kind"]], group["lanes"]
        assert group["lane"] == seen and 1 <= lanes <= kind.lanes
        seen += lanes
        runs = [(group["column"], group["place"], group["keys"], 0, lanes)]
        if kind.way == BY_RUNS:
            cases = lane_cases(kind.lanes)
            runs = records(w, group["runs_at"], group["runs"], 4)
            runs = [(*run[:3], *cases[run[3]]) for run in runs]
        elif kind.way == SHIFTED:
            assert group["keys"] >= lanes == kind.lanes
            edges = [(i, 0, i + 1) for i in range(lanes - 1)]
            edges += [(i, 0, lanes) for i in range(lanes - 1, group["keys"])]
            edges += [(group["keys"] + i, i + 1, lanes) for i in range(lanes - 1)]
            runs = [(group["column"] + i, group["place"] + i, 1, a, b) for i, a, b in edges]
        for column, place, keys, a, b in runs:
            for i in range(keys):
                for lane in range(group["lane"] + a, group["lane"] + b):
                    found.append((lane, column + i, place + i - (0 if broadcast else lane)))
    return found


def check_columns(shape, tuning, made, item, windows):
    w, period = made.words, shape.kernel_size[2]
    first, count = item["query"], item["query_columns"]
    seen, before = 0, None
    for at, start, how in records(w, item["blocks_at"], item["blocks"], BLOCK_WORDS):
        record, column = w[at : at + 15], first + start
        assert (how == WITH_LAST) == (before is not None)
        if how == WITH_LAST:
            check_two_blocks(w, record, tuning.beside)
            assert at == before  # the same class
        before = at if how == WITH_NEXT else None
        span, _, active, origin, broadcast = record[:5]
        assert start == seen and active <= LANES
        seen += active
        expected = {
            (column + i) * 1000 + key: key - column - origin - (0 if broadcast else i)
            for i in range(active)
            for key in range(*windows[2][column + i])
        }
        logits = {(p, pair // 1000 - column): pair % 1000 for pair, p in expected.items()}
        all_places = [*product(range(span), range(active))]
        assert logits.keys() <= {*all_places}
        check_masks(w, record, logits.keys(), made.backward)
        for chunks_at, sizes in (
            (classes.SHARED_AT, tuning.shared),
            (classes.SINGLES_AT, tuning.singles),
        ):
            if sizes:
                found = computed(w, record, chunks_at, sizes, column, item, period)
                assert found == {pair: logits.get(pair) for pair in all_places}
        for groups_at, size in (
            (classes.GROUPS_AT, tuning.lane_group),
            (classes.SPREADS_AT, tuning.spread_group if made.backward else tuning.lane_group),
        ):
            found = summed(w, record[groups_at], size, broadcast)
            pairs = [((column + lane) * 1000 + column + key, p) for lane, key, p in found]
            assert len(pairs) == len(expected) and dict(pairs) == expected
    assert seen == count and before is None


def check_two_blocks(w, record, sizes):
    """Every tap of two neighboring blocks is computed: together, or as one of 8 not shared."""
    span, mask_at, active, _, broadcast = record[:5]
    assert (mask_at, active, broadcast) == (0, LANES, 0)
    chunks = records(w, record[classes.SHARED_AT], record[classes.SHARED], 2)
    together = {tap + i for tap, size in chunks for i in range(sizes[size])}
    assert together | {*range(LANES)} == {*range(span)} and min(together) == LANES
    assert {tap - LANES for tap in together} | {*range(span - LANES, span)} == {*range(span)}


def check_rows(shape, made, item, windows):
    """Every query row once, each with its key rows; yields what leaves the ring."""
    w, at, slots, done = made.words, item["steps_at"], {}, []
    for _ in range(item["steps"]):
        step = dict(zip(STEP, w[at : at + len(STEP)], strict=True))
        place = at + len(STEP)
        sides = records(w, place, step["sides"], len(SIDE))
        place += len(sides) * len(SIDE)
        for slot, x, y in records(w, place, step["packs"], PACK_WORDS):
            assert slot not in slots and slot < made.ring
            slots[slot] = x, y
        place += step["packs"] * PACK_WORDS
        entries = records(w, place, step["entries"], ENTRY_WORDS)
        place += step["entries"] * ENTRY_WORDS
        for number, (x, y, rows_at, rows) in enumerate(sides):
            done.append((x, y))
            keys = [(a, b) for a in range(*windows[0][x]) for b in range(*windows[1][y])]
            listed = records(w, at + rows_at, rows, ROW_WORDS)
            assert [slots[slot] for slot, _ in listed] == keys
            by_entry = {}
            for slot, first, count, *words in entries:
                if first <= number < first + count:
                    by_entry[words[2 * (number - first)]] = slot, words[2 * (number - first) + 1]
            assert [by_entry[i] for i in range(rows)] == [tuple(row) for row in listed]
        for slot, x, y, when, number in records(w, place, step["retired"], RETIRE_WORDS):
            assert slots.pop(slot) == (x, y)
            yield x, y, when, number
        at += step["size"]
    assert not slots and len(set(done)) == len(done)
    item["done"] = done


@settings(max_examples=60, deadline=None)
@given(case=cases())
def test_every_pair_is_in_the_table_once(case):
    shape, tuning, backward, item_bytes, stripes, grouped = case
    made = plan.make(shape, tuning, backward, item_bytes, stripes, grouped)
    made.backward = backward
    queries, stored = set(), {}
    for phase, group, item, windows in items_of(shape, made):
        check_columns(shape, tuning, made, item, windows)
        segments = records(made.words, item["segments_at"], item["segments"], SEGMENT_WORDS)
        for x, y, row_when, row in check_rows(shape, made, item, windows):
            for first, count, when, column in segments:
                for i in range(count):
                    key = group, x, y, item["key"] + first + i
                    place = item["partials"] + row, column + i
                    stored.setdefault(key, []).append((phase, row_when | when, place))
        for x, y in item["done"]:
            for z in range(item["query"], item["query"] + item["query_columns"]):
                assert (group, x, y, z) not in queries
                queries.add((group, x, y, z))
    total = torch.Size(shape.lengths).numel()
    assert len(queries) == total
    if backward:
        check_stores(made, stored, grouped)


def check_stores(made, stored, grouped):
    """No two items of a phase share a key, and each knows of the others that store one."""
    taken = set()
    for found in stored.values():
        in_phases = [phase for phase, *_ in found]
        assert in_phases == sorted(set(in_phases))
        last = len(found) - 1
        expected = [EARLIER * (i > 0) | LATER * (i < last) for i in range(len(found))]
        assert [when for _, when, _ in found] == expected
        if grouped or last:  # its sum is incomplete for a while
            (place,) = {place for *_, place in found}
            assert place not in taken
            taken.add(place)
    rows, columns = made.partials
    assert all(row < rows and column < columns for row, column in taken)
    if not grouped and len(made.phases) == 1:
        assert made.partials == (0, 0)


def test_stripes_of_a_tall_map_run_at_once():
    shape = Shape.of((113, 9), Neighborhood((7, 7), (1, 1), (1, 1), (False, False)), 8, 8, 0)
    made = plan.make(shape, Tuning(*logit_sizes(shape, 12), 3, 7, 2, 4), True, 512, 0)
    assert [count for _, count in made.phases] == [2, 2]


def test_only_incomplete_sums_have_places():
    def places(lengths, kernel_size, item_bytes):
        axes = len(lengths)
        hood = Neighborhood(kernel_size, (1,) * axes, (1,) * axes, (False,) * axes)
        shape = Shape.of(lengths, hood, 32, 32, 0)
        tuning = Tuning(*logit_sizes(shape, 12), 3, 7, 2, 4)
        return plan.make(shape, tuning, True, item_bytes, 0).partials

    assert places((56, 56), (7, 7), 640) == (0, 0)
    assert places((4096,), (63,), 640) == (1, 7 * 62)  # between eight tiles
    assert places((113, 56), (7, 7), 640) == (3 * 6, 56)  # between four stripes


def test_the_table_of_a_long_causal_window_is_small():
    """Nearly every block has a class of its own: not many words for each of its taps."""
    shape = Shape.of((512,), Neighborhood((256,), (1,), (1,), (True,)), 32, 32, 0)
    made = plan.make(shape, Tuning(*logit_sizes(shape, 12), 3, 0, 2, 4), False, 512, 0)
    assert len(made.words) < 4 * sum(range(0, 256, LANES))
