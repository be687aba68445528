"""`natcupy push`: a folder, file or loaded model becomes one commit on the Hub.

A README.md in the folder that somebody wrote goes along; a generated one is made anew, from what
it states and the arguments add. With --dry-run the commit is only described.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from natcupy.cli import console
from natcupy.hub import Planned, Pushed, from_pretrained, plan_push, push_to_hub
from natcupy.hub.files import member
from natcupy.hub.pretrained import Source
from natcupy.hub.rehearsal import NEW_REQUEST
from natcupy.hub.saving import README


def run(arguments: argparse.Namespace) -> int:
    """Push, and say where it is; or say what a push would do."""
    model = from_pretrained(arguments.model, dtype="auto", cache_dir=arguments.cache_dir)
    act = plan_push if arguments.dry_run else push_to_hub
    done = act(
        model,
        arguments.repo,
        private=arguments.private,
        branch=arguments.revision,
        create_pr=arguments.create_pr,
        commit_message=arguments.message,
        license=arguments.license,
        metrics=dict(arguments.metric),
        dataset=arguments.dataset,
        datasets=arguments.trained_on,
        tags=arguments.tag,
        base_model=arguments.base_model,
        card_text=_own_card(model.source),
        overwrite_card=arguments.overwrite_card,
    )
    if arguments.json:
        console.print_json(vars(done))
    elif isinstance(done, Pushed):
        print(console.facts(_pushed(done)))
    else:
        print(console.facts(_planned(done)))
        if done.card is not None:
            print(f"\nREADME.md:\n\n{done.card}", end="")
    return 0


def _pushed(done: Pushed) -> list[tuple[str, str]]:
    pairs = [("commit", done.url), ("files", ", ".join(done.files) or "nothing had changed")]
    if done.pull_request:
        pairs.insert(0, ("pull request", done.pull_request))
    return pairs


def _planned(plan: Planned) -> list[tuple[str, str]]:
    visibility = "private" if plan.private else "public"
    pairs = [("dry run", "nothing was changed"), ("to", f"{plan.repo} ({visibility})")]
    if plan.pull_request:
        known = "" if plan.pull_request == NEW_REQUEST else f": {plan.pull_request}"
        pairs.append(("pull request", f"{'an open' if known else 'a new'} one{known}"))
    else:
        pairs.append(("branch", plan.branch))
    if plan.makes:
        made = {"repository": f"a {visibility} repository", "branch": "the branch"}
        pairs.append(("would make", " and ".join(made[name] for name in plan.makes)))
    pairs.append(("message", plan.message))
    files = [f"{name} ({size:,} bytes)" for name, size in plan.files.items()]
    pairs.append(("would write", ", ".join(files) or "nothing, the Hub has it all"))
    if plan.deleted:
        pairs.append(("would delete", ", ".join(plan.deleted)))
    if plan.card is None:
        pairs.append(("README.md", "the edited one on the Hub is kept"))
    return pairs


def _own_card(source: Source) -> str | None:
    """The README.md of the folder that was loaded, which the name alone does not tell."""
    path = member(Path(source.path).parent, README)
    if source.kind != "folder" or not path.is_file():
        return None
    return path.read_text("utf-8", "replace")
