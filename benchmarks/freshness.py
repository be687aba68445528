"""`python -m benchmarks.freshness`: which kernels no GPU has run as they are.

In: the sources and the records in benchmarks/results. Out: a line for every kernel; is its record
of the very source that is here, and did all its tests pass? And for the tables of registers and
stack, whether they name every kernel. Exit status 0, with `--strict` (for a release) 1 where
something is not fresh.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import record

TABLES = Path(__file__).parent.parent / "tests"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.freshness", description=__doc__)
    parser.add_argument("--strict", action="store_true", help="status 1 where anything is stale")
    parser.add_argument("--results", type=Path, default=record.RESULTS)
    arguments = parser.parse_args(argv)
    hashes = record.kernel_hashes()
    states = {
        **of_kernels(hashes, record.read_all("gpu", arguments.results)),
        **of_tables(hashes, TABLES),
    }
    width = max(map(len, states))
    for name, (fresh, text) in states.items():
        print(f"{name:{width}}  {'fresh' if fresh else 'STALE'}: {text}")
    stale = [name for name, (fresh, _) in states.items() if not fresh]
    if stale:
        print(f"{len(stale)} of {len(states)} are not fresh.")
    return 1 if stale and arguments.strict else 0


def of_kernels(
    hashes: dict[str, str], records: Sequence[dict[str, Any]]
) -> dict[str, tuple[bool, str]]:
    """For every kernel whether a GPU has run it as it is, and what is known."""
    return {name: _of_kernel(name, hashed, records) for name, hashed in hashes.items()}


def _of_kernel(name: str, hashed: str, records: Sequence[dict[str, Any]]) -> tuple[bool, str]:
    ran = [r for r in records if _tests(r, name)]
    if not ran:
        return False, "no record says that it ran on a GPU"
    same = [r for r in ran if r["kernels"].get(name) == hashed]
    if not same:
        return False, f"changed since {_where(ran[-1])}"
    last = same[-1]
    failed = last["results"][name]["failed"]
    if failed:
        return False, f"{len(failed)} tests failed, {_where(last)}: {failed[0]}"
    text = f"{last['results'][name]['passed']} tests, {_where(last)}"
    planned = last.get("plans") == record.plans_hash()
    return True, text if planned else f"{text}; what plans and launches it has changed since"


def _tests(made: dict[str, Any], name: str) -> int:
    result = made.get("results", {}).get(name, {"passed": 0, "failed": []})
    return result["passed"] + len(result["failed"])


def _where(made: dict[str, Any]) -> str:
    return f"{made['environment']['device']} on {made['date']}"


def of_tables(hashes: dict[str, str], folder: Path) -> dict[str, tuple[bool, str]]:
    """For every table of compiled resources whether it knows all kernels and only those here.

    That its numbers are right is for the tests to say, which compile.
    """
    tables = {path.name: json.loads(path.read_text()) for path in folder.glob("*_resources*.json")}
    here = {name.removesuffix(".cu") for name in hashes}
    named = {
        name: {row.partition("(")[0] for row in table["kernels"]} for name, table in tables.items()
    }
    missing = here - set().union(*named.values())
    states = {}
    for name in sorted(tables):
        gone = named[name] - here
        text = f"{len(tables[name]['kernels'])} rows by NVRTC {tables[name]['nvrtc']}"
        states[name] = (not gone, f"{text}; no such kernel: {', '.join(gone)}" if gone else text)
    if missing:
        states["resource tables"] = (False, f"none has {', '.join(sorted(missing))}")
    return states


if __name__ == "__main__":
    sys.exit(main())
