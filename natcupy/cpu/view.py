"""Views: where the rows of a task lie; and asking memory for rows before they are needed.

In: a `Module`. Out: functions that fill in a view, and that ask for a step's rows. A view is words
of 64 bits in scratch memory: the first step of a task's item, its record in the plan's table, the
batch entry, the heads, and a *place* for each tensor.
"""

from __future__ import annotations

from natcupy.cpu.classes import LANES
from natcupy.cpu.emit import Module
from natcupy.cpu.plan import ITEM
from natcupy.cpu.rows import PACK_WORDS, SIDE, STEP
from natcupy.cpu.spec import STRIDES, TENSORS, WORDS

LINE = 64  # bytes that come at once
FOUND = ("first_step", "record", "batch", "head", "kv_head")
# The address of the item's first column in row (0, 0); elements to the next row or column; bytes of
# an element, and of a column.
PLACE = ("address", "axis0", "axis1", "axis2", "element", "column")
VIEW = len(FOUND) + 7 * len(PLACE)  # with all tensors of a backward pass
THIS, NEXT = range(2)  # a thread's two views: of its task, and of the one it may draw next


def place_at(number: int) -> int:
    """Where the place of a tensor begins in a view."""
    return len(FOUND) + number * len(PLACE)


def locate(module: Module) -> None:
    """`locate`: a tensor's place for a batch entry, head and item.

    `tensor` is its number in `TENSORS`, `first` the item's first column; a tensor without an
    address has columns of 0 bytes.
    """
    b = module.function(
        "locate",
        "ptr words, ptr place, ptr record, i64 tensor, i64 batch, i64 head, i64 first, "
        "i64 element, i64 column",
    )

    def word(number):
        return b.load("i64", b.at("%words", number, "i64"), 8)

    strides_at = b.add(b.mul("%tensor", len(STRIDES)), WORDS.index(f"{TENSORS[0]}_{STRIDES[0]}"))
    batch, head, *axes = (word(b.add(strides_at, i)) for i in range(len(STRIDES)))
    steps = [b.mul(word(WORDS.index(f"dilation{i}")), axis) for i, axis in enumerate(axes)]
    offsets = [b.mul("%batch", batch), b.mul("%head", head), b.mul("%first", steps[2])]
    for i, axis in enumerate(axes):
        offsets.append(b.mul(b.table("%record", ITEM.index(f"group{i}")), axis))
    start = word("%tensor")
    column = b.choose(b.op(f"icmp eq i64 {start}, 0"), 0, "%column")
    address = b.add(start, b.mul(b.sum(*offsets), "%element"))
    for i, value in enumerate((address, *steps, "%element", column)):
        b.do(f"store i64 {value}, ptr {b.at('%place', i, 'i64')}, align 8")
    module.finish(b)


def ask(module: Module) -> None:
    """`ask`: 8 columns from `column` on of every `stride`th row of a step, from `number` on.

    Rows are numbered: keys and values of each key row that is new to the step, then of `queries`
    tensors each of its query rows; the view holds the tensors in this order. What is asked for is
    not read, so any address will do.
    """
    b = module.function(
        "ask", "ptr view, ptr step, i64 queries, i64 number, i64 stride, i64 column"
    )
    sides, packs = (b.table("%step", STEP.index(name)) for name in ("sides", "packs"))
    side_records = b.at("%step", len(STEP), "i32")
    pack_records = b.at(side_records, b.mul(sides, len(SIDE)), "i32")
    key_rows = b.mul(packs, 2)

    def row(number, _):
        is_key = b.less(number, key_rows)
        among = b.choose(is_key, number, b.sub(number, key_rows))
        tensors = b.choose(is_key, 2, "%queries")
        record = b.op(f"udiv i64 {among}, {tensors}")
        tensor = b.add(b.sub(among, b.mul(record, tensors)), b.choose(is_key, 0, 2))
        key = b.at(pack_records, b.add(b.mul(record, PACK_WORDS), 1), "i32")  # behind the slot
        query = b.at(side_records, b.mul(record, len(SIDE)), "i32")
        indices = b.choose(is_key, key, query, "ptr")
        place = b.at("%view", b.add(b.mul(tensor, len(PLACE)), place_at(0)), "i64")
        words = (b.load("i64", b.at(place, i, "i64"), 8) for i in range(len(PLACE)))
        address, *steps, element, size = words
        at = b.table(indices, 0), b.table(indices, 1), "%column"
        offset = b.sum(*(b.mul(i, step) for i, step in zip(at, steps, strict=True)))
        address, step = b.add(address, b.mul(offset, element)), b.mul(steps[2], element)

        lanes = [b.add(address, b.mul(i, step)) for i in range(LANES)]
        lanes = [b.op(f"inttoptr i64 {lane} to ptr") for lane in lanes]

        def lines(byte):
            for lane in lanes:
                b.prefetch(b.at(lane, byte, "i8"), nearness=2)

        b.loop(size, lines, LINE)
        return []

    b.fold("%number", b.add(key_rows, b.mul(sides, "%queries")), [], row, "%stride")
    module.finish(b)
