"""The entry function of a kernel: it takes tasks until none is left and does what the table says.

In: a `Spec`. Out: a module with one public function `run(ptr)`, whose argument is the block of
words of `spec.py`. A task is one item of the plan for one batch entry and one head. Threads draw
tasks from a common counter, so which thread does what is left open, and what is computed is not.

This room holds what comes before the arithmetic: taking a task, finding its tensors, packing rows.
`block.py` goes on from here; `forward.py` and `backward.py` fill in the methods that differ.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from natcupy.cpu.common import common_functions
from natcupy.cpu.emit import REAL_BYTES, Machine, Module, Value
from natcupy.cpu.plan import ITEM
from natcupy.cpu.rows import ENTRY_WORDS, PACK_WORDS, SIDE, STEP
from natcupy.cpu.spec import STRIDES, WORDS, Spec


@dataclass(frozen=True)
class Side:
    """One of the query rows of a step, which one is known at run time."""

    number: str
    x: str  # indices on the two outer axes
    y: str
    rows: str  # address of the key rows that it sees
    row_count: str


class Task:
    """Writes `run` and the functions it calls."""

    query_tensors: tuple[str, ...]  # located for every query head
    #: tensors of which every query row is read or written, and whose channels they have
    query_rows: tuple[tuple[str, str], ...]
    wide: frozenset[str] = frozenset()  # tensors in the compute type

    def __init__(self, spec: Spec, machine: Machine):
        self.spec, self.machine, self.common = spec, machine, common_functions(spec.common, machine)
        self.real = spec.common.real
        self.module = Module(self.real, uses=self.common.module)
        self.kind, self.real_bytes = self.common.kind, REAL_BYTES[self.real]
        self.channels, self.pitches = self.common.channels, self.common.pitches

    def text(self) -> str:
        """The whole module as LLVM assembly."""
        self._functions()
        self._run()
        return self.module.text(8 * self.machine.register_bytes)

    def _functions(self) -> None:
        """Add the functions that `run` calls, beside those in common."""

    # -- what forward and backward fill in --------------------------------------------------------

    def _packed(self, what: str) -> tuple[bool, bool]:
        """Whether keys or values are packed across, and along."""
        raise NotImplementedError

    def _heads(self, head: str, group: str) -> None:
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

    # -- words and addresses ----------------------------------------------------------------------

    def word(self, name: str) -> str:
        """An integer of the argument block."""
        return self.b.load("i64", self.b.at("%words", WORDS.index(name), "i64"), 8)

    def pointer(self, name: str) -> str:
        """An address of the argument block."""
        return self.b.load("ptr", self.b.at("%words", WORDS.index(name), "i64"), 8)

    def is_set(self, name: str) -> str:
        """True if a word is not 0."""
        return self.b.op(f"icmp ne i64 {self.word(name)}, 0")

    def scale(self) -> str:
        """The factor of the logits, a double."""
        return self.b.load("double", self.b.at("%words", WORDS.index("scale"), "i64"), 8)

    def as_real(self, double: str) -> str:
        """A double in the compute type."""
        if self.real == "double":
            return double
        return self.b.op(f"fptrunc double {double} to float")

    def buffer(self, name: str) -> str:
        """A buffer of this thread."""
        return self.b.at(self.mine, self.word(f"at_{name}"))

    def side_buffer(self, name: str, side: str, size: Value) -> str:
        """The part of a buffer that belongs to one of a step's query rows."""
        return self.b.at(self.buffer(name), self.b.mul(side, size))

    def entry(self, address: Value) -> str:
        """Address of a place in the table."""
        return self.b.at(self.table, address, "i32")

    def element(self, tensor: str, *indices: Value) -> str:
        """Address in a tensor from indices along axis 0, 1, 2 of this dilation group."""
        base, steps = self.tensors[tensor]
        offsets = [self.b.mul(i, step) for i, step in zip(indices, steps, strict=True)]
        kind = self.real if tensor in self.wide else self.kind
        return self.b.at(base, self.b.sum(*offsets), kind)

    def bias_middle(self) -> str:
        """Index of the bias of a query's own column: kernel_size - 1."""
        return self.b.op(f"ashr i64 {self.b.sub(self.word('bias_length'), 1)}, 1")

    def lse_row(self, pointer: str, x: Value, y: Value) -> tuple[str, Value]:
        """Address of the item's first query of a row in a tensor of log-sum-exps, and its step."""
        b = self.b
        offsets = [b.mul(self.batch, self.word("lse_batch")), self.head]
        for axis, place in enumerate((x, y, self.item["query"])):
            place = b.mul(place, self.word(f"dilation{axis}"))
            place = b.add(place, self.item[f"group{axis}"])
            offsets.append(b.mul(place, self.word(f"lse_axis{axis}")))
        step = b.mul(self.word("dilation2"), self.word("lse_axis2"))
        return b.at(pointer, b.sum(*offsets)), step

    # -- tasks ------------------------------------------------------------------------------------

    def _run(self) -> None:
        b = self.b = self.module.function("run", "ptr words", public=True)
        self.table = self.pointer("table")
        thread = b.op(f"atomicrmw add ptr {self.pointer('threads')}, i64 1 monotonic")
        place = b.mul(thread, self.word("thread_bytes"))
        self.mine = b.at(self.pointer("scratch"), place, "i8")
        self.zero("zeros", self.word("zeros"))
        tasks, counter = self.word("tasks"), self.pointer("next")

        def draw():
            return b.op(f"atomicrmw add ptr {counter}, i64 1 monotonic")

        b.repeat_while(draw(), lambda task: b.less(task, tasks), self._task, draw)
        self.module.finish(b)

    def _task(self, task: str) -> None:
        b = self.b
        items = self.word("phase_items")
        heads = self.word("kv_heads" if self.spec.backward else "heads")
        # heads first: they share the pages of their tokens
        head, rest = b.op(f"urem i64 {task}, {heads}"), b.op(f"udiv i64 {task}, {heads}")
        item, self.batch = b.op(f"urem i64 {rest}, {items}"), b.op(f"udiv i64 {rest}, {items}")
        number = b.add(item, self.word("first_item"))
        record = self.entry(b.add(b.table(self.table, 1), b.mul(number, len(ITEM))))
        self.item = {name: b.table(record, i) for i, name in enumerate(ITEM)}
        group = b.op(f"udiv i64 {self.word('heads')}, {self.word('kv_heads')}")
        self.tensors: dict[str, tuple[str, list]] = {}
        self._heads(head, group)

    def locate(self, tensor: str, head: str) -> None:
        """Find a tensor's part of this batch entry, head and dilation group, and its strides."""
        b = self.b
        stride = {s: self.word(f"{tensor}_{s}") for s in STRIDES}
        offsets = [b.mul(self.batch, stride["batch"]), b.mul(head, stride["head"])]
        steps = []
        for axis in range(3):
            offsets.append(b.mul(self.item[f"group{axis}"], stride[f"axis{axis}"]))
            steps.append(b.mul(self.word(f"dilation{axis}"), stride[f"axis{axis}"]))
        kind = self.real if tensor in self.wide else self.kind
        self.tensors[tensor] = b.at(self.pointer(tensor), b.sum(*offsets), kind), steps

    def begin_key_head(self) -> None:
        """Locate keys and values of a key head; pack the additional ones."""
        b = self.b
        for what in ("key", "value"):
            self.locate(what, self.kv_head)
            if not self.spec.common.extra:
                continue
            batch, token, head = (
                self.word(f"extra_{what}_{s}") for s in ("batch", "token", "head")
            )
            offset = b.add(b.mul(self.batch, batch), b.mul(self.kv_head, head))
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

    def zero(self, buffer: str, count: Value, start: Value = 0) -> None:
        """Fill part of a buffer with zeros."""
        b, zero = self.b, self.b.number(0.0)
        first = b.at(self.buffer(buffer), start)
        b.loop(
            count,
            lambda i: b.do(f"store {b.real} {zero}, ptr {b.at(first, i)}, align {self.real_bytes}"),
        )

    def zero_columns(self, buffer: str, count: Value, start: Value = 0) -> None:
        """`zero` for a multiple of the register width."""
        b, width = self.b, self.machine.width(self.real)
        first = b.at(self.buffer(buffer), start)
        b.loop(count, lambda i: b.vstore("zeroinitializer", b.at(first, i), width), width)

    # -- query heads ------------------------------------------------------------------------------

    def query_head(self) -> None:
        """All steps of the item for one query head, `self.head`."""
        b = self.b
        for tensor in self.query_tensors:
            self.locate(tensor, self.head)
        b.when(self.is_set("has_rpb"), self._spread_bias)
        self._begin_head()
        start = self.entry(self.item["steps_at"])
        b.fold(0, self.item["steps"], [("ptr", start)], lambda i, at: [self._step(i, at[0])])
        self._end_head()

    def _spread_bias(self) -> None:
        """This head's biases, in units of log 2, forwards and mirrored."""
        b = self.b
        length, rows = self.word("bias_length"), self.word("bias_rows")
        source = b.at(self.pointer("rpb"), b.mul(self.head, b.mul(rows, length)))
        bias = b.at(self.buffer("bias"), self.word("bias_lead"))
        mirror = b.at(self.buffer("mirror"), self.word("mirror_lead"))

        def one(row, i):
            x = b.load(b.real, b.at(source, b.add(b.mul(row, length), i)), self.real_bytes)
            x = b.op(f"fmul {b.real} {x}, {b.number(1 / math.log(2))}")
            back = b.sub(b.sub(length, 1), i)
            for place in (
                b.at(bias, b.add(b.mul(row, self.word("bias_pitch")), i)),
                b.at(mirror, b.add(b.mul(row, self.word("mirror_pitch")), back)),
            ):
                b.do(f"store {b.real} {x}, ptr {place}, align {self.real_bytes}")

        b.loop(rows, lambda row: b.loop(length, lambda i: one(row, i)))

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
        following = b.at(at, step["size"], "i32")
        self.following = following
        self.has_following = b.less(b.add(number, 1), self.item["steps"])
        blocks = self.entry(self.item["blocks_at"])

        def block(i):
            record = b.at(blocks, b.mul(i, 2), "i32")
            self.column = b.table(record, 1)
            self._block(record)

        b.loop(self.item["blocks"], block)
        self._end_step(step["retired"], retired)
        return following

    def for_sides(self, body: Callable[[Side], None]) -> None:
        """`body` for the query rows that the step has."""
        b = self.b

        def one(number):
            record = b.at(self.side_records, b.mul(number, len(SIDE)), "i32")
            x, y, rows_at, row_count = (b.table(record, i) for i in range(len(SIDE)))
            body(Side(number, x, y, b.at(self.at, rows_at, "i32"), row_count))

        b.loop(self.side_count, one)

    def prefetch_rows(self, number: str, step: str) -> None:
        """Ask for the block's columns of rows that the next step needs, each `step`th row.

        Rows are numbered: keys and values of each key row that is new to it, then its query rows.
        One row at a time, between two key rows of a block: more would wait for each other.
        """
        b, at = self.b, self.following
        sides, packs = (b.table(at, STEP.index(name)) for name in ("sides", "packs"))
        side_records = b.at(at, len(STEP), "i32")
        pack_records = b.at(side_records, b.mul(sides, len(SIDE)), "i32")
        key_rows, tensors = b.mul(packs, 2), len(self.query_rows)

        def columns(tensor, what, x, y, first):
            source = self.element(tensor, x, y, b.add(self.item[first], self.column))
            stride = self.tensors[tensor][1][2]
            b.call(self.common.ahead[self.channels[what]], ("ptr", source), ("i64", stride))

        def key_row(row):
            place = b.mul(b.op(f"lshr i64 {row}, 1"), PACK_WORDS)
            record = b.at(pack_records, place, "i32")
            x, y = b.table(record, 1), b.table(record, 2)
            whats = ("key", "value")
            odd = b.op(f"and i64 {row}, 1")
            b.switch(odd, 2, [], lambda i: columns(whats[i], whats[i], x, y, "key"))

        def query_row(row):
            row = b.sub(row, key_rows)
            side = b.op(f"udiv i64 {row}, {tensors}")
            record = b.at(side_records, b.mul(side, len(SIDE)), "i32")
            x, y = b.table(record, 0), b.table(record, 1)
            which = b.sub(row, b.mul(side, tensors))
            b.switch(which, tensors, [], lambda i: columns(*self.query_rows[i], x, y, "query"))

        def ask(row, _):
            b.when(b.less(row, key_rows), lambda: key_row(row), lambda: query_row(row))
            return []

        b.fold(number, b.add(key_rows, b.mul(sides, tensors)), [], ask, step)

    def _pack_key_row(self, record: str) -> None:
        b = self.b
        slot, x, y = (b.table(record, i) for i in range(PACK_WORDS))
        for what in ("key", "value"):
            source = self.element(what, x, y, self.item["key"])
            args = [("ptr", source), ("i64", self.tensors[what][1][2])]
            args.append(("i64", self.item["key_columns"]))
            self.pack(what, f"{what}s", args, self.word("key_pitch"), slot, self.word("key_lead"))
            if self._packed(what)[0]:
                self._wrap_ends(what, slot)
        self._key_row_packed(slot)

    def _wrap_ends(self, what: str, slot: str) -> None:
        """What wrapped classes read before and behind a packed row."""
        b, channels, width = self.b, self.channels[what], self.word("key_pitch")
        first = b.add(b.mul(slot, b.mul(width, channels)), self.word("key_lead"))
        args = [("ptr", b.at(self.buffer(f"{what}s_across"), first)), ("i64", width)]
        args += [("i64", channels), ("i64", self.item["key_columns"])]
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
        source = self.element(tensor, side.x, side.y, self.item["query"])
        step = self.tensors[tensor][1][2]
        return [("ptr", source), ("i64", step), ("i64", self.item["query_columns"])]
