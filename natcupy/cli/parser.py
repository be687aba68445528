"""Every command and argument of `natcupy`, with its help. No torch: `natcupy --help` is quick.

In: nothing. Out: an `ArgumentParser` whose result names the room of the command (`room`).
"""

from __future__ import annotations

import argparse

DEFAULT_MODEL = "nat-digits"
_MODEL_HELP = (
    "name (nat-digits, nat-tiny, dinat-small ...), Hub repository (org/name), folder or file; "
    f"default: {DEFAULT_MODEL}, the small model inside the package that names drawn digits"
)


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    parser = argparse.ArgumentParser(
        prog="natcupy",
        description="Neighborhood attention models: classify pictures, look inside, check a setup.",
        epilog="natcupy COMMAND --help tells more. NATCUPY_DEBUG=1 shows tracebacks.",
    )
    parser.add_argument("--version", action=_Version, help="print the version and leave")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _demo(commands)
    _classify(commands)
    _attend(commands)
    _models(commands)
    _info(commands)
    _doctor(commands)
    _train_digits(commands)
    return parser


class _Version(argparse.Action):
    """`--version`, which asks the package only when it is used."""

    def __init__(self, option_strings: list[str], dest: str, **kwargs: object) -> None:
        super().__init__(option_strings, dest, nargs=0, **kwargs)

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        from natcupy import __version__

        print(f"natcupy {__version__}")
        parser.exit()


def _demo(commands: argparse._SubParsersAction) -> None:
    parser = _command(commands, "demo", "demo", "classify the bundled pictures, offline")
    _add_device(parser)
    _add_json(parser)


def _classify(commands: argparse._SubParsersAction) -> None:
    parser = _command(commands, "classify", "classify", "say what is on pictures")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="picture files, or folders")
    _add_model(parser)
    parser.add_argument(
        "--topk", type=_positive, default=5, metavar="N", help="answers per picture (default: 5)"
    )
    parser.add_argument(
        "--batch-size", type=_positive, default=16, metavar="N", help="default: %(default)s"
    )
    _add_device(parser)
    _add_json(parser)


def _attend(commands: argparse._SubParsersAction) -> None:
    parser = _command(
        commands, "attend", "attend", "draw where one place of a picture looks: an attention map"
    )
    parser.add_argument("image", metavar="IMAGE", help="picture file")
    parser.add_argument(
        "-o", "--output", default="attention.png", metavar="FILE", help="default: %(default)s"
    )
    _add_model(parser)
    parser.add_argument(
        "--query",
        type=_point,
        default=(0.5, 0.5),
        metavar="X,Y",
        help="the place that looks, as fractions of the picture's width and height as the model "
        "sees it (default: 0.5,0.5, the middle)",
    )
    parser.add_argument("--stage", type=int, metavar="N", help="level of the model, from 0")
    parser.add_argument(
        "--block", type=int, metavar="N", help="block of that level, from 0; -1 is the last"
    )
    parser.add_argument("--head", type=int, metavar="N", help="one head alone (default: all)")
    _add_device(parser)


def _models(commands: argparse._SubParsersAction) -> None:
    parser = _command(commands, "models", "models", "list the models")
    parser.add_argument(
        "pattern", nargs="?", default="*", metavar="PATTERN", help='such as "dinat*"'
    )
    _add_json(parser)


def _info(commands: argparse._SubParsersAction) -> None:
    parser = _command(commands, "info", "info", "tell about one model: size, work, source, licence")
    parser.add_argument("model", metavar="MODEL", help="name, Hub repository, folder or file")
    _add_json(parser)


def _doctor(commands: argparse._SubParsersAction) -> None:
    parser = _command(
        commands, "doctor", "doctor", "what is installed, what runs, and a check that it is right"
    )
    _add_json(parser)


def _train_digits(commands: argparse._SubParsersAction) -> None:
    parser = _command(
        commands, "train-digits", "train_digits", "train the bundled model anew (minutes on a CPU)"
    )
    parser.add_argument("--output", required=True, metavar="FOLDER", help="where the model goes")
    for name in ("pictures", "epochs", "seed"):
        parser.add_argument(
            f"--{name}", type=_natural, metavar="N", help="default: as the shipped weights"
        )


def _command(
    commands: argparse._SubParsersAction, name: str, room: str, text: str
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.set_defaults(room=room)
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default=DEFAULT_MODEL, metavar="MODEL", help=_MODEL_HELP)


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", metavar="DEVICE", help="cpu, cuda, cuda:1 ... (default: a GPU if there is one)"
    )


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def _positive(text: str) -> int:
    value = _natural(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


def _natural(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}")
    return int(text)


def _point(text: str) -> tuple[float, float]:
    try:
        x, y = (float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be two numbers X,Y, got {text!r}") from None
    if not (0 <= x <= 1 and 0 <= y <= 1):
        raise argparse.ArgumentTypeError(f"must lie in 0..1, got {text!r}")
    return x, y
