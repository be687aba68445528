"""The machine: runs all threads of many blocks together, one numpy call per instruction.

In: a `Program`, a `Memory`, the launch shape and arguments. Out: memory changed in place,
`issues`, `counters`. Threads stand at instructions; the scheduler always runs the lowest one,
which brings structured code together again. With a seed it prefers warps at random instead, so
that orders differ. The threads that run now are the *group* (`full`, `mask`, `idx`, `blend`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from . import ops  # noqa: F401  (decoders register themselves)
from .barriers import Barriers
from .copies import AsyncCopies
from .counters import Counters
from .errors import IssueLog, PtxFaultError
from .mbarriers import MBarriers
from .memory import Arena, Buffer, Memory
from .parse import Instruction
from .program import Block, Program
from .races import Intervals, NoRaces, VectorClocks
from .registers import RegisterFile

RUN, AT_BARRIER, DONE, ASLEEP, PARKED = range(5)
_NEVER = np.int32(2**31 - 1)
_SHADOW_BYTES = 1 << 26  # most memory the race maps of one batch may take


@dataclass(frozen=True)
class Checks:
    """What is looked for. Counting memory traffic costs time and is off by default.

    `truncated_sums` makes tensor cores round their float32 sums towards zero, as devices do.
    """

    races: bool = True
    uninitialised: bool = True
    late_copies: bool = True
    traffic: bool = False
    truncated_sums: bool = False


class Blend(dict[str, np.ndarray]):
    """Per register class, all ones for the threads of a mask and zero for the others."""

    def __init__(self, mask: np.ndarray):
        super().__init__(pred=mask)

    def __missing__(self, cls: str) -> np.ndarray:
        signed = np.dtype(cls.replace("u", "int"))
        bits = np.negative(self["pred"].view(np.int8).astype(signed)).view(cls.replace("u", "uint"))
        self[cls] = bits
        return bits


class Group(NamedTuple):
    """The threads that execute now."""

    full: bool
    mask: np.ndarray
    idx: np.ndarray
    blend: Blend


class Machine:
    """One launch of one program. Reuse the program, not the machine."""

    def __init__(
        self,
        program: Program,
        memory: Memory,
        block: tuple[int, int, int],
        shared: int = 0,
        *,
        checks: Checks | None = None,
        seed: int | None = None,
        lanes: int = 4096,
    ):
        self.program, self.memory, self.block_shape = program, memory, block
        self.checks = checks or Checks()
        self.block_threads = int(np.prod(block))
        self.warps = (self.block_threads + 31) // 32
        self.threads = self.warps * 32  # per block, the last warp filled up
        self.dynamic_shared = shared
        self.shared_bytes = program.dynamic_offset + shared if shared else program.static_shared
        self.shared_bytes = max(self.shared_bytes, program.static_shared)
        self.issues, self.counters = IssueLog(), Counters(self.checks.traffic)
        self.hints: list[Buffer | None] = [None] * len(program.code)
        self.rng = None if seed is None else np.random.default_rng(seed)
        self.batch_blocks = self._blocks_per_batch(lanes)
        self.grid_sync = _orders_blocks(program)
        if program.maximum_threads and self.block_threads > program.maximum_threads:
            raise PtxFaultError(
                f"{program.name} is compiled for at most {program.maximum_threads} threads a block "
                f"(launch bounds), got {self.block_threads}."
            )

    def _blocks_per_batch(self, lanes: int) -> int:
        shadow = max(1, self.shared_bytes) * (2 * self.warps + 2)
        return max(1, min(lanes // self.threads, _SHADOW_BYTES // shadow))

    # -- launch -----------------------------------------------------------------------------------

    def run(self, grid: tuple[int, int, int], args: bytes | Sequence[object]) -> Machine:
        """Run every block; `args` are the bytes of the parameters, or one value per parameter."""
        self.params = self._pack(args)
        self.grid = grid
        self.memory_reset()
        total = int(np.prod(grid))
        order = np.arange(total) if self.rng is None else self.rng.permutation(total)
        with np.errstate(all="ignore"):
            for first in range(0, total, self.batch_blocks):
                self._start(order[first : first + self.batch_blocks])
                self._loop()
                self.races.finish()
        self.counters.collect(self.program)
        return self

    def memory_reset(self) -> None:
        """Give the module's variables their initial values and register them."""
        for buffer in self.memory:
            buffer.reset()
        for var, memory, shift in self.program.arrays:
            size = var.size or 0
            memory[shift : shift + size] = 0
            if var.initial:
                memory[shift : shift + size] = np.frombuffer(var.initial, np.uint8)
            mode = "in" if var.space == "const" else "inout"
            start = int(memory.ctypes.data) + shift
            self.memory.register(start, size, var.name, mode, keep=memory)

    def _pack(self, args: bytes | Sequence[object]) -> np.ndarray:
        out = np.zeros((self.program.param_bytes + 31) // 16 * 16, np.uint8)
        if isinstance(args, bytes | bytearray):
            if len(args) != self.program.param_bytes:
                raise PtxFaultError(
                    f"{self.program.name} takes {self.program.param_bytes} bytes of parameters, "
                    f"got {len(args)}."
                )
            out[: len(args)] = np.frombuffer(args, np.uint8)
            return out
        if len(args) != len(self.program.params):
            raise PtxFaultError(
                f"{self.program.name} takes {len(self.program.params)} parameters, got {len(args)}."
            )
        for (offset, size), value in zip(self.program.params.values(), args, strict=True):
            raw = value if isinstance(value, bytes) else np.asarray(value).tobytes()
            if len(raw) != size:
                raise PtxFaultError(
                    f"parameter at offset {offset} has {size} bytes, got {len(raw)}."
                )
            out[offset : offset + size] = np.frombuffer(raw, np.uint8)
        return out

    def _start(self, numbers: np.ndarray) -> None:
        """Set up registers, memories and thread states for one batch of blocks."""
        self.block_numbers, self.blocks_here = numbers, len(numbers)
        n = self.n = len(numbers) * self.threads
        lane = self.lane = np.arange(n)
        self.lane_block, self.lane_warp = lane // self.threads, lane // 32
        self.block_ids = np.stack(
            [
                numbers % self.grid[0],
                numbers // self.grid[0] % self.grid[1],
                numbers // (self.grid[0] * self.grid[1]),
            ],
            1,
        )
        self.registers = RegisterFile(self.program.layout, n)
        self.v = self.registers.views
        self._specials()
        self.shared = Arena(len(numbers), self.shared_bytes)
        self.shared_base = self.lane_block * self.shared.stride
        self.local = Arena(n if self.program.local_bytes else 0, self.program.local_bytes)
        self.local_base = lane * self.local.stride
        self.pc = np.zeros(n, np.int32)
        self.state = np.where(lane % self.threads < self.block_threads, RUN, DONE).astype(np.uint8)
        self.next: int | None = 0
        self.parked = False
        self._favoured: np.ndarray | None = None
        self._together = self.lane_warp  # threads that random orders keep together
        if self.program.uses("wgmma"):
            groups = (self.threads + 127) // 128
            self._together = self.lane_block * groups + lane % self.threads // 128
        self.whole = lane
        everyone = np.ones(n, bool)
        self.everyone = Group(True, everyone, lane, Blend(everyone))
        self.restore(self.everyone)
        self.block_tags: dict[int, np.ndarray] = {}
        self.barriers, self.copies = Barriers(self), AsyncCopies(self)
        self.mbarriers = MBarriers(self)
        self.races = self._race_detector()

    def _race_detector(self) -> NoRaces:
        if not self.checks.races:
            return NoRaces(self)
        return VectorClocks(self) if self._partial_sync() else Intervals(self)

    def _partial_sync(self) -> bool:
        """Whether anything but whole-block barriers orders the warps."""
        for inst in self.program.code:
            if inst.parts[0] == "mbarrier" or (
                inst.parts[0] in ("bar", "barrier") and "arrive" in inst.parts
            ):
                return True
            if inst.parts[0] in ("bar", "barrier") and "warp" not in inst.parts:
                count = 2 if "red" in inst.parts else 1
                named = inst.operands[count - 1 if "red" in inst.parts else 0] != "0"
                counted = "red" not in inst.parts and len(inst.operands) > 1
                if named or (counted and inst.operands[1] != str(self.block_threads)):
                    return True
        return False

    def _specials(self) -> None:
        t, put = self.lane % self.threads, self.registers.set_special
        bx, by, _ = self.block_shape
        for name, value in (
            ("%tid.x", t % bx),
            ("%tid.y", t // bx % by),
            ("%tid.z", t // (bx * by)),
            ("%laneid", t % 32),
            ("%warpid", t // 32),
            ("%nwarpid", self.warps),
            ("%nsmid", 1),
            ("%dynamic_smem_size", self.dynamic_shared),
            ("%total_smem_size", self.shared_bytes),
            ("%cluster_nctarank", 1),
        ):
            put(name, value)
        for axis, name in enumerate("xyz"):
            put(f"%ntid.{name}", self.block_shape[axis])
            put(f"%nctaid.{name}", self.grid[axis])
            put(f"%ctaid.{name}", self.block_ids[self.lane_block, axis])
            put(f"%cluster_nctaid.{name}", 1)
        bit = np.uint64(1) << (t % 32).astype(np.uint64)
        low, all32 = bit - np.uint64(1), np.uint64(0xFFFFFFFF)
        for name, bits in (
            ("eq", bit),
            ("lt", low),
            ("le", low | bit),
            ("gt", all32 & ~(low | bit)),
            ("ge", all32 & ~low),
        ):
            put(f"%lanemask_{name}", bits.astype(np.uint32))

    # -- scheduling -------------------------------------------------------------------------------

    def _loop(self) -> None:
        program, random = self.program, self.rng is not None
        while (start := self._select()) is not None:
            while True:
                block = program.block(start)
                self._execute(block)
                start = self.next
                if start is None:
                    break
                if random or self.parked or start >= self._others:
                    self.pc[self.whole] = start
                    break

    def _execute(self, block: Block) -> None:
        self.next = block.end
        block.runs += self.warps_here
        for op in block.ops:
            if op(self):
                return

    def _select(self) -> int | None:
        """Choose the next group; None when every thread of the batch has ended."""
        while True:
            run = self.state == RUN
            if self.rng is not None:
                run = self._favour(run)
            at = np.where(run, self.pc, _NEVER)
            start = int(at.min())
            if start != _NEVER:
                return self._activate(at == start, at, start)
            if (self.state == DONE).all():
                return None
            if not (self.barriers.release() or self.mbarriers.advance()):
                self._deadlock()

    def _activate(self, mask: np.ndarray, at: np.ndarray, start: int) -> int:
        if self.parked:
            mask = self._unpark(mask, start)
        if mask.all():
            self.restore(self.everyone)
            self._others = _NEVER
        else:
            self.set_mask(mask)
            self._others = int(np.where(mask, _NEVER, at).min())
        self.whole = self.idx
        self.warps_here = self.n // 32 if self.full else int(mask.reshape(-1, 32).any(1).sum())
        return start

    def _favour(self, run: np.ndarray) -> np.ndarray:
        """Under a seed: only a random set of warps runs, until none of them can."""
        if self._favoured is not None and self.rng.random() < 0.9:
            chosen = run & self._favoured[self._together]
            if chosen.any():
                return chosen
        count = int(self._together[-1]) + 1
        self._favoured = self.rng.random(count) < self.rng.choice((0.2, 0.5, 0.8))
        chosen = run & self._favoured[self._together]
        return chosen if chosen.any() else run

    def _unpark(self, mask: np.ndarray, start: int) -> np.ndarray:
        """Threads that wait for their warp at `start` join those of it that just came."""
        coming = mask.reshape(-1, 32).any(1)[self.lane_warp]
        join = (self.state == PARKED) & (self.pc == start) & coming
        self.state[join] = RUN
        self.parked = bool((self.state == PARKED).any())
        return mask | join

    def _deadlock(self) -> None:
        waiting = np.flatnonzero((self.state != DONE) & (self.state != RUN))
        state = self.state[waiting]
        kind = "divergent" if (state == PARKED).any() else "deadlock"
        places: dict[int, int] = {}
        for lane, kept in zip(waiting, state, strict=True):
            at = int(self.pc[lane]) - (0 if kept == PARKED else 1)
            places.setdefault(at, int(lane))
        text = []
        for at, lane in places.items():
            inst = self.program.code[at]
            count = int((self.pc[waiting] - (state != PARKED) == at).sum())
            text.append(f"{count} threads at PTX line {inst.line} ({inst.text[:80]})")
            self.report(kind, f"{count} threads wait here and nothing can release them", inst, lane)
        raise PtxFaultError(f"{self.program.name}: {kind}: " + "; ".join(text))

    # -- the group --------------------------------------------------------------------------------

    @property
    def group(self) -> Group:
        """The threads that execute now."""
        return Group(self.full, self.mask, self.idx, self.blend)

    def restore(self, group: Group) -> None:
        """Make `group` the threads that execute."""
        self.full, self.mask, self.idx, self.blend = group

    def set_mask(self, mask: np.ndarray) -> None:
        """Make the threads of `mask` the group."""
        self.full, self.mask, self.idx = False, mask, np.flatnonzero(mask)
        self.blend = Blend(mask)

    def narrow(self, slot: int, negated: bool) -> Group:
        """Keep the threads whose predicate holds; returns the group before."""
        before = self.group
        holds = self.v["pred"][slot]
        mask = before.mask & (~holds if negated else holds)
        if not mask.all():
            self.set_mask(mask)
        return before

    def only(self, rows: np.ndarray) -> Group:
        """Keep the threads self.idx[rows]; returns the group before."""
        before = self.group
        mask = np.zeros(self.n, bool)
        mask[before.idx[rows]] = True
        self.set_mask(mask)
        return before

    def pick(self, row: np.ndarray) -> np.ndarray:
        """The group's elements of a row."""
        return row if self.full else row.take(self.idx)

    # -- reports ----------------------------------------------------------------------------------

    def report(self, kind: str, message: str, inst: Instruction, lane: int) -> None:
        """Record an issue of thread number `lane` of the batch."""
        block, t = lane // self.threads, lane % self.threads
        bx, by, _ = self.block_shape
        thread = (t % bx, t // bx % by, t // (bx * by))
        where = tuple(int(x) for x in self.block_ids[block])
        self.issues.add(kind, message, inst, where, thread)

    def code_numbered(self, number: int) -> Instruction:
        """The instruction with a race map's number (1 and up)."""
        return self.program.code[number - 1]


def _orders_blocks(program: Program) -> bool:
    """Whether the kernel has fences or acquire loads that reach beyond a block."""
    for inst in program.code:
        if inst.opcode in ("membar.gl", "membar.sys"):
            return True
        if inst.parts[0] in ("fence", "ld", "atom", "red") and "acquire" in "".join(inst.parts):
            return True
        if inst.parts[0] == "fence" and {"gpu", "sys"} & set(inst.parts):
            return True
    return False
