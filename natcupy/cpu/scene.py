"""What the code of a kernel can read: the argument block, the plan's table, the views of its tasks.

In: a `Spec`. Out: `Scene`, the base of the classes that write kernels, and the function `look`,
which makes a view of a task.

A thread keeps two views: of its task, and of the one that it is likely to draw next. While a step
is worked on, the rows of the next step are asked for; near the end of a task, those of the first
step of the next task, too.
"""

from __future__ import annotations

from natcupy.cpu.common import common_functions
from natcupy.cpu.emit import REAL_BYTES, STORAGE, Machine, Module, Value
from natcupy.cpu.plan import ITEM
from natcupy.cpu.spec import TENSORS, WORDS, Spec
from natcupy.cpu.view import FOUND, NEXT, PLACE, THIS, VIEW, place_at

LAST_STEPS = 4  # of a task; each asks for its share of the next task's rows


class Scene:
    """Words, buffers, entries of the table, places in tensors."""

    #: tensors by rows, in the order of a view: name, whose channels it has, and whose columns
    rows: tuple[tuple[str, str, str], ...]
    #: how many of them, behind keys and values, are rows of queries to ask for
    query_rows: int

    def __init__(self, spec: Spec, machine: Machine):
        self.spec, self.machine, self.common = spec, machine, common_functions(spec.common, machine)
        self.real = spec.common.real
        self.module = Module(self.real, uses=self.common.module)
        self.kind, self.real_bytes = self.common.kind, REAL_BYTES[self.real]
        self.channels, self.pitches = self.common.channels, self.common.pitches

    # -- words, buffers, the table ----------------------------------------------------------------

    def begin(self, name: str, *params: str, public: bool = False) -> None:
        """Begin a function that reads the argument block `words`."""
        self.b = self.module.function(name, ", ".join(("ptr words", *params)), public)
        self.table = self.pointer("table")

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

    def bias_middle(self) -> str:
        """Index of the bias of a query's own column: kernel_size - 1."""
        return self.b.op(f"ashr i64 {self.b.sub(self.word('bias_length'), 1)}, 1")

    # -- the task ---------------------------------------------------------------------------------

    def write_look(self) -> None:
        """`look`: make a view of a task's item and, of query heads that share a key head, of one.

        Items are counted over all tasks, which have equally many.
        """
        self.begin("look", "ptr view", "i64 number", "i64 later")
        b, backward = self.b, self.spec.backward
        items, heads = self.word("phase_items"), self.word("round_heads")
        among, task = self.word("task_items"), b.op(f"udiv i64 %number, {self.word('task_items')}")
        among = b.sub("%number", b.mul(task, among))
        # heads first: they share the pages of their tokens
        head, rest = b.op(f"urem i64 {task}, {heads}"), b.op(f"udiv i64 {task}, {heads}")
        item, batch = b.op(f"urem i64 {rest}, {items}"), b.op(f"udiv i64 {rest}, {items}")
        head, batch = b.add(head, self.word("round_head")), b.add(batch, self.word("round_batch"))
        number = b.sum(item, self.word("first_item"), among)
        self.record = self.entry(b.add(b.table(self.table, 1), b.mul(number, len(ITEM))))
        group = b.op(f"udiv i64 {self.word('heads')}, {self.word('kv_heads')}")
        if backward:
            head, kv_head = b.add(b.mul(head, group), "%later"), head
        else:
            kv_head = b.op(f"udiv i64 {head}, {group}")
        first_step = self.entry(self.item("steps_at"))
        pointers = [("ptr", first_step), ("ptr", self.record)]
        numbers = [("i64", batch), ("i64", head), ("i64", kv_head)]
        for i, (kind, value) in enumerate([*pointers, *numbers]):
            b.do(f"store {kind} {value}, ptr {b.at('%view', i, 'i64')}, align 8")
        for number, (tensor, what, side) in enumerate(self.rows):
            size = STORAGE[self.spec.common.storage][1]
            args = [("ptr", "%words"), ("ptr", b.at("%view", place_at(number), "i64"))]
            args += [("ptr", self.record), ("i64", TENSORS.index(tensor)), ("i64", batch)]
            args += [("i64", head if side == "query" else kv_head), ("i64", self.item(side))]
            b.call("locate", *args, ("i64", size), ("i64", size * self.channels[what]))
        self.module.finish(b)

    def view(self, which: int) -> str:
        """Address of one of this thread's views."""
        return self.b.at(self.views, which * VIEW, "i64")

    def look(self, which: int, number: str, later: Value = 0) -> None:
        """Make a view of a task's item, counted over all tasks."""
        args = [("ptr", "%words"), ("ptr", self.view(which)), ("i64", number), ("i64", later)]
        self.b.call("look", *args)

    def found(self, name: str, which: int = THIS, kind: str = "i64") -> str:
        """The batch entry, a head, or an address of a task that was looked at."""
        return self.b.load(kind, self.b.at(self.view(which), FOUND.index(name), "i64"), 8)

    def item(self, name: str) -> str:
        """A number of the task's item."""
        return self.b.table(self.record, ITEM.index(name))

    # -- tensors ----------------------------------------------------------------------------------

    def of_tensor(self, tensor: str, name: str, kind: str = "i64") -> str:
        """A word about a tensor."""
        number = [row[0] for row in self.rows].index(tensor)
        return self.b.load(
            kind, self.b.at(self.view(THIS), place_at(number) + PLACE.index(name), "i64"), 8
        )

    def element(self, tensor: str, x: Value, y: Value, column: Value) -> str:
        """Address in a tensor, by indices on the outer axes and of the item's columns."""
        b = self.b
        indices = (("axis0", x), ("axis1", y), ("axis2", column))
        offset = b.sum(*(b.mul(i, self.of_tensor(tensor, axis)) for axis, i in indices if i != 0))
        return b.at(self.of_tensor(tensor, "address", "ptr"), offset, self.kind)

    def column_step(self, tensor: str) -> str:
        """Elements from one column to the next."""
        return self.of_tensor(tensor, "axis2")

    def lse_row(self, pointer: str, x: Value, y: Value) -> tuple[str, Value]:
        """Address of the item's first query of a row in a tensor of log-sum-exps, and its step."""
        b = self.b
        offsets = [b.mul(self.found("batch"), self.word("lse_batch")), self.found("head")]
        for axis, index in enumerate((x, y, self.item("query"))):
            index = b.mul(index, self.word(f"dilation{axis}"))
            index = b.add(index, self.item(f"group{axis}"))
            offsets.append(b.mul(index, self.word(f"lse_axis{axis}")))
        step = b.mul(self.word("dilation2"), self.word("lse_axis2"))
        return b.at(pointer, b.sum(*offsets)), step

    # -- asking early -----------------------------------------------------------------------------

    def ask_for_following(self, part: Value, parts: Value) -> None:
        """Ask for a part of the next step's rows, in the block's columns.

        Little at a time: more at once would wait for each other.
        """
        asked = THIS, self.following, part, parts
        self.b.when(self.b.less(0, self.left), lambda: self._ask(*asked))

    def ask_for_next(self, part: Value, parts: Value) -> None:
        """Near the end of a task, ask for a part of the first step of the next one."""
        b = self.b
        first = self.found("first_step", NEXT, "ptr")
        steps = b.least(self.item("steps"), LAST_STEPS)
        is_near = b.op(f"and i1 {b.less(self.left, steps)}, {b.op(f'icmp ne ptr {first}, null')}")

        def of_next():
            number = b.add(self.left, b.mul(steps, part))  # steps have parts of their own number
            self._ask(NEXT, first, number, b.mul(parts, steps))

        b.when(is_near, of_next)

    def _ask(self, which: int, step: str, number: Value, stride: Value) -> None:
        args = [("ptr", self.view(which)), ("ptr", step), ("i64", self.query_rows)]
        self.b.call("ask", *args, ("i64", number), ("i64", stride), ("i64", self.column))
