"""ptxsim: runs the PTX that NVRTC makes, on the CPU, with numpy, and checks every step.

In: PTX text, buffers, a launch shape. Out: the buffers changed in place, findings, counts. Start
with `load`, `Memory` and `Machine`, or give torch code a `PtxLauncher` (in `ptxsim.launcher`).
"""

from __future__ import annotations

import gc

from .errors import Issue, IssueLog, PtxCheckError, PtxError, PtxFaultError, PtxParseError
from .machine import Checks, Machine
from .memory import Memory
from .parse import Module, parse
from .program import Program, link

__all__ = [
    "Checks",
    "Issue",
    "IssueLog",
    "Machine",
    "Memory",
    "Module",
    "Program",
    "PtxCheckError",
    "PtxError",
    "PtxFaultError",
    "PtxParseError",
    "link",
    "load",
    "parse",
]


def load(ptx: str | bytes, entry: str | None = None) -> Program:
    """Parse PTX text and make its entry (the only one, or that of the name) ready to run."""
    collects = gc.isenabled()
    gc.disable()  # all of the many small objects stay
    try:
        return link(parse(ptx.decode() if isinstance(ptx, bytes) else ptx), entry)
    finally:
        if collects:
            gc.enable()
