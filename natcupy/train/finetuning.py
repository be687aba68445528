"""Finetuning from pictures to a model's folder and, if wanted, to the Hub.

In: a model, labelled pictures, a `TrainConfig`. Out: a `Result`; in the folder of the run `model`
(config, weights, preprocessing, card), `log.csv`, `log.json`, `curves.png` and `confusion.png`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from natcupy.data import Data, Source, find, find_split
from natcupy.data.find import aligned
from natcupy.train import loading, plots
from natcupy.train.classification import CONFUSION_PNG, MODEL, Classification
from natcupy.train.config import TrainConfig
from natcupy.train.engine import Trained, train
from natcupy.train.loading import is_first
from natcupy.train.run import LOG_CSV, LOG_JSON, environment
from natcupy.zoo import ImageModel
from natcupy.zoo.preprocess import Preprocess

if TYPE_CHECKING:
    from natcupy.hub import Pushed
    from natcupy.hub import Source as Origin

CURVES_PNG = "curves.png"


@dataclass
class Result:
    """What finetuning leaves.

    Attributes:
        model: on the CPU, in eval mode, with the weights that were kept.
        folder: of the run; the model's is `folder / "model"`.
        scores: of these weights on the held-out pictures: `val_loss`, `val_accuracy` and, beyond
            five classes, `val_top5`, as fractions; empty without held-out pictures.
        confusion: `[classes, classes]` counts, class by answer; None without.
        history: a row per epoch: rates, losses, accuracies, pictures per second, peak memory.
        epoch: whose weights were kept, counted from 1.
        peak_bytes: the most memory a process held: of the GPU, or on a CPU in all.
        seconds: of the whole run.
        pushed: where the model went on the Hub.
        main: whether this process wrote; in others of a run nothing was written or pushed.
    """

    model: ImageModel
    folder: Path
    scores: dict[str, float]
    confusion: np.ndarray | None
    history: list[dict[str, Any]]
    epoch: int
    peak_bytes: int
    seconds: float
    pushed: Pushed | None = None
    main: bool = True


def finetune(
    model: nn.Module | str,
    train_data: Source | Data,
    val_data: Source | Data | None,
    config: TrainConfig,
    *,
    data_name: str | None = None,
    push: str | None = None,
    private: bool | None = None,
    license: str | None = None,
    token: str | bool | None = None,
    command: dict[str, Any] | None = None,
) -> Result:
    """Train a classifier on labelled pictures, or continue to.

    Under `torchrun` or `accelerate launch` every process calls this with the same arguments.

    Args:
        model: of the zoo, trained in place; or its name, for `natcupy.train.load_model`. A model
            that PEFT wrapped trains its adapters, which are merged into the result.
        train_data: a `natcupy.data.Source`; or what `natcupy.data.find` understands, which then
            also gives the held-out pictures.
        val_data: held-out pictures, matched to the classes by name; None for none, or with a path
            as `train_data` for those that `find` sets apart.
        config: how, and where to.
        data_name: of the data, for the card; default: the folder's.
        push: repository "owner/name" to push the finished model to, in one commit. Name, licence
            and login are checked before training.
        private, token: as in `natcupy.push_to_hub`.
        license: of the new weights; default: that of the weights the model started from.
        command: JSON values for the record of the run, such as what a command line said.

    Raises:
        DataError: the pictures cannot be used, or one cannot be read.
        ConfigError: a setting that breaks a rule, or that this model or machine cannot honour.
        TrainError: the run cannot start or go on. What was saved stays.
        ValueError, HubError: the model could not be pushed; said before training where possible.
    """
    if not isinstance(train_data, Source):
        split = find(train_data, seed=config.seed, val=val_data)
        train_data, val_data, data_name = split.train, split.val, data_name or split.name
    elif val_data is not None:
        held_out = val_data if isinstance(val_data, Source) else find_split(val_data).source
        val_data = aligned(held_out, tuple(train_data.classes))
    name = model if isinstance(model, str) else ""
    if isinstance(model, str):
        model = loading.load_model(model, config)
    bare = loading.prepare(model, train_data.classes, config)
    statements = _statements(data_name or "own pictures", license)
    if is_first():
        _check_before(bare, model is not bare, push, private, token, statements)
    recipe = Preprocess.from_pretrained_cfg(bare.pretrained_cfg, bare.config)
    task = Classification(recipe, train_data, val_data, config, statements)
    facts = {"model": loading.describe(bare), "name": name}
    trained = train(model, task, config, facts, command)
    return _finished(trained, task, config, bare, data_name, push, private, token)


def _finished(
    trained: Trained,
    task: Classification,
    config: TrainConfig,
    bare: ImageModel,
    data_name: str | None,
    push: str | None,
    private: bool | None,
    token: str | bool | None,
) -> Result:
    """Write the model's folder and the plots, push, and report."""
    kept = loading.unwrapped(trained.model)
    kept.source = getattr(bare, "source", None)
    result = Result(
        model=kept,
        folder=trained.folder,
        scores=trained.scores,
        confusion=None if trained.found is None else task.confusion(trained.found),
        history=trained.history,
        epoch=trained.epoch,
        peak_bytes=trained.peak_bytes,
        seconds=trained.seconds,
        main=trained.main,
    )
    if not trained.main:
        return result
    told = told_of(trained, task, config, data_name or "own pictures", kept.source)
    plots.curves(trained.history, task.shown, trained.folder / CURVES_PNG)
    task.finish(kept, trained.folder, trained.scores, trained.found, told)
    if push:
        from natcupy.hub import push_to_hub

        result.pushed = push_to_hub(
            kept, push, private=private, token=token, training=told, **task.stated(trained.scores)
        )
    return result


def told_of(
    trained: Trained,
    task: Classification,
    config: TrainConfig,
    data_name: str,
    source: Origin | None,
) -> dict[str, str]:
    """Data, recipe and versions for the card, as plain text; `source` is of the first weights."""
    versions = environment()
    held_out = 0 if task.held_out_items is None else len(task.held_out_items)
    epochs = ", extended to ".join(map(str, trained.planned))
    if config.cooldown_epochs:
        epochs += f" and {config.cooldown_epochs} of cool-down"
    optimizer = f"AdamW, learning rate {config.lr:g}, weight decay {config.weight_decay:g}"
    if config.layer_decay < 1:
        optimizer += f", layer decay {config.layer_decay:g}"
    processes = "processes" if trained.processes > 1 else "process"
    regular = f"label smoothing {config.label_smoothing:g}"
    regular += f", clipping at {config.clip_grad:g}" if config.clip_grad else ""
    regular += f", weight average {config.ema_decay:g}" if config.ema_decay else ""
    rows = {
        "data": f"{data_name}, {len(task.classes)} classes",
        "pictures": f"{len(task.training_items):,} to train on, {held_out:,} held out",
        "first weights": _first_weights(source),
        "recipe": config.recipe or "own numbers",
        "epochs": f"{epochs}, number {trained.epoch} kept",
        "pictures per step": f"{trained.step_size}",
        "optimizer": optimizer,
        "schedule": f"{config.schedule}, {config.warmup:g} epochs of warm-up",
        "regularisation": regular,
        "augmentation": task.described(),
        "precision": {"no": "float32"}.get(config.mixed_precision, config.mixed_precision),
        "seed": f"{config.seed}",
        "time": f"{trained.seconds:.0f} s on {trained.processes} {processes}",
        "software": f"natcupy {versions['natcupy']}, torch {versions['torch']}",
    }
    return {name: plain(text) for name, text in rows.items()}


def _first_weights(source: Origin | None) -> str:
    """Where a run's weights came from, in words."""
    if source is None:
        return "fresh"
    if source.repo:
        return f"{source.repo} at {(source.commit or 'main')[:12]}"
    place = Path(source.path)
    bundled = source.kind == "embedded"
    return f"{place.parent.name}, in natcupy" if bundled else f"{place.parent.name}/{place.name}"


def plain(text: str) -> str:
    """Text without characters that mean something in Markdown, short enough for a table."""
    kept = re.sub(r"[^\w .,()+%/\-]", "-", text, flags=re.ASCII)[:96]
    return kept if re.match(r"[A-Za-z0-9]", kept) else f"x{kept}"[:96]


def _statements(data_name: str, license: str | None) -> dict[str, Any]:
    word = re.sub(r"[^\w.\-/]+", "-", data_name.partition(":")[0].partition("@")[0], flags=re.ASCII)
    parts = [re.sub(r"\.{2,}", ".", part).strip("-._")[:96] for part in word.split("/")]
    name = "/".join([part for part in parts if part][-2:]) or "pictures"
    return {"license": license, "dataset": name, "datasets": [name]}


def _check_before(
    model: ImageModel,
    wrapped: bool,
    push: str | None,
    private: bool | None,
    token: str | bool | None,
    statements: dict[str, Any],
) -> None:
    """Raise now what saving or pushing would raise after hours of training."""
    from natcupy.hub.push import check_push
    from natcupy.hub.saving import pack, state_facts

    stated = state_facts(model, push, **statements)
    if not wrapped:  # with adapters inside, its tensors are not yet those of its config
        pack(model, stated)
    if push:
        check_push(push, stated, private=private, token=token)


def describe(result: Result, classes: Sequence[str]) -> list[tuple[str, str]]:
    """What a person wants to know at the end."""
    logs = [LOG_CSV, LOG_JSON, CURVES_PNG]
    logs += [] if result.confusion is None else [CONFUSION_PNG]
    rows = []
    if result.scores:
        rows.append(("accuracy", f"{100 * result.scores['val_accuracy']:.2f} % held out"))
    if "val_top5" in result.scores:
        rows.append(("top-5", f"{100 * result.scores['val_top5']:.2f} %"))
    rows += [
        ("classes", f"{len(classes)}"),
        ("epoch kept", f"{result.epoch} of {len(result.history)}"),
        ("time", f"{result.seconds:.0f} s"),
        ("peak memory", f"{result.peak_bytes / 2**20:,.0f} MiB"),
        ("model", f"{result.folder / MODEL}"),
        ("logs", f"{', '.join(logs)} in {result.folder}"),
    ]
    if result.pushed:
        rows.append(("pushed", result.pushed.url))
    return rows
