"""`natcupy convert IN OUT`: a checkpoint becomes a folder of safetensors, config and card."""

from __future__ import annotations

import argparse

from natcupy.cli import console
from natcupy.hub.client import Access
from natcupy.hub.converting import convert_checkpoint


def run(arguments: argparse.Namespace) -> int:
    """Convert, and say what was proven."""
    stated = {"license": arguments.license} if arguments.license else {}
    done = convert_checkpoint(
        arguments.source,
        arguments.folder,
        revision=arguments.revision,
        architecture=arguments.architecture,
        access=Access(cache_dir=arguments.cache_dir),
        **stated,
    )
    if arguments.json:
        console.print_json(vars(done))
        return 0
    pairs = [
        ("read", f"{done.source} ({done.layout} layout)"),
        ("", f"SHA-256 {done.source_sha256}"),
        ("written", done.folder),
        ("", f"SHA-256 {done.sha256}"),
        ("model", f"{done.architecture}, {done.parameters:,} parameters"),
        ("proof", f"{done.tensors} tensors equal bit by bit"),
        ("", f"outputs before and after differ by {done.largest_difference:g}"),
    ]
    print(console.facts(pairs))
    return 0
