"""The arguments of `natcupy finetune`: those of the command, and one flag per number of a run.

In: a parser. Out: the parser with them. No torch here: the numbers' rules, and what they are where
a flag is not given, stand in `natcupy.train.TrainConfig`, whose fields the flags are named after.
"""

from __future__ import annotations

import argparse

TASKS = ("classification", "segmentation", "detection")
RECIPES = (
    "finetune", "nat-in1k", "nat-isotropic-base-in1k", "dinat-22k-to-1k-224",
    "dinat-22k-to-1k-384", "dinat-s-22k-to-1k-384",
)  # fmt: skip

# field of TrainConfig: (type of the value or None for a switch, metavar, help)
FIELDS: dict[str, tuple[type | None, str, str]] = {
    "epochs": (
        int,
        "N",
        "passes over the pictures (default: 20); with --resume, more than before extend a finished "
        "run, from there on at the rates of a run of N",
    ),
    "batch_size": (int, "N", "pictures per process and forward pass (default: 32)"),
    "accumulate": (int, "N", "forward passes per step (default: 1)"),
    "lr": (float, "RATE", "learning rate of AdamW, for a step as it is (default: 5e-4)"),
    "min_lr": (float, "RATE", "at the end (default: 1e-6)"),
    "schedule": (str, "NAME", "cosine, linear or constant (default: cosine)"),
    "warmup_epochs": (float, "N", "of linear rise (default: a twentieth)"),
    "warmup_lr": (float, "RATE", "where the rise begins (default: 1e-6)"),
    "cooldown_epochs": (int, "N", "more epochs at the last rate (default: 0)"),
    "weight_decay": (float, "X", "default: 0.05"),
    "decay_bias_tables": (None, "", "decay relative positional bias tables too"),
    "eps": (float, "X", "of AdamW (default: 1e-8)"),
    "clip_grad": (float, "NORM", "largest norm of the gradient, 0 for any (default: 5)"),
    "layer_decay": (float, "X", "rate of a layer over the next one's (default: 0.8, dense 1)"),
    "ema_decay": (float, "X", "moving average of the weights, 0 for none (default: 0)"),
    "drop_path": (float, "RATE", "stochastic depth (default: the model's)"),
    "label_smoothing": (float, "X", "default: 0.1"),
    "mixup": (float, "ALPHA", "0 for none (default: 0)"),
    "cutmix": (float, "ALPHA", "0 for none (default: 0)"),
    "mix_prob": (float, "P", "of a batch being mixed (default: 1)"),
    "mix_switch": (float, "P", "of CutMix where both are on (default: 0.5)"),
    "auto_augment": (str, "POLICY", "such as rand-m9-mstd0.5-inc1 (default: none)"),
    "random_erasing": (float, "P", "default: 0"),
    "flip": (float, "P", "of mirroring (default: 0.5, for drawings 0)"),
    "color_jitter": (float, "X", "largest change (default: 0.1)"),
    "affine": (float, "X", "size of small turns and shifts (default: 0, for drawings 0.05)"),
    "interpolation": (str, "NAME", "of crops: random (default: the model's)"),
    "mixed_precision": (str, "NAME", "no, fp16 or bf16 (default: no)"),
    "fsdp": (None, "", "shard the model over the processes (GPUs)"),
    "channels_last": (None, "", "convolutions in channels-last memory (default: yes)"),
    "grad_checkpointing": (None, "", "recompute activations: less memory, more time"),
    "head": (
        str,
        "WHAT",
        "auto, keep or fresh (default: auto, which keeps the rows of classes that the model has "
        "under the same name)",
    ),
    "image_size": (int, "PIXELS", "side of the pictures (default: the model's)"),
    "keep": (
        str,
        "WHICH",
        "best or last epoch's weights; of equally good epochs the one with the lower loss is best "
        "(default: best)",
    ),
    "eval_every": (int, "N", "epochs between examinations (default: 1)"),
    "checkpoint_steps": (int, "N", "steps between checkpoints, 0 for epochs (default: 0)"),
    "progress": (None, "", "a bar (default: on a terminal)"),
    "seed": (int, "N", "default: 0"),
    "workers": (
        int,
        "N",
        "processes that read pictures, 0 for none (default: by the cores beside a GPU; on a CPU as "
        "many as torch's threads leave free)",
    ),
}
SPANS = {
    "betas": "of AdamW (default: 0.9 0.999)",
    "crop_scale": "area of random crops (default: 0.35 1)",
    "crop_ratio": "width over height of random crops (default: 0.75 1.333)",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Everything that `natcupy finetune` understands; `refuse` ends it with the usage."""
    parser.set_defaults(refuse=parser.error)  # what is required, a run that goes on may tell
    parser.add_argument(
        "data",
        nargs="?",
        metavar="DATA",
        help="folder with a folder of pictures per class, or a metadata.csv of file_name and label "
        "beside them, or train and val of either kind; or a Hugging Face dataset (org/name, or a "
        "folder it was saved to). For segmentation: a folder with images and masks; for detection: "
        "a COCO file. With --resume alone: the folder of the run",
    )
    parser.add_argument("--model", metavar="MODEL", help="name, folder or org/name")
    parser.add_argument("--output", metavar="FOLDER", help="of the run")
    parser.add_argument("--task", choices=TASKS, help=f"default: {TASKS[0]}")
    parser.add_argument(
        "--recipe", choices=RECIPES, metavar="NAME",
        help=f"named numbers: {', '.join(RECIPES)} (default: {RECIPES[0]})",
    )  # fmt: skip
    parser.add_argument(
        "--val", metavar="PART", help="part of the data, or other data, to hold out"
    )
    parser.add_argument(
        "--val-fraction", type=float, metavar="X",
        help="share that is held out where the data has no held-out part: of every class, or, for "
        "segmentation and detection, of the pictures (default: 0.1)",
    )  # fmt: skip
    parser.add_argument("--images", metavar="FOLDER", help="detection: where the pictures are")
    parser.add_argument(
        "--reduce-zero-label", action="store_true", help="segmentation: 0 in a mask means no class"
    )
    parser.add_argument(
        "--backbone", metavar="MODEL",
        help="segmentation, detection: classifier whose weights the backbone of a fresh model "
        "starts from",
    )  # fmt: skip
    parser.add_argument("--from-scratch", action="store_true", help="begin with fresh weights")
    parser.add_argument(
        "--kernel-size", type=int, metavar="K", help="another window; bias tables are resized"
    )
    parser.add_argument(
        "--resume", action="store_true",
        help="continue the run, if there is one: natcupy finetune --resume RUN does so with the "
        "pictures and numbers that it began with, and what is typed as well must be the same, but "
        "--epochs, and --batch-size and --accumulate for another number of processes",
    )  # fmt: skip
    parser.add_argument("--push", metavar="REPO", help="to the Hub at the end: owner/name")
    parser.add_argument("--private", action="store_true", default=None, help="if it has to be made")
    parser.add_argument("--license", metavar="ID", help="of the new weights (default: the model's)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    numbers = parser.add_argument_group("numbers of the run (over those of the recipe)")
    for name, (kind, metavar, text) in FIELDS.items():
        flag = "--" + name.replace("_", "-")
        if kind is None:
            switch = argparse.BooleanOptionalAction
            numbers.add_argument(flag, action=switch, default=None, help=text)
        else:
            numbers.add_argument(flag, type=kind, metavar=metavar, help=text)
    for name, text in SPANS.items():
        flag = "--" + name.replace("_", "-")
        numbers.add_argument(flag, type=float, nargs=2, metavar=("A", "B"), help=text)


def given(arguments: argparse.Namespace) -> dict[str, object]:
    """The fields of a TrainConfig that the command line sets."""
    names = (*FIELDS, *SPANS, "output", "resume")
    values = {name: getattr(arguments, name) for name in names}
    return {name: value for name, value in values.items() if value is not None}
