"""What a push begins with: its aim, its files, what is on the Hub, and what has to change there.

In: the arguments of `push_to_hub`. Out: an `Attempt`, which is tried until it is done; `push` has
the one that changes the Hub, `rehearsal` the one that only says what would change.
"""

from __future__ import annotations

import inspect
import logging
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Generic, TypeVar

from natcupy.hub import card, client, download, shards
from natcupy.hub.client import ATTEMPTS, FIRST_PAUSE_S, LONGEST_PAUSE_S, Access, Subject
from natcupy.hub.dense import Model
from natcupy.hub.download import Expected, Snapshot
from natcupy.hub.errors import BadToken, Conflict, NotFound, Offline, RevisionNotFound, Unavailable
from natcupy.hub.facts import LICENSES, Facts, check_repo, taken_over
from natcupy.hub.files import git_blob_id, sha256_file
from natcupy.hub.saving import README, Package, is_weights, pack, state_facts, text_writer

log = logging.getLogger("natcupy.hub")

MAX_CARD_BYTES = 1_000_000
_BRANCH = re.compile(r"(?!.*\.\.)(?!.*//)[A-Za-z0-9][\w./\-]{0,120}", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")

Done = TypeVar("Done")  # what an attempt ends with


@dataclass(frozen=True)
class Target:
    """The checked aim of a push."""

    repo: str
    branch: str
    private: bool | None
    create_pr: bool
    parent: str | None
    message: str
    overwrite_card: bool


@dataclass(frozen=True)
class Changes:
    """Files that differ from a commit's, and weights there that the new ones make void."""

    added: list[str]
    deleted: list[str]

    def __bool__(self) -> bool:
        return bool(self.added or self.deleted)


def make_target(
    repo_id: str,
    *,
    private: bool | None = None,
    branch: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    parent_commit: str | None = None,
    overwrite_card: bool = False,
) -> Target:
    """The aim of a push, from the arguments of `push_to_hub` that concern it. Raises ValueError."""
    from natcupy import __version__

    repo = check_repo(repo_id)
    if branch is not None and revision is not None and branch != revision:
        raise ValueError(
            f"branch and revision are one thing, got branch={branch!r}, revision={revision!r}."
        )
    where = branch or revision or "main"
    if not isinstance(where, str) or not _BRANCH.fullmatch(where) or _COMMIT.fullmatch(where):
        raise ValueError(
            "branch must be a branch's name of letters, digits, '-', '_', '.', '/' (a commit "
            f"cannot be pushed to), got {str(where)[:80]!r}."
        )
    if create_pr and where != "main":
        raise ValueError(
            "a pull request is opened against main, got create_pr=True (--create-pr) with "
            f"branch={where!r} (--revision); leave one of them out."
        )
    if parent_commit is not None and not (
        isinstance(parent_commit, str) and _COMMIT.fullmatch(parent_commit)
    ):
        raise ValueError(
            f"parent_commit must be a commit's 40 digits, got {str(parent_commit)[:60]!r}."
        )
    if private is not None and not isinstance(private, bool):
        raise ValueError(f"private must be True, False or None, got {private!r}.")
    message = commit_message or f"{repo.split('/')[1]}, saved with natcupy {__version__}"
    if not isinstance(message, str) or not message.strip():
        raise ValueError(f"commit_message must be text, got {message!r}.")
    return Target(
        repo, where, private, bool(create_pr), parent_commit, message, bool(overwrite_card)
    )


_AIM = [*inspect.signature(make_target).parameters][1:]  # of the arguments of `push_to_hub`


def prepare(
    model: Model,
    repo_id: str,
    *,
    token: str | bool | None = None,
    card_text: str | None = None,
    max_shard_bytes: int = shards.MAX_SHARD_BYTES,
    **given: Any,
) -> tuple[Package, Target, Access, str | None]:
    """What comes before the first request of a push, from the arguments of `push_to_hub`."""
    target = make_target(repo_id, **{name: given.pop(name) for name in _AIM if name in given})
    stated = state_facts(model, target.repo, **given)
    if card_text is not None and card.is_generated(card_text):
        stated = taken_over(stated, card.stated(card_text), same_weights=True)
        card_text = None
    return pack(model, stated, max_shard_bytes), target, Access(token), card_text


def check_may_push(facts: Facts, access: Access) -> None:
    """Raise for a licence that the Hub does not know, or without a login."""
    if facts.license and facts.license not in LICENSES:
        raise ValueError(
            f"the weights state the licence {facts.license!r}, unknown to the Hub; "
            "pass license=… (--license on the command line; for a text of its own: 'other')."
        )
    if not client.has_login(access):
        raise BadToken(
            "pushing needs a login: 'hf auth login', the variable HF_TOKEN, or token=… with a "
            "token that may write."
        )


@contextmanager
def laid_out(package: Package, access: Access) -> Iterator[tuple[dict[str, Path], Path]]:
    """The files of a package that may be pushed, but for its card, and a place for that."""
    check_may_push(package.facts, access)
    with TemporaryDirectory(prefix="natcupy-push-") as place:
        folder = Path(place) / "files"
        folder.mkdir()
        files = {name: folder / name for name in package.writers}
        for name, write in package.writers.items():
            write(files[name])
        yield files, Path(place)


class Attempt(ABC, Generic[Done]):
    """Tried until it is done, the line stays dead, or somebody else pushed."""

    def __init__(
        self,
        package: Package,
        target: Target,
        access: Access,
        card_text: str | None,
        files: dict[str, Path],
        place: Path,
    ):
        self.package, self.target, self.files, self.place = package, target, files, place
        self.card_text = card_text
        self.access = replace(access, cache_dir=place / "cache")
        self.pinned = target.parent
        self.subject = Subject(target.repo, target.branch, writing=True)

    def run(self) -> Done:
        """Do it; once more where the Hub did not answer, after a pause."""
        pause = FIRST_PAUSE_S
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return self.once()
            except (Unavailable, Offline) as error:
                never_there = isinstance(error, Offline) and self.pinned is None
                if attempt == ATTEMPTS or never_there:
                    raise
                wait = min(getattr(error, "retry_after", None) or pause, LONGEST_PAUSE_S)
                log.info("%s Trying again in %.1f s.", error, wait)
                time.sleep(wait)
                pause *= 2
        raise AssertionError("the last attempt returns or raises")

    @abstractmethod
    def once(self) -> Done:
        """One try."""

    @abstractmethod
    def head(self) -> Snapshot:
        """The commit and files that the push goes on from."""

    # -- what is refused ---------------------------------------------------------------------------

    def refuse_missing(self) -> None:
        """Raise where there must be a repository already."""
        target = self.target
        if target.create_pr or target.parent:
            what = "a pull request" if target.create_pr else f"parent_commit {target.parent}"
            raise NotFound(
                f"{target.repo} does not exist (or the login in use may not see it), so there is "
                f"nothing for {what} to refer to. Push without it first."
            )

    def refuse_reference(self) -> None:
        """Raise where the branch is one that only the Hub makes."""
        if self.target.branch.startswith("refs/"):
            raise RevisionNotFound(
                f"{self.target.repo} has no {self.target.branch}. Open a pull request with "
                "create_pr=True (--create-pr)."
            )

    def check_visibility(self, head: Snapshot) -> None:
        """Raise where the repository is public and the call says private, or the other way."""
        wanted = self.target.private
        if wanted is not None and head.private != wanted:
            now = "private" if head.private else "public"
            raise Conflict(
                f"{self.target.repo} is {now}, the call says private={wanted}. Change it in the "
                "repository's settings, or leave private out. Nothing was pushed."
            )

    # -- what has to change ------------------------------------------------------------------------

    def compared(self) -> tuple[Snapshot, dict[str, Path], Changes]:
        """What is there, the files to be there, and what to change for that."""
        head = self.head()
        files = self._with_card(head)
        found = _changes(head, files)
        if found:
            self.pinned = self.pinned or head.commit
        if found and head.commit != self.pinned:
            raise Conflict(
                f"{self.subject} must be at commit {self.pinned} to be pushed to, it is at "
                f"{head.commit}: somebody else pushed. Look at that commit, then run the same call "
                "again."
            )
        return head, files, found

    def request(
        self, head: Snapshot, files: Mapping[str, Path]
    ) -> tuple[int | None, Snapshot, Changes]:
        """The pull request to write to, what is there and what to change.

        It is one that an earlier, cut push left open; else None, for a new one.
        """
        with client.explained(self.subject):
            numbers = client.open_requests(self.target.repo, self.target.message, self.access)
        for number in numbers:
            there = download.listed(self.target.repo, f"refs/pr/{number}", self.access)
            found = _changes(there, files)
            if not found or there.commit == head.commit:
                return number, there, found
        return None, head, _changes(head, files)

    def request_url(self, number: int) -> str:
        """The address of a pull request."""
        return f"{client.endpoint()}/{self.target.repo}/discussions/{number}"

    def _with_card(self, head: Snapshot) -> dict[str, Path]:
        """The files to be there; the card only where it may replace the one that is."""
        text = self.card_text
        remote = self._remote_card(head)
        if remote is not None and not self.target.overwrite_card and not card.is_generated(remote):
            if self.card_text is None or remote != self.card_text:
                log.warning("%s keeps its edited README.md.", self.target.repo)
            return self.files
        if text is None:
            old = card.stated(remote) if remote and card.is_generated(remote) else {}
            same = not any(is_weights(name) for name in _changes(head, self.files).added)
            facts = taken_over(self.package.facts, old, same)
            text = replace(self.package, facts=facts).card()
        path = self.place / README
        text_writer(text)(path)
        return {**self.files, README: path}

    def _remote_card(self, head: Snapshot) -> str | None:
        expected = head.files.get(README)
        if expected is None:
            return None
        if expected.size is not None and expected.size > MAX_CARD_BYTES:
            return ""  # nothing natcupy wrote
        return download.fetch(head, README, self.access).read_text("utf-8", "replace")


def _changes(head: Snapshot, files: Mapping[str, Path]) -> Changes:
    added = [name for name, path in sorted(files.items()) if not _equal(path, head.files.get(name))]
    return Changes(
        added, [name for name in sorted(head.files) if is_weights(name) and name not in files]
    )


def _equal(path: Path, there: Expected | None) -> bool:
    if there is None or (there.size is not None and there.size != path.stat().st_size):
        return False
    if there.sha256:
        return sha256_file(path) == there.sha256
    return there.git_id is not None and git_blob_id(path.read_bytes()) == there.git_id
