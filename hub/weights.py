"""The released checkpoints: one row each, in one table.

In: a name as people write it. Out: a `Row` that says where the weights are and what they are (of
segmentation and detection models a `DenseRow`), or None. Architecture numbers are the zoo's
business; a row only names the architecture.

Rows without `repo` were released as .pth files only. natcupy fetches nothing but Hub repositories,
so those are downloaded by the user and read from disk.

File names and licence: the authors' repository. Sizes: the Hub's file pages. Accuracies come from
the zoo's table of published models.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from natcupy.hub import dense_weights
from natcupy.hub.dense_weights import DenseRow
from natcupy.zoo.published import PUBLISHED

ORIGINAL_HOST = "https://shi-labs.com/projects/"
EMBEDDED = Path(__file__).parent / "embedded"
# What a bundled model is made of, for `natcupy verify`: the SHA-256 of each file.
EMBEDDED_SHA256 = {
    "nat-digits": {
        "config.json": "aa87ad1790832b254a9ed272722372def063478c4e7581085b77fcb9ef173c6a",
        "model.safetensors": "a29190f3ef5cbbd54030e61a5fb0a29ce7bd1b26c76038eb10aa2a2da1a3253f",
    }
}


@dataclass(frozen=True)
class Row:
    """One released set of weights.

    Attributes:
        arch: name of the architecture in the zoo.
        data: what it was trained on, as the zoo's table of published models says.
        repo: Hub repository, None where there is none.
        original: path of the authors' .pth file under `ORIGINAL_HOST`.
        size_mb: size of the Hub file in MB (10^6 bytes) as listed there; None without a repository.
        top1: ImageNet-1K top-1 accuracy in percent as published; None for 22K weights.
        input_size: side of the square pictures it was trained and measured on.
        num_classes: rows of the classifier; None where only the file can tell.
        license: SPDX-like identifier, in the Hub's spelling.
        file: the Hub file to read where the repository has no model.safetensors.
        sha256: hash of `file`, where known; verified on every load.
    """

    arch: str
    data: str
    repo: str | None
    original: str
    size_mb: int | None
    top1: float | None
    input_size: int
    num_classes: int | None
    license: str = "mit"
    file: str = "pytorch_model.bin"
    sha256: str | None = None
    task: ClassVar[str] = "classification"

    @property
    def tag(self) -> str:
        """The full name, e.g. `nat_small.in1k`."""
        return f"{self.arch}.{self.data}"


def _row(arch: str, original: str, repo: str | None = None, size_mb: int | None = None) -> Row:
    facts = PUBLISHED[arch]
    return Row(
        arch=arch,
        data=facts.tag,
        repo=repo,
        original=original,
        size_mb=size_mb,
        top1=facts.top1,
        input_size=facts.img_size,
        num_classes=None if facts.tag == "in22k" else 1000,
    )


_NAT = "nat/checkpoints/CLS/"
_1K = "dinat/checkpoints/imagenet1k/"
_22K = "dinat/checkpoints/imagenet22k/"
_ISO = "dinat/checkpoints/isotropic/"
_LARGE = "dinat_large_in22k_"
_SHI = "shi-labs/"

_ROWS = (
    _row("nat_mini", _NAT + "nat_mini.pth", _SHI + "nat-mini-in1k-224", 80),
    _row("nat_tiny", _NAT + "nat_tiny.pth", _SHI + "nat-tiny-in1k-224", 112),
    _row("nat_small", _NAT + "nat_small.pth", _SHI + "nat-small-in1k-224", 203),
    _row("nat_base", _NAT + "nat_base.pth", _SHI + "nat-base-in1k-224", 359),
    _row("dinat_mini", _1K + "dinat_mini_in1k_224.pth", _SHI + "dinat-mini-in1k-224", 80),
    _row("dinat_tiny", _1K + "dinat_tiny_in1k_224.pth", _SHI + "dinat-tiny-in1k-224", 112),
    _row("dinat_small", _1K + "dinat_small_in1k_224.pth", _SHI + "dinat-small-in1k-224", 203),
    _row("dinat_base", _1K + "dinat_base_in1k_224.pth", _SHI + "dinat-base-in1k-224", 359),
    _row("dinat_large", f"{_1K}{_LARGE}in1k_224.pth", _SHI + "dinat-large-in22k-in1k-224", 804),
    _row("dinat_large_384", f"{_1K}{_LARGE}in1k_384.pth", _SHI + "dinat-large-in22k-in1k-384", 804),
    _row(
        "dinat_large_384_11x11",
        f"{_1K}{_LARGE}in1k_384_11x11.pth",
        _SHI + "dinat-large-11x11-in22k-in1k-384",
        805,
    ),
    _row("dinat_large_21k", f"{_22K}{_LARGE}224.pth"),
    _row("dinat_large_21k_11x11", f"{_22K}{_LARGE}224_11x11interp.pth"),
    _row("dinat_s_tiny", _1K + "dinat_s_tiny_in1k_224.pth"),
    _row("dinat_s_small", _1K + "dinat_s_small_in1k_224.pth"),
    _row("dinat_s_base", _1K + "dinat_s_base_in1k_224.pth"),
    _row("dinat_s_large", _1K + "dinat_s_large_in1k_224.pth"),
    _row("dinat_s_large_384", _1K + "dinat_s_large_in1k_384.pth"),
    _row("dinat_s_large_21k", _22K + "dinat_s_large_in22k_224.pth"),
    _row("nat_isotropic_small", _ISO + "nat_isotropic_small_in1k_224.pth"),
    _row("nat_isotropic_base", _ISO + "nat_isotropic_base_in1k_224.pth"),
    _row("dinat_isotropic_small", _ISO + "dinat_isotropic_small_in1k_224.pth"),
    _row("dinat_isotropic_base", _ISO + "dinat_isotropic_base_in1k_224.pth"),
    _row("vitrpb_small", _ISO + "vitrpb_small_in1k_224.pth"),
    _row("vitrpb_base", _ISO + "vitrpb_base_in1k_224.pth"),
)

WEIGHTS: dict[str, Row] = {row.tag: row for row in _ROWS}


def find(name: str) -> Row | DenseRow | None:
    """The row for a tag (`nat_small.in1k`) or an architecture (`nat-small`), in either spelling."""
    wanted = _spelling(name)
    found = WEIGHTS.get(wanted) or next((row for row in _ROWS if row.arch == wanted), None)
    return found or dense_weights.find(name)


def find_repo(repo: str) -> Row | None:
    """The row whose released weights are in this Hub repository."""
    return next((row for row in _ROWS if row.repo and row.repo.lower() == repo.lower()), None)


def find_original(file_name: str) -> Row | DenseRow | None:
    """The row whose released .pth has exactly this file name."""
    found = next((row for row in _ROWS if row.original.rsplit("/", 1)[1] == file_name), None)
    return found or dense_weights.find_original(file_name)


def embedded(name: str) -> Path | None:
    """The folder of weights that ship inside the package under this name."""
    wanted = _spelling(name)
    return next((path for path in _embedded_folders() if _spelling(path.name) == wanted), None)


def embedded_names() -> list[str]:
    """Names of the weights that ship inside the package and load without any network."""
    return [path.name for path in _embedded_folders()]


def known_names() -> list[str]:
    """Every name that `from_pretrained` resolves by itself."""
    return [*embedded_names(), *released_names()]


def released_names() -> list[str]:
    """Every name of the tables, architectures and tags."""
    dense = dense_weights.DENSE_WEIGHTS
    rows = (*_ROWS, *dense.values())
    return [*(row.arch for row in rows), *WEIGHTS, *dense]


def nearest(name: str, among: Sequence[str] | None = None) -> list[str]:
    """Names (default: all known) that look like this one, best first, as the Hub spells them."""
    among = known_names() if among is None else among
    near = difflib.get_close_matches(_spelling(name)[:80], among, n=3, cutoff=0.6)
    return [found.replace("_", "-") for found in near]


def nearest_in_words(name: str, among: Sequence[str] | None = None) -> str:
    """What to try instead of an unknown name."""
    near = nearest(name, among)
    if near:
        return f"the nearest are {', '.join(near)}"
    return "natcupy.hub.WEIGHTS, or `natcupy models`, lists the names"


def _embedded_folders() -> list[Path]:
    return sorted(path.parent for path in EMBEDDED.glob("*/config.json"))


def _spelling(name: str) -> str:
    return re.sub("-", "_", name.strip().lower())
