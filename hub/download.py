"""The Hugging Face Hub, read side: a repository and a revision become verified files on disk.

In: `org/name` and a branch, tag or commit. Out: a `Snapshot` (one commit, the files in it and what
their content must hash to), then paths of fetched files.

One request resolves the revision; everything after it asks for that commit, so config and weights
cannot come from two. Where the Hub cannot be reached the cache answers, and where that is empty
the error comes at once: the client's own long retries start only after the Hub has answered.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from natcupy.hub import client
from natcupy.hub.client import Access
from natcupy.hub.errors import Corrupt, HubError, NotFound, Offline, Unavailable
from natcupy.hub.files import git_blob_id, read_bytes, sha256_file

log = logging.getLogger("natcupy.hub")

FETCHES = 3  # of a file that arrives damaged
MAX_LISTING_BYTES = 32 << 20
MOST_LINKS = 8  # from a name in the cache to a file

_REPO = re.compile(r"[A-Za-z0-9][\w.\-]{0,95}/[A-Za-z0-9][\w.\-]{0,95}", re.ASCII)
_REVISION = re.compile(r"(?!.*\.\.)[A-Za-z0-9][\w./\-]{0,254}", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Expected:
    """What a file of a commit must be; None where the Hub did not say."""

    size: int | None = None
    sha256: str | None = None
    git_id: str | None = None


@dataclass(frozen=True)
class Snapshot:
    """One commit of a repository and the files in it (only cached ones when offline)."""

    repo: str
    revision: str
    commit: str
    files: dict[str, Expected]
    from_cache: bool
    private: bool = False
    is_listed: bool = True  # False where only what is cached is known


def parse_name(name: str) -> tuple[str, str | None] | None:
    """`org/name`, `org/name@revision` (also with `hf-hub:`) as its parts; None for other text."""
    text = name.removeprefix("hf-hub:")
    repo, at, revision = text.partition("@")
    if not _REPO.fullmatch(repo) or ".." in repo or (at and not _REVISION.fullmatch(revision)):
        return None
    return repo, revision or None


def resolve(repo: str, revision: str | None, access: Access) -> Snapshot:
    """Pin a revision (default `main`) to a commit and list its files, in one request.

    A commit that was listed before needs no request: the cache remembers what is in it. Without
    network the commit that it remembers for the revision is used, and said so in the log.

    Raises:
        NotFound, Gated, BadToken, Offline, Unavailable: which of them it is.
    """
    revision = revision or "main"
    if not _REPO.fullmatch(repo) or not _REVISION.fullmatch(revision):
        raise NotFound(f"a Hub name is org/name[@revision], got {repo[:120]!r}@{revision[:120]!r}.")
    cached = _cached(repo, revision, access)
    if cached and ((cached.commit == revision and cached.is_listed) or _is_closed(access)):
        return cached
    if _is_closed(access):
        raise Offline(client.not_cached(repo, revision, client.OFF))
    try:
        found = listed(repo, revision, access)
    except (Offline, Unavailable) as error:
        if cached is None:
            raise
        log.warning("%s Using the cached commit %s of %s.", error, cached.commit, repo)
        return cached
    if cached and cached.commit != found.commit:
        log.warning("%s@%s moved from %s to %s.", repo, revision, cached.commit, found.commit)
    _remember(found, access)
    return found


def _is_closed(access: Access) -> bool:
    """Whether nobody may be asked."""
    return access.local_files_only or client.is_offline()


def fetch(snapshot: Snapshot, name: str, access: Access, sha256: str | None = None) -> Path:
    """A file of the snapshot, on disk and verified; a damaged copy is fetched again.

    Args:
        name: a file listed in the snapshot.
        sha256: a hash known beforehand, checked besides what the Hub said.

    Raises:
        NotFound: the commit has no such file.
        Corrupt: the content differs from its hash, every time.
        HubError: the transfer failed.
    """
    if name not in snapshot.files:
        raise NotFound(
            f"{snapshot.repo}@{snapshot.commit} has no file {name!r}"
            + ("" if snapshot.is_listed else " in the cache")
            + f"; it has {', '.join(sorted(snapshot.files)[:10]) or 'none'}."
        )
    expected = snapshot.files[name]
    wrong = ""
    for _ in range(FETCHES):
        path = client.download(snapshot.repo, snapshot.commit, name, access)
        wrong = _difference(path, expected, sha256)
        if not wrong:
            return path
        if _is_closed(access):
            raise Corrupt(
                f"{path} does not have the content the Hub recorded: {wrong}. Load it again with "
                "a connection: a better copy takes its place."
            )
        log.warning("%s of %s is damaged (%s); fetching it again.", name, snapshot.repo, wrong)
        _discard(path)
    raise Corrupt(
        f"{name} of {snapshot.repo}@{snapshot.commit} does not have the content the Hub recorded: "
        f"{wrong}. The copy was removed from the cache; try again, and if it stays, tell the "
        "repository's owner."
    )


def listed(repo: str, revision: str, access: Access) -> Snapshot:
    """Ask the Hub which commit a revision is and what is in it; the cache is not looked at."""
    info = client.model_info(repo, revision, access)
    files = {entry.rfilename: _from_listing(entry) for entry in info.siblings or ()}
    return Snapshot(repo, revision, info.sha, files, from_cache=False, private=bool(info.private))


def _from_listing(entry: Any) -> Expected:
    large = entry.lfs
    sha256 = (large.get("sha256") if isinstance(large, dict) else large.sha256) if large else None
    return Expected(entry.size, sha256, None if large else entry.blob_id)


# ---------------------------------------------------------------- the cache


def _cached(repo: str, revision: str, access: Access) -> Snapshot | None:
    """What the cache holds for a revision; None unless config and weights are there.

    Its files are those of the commit, cached or not, where it was listed once.
    """
    found = client.cached_file(repo, revision, "config.json", access)
    if found is None:
        return None
    folder = found.parent
    files = {path.name: _from_blob(path) for path in folder.iterdir() if path.is_file()}
    if not any(name.endswith((".safetensors", ".bin")) for name in files):
        return None
    listing = _recalled(repo, folder.name, access)
    is_listed = listing is not None
    return Snapshot(
        repo, revision, folder.name, listing or files, from_cache=True, is_listed=is_listed
    )


def _from_blob(path: Path) -> Expected:
    """The cache names a blob by the hash the Hub gave, so a link still tells what to expect.

    The blob may be a link in its turn, to a file that repositories share under a name of Xet's.
    """
    blob = Path(os.readlink(path)).name if path.is_symlink() else ""
    return Expected(
        sha256=blob if _SHA256.fullmatch(blob) else None,
        git_id=blob if _COMMIT.fullmatch(blob) else None,
    )


def _remember(snapshot: Snapshot, access: Access) -> None:
    """Note what is in a commit, and which one a branch or tag stood for (as the client does)."""
    listing = {name: [e.size, e.sha256, e.git_id] for name, e in snapshot.files.items()}
    _note(_listing_of(snapshot.repo, snapshot.commit, access), json.dumps(listing))
    if not _COMMIT.fullmatch(snapshot.revision):
        folder = client.cache_folder(snapshot.repo, access)
        _note(folder / "refs" / snapshot.revision, snapshot.commit)


def _recalled(repo: str, commit: str, access: Access) -> dict[str, Expected] | None:
    """The files of a commit as they were listed once; None where that is not known."""
    try:
        data = read_bytes(_listing_of(repo, commit, access), MAX_LISTING_BYTES)
        return {str(name): Expected(*expected) for name, expected in json.loads(data).items()}
    except (OSError, HubError, ValueError, TypeError, AttributeError):
        return None


def _listing_of(repo: str, commit: str, access: Access) -> Path:
    return client.cache_folder(repo, access) / ".natcupy" / f"{commit}.json"


def _note(path: Path, text: str) -> None:
    draft = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(text, encoding="utf-8")
        os.replace(draft, path)
    except OSError as error:  # a read-only cache still serves; it only forgets
        log.info("the cache cannot remember %s (%s)", path, error.strerror)


def _discard(path: Path) -> None:
    """Remove a cached file and the links that lead to it."""
    places = [path]
    while places[-1].is_symlink() and len(places) < MOST_LINKS:
        places.append(places[-1].parent / os.readlink(places[-1]))
    for place in places:
        with contextlib.suppress(FileNotFoundError):
            place.unlink()


def _difference(path: Path, expected: Expected, sha256: str | None) -> str:
    """How the file differs from what it must be, as text; empty when it does not."""
    size = path.stat().st_size
    if expected.size is not None and size != expected.size:
        return f"{size:,} bytes instead of {expected.size:,}"
    if expected.sha256 or sha256:
        got = sha256_file(path)
        want = next((h for h in (expected.sha256, sha256) if h and h.lower() != got), None)
        return f"SHA-256 {got} instead of {want}" if want else ""
    if expected.git_id:
        got = git_blob_id(path.read_bytes())
        return f"git id {got} instead of {expected.git_id}" if got != expected.git_id else ""
    return ""
