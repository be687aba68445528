"""The functions that forward and backward kernels have in common, compiled once for both.

In: a `Common`. Out: its module, and the names of what is in it.
"""

from __future__ import annotations

import functools

from natcupy.cpu import micro, pack, sums, view
from natcupy.cpu.classes import LANES
from natcupy.cpu.emit import STORAGE, Machine, Module
from natcupy.cpu.spec import Common, pitch


@functools.lru_cache(maxsize=16)
def common_functions(common: Common, machine: Machine) -> CommonFunctions:
    """The functions for a `Common`; its own module and those that call it ask for the same."""
    return CommonFunctions(common, machine)


class CommonFunctions:
    """Packing, logits, softmax, weighted sums; `module` holds them."""

    def __init__(self, common: Common, machine: Machine):
        self.common, self.machine = common, machine
        self.module = Module(common.real, shared=True)
        self.kind = STORAGE[common.storage][0]
        self.channels = {"key": common.head_dim, "value": common.value_dim}
        self.pitches = {w: pitch(c, machine, common.real) for w, c in self.channels.items()}
        together = machine.vectors_in(LANES, common.real)
        for rows in range(1, common.sides + 1):
            sizes = common.shared if rows > 1 else common.singles
            micro.logits(self.module, rows, sizes, together)
        if common.beside:
            micro.logits(self.module, 2, common.beside)
            micro.eight_logits(self.module)
        micro.mask(self.module)
        micro.softmax(self.module, together)
        pack.wrap_ends(self.module)
        view.locate(self.module)
        view.ask(self.module)
        packed = sorted({*self.channels.values()})
        storage = common.storage
        self.across = {c: pack.pack_across(self.module, storage, c) for c in packed}
        self.along = {c: pack.pack_along(self.module, machine, storage, c) for c in packed}
        self._weighted: dict[tuple[int, int], str] = {}
        for what in ("key", "value"):
            for _, channels in self.passes(what):
                key = channels, self.pitches[what]
                if key not in self._weighted:
                    self._weighted[key] = self._weighted_sum(*key)

    def _weighted_sum(self, channels: int, step: int) -> str:
        width = self.machine.width(self.common.real)
        store = pack.Store(self.common.storage, channels, width)
        how = -(-channels // width), self.common.keys, step, store, self.common.extra
        return sums.weighted_sum(self.module, self.machine, *how)

    def passes(self, what: str) -> list[tuple[int, int]]:
        """Channels of keys or values cut into what one weighted sum makes."""
        width = self.machine.width(self.common.real)
        return sums.weighted_block(self.machine).passes(self.channels[what], width)

    def weighted_sum(self, what: str, channels: int) -> str:
        """The function for weighted sums of so many channels of keys or values."""
        return self._weighted[channels, self.pitches[what]]

    def text(self) -> str:
        """The module as LLVM assembly."""
        return self.module.text(8 * self.machine.register_bytes)
