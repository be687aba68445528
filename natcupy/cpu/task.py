"""The entry function of a kernel: it takes tasks until none is left and does what the table says.

In: a `Spec`. Out: a module with one public function `run(ptr)`, whose argument is the block of
words of `spec.py`. A task is one item of the plan for one batch entry and one head, or all items of
a backward pass one after the other. Threads draw tasks from a common counter, so which thread does
what is left open, and what is computed is not.

This room holds what comes before the arithmetic: taking a task, walking through its steps, packing
rows. `block.py` goes on from here; `forward.py` and `backward.py` fill in the methods that differ.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from natcupy.cpu import pack
from natcupy.cpu.classes import LANES
from natcupy.cpu.emit import STORAGE, Value
from natcupy.cpu.plan import BLOCK_WORDS
from natcupy.cpu.rows import ENTRY_WORDS, PACK_WORDS, SIDE, STEP
from natcupy.cpu.scene import Scene
from natcupy.cpu.spec import BIAS_WIDENED
from natcupy.cpu.view import FOUND, NEXT, THIS


@dataclass(frozen=True)
class Side:
    """One of the query rows of a step, which one is known at run time."""

    number: str
    x: str  # indices on the two outer axes
    y: str
    rows: str  # address of the key rows that it sees
    row_count: str


class Task(Scene):
    """Writes `run` and the functions it calls."""

    def text(self) -> str:
        """The whole module as LLVM assembly."""
        self._functions()
        self.write_look()
        self._run()
        return self.module.text(8 * self.machine.register_bytes)

    def _functions(self) -> None:
        """Add the functions that `run` calls, beside those in common."""

    # -- what forward and backward fill in --------------------------------------------------------

    def _packed(self, what: str) -> tuple[bool, bool]:
        """Whether keys or values are packed across, and along."""
        raise NotImplementedError

    def _heads(self) -> None:
        """The query heads of a task."""
        raise NotImplementedError

    def _begin_head(self) -> None:
        """Before the steps of a query head."""

    def _end_head(self) -> None:
        """After the steps of a query head."""

    def _key_row_packed(self, slot: str) -> None:
        """After a key row went into the ring."""

    def _query_row_packed(self, side: Side) -> None:
        """After one of a step's query rows was packed."""

    def _end_step(self, count: str, retired: str) -> None:
        """After all blocks of a step, with the rows that no later step needs."""

    def _block(self, record: str) -> None:
        """Eight columns of a step's query rows."""
        raise NotImplementedError

    # -- tasks ------------------------------------------------------------------------------------

    def _run(self) -> None:
        self.begin("run", public=True)
        b = self.b
        self.thread = b.op(f"atomicrmw add ptr {self.pointer('threads')}, i64 1 monotonic")
        place = b.mul(self.thread, self.word("thread_bytes"))
        self.mine = b.at(self.pointer("scratch"), place, "i8")
        self.views = self.buffer("views")
        self.zero("zeros", self.word("zeros"))
        tasks, counter = self.word("tasks"), self.pointer("next")

        def draw():
            return b.op(f"atomicrmw add ptr {counter}, i64 1 monotonic")

        b.repeat_while(draw(), lambda task: b.less(task, tasks), self._task, draw)
        self.module.finish(b)

    def _task(self, task: str) -> None:
        b, items = self.b, self.word("task_items")
        first = b.mul(task, items)
        following = b.add(task, self.word("thread_count"))  # if threads go on taking turns
        has_following = b.less(following, self.word("tasks"))
        following = b.mul(following, items)

        def item(i):
            self.number, behind = b.add(first, i), b.add(i, 1)
            self.look(THIS, self.number)
            is_inside = b.less(behind, items)
            is_one = b.op(f"or i1 {is_inside}, {has_following}")
            next_one = b.choose(is_inside, b.add(first, behind), following)
            b.when(is_one, lambda: self.look(NEXT, next_one), self._look_nowhere)
            self.record = self.found("record", kind="ptr")
            self._heads()

        b.loop(items, item)

    def _look_nowhere(self) -> None:
        b = self.b
        b.do(f"store ptr null, ptr {b.at(self.view(NEXT), FOUND.index('first_step'), 'i64')}")

    # -- packing ----------------------------------------------------------------------------------

    def begin_key_head(self) -> None:
        """Pack the additional keys and values of a key head."""
        b = self.b
        for what in ("key", "value") if self.spec.common.extra else ():
            batch, token, head = (
                self.word(f"extra_{what}_{s}") for s in ("batch", "token", "head")
            )
            offset = b.add(b.mul(self.found("batch"), batch), b.mul(self.found("kv_head"), head))
            source = b.at(self.pointer(f"extra_{what}s"), offset, self.kind)
            args = [("ptr", source), ("i64", token), ("i64", self.word("extra"))]
            self.pack(what, f"extra_{what}s", args, self.word("extra_pitch"))

    def pack(self, what: str, buffer: str, source: list, width, slot: Value = 0, lead=0) -> None:
        """Copy a row of keys or values into its packed buffers; `slot` picks a row of a ring."""
        b, channels = self.b, self.channels[what]
        across, along = self._packed(what)
        if across:
            to = b.add(b.mul(slot, b.mul(width, channels)), lead)
            to = b.at(self.buffer(f"{buffer}_across"), to)
            one = (self.real, b.number(1.0))
            b.call(self.common.across[channels], ("ptr", to), ("i64", width), *source, one)
        if along:
            to = b.mul(slot, b.mul(self.word("key_columns"), self.pitches[what]))
            to = b.at(self.buffer(f"{buffer}_along"), to)
            b.call(self.common.along[channels], ("ptr", to), ("i64", self.pitches[what]), *source)

    def zero(self, buffer: str, count: Value) -> None:
        """Fill the start of a buffer with zeros, up to a multiple of 8."""
        b, first = self.b, self.buffer(buffer)
        b.loop(count, lambda i: b.vstore("zeroinitializer", b.at(first, i), LANES), LANES)

    def zero_columns(self, buffer: str, count: Value, start: Value = 0) -> None:
        """`zero` for a multiple of the register width."""
        b, width = self.b, self.machine.width(self.real)
        first = b.at(self.buffer(buffer), start)
        b.loop(count, lambda i: b.vstore("zeroinitializer", b.at(first, i), width), width)

    # -- query heads ------------------------------------------------------------------------------

    def query_head(self) -> None:
        """All steps of the item for one query head, that of the view."""
        b = self.b
        b.when(self.is_set("has_rpb"), self._read_bias)
        self._begin_head()
        start = ("ptr", self.found("first_step", kind="ptr"))
        b.fold(0, self.item("steps"), [start], lambda i, at: [self._step(i, at[0])])
        self._end_head()

    def _read_bias(self) -> None:
        """`_spread_bias`, of a table in either type."""
        if self.spec.common.storage == self.real:
            self._spread_bias(self.real)
            return
        is_half = self.b.op(f"icmp eq i64 {self.word('has_rpb')}, {BIAS_WIDENED}")
        half = self.spec.common.storage
        self.b.when(is_half, lambda: self._spread_bias(half), lambda: self._spread_bias(self.real))

    def _spread_bias(self, storage: str) -> None:
        """This head's biases, in units of log 2, forwards and mirrored."""
        b, kind = self.b, STORAGE[storage][0]
        length, rows = self.word("bias_length"), self.word("bias_rows")
        source = b.at(self.pointer("rpb"), b.mul(self.found("head"), b.mul(rows, length)), kind)
        bias = b.at(self.buffer("bias"), self.word("bias_lead"))
        mirror = b.at(self.buffer("mirror"), self.word("mirror_lead"))

        def some(row, i, lanes):
            place = b.at(source, b.add(b.mul(row, length), i), kind)
            x = pack.read(b, storage, place, lanes)
            x = b.arith("fmul", x, b.fill(1 / math.log(2), lanes), lanes)
            b.vstore(x, b.at(bias, b.add(b.mul(row, self.word("bias_pitch")), i)), lanes)
            x = b.shuffle(x, "poison", lanes, range(lanes)[::-1])
            back = b.sub(b.sub(length, lanes), i)
            b.vstore(x, b.at(mirror, b.add(b.mul(row, self.word("mirror_pitch")), back)), lanes)

        def by_vectors(row):
            last = b.sub(length, LANES)
            b.loop(length, lambda i: some(row, b.least(i, last), LANES), LANES)

        def all_rows():
            b.loop(rows, by_vectors)

        def one_by_one():
            b.loop(rows, lambda row: b.loop(length, lambda i: some(row, i, 1)))

        if storage == self.real:
            b.when(b.less(length, LANES), one_by_one, all_rows)
        else:  # no shorter rows in a half type
            all_rows()

    # -- steps ------------------------------------------------------------------------------------

    def _step(self, number: str, at: str) -> str:
        """Carry out the step at this address; the address of the next one."""
        b = self.b
        step = {name: b.table(at, i) for i, name in enumerate(STEP)}
        self.side_count = step["sides"]
        self.side_records = b.at(at, len(STEP), "i32")
        packs = b.at(self.side_records, b.mul(step["sides"], len(SIDE)), "i32")
        entries = b.at(packs, b.mul(step["packs"], PACK_WORDS), "i32")
        retired = b.at(entries, b.mul(step["entries"], ENTRY_WORDS), "i32")
        self.at, self.entries, self.entry_count = at, entries, step["entries"]
        b.loop(
            step["packs"], lambda i: self._pack_key_row(b.at(packs, b.mul(i, PACK_WORDS), "i32"))
        )
        self.for_sides(self._pack_query_row)
        self.following = b.at(at, step["size"], "i32")
        self.left = b.sub(b.sub(self.item("steps"), 1), number)
        blocks = self.entry(self.item("blocks_at"))

        def block(i):
            record = b.at(blocks, b.mul(i, BLOCK_WORDS), "i32")
            self.column, self.how = b.table(record, 1), b.table(record, 2)
            self._block(record)

        b.loop(self.item("blocks"), block)
        self._end_step(step["retired"], retired)
        return self.following

    def for_sides(self, body: Callable[[Side], None]) -> None:
        """`body` for the query rows that the step has."""
        b = self.b

        def one(number):
            record = b.at(self.side_records, b.mul(number, len(SIDE)), "i32")
            x, y, rows_at, row_count = (b.table(record, i) for i in range(len(SIDE)))
            body(Side(number, x, y, b.at(self.at, rows_at, "i32"), row_count))

        b.loop(self.side_count, one)

    def _pack_key_row(self, record: str) -> None:
        b = self.b
        slot, x, y = (b.table(record, i) for i in range(PACK_WORDS))
        for what in ("key", "value"):
            source = self.element(what, x, y, 0)
            args = [("ptr", source), ("i64", self.column_step(what))]
            args.append(("i64", self.item("key_columns")))
            self.pack(what, f"{what}s", args, self.word("key_pitch"), slot, self.word("key_lead"))
            if self._packed(what)[0]:
                self._wrap_ends(what, slot)
        self._key_row_packed(slot)

    def _wrap_ends(self, what: str, slot: str) -> None:
        """What wrapped classes read before and behind a packed row."""
        b, channels, width = self.b, self.channels[what], self.word("key_pitch")
        first = b.add(b.mul(slot, b.mul(width, channels)), self.word("key_lead"))
        args = [("ptr", b.at(self.buffer(f"{what}s_across"), first)), ("i64", width)]
        args += [("i64", channels), ("i64", self.item("key_columns"))]
        args += [("i64", b.add(self.bias_middle(), 1)), ("i64", self.word("end_before"))]
        b.call("wrap_ends", *args, ("i64", self.word("end_behind")))

    def _pack_query_row(self, side: Side) -> None:
        b = self.b
        factor = b.op(f"fmul double {self.scale()}, {b.double(1 / math.log(2))}")
        args = self.query_row("query", side)
        channels, width = self.channels["key"], self.word("query_pitch")
        to = self.side_buffer("query_across", side.number, b.mul(width, channels))
        last = (self.real, self.as_real(factor))
        b.call(self.common.across[channels], ("ptr", to), ("i64", width), *args, last)
        self._query_row_packed(side)

    def query_row(self, tensor: str, side: Side) -> list:
        """The arguments that name a query row of a tensor: address, step, columns."""
        source = self.element(tensor, side.x, side.y, 0)
        step = self.column_step(tensor)
        return [("ptr", source), ("i64", step), ("i64", self.item("query_columns"))]
