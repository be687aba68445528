"""`natcupy push`: a folder, file or loaded model becomes one commit on the Hub.

A README.md in the folder that somebody wrote goes along; a generated one is made anew, from what
it states and the arguments add.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from natcupy.cli import console
from natcupy.hub import from_pretrained, push_to_hub
from natcupy.hub.files import member
from natcupy.hub.pretrained import Source
from natcupy.hub.saving import README


def run(arguments: argparse.Namespace) -> int:
    """Push, and say where it is."""
    model = from_pretrained(arguments.model, dtype="auto", cache_dir=arguments.cache_dir)
    done = push_to_hub(
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
        return 0
    pairs = [("commit", done.url), ("files", ", ".join(done.files) or "nothing had changed")]
    if done.pull_request:
        pairs.insert(0, ("pull request", done.pull_request))
    print(console.facts(pairs))
    return 0


def _own_card(source: Source) -> str | None:
    """The README.md of the folder that was loaded, which the name alone does not tell."""
    path = member(Path(source.path).parent, README)
    if source.kind != "folder" or not path.is_file():
        return None
    return path.read_text("utf-8", "replace")
