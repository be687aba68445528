"""Verifying: is every byte of a folder or repository what it should be, and do they fit together?

In: a folder, or a repository and revision. Out: a `Report` with one line per file. Hashes come from
the Hub's listing, from the table of released weights, or are only computed (`sha256` to compare by
eye). Weights are then decoded and compared with the model their config describes.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from natcupy.hub import download, locate, weights
from natcupy.hub.client import Access
from natcupy.hub.download import Snapshot
from natcupy.hub.errors import Corrupt, HubError, NotFound
from natcupy.hub.files import JOURNAL, git_blob_id, sha256_file
from natcupy.hub.pretrained import from_pretrained

OK, DIFFERS, MISSING, UNKNOWN = "ok", "differs", "missing", "no reference"


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
        return self.problem is None and all(f.status in (OK, UNKNOWN) for f in self.files)


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
        revision: of the repository.
        against: of a folder: the repository it is a copy of; every file both have must be equal.
        access: how to reach the Hub.

    Raises:
        HubError: the folder or repository cannot be read at all.
    """
    access = access or Access()
    folder = Path(name).expanduser()
    if not folder.is_dir() and isinstance(name, str):
        if download.parse_name(name) or weights.find(name.partition("@")[0]):
            return _repository(locate.pinned(name, revision, access), access)
        folder = weights.embedded(name) or folder
    if not folder.is_dir():
        raise NotFound(
            f"no such folder: {folder}. verify takes a folder, a repository as "
            "org/name[@revision], or a name whose weights are in the package or on the Hub "
            "(`natcupy models` lists them)."
        )
    return _folder(folder, _reference(against, access), access)


def _reference(against: str | None, access: Access) -> Snapshot | None:
    if against is None:
        return None
    parsed = download.parse_name(against)
    if parsed is None:
        raise ValueError(f"a repository is written org/name[@revision], got {against[:80]!r}.")
    return download.listed(parsed[0], parsed[1] or "main", access)


def _folder(folder: Path, reference: Snapshot | None, access: Access) -> Report:
    files = []
    here = {p.name: p for p in sorted(folder.iterdir()) if p.is_file()}
    for name, path in here.items():
        if not name.startswith("."):
            files.append(_compared(name, path, reference))
    wanted = reference.files if reference else {}
    absent = [n for n in sorted(wanted) if n not in here and not n.startswith(".")]
    files += [Checked(n, wanted[n].size or 0, "", MISSING) for n in absent]
    unfinished = (folder / JOURNAL).is_file()
    problem = f"an unfinished save ({JOURNAL}); save again" if unfinished else _load(folder, access)
    return Report(str(folder), reference.commit if reference else None, tuple(files), problem)


def _compared(name: str, path: Path, reference: Snapshot | None) -> Checked:
    digest, size = sha256_file(path), path.stat().st_size
    there = reference.files.get(name) if reference else None
    status = UNKNOWN
    if there is not None and there.sha256:
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
