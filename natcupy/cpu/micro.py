"""The inner kernels whose lanes are 8 neighboring queries: logits, softmax, their gradients.

In: a `Module` and compile-time numbers. Out: functions added to it. They work on scratch memory in
the compute type, laid out by `kernels.py`.

A tap is a distance from the query, so one unaligned load of 8 packed key columns serves all lanes;
in a broadcast class a tap is one key column for all of them. Tap s of a key row lies at 8 * s.
"""

from __future__ import annotations

import math

from natcupy.cpu.classes import (
    BROADCAST,
    FULL_MASK_AT,
    LANES,
    PARTNERS_AT,
    SHARED,
    SHARED_AT,
    SINGLES,
    SINGLES_AT,
    TAPS,
    TAPS_AT,
)
from natcupy.cpu.emit import Builder, Module, Value
from natcupy.cpu.rows import ROW_WORDS

# 2**x on [-0.5, 0.5] with p(0) = 1, least largest relative error: 1.1e-7
EXP2_FLOAT = (1.0, 0.6931469776, 0.24022242085, 0.05550733744, 0.00967151265, 0.0013264727)
EXP2_DOUBLE = tuple(math.log(2) ** n / math.factorial(n) for n in range(14))  # below 1e-17
# (magic number that rounds to an integer when added, mantissa bits, exponent bias)
FORMAT = {"float": (1.5 * 2.0**23, 23, 127), "double": (1.5 * 2.0**52, 52, 1023)}
PAIR = 2 * LANES  # taps of a line in 8 registers, each with the one 8 further
MOST_COLUMNS = 24  # of a broadcast class at once: what 32 registers leave beside keys and queries
LOWEST = {"float": -3.4028234663852886e38, "double": -1.7976931348623157e308}

Register = list[tuple[int, int]]  # of logits: (query row, tap) of each vector of 8 lanes in it


def exp2(b: Builder, x: str, lanes: int = LANES) -> str:
    """2**x for each lane, x <= 0 or NaN (kept); exactly 0 half below the least normal exponent."""
    magic, mantissa, bias = FORMAT[b.real]
    integer = "i32" if b.real == "float" else "i64"
    kind, ints = b.vec(lanes), f"<{lanes} x {integer}>"
    x = b.greater_of(b.fill(-bias, lanes), x, lanes)  # whose power has no exponent bits: 0
    shifted = b.arith("fadd", x, b.fill(magic, lanes), lanes)
    whole = b.arith("fsub", shifted, b.fill(magic, lanes), lanes)
    part = b.arith("fsub", x, whole, lanes)
    powers = EXP2_FLOAT if b.real == "float" else EXP2_DOUBLE
    y = b.fill(powers[-1], lanes)
    for power in powers[-2::-1]:
        y = b.fma(y, part, b.fill(power, lanes), lanes)
    bits = b.op(f"bitcast {kind} {shifted} to {ints}")
    bits = b.op(f"add {ints} {bits}, splat ({integer} {bias})")
    bits = b.op(f"shl {ints} {bits}, splat ({integer} {mantissa})")
    return b.arith("fmul", y, b.op(f"bitcast {ints} {bits} to {kind}"), lanes)


def log2(b: Builder, x: str) -> str:
    """log2(x) for 8 lanes, x >= 0 normal or 0 or NaN; minus infinity for 0."""
    mantissa = FORMAT[b.real][1]
    integer = "i32" if b.real == "float" else "i64"
    kind, ints = b.vec(LANES), f"<{LANES} x {integer}>"

    def whole(value):
        return f"splat ({integer} {value})"

    half = 0x3F3504F3 if b.real == "float" else 0x3FE6A09E667F3BCD  # sqrt(0.5)
    bits = b.op(f"bitcast {kind} {x} to {ints}")
    above = b.op(f"sub {ints} {bits}, {whole(half)}")
    exponent = b.op(f"ashr {ints} {above}, {whole(mantissa)}")
    scaled = b.op(f"shl {ints} {exponent}, {whole(mantissa)}")
    near = b.op(f"bitcast {ints} {b.op(f'sub {ints} {bits}, {scaled}')} to {kind}")
    one = b.fill(1.0, LANES)
    s = b.arith("fdiv", b.arith("fsub", near, one, LANES), b.arith("fadd", near, one, LANES), LANES)
    square = b.arith("fmul", s, s, LANES)
    terms = range(1, 11 if b.real == "float" else 25, 2)
    y = "zeroinitializer"
    for n in reversed(terms):
        y = b.fma(y, square, b.fill(2 / math.log(2) / n, LANES), LANES)
    number = b.op(f"sitofp {ints} {exponent} to {kind}")
    y = b.fma(y, s, number, LANES)
    y = b.arith("fadd", y, b.arith("fsub", x, x, LANES), LANES)  # keeps NaN
    empty = b.op(f"fcmp oeq {kind} {x}, zeroinitializer")
    return b.op(f"select <{LANES} x i1> {empty}, {kind} {b.fill(-math.inf, LANES)}, {kind} {y}")


# ------------------------------------------------------------------------------------------------
# logits


def logits(module: Module, rows: int, sizes: tuple[int, ...], together: int = 1) -> None:
    """`logits{rows}`: all taps of one key row for 8 columns of `rows` query rows.

    s[tap][lane] = bias + sum over channels of at[channel][lane] * keys[channel][tap (+ lane)]

    A tap's bias is one number at bias + tap; in a broadcast class the lanes have one each, from
    bias - tap on (a mirrored row). A register holds `together` vectors of 8 lanes.
    """
    outs = ", ".join(f"ptr at{r}, ptr s{r}, ptr bias{r}" for r in range(rows))
    b = module.function(
        f"logits{rows}",
        f"ptr class, ptr table, i64 at_step, i64 key_step, i64 channels, ptr keys, {outs}",
    )
    broadcast = b.table("%class", BROADCAST)
    chunks_at, count = (SINGLES_AT, SINGLES) if rows == 1 else (SHARED_AT, SHARED)
    chunks = b.at("%table", b.table("%class", chunks_at), "i32")
    first_case = b.mul(broadcast, len(sizes))

    def chunk(i):
        tap = b.table(chunks, b.mul(i, 2))
        case = b.add(b.table(chunks, b.add(b.mul(i, 2), 1)), first_case)

        def run(which):
            by_column, place = divmod(which, len(sizes))
            if not by_column:
                _chunk(b, registers_of(rows, sizes[place], together), False, tap)
                return
            for at in range(0, sizes[place], MOST_COLUMNS):
                size = min(MOST_COLUMNS, sizes[place] - at)
                _chunk(b, _by_rows(rows, range(size), together), True, b.add(tap, at))

        b.switch(case, 2 * len(sizes), [], run)

    b.loop(b.table("%class", count), chunk)
    module.finish(b)


def eight_logits(module: Module) -> None:
    """`eight_logits`: like `logits1` for 8 taps from the given ones on, without a class."""
    b = module.function(
        "eight_logits",
        "i64 at_step, i64 key_step, i64 channels, ptr keys, ptr at0, ptr s0, ptr bias0",
    )
    _chunk(b, _by_rows(1, range(LANES), 1), False, 0)
    module.finish(b)


def registers_of(rows: int, size: int, together: int) -> list[Register]:
    """The registers for `size` taps of so many query rows: two rows in one, or taps 8 apart."""
    paired = size // PAIR * PAIR if (rows, together) == (1, 2) else 0
    starts = [at + tap for at in range(0, paired, PAIR) for tap in range(LANES)]
    pairs = [[(0, tap), (0, tap + LANES)] for tap in starts]
    return pairs + _by_rows(rows, range(paired, size), together)


def _by_rows(rows: int, taps: range, together: int) -> list[Register]:
    """One register for each tap and `together` query rows, tap by tap."""
    sides = [range(r, min(r + together, rows)) for r in range(0, rows, together)]
    return [[(r, tap) for r in some] for tap in taps for some in sides]


def _chunk(b: Builder, registers: list[Register], broadcast: bool, first: Value) -> None:
    """The logits of these registers, their taps counted from `first`, over all channels."""
    rows = range(1 + max(r for held in registers for r, _ in held))
    biases = [b.at(f"%bias{r}", b.sub(0, first) if broadcast else first) for r in rows]

    def bias(r, tap):
        if broadcast:
            return b.vload(b.at(biases[r], -tap), LANES)
        return b.splat_load(b.at(biases[r], tap), LANES)

    def key(keys, held):
        (_, tap), lanes = held[0], len(held) * LANES
        place = b.at(keys, tap)
        if broadcast:
            return b.splat_load(place, lanes)
        if held[-1][1] != tap:  # columns of taps 8 apart are neighbors
            return b.vload(place, lanes)
        return _joined(b, [b.vload(place, LANES)] * len(held))

    def channel(_, values):
        keys, ats, sums = values[0], values[1 : 1 + len(rows)], values[1 + len(rows) :]
        found = [b.vload(at, LANES) for at in ats]
        queries = {
            some: _joined(b, [found[r] for r in some])
            for some in dict.fromkeys(tuple(r for r, _ in held) for held in registers)
        }
        sums = [
            b.fma(queries[tuple(r for r, _ in held)], key(keys, held), total, len(held) * LANES)
            for held, total in zip(registers, sums, strict=True)
        ]
        return [b.at(keys, "%key_step"), *(b.at(at, "%at_step") for at in ats), *sums]

    pointers = [("ptr", b.at("%keys", first)), *(("ptr", f"%at{r}") for r in rows)]
    start = [
        (b.vec(len(held) * LANES), _joined(b, [bias(*one) for one in held])) for held in registers
    ]
    sums = b.fold_some("%channels", [*pointers, *start], channel)[1 + len(rows) :]
    outs = [b.at(f"%s{r}", b.mul(first, LANES)) for r in rows]
    for held, total in zip(registers, sums, strict=True):
        for i, (r, tap) in enumerate(held):
            x = b.part(total, len(held) * LANES, i * LANES, LANES)
            b.vstore(x, b.at(outs[r], tap * LANES), LANES)


def _joined(b: Builder, vectors: list[str]) -> str:
    """One or two vectors of 8 lanes as one."""
    if len(vectors) == 1:
        return vectors[0]
    return b.shuffle(*vectors, LANES, range(2 * LANES))


def mask(module: Module) -> None:
    """`mask`: tell the logits of `row_count` rows whose lanes they belong to.

    Lanes that do not see a tap get `blank` there. What was computed for a tap belongs, in lanes
    that do not see it, to its partner: in a wrapped class the tap one period away, else the tap
    itself. Where it belongs, the bias of that tap is added. `masks` holds for each tap the address
    of a mask of lanes.
    """
    b = module.function(
        "mask",
        f"ptr class, ptr table, ptr masks, {module.real} blank, ptr s, ptr rows, i64 row_count, "
        "i64 span, ptr bias, i64 bias_step",
    )
    first, taps = b.table("%class", TAPS_AT), b.table("%class", TAPS)
    partners = b.at("%table", b.table("%class", PARTNERS_AT), "i32")
    blank = b.splat("%blank", LANES)

    def tap(number):
        own = b.add(first, number)
        distance = b.table(partners, own)
        partner = b.add(own, distance)
        seen = {place: _seen(b, b.at("%masks", place, "i32")) for place in (own, partner)}

        def for_rows(places):
            def row(i):
                s = b.at("%s", b.mul(b.mul(i, "%span"), LANES))
                entry = b.table("%rows", b.add(b.mul(i, ROW_WORDS), 1))
                bias = b.at("%bias", b.mul(entry, "%bias_step"))
                x = b.vload(b.at(s, b.mul(own, LANES)), LANES)
                for place in places:
                    y = b.arith("fadd", x, b.splat_load(b.at(bias, place), LANES), LANES)
                    y = b.choose_lanes(seen[place], y, blank, LANES)
                    b.vstore(y, b.at(s, b.mul(place, LANES)), LANES)

            b.loop("%row_count", row)

        is_alone = b.op(f"icmp eq i64 {distance}, 0")
        b.when(is_alone, lambda: for_rows([own]), lambda: for_rows([partner, own]))

    b.loop(taps, tap)
    module.finish(b)


def _seen(b: Builder, mask: str) -> str:
    """True in the lanes that see a tap, given where the address of its mask lies."""
    return b.lanes_seen(b.at("%table", b.table(mask, 0), "i32"), LANES)


def softmax(module: Module, together: int = 1) -> None:
    """`softmax`: s becomes exp2(s - max) in place; max and sum over `count` >= 1 vectors.

    A register holds `together` vectors of 8 lanes.
    """
    b = module.function("softmax", "ptr s, i64 count, ptr max, ptr sum")

    def over(first: float, ways: int, step, join):
        """Interleaved results of `ways` vectors, the remaining ones into the first; joined."""
        lanes = together * LANES
        whole = b.op(f"and i64 %count, {-ways}")

        def several(i, found):
            base = b.at("%s", b.mul(i, LANES))
            return [step(b.at(base, n * lanes), x, lanes) for n, x in enumerate(found)]

        start = [(b.vec(lanes), b.fill(first, lanes))] * (ways // together)
        wide = b.fold(0, whole, start, several, ways)
        total, *others = (b.part(x, lanes, n, LANES) for x in wide for n in range(0, lanes, LANES))
        (total,) = b.fold(
            whole,
            "%count",
            [(b.vec(LANES), total)],
            lambda i, values: [step(b.at("%s", b.mul(i, LANES)), values[0], LANES)],
        )
        for other in others:
            total = join(other, total)
        return total

    def greater(at, found, lanes):
        return b.greater_of(b.vload(at, lanes), found, lanes)

    def term(at, found, lanes):
        highs = _joined(b, [high] * (lanes // LANES))
        x = exp2(b, b.arith("fsub", b.vload(at, lanes), highs, lanes), lanes)
        b.vstore(x, at, lanes)
        return b.arith("fadd", found, x, lanes)

    high = over(LOWEST[b.real], 4, greater, lambda x, y: b.greater_of(x, y, LANES))
    # two vectors at a time: more would not leave registers for the polynomial's numbers
    total = over(0.0, 2, term, lambda x, y: b.arith("fadd", x, y, LANES))
    b.vstore(high, "%max", LANES)
    b.vstore(total, "%sum", LANES)
    module.finish(b)


def logit_gradients(module: Module) -> None:
    """`logit_gradients`: s becomes softmax, d (its gradient) becomes the logits' gradient.

    s = s / sum, d = s * (d - delta) with delta = sum of s * d over the keys, minus the lane's
    `grad_lse`, for `row_count` rows of `span` taps and `extra` more vectors. d is also added to the
    gradient of the bias, by `bias_kind`: 0 not at all; 1 to 8 sums for each tap, at 8 * tap; 2 to
    one sum for each distance, lane by lane, from -tap on. `bias_step` lies between two rows.
    """
    b = module.function(
        "logit_gradients",
        "ptr table, ptr s, ptr d, ptr rows, i64 row_count, i64 span, i64 extra, ptr sum, "
        "ptr grad_lse, ptr mask, ptr bias, i64 bias_step, i64 bias_kind",
    )
    full = b.op("alloca i32")  # first, or the stack would grow at run time
    b.do(f"store i32 {FULL_MASK_AT}, ptr {full}")
    vectors = b.mul("%row_count", "%span")
    scale = b.arith("fdiv", b.fill(1.0, LANES), b.vload("%sum", LANES), LANES)
    delta = b.arith("fmul", _dot(b, b.add(vectors, "%extra")), scale, LANES)
    delta = b.arith("fsub", delta, b.vload("%grad_lse", LANES), LANES)
    masked = b.op("icmp ne ptr %mask, null")

    def gradient(place):
        s_at, d_at = b.at("%s", b.mul(place, LANES)), b.at("%d", b.mul(place, LANES))
        weight = b.arith("fmul", b.vload(s_at, LANES), scale, LANES)
        change = b.arith("fsub", b.vload(d_at, LANES), delta, LANES)
        change = b.arith("fmul", weight, change, LANES)
        b.vstore(weight, s_at, LANES)
        b.vstore(change, d_at, LANES)
        return change

    def add_to(pointer, row, tap):
        change = gradient(b.add(b.mul(row, "%span"), tap))
        mask = b.choose(masked, b.at("%mask", tap, "i32"), full, "ptr")
        change = b.choose_lanes(_seen(b, mask), change, "zeroinitializer", LANES)
        b.vstore(b.arith("fadd", b.vload(pointer, LANES), change, LANES), pointer, LANES)

    def bias_row(row):
        entry = b.table("%rows", b.add(b.mul(row, ROW_WORDS), 1))
        return b.at("%bias", b.mul(entry, "%bias_step"))

    def by_tap():
        def one_row(row):
            place = bias_row(row)
            b.loop("%span", lambda tap: add_to(b.at(place, b.mul(tap, LANES)), row, tap))

        b.loop("%row_count", one_row)

    def by_lane():
        # rows inside taps: neighboring taps overlap in memory
        def one_tap(tap):
            back = b.op(f"sub i64 0, {tap}")
            b.loop("%row_count", lambda row: add_to(b.at(bias_row(row), back), row, tap))

        b.loop("%span", one_tap)

    def without():
        b.loop(vectors, lambda i: gradient(i) and None)

    b.switch("%bias_kind", 3, [], lambda case: (without, by_tap, by_lane)[case]())
    b.loop("%extra", lambda i: gradient(b.add(vectors, i)) and None)
    module.finish(b)


def _dot(b: Builder, count: str) -> str:
    """Sum of s * d over `count` vectors, lane by lane."""
    kind, ways = b.vec(LANES), 4
    whole = b.op(f"and i64 {count}, {-ways}")

    def term(i, part):
        s, d = (b.vload(b.at(f"%{name}", b.mul(i, LANES)), LANES) for name in "sd")
        return b.fma(s, d, part, LANES)

    parts = b.fold(
        0,
        whole,
        [(kind, "zeroinitializer")] * ways,
        lambda i, parts: [term(b.add(i, j), part) for j, part in enumerate(parts)],
        ways,
    )
    (rest,) = b.fold(whole, count, [(kind, parts[0])], lambda i, part: [term(i, part[0])])
    for part in parts[1:]:
        rest = b.arith("fadd", rest, part, LANES)
    return rest
