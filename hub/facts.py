"""What an author may state about a model for its card, checked before anything is written.

In: licence, metrics, datasets, tags and base model as the caller wrote them, and what is known of
the weights the model started from. Out: `Facts`, every text in it free of markup, or a ValueError
that says what is wrong. A card and a push take nothing else from a caller.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

# The identifiers that the Hub accepts in a card.
# fmt: off
LICENSES = frozenset({
    "afl-3.0", "agpl-3.0", "apache-2.0", "apple-amlr", "apple-ascl", "artistic-2.0",
    "bigcode-openrail-m", "bigscience-bloom-rail-1.0", "bigscience-openrail-m", "bsd",
    "bsd-2-clause", "bsd-3-clause", "bsd-3-clause-clear", "bsl-1.0", "c-uda", "cc", "cc-by-2.0",
    "cc-by-2.5", "cc-by-3.0", "cc-by-4.0", "cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0",
    "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0", "cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0",
    "cc-by-nd-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc0-1.0", "cdla-permissive-1.0",
    "cdla-permissive-2.0", "cdla-sharing-1.0", "creativeml-openrail-m", "ecl-2.0", "epl-1.0",
    "epl-2.0", "etalab-2.0", "eupl-1.1", "eupl-1.2", "gfdl", "gpl", "gpl-2.0", "gpl-3.0",
    "h-research", "intel-research", "isc", "lgpl", "lgpl-2.1", "lgpl-3.0", "lgpl-lr", "lppl-1.3c",
    "mit", "mpl-2.0", "ms-pl", "ncsa", "odbl", "odc-by", "ofl-1.1", "openrail", "osl-3.0", "other",
    "pddl", "postgresql", "unknown", "unlicense", "wtfpl", "zlib",
})
# Weights under these may go on under another licence (with their notice kept).
PERMISSIVE = frozenset({
    "apache-2.0", "bsd", "bsd-2-clause", "bsd-3-clause", "bsd-3-clause-clear", "bsl-1.0",
    "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0", "cc0-1.0", "cdla-permissive-1.0",
    "cdla-permissive-2.0", "isc", "mit", "ms-pl", "ncsa", "odc-by", "pddl", "postgresql",
    "unlicense", "wtfpl", "zlib",
})
# fmt: on

REPO = re.compile(r"[A-Za-z0-9][\w.\-]{0,95}/[A-Za-z0-9][\w.\-]{0,95}", re.ASCII)
_WORD = re.compile(r"[a-z0-9][a-z0-9_.\-]{0,63}")
_DATASET = re.compile(r"[A-Za-z0-9][\w.\-]{0,95}(/[A-Za-z0-9][\w.\-]{0,95})?", re.ASCII)
_PLAIN = re.compile(r"[A-Za-z0-9][\w .,()+%/\-]{0,95}", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Metric:
    """One measured number.

    Attributes:
        type: the Hub's word for it, such as "accuracy".
        value: finite.
        dataset: the dataset's Hub name ("ILSVRC/imagenet-1k") or a plain word.
        name, dataset_name: how tables call them; default: `type` and `dataset`.
        split: of the dataset, where it has several.
    """

    type: str
    value: float
    dataset: str
    name: str = ""
    dataset_name: str = ""
    split: str = ""


@dataclass(frozen=True)
class Converted:
    """The released file that weights were converted from, bit by bit."""

    file: str
    sha256: str
    repo: str | None = None


@dataclass(frozen=True)
class Facts:
    """Everything a card says beyond the model itself."""

    license: str | None = None
    metrics: tuple[Metric, ...] = ()
    datasets: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    base_model: str | None = None
    base_commit: str | None = None
    base_license: str | None = None
    repo: str | None = None
    converted: Converted | None = None
    training: tuple[tuple[str, str], ...] = ()


def check(
    *,
    license: str | None = None,
    metrics: Mapping[str, float] | Sequence[Metric | Mapping[str, Any]] = (),
    dataset: str | None = None,
    datasets: Sequence[str] = (),
    tags: Sequence[str] = (),
    base_model: str | None = None,
    base_commit: str | None = None,
    base_license: str | None = None,
    repo: str | None = None,
    converted: Converted | None = None,
    training: Mapping[str, str] | None = None,
) -> Facts:
    """Check what is to be stated.

    Args:
        license: one of the Hub's identifiers; default: that of the base weights.
        metrics: `{"accuracy": 0.91}` measured on `dataset`, or `Metric`s (or dicts of their
            fields).
        dataset: the dataset of a plain mapping of metrics.
        datasets: what the model was trained on.
        tags: further tags.
        base_model: the repository that the weights were finetuned from.
        base_commit, base_license: of those weights, where known.
        repo: where the model is going.
        converted: the released file, for converted weights.
        training: how it was trained, as plain names and texts.

    Raises:
        ValueError: which value, and what it may be.
    """
    if license is not None:
        _license(license, base_license, base_model)
    wrong = [t for t in tags if not isinstance(t, str) or not _WORD.fullmatch(t)]
    if isinstance(tags, str) or wrong:
        raise ValueError(f"tags must be words of a-z, 0-9, '-', '.', '_', got {tags!r}.")
    if isinstance(datasets, str):
        raise ValueError(f"datasets must be a list of names, got the text {datasets!r}.")
    for name in (*datasets, *(() if dataset is None else (dataset,))):
        _dataset(name)
    checked = _metrics(metrics, dataset)
    if base_model is not None and not (isinstance(base_model, str) and REPO.fullmatch(base_model)):
        raise ValueError(f"base_model must be a Hub name org/name, got {str(base_model)[:80]!r}.")
    if converted and not (_PLAIN.fullmatch(converted.file) and _SHA256.fullmatch(converted.sha256)):
        raise ValueError(f"converted must name a file and its SHA-256, got {converted!r}.")
    return Facts(
        license=license or base_license,
        metrics=checked,
        datasets=tuple(datasets),
        tags=tuple(tags),
        base_model=base_model,
        base_commit=base_commit if base_commit and len(base_commit) == 40 else None,
        base_license=base_license,
        repo=check_repo(repo) if repo is not None else None,
        converted=converted,
        training=_training(training or {}),
    )


def check_repo(repo: str) -> str:
    """A repository's name as the Hub allows it, or ValueError."""
    text = repo if isinstance(repo, str) else ""
    parts = text.split("/")
    fine = REPO.fullmatch(text) and not any(
        ".." in part or "--" in part or part.endswith((".git", ".ipynb", "-", "."))
        for part in parts
    )
    if not fine or len(text) > 96:
        raise ValueError(
            "a repository is named owner/name: letters, digits, '-', '_' and single '.', at most "
            f"96 characters, not ending in '-', '.' or '.git'; got {str(repo)[:120]!r}."
        )
    return text


def taken_over(facts: Facts, old: Mapping[str, Any], same_weights: bool) -> Facts:
    """The facts, filled up from an earlier card, as `card.stated` reads it.

    What it measured and how its weights were made only if they are the same.
    """
    base = old.get("base_model")
    kept = old if same_weights else {}
    found = check(
        license=facts.license or old.get("license"),
        datasets=facts.datasets or tuple(old.get("datasets") or ()),
        tags=facts.tags or tuple(old.get("tags") or ()),
        base_model=facts.base_model or (base if base != facts.repo else None),
        metrics=facts.metrics or _stated_metrics(kept),
        training=dict(facts.training) or kept.get("training"),
        converted=facts.converted or kept.get("converted"),
    )
    if facts.base_model is None and found.base_model is not None:
        facts = replace(
            facts,
            base_commit=kept.get("base_commit"),
            base_license=kept.get("base_license") or facts.base_license,
        )
    return replace(
        facts,
        license=found.license,
        datasets=found.datasets,
        tags=found.tags,
        base_model=found.base_model,
        metrics=found.metrics,
        training=found.training,
        converted=found.converted,
    )


def _stated_metrics(old: Mapping[str, Any]) -> list[Metric]:
    """The metrics of a card's model-index, as `card` writes them."""
    found = []
    for index in old.get("model-index") or ():
        for result in index["results"]:
            data = result["dataset"]
            found += [
                Metric(
                    each["type"],
                    each["value"],
                    data["type"],
                    each["name"],
                    data["name"],
                    data.get("split", ""),
                )
                for each in result["metrics"]
            ]
    return found


def is_plain(text: str) -> bool:
    """Whether text has no character that means something in Markdown, HTML or YAML."""
    return _PLAIN.fullmatch(text) is not None


def _training(rows: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    for name, text in rows.items():
        if not (isinstance(text, str) and is_plain(text) and is_plain(str(name))):
            raise ValueError(
                f"what is said of the training must be plain text of at most 96 characters, got "
                f"{str(name)[:40]!r}: {str(text)[:60]!r}."
            )
    return tuple(rows.items())


def _license(license: object, inherited: str | None, base: str | None) -> None:
    if not isinstance(license, str) or license not in LICENSES:
        known = ", ".join(sorted(PERMISSIVE & {"mit", "apache-2.0", "bsd-3-clause", "cc-by-4.0"}))
        raise ValueError(
            f"license must be an identifier the Hub knows ({known}, other …; all are in "
            f"natcupy.hub.facts.LICENSES), got {str(license)[:60]!r}."
        )
    if inherited and inherited != license and inherited not in PERMISSIVE:
        raise ValueError(
            f"weights that started from {base or 'others'} under {inherited} keep that licence, "
            f"got license={license!r}. Leave license out to inherit it."
        )


def _dataset(name: object) -> None:
    if not isinstance(name, str) or not _DATASET.fullmatch(name) or ".." in name:
        raise ValueError(f"a dataset is a Hub name (org/name) or a word, got {str(name)[:80]!r}.")


def _metrics(
    metrics: Mapping[str, float] | Sequence[Metric | Mapping[str, Any]], dataset: str | None
) -> tuple[Metric, ...]:
    if isinstance(metrics, Mapping):
        if metrics and dataset is None:
            raise ValueError(
                f"metrics need the dataset they were measured on, got {dict(metrics)!r}; pass "
                "dataset='org/name' (--dataset), or a list of natcupy.hub.Metric."
            )
        metrics = [Metric(name, value, dataset) for name, value in metrics.items()]
    if isinstance(metrics, str) or not isinstance(metrics, Iterable):
        raise ValueError(f"metrics must be a mapping or a list, got {str(metrics)[:60]!r}.")
    return tuple(_metric(metric) for metric in metrics)


def _metric(metric: Metric | Mapping[str, Any]) -> Metric:
    if isinstance(metric, Mapping):
        try:
            metric = Metric(**metric)
        except TypeError:
            raise ValueError(
                f"a metric has type, value, dataset and perhaps name, dataset_name, split; got "
                f"{sorted(map(str, metric))}."
            ) from None
    if not isinstance(metric, Metric):
        raise ValueError(f"a metric is a natcupy.hub.Metric, got {type(metric).__name__}.")
    if not isinstance(metric.type, str) or not _WORD.fullmatch(metric.type):
        raise ValueError(f"a metric's type is a word like 'accuracy', got {metric.type!r}.")
    value = metric.value
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"the value of {metric.type} must be a finite number, got {value!r}.")
    _dataset(metric.dataset)
    for key in ("name", "dataset_name", "split"):
        text = getattr(metric, key)
        if not isinstance(text, str) or (text and not _PLAIN.fullmatch(text)):
            raise ValueError(
                f"{key} of {metric.type} must be plain text without markup, got {str(text)[:60]!r}."
            )
    return metric
