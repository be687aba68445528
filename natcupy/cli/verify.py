"""`natcupy verify`: are the files of a folder or repository what they should be?

Exit status 1 if any is not, or if weights and config do not fit together.
"""

from __future__ import annotations

import argparse
import sys

from natcupy.cli import console
from natcupy.hub.client import Access
from natcupy.hub.verify import OK, Report, verify


def run(arguments: argparse.Namespace) -> int:
    """Check, and print one line per file."""
    report = verify(
        arguments.name,
        revision=arguments.revision,
        against=arguments.against,
        access=Access(cache_dir=arguments.cache_dir),
    )
    if arguments.json:
        files = [vars(file) for file in report.files]
        console.print_json({**vars(report), "files": files, "ok": report.ok})
    else:
        rows = [(f.file, f"{f.size:,}", f.sha256 or "-", f.status) for f in report.files]
        print(console.table(("file", "bytes", "SHA-256", "status"), rows))
        print()
        where = f"{report.name}@{report.commit}" if report.commit else report.name
        print(f"{where}: {_verdict(report)}")
    if report.problem:
        print(f"natcupy: error: {report.problem}", file=sys.stderr)
    return 0 if report.ok else 1


def _verdict(report: Report) -> str:
    if not report.ok:
        return "not ok"
    if all(file.status != OK for file in report.files):
        return "loads, but was compared with nothing (--against REPO names what it should equal)"
    return "ok"
