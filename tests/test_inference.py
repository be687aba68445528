"""evaluate and predict: right counts, one table however it is made, nothing lost or doubled."""

import contextlib
import csv
import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import natcupy
from natcupy.data import DataError, find_split
from natcupy.inference import evaluate, feed, parts, predict
from natcupy.inference.classes import match
from natcupy.inference.evaluation import LOSS_UNIT
from tests.hub.small import invented
from tests.pictures import broken, class_folders, kinds, noise

ROOT = Path(__file__).parent.parent
LABELS = ("ant", "bee, honey bee", "cat", "dog", "eel", "fox", "gnu")


def small(labels=LABELS, classes=7):
    """A NAT with invented weights for pictures of 16 x 16, whose answers differ."""
    from natcupy.zoo import build_model
    from tests.hub.small import CONFIGS

    torch.manual_seed(0)
    model = build_model(dataclasses.replace(CONFIGS["nat"], num_classes=classes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
    model.pretrained_cfg |= {"input_size": (3, 16, 16), "crop_pct": 1.0}
    if labels:
        model.pretrained_cfg["label_names"] = list(labels)
    if classes:
        spread(model.eval())
    return model.eval()


@torch.no_grad()
def spread(model):
    """Shift the classifier so that random pictures get different answers."""
    pictures = torch.cat([model.preprocess(noise(seed)) for seed in range(100, 132)])
    pooled = model.forward_head(model.forward_features(pictures), pre_logits=True)
    model.head.weight /= pooled.std(0)
    model.head.bias.copy_(-model.head.weight @ pooled.mean(0))


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As the processes of torchrun have it; and small matrices are quicker so."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model():
    return small()


@pytest.fixture
def seven(tmp_path):
    """53 pictures in folders named like some of the model's classes."""
    return class_folders(tmp_path / "data", {"ant": 11, "dog": 20, "honey_bee": 13, "GNU": 9})


def lines(path):
    if path.suffix == ".csv":
        with open(path, encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    return pytest.importorskip("pyarrow.parquet").read_table(path).to_pylist()


# -- evaluate -------------------------------------------------------------------------------------


def by_hand(model, source, mapping):
    """Top-1, top-5 and loss, one picture at a time, in float64."""
    right = right5 = loss = 0
    for index in range(len(source)):
        with torch.inference_mode():
            logits = model(model.preprocess(source.where(index)))[0].double()
        label = mapping[source.label(index)]
        order = logits.argsort(descending=True).tolist()
        right += order[0] == label
        right5 += label in order[:5]
        loss -= float(logits.log_softmax(0)[label])
    return right, right5, loss / len(source)


def test_evaluate_counts_right(model, seven):
    source = find_split(seven).source
    right, right5, loss = by_hand(model, source, [6, 0, 3, 1])
    assert 0 < right < right5 < 53  # so that the test can tell
    found = evaluate(model, seven, batch_size=7, workers=0)
    assert (found.pictures, found.bad) == (53, ())
    assert found.top1 == right / 53 and found.top5 == right5 / 53
    assert found.loss == pytest.approx(loss, rel=1e-5)
    assert [(c.name, c.pictures) for c in found.classes] == [
        ("GNU", 9), ("ant", 11), ("dog", 20), ("honey_bee", 13),
    ]  # fmt: skip
    assert sum(c.right for c in found.classes) == right
    assert sum(c.right5 for c in found.classes) == right5
    assert found.notes == ("classes matched by name",) and found.data == "data"


@pytest.mark.parametrize(("batch_size", "workers"), [(1, 0), (64, 0), (8, 2)])
def test_evaluate_is_the_same_however_it_runs(model, seven, batch_size, workers):
    usual = evaluate(model, seven, batch_size=10, workers=0)
    found = evaluate(model, find_split(seven).source, batch_size=batch_size, workers=workers)
    assert (found.top1, found.top5, found.classes) == (usual.top1, usual.top5, usual.classes)
    assert found.loss == pytest.approx(usual.loss, rel=1e-6)


def test_evaluate_counts_what_it_cannot_read(model, seven):
    reasons = broken(seven / "dog")
    found = evaluate(model, seven, workers=0)
    assert found.pictures == 53 and len(found.bad) == len(reasons)
    assert all(reasons[os.path.basename(where)] in reason for where, reason in found.bad)
    only = evaluate(model, seven, batch_size=3, workers=1)
    assert only.bad == found.bad and only.top1 == found.top1


def test_ties_and_answers_that_are_no_numbers(seven):
    model = small()
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.zero_()
    found = evaluate(model, seven, workers=0)  # all equal: the first class is the answer
    assert found.top1 == 11 / 53 and found.top5 == 44 / 53  # gnu is the seventh
    assert found.loss == pytest.approx(np.log(7), abs=LOSS_UNIT)
    with torch.no_grad():
        model.head.bias[2] = float("nan")
    found = evaluate(model, seven, workers=0)
    assert found.top1 == found.top5 == 0 and np.isnan(found.loss)


def test_a_model_with_five_classes_has_no_top5(tmp_path):
    data = class_folders(tmp_path, {"0": 2, "1": 3})
    assert evaluate(small(None, 5), data, workers=0).top5 is None


def test_what_cannot_be_evaluated(model, tmp_path, seven):
    with pytest.raises(DataError, match="no folder"):
        evaluate(model, "./nowhere")
    with pytest.raises(ValueError, match="needs a classifier"):
        evaluate(invented("backbone"), seven)
    with pytest.raises(ValueError, match="batch_size"):
        evaluate(model, seven, batch_size=0)
    with pytest.raises(ValueError, match="with a Source"):
        evaluate(model, find_split(seven).source, split="val")
    (tmp_path / "bad" / "ant").mkdir(parents=True)
    (tmp_path / "bad" / "ant" / "x.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"none of the 1 pictures could be read.*x\.png.*empty"):
        evaluate(model, tmp_path / "bad", workers=0)


# -- classes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "labels", "count", "expected"),
    [
        (["dog", "Ant"], LABELS, 7, [3, 0]),
        (["honey-bee", "bee"][:1], LABELS, 7, [1]),
        (["tench"], ["tench, Tinca tinca", "crane", "crane"], 3, [0]),
        (["10", "2"], None, 11, [10, 2]),
        (["n01", "n02", "n03"], None, 3, [0, 1, 2]),
        (["n01", "n02"], ["cat", "dog"], 2, [0, 1]),
    ],
)
def test_classes_match(names, labels, count, expected):
    assert match(names, labels, count)[0] == expected


@pytest.mark.parametrize(
    ("names", "labels", "count", "text"),
    [
        (["dog", "emu"], LABELS, 7, "got 1 of 2 that are not: emu"),
        (["n01", "n02"], LABELS, 7, r"got 2 \(n01, n02\) for a model with 7 \(ant"),
        (["bee", "honey bee"], LABELS, 7, "must not be the same class"),
        (["crane", "cat"], ["crane", "crane", "cat"], 3, "got 1 of 2 that are not: crane"),
        (["1", "01"], None, 3, "must not be the same class"),
    ],
)
def test_classes_that_do_not_match(names, labels, count, text):
    with pytest.raises(DataError, match=text):
        match(names, labels, count)


@pytest.mark.parametrize(
    "text",
    [
        '{"a": 3, "b": "ant"}',
        "a\t3\nb\tant\n",
        "# comment\na, 3\n\nb,honey bee\n",
        "\ufeffa,3\nb,0",
    ],
)
def test_a_class_map(tmp_path, text):
    path = tmp_path / "map.txt"
    path.write_text(text, "utf-8")
    found, how = match(["a", "b"], LABELS, 7, path)
    assert found == [3, 1 if "honey" in text else 0] and str(path) in how


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("a\t3", "none for b"),
        ("a,3\nb,7", "got '7' for b"),
        ("a,3\nb,yak", "got 'yak' for b"),
        ("a 3", "without tab or comma"),
        ("{", "JSON"),
    ],
)
def test_class_maps_that_cannot_be_used(tmp_path, text, why):
    (tmp_path / "map").write_text(text)
    with pytest.raises(DataError, match=why):
        match(["a", "b"], LABELS, 7, tmp_path / "map")


# -- predict --------------------------------------------------------------------------------------


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


def test_a_model_without_classes_gives_features(tmp_path, seven):
    model = small(None, 0)
    with pytest.raises(ValueError, match="features=True"):
        predict(model, seven, tmp_path / "out.jsonl")
    predict(model, seven, tmp_path / "out.jsonl", features=True, workers=0)
    assert set(lines(tmp_path / "out.jsonl")[0]) == {"path", "embedding"}


# -- refusals, before anything is done ---------------------------------------------------------


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


# -- interruptions --------------------------------------------------------------------------------


class StoppedError(Exception):
    pass


def interrupted(model, data, out, at, monkeypatch, **options):
    """Predict, but the `at`-th file that is to appear does not."""
    real, count = os.replace, 0

    def replace(source, target):
        nonlocal count
        count += 1
        if count == at:
            raise StoppedError
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(parts.os, "replace", replace)
        with pytest.raises(StoppedError):
            predict(model, data, out, **options)


SETTINGS = {"batch_size": 5, "workers": 0, "part_pictures": 10}


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_resuming_gives_the_same_bytes(model, tmp_path, seven, monkeypatch, suffix):
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    broken(seven / "cat")
    whole, out = tmp_path / f"whole{suffix}", tmp_path / f"out{suffix}"
    expected = predict(model, seven, whole, **SETTINGS)
    assert expected.parts == 7
    for at in (1, 4, 9, 10, 11):  # a part, another, the table, its record, the mark
        options = dict(SETTINGS, resume=at > 1)
        with monkeypatch.context() as patch:
            interrupted(model, seven, out, at, patch, **options)
        assert not out.exists() or out.read_bytes() == whole.read_bytes()
        if at < 9:
            with pytest.raises(FileExistsError, match="--resume"):
                predict(model, seven, out, **SETTINGS)
        report = predict(model, seven, out, resume=True, **SETTINGS)
        assert report.bad == expected.bad and out.read_bytes() == whole.read_bytes()
        assert not (tmp_path / f"{out.name}.parts").exists()
        out.unlink()
        (tmp_path / f"{out.name}.run.json").unlink()


def test_a_kill_while_the_folder_is_made_leaves_nothing_in_the_end(model, tmp_path, seven):
    (tmp_path / "out.csv.parts.0123.tmp").mkdir()
    (tmp_path / "out.csv.parts.0123.tmp" / "settings.json").write_text("{")
    predict(model, seven, tmp_path / "out.csv", resume=True, **SETTINGS)
    assert sorted(os.listdir(tmp_path)) == ["data", "out.csv", "out.csv.run.json"]


def test_only_what_is_missing_is_done_again(model, tmp_path, seven, monkeypatch):
    out = tmp_path / "out.csv"
    interrupted(model, seven, out, 3, monkeypatch, **SETTINGS)
    seen = []
    real = feed.outputs

    def watched(model, pictures):
        seen.append(len(pictures))
        return real(model, pictures)

    monkeypatch.setattr("natcupy.inference.prediction.outputs", watched)
    assert predict(model, seven, out, resume=True, **SETTINGS).pictures == sum(seen) == 33


def test_other_settings_are_not_mixed(model, tmp_path, seven, monkeypatch):
    out = tmp_path / "out.csv"
    interrupted(model, seven, out, 3, monkeypatch, **SETTINGS)
    other = small()
    with torch.no_grad():
        other.head.bias[0] += 1
    noise(5).save(seven / "dog" / "new.png")
    with pytest.raises(ValueError, match=r"weights_sha256 .*pictures 53 \(here 54\).*paths_sha256"):
        predict(other, seven, out, resume=True, **SETTINGS)
    report = predict(other, seven, out, overwrite=True, **SETTINGS)
    assert report.complete and report.pictures == 54


def test_a_damaged_record_is_told(model, tmp_path, seven, monkeypatch):
    out = tmp_path / "out.csv"
    interrupted(model, seven, out, 3, monkeypatch, **SETTINGS)
    (tmp_path / "out.csv.parts" / "settings.json").write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        predict(model, seven, out, resume=True, **SETTINGS)


def test_a_full_disk_loses_nothing(model, tmp_path, seven, monkeypatch):
    whole, out = tmp_path / "whole.csv", tmp_path / "out.csv"
    predict(model, seven, whole, **SETTINGS)
    room = 3

    def full(handle):
        nonlocal room
        room -= 1
        if room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(parts.os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device; 3 of 6 parts are kept in .*--res"):
        predict(model, seven, out, **SETTINGS)
    assert sorted(os.listdir(tmp_path / "out.csv.parts")) == ["0", "1", "2", "settings.json"]
    room = 3  # for the other parts, but not for putting them together
    with pytest.raises(OSError, match="6 of 6 parts are kept"):
        predict(model, seven, out, resume=True, **SETTINGS)
    assert not out.exists()
    room = 99
    predict(model, seven, out, resume=True, **SETTINGS)
    assert out.read_bytes() == whole.read_bytes()


def test_shards_in_any_order(model, tmp_path, seven):
    whole, out = tmp_path / "whole.csv", tmp_path / "out.csv"
    broken(seven / "cat")
    expected = predict(model, seven, whole, **SETTINGS)
    for index in (2, 0):
        report = predict(model, seven, out, shard=(index, 3), **SETTINGS)
        assert not report.complete and not out.exists()
    assert report.parts == 7 and report.parts_done == 5
    last = predict(model, seven, out, shard=(1, 3), **SETTINGS)
    assert last.complete and last.bad == expected.bad
    assert out.read_bytes() == whole.read_bytes()
    assert predict(model, seven, out, shard=(0, 3), **SETTINGS).complete  # asked once more


KILLER = """
import os, random, signal, sys, time
import torch
torch.set_num_threads(1)  # so that forking is safe
from pathlib import Path
import natcupy
from tests.test_inference import small, SETTINGS
data, out, suffix, kills, workers = sys.argv[1:]
model = small()
out = Path(out)
options = dict(SETTINGS, workers=int(workers), part_pictures=5)

def child(resume):
    pid = os.fork()
    if pid == 0:
        try:
            natcupy.predict(model, data, out, resume=resume, **options)
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
    return pid

begun = time.perf_counter()
pid = child(False)
assert os.waitpid(pid, 0)[1] == 0
usual = time.perf_counter() - begun
whole = out.read_bytes()
record = Path(str(out) + ".run.json").read_bytes()
random.seed(int(workers))
killed = done = 0
out.unlink()
while killed < int(kills):
    pid = child(True)
    time.sleep(random.uniform(0, 1.2 * usual))
    os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    assert status in (0, 9), status
    killed += status == 9
    assert not out.exists() or out.read_bytes() == whole
    if out.exists() and not Path(str(out) + ".parts").exists():
        assert Path(str(out) + ".run.json").read_bytes() == record
        out.unlink()
        done += 1
pid = child(True)
assert os.waitpid(pid, 0)[1] == 0 and out.read_bytes() == whole
left = [p.name for p in out.parent.iterdir() if p.name.startswith(out.name)]
print("killed", killed, "finished", done, "left", sorted(left))
"""


@pytest.mark.parametrize(("suffix", "kills", "workers"), [(".csv", 20, 0), (".jsonl", 6, 1)])
def test_kill_9_at_random_moments(tmp_path, seven, suffix, kills, workers):
    broken(seven / "cat")
    out = tmp_path / f"out{suffix}"
    arguments = [str(seven), str(out), suffix, str(kills), str(workers)]
    said, wrong = tmp_path / "said", tmp_path / "wrong"
    with said.open("w") as stdout, wrong.open("w") as stderr:  # no pipes, for an orphan holds them
        done = subprocess.Popen(
            [sys.executable, "-c", KILLER, *arguments], stdout=stdout, stderr=stderr, cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True,
        )  # fmt: skip
        try:
            code = done.wait(timeout=300)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(done.pid, signal.SIGKILL)
    told = said.read_text()
    assert code == 0, wrong.read_text()
    assert told.startswith(f"killed {kills} ")
    assert told.endswith(f"left ['{out.name}', '{out.name}.run.json']\n"), told


# -- several processes ----------------------------------------------------------------------------

# One process imports once, then forks the processes of each group, with torchrun's environment.
RANKS = """
import json, os, sys, traceback
import torch
torch.set_num_threads(1)  # so that forking is safe
from dataclasses import asdict
import natcupy
from natcupy.inference import ranks
from tests.test_inference import free_port, small, SETTINGS
out, *folders = sys.argv[1:]
model = small()

def work():
    found = {}
    for data in folders:
        result = asdict(natcupy.evaluate(model, data, batch_size=4, workers=0))
        names = ("pictures", "top1", "top5", "loss", "classes", "bad")
        found[data] = [result[name] for name in names]
    natcupy.predict(model, folders[0], f"{out}/{ranks.world_size()}.csv", **SETTINGS)
    if ranks.world_rank() == 0:
        print(json.dumps(found), flush=True)
    torch.distributed.destroy_process_group()

def fork(**environment):
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        os.environ.update(environment)
        work()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)

for count in ("2", "3"):
    port = str(free_port())
    group = [
        fork(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=count, LOCAL_WORLD_SIZE=count,
             MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        for rank in range(int(count))
    ]
    for _ in group:
        assert os.wait()[1] == 0
"""


def free_port():
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_one_two_and_three_processes_count_the_same(model, tmp_path):
    """Sizes that no number of processes divides; fewer batches than processes; bad pictures."""
    data = class_folders(tmp_path / "a", {"ant": 11, "dog": 20, "gnu": 10})
    broken(data / "dog")
    few = class_folders(tmp_path / "b", {"ant": 3, "fox": 2})
    one = class_folders(tmp_path / "c", {"eel": 1})
    names = ("pictures", "top1", "top5", "loss", "classes", "bad")
    expected = {}
    for folder in (data, few, one):
        result = dataclasses.asdict(evaluate(model, folder, batch_size=4, workers=0))
        expected[str(folder)] = [result[name] for name in names]
    predict(model, data, tmp_path / "1.csv", **SETTINGS)
    done = subprocess.run(
        [sys.executable, "-c", RANKS, *map(str, (tmp_path, data, few, one))],
        capture_output=True, text=True, cwd=ROOT, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert [json.loads(line) for line in done.stdout.splitlines()] == [
        json.loads(json.dumps(expected))
    ] * 2
    for count in (2, 3):
        out = tmp_path / f"{count}.csv"
        assert out.read_bytes() == (tmp_path / "1.csv").read_bytes()
        assert json.loads((tmp_path / f"{count}.csv.run.json").read_text())["settings"]


# -- the command line -----------------------------------------------------------------------------


def test_the_functions_are_at_the_front_door():
    assert natcupy.evaluate is evaluate and natcupy.predict is predict
