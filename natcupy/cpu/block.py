"""One block of a step: 8 columns of its query rows against all key rows that they see.

In: a step's rows, packed. Out: logits, softmax, weighted sums; `forward.py` and `backward.py` say
what becomes of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from natcupy.cpu.classes import ACTIVE, BROADCAST, GROUPS_AT, LANES, MASK_AT, ORIGIN, SPAN
from natcupy.cpu.emit import Value
from natcupy.cpu.plan import ALONE, WITH_LAST, WITH_NEXT
from natcupy.cpu.rows import ENTRY_WORDS
from natcupy.cpu.task import Side, Task


@dataclass
class _Job:
    """One set of logits of a block: what does not change from key row to key row."""

    keys: str  # address of tap 0 in the ring's first row
    slot_size: Value
    head: list  # first arguments of the logit functions
    queries: str  # address of the first query row's columns
    query_size: Value  # elements from one query row to the next
    results: str  # address of the first query row's logits
    bias: tuple[str, Value]  # address for the first row of the bias table, elements to the next


class Block(Task):
    """Adds the arithmetic that both passes share."""

    #: (keys or values, their buffer, the query side's buffer, the results') of each set of logits
    logit_jobs: tuple[tuple[str, str, str, str], ...]

    def _finish_side(self, side: Side, s: str) -> None:
        """After the softmax of one of the query rows; its weights are at `s`."""
        raise NotImplementedError

    def _finish_sides(self) -> None:
        """After all query rows of the block."""

    def _block(self, record: str) -> None:
        b = self.b
        self.cls = self.entry(b.table(record, 0))
        self.span, self.active = b.table(self.cls, SPAN), b.table(self.cls, ACTIVE)
        self.origin, self.broadcast = b.table(self.cls, ORIGIN), b.table(self.cls, BROADCAST)
        self.is_broadcast = b.op(f"icmp ne i64 {self.broadcast}, 0")
        # the block's first query, counted from the item's first key
        self.place = b.sum(b.sub(self.item("query"), self.item("key")), self.column)
        if self.spec.common.extra:
            extra_class = b.add(self.word("extra_classes_at"), self.active)
            self.extra_class = self.entry(b.table(self.table, extra_class))
        self.mask = self.mask_of(self.cls, MASK_AT)
        jobs = [self._job(*job) for job in self.logit_jobs]
        self.parts = b.add(self.entry_count, b.mul(self.side_count, 2))

        def entry(i):
            self.ask_for_following(i, self.parts)
            self.ask_for_next(i, self.entry_count)
            self._entry(b.at(self.entries, b.mul(i, ENTRY_WORDS), "i32"), jobs)

        b.loop(self.entry_count, entry)
        self.for_sides(self._side)
        self._finish_sides()

    def mask_of(self, cls: str, word: int) -> str:
        """Address of the masks that a word of a class names, or null."""
        b, mask_at = self.b, self.b.table(cls, word)
        masked = b.op(f"icmp ne i64 {mask_at}, 0")
        return b.choose(masked, self.entry(mask_at), "null", "ptr")

    # -- logits -----------------------------------------------------------------------------------

    def _job(self, what: str, keys: str, queries: str, results: str) -> _Job:
        b = self.b
        channels, width = self.channels[what], self.word("key_pitch")
        start = b.sum(self.word("key_lead"), self.place, self.origin)
        first = b.at(self.buffer(keys), start)
        return _Job(
            keys=first,
            slot_size=b.mul(width, channels),
            head=self._logit_args(self.cls, width, what),
            queries=b.at(self.buffer(queries), self.column),
            query_size=b.mul(self.word("query_pitch"), channels),
            results=self.buffer(results),
            bias=self._bias() if what == "key" else (self._no_bias(), 0),
        )

    def _entry(self, record: str, jobs: list[_Job]) -> None:
        """Logits of one key row with the query rows that see it."""
        b = self.b
        slot, first, count = (b.table(record, i) for i in range(3))
        row_size = b.mul(self.span, LANES)

        def several(rows):
            for job in jobs:
                args = [*job.head, ("ptr", b.at(job.keys, b.mul(slot, job.slot_size)))]
                bias, step = job.bias
                for i in range(rows):
                    side = b.add(first, i)
                    place, bias_row = (b.table(record, 3 + 2 * i + n) for n in (0, 1))
                    result = b.sum(b.mul(side, self.word("logits_step")), b.mul(place, row_size))
                    args += [
                        ("ptr", b.at(job.queries, b.mul(side, job.query_size))),
                        ("ptr", b.at(job.results, result)),
                        ("ptr", b.at(bias, b.mul(bias_row, step))),
                    ]
                b.call(f"logits{rows}", *args)

        if not self.spec.common.beside:
            b.switch(b.sub(count, 1), self.spec.common.sides, [], lambda i: several(i + 1))
            return
        assert (ALONE, WITH_NEXT) == (0, 1)  # and WITH_LAST has its logits
        alone, both = (lambda: several(1)), (lambda: self._beside(slot, record, jobs))
        b.switch(self.how, 3, [], lambda how: (alone, both, lambda: None)[how]())

    def _beside(self, slot: str, record: str, jobs: list[_Job]) -> None:
        """Logits of this block of a line and of the next one, which share most of their taps."""
        b = self.b
        place, bias_row = b.table(record, 3), b.table(record, 4)
        row = b.mul(place, b.mul(self.span, LANES))
        shared = b.mul(b.sub(self.span, LANES), LANES)
        for job in jobs:
            keys = b.at(job.keys, b.mul(slot, job.slot_size))
            bias = b.at(job.bias[0], b.mul(bias_row, job.bias[1]))
            one = job.queries, b.at(job.results, row), bias
            other = b.at(one[0], LANES), b.at(one[1], self.word("logits_step"))
            # a tap of this block is at the key of the tap of the other that is 8 back
            moved = other[0], b.at(other[1], -LANES * LANES), b.at(bias, -LANES)
            pointers = [("ptr", x) for x in (keys, *one, *moved)]
            b.call("logits2", *job.head, *pointers)
            last = b.at(other[1], shared), b.at(bias, b.sub(self.span, LANES))
            for first, (at, s, biases) in (
                (keys, one),
                (b.at(keys, self.span), (other[0], *last)),
            ):
                ends = [("ptr", x) for x in (first, at, s, biases)]
                b.call("eight_logits", *job.head[2:], *ends)

    def _logit_args(self, cls: str, width: Value, what: str) -> list:
        """The arguments for any keys."""
        args = [("ptr", cls), ("ptr", self.table), ("i64", self.word("query_pitch"))]
        return [*args, ("i64", width), ("i64", self.channels[what])]

    def _bias(self) -> tuple[str, Value]:
        """Address of the bias of tap 0, in a mirrored row for a broadcast class, and row's step.

        Where there are masks, they add the bias of taps.
        """
        b = self.b
        mirror = b.sub(b.add(self.word("mirror_lead"), self.bias_middle()), self.origin)
        mirror = b.at(self.buffer("mirror"), mirror)
        first, step = self._bias_of_taps()
        first = b.choose(self.is_broadcast, mirror, first, "ptr")
        step = b.choose(self.is_broadcast, self.word("mirror_pitch"), step)
        is_plain = b.op(f"icmp eq ptr {self.mask}, null")
        has = b.op(f"or i1 {self.is_broadcast}, {is_plain}")
        has = b.op(f"and i1 {has}, {self.is_set('has_rpb')}")
        return b.choose(has, first, self._no_bias(), "ptr"), b.choose(has, step, 0)

    def _bias_of_taps(self) -> tuple[str, Value]:
        """Address of the bias of tap 0 of a class that is not broadcast, and row's step."""
        b = self.b
        first = b.sum(self.word("bias_lead"), self.bias_middle(), self.origin)
        return b.at(self.buffer("bias"), first), self.word("bias_pitch")

    def _no_bias(self) -> str:
        """The middle of a buffer of zeros."""
        return self.b.at(self.buffer("zeros"), self.b.op(f"ashr i64 {self.word('zeros')}, 1"))

    # -- one of the query rows ----------------------------------------------------------------

    def _side(self, side: Side) -> None:
        b = self.b
        s = self.logits_of("logits", side)
        self.vectors = b.mul(side.row_count, self.span)
        total = self.vectors
        b.when(b.op(f"icmp ne ptr {self.mask}, null"), lambda: self._mask(side))
        if self.spec.common.extra:
            self._extra_logits(side)
            total = b.add(total, self.word("extra_taps"))
        results = [("ptr", self.buffer("max")), ("ptr", self.buffer("sum"))]
        part = b.add(self.entry_count, b.mul(side.number, 2))
        self.ask_for_following(part, self.parts)
        b.call("softmax", ("ptr", s), ("i64", total), *results)
        self.ask_for_following(b.add(part, 1), self.parts)
        self._finish_side(side, s)

    def _mask(self, side: Side) -> None:
        b = self.b
        bias, step = self._bias_of_taps()
        has = b.op(f"xor i1 {self.is_broadcast}, true")
        has = b.op(f"and i1 {has}, {self.is_set('has_rpb')}")
        bias, step = b.choose(has, bias, self._no_bias(), "ptr"), b.choose(has, step, 0)
        for what, _, _, results in self.logit_jobs:
            biases = (bias, step) if what == "key" else (self._no_bias(), 0)
            s, rows = self.logits_of(results, side), (side.rows, side.row_count)
            self._call_mask(what, self.cls, self.mask, s, rows, self.span, biases)

    def _call_mask(self, what: str, cls, mask, s, rows, span, bias) -> None:
        """Unseen keys weigh nothing and get no gradient."""
        blank = self.b.number(-math.inf if what == "key" else 0.0)
        args = [("ptr", cls), ("ptr", self.table), ("ptr", mask), (self.real, blank), ("ptr", s)]
        args += [("ptr", rows[0]), ("i64", rows[1]), ("i64", span)]
        self.b.call("mask", *args, ("ptr", bias[0]), ("i64", bias[1]))

    def _extra_logits(self, side: Side) -> None:
        """Logits with the additional keys, behind those of the window."""
        b = self.b
        mask = self.mask_of(self.extra_class, MASK_AT)
        one_row, no_bias = (self.entry(2), 1), (self._no_bias(), 0)
        for what, _, queries, results in self.logit_jobs:
            channels = self.channels[what]
            s = b.at(self.logits_of(results, side), b.mul(self.vectors, LANES))
            keys, width = self.buffer(f"extra_{what}s_across"), self.word("extra_pitch")
            args = [*self._logit_args(self.extra_class, width, what), ("ptr", keys)]
            size = b.mul(self.word("query_pitch"), channels)
            at = b.at(self.side_buffer(queries, side.number, size), self.column)
            b.call("logits1", *args, ("ptr", at), ("ptr", s), ("ptr", no_bias[0]))
            given = what, self.extra_class, mask, s, one_row, 0, no_bias
            b.when(b.op(f"icmp ne ptr {mask}, null"), lambda given=given: self._call_mask(*given))

    def logits_of(self, name: str, side: Side) -> str:
        """Address of a query row's logits or of their gradients; on a line, of a block's."""
        b, number = self.b, side.number
        if self.spec.common.beside:
            number = b.op(f"zext i1 {b.op(f'icmp eq i64 {self.how}, {WITH_LAST}')} to i64")
        return self.side_buffer(name, number, self.word("logits_step"))

    def behind(self, s: str) -> str:
        """Where the weights of the additional keys begin."""
        return self.b.at(s, self.b.mul(self.vectors, LANES))

    def lane_step(self) -> str:
        """Elements between the weights that two neighboring lanes give to one key."""
        return self.b.choose(self.is_broadcast, 1, 1 - LANES)

    # -- sums over keys ---------------------------------------------------------------------------

    def see(self, groups_at: int, cls: str, s: str, lane_step: Value, rows: str, row_count: Value):
        """How a class's lanes see keys: the arguments of `sums` before and behind the keys'.

        `groups_at` is the word of the class that tells where its groups of lanes are.
        """
        b = self.b
        args = [("ptr", s), ("i64", lane_step), ("i64", b.mul(self.span, LANES))]
        args += [("ptr", rows), ("i64", row_count)]
        groups = self.entry(b.table(cls, groups_at))
        return args, [("ptr", groups), ("ptr", self.table)]

    def weighted(self, what: str, s: str, tensor: str, side: Side) -> None:
        """Weighted sums of packed keys or values into the block's part of a row of a tensor."""
        b, step = self.b, self.pitches[what]
        values = b.at(self.buffer(f"{what}s_along"), b.mul(self.place, step))
        out = self.element(tensor, side.x, side.y, self.column)
        out_step = self.column_step(tensor)
        slot_step = b.mul(self.word("key_columns"), step)
        seen = GROUPS_AT, self.cls, s, self.lane_step(), side.rows, side.row_count
        before, behind = self.see(*seen)
        for channel, channels in self.common.passes(what):
            args = [*before, ("ptr", b.at(values, channel)), ("i64", slot_step)]
            args += behind
            if self.spec.common.extra:
                extra = b.at(self.buffer(f"extra_{what}s_along"), channel)
                args += [("ptr", self.behind(s)), ("ptr", extra), ("i64", self.word("extra"))]
            args.append(("ptr", self.buffer("factor")))
            args += [("ptr", b.at(out, channel, self.kind)), ("i64", out_step)]
            b.call(self.common.weighted_sum(what, channels), *args)
