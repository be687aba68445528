"""The inner kernels whose lanes are channels: weighted sums of rows, and their mirror image.

In: a `Module` and compile-time numbers. Out: functions added to it. The packed row of a key is
loaded once for a group of queries that see it, and each one's weight is broadcast. Which queries
see a key is written in the plan's runs, so that no value is ever multiplied by the weight of a
query that must not see it.
"""

from __future__ import annotations

from natcupy.cpu.cuts import lane_cases
from natcupy.cpu.emit import Builder, Machine, Module
from natcupy.cpu.plan import LANES
from natcupy.cpu.rows import ROW_WORDS

VECTORS = 4  # registers of channels that one pass over the keys holds per query


def lane_group(machine: Machine) -> int:
    """Queries whose outputs are in registers together."""
    return 4 if machine.registers >= 32 else 2


def weighted_sum(module: Module, machine: Machine, vectors: int, store) -> str:
    """out[lane] = factor[lane] * sum over keys of s[key][lane] * row[key], for a group of lanes.

    `vectors` registers of channels per query; `store(b, pointer, vector number, vector)` writes
    into the tensor. `s` and `extra_s` point at the group's first lane. The weights of one key lie
    `lane_step` apart; every lane sees all additional keys, whose weights are neighbors.
    """
    lanes, width = lane_group(machine), machine.width(module.real)
    name = f"weighted_{vectors}_{store.name}"
    b = module.function(
        name,
        "ptr s, i64 lane_step, i64 row_span, ptr rows, i64 row_count, ptr values, i64 slot_step, "
        "i64 value_step, ptr runs, i64 run_count, ptr extra_s, ptr extra, i64 extra_count, "
        "ptr factor, ptr out, i64 out_step, i64 active",
    )
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

    def key_row(i, sums):
        values = b.at("%values", b.mul(b.table("%rows", b.mul(i, ROW_WORDS)), "%slot_step"))
        weights = b.at("%s", b.mul(i, "%row_span"))
        sums = [(kind, x) for x in sums]
        return _follow_runs(b, lanes, values, weights, sums, accumulate)

    def extra(i, sums):
        weights = b.at("%extra_s", b.mul(i, LANES))
        value = b.at("%extra", b.mul(i, "%value_step"))
        return accumulate(sums, value, weights, 0, lanes, range(lanes))

    sums = [(kind, "zeroinitializer")] * (lanes * vectors)
    sums = b.fold_some("%row_count", sums, key_row)
    sums = b.fold(0, "%extra_count", [(kind, x) for x in sums], extra)
    for lane in range(lanes):

        def write(lane=lane):
            factor = b.splat_load(b.at("%factor", lane), width)
            out = b.at("%out", b.mul("%out_step", lane), store.kind)
            for v in range(vectors):
                store(b, out, v, b.arith("fmul", sums[lane * vectors + v], factor, width))

        b.when(b.less(lane, "%active"), write)
    module.finish(b)
    return name


def spread(module: Module, machine: Machine, vectors: int) -> str:
    """The mirror of `weighted_sum`: sums[key] += s[key][lane] * row[lane] over a group of lanes."""
    lanes, width = lane_group(machine), machine.width(module.real)
    name = f"spread_{vectors}"
    b = module.function(
        name,
        "ptr s, i64 lane_step, i64 row_span, ptr rows, i64 row_count, ptr values, i64 slot_step, "
        "i64 value_step, ptr runs, i64 run_count, ptr from, i64 from_step",
    )
    source = []
    for lane in range(lanes):
        at = b.at("%from", b.mul("%from_step", lane))
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

    def key_row(i, _):
        sums = b.at("%values", b.mul(b.table("%rows", b.mul(i, ROW_WORDS)), "%slot_step"))
        weights = b.at("%s", b.mul(i, "%row_span"))
        return _follow_runs(b, lanes, sums, weights, [], accumulate)

    b.fold_some("%row_count", [], key_row)
    module.finish(b)
    return name


def _follow_runs(b: Builder, lanes: int, values, weights, carried, accumulate):
    """Visit the keys of one row run by run, with code for each set of lanes that can see a key."""
    cases = lane_cases(lanes)
    steps = [b.mul("%lane_step", lane) for lane in range(lanes)]
    kinds = [kind for kind, _ in carried]

    def run(i, carried):
        column, place, count, case = (b.table("%runs", b.add(b.mul(i, 4), w)) for w in range(4))
        first_value = b.at(values, b.mul(column, "%value_step"))
        first_weight = b.at(weights, b.mul(place, LANES))

        def arm(which):
            first, last = cases[which]
            start = [("ptr", first_value), ("ptr", first_weight), *zip(kinds, carried, strict=True)]

            def key(_, state):
                value, weight = state[:2]
                sums = accumulate(state[2:], value, weight, first, last, steps)
                return [b.at(value, "%value_step"), b.at(weight, LANES), *sums]

            return b.fold_some(count, start, key)[2:]

        return b.switch(case, len(cases), kinds, arm)

    return b.fold(0, "%run_count", carried, run)
