"""Every command and argument of `natcupy`, with its help. No torch: `natcupy --help` is quick.

In: nothing. Out: an `ArgumentParser` whose result names the room of the command (`room`).
"""

from __future__ import annotations

import argparse

from natcupy.cli.finetune_arguments import add_arguments as add_finetune_arguments
from natcupy.cli.usage import Parser, Version

DEFAULT_MODEL = "nat-digits"
_MODEL_HELP = (
    "name (nat-digits, nat-tiny, dinat-small ...), Hub repository (org/name), folder or file; "
    f"default: {DEFAULT_MODEL}, the small model inside the package that names drawn digits"
)


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    parser = Parser(
        prog="natcupy",
        description="Neighborhood attention models: classify pictures, look inside, check a setup.",
        epilog="natcupy COMMAND --help tells more. NATCUPY_DEBUG=1 shows tracebacks.",
    )
    parser.add_argument("--version", action=Version, help="print the version and leave")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _demo(commands)
    _classify(commands)
    _evaluate(commands)
    _predict(commands)
    _segment(commands)
    _detect(commands)
    _attend(commands)
    _models(commands)
    _info(commands)
    _doctor(commands)
    _finetune(commands)
    _train_digits(commands)
    _pull(commands)
    _push(commands)
    _convert(commands)
    _verify(commands)
    _publish(commands)
    return parser


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


def _segment(commands: argparse._SubParsersAction) -> None:
    parser = _command(
        commands, "segment", "segment", "name the class of every pixel: an overlay with a legend"
    )
    _add_dense(parser, "upernet", "overlay")
    parser.add_argument(
        "--labels",
        metavar="OUT",
        help="write the class numbers as grey pictures (as for -o; "
        ".png or another format without loss)",
    )
    parser.add_argument(
        "--multi-scale",
        action="store_true",
        help="average over six sizes and their mirror images, as the papers' second number",
    )


def _detect(commands: argparse._SubParsersAction) -> None:
    parser = _command(commands, "detect", "detect", "find objects: boxes, masks, labels and scores")
    _add_dense(parser, "mask-rcnn", "picture with what was found")
    parser.add_argument(
        "--score-threshold",
        type=_share,
        default=0.5,
        metavar="S",
        help="least score of an object, 0..1 (default: %(default)s)",
    )
    parser.add_argument(
        "--no-masks", dest="masks", action="store_false", help="boxes alone, which is faster"
    )


def _add_dense(parser: argparse.ArgumentParser, head: str, what: str) -> None:
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="picture files, or folders")
    parser.add_argument(
        "-o",
        "--output",
        metavar="OUT",
        help=f"write the {what}: a file for one picture, a folder for several",
    )
    parser.add_argument(
        "--model",
        required=True,
        metavar="MODEL",
        help=f"folder, Hub repository, or the authors' .pth file of a {head} model "
        "(`natcupy info NAME` tells where it is)",
    )
    _add_device(parser)
    _add_json(parser)


_DATA_HELP = (
    "a folder with one folder per class or a metadata.csv of file_name and label, either below "
    "train, val ... too, or a Hugging Face dataset: a saved folder, or org/name, org/name:config, "
    "each with @revision"
)


def _evaluate(commands: argparse._SubParsersAction) -> None:
    parser = _command(
        commands, "evaluate", "evaluate", "measure accuracy on labelled pictures; runs in torchrun"
    )
    parser.add_argument("data", metavar="DATA", help=_DATA_HELP)
    _add_model(parser)
    parser.add_argument(
        "--split", metavar="NAME", help="part of the data (default: val, validation, valid or test)"
    )
    parser.add_argument(
        "--class-map",
        metavar="FILE",
        help="which class of the model each folder is: lines of folder, tab or comma, class (an "
        "index or a label), or JSON (default: by name, else in sorted order)",
    )
    parser.add_argument("--per-class", action="store_true", help="a row for every class, too")
    _add_batches(parser)
    _add_json(parser)


def _predict(commands: argparse._SubParsersAction) -> None:
    parser = _command(
        commands, "predict", "predict", "write answers to any number of pictures into a table"
    )
    parser.add_argument(
        "data",
        nargs="+",
        metavar="DATA",
        help="picture files, folders (with what is below), or one Hugging Face dataset",
    )
    parser.add_argument(
        "--out", required=True, metavar="FILE", help="ends in .csv, .jsonl or .parquet"
    )
    _add_model(parser)
    parser.add_argument("--split", metavar="NAME", help="part of a dataset with several")
    parser.add_argument(
        "--topk", type=_positive, default=1, metavar="N", help="answers per picture (default: 1)"
    )
    parser.add_argument(
        "--features", action="store_true", help="also the pooled features, as column embedding"
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on with an unfinished run, if there is one"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the output, or drop an unfinished run"
    )
    parser.add_argument(
        "--shard",
        type=_shard,
        metavar="I/N",
        help="do the I-th of N shares (from 0), beside other processes that do the others; the "
        "last to end writes the output (torchrun shares by itself)",
    )
    parser.add_argument(
        "--part-pictures",
        type=_positive,
        default=1024,
        metavar="N",
        help="kept at a time: what a kill can lose (default: %(default)s)",
    )
    _add_batches(parser)
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
    parser.add_argument(
        "--forget-choices",
        action="store_true",
        help="first delete the choices of kernels that were measured on this machine's GPUs",
    )
    _add_json(parser)


def _finetune(commands: argparse._SubParsersAction) -> None:
    parser = _command(
        commands, "finetune", "finetune", "train a model on labelled pictures of your own"
    )
    add_finetune_arguments(parser)
    parser.add_argument(
        "--val-images",
        metavar="FOLDER",
        help="detection: where the pictures of --val are (default: --images)",
    )


def _train_digits(commands: argparse._SubParsersAction) -> None:
    parser = _command(
        commands, "train-digits", "train_digits", "train the bundled model anew (minutes on a CPU)"
    )
    parser.add_argument("--output", required=True, metavar="FOLDER", help="where the model goes")
    for name in ("pictures", "epochs", "seed"):
        parser.add_argument(
            f"--{name}", type=_natural, metavar="N", help="default: as the shipped weights"
        )


def _pull(commands: argparse._SubParsersAction) -> None:
    parser = _command(commands, "pull", "pull", "fetch a model's files from the Hub, verified")
    parser.add_argument("name", metavar="NAME", help="nat-tiny, or org/name[@revision]")
    parser.add_argument("folder", nargs="?", metavar="FOLDER", help="copy them there as well")
    _add_hub(parser)


def _push(commands: argparse._SubParsersAction) -> None:
    parser = _command(commands, "push", "push", "upload a model to the Hub, as one commit")
    parser.add_argument("model", metavar="MODEL", help="folder, file, or any name that loads")
    parser.add_argument("repo", metavar="REPO", help="owner/name; made if missing")
    visibility = parser.add_mutually_exclusive_group()
    visibility.add_argument("--private", action="store_true", default=None, dest="private")
    visibility.add_argument("--public", action="store_false", default=None, dest="private")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request instead")
    parser.add_argument("--message", metavar="TEXT", help="of the commit")
    parser.add_argument("--license", metavar="ID", help="such as mit, apache-2.0, cc-by-4.0")
    parser.add_argument(
        "--metric",
        action="append",
        default=[],
        type=_metric,
        metavar="NAME=VALUE",
        help="measured on --dataset; may be repeated",
    )
    parser.add_argument("--dataset", metavar="NAME", help="what the metrics were measured on")
    parser.add_argument("--trained-on", action="append", default=[], metavar="NAME")
    parser.add_argument("--tag", action="append", default=[], metavar="WORD")
    parser.add_argument("--base-model", metavar="REPO", help="whose weights were finetuned")
    parser.add_argument(
        "--overwrite-card", action="store_true", help="also replace a README.md edited on the Hub"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="ask the Hub what would change, and change nothing (needs a login, as a push does)",
    )
    _add_hub(parser)


def _convert(commands: argparse._SubParsersAction) -> None:
    parser = _command(
        commands, "convert", "convert", "turn a checkpoint into a safetensors folder, proven equal"
    )
    parser.add_argument("source", metavar="IN", help=".pth, .bin, .safetensors, folder or name")
    parser.add_argument("folder", metavar="OUT", help="folder to write")
    parser.add_argument(
        "--architecture", metavar="NAME", help="the model, where the file leaves it open"
    )
    parser.add_argument("--license", metavar="ID", help="of the weights, for the card")
    _add_hub(parser)


def _verify(commands: argparse._SubParsersAction) -> None:
    parser = _command(commands, "verify", "verify", "check the hashes of a folder or repository")
    parser.add_argument("name", metavar="NAME", help="folder, org/name[@revision], or a name")
    parser.add_argument("--against", metavar="REPO", help="the repository a folder is a copy of")
    _add_hub(parser)


def _publish(commands: argparse._SubParsersAction) -> None:
    parser = _command(
        commands, "publish", "publish", "convert released weights and push them with their cards"
    )
    parser.add_argument("names", nargs="+", metavar="NAME", help="nat-tiny, dinat-large-384 ...")
    parser.add_argument("--org", required=True, metavar="ORG", help="user or organisation")
    parser.add_argument("--dry-run", action="store_true", help="everything but the push")
    parser.add_argument("--originals", metavar="FOLDER", help="the authors' .pth files")
    parser.add_argument("--private", action="store_true", default=None)
    _add_hub(parser)


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


def _add_batches(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--batch-size", type=_positive, default=64, metavar="N", help="default: %(default)s"
    )
    parser.add_argument(
        "--workers",
        type=_natural,
        metavar="N",
        help="processes that prepare pictures (default: by the number of cores; 0: none)",
    )
    _add_device(parser)
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="of the model (default: %(default)s)",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def _add_hub(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit (default: main)")
    parser.add_argument("--cache-dir", metavar="FOLDER", help="default: as the Hub's client has it")
    _add_json(parser)


def _metric(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    try:
        return name, float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be NAME=NUMBER, got {text!r}") from None


def _positive(text: str) -> int:
    value = _natural(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, got {text!r}") from None
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must lie in 0..1, got {text!r}")
    return value


def _natural(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 0, got {text!r}")
    return int(text)


def _shard(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise argparse.ArgumentTypeError(f"must be I/N with I in 0..N-1, got {text!r}")
    return int(index), int(count)


def _point(text: str) -> tuple[float, float]:
    try:
        x, y = (float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be two numbers X,Y, got {text!r}") from None
    if not (0 <= x <= 1 and 0 <= y <= 1):
        raise argparse.ArgumentTypeError(f"must lie in 0..1, got {text!r}")
    return x, y
