"""Converting: any known checkpoint becomes a folder of natcupy's, proven to hold the same numbers.

In: what `from_pretrained` reads; .pth and .bin go through the sandbox first. Out: a folder, and a
`Conversion` that says what was read, what was written and that both are equal.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from natcupy.hub import convert, dense, facts, weights
from natcupy.hub.client import Access
from natcupy.hub.dense import Model
from natcupy.hub.dense_weights import DenseRow
from natcupy.hub.errors import CheckpointError, some
from natcupy.hub.facts import Converted
from natcupy.hub.files import sha256_file, write_folder
from natcupy.hub.locate import WEIGHTS_FILE, Located, locate
from natcupy.hub.pickles import SUFFIXES
from natcupy.hub.pretrained import from_pretrained, load
from natcupy.hub.sandbox import convert_pickle
from natcupy.hub.saving import README, is_weights, keeps_card, pack, state_facts, write
from natcupy.hub.tensors import read_tensors
from natcupy.zoo.dense import DenseModel

_PLACE = ".natcupy-convert-"
_UNUSED = (".relative_position_index",)  # buffers some files leave out


@dataclass(frozen=True)
class Conversion:
    """What a conversion did.

    Attributes:
        source, source_sha256: the file that was read, and its hash.
        layout: how its tensors were named.
        folder, sha256: what was written, and the hash of its weights.
        architecture: the model's name.
        parameters: how many.
        tensors: how many were compared, bit by bit.
        largest_difference: between the outputs before and after, on one random picture.
    """

    source: str
    source_sha256: str
    layout: str
    folder: str
    sha256: str
    architecture: str
    parameters: int
    tensors: int
    largest_difference: float


def convert_checkpoint(
    name: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    revision: str | None = None,
    architecture: str | None = None,
    access: Access | None = None,
    **stated: Any,
) -> Conversion:
    """Convert a checkpoint to a folder with config, safetensors and card, and prove it equal.

    Args:
        name, revision, architecture: as for `from_pretrained`.
        folder: where to; made if missing. A README.md there that somebody edited is kept.
        access: how to reach the Hub.
        **stated: for the card (license, metrics, datasets, repo …).

    Raises:
        HubError: as `from_pretrained`.
        CheckpointError: what was written is not what was read.
        OSError: the folder cannot be written.
        After each, `folder` is as it was.
    """
    folder = Path(folder).expanduser()
    found = locate(name, revision, access or Access())
    with _place_beside(folder) as place:
        safe, source_hash = _safe_copy(found, place / WEIGHTS_FILE)
        original = {} if safe.shards else read_tensors(safe.weights).tensors
        try:
            model = load(safe, architecture=architecture)
        except CheckpointError as error:  # names the copy, which nobody will find
            named = str(error).replace(str(safe.weights), str(found.weights))
            raise CheckpointError(named) from error
        converted = Converted(_plain_name(found.weights), source_hash, found.repo)
        package = pack(model, state_facts(model, converted=converted, **stated))
        trial = write(package, place / "model", overwrite_card=True)
        again = from_pretrained(trial, dtype="auto")
        compared = _same(model.state_dict(), again.state_dict(), "written")
        layout = convert.detect_layout(original) if original else "natcupy"
        if isinstance(model, DenseModel):
            original = dense.to_natcupy(original)
        if original:
            compared = _same(original, _as_read(again, original, layout), "read")
        apart = _outputs_apart(model, again)
        _move(trial, folder)
        return Conversion(
            source=str(found.weights),
            source_sha256=source_hash,
            layout=layout,
            folder=str(folder),
            sha256=again.source.sha256,
            architecture=model.name,
            parameters=sum(p.numel() for p in model.parameters()),
            tensors=compared,
            largest_difference=apart,
        )


@contextlib.contextmanager
def _place_beside(folder: Path) -> Iterator[Path]:
    """A temporary folder on the disk of `folder`, which gives its name to errors of the system."""
    beside = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    try:
        with TemporaryDirectory(prefix=_PLACE, dir=beside) as place:
            yield Path(place)
    except OSError as error:
        if error.errno is None or not str(error.filename).startswith(str(beside / _PLACE)):
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(folder)) from error


def _move(trial: Path, folder: Path) -> None:
    """The files of a proven folder to where they are wanted, all or none; an edited card stays."""
    writers = {path.name: partial(os.replace, path) for path in trial.iterdir()}
    if keeps_card(folder):
        del writers[README]
    write_folder(folder, writers, is_weights)


def _safe_copy(found: Located, path: Path) -> tuple[Located, str]:
    """The same with its tensors as safetensors, and the hash of the file they came from."""
    if found.weights.suffix not in SUFFIXES:
        return found, sha256_file(found.weights)
    digest = convert_pickle(found.weights, path)
    if found.sha256 and digest != found.sha256:
        raise CheckpointError(
            f"{found.weights} must have SHA-256 {found.sha256}, got {digest}. Fetch it again."
        )
    return replace(found, weights=path, sha256=None), digest


def _plain_name(path: Path) -> str:
    """The file's own name where a card may show it."""
    return path.name if facts.is_plain(path.name) else f"weights{path.suffix}"


def _as_read(model: Model, original: Mapping[str, Tensor], layout: str) -> Mapping[str, Tensor]:
    """The written weights, back in the layout they were read in."""
    state = model.state_dict()
    if isinstance(model, DenseModel):
        return state
    if layout == "transformers":
        prefix = next((p for p in ("nat.", "dinat.") if any(n.startswith(p) for n in original)), "")
        return convert.to_transformers(state, prefix)
    return convert.to_backbone(state) if layout == "backbone" else state


def _same(one: Mapping[str, Tensor], other: Mapping[str, Tensor], what: str) -> int:
    """How many tensors are equal bit by bit; an error unless all are."""
    extra = {name for name in other.keys() - one.keys() if name.endswith(_UNUSED)}
    wrong = (one.keys() ^ other.keys()) - extra
    wrong |= {
        name
        for name in one.keys() & other.keys()
        if one[name].dtype != other[name].dtype or not torch.equal(one[name], other[name])
    }
    if what == "read":  # a detector's neck and head are left behind on purpose
        wrong = {name for name in wrong if name in other or not _left_behind(name, one)}
    if wrong:
        raise CheckpointError(
            f"the converted weights are not those {what}: {some(sorted(wrong))} differ. Nothing "
            "was written."
        )
    return len(one.keys() & other.keys())


def _left_behind(name: str, names: Mapping[str, Tensor]) -> bool:
    detector = any(key.startswith("backbone.") for key in names)
    return detector and not name.startswith("backbone.")


def _outputs_apart(one: Model, other: Model) -> float:
    """Largest difference of what two models compute from one random picture."""
    config = one.config
    side = getattr(config, "img_size", None) or 64
    like = next(one.parameters())
    picture = torch.randn(
        1, config.in_chans, side, side, generator=torch.Generator().manual_seed(0)
    ).to(like.dtype)
    pairs = zip(dense.outputs(one, picture), dense.outputs(other, picture), strict=True)
    return max((a.double() - b.double()).abs().max().item() for a, b in pairs)


def released(name: str) -> weights.Row | DenseRow:
    """The row of the table for a name, or ValueError with the nearest."""
    row = weights.find(name)
    if row is not None:
        return row
    if weights.embedded(name) is not None or Path(name).exists():
        what = "part of the package" if weights.embedded(name) else "a folder or file of your own"
        raise ValueError(
            f"publish takes the released checkpoints that `natcupy models` lists, got {name!r}, "
            f"which is {what}. Upload it with: natcupy push {name} OWNER/NAME"
        )
    raise ValueError(
        f"no released weights are called {name[:80]!r}; "
        f"{weights.nearest_in_words(name, weights.released_names())}."
    )
