"""`natcupy pull`: a model's files from the Hub, verified, in the cache or in a folder."""

from __future__ import annotations

import argparse

from natcupy.cli import console
from natcupy.hub.client import Access
from natcupy.hub.pull import pull


def run(arguments: argparse.Namespace) -> int:
    """Fetch, and say what came."""
    access = Access(cache_dir=arguments.cache_dir)
    done = pull(arguments.name, arguments.folder, revision=arguments.revision, access=access)
    if arguments.json:
        console.print_json(vars(done))
    else:
        print(console.facts([("repository", f"{done.repo}@{done.commit}"), *done.files.items()]))
    return 0
