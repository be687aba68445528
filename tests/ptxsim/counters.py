"""What a launch did: instructions by opcode, and (when asked) memory traffic.

In: every executed block of instructions, and the addresses of every shared and global access. Out:
`instructions` (warp instructions by opcode) and `traffic`: shared-memory wavefronts beside the
fewest possible (the difference is bank conflicts), 32-byte global sectors and bytes, local-memory
bytes.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from .machine import Machine
    from .program import Program


class Counters:
    """Counts of one launch."""

    def __init__(self, traffic: bool):
        self.wants_traffic = traffic
        self.instructions: Counter[str] = Counter()
        self.traffic: Counter[str] = Counter()

    @property
    def total(self) -> int:
        """All warp instructions."""
        return sum(self.instructions.values())

    def collect(self, program: Program) -> None:
        """Turn the runs of each block of instructions into counts, and clear them."""
        for block in program.blocks.values():
            for inst in program.code[block.start : block.end]:
                self.instructions[inst.opcode] += block.runs
            block.runs = 0

    def shared(self, m: Machine, kind: str, raw: np.ndarray, size: int) -> None:
        """Count the wavefronts of one shared access: each bank serves one word a wavefront.

        A warp's access is cut into phases of 128 bytes asked for, as wide accesses are.
        """
        per_phase = max(1, 128 // max(size, 4))
        lane = m.idx % 32
        phase = m.lane_warp[m.idx] * 32 + lane // per_phase
        words = max(1, size // 4)
        word = (raw[:, None] // 4 + np.arange(words)).reshape(-1)
        key = _distinct((np.repeat(phase, words) << 32) | word)
        bank = (key >> 32) * 32 + (key & 0xFFFFFFFF) % 32
        banks, uses = np.unique(bank, return_counts=True)
        phases, first = np.unique(banks // 32, return_index=True)
        self.traffic[f"{kind} wavefronts"] += int(np.maximum.reduceat(uses, first).sum())
        self.traffic[f"{kind} ideal"] += len(phases)

    def global_(self, m: Machine, kind: str, address: np.ndarray, size: int) -> None:
        """Count sectors and bytes of one global access."""
        key = (m.lane_warp[m.idx] << 48) | (address // 32)
        if size > 32:
            key = np.concatenate([key, key + 1])
        self.traffic[f"global {kind} sectors"] += len(_distinct(key))
        self.traffic[f"global {kind} bytes"] += size * len(address)

    def local(self, kind: str, threads: int, size: int) -> None:
        """Count bytes of local memory."""
        self.traffic[f"local {kind} bytes"] += threads * size


def _distinct(numbers: np.ndarray) -> np.ndarray:
    """Each number once, in order; `np.unique` goes through a hash table, which takes far longer."""
    numbers = np.sort(numbers)
    return numbers[np.append(numbers[1:] != numbers[:-1], True)[: len(numbers)]]
