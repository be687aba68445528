"""`natcupy publish NAMES --org X`: released weights, converted, proven equal, carded, pushed.

Exit status 1 if any name failed; the others are published all the same.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from natcupy.cli import console
from natcupy.hub.client import Access
from natcupy.hub.publish import Publication, publish
from natcupy.zoo import PUBLISHED


def run(arguments: argparse.Namespace) -> int:
    """Publish one after the other, then print the table."""
    done = []
    for entry in publish(
        arguments.names,
        arguments.org,
        dry_run=arguments.dry_run,
        originals=Path(arguments.originals) if arguments.originals else None,
        private=arguments.private,
        access=Access(cache_dir=arguments.cache_dir),
    ):
        done.append(entry)
        print(f"{entry.name}: {'failed' if entry.error else 'done'}", file=sys.stderr)
    if arguments.json:
        console.print_json([_record(entry) for entry in done])
    else:
        headings = ("name", "repository", "params", "top-1", "tensors equal", "SHA-256", "commit")
        print(console.table(headings, [_row(entry) for entry in done]))
    for entry in done:
        if entry.error:
            print(f"natcupy: error: {entry.name}: {entry.error}", file=sys.stderr)
    return 1 if any(entry.error for entry in done) else 0


def _row(entry: Publication) -> tuple[str, ...]:
    printed = PUBLISHED.get(entry.name.partition(".")[0])  # of classifiers
    top1 = printed.top1 if printed else None
    made = entry.conversion
    commit = entry.pushed.commit[:12] if entry.pushed else "failed" if entry.error else "dry run"
    return (
        entry.name,
        entry.repo,
        f"{made.parameters:,}" if made else "-",
        f"{top1} %" if top1 else "-",
        str(made.tensors) if made else "-",
        made.sha256[:12] if made else "-",
        commit,
    )


def _record(entry: Publication) -> dict[str, Any]:
    parts = {
        key: vars(part) if part else None
        for key, part in (("conversion", entry.conversion), ("pushed", entry.pushed))
    }
    return {"name": entry.name, "repo": entry.repo, **parts, "error": entry.error}
