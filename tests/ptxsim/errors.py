"""What the interpreter says when something is wrong.

In: findings of the checks, each tied to an instruction and a thread. Out: `Issue` records
(deduplicated, counted) in an `IssueLog`, and the exceptions of this package.

A *fault* ends the launch, as it would on a device (`PtxFaultError`). An *issue* is recorded and
the launch goes on, so that one run shows as much as possible; whoever launched decides what to
make of the list.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .parse import Instruction

#: Every kind of finding, with what it means.
KINDS = {
    "out-of-bounds": "an address outside every buffer, or outside shared or local memory",
    "misaligned": "an address that is no multiple of the size of the access",
    "uninitialised": "memory read before anything wrote it, or before its asynchronous copy landed",
    "read-only": "a write to a buffer that was registered as an input",
    "non-coherent": "a word read through the read-only path and written in the same launch",
    "race": "two threads touch the same word, at least one writes, and nothing orders them",
    "divergent": "a warp-wide or block-wide instruction that not all its threads reach together",
    "unwaited copy": "a thread ends while its asynchronous copies are still in flight",
    "deadlock": "no thread can go on",
    "mbarrier": "an mbarrier used before it was initialised, or its counts are off",
    "trap": "the kernel stopped itself (trap, or a failed device assertion)",
}


class PtxError(Exception):
    """Base of everything this package raises."""


class PtxParseError(PtxError):
    """The PTX text is malformed or uses something the interpreter does not know."""


class PtxFaultError(PtxError):
    """The launch cannot go on: what a device reports as an error or a hang."""


class PtxCheckError(PtxError, AssertionError):
    """A launch ran, but the checks found something. `issues` has the records."""

    def __init__(self, kernel: str, issues: list[Issue]):
        self.issues = issues
        lines = "\n".join(f"  {issue}" for issue in issues[:12])
        more = f"\n  and {len(issues) - 12} more" if len(issues) > 12 else ""
        super().__init__(f"kernel {kernel}: {len(issues)} finding(s)\n{lines}{more}")


@dataclass
class Issue:
    """One finding, at one instruction; `count` says how often it came up again there."""

    kind: str
    message: str
    instruction: str
    ptx_line: int
    source: str
    block: tuple[int, int, int] | None
    thread: tuple[int, int, int] | None
    count: int = 1

    def __str__(self) -> str:
        where = f"{self.source}, " if self.source else ""
        who = f", block {self.block} thread {self.thread}" if self.block is not None else ""
        times = f" (x{self.count})" if self.count > 1 else ""
        return (
            f"{self.kind}: {self.message}{who} [{where}PTX line {self.ptx_line}: "
            f"{self.instruction}]{times}"
        )


class IssueLog:
    """Collects issues: one record per kind and instruction, at most `limit` records."""

    def __init__(self, limit: int = 200):
        self._limit = limit
        self._by_key: dict[tuple[str, int], Issue] = {}

    def add(
        self,
        kind: str,
        message: str,
        inst: Instruction,
        block: tuple[int, int, int] | None = None,
        thread: tuple[int, int, int] | None = None,
    ) -> None:
        """Record one finding; a repeat at the same instruction only raises its count."""
        if kind not in KINDS:
            raise KeyError(f"unknown kind of issue {kind!r}")
        key = (kind, inst.line)
        if key in self._by_key:
            self._by_key[key].count += 1
        elif len(self._by_key) < self._limit:
            self._by_key[key] = Issue(
                kind, message, inst.text[:140], inst.line, inst.source, block, thread
            )

    def kinds(self) -> set[str]:
        """The kinds of everything recorded."""
        return {issue.kind for issue in self._by_key.values()}

    def __iter__(self) -> Iterator[Issue]:
        return iter(self._by_key.values())

    def __len__(self) -> int:
        return len(self._by_key)
