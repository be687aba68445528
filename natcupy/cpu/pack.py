"""Between tensors and scratch memory: every read of an input and most writes of a result.

In: a `Module` and compile-time numbers. Out: functions added to it. A row of a tensor has `count`
columns, `step` elements apart; a column has exactly `channels` contiguous elements, and nothing
outside of them is touched. Inside, half types become floats once, here.
"""

from __future__ import annotations

from dataclasses import dataclass

from natcupy.cpu.classes import LANES
from natcupy.cpu.emit import STORAGE, Builder, Machine, Module, Value, pieces
from natcupy.cpu.view import LINE

AHEAD = 16  # columns between the one that is worked on and the one that is prefetched


def read(b: Builder, storage: str, pointer: str, lanes: int) -> str:
    """A vector of a tensor's elements in the compute type."""
    kind, size = STORAGE[storage]
    raw = b.load(f"<{lanes} x {kind}>", pointer, size)
    if storage == "half":
        return b.op(f"fpext <{lanes} x half> {raw} to {b.vec(lanes)}")
    if storage == "bfloat":
        wide = b.op(f"zext <{lanes} x i16> {raw} to <{lanes} x i32>")
        wide = b.op(f"shl <{lanes} x i32> {wide}, splat (i32 16)")
        return b.op(f"bitcast <{lanes} x i32> {wide} to {b.vec(lanes)}")
    return raw


def write(b: Builder, storage: str, vector: str, pointer: str, lanes: int) -> None:
    """A vector of the compute type into a tensor, rounded to nearest even."""
    kind, size = STORAGE[storage]
    if storage == "half":
        vector = b.op(f"fptrunc {b.vec(lanes)} {vector} to <{lanes} x half>")
    if storage == "bfloat":
        ints = f"<{lanes} x i32>"
        bits = b.op(f"bitcast {b.vec(lanes)} {vector} to {ints}")
        odd = b.op(f"and {ints} {b.op(f'lshr {ints} {bits}, splat (i32 16)')}, splat (i32 1)")
        near = b.op(f"add {ints} {b.op(f'add {ints} {bits}, splat (i32 32767)')}, {odd}")
        nan = b.op(f"fcmp uno {b.vec(lanes)} {vector}, {vector}")
        near = b.op(f"select <{lanes} x i1> {nan}, {ints} splat (i32 2143289344), {ints} {near}")
        near = b.op(f"lshr {ints} {near}, splat (i32 16)")
        vector = b.op(f"trunc {ints} {near} to <{lanes} x i16>")
    b.do(f"store <{lanes} x {kind}> {vector}, ptr {pointer}, align {size}")


@dataclass(frozen=True)
class Store:
    """Writes the vectors of one pass over `channels` channels of a row of a tensor, exactly."""

    storage: str
    channels: int
    width: int

    @property
    def name(self) -> str:
        """For the name of the function that contains it."""
        return f"{self.storage}{self.channels}"

    @property
    def kind(self) -> str:
        """The type of the tensor's elements."""
        return STORAGE[self.storage][0]

    def __call__(self, b: Builder, out: str, number: int, vector: str) -> None:
        """Vector `number` at the row `out`."""
        start = number * self.width
        for at, count in pieces(min(self.width, self.channels - start), self.width):
            piece = b.part(vector, self.width, at, count)
            write(b, self.storage, piece, b.at(out, start + at, self.kind), count)


def pack_across(module: Module, storage: str, channels: int) -> str:
    """A row with channels across: to[channel * pitch + column] = factor * from[column][channel].

    Columns are filled up to a multiple of 8 with copies of the last one.
    """
    name = f"across_{storage}_{channels}"
    b = module.function(
        name, "ptr to, i64 pitch, ptr from, i64 step, i64 count, " + module.real + " factor"
    )
    kind = STORAGE[storage][0]
    factor = b.splat("%factor", LANES)
    last = b.sub("%count", 1)

    def columns(first):
        sources = [
            b.at("%from", b.mul(b.least(b.add(first, lane), last), "%step"), kind)
            for lane in range(LANES)
        ]
        target = b.at("%to", first)
        for lane in range(LANES):
            _ask_ahead(b, storage, channels, "%from", b.add(first, lane))

        def channels_from(channel, count):
            places = [b.at(source, channel, kind) for source in sources]
            if count == LANES:
                rows = _across_from_halves(b, storage, places)
            else:
                rows = _transpose(b, [_read_below_8(b, storage, p, count) for p in places])
            place = b.at(target, b.mul(channel, "%pitch"))
            for i, row in enumerate(rows[:count]):
                row = b.arith("fmul", row, factor, LANES)
                b.vstore(row, b.at(place, b.mul("%pitch", i)), LANES)

        whole = channels // LANES * LANES
        if whole:
            b.loop(whole, lambda channel: channels_from(channel, LANES), LANES)
        if channels > whole:
            channels_from(whole, channels - whole)

    b.loop("%count", columns, LANES)
    module.finish(b)
    return name


def _ask_ahead(
    b: Builder, storage: str, channels: int, row: str, column: Value, step: str = "%step"
) -> None:
    """Ask for the column that lies `AHEAD` behind one of a row."""
    kind, size = STORAGE[storage]
    place = b.at(row, b.mul(b.add(column, AHEAD), step), kind)
    for byte in range(0, channels * size, LINE):
        b.prefetch(b.at(place, byte, "i8"), nearness=3)


def wrap_ends(module: Module) -> None:
    """`wrap_ends`: go on before a packed row with what lies `period` further, and behind it back.

    `before` and `behind` are the columns to fill, multiples of 8. Those more than a period away
    from the row hold nothing of use.
    """
    b = module.function(
        "wrap_ends",
        "ptr row, i64 pitch, i64 channels, i64 count, i64 period, i64 before, i64 behind",
    )

    def channel(i):
        first = b.at("%row", b.mul(i, "%pitch"))

        def copy(start, distance, column):
            to = b.at(first, b.add(start, column))
            b.vstore(b.vload(b.at(to, distance), LANES), to, LANES)

        def before(column):
            copy(b.sub(0, "%before"), "%period", column)

        def behind(column):
            copy("%count", b.sub(0, "%period"), column)

        b.loop("%before", before, LANES)
        b.loop("%behind", behind, LANES)

    b.loop("%channels", channel)
    module.finish(b)


def _read_below_8(b: Builder, storage: str, pointer: str, count: int) -> str:
    """The first `count` elements, the other lanes zero."""
    row = "zeroinitializer"
    for at, size in pieces(count, LANES):
        piece = read(b, storage, b.at(pointer, at, STORAGE[storage][0]), size)
        wide = b.shuffle(piece, "poison", size, [i if i < size else 0 for i in range(LANES)])
        picks = [LANES + i - at if at <= i < at + size else i for i in range(LANES)]
        row = b.shuffle(row, wide, LANES, picks)
    return row


def _across_from_halves(b: Builder, storage: str, places: list[str]) -> list[str]:
    """8 channels of 8 columns, transposed: what is read are halves of 4 channels, joined in pairs.

    So no element has to cross the middle of a register later: slower than to load it there.
    """
    kind, half, channels = STORAGE[storage][0], LANES // 2, []
    for first in (0, half):
        parts = [read(b, storage, b.at(place, first, kind), half) for place in places]
        whole = range(LANES)
        rows = [b.shuffle(parts[i], parts[i + half], half, whole) for i in range(half)]
        channels += _transpose(b, rows)
    return channels


def _transpose(b: Builder, rows: list[str]) -> list[str]:
    """8 vectors of 8 lanes transposed, or the halves of 4 each, by rounds of interleaving."""
    size = len(rows)
    for apart in (1, 2, 4)[: size.bit_length() - 1]:
        mixed = [""] * size
        for i in range(size):
            if i & apart:
                continue
            low = [j if not j & apart else LANES + j - apart for j in range(LANES)]
            high = [j + apart if not j & apart else LANES + j for j in range(LANES)]
            mixed[i] = b.shuffle(rows[i], rows[i + apart], LANES, low)
            mixed[i + apart] = b.shuffle(rows[i], rows[i + apart], LANES, high)
        rows = mixed
    return rows


def pack_along(module: Module, machine: Machine, storage: str, channels: int) -> str:
    """A row with channels along: to[column * pitch + channel] = from[column][channel]."""
    name = f"along_{storage}_{channels}"
    b = module.function(name, "ptr to, i64 pitch, ptr from, i64 step, i64 count")
    kind, width = STORAGE[storage][0], machine.width(module.real)

    def column(i):
        source = b.at("%from", b.mul(i, "%step"), kind)
        target = b.at("%to", b.mul(i, "%pitch"))
        _ask_ahead(b, storage, channels, "%from", i)
        for at, count in pieces(channels, width):
            b.vstore(read(b, storage, b.at(source, at, kind), count), b.at(target, at), count)

    b.loop("%count", column)
    module.finish(b)
    return name


def unpack(module: Module, machine: Machine, storage: str, channels: int, adds: bool) -> str:
    """to[column][channel] = factor * from[column * pitch + channel].

    With `adds` there is a row of sums in the compute type, which may be the target itself: where
    `add` is 1 they are added.
    """
    name = f"unpack_{storage}_{channels}"
    params = f"ptr to, i64 step, ptr from, i64 pitch, i64 count, {module.real} factor"
    if adds:
        params += ", ptr sums, i64 sums_step, i64 add"
    b = module.function(name, params)
    kind, width = STORAGE[storage][0], machine.width(module.real)
    factors = {n: b.splat("%factor", n) for _, n in pieces(channels, width)}

    def column(i, adding):
        source, target = b.at("%from", b.mul(i, "%pitch")), b.at("%to", b.mul(i, "%step"), kind)
        _ask_ahead(b, storage, channels, "%to", i)
        if adding:
            sums = b.at("%sums", b.mul(i, "%sums_step"))
            if storage != module.real:
                _ask_ahead(b, module.real, channels, "%sums", i, "%sums_step")
        for at, count in pieces(channels, width):
            value = b.vload(b.at(source, at), count)
            if adding:
                value = b.fma(value, factors[count], b.vload(b.at(sums, at), count), count)
            else:
                value = b.arith("fmul", value, factors[count], count)
            write(b, storage, value, b.at(target, at, kind), count)

    def all_columns(adding):
        b.loop("%count", lambda i: column(i, adding))

    if adds:
        fresh = b.op("icmp eq i64 %add, 0")
        b.when(fresh, lambda: all_columns(False), lambda: all_columns(True))
    else:
        all_columns(False)
    module.finish(b)
    return name
