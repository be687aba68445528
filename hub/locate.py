"""From a name to files: what `from_pretrained` was asked for, found on disk or fetched.

In: a short name, a tag, `org/name[@revision]`, a folder or a file. Out: a `Located` with the paths
of weights and config and the facts to record. Reads no tensor and builds no model.
"""

from __future__ import annotations

import contextlib
import logging
import os
from dataclasses import dataclass
from pathlib import Path

from natcupy.hub import download, files, shards, weights
from natcupy.hub.client import Access
from natcupy.hub.dense_weights import DenseRow
from natcupy.hub.download import Snapshot
from natcupy.hub.errors import Corrupt, NotFound, Offline, UnsafePickle, some
from natcupy.hub.pickles import SUFFIXES
from natcupy.hub.weights import ORIGINAL_HOST, Row

log = logging.getLogger("natcupy.hub")

CONFIG = "config.json"
WEIGHTS_FILE = "model.safetensors"
PREPROCESSOR = "preprocessor_config.json"
PICKLE = "pytorch_model.bin"
CHOICES = (WEIGHTS_FILE, shards.INDEX, PICKLE)  # what weights are called, the best first
_PICKLE_INDEX = f"{PICKLE}.index.json"


@dataclass(frozen=True)
class Shard:
    """One of several files of weights: its path, the tensors in it, its hash where known."""

    path: Path
    tensors: tuple[str, ...]
    sha256: str | None = None


@dataclass(frozen=True)
class Located:
    """Where the weights are and what is known about them.

    Attributes:
        kind: "embedded", "hub", "folder" or "file".
        weights: the file with the tensors, or the index of several.
        config, preprocessor: JSON files beside it, where there are any.
        row: the released checkpoint this is, where it is one.
        repo, commit: of a Hub repository.
        sha256: what the weights file must hash to, where known.
        shards: the files that an index names; empty where there is one file.
        snapshot: of a Hub repository, everything in that commit.
    """

    kind: str
    weights: Path
    config: Path | None = None
    preprocessor: Path | None = None
    row: Row | None = None
    repo: str | None = None
    commit: str | None = None
    sha256: str | None = None
    shards: tuple[Shard, ...] = ()
    snapshot: Snapshot | None = None


def locate(name: str | os.PathLike[str], revision: str | None, access: Access) -> Located:
    """Find the weights that a name means.

    A `Path`, or text that is an existing path with a separator or a known suffix, is a path; names
    of the package's tables come before folders of the same name (write `./nat-tiny` for those),
    unless they were released as files only: then a folder of weights called so is what is meant.

    Raises:
        NotFound: with the nearest names, or what is missing in the folder.
        HubError: the repository could not be read.
    """
    if isinstance(name, os.PathLike):
        return _without_revision(_at_path(Path(name).expanduser()), revision)
    if not isinstance(name, str) or not name.strip():
        raise TypeError(f"a model is named by text or a path, got {name!r}.")
    folder = weights.embedded(name)
    if folder is not None:
        return _without_revision(_in_folder(folder, "embedded"), revision)
    if _row_meant(name) is not None:
        return _in_snapshot(pinned(name, revision, access), access)
    path = Path(name).expanduser()
    if path.exists() or _spelled_like_path(name):
        return _without_revision(_at_path(path), revision)
    if download.parse_name(name) is None:
        raise NotFound(_unknown(name))
    return _in_snapshot(pinned(name, revision, access), access)


def known_row(name: str) -> Row | DenseRow | None:
    """The row of the tables for what a name means, be it a released repository's; else None.

    Nothing is asked of the Hub.
    """
    if weights.embedded(name) is not None:
        return None
    row = _row_meant(name)
    if row is not None or Path(name).expanduser().exists():
        return row
    parsed = download.parse_name(name)
    return weights.find_repo(parsed[0]) if parsed else None


def _row_meant(name: str) -> Row | DenseRow | None:
    """The row that a name not of a bundled model stands for."""
    row = weights.find(name.partition("@")[0])
    if row is not None and row.repo is None and _holds_weights(Path(name).expanduser()):
        return None
    return row


def pinned(name: str, revision: str | None, access: Access) -> Snapshot:
    """The commit that a released model's name or `org/name[@revision]` means.

    Raises as `download.resolve`. What looks like org/name may be a folder misspelt: where nothing
    is found, the error says that no such folder is here, either.
    """
    short, _, inner = name.partition("@")
    row, revision = weights.find(short), _once(name, revision, inner or None)
    if row is not None:
        return download.resolve(_repo_of(row), revision, access)
    repo, _ = download.parse_name(name)
    try:
        return download.resolve(repo, revision, access)
    except (NotFound, Offline) as error:
        # Who gives a revision or writes hf-hub: means no folder.
        if type(error) not in (NotFound, Offline) or revision is not None or name != repo:
            raise
        # As in the client's room, not chained to what may hold a token.
        raise type(error)(_neither(name, error)) from None


def _neither(name: str, error: NotFound | Offline) -> str:
    """The Hub's answer, and that there is no such folder; first what is likelier to be meant."""
    if isinstance(error, NotFound):
        return f"{_nothing_at(Path(name))}, and {error}"
    if Path(name).parent.is_dir():
        return f"{_nothing_at(Path(name))}. As a Hub repository: {error}"
    return f"{error} If a folder is meant: {_nothing_at(Path(name))}."


def _nothing_at(path: Path) -> str:
    """That a path is none, and what is in the nearest folder around it that there is."""
    holds = ""
    with contextlib.suppress(OSError):  # no folder, or a closed one
        around = next((folder for folder in path.parents if folder.is_dir()), path)
        inside = sorted(entry.name for entry in around.iterdir())
        if around.name:  # the current folder would be no news
            holds = f" ({around} holds {some(inside, 5) or 'nothing'})"
    return f"there is no folder or file {str(path)[:120]} here{holds}"


def _once(name: str, revision: str | None, inner: str | None) -> str | None:
    """The revision, said in the name or beside it."""
    if revision is not None and inner is not None and revision != inner:
        raise ValueError(f"give the revision once, got {name!r} and revision={revision!r}.")
    return revision or inner


def _without_revision(found: Located, revision: str | None) -> Located:
    if revision is not None:
        raise ValueError(
            f"revision belongs to Hub repositories, got revision={revision!r} for {found.weights}."
        )
    return found


def _spelled_like_path(name: str) -> bool:
    return (
        name.startswith((".", "~", "/", "\\"))
        or name.endswith((".safetensors", shards.INDEX, *SUFFIXES, "/", "\\"))
        or Path(name).is_absolute()
    )


def _unknown(name: str) -> str:
    if "/" in name or os.sep in name:
        return (
            f"{_nothing_at(Path(name))}, and a Hub repository is written org/name[@revision], got "
            f"{name[:120]!r}. Check the path."
        )
    return (
        f"no weights are called {name[:120]!r}, and no folder or file is; "
        f"{weights.nearest_in_words(name)}. A Hub repository is written org/name, a folder ./name."
    )


def _repo_of(row: Row | DenseRow) -> str:
    if row.repo is None:
        raise NotFound(_only_a_file(row))
    return row.repo


def _only_a_file(row: Row | DenseRow) -> str:
    """How to come by weights that are on no repository, or to do without them."""
    name = row.arch.replace("_", "-")
    file = f"path/to/{row.original.rsplit('/', 1)[1]}"
    text = (
        f"{row.tag.replace('_', '-')} was released as a .pth file only, on no Hub repository. "
        f"Download {ORIGINAL_HOST}{row.original} yourself and pass its path: "
        f"from_pretrained('{file}'), or {file} as the model on the command line; save_pretrained, "
        f"or `natcupy convert {file} FOLDER`, makes a safetensors folder of it. Without that file: "
        f"create_model('{name}'), or `natcupy finetune --from-scratch`, begins with fresh weights"
    )
    if isinstance(row, Row):
        return f"{text}."
    return f"{text}; --backbone {_classifier_for(row)} takes a classifier's for the backbone."


def _classifier_for(row: DenseRow) -> str:
    """Where the weights of the backbone's classifier are, as `--backbone` takes them."""
    inner = weights.find(row.backbone)
    if inner.repo is not None:
        return row.backbone.replace("_", "-")
    return f"path/to/{inner.original.rsplit('/', 1)[1]}"


# ---------------------------------------------------------------- on disk


def _at_path(path: Path) -> Located:
    if path.is_dir():
        return _in_folder(path, "folder")
    if not path.is_file():
        raise NotFound(f"no such file or folder: {path}. Check the path.")
    if path.name == shards.INDEX:
        return _in_folder(path.parent, "folder", (shards.INDEX,))
    if path.suffix not in (".safetensors", *SUFFIXES):
        with open(path, "rb") as file:
            files.refuse_lookalikes(file.read(1024), path)
        raise Corrupt(
            f"weights are read from .safetensors, {', '.join(SUFFIXES)}, got {path.name!r}."
        )
    beside = path.parent
    return Located(
        kind="file",
        weights=files.member(beside, path.name),
        config=_if_file(files.member(beside, CONFIG)),
        preprocessor=_if_file(beside / PREPROCESSOR),
        row=weights.find_original(path.name),
    )


def _holds_weights(folder: Path) -> bool:
    return any(files.member(folder, name).is_file() for name in CHOICES)


def _in_folder(folder: Path, kind: str, names: tuple[str, ...] = CHOICES) -> Located:
    choices = (files.member(folder, name) for name in names)
    found = next((path for path in choices if path.is_file()), None)
    if found is None:
        _refuse_pickle_shards({path.name for path in folder.iterdir()}, str(folder))
        raise NotFound(
            f"{folder} must hold {WEIGHTS_FILE} (or {PICKLE}), got "
            f"{', '.join(sorted(p.name for p in folder.iterdir())[:10]) or 'an empty folder'}. "
            "Pass the path of the weights file itself if it is named otherwise."
        )
    return Located(
        kind=kind,
        weights=found,
        config=_if_file(files.member(folder, CONFIG)),
        preprocessor=_if_file(folder / PREPROCESSOR),
        shards=_shards_in(folder, found),
    )


def _shards_in(folder: Path, found: Path) -> tuple[Shard, ...]:
    if found != files.member(folder, shards.INDEX):
        return ()
    index = shards.parse_index(files.read_bytes(found, shards.MAX_INDEX_BYTES), found)
    parts = [(files.member(folder, name), names) for name, names in index.items()]
    missing = [path.name for path, _ in parts if not path.is_file()]
    if missing:
        raise NotFound(
            f"{folder} must hold every file its index names; missing: {some(missing)}. Fetch the "
            "folder again."
        )
    return tuple(Shard(path, tuple(names)) for path, names in parts)


def _if_file(path: Path) -> Path | None:
    return path if path.is_file() else None


def _refuse_pickle_shards(names: set[str], where: str) -> None:
    if _PICKLE_INDEX in names:
        raise NotFound(
            f"{where} holds its weights in several pickles, natcupy reads shards of safetensors "
            f"only. Save it again as {WEIGHTS_FILE}."
        )


# ---------------------------------------------------------------- on the Hub


def _in_snapshot(snapshot: Snapshot, access: Access) -> Located:
    """Fetch config and weights of a commit."""
    repo = snapshot.repo
    row = weights.find_repo(repo)
    name = next((choice for choice in CHOICES if choice in snapshot.files), None)
    if name is None or CONFIG not in snapshot.files:
        _refuse_pickle_shards(set(snapshot.files), repo)
        raise NotFound(
            f"{repo}@{snapshot.commit} must hold {CONFIG} and {WEIGHTS_FILE} to be loaded here, it "
            f"has {', '.join(sorted(snapshot.files)[:10]) or 'no files'}."
        )
    config = download.fetch(snapshot, CONFIG, access)
    own = b'"natcupy_version"' in config.read_bytes()
    if name == PICKLE and own:
        raise UnsafePickle(
            f"{repo}: a natcupy repository holds {WEIGHTS_FILE}, this one only {PICKLE}, which is "
            "read from foreign repositories alone. Ask its owner to save it with natcupy."
        )
    # A natcupy config says it all. Of a released model, the table's preprocessing is the one that
    # the published accuracy belongs to, not the Hub file's.
    wants_recipe = row is None and not own and PREPROCESSOR in snapshot.files
    if row is None and not own and not (wants_recipe or snapshot.is_listed):
        log.warning(
            "%s: whether the repository says how pictures are prepared is not known without a "
            "connection; load it once with one, or set model.pretrained_cfg yourself.",
            repo,
        )
    sha256 = row.sha256 if row and name == row.file else None
    fetched = download.fetch(snapshot, name, access, sha256)
    return Located(
        kind="hub",
        weights=fetched,
        config=config,
        preprocessor=download.fetch(snapshot, PREPROCESSOR, access) if wants_recipe else None,
        row=row,
        repo=repo,
        commit=snapshot.commit,
        sha256=sha256 or snapshot.files[name].sha256,
        shards=_fetched_shards(snapshot, fetched, access) if name == shards.INDEX else (),
        snapshot=snapshot,
    )


def _fetched_shards(snapshot: Snapshot, index: Path, access: Access) -> tuple[Shard, ...]:
    data = files.read_bytes(index, shards.MAX_INDEX_BYTES)
    return tuple(
        Shard(
            download.fetch(snapshot, name, access),
            tuple(names),
            snapshot.files[name].sha256,
        )
        for name, names in shards.parse_index(data, shards.INDEX).items()
    )
