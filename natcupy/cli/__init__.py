"""The command `natcupy`: arguments come in, a printed answer and an exit status go out.

`parser` knows every argument, one room per command does its work and is loaded when asked for. Exit
status: 0 done, 1 it could not be done (one line on stderr says why), 2 wrong arguments.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from typing import Any

from natcupy.cli.parser import build_parser

DEBUG_VARIABLE = "NATCUPY_DEBUG"
# What the library raises for a wrong value, a missing file, an unreachable Hub, a missing extra, a
# backend that cannot run, or too little memory; and warnings that PYTHONWARNINGS makes errors.
# Anything else is a fault of natcupy's own and keeps its traceback.
_EXPECTED = (OSError, ValueError, ImportError, RuntimeError, MemoryError, Warning)

# Arguments that name a model, data, a file or a folder, or several of them.
_PLACES = (
    "model", "backbone", "name", "names", "source", "folder", "output", "labels", "out", "data",
    "images", "image", "val", "val_images", "class_map", "repo", "push", "org", "against",
    "originals", "cache_dir",
)  # fmt: skip

_USUAL_FORMAT = warnings.formatwarning


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    _prepare_streams()
    usual, warnings.formatwarning = warnings.formatwarning, _format_warning
    try:
        arguments = build_parser().parse_args(argv)
        with _ended_in_order():
            _refuse_empty(vars(arguments))
            room = import_module(f"natcupy.cli.{arguments.room}")
            status = room.run(arguments)
            sys.stdout.flush()
            return status
    except SystemExit as stop:  # argparse has printed help, version or the usage error
        return stop.code if isinstance(stop.code, int) else 2
    except BrokenPipeError:  # `natcupy models | head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt as stop:
        print("natcupy: stopped", file=sys.stderr)
        return 128 + (stop.number if isinstance(stop, _Ended) else signal.SIGINT)
    except _EXPECTED as error:
        if os.environ.get(DEBUG_VARIABLE) == "1":
            raise
        place = "standard output: " if _is_of_output(error) else ""
        print(f"natcupy: error: {place}{one_line(error)}", file=sys.stderr)
        return 1
    finally:
        warnings.formatwarning = usual


def _refuse_empty(arguments: Mapping[str, Any]) -> None:
    """A variable of the shell that is not set names no model, nor the current folder."""
    for name in _PLACES:
        given = arguments.get(name)
        for value in given if isinstance(given, list) else [given]:
            if isinstance(value, str) and not value.strip():
                raise ValueError(
                    f"{name.upper().replace('_', '-')} must be a name or a path, got {value!r}. "
                    "If it comes from a variable of the shell, set that."
                )


def _prepare_streams() -> None:
    """Text that a stream's encoding lacks (names of files are any bytes) must not end a command."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by whoever started this process
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


class _Ended(KeyboardInterrupt):
    """The system, a scheduler or a user asks this process to end."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


@contextlib.contextmanager
def _ended_in_order() -> Iterator[None]:
    """Within, SIGTERM and SIGHUP end the command as Ctrl-C does, which removes temporary files.

    Not under torchrun: a process that waits for another one would not see the signal.
    """

    def end(number: int, frame: Any) -> None:
        signal.signal(number, signal.SIG_DFL)  # who asks twice does not want to wait
        raise _Ended(number)

    taken = []
    for name in () if "LOCAL_RANK" in os.environ else ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows knows one of them
        if number is not None and signal.getsignal(number) is signal.SIG_DFL:
            with contextlib.suppress(ValueError):  # not in the main thread
                signal.signal(number, end)
                taken.append(number)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


def _is_of_output(error: BaseException) -> bool:
    """Whether a `print` or `flush` of a command's failed: those errors name no file."""
    if not isinstance(error, OSError) or error.errno is None or error.filename is not None:
        return False
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    return place is not None and place.tb_frame.f_globals["__name__"].startswith("natcupy.cli")


def _format_warning(message: Any, category: type[Warning], *place: Any) -> str:
    """A warning of natcupy's own without the line of code, which means nothing to its reader."""
    if category.__module__.startswith("natcupy"):
        return f"natcupy: warning: {' '.join(str(message).split())}\n"
    return _USUAL_FORMAT(message, category, *place)


def one_line(error: BaseException) -> str:
    """An error's text without line breaks; its kind where it has no text."""
    if isinstance(error, OSError) and error.strerror and isinstance(error.filename, str):
        missing = isinstance(error, FileNotFoundError)
        return f"{error.filename}: {'no such file or folder' if missing else error.strerror}"
    if isinstance(error, BlockingIOError) and error.filename is None:  # of fork
        return f"no process can be started ({error.strerror}); try --workers 0, or ulimit -u"
    if isinstance(error, OSError) and error.strerror and error.filename is None:
        return error.strerror
    if isinstance(error, MemoryError) and not str(error):
        return "this needs more memory than there is"
    return " ".join(str(error).split()) or type(error).__name__
