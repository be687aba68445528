"""Publishing released checkpoints: fetched, converted, proven equal, described, pushed.

In: names of the table and a namespace on the Hub. Out: one `Publication` per name. A name that
fails stops no other; its record says why.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from natcupy.hub import download
from natcupy.hub.attempt import make_target
from natcupy.hub.client import Access
from natcupy.hub.converting import Conversion, convert_checkpoint, released
from natcupy.hub.dense_weights import DenseRow
from natcupy.hub.errors import CheckpointError, HubError
from natcupy.hub.facts import Metric, check_repo
from natcupy.hub.pretrained import from_pretrained
from natcupy.hub.push import Pushed, push_package
from natcupy.hub.saving import README, pack, state_facts
from natcupy.hub.weights import Row
from natcupy.zoo import PUBLISHED
from natcupy.zoo.dense import DENSE_PUBLISHED

_DATASETS = {
    "in1k": ("ILSVRC/imagenet-1k",),
    "in22k": ("imagenet-22k",),
    "in22k_ft_in1k": ("imagenet-22k", "ILSVRC/imagenet-1k"),
}


@dataclass(frozen=True)
class Publication:
    """What became of one name."""

    name: str
    repo: str
    conversion: Conversion | None = None
    pushed: Pushed | None = None
    error: str | None = None


def publish(
    names: Sequence[str],
    org: str,
    *,
    dry_run: bool = False,
    originals: Path | None = None,
    private: bool | None = None,
    access: Access | None = None,
) -> Iterator[Publication]:
    """Publish released weights under a namespace, one after the other.

    Args:
        names: "nat-tiny", "dinat-large-384.in22k_ft_in1k" …; all are checked before the first.
        org: user or organisation.
        dry_run: do everything but the push.
        originals: a folder with the authors' .pth files; used before the Hub where it has one.
        private: visibility of repositories that have to be made.
        access: how to reach the Hub.

    Raises:
        ValueError: a name that is not in the table, or a namespace that cannot be.
    """
    rows = [released(name) for name in names]
    repos = [check_repo(f"{org}/{row.tag}") for row in rows]
    access = access or Access()
    for row, repo in zip(rows, repos, strict=True):
        try:
            yield _publish(row, repo, dry_run, originals, private, access)
        except (HubError, ValueError, OSError) as error:
            yield Publication(row.tag, repo, error=str(error))


def _publish(
    row: Row | DenseRow,
    repo: str,
    dry_run: bool,
    originals: Path | None,
    private: bool | None,
    access: Access,
) -> Publication:
    stated = _facts(row, repo)
    with TemporaryDirectory(prefix="natcupy-publish-") as place:
        folder = Path(place) / "model"
        done = convert_checkpoint(_source(row, originals), folder, access=access, **stated)
        if done.largest_difference != 0:
            raise CheckpointError(
                f"{row.tag}: outputs before and after the conversion differ by "
                f"{done.largest_difference:g}; nothing was pushed."
            )
        if dry_run:
            return Publication(row.tag, repo, done)
        # The card was written with the hash of the released file; the model has it no more.
        text = (folder / README).read_text("utf-8")
        model = from_pretrained(folder, dtype="auto")
        package = pack(model, state_facts(model, **stated))
        target = make_target(
            repo, private=private, commit_message=f"{row.tag}, converted", overwrite_card=True
        )
        pushed = push_package(package, target, access, text)
    _confirm(pushed, done, access)
    return Publication(row.tag, repo, done, pushed)


def _source(row: Row | DenseRow, originals: Path | None) -> str | Path:
    """The authors' file where there is one, else the name of the released repository."""
    if originals is not None:
        path = Path(originals).expanduser() / row.original.rsplit("/", 1)[1]
        if path.is_file():
            return path
    return row.tag


def _facts(row: Row | DenseRow, repo: str) -> dict[str, Any]:
    if isinstance(row, DenseRow):
        return _dense_facts(row, repo)
    printed = PUBLISHED[row.arch]
    metrics = []
    if printed.top1 is not None:
        name = "Top-1 accuracy, percent, as published"
        metrics = [
            Metric(
                "accuracy", printed.top1, "ILSVRC/imagenet-1k", name, "ImageNet-1K", "validation"
            )
        ]
    return {
        "license": row.license,
        "metrics": metrics,
        "datasets": _DATASETS[row.data],
        "repo": repo,
    }


def _dense_facts(row: DenseRow, repo: str) -> dict[str, Any]:
    first, second = DENSE_PUBLISHED[row.arch].scores
    if row.data == "ade20k":
        measured = (
            ("mean_iou", first, "Mean IoU, percent"),
            ("mean_iou", second, "Mean IoU with scales and flips, percent"),
        )
        where = {"dataset": "ade20k", "dataset_name": "ADE20K", "split": "validation"}
    else:
        measured = (
            ("mean_average_precision", first, "Box AP"),
            ("mean_average_precision", second, "Mask AP"),
        )
        where = {"dataset": "coco", "dataset_name": "COCO", "split": "val2017"}
    metrics = [
        Metric(kind, value, name=f"{name}, as published", **where) for kind, value, name in measured
    ]
    return {"license": row.license, "metrics": metrics, "datasets": (row.data,), "repo": repo}


def _confirm(pushed: Pushed, done: Conversion, access: Access) -> None:
    """The Hub's own hash of the weights is that of the file that was proven equal."""
    there = download.listed(pushed.repo, pushed.commit, access).files.get("model.safetensors")
    if there is not None and there.sha256 not in (None, done.sha256):
        raise CheckpointError(
            f"{pushed.repo}@{pushed.commit} has weights of SHA-256 {there.sha256}, not the "
            f"{done.sha256} that was pushed."
        )
