"""The released segmentation and detection checkpoints: one row each.

In: a name as people write it. Out: a `DenseRow` that says where the authors' file is, or None. They
were released as .pth files only; natcupy fetches nothing but Hub repositories, so those are
downloaded by the user and read from disk. File names and licence: the authors' repository.
"""

from __future__ import annotations

from dataclasses import dataclass

from natcupy.zoo.dense import DENSE_MODELS
from natcupy.zoo.dense.config import TASKS


@dataclass(frozen=True)
class DenseRow:
    """One released segmentation or detection model.

    Attributes:
        arch: its name in the zoo.
        data: what it was trained on: "ade20k" or "coco".
        original: path of the authors' .pth file under `weights.ORIGINAL_HOST`.
        repo, sha256, file: as of `weights.Row`; there is no repository.
        license: SPDX-like identifier, in the Hub's spelling.
    """

    arch: str
    data: str
    original: str
    license: str = "mit"
    repo: None = None
    sha256: None = None
    file: str = "pytorch_model.bin"

    @property
    def tag(self) -> str:
        """The full name, e.g. `upernet_nat_tiny.ade20k`."""
        return f"{self.arch}.{self.data}"

    @property
    def task(self) -> str:
        """ "segmentation" or "detection"."""
        return TASKS[_head_of(self.arch)]

    @property
    def backbone(self) -> str:
        """The classifier that the backbone comes from, as the zoo names it."""
        return self.arch.removeprefix(f"{_head_of(self.arch)}_")

    @property
    def file_name(self) -> str:
        """The authors' file, without its folder."""
        return self.original.rsplit("/", 1)[1]


# Architecture: the authors' word for it in NAT's and in DiNAT's file names, their folders.
_WORDS = {
    "upernet": ("upernet", "upernet", "SEG", "ade20k"),
    "mask_rcnn": ("maskrcnn", "maskrcnn", "DET", "coco"),
    "cascade_mask_rcnn": ("cascademaskrcnn", "cascadedmaskrcnn", "DET", "coco"),
}


def _head_of(arch: str) -> str:
    return next(h for h in ("cascade_mask_rcnn", "mask_rcnn", "upernet") if arch.startswith(h))


def _row(arch: str) -> DenseRow:
    head = _head_of(arch)
    backbone = arch.removeprefix(f"{head}_")
    nat_word, dinat_word, folder, data = _WORDS[head]
    if backbone.startswith("nat"):
        original = f"nat/checkpoints/{folder}/{backbone}_{nat_word}.pth"
    else:
        original = f"dinat/checkpoints/{data}/{dinat_word}_{backbone}.pth"
    return DenseRow(arch, data, original)


DENSE_WEIGHTS: dict[str, DenseRow] = {row.tag: row for row in map(_row, DENSE_MODELS)}


def find(name: str) -> DenseRow | None:
    """The row for an architecture (`upernet-nat-tiny`) or a tag, in either spelling."""
    wanted = name.strip().lower().replace("-", "_")
    return DENSE_WEIGHTS.get(wanted) or next(
        (row for row in DENSE_WEIGHTS.values() if row.arch == wanted), None
    )


def find_original(file_name: str) -> DenseRow | None:
    """The row whose released .pth has exactly this file name."""
    return next((row for row in DENSE_WEIGHTS.values() if row.file_name == file_name), None)
