"""The forward pass: outputs and log-sum-exps.

In: a `Spec` with `backward=False`. Out: its module.
"""

from __future__ import annotations

import math

from natcupy.cpu import micro
from natcupy.cpu.block import Block
from natcupy.cpu.classes import LANES
from natcupy.cpu.task import Side


class Forward(Block):
    """A task is an item for one query head."""

    rows = (
        *(("key", "key", "key"), ("value", "value", "key")),
        *(("query", "key", "query"), ("out", "value", "query")),
    )
    query_rows = 2
    logit_jobs = (("key", "keys_across", "query_across", "logits"),)

    def _packed(self, what: str) -> tuple[bool, bool]:
        return what == "key", what == "value"

    def _heads(self) -> None:
        self.begin_key_head()
        self.query_head()

    def _finish_side(self, side: Side, s: str) -> None:
        b = self.b
        total = b.vload(self.buffer("sum"), LANES)
        factor = b.arith("fdiv", b.fill(1.0, LANES), total, LANES)
        b.vstore(factor, self.buffer("factor"), LANES)
        lse = self.pointer("lse")
        b.when(b.op(f"icmp ne ptr {lse}, null"), lambda: self._write_lse(side, total, lse))
        self.weighted("value", s, "out", side)

    def _write_lse(self, side: Side, total: str, pointer: str) -> None:
        b = self.b
        high = b.vload(self.buffer("max"), LANES)
        lse = b.arith("fadd", high, micro.log2(b, total), LANES)
        lse = b.arith("fmul", lse, b.fill(math.log(2), LANES), LANES)
        values = self.buffer("lse")
        b.vstore(lse, values, LANES)
        base, step = self.lse_row(pointer, side.x, side.y)

        def one(i):
            number = b.load(b.real, b.at(values, i), self.real_bytes)
            place = b.at(base, b.mul(b.add(self.column, i), step))
            b.do(f"store {b.real} {number}, ptr {place}, align {self.real_bytes}")

        b.loop(self.active, one)
