"""The inner kernels whose lanes are channels: weighted sums of rows, and their mirror image.

In: a `Module` and compile-time numbers. Out: functions added to it. The packed row of a key, or the
sums that belong to it, is loaded once for a group of queries that see it, and each one's weight is
broadcast. Which queries see a key is written in the plan's groups, so that no value is ever
multiplied by the weight of a query that must not see it.
"""

from __future__ import annotations

from dataclasses import dataclass

from natcupy.cpu.classes import BY_RUNS, GROUP, LANES, SAME, SHIFTED, group_kinds
from natcupy.cpu.cuts import lane_cases
from natcupy.cpu.emit import Builder, Machine, Module
from natcupy.cpu.rows import ROW_WORDS


@dataclass(frozen=True)
class Block:
    """What is in registers while keys pass by: so many vectors of channels of so many queries."""

    lanes: int
    vectors: int

    def passes(self, channels: int, width: int) -> list[tuple[int, int]]:
        """Channels cut into what fits, (first channel, channels)."""
        step = self.vectors * width
        return [(c, min(step, channels - c)) for c in range(0, channels, step)]


def weighted_block(machine: Machine) -> Block:
    """The outputs that `weighted_sum` adds up: each row of a key is loaded once for all lanes."""
    return Block(4, 4) if machine.registers >= 32 else Block(2, 4)


def spread_block(machine: Machine) -> Block:
    """The rows that `spread` hands out: each sum of a key is loaded and stored once for all lanes.

    Stores are dear, so there are more lanes.
    """
    return Block(4, 4) if machine.registers >= 32 else Block(4, 2)


def weighted_sum(
    module: Module, machine: Machine, vectors: int, keys: int, step: int, store, has_extra: bool
) -> str:
    """out[lane] = factor[lane] * sum over keys of s[key][lane] * row[key], for a block's lanes.

    `vectors` registers of channels per query, packed `step` apart; `store(b, pointer, vector
    number, vector)` writes into the tensor. The weights of one key lie `lane_step` apart; every
    lane sees all additional keys, whose weights are neighbors. `keys` is `Common.keys`.
    """
    lanes, width = weighted_block(machine).lanes, machine.width(module.real)
    name = f"weighted_{vectors}_{step}_{store.name}"
    extra = ", ptr extra_s, ptr extra, i64 extra_count" if has_extra else ""
    b = module.function(name, f"{_COMMON}{extra}, ptr factor, ptr out, i64 out_step")
    kind = b.vec(width)

    def accumulate(sums, values_at, weights_at, first, last, steps):
        sums = list(sums)
        weights = [b.splat_load(b.at(weights_at, steps[i]), width) for i in range(first, last)]
        for v in range(vectors):
            row = b.vload(b.at(values_at, v * width), width)
            for lane, weight in zip(range(first, last), weights, strict=True):
                place = lane * vectors + v
                sums[place] = b.fma(weight, row, sums[place], width)
        return sums

    def group(first, words):
        sums = [(kind, "zeroinitializer")] * (lanes * vectors)
        sums = _see_keys(b, lanes, keys, step, words, sums, accumulate)

        def extra(i, sums):
            weights = b.at("%extra_s", b.add(b.mul(i, LANES), first))
            value = b.at("%extra", b.mul(i, step))
            return accumulate(sums, value, weights, 0, lanes, _in_use(b, lanes, words))

        if has_extra:
            sums = b.fold(0, "%extra_count", [(kind, x) for x in sums], extra)
        for lane in range(lanes):

            def write(lane=lane):
                factor = b.splat_load(b.at("%factor", b.add(first, lane)), width)
                out = b.at("%out", b.mul("%out_step", b.add(first, lane)), store.kind)
                for v in range(vectors):
                    store(b, out, v, b.arith("fmul", sums[lane * vectors + v], factor, width))

            b.when(b.less(lane, words["lanes"]), write)

    _for_groups(b, group)
    module.finish(b)
    return name


def spread(module: Module, machine: Machine, vectors: int, keys: int, step: int) -> str:
    """The mirror of `weighted_sum`: sums[key] += s[key][lane] * row[lane] over a block's lanes."""
    lanes, width = spread_block(machine).lanes, machine.width(module.real)
    name = f"spread_{vectors}_{step}"
    b = module.function(name, f"{_COMMON}, ptr from, i64 from_step")

    def group(first, words):
        source = []
        for lane in _in_use(b, lanes, words):
            at = b.at("%from", b.mul("%from_step", b.add(first, lane)))
            source.append([b.vload(b.at(at, v * width), width) for v in range(vectors)])

        def accumulate(_, sums_at, weights_at, first, last, steps):
            weights = [b.splat_load(b.at(weights_at, steps[i]), width) for i in range(first, last)]
            for v in range(vectors):
                place = b.at(sums_at, v * width)
                total = b.vload(place, width)
                for lane, weight in zip(range(first, last), weights, strict=True):
                    total = b.fma(weight, source[lane][v], total, width)
                b.vstore(total, place, width)
            return []

        _see_keys(b, lanes, keys, step, words, [], accumulate)

    _for_groups(b, group)
    module.finish(b)
    return name


# How a block's lanes see keys, common to both: weights, key rows, groups of lanes.
_COMMON = (
    "ptr s, i64 lane_step, i64 row_span, ptr rows, i64 row_count, ptr values, i64 slot_step, "
    "ptr groups, ptr table"
)


def _for_groups(b: Builder, body) -> None:
    """`body(first lane, its words)` for each group of lanes in use."""

    def one(number):
        record = b.at("%groups", b.add(b.mul(number, len(GROUP)), 1), "i32")
        group = {name: b.table(record, i) for i, name in enumerate(GROUP)}
        body(group["lane"], group)

    b.loop(b.table("%groups", 0), one)


def _in_use(b: Builder, lanes: int, group) -> list:
    """Numbers of lanes to read: behind the last of the group, the last once more."""
    last = b.sub(group["lanes"], 1)
    return [b.least(lane, last) for lane in range(lanes)]


def _see_keys(b: Builder, lanes: int, keys, step, group, carried, accumulate) -> list:
    """All keys of a group of up to `lanes` lanes, row after row, by the kind of its record."""
    steps = [b.mul("%lane_step", lane) for lane in range(lanes)]
    kinds = [kind for kind, _ in carried]
    weights = b.at("%s", b.mul("%lane_step", group["lane"]))

    def one_key(state, begin, end):
        """A key that lanes begin .. end - 1 see; on to the next."""
        value, weight, *sums = state
        sums = accumulate(sums, value, weight, begin, end, steps)
        return [b.at(value, step), b.at(weight, LANES), *sums]

    def consecutive(count, state, begin, end):
        if isinstance(count, int):
            for _ in range(count):
                state = one_key(state, begin, end)
            return state
        start = list(zip(["ptr", "ptr", *kinds], state, strict=True))
        return b.fold_some(count, start, lambda _, state: one_key(state, begin, end))

    def state_at(values, weights, column, place, sums):
        return [b.at(values, b.mul(column, step)), b.at(weights, b.mul(place, LANES)), *sums]

    def by_runs(size, values, weights, sums):
        cases = lane_cases(size)
        runs = b.at("%table", group["runs_at"], "i32")

        def run(i, sums):
            column, place, count, case = (b.table(runs, b.add(b.mul(i, 4), w)) for w in range(4))
            state = state_at(values, weights, column, place, sums)

            def arm(which):
                return consecutive(count, state, *cases[which])[2:]

            return b.switch(case, len(cases), kinds, arm)

        return b.fold(0, group["runs"], list(zip(kinds, sums, strict=True)), run)

    def same(size, values, weights, sums):
        state = state_at(values, weights, group["column"], group["place"], sums)
        return consecutive(keys or group["keys"], state, 0, size)[2:]

    def shifted(size, values, weights, sums):
        if 0 < keys < size:  # no key that all lanes see, and the plan has no such group
            return sums
        state = state_at(values, weights, group["column"], group["place"], sums)
        for end in range(1, size):
            state = one_key(state, 0, end)
        both = keys - (size - 1) if keys else b.sub(group["keys"], size - 1)
        state = consecutive(both, state, 0, size)
        for begin in range(1, size):
            state = one_key(state, begin, size)
        return state[2:]

    def rows(kind):
        see = {BY_RUNS: by_runs, SAME: same, SHIFTED: shifted}[kind.way]

        def key_row(i, sums):
            values = b.at("%values", b.mul(b.table("%rows", b.mul(i, ROW_WORDS)), "%slot_step"))
            return see(kind.lanes, values, b.at(weights, b.mul(i, "%row_span")), sums)

        return b.fold_some("%row_count", carried, key_row)

    ways = group_kinds(lanes)
    return b.switch(group["kind"], len(ways), kinds, lambda kind: rows(ways[kind]))
