"""Hugging Face datasets, through the `datasets` library where it is installed.

In: a name on the Hub (`org/name`, `org/name:config`, each with `@revision`), a saved folder, or the
library's own objects. Out: the splits by name, each an `HfSource`. Pictures are decoded here, not
by the library, so that they are read and refused as those in folders are.
"""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

import numpy as np
from PIL import Image

from natcupy.data.files import has_pictures
from natcupy.data.source import (
    LABEL_COLUMNS,
    DataError,
    PictureSet,
    Source,
    indexed,
    refuse_unlabelled,
)
from natcupy.hub import client
from natcupy.hub.errors import HubError
from natcupy.zoo.preprocess import open_picture

if TYPE_CHECKING:
    import datasets

Tables = Union["datasets.Dataset", "datasets.DatasetDict"]

_NAME = re.compile(
    r"(?P<path>[\w-][\w.-]*(/[\w-][\w.-]*)?)(:(?P<config>[\w.-]+))?(@(?P<revision>[\w./-]+))?"
)
_PICTURE_COLUMNS = ("image", "img", "picture", "jpg", "png")
_SAVED = ("dataset_dict.json", "state.json")  # by `save_to_disk`
_SHARD = re.compile(r"-\d{5}-of-\d{5}\b")  # in a file's name, by `push_to_hub`


class HfPictures(PictureSet):
    """The pictures of one split.

    Args:
        name: of the dataset and split, for messages.
        table: the split.
        column: the pictures' column.
    """

    def __init__(self, name: str, table: datasets.Dataset, column: str) -> None:
        import datasets

        self.name, self.column = name, column
        only = table.with_format(None).select_columns([column])  # a format may hide columns
        self._table = only.cast_column(column, datasets.Image(decode=False))

    def __len__(self) -> int:
        return len(self._table)

    def where(self, index: int) -> str:
        """The dataset and the row."""
        return f"{self.name}, row {index}"

    def key(self, index: int) -> str:
        """The row's number."""
        return str(index)

    def content(self, index: int) -> bytes:
        """The picture's file; nothing where there is none."""
        stored = self._table[index][self.column] or {"bytes": b""}
        if stored["bytes"] is not None:
            return stored["bytes"]
        try:
            return Path(stored["path"] or "").read_bytes()
        except OSError:
            return b""

    def decode(self, index: int) -> Image.Image:
        """A picture as it is stored."""
        stored = self._table[index][self.column]
        if stored is None:
            raise OSError("the row holds no picture")
        if stored["bytes"] is None:
            return open_picture(stored["path"])
        return open_picture(io.BytesIO(stored["bytes"]))


class HfSource(HfPictures, Source):
    """The pictures of one split, with labels.

    Args:
        name, table, column: as for `HfPictures`.
        labels: `[len(table)]` integers.
        classes: what the labels stand for.
    """

    def __init__(
        self,
        name: str,
        table: datasets.Dataset,
        column: str,
        labels: np.ndarray,
        classes: tuple[str, ...],
    ) -> None:
        super().__init__(name, table, column)
        self.labels, self.classes = labels, classes


def is_saved(folder: Path) -> bool:
    """Whether `datasets` wrote this folder, or it holds a dataset's tables.

    Beside pictures a table is somebody's results, unless its name is that of a dataset's shard.
    """
    if any((folder / name).is_file() for name in _SAVED):
        return True
    near = [path for pattern in ("*.parquet", "data/*.parquet") for path in folder.glob(pattern)]
    if any(_SHARD.search(path.name) for path in near):
        return True
    if has_pictures(folder):
        return False
    deep = (path for pattern in ("*/*.parquet", "*/*/*.parquet") for path in folder.glob(pattern))
    shown = (path for path in deep if not path.relative_to(folder).parts[0].startswith("."))
    return bool(near) or any(shown)


def is_name(text: str) -> bool:
    """Whether this could name a dataset on the Hub."""
    return _NAME.fullmatch(text) is not None


def splits(data: str | Path) -> dict[str, datasets.Dataset]:
    """The splits of a saved folder or of a dataset on the Hub, by name.

    Raises ImportError without `datasets`, DataError for what cannot be loaded.
    """
    try:
        import datasets
    except ImportError:
        what = "the tables in it are" if isinstance(data, Path) else "a Hub dataset of that name is"
        found = f"{data} is a dataset" if isinstance(data, Path) else f"there is no folder {data!r}"
        raise ImportError(
            f"{found}; {what} read by the `datasets` library, which is not installed: "
            "pip install 'natcupy[data]'."
        ) from None
    kinds = (HubError, OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError)
    try:
        loaded = _load(datasets, data)
    except kinds as error:
        raise DataError(_not_loaded(data, error)) from None
    return _by_name(datasets, loaded)


def given(data: object) -> dict[str, datasets.Dataset] | None:
    """The splits of a `Dataset` or `DatasetDict`, by name; None for anything else.

    Raises DataError for a streamed one, or one without splits.
    """
    datasets = sys.modules.get("datasets")  # where it was not imported, nothing is of its kinds
    if not hasattr(datasets, "IterableDatasetDict"):  # or a user's own module has that name
        return None
    if isinstance(data, datasets.IterableDataset | datasets.IterableDatasetDict):
        raise DataError(
            f"a dataset must be whole, so that pictures can be counted and taken by number, got "
            f"the streamed {type(data).__name__}. Load it without streaming=True."
        )
    if not isinstance(data, datasets.Dataset | datasets.DatasetDict):
        return None
    found = _by_name(datasets, data)
    if not found:
        raise DataError("a DatasetDict must have a split, got none.")
    return found


def _by_name(datasets: Any, loaded: Any) -> dict[str, datasets.Dataset]:
    if isinstance(loaded, datasets.Dataset):
        return {str(loaded.split or "all"): loaded}
    return {str(name): part for name, part in loaded.items()}


def _load(datasets: Any, data: str | Path) -> Any:
    if isinstance(data, Path):
        if any((data / name).is_file() for name in _SAVED):
            return datasets.load_from_disk(str(data))
        return datasets.load_dataset(str(data))
    named = _NAME.fullmatch(data)
    assert named is not None  # asked before, by is_name
    if not client.is_offline():  # the library itself would try for half a minute
        client.ask_for_dataset(named["path"], named["revision"], client.Access())
    return datasets.load_dataset(named["path"], named["config"], revision=named["revision"])


def _not_loaded(data: str | Path, error: Exception) -> str:
    reason = " ".join(str(error).split()) or type(error).__name__
    if isinstance(data, Path):
        return f"the dataset in {data} cannot be loaded: {reason}"
    return (
        f"there is no folder {data!r} here, and no dataset of this name could be loaded: {reason}"
    )


def parquet_rows(path: Path) -> Iterable[dict[str, Any]]:
    """The rows of a Parquet file that is no dataset. Raises ImportError without `datasets`."""
    try:
        import datasets
    except ImportError:
        raise ImportError(
            f"{path} is read by the `datasets` library, which is not installed: "
            "pip install 'natcupy[data]'."
        ) from None
    try:
        return datasets.Dataset.from_parquet(str(path))
    except datasets.exceptions.DatasetsError as error:
        raise ValueError(str(error)) from None


def hf_pictures(name: str, table: datasets.Dataset) -> HfPictures:
    """A split as pictures without labels. Raises DataError without one column of pictures."""
    return HfPictures(name, table, _picture_column(name, table))


def hf_source(name: str, table: datasets.Dataset) -> HfSource:
    """A split as a source.

    Raises DataError where the columns of pictures and labels cannot be told, or labels are missing.
    """
    import datasets

    kinds = table.features
    plain = (datasets.ClassLabel, datasets.Value)  # not masks or boxes, which may be called label
    usual = [key for key in LABEL_COLUMNS if isinstance(kinds.get(key), plain)]
    named = [key for key, kind in kinds.items() if isinstance(kind, datasets.ClassLabel)]
    labelled = _one(name, "labels", usual[:1] or named, LABEL_COLUMNS, kinds)
    values = table.select_columns([labelled]).with_format("arrow")[:][labelled].to_pylist()
    labels, classes = _labels(f"{name}, column {labelled!r}", values, kinds[labelled])
    return HfSource(name, table, _picture_column(name, table), labels, classes)


def _picture_column(name: str, table: datasets.Dataset) -> str:
    import datasets

    kinds = table.features
    found = [key for key, kind in kinds.items() if isinstance(kind, datasets.Image)]
    return _one(name, "pictures", found, _PICTURE_COLUMNS, kinds)


def _one(name: str, what: str, found: list[str], usual: tuple[str, ...], kinds: Any) -> str:
    """The one column of a kind, or the usual one of several."""
    if len(found) == 1:
        return found[0]
    for key in usual:
        if key in found:
            return key
    columns = ", ".join(f"{key} ({type(kind).__name__})" for key, kind in kinds.items())
    raise DataError(
        f"{name} must have one column of {what} (or one called {', '.join(usual)}), got "
        f"{len(found)} among: {columns}. Rename or drop columns and save the dataset."
    )


def _labels(where: str, values: list[Any], kind: Any) -> tuple[np.ndarray, tuple[str, ...]]:
    """Labels as indices, and the classes' names."""
    names = getattr(kind, "names", None)
    if names is None:
        return indexed(where, values)
    refuse_unlabelled(where, values)
    return np.asarray(values, dtype=np.int64), tuple(names)
