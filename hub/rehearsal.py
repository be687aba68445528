"""A push that changes nothing: what would be made, written and deleted, and the card's text.

In: the arguments of `push_to_hub`. Out: `Planned`. The Hub is asked who is logged in and what is
there; everything that a push checks before its first change is checked here, too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from natcupy.hub import client, download
from natcupy.hub.dense import Model
from natcupy.hub.download import Snapshot
from natcupy.hub.errors import NotFound, RevisionNotFound
from natcupy.hub.push import Push, laid_out, prepare
from natcupy.hub.saving import README


@dataclass(frozen=True)
class Planned:
    """What a push would do.

    Attributes:
        repo, branch: where the commit would go; of a pull request the branch it is against.
        makes: "repository" and "branch", as far as they are not there (or not seen by this login).
        pull_request: whether the commit would be a pull request.
        message: the commit's.
        files: bytes of every file to be written; nothing where the Hub has it all already.
        deleted: weights on the Hub that the new ones make void.
        card: text of the README.md; None where an edited one is kept.
    """

    repo: str
    branch: str
    makes: tuple[str, ...]
    pull_request: bool
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
    package, target, access, card_text = prepare(model, repo_id, **options)
    with laid_out(package, access) as (files, place):
        return _Rehearsal(package, target, access, files, place, card_text).run()


class _Rehearsal(Push):
    makes: tuple[str, ...] = ()

    def _once(self) -> Planned:
        client.ask_who(self.subject, self.access)
        _, files, added, deleted = self._compared()
        card = files.get(README)
        return Planned(
            repo=self.target.repo,
            branch=self.target.branch,
            makes=self.makes,
            pull_request=self.target.create_pr,
            message=self.target.message,
            files={name: files[name].stat().st_size for name in added},
            deleted=tuple(deleted),
            card=card.read_text("utf-8") if card else None,
        )

    def _head(self) -> Snapshot:
        """The branch's commit and files, or those that it would have before the push."""
        target = self.target
        try:
            head = download.listed(target.repo, target.branch, self.access)
        except RevisionNotFound:
            self._refuse_reference()
            head = download.listed(target.repo, "main", self.access)
            self.makes = ("branch",)
        except NotFound:
            self._refuse_missing()
            self._refuse_reference()
            self.makes = ("repository", "branch")[: 1 + (target.branch != "main")]
            return Snapshot(target.repo, target.branch, "", {}, from_cache=False)
        self._check_visibility(head)
        return head
