"""argparse as `natcupy` uses it: errors in few lines, with what was probably meant.

In: the words of a command line. Out: a `Parser`, whose errors end the process with status 2.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Sequence
from typing import NoReturn, TextIO

MOST_USAGE = 10  # lines in front of an error


class Parser(argparse.ArgumentParser):
    """A command's own usage before its errors, in few lines, and what a misspelt word looks like.

    And an error where the help cannot be written, which argparse keeps to itself.
    """

    _words: Sequence[str] = ()  # being parsed

    def print_help(self, file: TextIO | None = None) -> None:
        """To stdout, whose errors are told."""
        print(self.format_help(), end="", file=file, flush=True)

    def parse_known_args(self, args=None, namespace=None):
        """As argparse's; unknown words of a command are its own errors."""
        self._words = sys.argv[1:] if args is None else args
        found, unknown = super().parse_known_args(args, namespace)
        if unknown and not self._has_commands():
            self.error(
                f"unrecognized arguments: {' '.join(unknown)}{self._flag_before(unknown[0])}"
            )
        return found, unknown

    def error(self, message: str) -> NoReturn:
        """Leave with status 2 and what is wrong."""
        usage = self.format_usage()
        if usage.count("\n") > MOST_USAGE:
            usage = f"usage: {self.prog} ... ({self.prog} --help lists the options)\n"
        self.exit(2, f"{usage}{self.prog}: error: {message}{self._hint()}\n")

    def _check_value(self, action: argparse.Action, value: object) -> None:
        if isinstance(action, argparse._SubParsersAction) and value not in action.choices:
            near = difflib.get_close_matches(str(value), action.choices, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(action.choices)}"
            raise argparse.ArgumentError(None, f"no command {value!r}; {hint}")
        super()._check_value(action, value)

    def _has_commands(self) -> bool:
        return any(isinstance(action, argparse._SubParsersAction) for action in self._actions)

    def _flag_before(self, word: str) -> str:
        """That an option takes no value, where a word behind it is one too many."""
        words = list(self._words)
        before = words[words.index(word) - 1] if word in words[1:] else ""
        action = self._option_string_actions.get(before)
        return "" if action is None or action.nargs != 0 else f"; {before} takes no value"

    def _hint(self) -> str:
        """The option that the first misspelt one looks like, in words."""
        for word in () if self._has_commands() else self._words:
            name = word.partition("=")[0]
            if name == "--":
                break
            known = self._option_string_actions
            if name.startswith("--") and not any(option.startswith(name) for option in known):
                near = difflib.get_close_matches(name, known, n=1)
                return f"; did you mean {near[0]}?" if near else ""
        return ""


class Version(argparse.Action):
    """`--version`, which asks the package only when it is used."""

    def __init__(self, option_strings: list[str], dest: str, **kwargs: object) -> None:
        super().__init__(option_strings, dest, nargs=0, **kwargs)

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        """Print it and leave."""
        from natcupy import __version__

        print(f"natcupy {__version__}", flush=True)
        parser.exit()
