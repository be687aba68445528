"""The command `natcupy`: arguments come in, a printed answer and an exit status go out.

`parser` knows every argument, one room per command does its work and is loaded when asked for. Exit
status: 0 done, 1 it could not be done (one line on stderr says why), 2 wrong arguments.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module

from natcupy.cli.parser import build_parser

DEBUG_VARIABLE = "NATCUPY_DEBUG"
# What the library raises for a wrong value, a missing file, an unreachable Hub, a missing extra or
# a backend that cannot run. Anything else is a fault of natcupy's own and keeps its traceback.
_EXPECTED = (OSError, ValueError, ImportError, RuntimeError)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    _prepare_streams()
    try:
        arguments = build_parser().parse_args(argv)
    except SystemExit as stop:  # argparse has printed help, version or the usage error
        return stop.code if isinstance(stop.code, int) else 2
    try:
        room = import_module(f"natcupy.cli.{arguments.room}")
        status = room.run(arguments)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # `natcupy models | head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("natcupy: stopped", file=sys.stderr)
        return 130
    except _EXPECTED as error:
        if os.environ.get(DEBUG_VARIABLE) == "1":
            raise
        print(f"natcupy: error: {one_line(error)}", file=sys.stderr)
        return 1


def _prepare_streams() -> None:
    """Text that a stream's encoding lacks (names of files are any bytes) must not end a command."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by whoever started this process
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def one_line(error: BaseException) -> str:
    """An error's text without line breaks; its kind where it has no text."""
    if isinstance(error, OSError) and error.strerror and isinstance(error.filename, str):
        missing = isinstance(error, FileNotFoundError)
        return f"{error.filename}: {'no such file or folder' if missing else error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__
