"""evaluate: right counts, however it runs; the classes of a dataset and of a model."""

import io
import os

import numpy as np
import pytest
import torch

import natcupy
from natcupy.data import DataError, find_split
from natcupy.inference import evaluate, predict
from natcupy.inference.classes import match
from natcupy.inference.evaluation import LOSS_UNIT
from tests.hub.small import invented
from tests.inference.cases import LABELS, small
from tests.pictures import broken, class_folders, noise


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


@pytest.mark.parametrize(
    ("names", "labels", "count", "expected"),
    [
        (["dog", "Ant"], LABELS, 7, [3, 0]),
        (["honey-bee", "bee"][:1], LABELS, 7, [1]),
        (["tench"], ["tench, Tinca tinca", "crane", "crane"], 3, [0]),
        (["10", "2"], None, 11, [10, 2]),
        (["0", "1", "10", "2"], ["zero", "one", "two", *"abcdefgh"], 11, [0, 1, 10, 2]),
        (["00", "02"], ["cat", "dog", "eel"], 3, [0, 2]),
        (["1", "2"], ["cat", "dog"], 2, [0, 1]),  # no numbers of classes: there is no 2
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


def test_classes_without_pictures_need_no_match(tmp_path):
    assert match(["none", "dog", "n/a", "ant"], LABELS, 7, None, [0, 2])[0] == [-1, 3, -1, 0]
    assert match(["x", "y", "z"], ["cat", "dog", "eel"], 3, None, [1])[0] == [0, -1, 2]
    (tmp_path / "map").write_text("y\tdog\n")
    assert match(["x", "y"], LABELS, 7, tmp_path / "map", [0])[0] == [-1, 3]


def test_a_source_with_a_class_without_pictures(model, seven):
    source = find_split(seven).source
    usual = evaluate(model, source, workers=0)
    source.classes = (*source.classes, "nothing of the model's")
    found = evaluate(model, source, workers=0)
    assert (found.top1, found.top5, found.loss) == (usual.top1, usual.top5, usual.loss)
    assert found.classes[:-1] == usual.classes and found.classes[-1].pictures == 0


def test_names_with_commas_in_a_class_map(tmp_path):
    (tmp_path / "map").write_text("cat, tabby\tcat\ndog,dog\nbee\tbee, honey bee\n")
    assert match(["cat, tabby", "dog", "bee"], LABELS, 7, tmp_path / "map")[0] == [2, 3, 1]


def test_a_dataset_in_memory(model):
    datasets = pytest.importorskip("datasets")
    kinds = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["dog", "ant"])}
    rows = {"image": [noise(i) for i in range(6)], "label": [0, 1] * 3}
    table = datasets.Dataset.from_dict(rows, features=datasets.Features(kinds))
    parts = datasets.DatasetDict(train=table, test=table.select([0, 1]))
    assert evaluate(model, parts, split="train", workers=0).pictures == 6
    assert [c.name for c in evaluate(model, parts["test"], workers=0).classes] == ["dog", "ant"]


def test_damaged_exif_stops_no_evaluation(model, seven):
    usual = evaluate(model, seven, workers=0)
    file = io.BytesIO()
    noise(7).save(file, "JPEG")
    block = b"Exif\0\0garbage garbage garbage"
    head = b"\xff\xd8\xff\xe1" + (len(block) + 2).to_bytes(2, "big") + block
    (seven / "dog" / "odd.jpg").write_bytes(head + file.getvalue()[2:])
    found = evaluate(model, seven, workers=0)
    assert found.bad == () and found.pictures == usual.pictures + 1


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


def test_the_functions_are_at_the_front_door():
    assert natcupy.evaluate is evaluate and natcupy.predict is predict
