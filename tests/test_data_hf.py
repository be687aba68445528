"""natcupy.data on datasets, saved and in memory, and on folders whose labels stand in a file."""

import csv
import json
import subprocess
import sys
import typing

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from natcupy import evaluate, predict
from natcupy.data import DataError, Pictures, find, find_pictures, find_split
from natcupy.train import finetune
from natcupy.zoo.preprocess import Preprocess
from tests.pictures import class_folders, noise

RECIPE = Preprocess((3, 8, 8))


@pytest.fixture
def table(monkeypatch, tmp_path):
    """A function that makes a dataset of so many pictures."""
    datasets = pytest.importorskip("datasets", reason="reading datasets needs `datasets`")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()

    def make(labels, kind=None, column="image", **more):
        kind = kind or datasets.ClassLabel(names=["cat", "dog", "owl"])
        values = {column: [noise(i) for i in range(len(labels))], "label": labels, **more}
        features = {column: datasets.Image(), "label": kind}
        features |= {key: datasets.Value("string") for key in more}
        return datasets.Dataset.from_dict(values, features=datasets.Features(features))

    make.datasets = datasets
    return make


def test_a_saved_dataset(table, tmp_path):
    parts = {"train": table([0, 1, 2, 1]), "test": table([2, 0])}
    table.datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    split = find(tmp_path / "saved")
    assert split.classes == ("cat", "dog", "owl") and split.name == "saved"
    assert split.train.labels.tolist() == [0, 1, 2, 1] and split.val.labels.tolist() == [2, 0]
    assert split.val.where(1) == "saved, test, row 1"
    assert np.array_equal(np.asarray(split.val.picture(1)), np.asarray(noise(1)))
    loader = DataLoader(Pictures(split.train, RECIPE), batch_size=3, num_workers=1)
    assert torch.cat([labels for _, labels in loader]).tolist() == [0, 1, 2, 1]


def test_one_saved_table_is_split(table, tmp_path):
    table([0, 1, 2] * 4).save_to_disk(tmp_path / "saved")
    split = find(tmp_path / "saved", val_fraction=0.25)
    assert split.train.counts().tolist() == [3, 3, 3] and split.val.counts().tolist() == [1, 1, 1]
    assert len(find_split(tmp_path / "saved").source) == 12


def test_a_folder_of_tables(table, tmp_path):
    (tmp_path / "repo" / "data").mkdir(parents=True)
    table([0, 1, 2]).to_parquet(tmp_path / "repo" / "data" / "train-00000-of-00001.parquet")
    assert find_split(tmp_path / "repo").source.labels.tolist() == [0, 1, 2]


@pytest.mark.parametrize(("kind", "values", "classes"), [
    ("int64", [7, 3, 3], ("3", "7")),
    ("string", ["b", "a", "a"], ("a", "b")),
])  # fmt: skip
def test_labels_without_names(table, tmp_path, kind, values, classes):
    table(values, table.datasets.Value(kind), "img").save_to_disk(tmp_path / "saved")
    source = find_split(tmp_path / "saved").source
    assert source.classes == classes and source.labels.tolist() == [1, 0, 0]


def test_datasets_that_cannot_be_used(table, tmp_path):
    table([0, -1]).save_to_disk(tmp_path / "unlabelled")
    with pytest.raises(DataError, match="got 1 of 2 without in unlabelled"):
        find_split(tmp_path / "unlabelled")
    table([0, 1], label2=["x", "y"]).remove_columns("label").save_to_disk(tmp_path / "no-label")
    with pytest.raises(DataError, match=r"one column of labels .* got 0 among: image \(Image\)"):
        find_split(tmp_path / "no-label")
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "state.json").write_text("{")
    with pytest.raises(DataError, match="cannot be loaded"):
        find_split(tmp_path / "torn")
    (tmp_path / "mixed").mkdir()
    table([0, 1]).to_parquet(tmp_path / "mixed" / "a.parquet")
    table([0, 1], column="img").to_parquet(tmp_path / "mixed" / "b.parquet")
    with pytest.raises(DataError, match="mixed cannot be loaded"):
        find_split(tmp_path / "mixed")
    with pytest.raises(DataError, match="no folder 'flower-typo' here, and no dataset"):
        find("flower-typo")


def test_without_the_library_it_says_what_to_install(tmp_path):
    code = (
        "import sys; sys.modules['datasets'] = None\n"
        "from natcupy.data import find\n"
        "try: find('some/name')\n"
        "except ImportError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "there is no folder 'some/name'" in done.stdout, done.stderr
    assert "pip install 'natcupy[data]'" in done.stdout


def test_a_usual_name_is_preferred_to_a_kind(table, tmp_path):
    """A column called label is meant, whatever other classes there are; a mask never is."""
    made = table(["c0", "c1", "c1"], table.datasets.Value("string"), source=["web", "cam", "web"])
    made = made.cast_column("source", table.datasets.ClassLabel(names=["web", "cam"]))
    made.save_to_disk(tmp_path / "saved")
    assert find_split(tmp_path / "saved").source.classes == ("c0", "c1")
    masked = made.remove_columns("label").add_column("label", [[0], [1], [2]])
    assert find_split(masked).source.classes == ("web", "cam")
    two = made.rename_column("label", "place").class_encode_column("place")
    with pytest.raises(DataError, match=r"got 2 among: .*place \(ClassLabel\)"):
        find_split(two)


def test_a_format_hides_nothing(table, tmp_path):
    table([0, 2, 1]).with_format("numpy", columns=["label"]).save_to_disk(tmp_path / "saved")
    source = find_split(tmp_path / "saved").source
    assert source.labels.tolist() == [0, 2, 1] and source.picture(2).size == (12, 10)


def test_the_only_part_has_its_name(table, tmp_path):
    table.datasets.DatasetDict(train=table([0, 1, 2] * 4)).save_to_disk(tmp_path / "one")
    assert len(find_split(tmp_path / "one", "train").source) == 12
    with pytest.raises(DataError, match="got val; one has the parts train"):
        find_split(tmp_path / "one", "val")
    assert len(find(tmp_path / "one", val_fraction=0.25).val) == 3


def test_datasets_in_memory(table):
    parts = table.datasets.DatasetDict(train=table([0, 1, 2, 1]), test=table([2, 0]))
    split = find(parts)
    assert split.train.labels.tolist() == [0, 1, 2, 1] and split.val.labels.tolist() == [2, 0]
    assert len(find(parts["train"], val=parts["test"]).val) == 2
    assert find_split(parts, "train").source.where(3) == "the dataset, train, row 3"
    assert find_split(parts["test"]).source.labels.tolist() == [2, 0]
    assert len(find_pictures(parts, "train")) == 4 and len(find_pictures(parts["test"])) == 2
    with pytest.raises(DataError, match="has the parts train, test"):
        find_pictures(parts)
    with pytest.raises(DataError, match="must have a split, got none"):
        find(table.datasets.DatasetDict())


def test_streamed_datasets_and_other_things_are_refused(table):
    streamed = table([0, 1]).to_iterable_dataset()
    for look in (find, find_split, find_pictures):
        with pytest.raises(DataError, match=r"IterableDataset\. Load it without streaming=True"):
            look(streamed)
    with pytest.raises(TypeError, match=r"data must be a folder, .* got int"):
        find_split(7)


@pytest.mark.parametrize("place", ["p.parquet", "cat/p.parquet", "data/p.parquet", "a/b/p.parquet"])
def test_a_table_beside_pictures_is_no_dataset(table, tmp_path, place):
    class_folders(tmp_path / "set", {"cat": 2, "dog": 2})
    path = tmp_path / "set" / place
    path.parent.mkdir(parents=True, exist_ok=True)
    table([0, 1, 2]).to_parquet(path)
    found = find_pictures(tmp_path / "set")
    assert [found.key(i) for i in range(len(found))] == [
        str(tmp_path / "set" / name / f"{i:03}.png") for name in ("cat", "dog") for i in range(2)
    ]
    if place in ("p.parquet", "cat/p.parquet"):
        assert find(tmp_path / "set", val_fraction=0.5).classes == ("cat", "dog")


@pytest.mark.parametrize(
    "place",
    ["train/0.parquet", "plain_text/train-00000-of-00001.parquet", "default/train/0.parquet"],
)
def test_tables_in_folders_are_a_dataset(table, tmp_path, place):
    path = tmp_path / "repo" / place
    path.parent.mkdir(parents=True)
    table([0, 1, 2]).to_parquet(path)
    assert find_split(tmp_path / "repo").source.labels.tolist() == [0, 1, 2]
    assert len(find_pictures(tmp_path / "repo")) == 3


def test_a_dataset_may_show_a_picture_of_itself(table, tmp_path):
    (tmp_path / "repo" / "data").mkdir(parents=True)
    table([0, 1, 2]).to_parquet(tmp_path / "repo" / "data" / "train-00000-of-00001.parquet")
    noise(9).save(tmp_path / "repo" / "thumbnail.png")
    assert find_split(tmp_path / "repo").source.labels.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (find, "data"),
        (find_split, "data"),
        (find_pictures, "data"),
        (evaluate, "source"),
        (predict, "data"),
        (finetune, "train_data"),
        (finetune, "val_data"),
    ],
)
def test_annotations_name_datasets(table, function, name):
    """What an editor shows of the data that can be passed."""
    kinds = table.datasets
    hints = typing.get_type_hints(function, localns={"datasets": kinds})
    assert {str, kinds.Dataset, kinds.DatasetDict} <= set(typing.get_args(hints[name]))


# -- pictures whose labels stand in a file -------------------------------------------------------


def listed(folder, names, labels, suffix=".csv", column="label"):
    """Pictures and the file that lists them."""
    for seed, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        noise(seed).save(folder / name)
    rows = [{"file_name": n, column: label} for n, label in zip(names, labels, strict=True)]
    path = folder / f"metadata{suffix}"
    if suffix == ".csv":
        with open(path, "w", encoding="utf-8-sig", newline="") as file:
            writer = csv.DictWriter(file, ["file_name", column])
            writer.writeheader()
            writer.writerows(rows)
    elif suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pa = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_labels_in_a_file_beside_the_pictures(tmp_path, suffix):
    listed(tmp_path / "train", ["b.png", "a.png", "x/c.png"], ["owl", "cat", "owl"], suffix)
    listed(tmp_path / "test", ["d.png"], ["cat"], suffix)
    split = find(tmp_path)
    assert split.classes == ("cat", "owl") and split.train.labels.tolist() == [1, 0, 1]
    assert split.val.where(0) == str(tmp_path / "test" / "d.png")
    assert f"train/metadata{suffix} lists" in " ".join(split.notes)


def test_a_file_of_labels_above_the_parts_or_without_any(tmp_path):
    names = ["train/a.png", "train/b.png", "test/c.png"]
    listed(tmp_path / "two", names, [10, 9, 10])
    split = find(tmp_path / "two")
    assert split.classes == ("9", "10") and split.train.labels.tolist() == [1, 0]
    assert split.val.key(0) == "test/c.png" and split.val.labels.tolist() == [1]
    listed(tmp_path / "flat", ["a.png", "b.png"], ["x", "y"])
    found = find_split(tmp_path / "flat")
    assert found.source.classes == ("x", "y") and "left out" not in " ".join(found.notes)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_pictures_that_no_file_lists_are_told(tmp_path, suffix):
    table = listed(tmp_path, ["a.png", "x/b.png", "c.png"], ["owl", "cat", "owl"], suffix)
    table.write_text(table.read_text().replace("a.png", "./a.png"))  # another spelling, no picture
    assert "left out" not in " ".join(find_split(tmp_path).notes)
    for name in ("d.png", "x/e.png", ".hidden.png"):
        noise(9).save(tmp_path / name)
    (tmp_path / "notes.txt").touch()
    found = find_split(tmp_path)
    assert len(found.source) == 3
    told = [note for note in found.notes if "left out" in note]
    assert told == [f"2 pictures that {table} does not list were left out"]
    assert told[0] in find(tmp_path, val_fraction=0).notes


def test_pictures_that_no_file_lists_are_told_of_every_file(tmp_path):
    names = ["train/a.png", "train/b.png", "test/c.png"]
    table = listed(tmp_path / "above", names, ["x", "y", "x"])
    noise(9).save(tmp_path / "above" / "test" / "d.png")
    assert [note for note in find(tmp_path / "above").notes if "left out" in note] == [
        f"1 pictures that {table} does not list were left out"
    ]
    for part in ("train", "test"):
        listed(tmp_path / "in" / part, ["a.png", "b.png"], ["x", "y"])
    noise(9).save(tmp_path / "in" / "train" / "c.png")
    told = [note for note in find(tmp_path / "in").notes if "left out" in note]
    assert len(told) == 1 and f"1 pictures that {tmp_path / 'in' / 'train'}" in told[0]


def test_folders_called_train_and_test_are_no_classes(tmp_path):
    for part in ("train", "test"):
        class_folders(tmp_path, {part: 3})
    with pytest.raises(DataError, match=r"train must hold one folder .* list them in a metadata"):
        find(tmp_path)
    with pytest.raises(DataError, match=r"test must hold one folder"):
        find_split(tmp_path)


def test_other_files_beside_class_folders_change_nothing(tmp_path):
    class_folders(tmp_path, {"cat": 2, "dog": 2})
    for text in (b"", b"\xff\xfe", b"file_name,text\ncat/000.png,a cat\n"):
        (tmp_path / "metadata.csv").write_bytes(text)
        assert find(tmp_path).classes == ("cat", "dog")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda path: path.write_text(path.read_text().replace("label", "x")), "one of labels"),
        (lambda path: path.write_bytes(b"file_name,label\na.png,caf\xe9\n"), "text as UTF-8"),
        (lambda path: path.write_text("file_name,label\n"), "got no rows"),
        (lambda path: path.write_text("file_name,label\na.png,\n"), "got 1 of 1 without"),
        (lambda path: path.with_name("a.png").unlink(), "got 1 of 2 that are not: 'a.png'"),
    ],
)
def test_files_of_labels_that_cannot_be_used(tmp_path, change, text):
    change(listed(tmp_path, ["a.png", "b.png"], ["x", "y"]))
    with pytest.raises(DataError, match=text):
        find_split(tmp_path)
