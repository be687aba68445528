"""`natcupy finetune`: pictures and a model become a finetuned model's folder.

In: DATA, a model, a recipe and numbers over it. Out: the folder of the run; on stderr a line per
epoch, on stdout what came out. Under `torchrun` or `accelerate launch` all processes do this
together.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from natcupy.cli import console
from natcupy.cli.finetune_arguments import given
from natcupy.cli.finetune_errors import with_flags
from natcupy.cli.finetune_resume import command_of, completed
from natcupy.data import find
from natcupy.hub.locate import known_row
from natcupy.train import TrainConfig, finetune, load_model
from natcupy.train.checkpoint import STATE
from natcupy.train.finetuning import describe, is_first
from natcupy.train.run import CHECKPOINT

# Words that only some tasks know.
BELONGS_TO = {
    "backbone": ("segmentation", "detection"),
    "reduce_zero_label": ("segmentation",),
    "images": ("detection",),
    "val_images": ("detection",),
}


def run(arguments: argparse.Namespace) -> int:
    """Do it; errors about a number name its flag."""
    arguments = completed(arguments)
    _refuse_other_task(arguments)
    _refuse_without_meaning(arguments)
    try:
        with with_flags(arguments):
            if arguments.task == "classification":
                return _classifier(arguments)
            from natcupy.cli import finetune_dense

            return finetune_dense.run(arguments)
    except KeyboardInterrupt:
        if is_first() and (Path(arguments.output) / CHECKPOINT / STATE).is_file():
            print(
                f"natcupy: natcupy finetune --resume {shlex.quote(arguments.output)} goes on from "
                "the last checkpoint",
                file=sys.stderr,
            )
        raise


def _refuse_other_task(arguments: argparse.Namespace) -> None:
    """Before anything is looked for: what the model's name tells."""
    row = known_row(arguments.model)
    if row is None or row.task == arguments.task:
        return
    hint = ""
    if row.task == "classification":
        hint = f" With --backbone {arguments.model}, a model of that task starts from its weights."
    raise ValueError(
        f"--task must be {row.task} for {arguments.model}, got {arguments.task}.{hint}"
    )


def _refuse_without_meaning(arguments: argparse.Namespace) -> None:
    """Words that would change nothing."""
    for name, tasks in BELONGS_TO.items():
        if getattr(arguments, name) and arguments.task not in tasks:
            raise ValueError(
                f"--{name.replace('_', '-')} belongs to --task {' and '.join(tasks)}, got it with "
                f"{arguments.task}; leave it out, or name that task."
            )
    if arguments.backbone and arguments.from_scratch:
        raise ValueError(
            f"--backbone {arguments.backbone} and --from-scratch exclude each other: the backbone "
            "begins with those weights or with fresh ones; leave one of them out."
        )


def _classifier(arguments: argparse.Namespace) -> int:
    """Find the data, load the model, train, report."""
    config = TrainConfig.of(arguments.recipe, **given(arguments))
    split = find(
        arguments.data, seed=config.seed, val_fraction=arguments.val_fraction, val=arguments.val
    )
    if is_first() and not arguments.json:
        for note in split.notes:
            print(note, flush=True)
    model = load_model(
        arguments.model,
        config,
        pretrained=not arguments.from_scratch,
        kernel_size=arguments.kernel_size,
    )
    result = finetune(
        model,
        split.train,
        split.val,
        config,
        data_name=split.name,
        push=arguments.push,
        private=arguments.private,
        license=arguments.license,
        command=command_of(arguments),
    )
    if not result.main:
        return 0
    if arguments.json:
        console.print_json(
            {
                "scores": result.scores,
                "epoch": result.epoch,
                "seconds": result.seconds,
                "peak_bytes": result.peak_bytes,
                "folder": str(result.folder),
                "pushed": vars(result.pushed) if result.pushed else None,
            }
        )
    else:
        print(console.facts(describe(result, split.classes)))
    return 0
