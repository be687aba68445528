"""What a model says about any number of pictures, as a table on disk.

In: a model and pictures. Out: a CSV, JSON lines or Parquet file with a row for every picture that
can be read, in the order of the data, and `Report`. The pictures are cut into parts, and these into
batches, before anything is handed out: the table is the same for any number of processes and
workers, and after any number of kills.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

import natcupy
from natcupy.data import Data, PictureSet, find_pictures
from natcupy.inference import ranks
from natcupy.inference.feed import (
    Batch,
    feed,
    loaded,
    outputs,
    pick_workers,
    placed,
    recipe_of,
    warm,
)
from natcupy.inference.parts import Run
from natcupy.inference.tables import Columns, Rows, Table, table_for
from natcupy.zoo import ImageModel

PART_PICTURES = 1024


@dataclass(frozen=True)
class Report:
    """What came of a prediction.

    Attributes:
        out: the table.
        complete: False while other shards are still at work; then there is no table yet.
        pictures: how many were looked at now, by all of torchrun's processes.
        bad: (path, reason) of pictures that could not be read: the whole table's once it is
            complete, else this shard's.
        parts, parts_done: of the whole table.
        seconds: wall time of the slowest process, without loading and warming the model.
    """

    out: Path
    complete: bool
    pictures: int
    bad: tuple[tuple[str, str], ...]
    parts: int
    parts_done: int
    seconds: float


@dataclass(frozen=True)
class _Plan:
    """How the pictures are cut. A batch never reaches from one part into the next."""

    total: int
    batch_size: int
    batches_per_part: int

    @property
    def parts(self) -> int:
        return -(-self.total // (self.batch_size * self.batches_per_part))

    def batches(self, part: int) -> range:
        """The numbers of a part's batches."""
        first = part * self.batches_per_part
        return range(first, min(first + self.batches_per_part, -(-self.total // self.batch_size)))

    def rows(self, batch: int) -> range:
        """The pictures of a batch."""
        return range(batch * self.batch_size, min((batch + 1) * self.batch_size, self.total))


@dataclass(frozen=True)
class _Answered:
    """A batch's answers, as in `Rows`, and (index, reason) of its bad pictures."""

    rows: list[int]
    indices: np.ndarray
    scores: np.ndarray
    features: np.ndarray
    bad: list[tuple[int, str]]


def predict(
    model: ImageModel | str | os.PathLike[str],
    data: PictureSet | Data | Iterable[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    split: str | None = None,
    topk: int = 1,
    features: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    shard: tuple[int, int] | None = None,
    batch_size: int = 64,
    workers: int | None = None,
    part_pictures: int = PART_PICTURES,
    progress: bool = False,
) -> Report:
    """Write a model's answers to any number of pictures.

    Under torchrun, processes share the work through the folder of the output, which all must see;
    they wait for each other at the end, and all return the same report.

    Args:
        model: in eval mode, on its device, in its dtype; or a name for `from_pretrained`.
        data: pictures: files, folders of pictures (below, too), or a Hugging Face dataset, by name
            or as `datasets.Dataset` or `DatasetDict`.
        out: a file that ends in .csv, .jsonl or .parquet; `out`.parts beside it while it is made,
            and `out`.run.json with the settings and the pictures that could not be read.
        split: the part of a dataset with several.
        topk: answers per picture.
        features: also the pooled features before the classifier, as column `embedding`.
        resume: go on with an unfinished run of the same settings, if there is one.
        overwrite: replace a finished table or drop an unfinished run.
        shard: (i, n), counted from 0: do only the i-th of n shares, beside other processes that do
            the others; implies `resume`. The last to end puts the table together.
        batch_size: pictures at a time.
        workers: processes that prepare pictures; default by the number of cores, 0 for none.
        part_pictures: how many are kept at a time, rounded up to whole batches: what a kill loses.
        progress: show a bar where stderr is a terminal.

    Raises DataError without pictures, ValueError for wrong arguments or other settings than those
    of the run to resume, FileExistsError for an output that exists, OSError where it cannot be
    written; finished parts stay.
    """
    out = Path(out)
    model = loaded(model)
    columns = _columns(model, topk, features)
    table = table_for(out, columns)
    if min(batch_size, part_pictures) < 1:
        raise ValueError(
            f"batch_size and part_pictures must be at least 1, got {batch_size}, {part_pictures}."
        )
    pick_workers(workers, 0)  # refused before anything is written
    if shard is not None and (not 0 <= shard[0] < shard[1] or overwrite):
        raise ValueError(
            "shard must be (i, n) with 0 <= i < n, and without overwrite, since shards do not know "
            f"of each other; got {shard}{' with overwrite' if overwrite else ''}."
        )
    if shard is not None and ranks.world_size() > 1:
        raise ValueError("torchrun's processes are the shards; leave shard out.")
    pictures = data if isinstance(data, PictureSet) else find_pictures(data, split)
    plan = _Plan(len(pictures), batch_size, -(-part_pictures // batch_size))
    settings = _settings(model, pictures, columns, plan, out.suffix.lower())
    problems = tuple(getattr(pictures, "problems", ()))  # of folders that cannot be listed
    run = Run(out, settings, plan.parts, problems)
    group = ranks.Group() if shard is not None else ranks.group(placed(model)["device"])
    share, finished = _begin(run, group, shard, resume, overwrite)
    if finished:
        return Report(out, True, 0, tuple(run.bad()), plan.parts, plan.parts, 0.0)
    begun = time.perf_counter()
    try:
        done, bad = _work(run, table, model, pictures, plan, share, workers, progress)
        complete = run.finish(table.join)
    except OSError as error:
        raise OSError(
            f"{out} could not be finished: {error.strerror or error}; {len(run.done()):,} of "
            f"{plan.parts:,} parts are kept in {run.folder}. Remedy that, then go on with --resume."
        ) from error
    seconds = time.perf_counter() - begun
    bad = run.bad() if complete else bad
    have = plan.parts if complete else len(run.done())
    # Not before all have ended: torchrun kills the others once one process exits with an error.
    reports = group.gather(Report(out, complete, done, tuple(bad), plan.parts, have, seconds))
    return _together(reports)


def _together(reports: Sequence[Report]) -> Report:
    """What the processes of one run report, as one."""
    last = max(reports, key=lambda report: report.complete)  # it has seen the whole table
    pictures = sum(report.pictures for report in reports)
    seconds = max(report.seconds for report in reports)
    return dataclasses.replace(last, pictures=pictures, seconds=seconds)


def _begin(
    run: Run,
    group: ranks.Group,
    shard: tuple[int, int] | None,
    resume: bool,
    overwrite: bool,
) -> tuple[range, bool]:
    """This process's parts, and whether all is done. Rank 0 looks at the folder, all hear of it."""
    if shard is not None:
        return range(shard[0], run.count, shard[1]), run.begin(True, False)
    finished: bool | Exception = False
    if group.rank == 0:
        try:
            finished = run.begin(resume, overwrite)
        except (OSError, ValueError) as error:
            finished = error
    finished = group.broadcast(finished)
    if isinstance(finished, Exception):
        raise finished
    if not finished:
        run.check()
    return range(group.rank, run.count, group.world), finished


def _work(
    run: Run,
    table: Table,
    model: ImageModel,
    pictures: PictureSet,
    plan: _Plan,
    share: range,
    workers: int | None,
    progress: bool,
) -> tuple[int, list[tuple[str, str]]]:
    """Do this process's parts that are not done; how many pictures, and which were bad."""
    done = run.done()
    missing = [part for part in share if part not in done]
    left = sum(len(plan.rows(n)) for part in missing for n in plan.batches(part))
    if not missing:
        return 0, []
    workers = pick_workers(workers, left, ranks.local_world_size())
    warm(model, min(plan.batch_size, plan.total))
    numbers = [n for part in missing for n in plan.batches(part)]
    stream = feed(
        pictures,
        recipe_of(model),
        plan.rows,
        numbers,
        workers=workers,
        pin=placed(model)["device"].type == "cuda",
    )
    bad: list[tuple[str, str]] = []
    all_mine = sum(len(plan.rows(n)) for part in share for n in plan.batches(part))
    quiet = None if progress and share.start == 0 else True  # None: where stderr is a terminal
    with tqdm(total=all_mine, initial=all_mine - left, unit="picture", disable=quiet) as bar:
        waiting: list[_Answered] = []
        for batch in stream:
            waiting.append(_answers(model, batch, table.columns))
            bar.update(len(batch.rows) + len(batch.bad))
            part = batch.number // plan.batches_per_part
            if batch.number == plan.batches(part)[-1]:
                rows, bad_here = _rows(model, pictures, waiting)
                run.put(part, partial(table.write, rows), bad_here)
                bad += bad_here
                waiting = []
    return left, bad


def _answers(model: ImageModel, batch: Batch, columns: Columns) -> _Answered:
    """The answers to a batch, best first. Answers that are no numbers make a picture a bad one."""
    if not batch.rows:
        return _Answered([], np.empty((0, columns.topk), int), *_empty(0, columns), batch.bad)
    logits, pooled = outputs(model, batch.pictures)
    finite = logits.isfinite().all(1) & pooled.isfinite().all(1)
    lost = [row for row, good in zip(batch.rows, finite.tolist(), strict=True) if not good]
    rows = [row for row, good in zip(batch.rows, finite.tolist(), strict=True) if good]
    best = logits[finite].softmax(-1).topk(columns.topk)
    return _Answered(
        rows,
        best.indices.numpy(),
        best.values.numpy(),
        pooled[finite].numpy()[:, : columns.features],
        [*batch.bad, *((row, "the model's answer is not a number") for row in lost)],
    )


def _empty(rows: int, columns: Columns) -> tuple[np.ndarray, np.ndarray]:
    shapes = (rows, columns.topk), (rows, columns.features)
    return tuple(np.empty(shape, np.float32) for shape in shapes)


def _rows(
    model: ImageModel, pictures: PictureSet, batches: Sequence[_Answered]
) -> tuple[Rows, list[tuple[str, str]]]:
    """A part's rows, and its bad pictures."""
    names = model.pretrained_cfg.get("label_names")
    best = np.concatenate([batch.indices for batch in batches])
    rows = Rows(
        [pictures.where(index) for batch in batches for index in batch.rows],
        [[names[i] if names else f"class {i}" for i in row] for row in best.tolist()],
        best,
        np.concatenate([batch.scores for batch in batches]),
        np.concatenate([batch.features for batch in batches]),
    )
    bad = sorted(entry for batch in batches for entry in batch.bad)
    return rows, [(pictures.where(index), reason) for index, reason in bad]


def _columns(model: ImageModel, topk: int, features: bool) -> Columns:
    if model.config.out_indices is not None or model.global_pool != "avg":
        raise ValueError(f"prediction needs a model with pooled features, got {model.name}.")
    if model.num_classes < 1 and not features:
        raise ValueError(
            f"prediction needs a classifier, or features=True, got {model.name} without classes."
        )
    if topk < 1:
        raise ValueError(f"topk must be at least 1, got {topk}.")
    return Columns(min(topk, model.num_classes), model.num_features if features else 0)


def _settings(
    model: ImageModel,
    pictures: PictureSet,
    columns: Columns,
    plan: _Plan,
    suffix: str,
) -> dict[str, Any]:
    """Everything that decides the table's content."""
    names = hashlib.sha256()
    for index in range(len(pictures)):
        names.update(pictures.where(index).encode() + b"\0")
    where = placed(model)
    return {
        "natcupy": natcupy.__version__,
        "torch": torch.__version__,
        "model": model.name,
        "weights_sha256": _hash_of(model),
        "device": where["device"].type,
        "dtype": str(where["dtype"]).removeprefix("torch."),
        "preprocess": json.loads(json.dumps(dataclasses.asdict(recipe_of(model)))),
        "pictures": len(pictures),
        "paths_sha256": names.hexdigest(),
        "format": suffix[1:],
        "columns": columns.names(),
        "batch_size": plan.batch_size,
        "part_pictures": plan.batch_size * plan.batches_per_part,
    }


def _hash_of(model: ImageModel) -> str:
    """SHA-256 over the names of the labels and every tensor."""
    digest = hashlib.sha256(json.dumps(model.pretrained_cfg.get("label_names")).encode())
    for name, tensor in model.state_dict().items():
        values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(values.numpy())
    return digest.hexdigest()
