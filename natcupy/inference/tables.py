"""Answers as a table on disk: CSV, JSON lines or Parquet, in pieces that are put together later.

In: `Rows`. Out: a file per piece, and from all pieces in order one file. Columns: `path`; `label`,
`index`, `score` of the best answer, `label_2` ... of the next; `embedding`.
"""

from __future__ import annotations

import csv
import io
import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

ROW_GROUP = 1 << 16  # rows of Parquet that are compressed together


@dataclass(frozen=True)
class Columns:
    """What a table has.

    Attributes:
        topk: answers per picture.
        features: length of the embedding; 0 for none.
    """

    topk: int
    features: int = 0

    def names(self) -> list[str]:
        """The columns in order."""
        names = ["path"]
        for place in range(1, self.topk + 1):
            names += [_numbered(kind, place) for kind in ("label", "index", "score")]
        return names + ["embedding"] * bool(self.features)


@dataclass(frozen=True)
class Rows:
    """Answers to some pictures, best first.

    Attributes:
        paths: which pictures.
        labels: `[rows][topk]` names.
        indices: `[rows, topk]` class numbers.
        scores: `[rows, topk]` float32 probabilities.
        embeddings: `[rows, features]` float32; no features: no column.
    """

    paths: list[str]
    labels: list[list[str]]
    indices: np.ndarray
    scores: np.ndarray
    embeddings: np.ndarray


class Table(ABC):
    """A file format."""

    def __init__(self, columns: Columns) -> None:
        self.columns = columns

    @abstractmethod
    def write(self, rows: Rows, file: IO[bytes]) -> None:
        """One piece."""

    @abstractmethod
    def join(self, pieces: Iterable[Path], file: IO[bytes]) -> None:
        """The whole of its pieces."""


class JsonLines(Table):
    """One JSON object a line."""

    def write(self, rows: Rows, file: IO[bytes]) -> None:
        """One piece: its lines."""
        names = self.columns.names()
        for cells in _cells(rows):
            text = json.dumps(dict(zip(names, cells, strict=True)), ensure_ascii=False)
            file.write(text.encode() + b"\n")

    def join(self, pieces: Iterable[Path], file: IO[bytes]) -> None:
        """The whole: the pieces one after the other."""
        _append(pieces, file)


class Csv(Table):
    """Comma-separated, quoted where needed, UTF-8; an embedding is a JSON list in one cell."""

    def write(self, rows: Rows, file: IO[bytes]) -> None:
        """One piece: its lines, without the heading."""
        text = io.StringIO(newline="")
        writer = csv.writer(text, lineterminator="\n")
        for cells in _cells(rows):
            writer.writerow(json.dumps(c) if isinstance(c, list) else c for c in cells)
        file.write(text.getvalue().encode())

    def join(self, pieces: Iterable[Path], file: IO[bytes]) -> None:
        """The whole: the heading, then the pieces one after the other."""
        file.write(",".join(self.columns.names()).encode() + b"\n")
        _append(pieces, file)


class Parquet(Table):
    """Apache Parquet, by pyarrow."""

    def __init__(self, columns: Columns) -> None:
        super().__init__(columns)
        try:
            import pyarrow
            import pyarrow.parquet as parquet
        except ImportError:
            raise ImportError(
                "Parquet files are written by pyarrow, which is not installed: "
                "pip install 'natcupy[data]', or write .csv or .jsonl."
            ) from None
        self._arrow, self._parquet = pyarrow, parquet

    def write(self, rows: Rows, file: IO[bytes]) -> None:
        """One piece: a file of its own."""
        arrays: list[Any] = [rows.paths]
        for place in range(self.columns.topk):
            arrays += [[labels[place] for labels in rows.labels]]
            arrays += [rows.indices[:, place], rows.scores[:, place]]
        if self.columns.features:
            arrays.append(list(rows.embeddings))
        schema = self._schema()
        table = self._arrow.table(
            [self._arrow.array(a, field.type) for a, field in zip(arrays, schema, strict=True)],
            schema=schema,
        )
        self._parquet.write_table(table, file)

    def join(self, pieces: Iterable[Path], file: IO[bytes]) -> None:
        """The whole: the pieces' rows in larger groups."""
        with self._parquet.ParquetWriter(file, self._schema()) as writer:
            for tables in self._grouped(pieces):
                writer.write_table(self._arrow.concat_tables(tables).combine_chunks())

    def _grouped(self, pieces: Iterable[Path]) -> Iterator[list[Any]]:
        waiting: list[Any] = []
        for piece in pieces:
            waiting.append(self._parquet.ParquetFile(piece).read())
            if sum(table.num_rows for table in waiting) >= ROW_GROUP:
                yield waiting
                waiting = []
        if waiting:
            yield waiting

    def _schema(self) -> Any:
        arrow = self._arrow
        kinds = {"label": arrow.string(), "index": arrow.int32(), "score": arrow.float32()}
        fields = [("path", arrow.string())]
        fields += [(n, kinds[n.partition("_")[0]]) for n in self.columns.names() if n[:1] in "lis"]
        if self.columns.features:
            fields.append(("embedding", arrow.list_(arrow.float32(), self.columns.features)))
        return arrow.schema(fields)


KINDS: dict[str, type[Table]] = {".csv": Csv, ".jsonl": JsonLines, ".parquet": Parquet}


def table_for(out: Path, columns: Columns) -> Table:
    """The format that a file's suffix names.

    Raises ValueError for another suffix, ImportError for Parquet without pyarrow.
    """
    kind = KINDS.get(out.suffix.lower())
    if kind is None:
        raise ValueError(f"the output must end in {', '.join(KINDS)}, got {out.name!r}.")
    return kind(columns)


def _numbered(kind: str, place: int) -> str:
    return kind if place == 1 else f"{kind}_{place}"


def _cells(rows: Rows) -> Iterator[list[Any]]:
    """Row by row; numbers with the digits that tell one float32 from the next."""
    scores = _shortest(rows.scores)
    for row, path in enumerate(rows.paths):
        cells: list[Any] = [path]
        for label, index, score in zip(
            rows.labels[row], rows.indices[row].tolist(), scores[row], strict=True
        ):
            cells += [label, index, score]
        if rows.embeddings.shape[1]:
            cells.append(_shortest(rows.embeddings[row]))
        yield cells


def _shortest(values: np.ndarray) -> list[Any]:
    """float32 values as the shortest Python floats that round to them."""
    return values.astype(np.float32).astype(str).astype(np.float64).tolist()


def _append(pieces: Iterable[Path], file: IO[bytes]) -> None:
    for piece in pieces:
        with open(piece, "rb") as part:
            shutil.copyfileobj(part, file)
