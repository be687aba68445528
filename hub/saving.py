"""Saving: a model becomes a folder that natcupy, transformers and timm read.

In: a model and what its author states. Out: config.json, model.safetensors (or shards and their
index), README.md and, where transformers can prepare the pictures, preprocessor_config.json; all or
none.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from natcupy.hub import card, dense, facts, schema, shards
from natcupy.hub.config import config_text
from natcupy.hub.dense import Config, Model
from natcupy.hub.facts import Facts, Metric
from natcupy.hub.files import member, write_folder
from natcupy.hub.locate import CONFIG, PREPROCESSOR, WEIGHTS_FILE
from natcupy.hub.preprocessor import preprocessor_text
from natcupy.hub.pretrained import compare
from natcupy.hub.tensors import write_tensors
from natcupy.zoo.config import ModelConfig

log = logging.getLogger("natcupy.hub")

README = "README.md"

Writers = dict[str, Callable[[Path], None]]


@dataclass(frozen=True)
class Package:
    """Everything to write, checked: functions that write files, and what the card is made of."""

    writers: Writers
    config: Config
    cfg: Mapping[str, Any]
    facts: Facts

    def card(self) -> str:
        """The README.md for it."""
        return card.render(self.config, self.cfg, self.facts)


def save_pretrained(
    model: Model,
    folder: str | os.PathLike[str],
    *,
    overwrite_card: bool = False,
    license: str | None = None,
    metrics: Mapping[str, float] | Sequence[Metric | Mapping[str, Any]] = (),
    dataset: str | None = None,
    datasets: Sequence[str] = (),
    tags: Sequence[str] = (),
    base_model: str | None = None,
    training: Mapping[str, str] | None = None,
    max_shard_bytes: int = shards.MAX_SHARD_BYTES,
) -> Path:
    """Write config.json, model.safetensors, README.md and, of a classifier or backbone,
    preprocessor_config.json, all or none.

    A kill at any moment leaves the old folder or the new one, as `from_pretrained` reads it; saving
    into the folder the model was loaded from is safe. Tensors keep their dtype.

    Args:
        model: any model of the zoo.
        folder: made if missing; other files in it stay, except weights that these replace.
        overwrite_card: also replace a README.md that is there and was edited.
        license, metrics, dataset, datasets, tags, base_model, training: for the card; see
            `push_to_hub`.
        max_shard_bytes: larger weights are cut into several files and an index.

    Returns:
        The folder.

    Raises:
        CheckpointError: the model was rebuilt by hand and is not what its config describes.
        ConfigError: its pretrained_cfg holds a value that could not be read back.
        ValueError: a statement for the card that cannot be made.
        OSError: the folder cannot be written.
    """
    stated = state_facts(
        model,
        license=license,
        metrics=metrics,
        dataset=dataset,
        datasets=datasets,
        tags=tags,
        base_model=base_model,
        training=training,
    )
    return write(pack(model, stated, max_shard_bytes), folder, overwrite_card)


def write(package: Package, folder: str | os.PathLike[str], overwrite_card: bool = False) -> Path:
    """Write a package into a folder, all or none; an edited card is kept unless asked."""
    folder = Path(folder).expanduser()
    writers = dict(package.writers)
    if overwrite_card or not keeps_card(folder):
        writers[README] = text_writer(package.card())
    write_folder(folder, writers, is_weights)
    return folder


def state_facts(model: Model, repo: str | None = None, **given: Any) -> Facts:
    """What the card may say: the caller's statements and what the model's own source implies.

    The first look at a model to be saved: raises TypeError for another library's.
    """
    if not (hasattr(model, "pretrained_cfg") and hasattr(model, "config")):
        raise TypeError(
            f"model must be one of natcupy's zoo (create_model, from_pretrained), got "
            f"{type(model).__name__}; of a wrapped one, pass the model inside."
        )
    source = getattr(model, "source", None)
    inherited = model.pretrained_cfg.get("license") or (source.license if source else None)
    if inherited is not None:
        schema.word("license", inherited)
    base = given.pop("base_model", None)
    commit = None
    if base is None and source and source.repo and facts.REPO.fullmatch(source.repo):
        base, commit = source.repo, source.commit
    if base == repo:
        base = commit = None
    return facts.check(
        **given, base_model=base, base_commit=commit, base_license=inherited, repo=repo
    )


def pack(model: Model, stated: Facts, max_shard_bytes: int = shards.MAX_SHARD_BYTES) -> Package:
    """Check a model and lay out its files; nothing is written yet."""
    from natcupy import __version__

    state = model.state_dict()
    with torch.device("meta"):
        compare(state, dense.build(model.config).state_dict(), where=f"this {model.name}")
    cfg = dict(model.pretrained_cfg)
    if stated.license:
        cfg["license"] = stated.license
    parts = shards.split(state, max_shard_bytes)
    writers: Writers = {
        CONFIG: text_writer(config_text(model.config, cfg, __version__)),
    }
    if isinstance(model.config, ModelConfig):
        writers[PREPROCESSOR] = text_writer(preprocessor_text(model.config, cfg))
    if len(parts) == 1:
        writers[WEIGHTS_FILE] = lambda path: write_tensors(state, path)
    else:
        writers[shards.INDEX] = text_writer(shards.index_text(parts))
        for name, part in zip(shards.names(len(parts)), parts, strict=True):
            writers[name] = lambda path, part=part: write_tensors(part, path)
    kept = schema.clean_pretrained_cfg(cfg, model.config)
    return Package(writers, model.config, kept, stated)


def is_weights(name: str) -> bool:
    """Whether a file holds weights as natcupy writes them, so that new weights make it void."""
    return name in (WEIGHTS_FILE, shards.INDEX) or shards.is_shard(name)


def text_writer(text: str) -> Callable[[Path], None]:
    """A function that writes this text as it is, on every system."""
    return lambda path: path.write_bytes(text.encode("utf-8"))


def keeps_card(folder: Path) -> bool:
    """Whether there is a card that somebody wrote or changed, so that it stays; the log says so."""
    path = member(folder, README)
    kept = path.is_file() and not card.is_generated(path.read_text("utf-8", "replace"))
    if kept:
        log.warning("%s keeps its edited README.md.", folder)
    return kept
