"""predict: one table however it is made, and what it refuses before anything is done."""

import errno
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from natcupy.data import DataError
from natcupy.inference import predict
from tests.inference.cases import LABELS, lines, small
from tests.pictures import broken, kinds, noise


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_predict_writes_what_the_model_says(tmp_path, suffix):
    model = small().double()
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    made = kinds(tmp_path / "in" / "a")
    (tmp_path / "in" / 'b, "c"\n').mkdir()
    noise(50).save(tmp_path / "in" / 'b, "c"\n' / "x.png")
    out = tmp_path / f"out{suffix}"
    report = predict(
        model, tmp_path / "in", out, topk=3, features=True, batch_size=4, workers=0, part_pictures=4
    )
    rows = lines(out)
    assert report.complete and report.bad == () and len(rows) == len(made) + 1
    assert [row["path"] for row in rows] == sorted(row["path"] for row in rows)
    assert sorted(os.listdir(tmp_path)) == ["in", out.name, f"{out.name}.run.json"]
    for row in rows:
        with torch.inference_mode():
            ready = model.preprocess(row["path"])
            logits = model(ready)[0]
            pooled = model.forward_head(model.forward_features(ready), pre_logits=True)[0]
        best = logits.softmax(-1).topk(3)
        for place, end in enumerate(("", "_2", "_3")):
            assert int(row[f"index{end}"]) == best.indices[place]
            assert row[f"label{end}"] == LABELS[best.indices[place]]
            assert float(row[f"score{end}"]) == pytest.approx(float(best.values[place]), rel=1e-5)
        embedding = row["embedding"]
        embedding = json.loads(embedding) if isinstance(embedding, str) else embedding
        np.testing.assert_allclose(embedding, pooled.numpy(), rtol=1e-4, atol=1e-5)


def test_the_table_is_bit_equal_for_any_workers_and_parts(model, tmp_path, seven):
    made = []
    for index, (workers, size) in enumerate([(0, 8), (2, 8), (1, 16), (0, 1000)]):
        out = tmp_path / f"{index}.jsonl"
        predict(model, seven, out, batch_size=8, workers=workers, part_pictures=size, topk=2)
        made.append(out.read_bytes())
    assert made[1:] == made[:1] * 3 and made[0].count(b"\n") == 53


def test_the_batch_size_changes_nothing_but_rounding(tmp_path, seven):
    model, tables = small().double(), []
    for size in (1, 7, 64):
        out = tmp_path / f"{size}.jsonl"
        predict(model, seven, out, batch_size=size, workers=0)
        tables.append(lines(out))
    for table in tables[1:]:
        for row, same in zip(table, tables[0], strict=True):
            assert (row["path"], row["label"]) == (same["path"], same["label"])
            assert row["score"] == pytest.approx(same["score"], rel=1e-6)


def test_bad_files_are_reported_and_stop_nothing(model, tmp_path, seven):
    reasons = broken(seven / "dog")
    out = tmp_path / "out.csv"
    report = predict(model, seven, out, batch_size=4, workers=1, part_pictures=4)
    assert len(lines(out)) == 53 and report.complete
    found = {os.path.basename(where): reason for where, reason in report.bad}
    assert found.keys() == reasons.keys() and all(reasons[n] in found[n] for n in reasons)
    record = json.loads((tmp_path / "out.csv.run.json").read_text())
    assert [tuple(entry) for entry in record["bad"]] == list(report.bad)
    assert record["settings"]["pictures"] == 53 + len(reasons)
    only = predict(model, [seven / "dog" / "empty.png", "gone.png"], tmp_path / "none.csv")
    assert len(only.bad) == 2 and lines(tmp_path / "none.csv") == []
    pytest.importorskip("pyarrow")
    predict(model, [seven / "dog" / "empty.png", "gone.png"], tmp_path / "none.parquet", topk=2)
    assert lines(tmp_path / "none.parquet") == []


def test_answers_that_are_no_numbers_are_reported(tmp_path, seven):
    model = small()
    with torch.no_grad():
        model.head.bias[2] = float("inf")
    report = predict(model, seven, tmp_path / "out.csv", workers=0)
    assert len(report.bad) == 53 and "not a number" in report.bad[0][1]


def test_names_that_are_no_text(model, tmp_path):
    folder = os.fsencode(tmp_path) + b"/in"
    os.mkdir(folder)
    noise(1).save(os.fsdecode(folder + b"/\xff\xfe.png"))
    noise(2).save(os.fsdecode(folder) + "/日本語.png")
    out = tmp_path / "out.csv"
    predict(model, os.fsdecode(folder), out, workers=0)
    assert [os.path.basename(row["path"]) for row in lines(out)] == ["日本語.png", "\\xff\\xfe.png"]


def test_a_dataset_without_labels(model, tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    table = datasets.Dataset.from_dict(
        {"image": [noise(1), noise(2)]}, features=datasets.Features({"image": datasets.Image()})
    )
    datasets.DatasetDict(train=table, other=table).save_to_disk(tmp_path / "set")
    predict(model, tmp_path / "set", tmp_path / "out.jsonl", split="other", workers=0)
    paths = [row["path"] for row in lines(tmp_path / "out.jsonl")]
    assert paths == ["set, other, row 0", "set, other, row 1"]
    with pytest.raises(DataError, match="has the parts train, other"):
        predict(model, tmp_path / "set", tmp_path / "no.jsonl")


def test_a_table_among_the_pictures_changes_no_name(model, tmp_path, seven):
    pytest.importorskip("pyarrow")
    first = seven / "answers.parquet"
    predict(model, seven, first, workers=0)
    predict(model, seven, seven / "more.parquet", workers=0)
    assert lines(seven / "more.parquet") == lines(first)
    assert predict(model, seven, first, resume=True, workers=0).pictures == 0


def test_a_dataset_in_memory(model, tmp_path):
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict(
        {"image": [noise(1), noise(2)]}, features=datasets.Features({"image": datasets.Image()})
    )
    predict(model, table, tmp_path / "out.jsonl", workers=0)
    paths = [row["path"] for row in lines(tmp_path / "out.jsonl")]
    assert paths == ["the dataset, all, row 0", "the dataset, all, row 1"]


def test_a_model_without_classes_gives_features(tmp_path, seven):
    model = small(None, 0)
    with pytest.raises(ValueError, match="features=True"):
        predict(model, seven, tmp_path / "out.jsonl")
    predict(model, seven, tmp_path / "out.jsonl", features=True, workers=0)
    assert set(lines(tmp_path / "out.jsonl")[0]) == {"path", "embedding"}


def test_what_cannot_be_predicted(model, tmp_path, seven, monkeypatch):
    out = tmp_path / "out.csv"
    for wrong, text in (
        ({"topk": 0}, "topk"),
        ({"batch_size": 0}, "batch_size"),
        ({"part_pictures": 0}, "part_pictures"),
        ({"shard": (2, 2)}, "shard"),
        ({"shard": (0, 2), "overwrite": True}, "with overwrite"),
        ({"workers": -1}, "workers"),
    ):
        with pytest.raises(ValueError, match=text):
            predict(model, seven, out, **wrong)
    with pytest.raises(ValueError, match=r"must end in \.csv, \.jsonl, \.parquet, got 'out\.txt'"):
        predict(model, seven, tmp_path / "out.txt")
    with pytest.raises(FileNotFoundError, match="folder must exist"):
        predict(model, seven, tmp_path / "no" / "out.csv")
    (tmp_path / "dir.csv").mkdir()
    with pytest.raises(IsADirectoryError, match="must be a file"):
        predict(model, seven, tmp_path / "dir.csv")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="without any"):
        predict(model, tmp_path / "empty", out)
    with pytest.raises(DataError, match="no file or folder"):
        predict(model, tmp_path / "gone", out)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"natcupy\[data\]"):
        predict(model, seven, tmp_path / "out.parquet")
    assert sorted(os.listdir(tmp_path)) == ["data", "dir.csv", "empty"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_output_that_cannot_be_written(model, tmp_path, seven):
    (tmp_path / "closed").mkdir(mode=0o555)
    with pytest.raises(PermissionError):
        predict(model, seven, tmp_path / "closed" / "out.csv")


def test_a_folder_that_refuses_files(model, tmp_path, seven, monkeypatch):
    """What a read-only disk does, also for root."""

    def refuse(self, *args, **kwargs):
        raise OSError(errno.EROFS, "Read-only file system", str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(OSError, match=r"nothing can be written to .*: Read-only file system"):
        predict(model, seven, tmp_path / "out.csv")


def test_a_disk_that_is_full_from_the_start(model, tmp_path, seven, monkeypatch):
    """The system's error has no file; ours names the folder beside the table. Nothing is left."""
    before = sorted(os.listdir(tmp_path))

    def full(self, *args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(OSError, match="No space left on device") as caught:
            predict(model, seven, tmp_path / "out.csv")
    assert caught.value.filename == str(tmp_path / "out.csv.parts")
    assert sorted(os.listdir(tmp_path)) == before


def test_what_exists_is_not_replaced_unasked(model, tmp_path, seven):
    out = tmp_path / "out.csv"
    out.write_text("precious")
    for resume in (False, True):
        with pytest.raises(FileExistsError, match="--overwrite"):
            predict(model, seven, out, resume=resume, workers=0)
    assert out.read_text() == "precious" and sorted(os.listdir(tmp_path)) == ["data", "out.csv"]
    predict(model, seven, out, overwrite=True, workers=0)
    first = out.read_bytes()
    again = predict(model, seven, out, resume=True, workers=0)
    assert again.complete and again.pictures == 0 and out.read_bytes() == first
    with pytest.raises(ValueError, match="columns"):
        predict(model, seven, out, resume=True, topk=2, workers=0)
