"""The Hugging Face Hub, read side: a repository and a revision become verified files on disk.

In: `org/name` and a branch, tag or commit. Out: a `Snapshot` (one commit, the files in it and what
their content must hash to), then paths of fetched files. The only file that imports
huggingface_hub, inside functions, and the one place where its many errors become ours.

One request resolves the revision; everything after it asks for that commit, so config and weights
cannot come from two. Where the Hub cannot be reached the cache answers, and where that is empty
the error comes at once: the client's own long retries start only after the Hub has answered.
Tokens are handed through to the client and never kept, printed or put into an address.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from natcupy.hub import weights
from natcupy.hub.errors import (
    BadToken,
    Corrupt,
    Gated,
    HubError,
    NotFound,
    Offline,
    Truncated,
    Unavailable,
)
from natcupy.hub.files import git_blob_id, sha256_file

log = logging.getLogger("natcupy.hub")

LIBRARY = "natcupy"
ATTEMPTS = 4
FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 20.0

_REPO = re.compile(r"[A-Za-z0-9][\w.\-]{0,95}/[A-Za-z0-9][\w.\-]{0,95}", re.ASCII)
_REVISION = re.compile(r"(?!.*\.\.)[A-Za-z0-9][\w./\-]{0,254}", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_LOCAL_TROUBLE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EMFILE)
_AT_THE_HUB = "https://huggingface.co/"

Result = TypeVar("Result")


@dataclass(frozen=True)
class Access:
    """How to reach the Hub: the client's usual options, never stored on a model or in a file."""

    token: str | bool | None = field(default=None, repr=False)
    cache_dir: str | Path | None = None
    local_files_only: bool = False


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


def parse_name(name: str) -> tuple[str, str | None] | None:
    """`org/name`, `org/name@revision` (also with `hf-hub:`) as its parts; None for other text."""
    text = name.removeprefix("hf-hub:")
    repo, at, revision = text.partition("@")
    if not _REPO.fullmatch(repo) or ".." in repo or (at and not _REVISION.fullmatch(revision)):
        return None
    return repo, revision or None


def resolve(repo: str, revision: str | None, access: Access) -> Snapshot:
    """Pin a revision (default `main`) to a commit and list its files, in one request.

    A commit that is cached with config and weights needs no request. Without network the commit
    that the cache remembers for the revision is used, and said so in the log.

    Raises:
        NotFound, Gated, BadToken, Offline, Unavailable: which of them it is.
    """
    revision = revision or "main"
    if not _REPO.fullmatch(repo) or not _REVISION.fullmatch(revision):
        raise NotFound(f"a Hub name is org/name[@revision], got {repo[:120]!r}@{revision[:120]!r}.")
    cached = _cached(repo, revision, access)
    if cached and (_COMMIT.fullmatch(revision) or access.local_files_only or _client_offline()):
        return cached
    if access.local_files_only or _client_offline():
        raise Offline(_not_cached(repo, revision, "the Hub is switched off (offline mode)"))
    try:
        found = _listed(repo, revision, access)
    except (Offline, Unavailable) as error:
        if cached is None:
            raise
        log.warning("%s Using the cached commit %s of %s.", error, cached.commit, repo)
        return cached
    if cached and cached.commit != found.commit:
        log.warning("%s@%s moved from %s to %s.", repo, revision, cached.commit, found.commit)
    if not _COMMIT.fullmatch(revision):
        _remember(found, access)
    return found


def fetch(snapshot: Snapshot, name: str, access: Access, sha256: str | None = None) -> Path:
    """A file of the snapshot, on disk and verified; a damaged copy is fetched once more.

    Args:
        name: a file listed in the snapshot.
        sha256: a hash known beforehand, checked besides what the Hub said.

    Raises:
        NotFound: the commit has no such file.
        Corrupt: the content differs from its hash, twice.
        HubError: the transfer failed.
    """
    if name not in snapshot.files:
        raise NotFound(
            f"{snapshot.repo}@{snapshot.commit} has no file {name!r}"
            + (" in the cache" if snapshot.from_cache else "")
            + f"; it has {', '.join(sorted(snapshot.files)[:10]) or 'none'}."
        )
    expected = snapshot.files[name]
    wrong = ""
    for _ in range(2):
        path = _download(snapshot, name, access)
        wrong = _difference(path, expected, sha256)
        if not wrong:
            return path
        log.warning("%s of %s is damaged (%s); fetching it again.", name, snapshot.repo, wrong)
        _discard(path)
    raise Corrupt(
        f"{name} of {snapshot.repo}@{snapshot.commit} does not have the content the Hub recorded: "
        f"{wrong}. The copy was removed from the cache; try again, and if it stays, tell the "
        "repository's owner."
    )


# ---------------------------------------------------------------- the cache


def _cached(repo: str, revision: str, access: Access) -> Snapshot | None:
    """What the cache holds for a revision; None unless config and weights are there."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(
        repo, "config.json", cache_dir=access.cache_dir, revision=revision
    )
    if not isinstance(found, str):
        return None
    folder = Path(found).parent
    files = {path.name: _from_blob(path) for path in folder.iterdir() if path.is_file()}
    if not any(name.endswith((".safetensors", ".bin")) for name in files):
        return None
    return Snapshot(repo, revision, folder.name, files, from_cache=True)


def _from_blob(path: Path) -> Expected:
    """The cache names a blob by the hash the Hub gave, so a link still tells what to expect."""
    blob = path.resolve().name if path.is_symlink() else ""
    return Expected(
        sha256=blob if _SHA256.fullmatch(blob) else None,
        git_id=blob if _COMMIT.fullmatch(blob) else None,
    )


def _remember(snapshot: Snapshot, access: Access) -> None:
    """Note which commit a branch or tag stood for, where the client looks when it is offline."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    root = Path(access.cache_dir or constants.HF_HUB_CACHE).expanduser()
    note = root / repo_folder_name(repo_id=snapshot.repo, repo_type="model") / "refs"
    note = note / snapshot.revision
    draft = note.with_name(f"{note.name}.{os.getpid()}.tmp")
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(snapshot.commit, encoding="ascii")
        os.replace(draft, note)
    except OSError as error:  # a read-only cache still serves; it only forgets
        log.info("the cache cannot remember %s (%s)", snapshot.repo, error.strerror)


def _discard(path: Path) -> None:
    for place in (path.resolve(), path):
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


# ---------------------------------------------------------------- the client


def _client_offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _version() -> str:
    import natcupy

    return natcupy.__version__


def _listed(repo: str, revision: str, access: Access) -> Snapshot:
    """Ask the Hub which commit a revision is and what is in it."""
    from huggingface_hub import HfApi, constants

    api = HfApi(token=access.token, library_name=LIBRARY, library_version=_version())

    def ask() -> Any:
        return api.model_info(
            repo,
            revision=revision,
            files_metadata=True,
            timeout=constants.HF_HUB_ETAG_TIMEOUT,
        )

    info = _persist(ask, repo, revision, None)
    files = {entry.rfilename: _from_listing(entry) for entry in info.siblings or ()}
    return Snapshot(repo, revision, info.sha, files, from_cache=False)


def _from_listing(entry: Any) -> Expected:
    large = entry.lfs
    sha256 = (large.get("sha256") if isinstance(large, dict) else large.sha256) if large else None
    return Expected(entry.size, sha256, None if large else entry.blob_id)


def _download(snapshot: Snapshot, name: str, access: Access) -> Path:
    from huggingface_hub import hf_hub_download

    def get() -> str:
        return hf_hub_download(
            snapshot.repo,
            name,
            revision=snapshot.commit,
            cache_dir=access.cache_dir,
            token=access.token,
            local_files_only=snapshot.from_cache and access.local_files_only,
            library_name=LIBRARY,
            library_version=_version(),
        )

    return Path(_persist(get, snapshot.repo, snapshot.revision, name))


def _persist(call: Callable[[], Result], repo: str, revision: str, name: str | None) -> Result:
    """Make a call to the Hub; try again only what can pass by itself (5xx, 429, cut transfers)."""
    pause = FIRST_PAUSE_S
    for attempt in range(1, ATTEMPTS + 1):
        try:
            with _explained(repo, revision, name):
                return call()
        except Unavailable as error:
            if attempt == ATTEMPTS:
                raise
            wait = min(error.retry_after or pause, LONGEST_PAUSE_S)
            log.info("%s Trying again in %.1f s.", error, wait)
            time.sleep(wait)
            pause *= 2
    raise AssertionError("the last attempt returns or raises")


@contextlib.contextmanager
def _explained(repo: str, revision: str, name: str | None) -> Iterator[None]:
    """Turn the client's errors into ours."""
    from huggingface_hub.errors import HfHubHTTPError

    # The client changed its HTTP library twice; its own error class knows the current one.
    transport = next(cls for cls in HfHubHTTPError.__mro__ if cls.__name__ == "HTTPError")
    try:
        yield
    except HubError:
        raise
    except (OSError, ValueError, transport) as error:
        ours = _translate(error, repo, revision, name)
        if ours is None:
            raise
        # Not chained to the client's error: that one holds the request, and with it the token.
        raise ours from None


def _translate(error: Exception, repo: str, revision: str, name: str | None) -> HubError | None:
    from huggingface_hub import errors as theirs

    what = f"{repo}@{revision}" + (f", file {name}" if name else "")
    if isinstance(error, theirs.GatedRepoError):
        return Gated(
            f"{what} is gated: its owner decides who may read it. Log in with 'hf auth login', "
            f"accept the terms at {_AT_THE_HUB}{repo}, then try again."
        )
    if isinstance(error, theirs.RepositoryNotFoundError):
        return NotFound(_no_repository(repo))
    if isinstance(error, theirs.RevisionNotFoundError):
        return NotFound(
            f"{repo} has no branch, tag or commit {revision!r}. Its revisions are listed at "
            f"{_AT_THE_HUB}{repo}/commits/main."
        )
    if isinstance(error, theirs.LocalEntryNotFoundError | theirs.OfflineModeIsEnabled):
        return Offline(_not_cached(repo, revision, "the Hub cannot be reached"))
    if isinstance(error, theirs.EntryNotFoundError):
        return NotFound(f"{what} does not exist. See {_AT_THE_HUB}{repo}/tree/{revision}.")
    if isinstance(error, theirs.HFValidationError):
        return NotFound(f"a Hub name is org/name[@revision], got {what!r}.")
    if isinstance(error, theirs.HfHubHTTPError):
        return _translate_status(error, what)
    if isinstance(error, ValueError) and not isinstance(error, OSError):
        return None
    if isinstance(error, OSError) and error.errno in _LOCAL_TROUBLE:
        return None
    return _translate_transport(error, repo, revision, name, what)


def _translate_status(error: Any, what: str) -> HubError:
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    if status == 401:
        return BadToken(
            f"the Hub did not accept the token sent for {what} (wrong or expired). Log in again "
            "with 'hf auth login', check HF_TOKEN, or pass token=False to read without one."
        )
    if status == 403:
        return Gated(
            f"the token in use may not read {what}. Give it read rights for that repository, or "
            "log in with another account."
        )
    if status in (408, 429) or status is None or status >= 500:
        ours = Unavailable(
            f"the Hub could not serve {what} now (status {status}). Try again later."
        )
        after = response.headers.get("Retry-After", "") if response is not None else ""
        ours.retry_after = float(after) if re.fullmatch(r"\d{1,6}", after) else None
        return ours
    return HubError(f"the Hub refused {what} with status {status}.")


def _translate_transport(
    error: Exception, repo: str, revision: str, name: str | None, what: str
) -> HubError:
    """No status came back: the line is down (nothing answered yet), or a transfer broke off."""
    if str(error).startswith("Consistency check failed"):
        return Truncated(f"{what} arrived with the wrong size. Try again.")
    if name is None:
        return Offline(_not_cached(repo, revision, "the Hub cannot be reached"))
    return Unavailable(
        f"the transfer of {what} broke off ({type(error).__name__}). Run the same call again: it "
        "resumes where it stopped."
    )


# ---------------------------------------------------------------- words


def _no_repository(repo: str) -> str:
    from huggingface_hub import get_token

    near = weights.nearest(repo.split("/")[1])
    hint = f" Names natcupy knows: {', '.join(near)}." if near else ""
    login = "the login in use may not see it" if get_token() else "it needs a login"
    return (
        f"{repo} does not exist on the Hub, or it is private and {login} ('hf auth login').{hint}"
    )


def _not_cached(repo: str, revision: str, why: str) -> str:
    inside = ", ".join(weights.embedded_names()) or "nat-digits"
    return (
        f"{repo}@{revision} is not in the cache and {why}. Connect once (then it is cached), or "
        "copy the repository's files here and pass the folder. Without any network: 'natcupy demo' "
        f"or from_pretrained with {inside}, whose weights are part of the package."
    )
