"""A push that changes nothing: what would be made, written and deleted, and the card's text.

In: the arguments of `push_to_hub`. Out: `Planned`. The Hub is asked who is logged in and what is
there; everything that a push checks before its first change is checked here, too.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from natcupy.hub import client, download
from natcupy.hub.attempt import Attempt, laid_out, prepare
from natcupy.hub.dense import Model
from natcupy.hub.download import Snapshot
from natcupy.hub.errors import NotFound, RevisionNotFound
from natcupy.hub.push import push_to_hub
from natcupy.hub.saving import README

NEW_REQUEST = "new"


@dataclass(frozen=True)
class Planned:
    """What a push would do.

    Attributes:
        repo, private: where to, and whether it is or would be private.
        branch: the commit's; of a pull request the one that it is against.
        makes: "repository" and "branch", as far as they are not there (or not seen by this login).
        pull_request: "new", or the address of an open one that the push would go on; None without.
        message: the commit's.
        files: bytes of every file to be written; nothing where the Hub has it all already.
        deleted: weights on the Hub that the new ones make void.
        card: text of the README.md; None where an edited one is kept.
    """

    repo: str
    private: bool
    branch: str
    makes: tuple[str, ...]
    pull_request: str | None
    message: str
    files: dict[str, int]
    deleted: tuple[str, ...]
    card: str | None


def plan_push(model: Model, repo_id: str, **options: Any) -> Planned:
    """Find out what `push_to_hub` would do with these arguments; make and change nothing.

    Args:
        model, repo_id, options: as of `push_to_hub`.

    Raises:
        as `push_to_hub`; but whether the login may write there only a push finds out.
    """
    inspect.signature(push_to_hub).bind(model, repo_id, **options)  # names what it does not take
    prepared = prepare(model, repo_id, **options)
    package, _, access, _ = prepared
    with laid_out(package, access) as (files, place):
        return _Rehearsal(*prepared, files, place).run()


class _Rehearsal(Attempt[Planned]):
    def once(self) -> Planned:
        client.ask_who(self.subject, self.access)
        self.makes: tuple[str, ...] = ()
        head, files, found = self.compared()
        request = None
        if found and self.target.create_pr:
            number, _, found = self.request(head, files)
            request = NEW_REQUEST if number is None else self.request_url(number)
        card = files.get(README)
        return Planned(
            repo=self.target.repo,
            private=head.private,
            branch=self.target.branch,
            makes=self.makes,
            pull_request=request,
            message=self.target.message,
            files={name: files[name].stat().st_size for name in found.added},
            deleted=tuple(found.deleted),
            card=card.read_text("utf-8") if card else None,
        )

    def head(self) -> Snapshot:
        """The branch's commit and files, or those that it would have before the push."""
        target = self.target
        try:
            head = download.listed(target.repo, target.branch, self.access)
        except RevisionNotFound:
            self.refuse_reference()
            head = download.listed(target.repo, "main", self.access)
            self.makes = ("branch",)
        except NotFound:
            self.refuse_missing()
            self.refuse_reference()
            self.makes = ("repository", "branch")[: 1 + (target.branch != "main")]
            private = bool(target.private)
            return Snapshot(target.repo, target.branch, "", {}, from_cache=False, private=private)
        self.check_visibility(head)
        return head
