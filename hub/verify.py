"""Verifying: is every byte of a folder or repository what it should be, and do they fit together?

In: a folder, or a repository and revision. Out: a `Report` with one line per file. Hashes come from
the Hub's listing, from the tables of released and bundled weights, or are only computed (`sha256`
to compare by eye). Weights are then decoded and compared with the model their config describes.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from natcupy.hub import download, locate, shards, weights
from natcupy.hub.client import Access
from natcupy.hub.download import Snapshot
from natcupy.hub.errors import Corrupt, HubError, NotFound
from natcupy.hub.files import JOURNAL, git_blob_id, sha256_file
from natcupy.hub.pretrained import from_pretrained

OK, DIFFERS, MISSING, UNKNOWN = "ok", "differs", "missing", "no reference"
ABSENT = "not here"  # a file of the reference that the model does not need


@dataclass(frozen=True)
class Checked:
    """One file: its size and hash, and how it compares."""

    file: str
    size: int
    sha256: str
    status: str


@dataclass(frozen=True)
class Report:
    """The outcome; `problem` says why weights and config do not load together, if they do not."""

    name: str
    commit: str | None
    files: tuple[Checked, ...]
    problem: str | None

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return self.problem is None and all(f.status in (OK, UNKNOWN, ABSENT) for f in self.files)


def verify(
    name: str | os.PathLike[str],
    *,
    revision: str | None = None,
    against: str | None = None,
    access: Access | None = None,
) -> Report:
    """Check a folder or a repository.

    Args:
        name: a folder, or `org/name[@revision]`, whose files are fetched (or taken from the cache,
            and checked there); or the name of a bundled model, or of a released one on the Hub.
        revision: of the repository, or of `against`.
        against: of a folder (or a bundled model): the repository it is a copy of. Every file both
            have must be equal, also in sub-folders; what a model needs must be there.
        access: how to reach the Hub.

    Raises:
        ValueError: an empty name; `against` with a repository; `revision` with a folder alone.
        HubError: the folder or repository cannot be read at all.
    """
    if isinstance(name, str) and not name.strip():
        raise ValueError(f"verify takes the name of a folder or repository, got {name!r}.")
    access = access or Access()
    folder = Path(name).expanduser()
    if not folder.is_dir() and isinstance(name, str):
        if download.parse_name(name) or weights.find(name.partition("@")[0]):
            _alone(name, against)
            return _repository(locate.pinned(name, revision, access), access)
        bundled = weights.embedded(name)
        if bundled is not None and against is None and revision is None:
            return _folder(bundled, None, access, weights.EMBEDDED_SHA256.get(bundled.name, {}))
        folder = bundled or folder
    if not folder.is_dir():
        raise NotFound(
            f"no such folder: {folder}. verify takes a folder, a repository as "
            "org/name[@revision], or a name whose weights are in the package or on the Hub "
            "(`natcupy models` lists them)."
        )
    return _folder(folder, _reference(against, revision, folder, access), access)


def _alone(repo: str, against: str | None) -> None:
    """A repository is checked against its own listing, never against another repository."""
    if against is not None:
        raise ValueError(
            f"against (--against) belongs to a folder, got {against[:80]!r} for the repository "
            f"{repo[:80]!r}. Compare a copy on disk: natcupy pull {repo[:80]} FOLDER, then natcupy "
            f"verify FOLDER --against {against[:80]}"
        )


def _reference(
    against: str | None, revision: str | None, folder: Path, access: Access
) -> Snapshot | None:
    if against is None:
        if revision is not None:
            raise ValueError(
                f"revision belongs to a Hub repository, got revision={revision!r} for the folder "
                f"{folder}; name the repository it is a copy of with against (--against)."
            )
        return None
    name, _, inner = against.partition("@")
    if revision is not None and inner not in ("", revision):
        raise ValueError(f"give the revision once, got {against!r} and revision={revision!r}.")
    parsed = download.parse_name(against if revision is None else f"{name}@{revision}")
    if parsed is None:
        raise ValueError(
            f"a repository is written org/name[@revision], got {against[:80]!r}"
            + ("." if revision is None else f" and revision={revision[:80]!r}.")
        )
    return download.listed(parsed[0], parsed[1] or "main", access)


def _folder(
    folder: Path,
    reference: Snapshot | None,
    access: Access,
    hashes: Mapping[str, str] = MappingProxyType({}),
) -> Report:
    """Check a folder: against a repository, or against SHA-256 hashes by file name."""
    wanted = {n: e for n, e in reference.files.items() if _shown(n)} if reference else {}
    here = {path.name for path in folder.iterdir() if path.is_file() and _shown(path.name)}
    here |= {name for name in wanted if (folder / name).is_file()}
    files = [_compared(name, folder / name, reference, hashes) for name in sorted(here)]
    needed = _needed(wanted)
    for name in sorted(wanted.keys() - here):
        status = MISSING if name in needed else ABSENT
        files.append(Checked(name, wanted[name].size or 0, "", status))
    unfinished = (folder / JOURNAL).is_file()
    problem = f"an unfinished save ({JOURNAL}); save again" if unfinished else _load(folder, access)
    return Report(str(folder), reference.commit if reference else None, tuple(files), problem)


def _shown(name: str) -> bool:
    """Whether a file is looked at: none that is hidden, or outside the folder (`..`, `/x`)."""
    return all(part and not part.startswith(".") for part in name.split("/"))


def _needed(names: Collection[str]) -> set[str]:
    """Files of a repository without which its model is not what it is there.

    Of weights cut into several files the index; that all it names are there, loading sees.
    """
    choices = (locate.WEIGHTS_FILE, shards.INDEX, locate.PICKLE)  # the first one is loaded
    found = [name for name in choices if name in names][:1]
    return {locate.CONFIG, locate.PREPROCESSOR, *found}


def _compared(
    name: str, path: Path, reference: Snapshot | None, hashes: Mapping[str, str]
) -> Checked:
    digest, size = sha256_file(path), path.stat().st_size
    there = reference.files.get(name) if reference else None
    status = UNKNOWN
    if name in hashes:
        status = OK if hashes[name] == digest else DIFFERS
    elif there is not None and there.sha256:
        status = OK if there.sha256 == digest else DIFFERS
    elif there is not None and there.git_id:
        status = OK if there.git_id == git_blob_id(path.read_bytes()) else DIFFERS
    return Checked(name, size, digest, status)


def _repository(snapshot: Snapshot, access: Access) -> Report:
    repo = snapshot.repo
    files, wrong = [], False
    for name, expected in sorted(snapshot.files.items()):
        if name.startswith(".") or "/" in name:
            continue
        try:
            path = download.fetch(snapshot, name, access)
        except Corrupt:
            wrong = True
            files.append(Checked(name, expected.size or 0, "", DIFFERS))
            continue
        known = expected.sha256 or expected.git_id
        status = OK if known else UNKNOWN
        files.append(Checked(name, path.stat().st_size, sha256_file(path), status))
    problem = None if wrong else _load(f"{repo}@{snapshot.commit}", access)
    return Report(repo, snapshot.commit, tuple(files), problem)


def _load(name: str | Path, access: Access) -> str | None:
    """Why the weights and their config cannot be loaded together; None if they can."""
    options = {} if isinstance(name, Path) else vars(access)
    try:
        from_pretrained(name, check_finite=True, **options)
    except (HubError, ValueError) as error:
        return str(error)
    return None
