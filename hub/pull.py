"""Pulling: a name becomes verified files, in the cache or in a folder of the caller's.

In: a released name or a repository. Out: `Pulled`, with the commit and the files that make up the
model (config, weights, preprocessing, card), each checked against its hash.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from natcupy.hub import download
from natcupy.hub.client import Access
from natcupy.hub.errors import NotFound
from natcupy.hub.files import write_folder
from natcupy.hub.locate import PREPROCESSOR, Located, locate
from natcupy.hub.saving import README, is_weights


@dataclass(frozen=True)
class Pulled:
    """What was fetched: file name -> where it is now."""

    repo: str
    revision: str
    commit: str
    files: dict[str, str]


def pull(
    name: str,
    folder: str | os.PathLike[str] | None = None,
    *,
    revision: str | None = None,
    access: Access | None = None,
) -> Pulled:
    """Fetch a model's files, all of one commit.

    Args:
        name: "nat-tiny", or "org/name[@revision]".
        folder: copy the files there too, all or none; default: they stay in the cache.
        revision: branch, tag or commit.
        access: how to reach the Hub.

    Raises:
        NotFound, Gated, BadToken, Offline, Unavailable, Corrupt: which of them it is.
    """
    access = access or Access()
    found = locate(name, revision, access)
    if found.snapshot is None:
        raise NotFound(f"pull fetches from the Hub, {name!r} is here already: {found.weights}.")
    paths = _paths(found)
    for extra in (README, PREPROCESSOR):
        if extra in found.snapshot.files and extra not in paths:
            paths[extra] = download.fetch(found.snapshot, extra, access)
    if folder is not None:
        target = Path(folder).expanduser()
        write_folder(target, {n: _copier(path) for n, path in paths.items()}, is_weights)
        paths = {name: target / name for name in paths}
    inner = download.parse_name(name)
    asked = revision or (inner[1] if inner else None) or "main"
    return Pulled(found.repo, asked, found.commit, {n: str(p) for n, p in sorted(paths.items())})


def _paths(found: Located) -> dict[str, Path]:
    parts = (found.weights, found.config, *(shard.path for shard in found.shards))
    return {path.name: path for path in parts if path is not None}


def _copier(source: Path) -> Callable[[Path], None]:
    return lambda path: shutil.copyfile(source, path)
