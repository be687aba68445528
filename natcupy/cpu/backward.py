"""The backward pass: gradients of everything, from weights computed anew.

In: a `Spec` with `backward=True`. Out: its module. With P the weights and dO the gradient of the
output: dP = dO V^T, dS = P (dP - delta), delta = P . dP - d(lse); dQ = scale dS K, dK = scale
dS^T Q, dV = P^T dO, and the bias takes the sum of dS over the pairs at its distance.
"""

from __future__ import annotations

from itertools import product

from natcupy.cpu import micro, pack, sums
from natcupy.cpu.block import Block
from natcupy.cpu.classes import LANES, SPREADS_AT, SUMS_MASK_AT
from natcupy.cpu.cuts import EARLIER, LATER
from natcupy.cpu.emit import Value
from natcupy.cpu.plan import SEGMENT_WORDS
from natcupy.cpu.rows import RETIRE_WORDS
from natcupy.cpu.task import Side
from natcupy.cpu.view import THIS


class Backward(Block):
    """A task is an item for one key head and, one after the other, all query heads that share it.

    Gradients of keys and values are summed in the ring, beside the packed rows. When a row leaves
    the ring they are stored, or added to what an earlier phase, item or query head has stored, if
    the spec says that there is such a thing. In a half type only those that nothing will be added
    to are stored as results, and rounded once.
    """

    rows = (
        *(("key", "key", "key"), ("value", "value", "key"), ("query", "key", "query")),
        *(("grad_out", "value", "query"), ("grad_query", "key", "query")),
        *(("grad_key", "key", "key"), ("grad_value", "value", "key")),
    )
    query_rows = 3
    logit_jobs = (
        ("key", "keys_across", "query_across", "logits"),
        ("value", "values_across", "grad_across", "grads"),
    )

    def _functions(self) -> None:
        super()._functions()
        module, machine = self.module, self.machine
        micro.logit_gradients(module)
        storages = {self.spec.common.storage}
        if self.spec.has_partials or self.spec.common.extra:  # whose gradients are sums of shares
            storages.add(self.real)
        for storage, channels in product(sorted(storages), sorted({*self.channels.values()})):
            pack.unpack(module, machine, storage, channels, self.spec.adds)
        self.spreads = {}
        for what in ("key", "value"):
            for _, channels in self._passes(what):
                key = self._vectors(channels), self.pitches[what]
                if key not in self.spreads:
                    vectors, step = key
                    keys = self.spec.common.keys
                    self.spreads[key] = sums.spread(module, machine, vectors, keys, step)

    def _passes(self, what: str) -> list[tuple[int, int]]:
        """Channels cut into what is handed out at once."""
        width = self.machine.width(self.real)
        return sums.spread_block(self.machine).passes(self.channels[what], width)

    def _vectors(self, channels: int) -> int:
        return -(-channels // self.machine.width(self.real))

    def _packed(self, what: str) -> tuple[bool, bool]:
        return True, what == "key"

    def _heads(self) -> None:
        b = self.b
        self.begin_key_head()
        if self.spec.has_partials:
            self.partials = self._find_partials()
        if self.spec.common.extra:
            for what in ("key", "value"):
                self.zero(f"extra_{what}_sums", b.mul(self.word("extra"), self.pitches[what]))

        def one(i):
            is_later, is_last = b.less(0, i), b.less(b.sub(group, 2), i)
            self.heads_when = b.add(b.choose(is_later, EARLIER, 0), b.choose(is_last, 0, LATER))
            self.look(THIS, self.number, i)
            self.query_head()

        rows = b.mul(self.spec.common.sides, self.word("query_pitch"))
        self.zero("grad_lse_rows", rows)  # in case there is none
        group = b.op(f"udiv i64 {self.word('heads')}, {self.word('kv_heads')}")
        b.loop(group, one)
        if self.spec.common.extra:
            self._write_extra_gradients()

    def _begin_head(self) -> None:
        b = self.b
        rows = self.word("bias_rows")

        def clear():
            self.zero("bias_sums", b.mul(rows, b.mul(self.word("bias_pitch"), LANES)))
            self.zero("mirror_sums", b.mul(rows, self.word("mirror_pitch")))

        b.when(self.is_set("want_rpb"), clear)

    def _end_head(self) -> None:
        self.b.when(self.is_set("want_rpb"), self._write_bias_gradient)

    def _key_row_packed(self, slot: str) -> None:
        for what in ("key", "value"):
            size = self.b.mul(self.word("key_columns"), self.pitches[what])
            self.zero_columns(f"{what}_sums", size, self.b.mul(slot, size))

    def _query_row_packed(self, side: Side) -> None:
        b, width = self.b, self.word("query_pitch")
        jobs = (("query", "query_along", "key"), ("grad_out", "grad_along", "value"))
        for tensor, along, what in jobs:
            to = self.side_buffer(along, side.number, b.mul(width, self.pitches[what]))
            args = [("ptr", to), ("i64", self.pitches[what]), *self.query_row(tensor, side)]
            b.call(self.common.along[self.channels[what]], *args)
        channels = self.channels["value"]
        to = self.side_buffer("grad_across", side.number, b.mul(width, channels))
        args = [("ptr", to), ("i64", width), *self.query_row("grad_out", side)]
        b.call(self.common.across[channels], *args, (self.real, b.number(1.0)))
        self._pack_grad_lse(side)

    def _pack_grad_lse(self, side: Side) -> None:
        b = self.b
        row = self.side_buffer("grad_lse_rows", side.number, self.word("query_pitch"))
        pointer = self.pointer("grad_lse")

        def copy():
            base, step = self.lse_row(pointer, side.x, side.y)

            def one(i):
                value = b.load(b.real, b.at(base, b.mul(i, step)), self.real_bytes)
                b.do(f"store {b.real} {value}, ptr {b.at(row, i)}, align {self.real_bytes}")

            b.loop(self.item("query_columns"), one)

        b.when(b.op(f"icmp ne ptr {pointer}, null"), copy)

    # -- one of the query rows of a block -----------------------------------------------------

    def _finish_side(self, side: Side, s: str) -> None:
        self._gradients_of_logits(side, s, self.logits_of("grads", side))

    def _finish_sides(self) -> None:
        """One kind of sums after the other: those of all query rows stay close to the core."""
        b = self.b
        scale = b.splat(self.as_real(self.scale()), LANES)
        b.vstore(scale, self.buffer("factor"), LANES)

        def for_each(add):
            def one(side):
                self.vectors = b.mul(side.row_count, self.span)
                add(side, self.logits_of("logits", side), self.logits_of("grads", side))

            self.for_sides(one)

        def queries():
            for_each(lambda side, _, grads: self.weighted("key", grads, "grad_query", side))

        def keys_and_values():
            for_each(lambda side, _, grads: self._spread("key", side, grads, "query_along"))
            for_each(lambda side, s, _: self._spread("value", side, s, "grad_along"))

        b.when(self.is_set("want_query"), queries)
        b.when(self.is_set("want_key_value"), keys_and_values)

    def _gradients_of_logits(self, side: Side, s: str, grads: str) -> None:
        b = self.b
        middle = self.bias_middle()
        tap = b.mul(b.sum(self.word("bias_lead"), middle, self.origin), LANES)
        lane = b.sub(b.add(self.word("mirror_lead"), middle), self.origin)
        bias = b.choose(
            self.is_broadcast,
            b.at(self.buffer("mirror_sums"), lane),
            b.at(self.buffer("bias_sums"), tap),
            "ptr",
        )
        steps = self.word("mirror_pitch"), b.mul(self.word("bias_pitch"), LANES)
        kind = b.choose(self.is_set("want_rpb"), b.add(self.broadcast, 1), 0)
        grad_lse = self.side_buffer("grad_lse_rows", side.number, self.word("query_pitch"))
        grad_lse = b.at(grad_lse, self.column)
        args = [("ptr", self.table), ("ptr", s), ("ptr", grads)]
        args += [("ptr", side.rows), ("i64", side.row_count)]
        extra = self.word("extra_taps") if self.spec.common.extra else 0
        args += [("i64", self.span), ("i64", extra)]
        mask = self.mask_of(self.cls, SUMS_MASK_AT)
        args += [("ptr", self.buffer("sum")), ("ptr", grad_lse), ("ptr", mask), ("ptr", bias)]
        args += [("i64", b.choose(self.is_broadcast, *steps)), ("i64", kind)]
        b.call("logit_gradients", *args)

    def _spread(self, what: str, side: Side, s: str, along: str) -> None:
        """Add each lane's row, weighted, to the sums of the keys it sees."""
        b, step = self.b, self.pitches[what]
        source = self.side_buffer(along, side.number, b.mul(self.word("query_pitch"), step))
        source = b.at(source, b.mul(self.column, step))
        slot_step = b.mul(self.word("key_columns"), step)
        first = b.at(self.buffer(f"{what}_sums"), b.mul(self.place, step))
        only_slot = self.entry(2)  # a word that is 0

        def call(cls, weights, lane_step, rows, row_count, target):
            seen = SPREADS_AT, cls, weights, lane_step, rows, row_count
            before, behind = self.see(*seen)
            for channel, channels in self._passes(what):
                args = [*before, ("ptr", b.at(target, channel)), ("i64", slot_step)]
                args += [*behind, ("ptr", b.at(source, channel)), ("i64", step)]
                b.call(self.spreads[self._vectors(channels), step], *args)

        call(self.cls, s, self.lane_step(), side.rows, side.row_count, first)

        if self.spec.common.extra:
            target = self.buffer(f"extra_{what}_sums")
            call(self.extra_class, self.behind(s), 1, only_slot, 1, target)

    # -- results that leave -----------------------------------------------------------------------

    def _end_step(self, count: str, retired: str) -> None:
        b = self.b

        def all_rows():
            b.loop(count, lambda i: self._retire(b.at(retired, b.mul(i, RETIRE_WORDS), "i32")))

        b.when(self.is_set("want_key_value"), all_rows)

    def _retire(self, record: str) -> None:
        b = self.b
        slot, x, y, row_when, number = (b.table(record, i) for i in range(RETIRE_WORDS))
        partial_row = b.mul(b.add(self.item("partials"), number), self.word("partial_columns"))
        segments = self.entry(self.item("segments_at"))

        def segment(i):
            at = b.at(segments, b.mul(i, SEGMENT_WORDS), "i32")
            first, count, tile_when, place = (b.table(at, i) for i in range(SEGMENT_WORDS))
            when = b.op(f"or i64 {b.op(f'or i64 {row_when}, {self.heads_when}')}, {tile_when}")
            column = b.add(b.mul(slot, self.word("key_columns")), first)
            for what in ("key", "value"):
                tensor, step = f"grad_{what}", self.pitches[what]
                source = b.at(self.buffer(f"{what}_sums"), b.mul(column, step))
                grads = self.element(tensor, x, y, first), self.column_step(tensor)
                self._give_out(what, source, grads, b.add(partial_row, place), count, when)

        b.loop(self.item("segments"), segment)

    def _give_out(self, what: str, source: str, grads: tuple, place: Value, count, when) -> None:
        """Store the sums of some keys of a row, added to those of earlier items and heads.

        `grads` is a row: an address, and elements between columns; incomplete sums of a half type
        lie at `place` of a tensor of their own.
        """
        b, storage = self.b, self.spec.common.storage
        add = b.op(f"and i64 {when}, {EARLIER}")
        if not self.spec.has_partials:
            self._unpack(what, storage, grads, source, count, grads, add)
            return
        channels = self.channels[what]
        partials = b.at(self.partials[what], b.mul(place, channels)), channels
        is_incomplete = b.op(f"icmp ne i64 {b.op(f'and i64 {when}, {LATER}')}, 0")
        b.when(
            is_incomplete,
            lambda: self._unpack(what, self.real, partials, source, count, partials, add),
            lambda: self._unpack(what, storage, grads, source, count, partials, add),
        )

    def _find_partials(self) -> dict[str, str]:
        """Where the incomplete sums of the task's key head lie: they are its own, or a thread's."""
        b = self.b
        batch = b.sub(self.found("batch"), self.word("round_batch"))
        head = b.sub(self.found("kv_head"), self.word("round_head"))
        pair = b.add(b.mul(batch, self.word("round_heads")), head)
        number = b.choose(self.is_set("partials_of_threads"), self.thread, pair)
        first = b.mul(number, self.word("partial_size"))
        return {
            what: b.at(self.pointer(f"partial_{what}s"), b.mul(first, channels))
            for what, channels in self.channels.items()
        }

    def _unpack(self, what: str, storage: str, to: tuple, source: str, count, sums, add) -> None:
        """Call `unpack`; `to` and `sums` are rows: address, and elements between columns."""
        factor = self.as_real(self.scale()) if what == "key" else self.b.number(1.0)
        args = [("ptr", to[0]), ("i64", to[1]), ("ptr", source), ("i64", self.pitches[what])]
        args += [("i64", count), (self.real, factor)]
        if self.spec.adds:
            args += [("ptr", sums[0]), ("i64", sums[1]), ("i64", add)]
        self.b.call(f"unpack_{storage}_{self.channels[what]}", *args)

    def _share(self, heads: str, head: str) -> str:
        """Number of this item's share of a gradient that is summed over items and batch."""
        b = self.b
        number = b.add(b.mul(self.found("batch"), self.word("items")), self.item("number"))
        return b.add(b.mul(number, self.word(heads)), head)

    def _write_extra_gradients(self) -> None:
        """The item's share of the gradients of additional keys and values."""
        b = self.b
        number, extra = self._share("kv_heads", self.found("kv_head")), self.word("extra")
        for what in ("key", "value"):
            channels = self.channels[what]
            to = b.at(self.pointer(f"extra_{what}_grads"), b.mul(number, b.mul(extra, channels)))
            source, row = self.buffer(f"extra_{what}_sums"), (to, channels)
            self._unpack(what, self.real, row, source, extra, row, 0)

    def _write_bias_gradient(self) -> None:
        """The item's share of one head's bias gradient."""
        b = self.b
        length, rows = self.word("bias_length"), self.word("bias_rows")
        number = self._share("heads", self.found("head"))
        to = b.at(self.pointer("rpb_sums"), b.mul(number, b.mul(rows, length)))
        bias = b.at(self.buffer("bias_sums"), b.mul(self.word("bias_lead"), LANES))
        mirror = b.at(self.buffer("mirror_sums"), self.word("mirror_lead"))

        def one(row, i):
            place = b.mul(b.add(b.mul(row, self.word("bias_pitch")), i), LANES)
            vector = b.vload(b.at(bias, place), LANES)
            back = b.sub(b.sub(length, 1), i)
            place = b.add(b.mul(row, self.word("mirror_pitch")), back)
            start = b.load(b.real, b.at(mirror, place), self.real_bytes)
            total = b.add_up(vector, LANES, start)
            target = b.at(to, b.add(b.mul(row, length), i))
            b.do(f"store {b.real} {total}, ptr {target}, align {self.real_bytes}")

        b.loop(rows, lambda row: b.loop(length, lambda i: one(row, i)))
