"""`natcupy push`: a folder, file or loaded model becomes one commit on the Hub.

A README.md in the folder that somebody wrote goes along; a generated one is made anew.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from natcupy.cli import console
from natcupy.hub import card, from_pretrained, push_to_hub


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
        card_text=_own_card(Path(arguments.model)),
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


def _own_card(folder: Path) -> str | None:
    path = folder / "README.md"
    if not path.is_file():
        return None
    text = path.read_text("utf-8", "replace")
    return None if card.is_generated(text) else text
