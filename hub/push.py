"""Pushing: a model becomes one commit of a Hub repository, or nothing does.

In: a model, a repository's name, and what its card may say. Out: `Pushed`, and on the Hub one
commit with config, weights, card and preprocessing, made on top of the commit that was looked at.

Everything is checked and laid out on disk before the first request. Then the branch's commit is
looked up and pinned, files are compared by hash (`attempt`), large files go up as blobs that nobody
sees, and one commit request makes all of it visible. So a push that is cut anywhere leaves the
branch as it was, or complete; the only other trace can be an empty repository, branch or pull
request that was made for it. The same call again finishes what is missing, and finds out where an
answer got lost.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from natcupy.hub import client, download, shards
from natcupy.hub.attempt import (
    Attempt,
    Changes,
    Target,
    check_may_push,
    laid_out,
    make_target,
    prepare,
)
from natcupy.hub.client import Access, Subject
from natcupy.hub.dense import Model
from natcupy.hub.download import Snapshot
from natcupy.hub.errors import Forbidden, NotFound, RevisionNotFound
from natcupy.hub.facts import Facts, Metric
from natcupy.hub.saving import Package


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


def push_package(
    package: Package, target: Target, access: Access, card_text: str | None = None
) -> Pushed:
    """The part of a push after the checks of single arguments."""
    with laid_out(package, access) as (files, place):
        return _Push(package, target, access, card_text, files, place).run()


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
    check_may_push(facts, access)
    client.ask_who(Subject(target.repo, target.branch, writing=True), access)


class _Push(Attempt[Pushed]):
    def once(self) -> Pushed:
        head, files, found = self.compared()
        if not found:
            return self._pushed(head.commit, ())
        if self.target.create_pr:
            return self._pull_request(head, files)
        return self._commit(head.revision, head.commit, files, found)

    def head(self) -> Snapshot:
        """The branch's commit and files; the repository and the branch are made if missing."""
        target = self.target
        try:
            head = download.listed(target.repo, target.branch, self.access)
        except RevisionNotFound:
            self.check_visibility(download.listed(target.repo, "main", self.access))
            self._make_branch()
            head = download.listed(target.repo, target.branch, self.access)
        except NotFound:
            self._make_repository()
            head = self._new_head()
        self.check_visibility(head)
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

    def _make_repository(self) -> None:
        target = self.target
        self.refuse_missing()
        with client.explained(self.subject):
            client.api(self.access).create_repo(
                target.repo, private=bool(target.private), exist_ok=True
            )

    def _make_branch(self) -> None:
        self.refuse_reference()
        with client.explained(self.subject):
            client.api(self.access).create_branch(
                self.target.repo, branch=self.target.branch, exist_ok=True
            )

    def _commit(
        self,
        branch: str,
        parent: str,
        files: Mapping[str, Path],
        found: Changes,
        create_pr: bool = False,
    ) -> Pushed:
        with client.explained(self.subject):
            done = client.commit(
                self.target.repo,
                branch,
                parent,
                {name: files[name] for name in found.added},
                found.deleted,
                self.target.message,
                create_pr,
                self.access,
            )
        changed = (*found.added, *found.deleted)
        return self._pushed(done.oid, changed, done.pr_revision or branch, done.pr_url)

    def _pull_request(self, head: Snapshot, files: dict[str, Path]) -> Pushed:
        """A new pull request, or the one that an earlier, cut push left open."""
        number, there, found = self.request(head, files)
        if number is None:
            return self._commit("main", there.commit, files, found, create_pr=True)
        name, url = f"refs/pr/{number}", self.request_url(number)
        if not found:
            return replace(self._pushed(there.commit, (), name), pull_request=url)
        return replace(self._commit(name, there.commit, files, found), pull_request=url)

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
