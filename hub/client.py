"""The Hugging Face Hub's client, and the only file that imports it (inside functions).

In: a repository, a revision, a file, and how to reach the Hub (`Access`). Out: what the client
returns, or one of our errors: this is the one place where its many errors become ours.

Passing trouble (5xx, 429, cut transfers) is tried again with growing pauses. Tokens are handed
through to the client and never kept, printed or put into an address.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from natcupy.hub import weights
from natcupy.hub.errors import (
    BadToken,
    Conflict,
    Forbidden,
    Gated,
    HubError,
    NotFound,
    Offline,
    RevisionNotFound,
    Truncated,
    Unavailable,
)

log = logging.getLogger("natcupy.hub")

LIBRARY = "natcupy"
ATTEMPTS = 4
FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 20.0

_LOCAL_TROUBLE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EMFILE)
# What an answer that is not the Hub's makes the client stumble over.
_STUMBLES = (KeyError, TypeError, AttributeError)
OFF = "the Hub is switched off (offline mode)"
_AT_THE_HUB = "https://huggingface.co/"
# As the HTTP libraries under the client's versions call it.
_NO_CONNECTION = frozenset({
    "ConnectError", "ConnectTimeout", "ConnectTimeoutError", "NameResolutionError",
    "NewConnectionError", "ProxyError", "SSLError", "gaierror",
})  # fmt: skip
_BAD_ADDRESS = frozenset({
    "InvalidProxyURL", "InvalidSchema", "InvalidURL", "LocationParseError", "MissingSchema",
    "UnsupportedProtocol",
})  # fmt: skip

Result = TypeVar("Result")


@dataclass(frozen=True)
class Access:
    """How to reach the Hub: the client's usual options, never stored on a model or in a file."""

    token: str | bool | None = field(default=None, repr=False)
    cache_dir: str | Path | None = None
    local_files_only: bool = False

    def __post_init__(self) -> None:
        if self.cache_dir is not None:  # the client expands it in some of its functions only
            object.__setattr__(self, "cache_dir", os.path.expanduser(self.cache_dir))


@dataclass(frozen=True)
class Subject:
    """What a request is about, for its errors."""

    repo: str
    revision: str
    name: str | None = None
    writing: bool = False
    dataset: bool = False

    def __str__(self) -> str:
        return f"{self.repo}@{self.revision}" + (f", file {self.name}" if self.name else "")


# ---------------------------------------------------------------- requests


def is_offline() -> bool:
    """Whether the client is switched off by its environment variable."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def has_login(access: Access) -> bool:
    """Whether there is a token to send; it is not looked at."""
    from huggingface_hub import get_token

    return isinstance(access.token, str) or (access.token is not False and get_token() is not None)


def api(access: Access) -> Any:
    """The client, saying that it is natcupy who asks."""
    from huggingface_hub import HfApi

    return HfApi(token=access.token, library_name=LIBRARY, library_version=_version())


def model_info(repo: str, revision: str, access: Access) -> Any:
    """Which commit a revision is and what is in it, in one request."""
    from huggingface_hub import constants

    hub = api(access)

    def ask() -> Any:
        return hub.model_info(
            repo,
            revision=revision,
            files_metadata=True,
            timeout=constants.HF_HUB_ETAG_TIMEOUT,
        )

    return persist(ask, Subject(repo, revision))


def ask_for_dataset(repo: str, revision: str | None, access: Access) -> None:
    """Ask once whether the Hub has a dataset. Raises NotFound, Offline and their like."""
    from huggingface_hub import constants

    hub = api(access)

    def ask() -> Any:
        return hub.dataset_info(repo, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT)

    persist(ask, Subject(repo, revision or "main", dataset=True))


def ask_who(subject: Subject, access: Access) -> str:
    """The name of who is logged in. Raises BadToken, Offline and their like."""
    return persist(lambda: api(access).whoami()["name"], subject)


def download(repo: str, commit: str, name: str, access: Access) -> Path:
    """A file of a commit, in the cache; its content is not verified here."""
    from huggingface_hub import hf_hub_download

    def get() -> str:
        return hf_hub_download(
            repo,
            name,
            revision=commit,
            cache_dir=access.cache_dir,
            token=access.token,
            local_files_only=access.local_files_only,
            library_name=LIBRARY,
            library_version=_version(),
        )

    return Path(persist(get, Subject(repo, commit, name)))


def commit(
    repo: str,
    branch: str,
    parent: str,
    added: Mapping[str, Path],
    deleted: Sequence[str],
    message: str,
    create_pr: bool,
    access: Access,
) -> Any:
    """Upload blobs, then make one commit on top of `parent`; errors are the caller's to explain."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    operations = [
        *(
            CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(p))
            for name, p in added.items()
        ),
        *(CommitOperationDelete(path_in_repo=name) for name in deleted),
    ]
    return api(access).create_commit(
        repo,
        operations,
        commit_message=message,
        revision=branch,
        create_pr=create_pr,
        parent_commit=parent,
    )


def open_requests(repo: str, title: str, access: Access) -> list[int]:
    """Numbers of the open pull requests with this title."""
    found = api(access).get_repo_discussions(repo)
    return [
        entry.num
        for entry in found
        if entry.is_pull_request and entry.status in ("open", "draft") and entry.title == title
    ]


def endpoint() -> str:
    """The Hub's address, as the client has it."""
    from huggingface_hub import constants

    return str(constants.ENDPOINT)


def cached_file(repo: str, revision: str, name: str, access: Access) -> Path | None:
    """Where the cache has a file, without any request."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repo, name, cache_dir=access.cache_dir, revision=revision)
    return Path(found) if isinstance(found, str) else None


def cache_root(access: Access) -> Path:
    """The folder that downloads are kept in."""
    from huggingface_hub import constants

    folder = str(access.cache_dir or constants.HF_HUB_CACHE)
    if os.path.expanduser(folder).startswith("~"):
        raise HubError(
            f"downloads are kept in {folder}, and this user has no home folder. Set HF_HOME to a "
            "folder that can be written."
        )
    return Path(folder).expanduser()


def cache_folder(repo: str, access: Access) -> Path:
    """The folder in the cache that belongs to a repository."""
    from huggingface_hub.file_download import repo_folder_name

    return cache_root(access) / repo_folder_name(repo_id=repo, repo_type="model")


def _version() -> str:
    import natcupy

    return natcupy.__version__


def persist(call: Callable[[], Result], subject: Subject) -> Result:
    """Make a call to the Hub; try again only what can pass by itself (5xx, 429, cut transfers)."""
    pause = FIRST_PAUSE_S
    for attempt in range(1, ATTEMPTS + 1):
        try:
            with explained(subject):
                return call()
        except Unavailable as error:
            if attempt == ATTEMPTS:
                raise
            wait = min(error.retry_after or pause, LONGEST_PAUSE_S)
            log.info("%s Trying again in %.1f s.", error, wait)
            time.sleep(wait)
            pause *= 2
    raise AssertionError("the last attempt returns or raises")


# ---------------------------------------------------------------- errors


@contextlib.contextmanager
def explained(subject: Subject) -> Iterator[None]:
    """Turn the client's errors into ours."""
    from huggingface_hub.errors import HfHubHTTPError

    # The client changed its HTTP library twice; its own error class knows the current one.
    transport = next(cls for cls in HfHubHTTPError.__mro__ if cls.__name__ == "HTTPError")
    try:
        yield
    except HubError:
        raise
    except Exception as error:
        ours = _misunderstood(error, subject)
        if ours is None and isinstance(error, OSError | ValueError | RuntimeError | transport):
            ours = _translate(error, subject)
        if ours is None:
            raise
        # Not chained to the client's error: that one holds the request, and with it the token.
        raise ours from None


def _misunderstood(error: Exception, subject: Subject) -> HubError | None:
    """What goes wrong where an address is none, or who answers is not the Hub."""
    kind = type(error).__name__
    if kind in _BAD_ADDRESS:
        return Offline(
            f"the Hub has no valid address here ({kind}), so {subject} was not asked for. Correct "
            "HF_ENDPOINT (https://...), or the proxy in HTTPS_PROXY, HTTP_PROXY or ALL_PROXY."
        )
    if kind == "JSONDecodeError" or isinstance(error, _STUMBLES):
        return Unavailable(
            f"what answered for {subject} is not the Hub ({kind}: {' '.join(str(error).split())}), "
            "but perhaps a login page of the network or a proxy. Log in there, or correct "
            "HF_ENDPOINT, then run the same call again."
        )
    return None


def _translate(error: Exception, subject: Subject) -> Exception | None:
    from huggingface_hub import errors as theirs

    repo, revision = subject.repo, subject.revision
    if isinstance(error, theirs.GatedRepoError):
        return Gated(
            f"{subject} is gated: its owner decides who may read it. Log in with 'hf auth login', "
            f"accept the terms at {_AT_THE_HUB}{repo}, then try again."
        )
    if isinstance(error, theirs.RepositoryNotFoundError):
        return NotFound(_no_repository(subject))
    if isinstance(error, theirs.RevisionNotFoundError):
        return RevisionNotFound(
            f"{repo} has no branch, tag or commit {revision!r}. Its revisions are listed at "
            f"{_AT_THE_HUB}{repo}/commits/main."
        )
    if isinstance(error, theirs.LocalTokenNotFoundError):
        return BadToken("no token is stored here. Log in with 'hf auth login', or set HF_TOKEN.")
    if isinstance(error, theirs.LocalEntryNotFoundError | theirs.OfflineModeIsEnabled):
        return _translate_absent(error, subject)
    if isinstance(error, theirs.EntryNotFoundError):
        return NotFound(f"{subject} does not exist. See {_AT_THE_HUB}{repo}/tree/{revision}.")
    if isinstance(error, theirs.HFValidationError):
        return NotFound(f"a Hub name is org/name[@revision], got {str(subject)!r}.")
    if isinstance(error, theirs.HfHubHTTPError):
        return _translate_status(error, subject)
    if isinstance(error, ValueError) and str(error).startswith("Invalid metadata"):
        return HubError(f"the Hub refuses the card of {repo}: {' '.join(str(error).split())[:400]}")
    if isinstance(error, RuntimeError):
        return _translate_upload(error, subject)
    if isinstance(error, ValueError) and not isinstance(error, OSError):
        return None
    if isinstance(error, OSError) and error.errno in _LOCAL_TROUBLE:
        return _at_home(error)
    return _translate_transport(error, subject)


def _translate_absent(error: Exception, subject: Subject) -> Exception | None:
    """The client says "not in the cache" for whatever kept it from asking; look at the cause."""
    cause = error.__cause__
    if subject.name is None or not isinstance(cause, Exception) or _never_reached(cause):
        return Offline(_unreachable(subject))
    return _translate(cause, subject)


def _translate_upload(error: RuntimeError, subject: Subject) -> Exception | None:
    """The client wraps what goes wrong while a file is uploaded; look at the cause."""
    cause = error.__cause__
    if not str(error).startswith("Error while uploading") or not isinstance(cause, Exception):
        return None
    return _translate(cause, subject)


def _translate_status(error: Any, subject: Subject) -> HubError:
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    if status == 401:
        return BadToken(
            f"the Hub did not accept the token sent for {subject} (wrong or expired). Log in again "
            "with 'hf auth login', check HF_TOKEN, or pass token=False (on the command line, set "
            "HF_HUB_DISABLE_IMPLICIT_TOKEN=1) to read without one."
        )
    if status == 403 and subject.writing:
        return Forbidden(
            f"the token in use may not write to {subject}. Give it write rights for that "
            "namespace, push to one of your own, or propose the change with create_pr=True "
            "(--create-pr)."
        )
    if status == 403:
        return Gated(
            f"the token in use may not read {subject}. Give it read rights for that repository, or "
            "log in with another account."
        )
    if status == 412 or (status == 409 and subject.writing):
        return Conflict(
            f"{subject} changed while the push was under way; nothing of it was written. Look at "
            "the other commit, then run the same call again."
        )
    if status in (408, 429) or status is None or status >= 500:
        ours = Unavailable(
            f"the Hub could not serve {subject} now (status {status}). Try again later."
        )
        after = response.headers.get("Retry-After", "") if response is not None else ""
        ours.retry_after = float(after) if re.fullmatch(r"\d{1,6}", after) else None
        return ours
    return HubError(f"the Hub refused {subject} with status {status}.")


def _translate_transport(error: Exception, subject: Subject) -> HubError:
    """No status came back: the Hub was never reached, or a transfer broke off."""
    if str(error).startswith("Consistency check failed"):
        return Truncated(f"{subject} arrived with the wrong size. Try again.")
    if subject.name is None and _never_reached(error):
        return Offline(_unreachable(subject))
    return Unavailable(
        f"the transfer of {subject} broke off ({type(error).__name__}). Run the same call again: "
        "it resumes where it stopped."
    )


def _at_home(error: OSError) -> OSError:
    """The same error, with what to do about a folder of the client's that cannot be used."""
    why = error.strerror or os.strerror(error.errno)
    text = f"{why}; set HF_HOME, where the Hub's client keeps tokens and files, to another folder"
    return OSError(error.errno, text, error.filename)


def _never_reached(error: BaseException | None) -> bool:
    """Whether no connection came about at all, which trying again at once does not change."""
    for _ in range(10):
        if error is None:
            return False
        if type(error).__name__ in _NO_CONNECTION or isinstance(error, ConnectionRefusedError):
            return True
        error = error.__cause__ or error.__context__
    return False


# ---------------------------------------------------------------- words


def _no_repository(subject: Subject) -> str:
    from huggingface_hub import get_token

    repo = subject.repo
    near = () if subject.dataset else weights.nearest(repo.split("/")[1])
    hint = f" Names natcupy knows: {', '.join(near)}." if near else ""
    login = "the login in use may not see it" if get_token() else "it needs a login"
    return (
        f"{repo} does not exist on the Hub, or it is private and {login} ('hf auth login').{hint}"
    )


def _unreachable(subject: Subject) -> str:
    state = OFF if is_offline() else "the Hub cannot be reached"
    if subject.writing:
        return f"{state}, so nothing was pushed to {subject}. Try again later."
    if subject.dataset:
        return "the Hub cannot be reached; HF_HUB_OFFLINE=1 uses a copy from the cache, if any."
    return not_cached(subject.repo, subject.revision, state)


def not_cached(repo: str, revision: str, why: str) -> str:
    """What to do without network and without a copy."""
    inside = ", ".join(weights.embedded_names()) or "nat-digits"
    return (
        f"{repo}@{revision} is not in the cache and {why}. Connect once (then it is cached), or "
        "copy the repository's files here and pass the folder. Without any network: 'natcupy demo' "
        f"or the model {inside}, whose weights are part of the package."
    )
