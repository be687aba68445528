"""Errors about the numbers of a run, told to whoever gave them as flags.

In: the arguments of `natcupy finetune`. Out: a block in which such errors end with the flags of the
fields that they name, and with what the recipe sets these to.
"""

from __future__ import annotations

import argparse
import contextlib
import re
from collections.abc import Iterator

from natcupy.cli.finetune_arguments import FIELDS, SPANS, given
from natcupy.train import TrainError
from natcupy.train.recipes import recipe_fields
from natcupy.zoo.config import ConfigError


@contextlib.contextmanager
def with_flags(arguments: argparse.Namespace) -> Iterator[None]:
    """Errors from within name the flags of the fields in their text."""
    try:
        yield
    except (ConfigError, TrainError, ImportError) as error:  # the last: of timm's parts
        flags = flags_of(str(error), arguments)
        if not flags:
            raise
        raise type(error)(f"{error} Flags: {', '.join(flags)}.") from error


def flags_of(text: str, arguments: argparse.Namespace) -> list[str]:
    """The flags of the fields that a text names, in its order; "(1 by --recipe x)" behind some."""
    names = sorted(
        # Behind a dash or beside a slash it is part of a flag, a path or another word.
        (match.start(), name)
        for name in (*FIELDS, *SPANS)
        if (match := re.search(rf"(?<![\w./-]){name}(?![\w/-])", text))
    )
    recipe = recipe_fields(arguments.recipe) if arguments.recipe else {}
    typed = given(arguments)
    flags = []
    for _, name in names:
        flag = "--" + name.replace("_", "-")
        if name in recipe and name not in typed:
            flag += f" ({recipe[name]} by --recipe {arguments.recipe})"
        flags.append(flag)
    return flags
