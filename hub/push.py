"""Pushing: a model becomes one commit of a Hub repository, or nothing does.

In: a model, a repository's name, and what its card may say. Out: `Pushed`, and on the Hub one
commit with config, weights, card and preprocessing, made on top of the commit that was looked at.

Everything is checked and laid out on disk before the first request. Then the branch's commit is
looked up and pinned, files are compared by hash, large files go up as blobs that nobody sees, and
one commit request makes all of it visible. So a push that is cut anywhere leaves the branch as it
was, or complete; the only other trace can be an empty repository, branch or pull request that was
made for it. The same call again finishes what is missing, and finds out where an answer got lost.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from natcupy.hub import card, client, download, shards
from natcupy.hub.client import ATTEMPTS, FIRST_PAUSE_S, LONGEST_PAUSE_S, Access, Subject
from natcupy.hub.dense import Model
from natcupy.hub.download import Expected, Snapshot
from natcupy.hub.errors import (
    BadToken,
    Conflict,
    Forbidden,
    NotFound,
    Offline,
    RevisionNotFound,
    Unavailable,
)
from natcupy.hub.facts import LICENSES, Facts, Metric, check_repo, taken_over
from natcupy.hub.files import git_blob_id, sha256_file
from natcupy.hub.saving import README, Package, is_weights, pack, state_facts, text_writer

log = logging.getLogger("natcupy.hub")

MAX_CARD_BYTES = 1_000_000
_BRANCH = re.compile(r"(?!.*\.\.)(?!.*//)[A-Za-z0-9][\w./\-]{0,120}", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
# The arguments of `push_to_hub` that say where to push and how.
_AIM = (
    *("private", "branch", "revision", "create_pr", "commit_message", "parent_commit"),
    "overwrite_card",
)


@dataclass(frozen=True)
class Pushed:
    """What a push left on the Hub.

    Attributes:
        repo, branch, commit: where the model is; the branch of a pull request is `refs/pr/N`.
        url: of the commit.
        files: what changed; empty where the Hub had it all already.
        pull_request: its address, where one was opened or continued.
    """

    repo: str
    branch: str
    commit: str
    url: str
    files: tuple[str, ...]
    pull_request: str | None = None


@dataclass(frozen=True)
class _Target:
    repo: str
    branch: str
    private: bool | None
    create_pr: bool
    parent: str | None
    message: str
    overwrite_card: bool


def push_to_hub(
    model: Model,
    repo_id: str,
    *,
    private: bool | None = None,
    branch: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    parent_commit: str | None = None,
    token: str | bool | None = None,
    license: str | None = None,
    metrics: Mapping[str, float] | Sequence[Metric | Mapping[str, Any]] = (),
    dataset: str | None = None,
    datasets: Sequence[str] = (),
    tags: Sequence[str] = (),
    base_model: str | None = None,
    training: Mapping[str, str] | None = None,
    card_text: str | None = None,
    overwrite_card: bool = False,
    max_shard_bytes: int = shards.MAX_SHARD_BYTES,
) -> Pushed:
    """Upload a model as one commit; the repository and the branch are made if missing.

    Args:
        model: any model of the zoo.
        repo_id: "owner/name".
        private: visibility of a repository that has to be made (default: public). For one that is
            there: what it must be.
        branch, revision: where to commit (two names for one thing); default `main`.
        create_pr: open a pull request against `main` instead, also where you may not write.
        commit_message: default says what is pushed.
        parent_commit: refuse to push on top of any other commit.
        token: as the client understands it; default: the login in use.
        license: one of the Hub's identifiers. Inherited from the weights the model was finetuned
            from; those under a licence that binds copies cannot be given another.
        metrics: `{"accuracy": 0.91}` with `dataset`, or a list of `Metric`.
        dataset: what `metrics` were measured on.
        datasets: what the model was trained on.
        tags: further tags for the card.
        base_model: repository of the weights it was finetuned from; default: where it was loaded.
        training: how it was trained, as plain names and texts, for the card.
        card_text: a README.md of your own. One that natcupy wrote for these weights is made anew
            from what it states, where the call states nothing else. (`natcupy push FOLDER` gives
            that of the folder; a model in memory may have changed since it was loaded.)
        overwrite_card: replace a README.md on the Hub that somebody edited (default: it is kept).
        max_shard_bytes: larger weights are cut into several files and an index.

    Raises:
        ValueError: a name, licence, metric, tag, branch … is not allowed; nothing was created.
        CheckpointError, ConfigError: the model is not what its config says; nothing was created.
        BadToken, Forbidden: nobody is logged in, or may not write there.
        Conflict: the branch moved, or the repository contradicts `private` or `parent_commit`.
        Offline, Unavailable: the Hub did not answer. Run the same call again.
    """
    prepared = prepare(
        model,
        repo_id,
        private=private,
        branch=branch,
        revision=revision,
        create_pr=create_pr,
        commit_message=commit_message,
        parent_commit=parent_commit,
        token=token,
        license=license,
        metrics=metrics,
        dataset=dataset,
        datasets=datasets,
        tags=tags,
        base_model=base_model,
        training=training,
        card_text=card_text,
        overwrite_card=overwrite_card,
        max_shard_bytes=max_shard_bytes,
    )
    return push_package(*prepared)


def prepare(
    model: Model,
    repo_id: str,
    *,
    token: str | bool | None = None,
    card_text: str | None = None,
    max_shard_bytes: int = shards.MAX_SHARD_BYTES,
    **given: Any,
) -> tuple[Package, _Target, Access, str | None]:
    """What comes before the first request of a push, from the arguments of `push_to_hub`."""
    target = make_target(repo_id, **{name: given.pop(name, None) for name in _AIM})
    stated = state_facts(model, target.repo, **given)
    if card_text is not None and card.is_generated(card_text):
        stated = taken_over(stated, card.stated(card_text), same_weights=True)
        card_text = None
    return pack(model, stated, max_shard_bytes), target, Access(token), card_text


def push_package(
    package: Package, target: _Target, access: Access, card_text: str | None = None
) -> Pushed:
    """The part of a push after the checks of single arguments."""
    with laid_out(package, access) as (files, place):
        return Push(package, target, access, files, place, card_text).run()


@contextmanager
def laid_out(package: Package, access: Access) -> Iterator[tuple[dict[str, Path], Path]]:
    """The files of a package that may be pushed, but for its card, and a place for that."""
    _may_push(package.facts, access)
    with TemporaryDirectory(prefix="natcupy-push-") as place:
        folder = Path(place) / "files"
        folder.mkdir()
        files = {name: folder / name for name in package.writers}
        for name, write in package.writers.items():
            write(files[name])
        yield files, Path(place)


def check_push(
    repo_id: str, facts: Facts, *, private: bool | None = None, token: str | bool | None = None
) -> None:
    """Raise what a push of a model with these facts would raise on its first steps.

    Looks at the name, the licence and the login, and asks the Hub once who is logged in; makes and
    changes nothing. For those who will push hours later.

    Raises as `push_to_hub`.
    """
    target = make_target(repo_id, private=private)
    access = Access(token)
    _may_push(facts, access)
    client.ask_who(Subject(target.repo, target.branch, writing=True), access)


def _may_push(facts: Facts, access: Access) -> None:
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


def make_target(repo: str, **options: Any) -> _Target:
    """The checked aim of a push, from the arguments of `push_to_hub` that concern it."""
    return _target(repo, *(options.get(name) for name in _AIM))


def _target(
    repo_id: str,
    private: bool | None,
    branch: str | None,
    revision: str | None,
    create_pr: bool | None,
    message: str | None,
    parent: str | None,
    overwrite_card: bool | None,
) -> _Target:
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
    if parent is not None and not (isinstance(parent, str) and _COMMIT.fullmatch(parent)):
        raise ValueError(f"parent_commit must be a commit's 40 digits, got {str(parent)[:60]!r}.")
    if private is not None and not isinstance(private, bool):
        raise ValueError(f"private must be True, False or None, got {private!r}.")
    message = message or f"{repo.split('/')[1]}, saved with natcupy {__version__}"
    if not isinstance(message, str) or not message.strip():
        raise ValueError(f"commit_message must be text, got {message!r}.")
    return _Target(repo, where, private, bool(create_pr), parent, message, bool(overwrite_card))


class Push:
    """One push: tried until it is done, the line stays dead, or somebody else pushed."""

    def __init__(
        self,
        package: Package,
        target: _Target,
        access: Access,
        files: dict[str, Path],
        place: Path,
        card_text: str | None,
    ):
        self.package, self.target, self.files, self.place = package, target, files, place
        self.card_text = card_text
        self.access = replace(access, cache_dir=place / "cache")
        self.pinned = target.parent
        self.subject = Subject(target.repo, target.branch, writing=True)

    def run(self) -> Pushed:
        """Push; once more where the Hub did not answer, after a pause."""
        pause = FIRST_PAUSE_S
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return self._once()
            except (Unavailable, Offline) as error:
                never_there = isinstance(error, Offline) and self.pinned is None
                if attempt == ATTEMPTS or never_there:
                    raise
                wait = min(getattr(error, "retry_after", None) or pause, LONGEST_PAUSE_S)
                log.info("%s Trying again in %.1f s.", error, wait)
                time.sleep(wait)
                pause *= 2
        raise AssertionError("the last attempt returns or raises")

    def _once(self) -> Pushed:
        head, files, added, deleted = self._compared()
        if not added and not deleted:
            return self._pushed(head.commit, ())
        if self.target.create_pr:
            return self._pull_request(head, files)
        return self._commit(head.revision, head.commit, files, added, deleted)

    def _compared(self) -> tuple[Snapshot, dict[str, Path], list[str], list[str]]:
        """What is there, the files to be there, and what to write and delete for that."""
        head = self._head()
        files = self._with_card(head)
        added, deleted = _changes(head, files)
        if added or deleted:
            self.pinned = self.pinned or head.commit
        if (added or deleted) and head.commit != self.pinned:
            raise Conflict(
                f"{self.subject} must be at commit {self.pinned} to be pushed to, it is at "
                f"{head.commit}: somebody else pushed. Look at that commit, then run the same call "
                "again."
            )
        return head, files, added, deleted

    # -- the remote as it is -----------------------------------------------------------------------

    def _head(self) -> Snapshot:
        """The branch's commit and files; the repository and the branch are made if missing."""
        target = self.target
        try:
            head = download.listed(target.repo, target.branch, self.access)
        except RevisionNotFound:
            self._check_visibility(download.listed(target.repo, "main", self.access))
            self._make_branch()
            head = download.listed(target.repo, target.branch, self.access)
        except NotFound:
            self._make_repository()
            head = self._new_head()
        self._check_visibility(head)
        return head

    def _new_head(self) -> Snapshot:
        target = self.target
        try:
            if target.branch != "main":
                self._make_branch()
            return download.listed(target.repo, target.branch, self.access)
        except RevisionNotFound:
            raise
        except NotFound as error:
            raise Forbidden(
                f"{target.repo} exists, but the login in use may not see it. Push to a name of "
                "your own, or ask its owner for access."
            ) from error

    def _refuse_missing(self) -> None:
        """Raise where there must be a repository already."""
        target = self.target
        if target.create_pr or target.parent:
            what = "a pull request" if target.create_pr else f"parent_commit {target.parent}"
            raise NotFound(
                f"{target.repo} does not exist (or the login in use may not see it), so there is "
                f"nothing for {what} to refer to. Push without it first."
            )

    def _make_repository(self) -> None:
        target = self.target
        self._refuse_missing()
        with client.explained(self.subject):
            client.api(self.access).create_repo(
                target.repo, private=bool(target.private), exist_ok=True
            )

    def _refuse_reference(self) -> None:
        """Raise where the branch is one that only the Hub makes."""
        if self.target.branch.startswith("refs/"):
            raise RevisionNotFound(
                f"{self.target.repo} has no {self.target.branch}. Open a pull request with "
                "create_pr=True (--create-pr)."
            )

    def _make_branch(self) -> None:
        self._refuse_reference()
        with client.explained(self.subject):
            client.api(self.access).create_branch(
                self.target.repo, branch=self.target.branch, exist_ok=True
            )

    def _check_visibility(self, head: Snapshot) -> None:
        wanted = self.target.private
        if wanted is not None and head.private != wanted:
            now = "private" if head.private else "public"
            raise Conflict(
                f"{self.target.repo} is {now}, the call says private={wanted}. Change it in the "
                "repository's settings, or leave private out. Nothing was pushed."
            )

    # -- what to write -----------------------------------------------------------------------------

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
            same = not any(is_weights(name) for name in _changes(head, self.files)[0])
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

    # -- writing -----------------------------------------------------------------------------------

    def _commit(
        self,
        branch: str,
        parent: str,
        files: Mapping[str, Path],
        added: Sequence[str],
        deleted: Sequence[str],
        create_pr: bool = False,
    ) -> Pushed:
        with client.explained(self.subject):
            done = client.commit(
                self.target.repo,
                branch,
                parent,
                {name: files[name] for name in added},
                deleted,
                self.target.message,
                create_pr,
                self.access,
            )
        return self._pushed(done.oid, (*added, *deleted), done.pr_revision or branch, done.pr_url)

    def _pull_request(self, head: Snapshot, files: dict[str, Path]) -> Pushed:
        """A new pull request, or the one that an earlier, cut push left open."""
        for number in self._open_requests():
            name = f"refs/pr/{number}"
            there = download.listed(self.target.repo, name, self.access)
            added, deleted = _changes(there, files)
            url = f"{client.endpoint()}/{self.target.repo}/discussions/{number}"
            if not added and not deleted:
                return replace(self._pushed(there.commit, (), name), pull_request=url)
            if there.commit == head.commit:
                done = self._commit(name, there.commit, files, added, deleted)
                return replace(done, pull_request=url)
        added, deleted = _changes(head, files)
        return self._commit("main", head.commit, files, added, deleted, create_pr=True)

    def _open_requests(self) -> list[int]:
        with client.explained(self.subject):
            return client.open_requests(self.target.repo, self.target.message, self.access)

    def _pushed(
        self,
        commit: str,
        files: tuple[str, ...],
        branch: str | None = None,
        pull_request: str | None = None,
    ) -> Pushed:
        url = f"{client.endpoint()}/{self.target.repo}/commit/{commit}"
        where = branch or self.target.branch
        return Pushed(self.target.repo, where, commit, url, files, pull_request)


def _changes(head: Snapshot, files: Mapping[str, Path]) -> tuple[list[str], list[str]]:
    """Files that differ from the commit's, and weights there that the new ones make void."""
    added = [name for name, path in sorted(files.items()) if not _equal(path, head.files.get(name))]
    deleted = [name for name in sorted(head.files) if is_weights(name) and name not in files]
    return added, deleted


def _equal(path: Path, there: Expected | None) -> bool:
    if there is None or (there.size is not None and there.size != path.stat().st_size):
        return False
    if there.sha256:
        return sha256_file(path) == there.sha256
    return there.git_id is not None and git_blob_id(path.read_bytes()) == there.git_id
