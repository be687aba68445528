"""One block of a step: 8 columns of its query rows against all key rows that they see.

In: a step's rows, packed. Out: logits, softmax, weighted sums; `forward.py` and `backward.py` say
what becomes of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from natcupy.cpu.classes import ACTIVE, BROADCAST, GROUPS_AT, LANES, MASK_AT, ORIGIN, SPAN
from natcupy.cpu.emit import Value
from natcupy.cpu.rows import ENTRY_WORDS, SIDES
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
        self.place = b.sum(b.sub(self.item["query"], self.item["key"]), self.column)
        if self.spec.common.extra:
            extra_class = b.add(self.word("extra_classes_at"), self.active)
            self.extra_class = self.entry(b.table(self.table, extra_class))
        mask_at = b.table(self.cls, MASK_AT)
        masked = b.op(f"icmp ne i64 {mask_at}, 0")
        self.mask = b.choose(masked, self.entry(mask_at), "null", "ptr")
        jobs = [self._job(*job) for job in self.logit_jobs]

        def entry(i):
            b.when(self.has_following, lambda: self.prefetch_rows(i, self.entry_count))
            self._entry(b.at(self.entries, b.mul(i, ENTRY_WORDS), "i32"), jobs)

        b.loop(self.entry_count, entry)
        self.for_sides(self._side)
        self._finish_sides()

    # -- logits -----------------------------------------------------------------------------------

    def _job(self, what: str, keys: str, queries: str, results: str) -> _Job:
        b = self.b
        channels, width = self.channels[what], self.word("key_pitch")
        start = b.sum(self.word("key_lead"), self.place, self.origin)
        first = b.at(self.buffer(keys), start)
        return _Job(
            keys=first,
            slot_size=b.mul(width, channels),
            head=self._logit_args(self.cls, width, what, self.mask),
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

        most = SIDES if self.spec.common.shared else 1
        b.switch(b.sub(count, 1), most, [], lambda i: several(i + 1))

    def _logit_args(self, cls, width, what: str, mask) -> list:
        """The arguments for any keys; unseen ones weigh nothing and get no gradient."""
        blank = self.b.number(-math.inf if what == "key" else 0.0)
        args = [("ptr", cls), ("ptr", self.table), ("i64", self.word("query_pitch"))]
        args += [("i64", width), ("i64", self.channels[what])]
        return [*args, ("ptr", mask), (self.real, blank)]

    def _bias(self) -> tuple[str, str]:
        """Address of the bias of tap 0, in a mirrored row for a broadcast class, and row's step."""
        b = self.b
        middle = self.bias_middle()
        forward = b.sum(self.word("bias_lead"), middle, self.origin)
        mirror = b.sub(b.add(self.word("mirror_lead"), middle), self.origin)
        forward, mirror = b.at(self.buffer("bias"), forward), b.at(self.buffer("mirror"), mirror)
        first = b.choose(self.is_broadcast, mirror, forward, "ptr")
        step = b.choose(self.is_broadcast, self.word("mirror_pitch"), self.word("bias_pitch"))
        has = self.is_set("has_rpb")
        return b.choose(has, first, self._no_bias(), "ptr"), b.choose(has, step, 0)

    def _no_bias(self) -> str:
        """The middle of a buffer of zeros."""
        return self.b.at(self.buffer("zeros"), self.b.op(f"ashr i64 {self.word('zeros')}, 1"))

    # -- one of the query rows ----------------------------------------------------------------

    def _side(self, side: Side) -> None:
        b = self.b
        s = self.logits_of("logits", side)
        self.vectors = b.mul(side.row_count, self.span)
        total = self.vectors
        if self.spec.common.extra:
            self._extra_logits(side)
            total = b.add(total, self.word("extra_taps"))
        results = [("ptr", self.buffer("max")), ("ptr", self.buffer("sum"))]
        b.call("softmax", ("ptr", s), ("i64", total), *results)
        self._finish_side(side, s)

    def _extra_logits(self, side: Side) -> None:
        """Logits with the additional keys, behind those of the window."""
        b = self.b
        for what, _, queries, results in self.logit_jobs:
            channels = self.channels[what]
            s = b.at(self.logits_of(results, side), b.mul(self.vectors, LANES))
            mask = self.entry(b.table(self.extra_class, MASK_AT))
            keys, width = self.buffer(f"extra_{what}s_across"), self.word("extra_pitch")
            args = [*self._logit_args(self.extra_class, width, what, mask), ("ptr", keys)]
            size = b.mul(self.word("query_pitch"), channels)
            at = b.at(self.side_buffer(queries, side.number, size), self.column)
            args.append(("ptr", at))
            b.call("logits1", *args, ("ptr", s), ("ptr", self._no_bias()))

    def logits_of(self, name: str, side: Side) -> str:
        """Address of a query row's logits or of their gradients."""
        return self.side_buffer(name, side.number, self.word("logits_step"))

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
        out = self.element(tensor, side.x, side.y, b.add(self.item["query"], self.column))
        out_step = self.tensors[tensor][1][2]
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
