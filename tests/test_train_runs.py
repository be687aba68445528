"""Whole runs: finetuned, and refused without losing anything."""

import errno
import json
import math
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from runs import LONG, config, draw_stripes, same, settled, step_of, tiny

import natcupy
from natcupy.data import DataError, find, find_split
from natcupy.hub import Corrupt
from natcupy.train import Classification, TrainError, finetune, run

pytest.importorskip("accelerate", reason="training needs accelerate: pip install 'natcupy[train]'")


# ---------------------------------------------------------------- a run


def test_a_run_leaves_everything(done, stripes):
    """Folder, logs, plots, card; the model loads and knows names and pictures."""
    rows = settled(done.folder / "log.csv")
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert json.loads((done.folder / "log.json").read_text())["epochs"] == done.history
    for name in ("curves.png", "confusion.png"):
        with Image.open(done.folder / name) as picture:
            assert picture.format == "PNG" and picture.width > 300
    model = natcupy.from_pretrained(done.folder / "model")
    assert model.pretrained_cfg["label_names"] == ["across", "down", "slanted"]
    assert model.pretrained_cfg["input_size"] == (3, 16, 16)
    same(dict(model.state_dict()), dict(done.model.state_dict()))
    picture = stripes / "down" / "00.png"
    assert torch.equal(model(model.preprocess(picture)), done.model(model.preprocess(picture)))
    card = (done.folder / "model" / "README.md").read_text()
    told = ("## Training", "42 to train on, 6 held out", "AdamW, learning rate 0.005", "accuracy")
    for words in (*told, f"natcupy {natcupy.__version__}", "3 classes"):
        assert words in card, words
    least = 1e5 if torch.cuda.is_available() else 1e7  # of tensors on a GPU, or of the process
    assert done.peak_bytes > least and done.seconds > 0


def test_scores_are_those_of_the_kept_model(done, stripes):
    """The accuracy reported is that of the saved model on the held-out pictures, counted anew."""
    val = find(stripes).val
    model = natcupy.from_pretrained(done.folder / "model")
    counts = np.zeros((3, 3), dtype=int)
    with torch.no_grad():
        for index in range(len(val)):
            answer = model(model.preprocess(val.open(index))).argmax().item()
            counts[val.label(index), answer] += 1
    assert np.array_equal(done.confusion, counts)
    assert done.scores["val_accuracy"] == counts.trace() / counts.sum()
    assert done.scores["val_accuracy"] == max(row["val_accuracy"] for row in done.history)


def test_of_equally_good_epochs_the_lower_loss_is_kept(stripes, tmp_path, monkeypatch):
    losses = iter((0.9, 0.3, 0.5, 0.3))  # of three epochs, and of the weights that were kept

    def score(self, found):
        return {"val_loss": next(losses), "val_accuracy": 0.5}

    monkeypatch.setattr(Classification, "score", score)
    result = finetune(tiny(), stripes, None, config(tmp_path / "run", epochs=3))
    assert result.epoch == 2 and result.scores["val_loss"] == 0.3


def test_it_learns(stripes, tmp_path):
    """Fresh weights learn the direction of stripes."""
    settings = {"epochs": 12, "flip": 0.0, "crop_scale": (0.7, 1), "lr": 1e-2}
    result = finetune(tiny(), stripes, None, config(tmp_path / "run", **settings))
    assert result.history[0]["train_accuracy"] < 0.6 < 0.8 < result.history[-1]["train_accuracy"]


def test_what_the_caller_has_stays(stripes, tmp_path):
    """No generator of the caller's is touched; last weights without held-out pictures."""
    model, train = tiny(), find(stripes, val_fraction=0).train
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    result = finetune(model, train, None, config(tmp_path / "run", epochs=1))
    assert torch.equal(torch.rand(3), expected)
    assert result.scores == {} and result.confusion is None and result.epoch == 1
    assert "val_loss" not in result.history[0]


def test_memory_switches_do_not_change_the_result(stripes, tmp_path):
    plain = finetune(tiny(), stripes, None, config(tmp_path / "a", epochs=1))
    other = finetune(
        tiny(), stripes, None,
        config(tmp_path / "b", epochs=1, grad_checkpointing=True, channels_last=False, workers=2),
    )  # fmt: skip
    for name, tensor in plain.model.state_dict().items():
        torch.testing.assert_close(other.model.state_dict()[name], tensor, rtol=1e-3, atol=1e-5)


def test_few_pictures_are_said_to_make_batches_smaller(tmp_path, capsys):
    data = draw_stripes(tmp_path / "data")
    for picture in data.glob("*/*[!01].png"):
        picture.unlink()
    result = finetune(tiny(), data, None, config(tmp_path / "run", epochs=1, batch_size=32))
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "9 items make batches of 9, not 32"
    assert said[1].startswith("the run is 1 step, few to learn from: a smaller batch size (")
    assert result.history[0]["step"] == 1
    finetune(tiny(), data, None, config(tmp_path / "run", epochs=3, batch_size=32, resume=True))
    assert "few to learn from" not in capsys.readouterr().err  # a run that goes on has been told
    finetune(tiny(), data, None, config(tmp_path / "more", epochs=6, batch_size=1))
    assert "few to learn from" not in capsys.readouterr().err  # 54 steps


def test_half_precision(stripes, tmp_path):
    result = finetune(
        tiny(), stripes, None, config(tmp_path / "run", epochs=1, mixed_precision="bf16")
    )
    assert next(result.model.parameters()).dtype == torch.float32
    assert np.isfinite(result.history[0]["train_loss"])


# ---------------------------------------------------------------- refused, nothing lost


def test_a_folder_in_use(done, stripes, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in done.folder.rglob("*")}
    with pytest.raises(TrainError, match=r"holds a run already\. Continue it with --resume"):
        finetune(tiny(), stripes, None, config(done.folder, **LONG))
    with pytest.raises(TrainError, match=r"differs in lr \(was 0.005, now 0.1\)"):
        finetune(tiny(), stripes, None, config(done.folder, **{**LONG, "lr": 0.1}, resume=True))
    assert before == {path: path.stat().st_mtime_ns for path in done.folder.rglob("*")}
    (tmp_path / "thesis.txt").write_text("years")
    with pytest.raises(TrainError, match="holds files that are not of a run"):
        finetune(tiny(), stripes, None, config(tmp_path))
    with pytest.raises(TrainError, match="cannot be made"):
        finetune(tiny(), stripes, None, config(tmp_path / "thesis.txt" / "run"))


@pytest.mark.parametrize("left", ["log.csv", "model", "a damaged checkpoint"])
def test_what_a_run_left_without_its_checkpoint_stays(done, stripes, tmp_path, left):
    output = tmp_path / "run"
    output.mkdir()
    shutil.copy(done.folder / run.RUN, output)
    if left == "a damaged checkpoint":
        (output / "checkpoint").mkdir()
        (output / "checkpoint" / "state.json").write_text("{")
    elif left == "model":
        shutil.copytree(done.folder / left, output / left)
    else:
        shutil.copy(done.folder / left, output)
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    with pytest.raises(TrainError, match="holds a run already"):
        finetune(tiny(), stripes, None, config(output, **LONG))
    assert before == {path: path.stat().st_mtime_ns for path in output.rglob("*")}


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root writes anywhere")
def test_an_output_that_cannot_be_written(stripes, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(TrainError, match="cannot be made: Permission denied"):
        finetune(tiny(), stripes, None, config(tmp_path / "run"))


def test_an_output_that_refuses_files(stripes, tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "write_bytes", denied)
    with pytest.raises(TrainError, match="cannot be written to: Read-only file system"):
        finetune(tiny(), stripes, None, config(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def denied(self, data):
    raise OSError(errno.EROFS, "Read-only file system")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_corrupt_picture(stripes, tmp_path, workers):
    """The run stops, names the file, and goes on from its checkpoint once it is repaired."""
    data = tmp_path / "data"
    shutil.copytree(stripes, data)
    bad = find(data).train.where(5)
    good = Path(bad).read_bytes()
    Path(bad).write_bytes(good[: len(good) // 2])
    settings = {"epochs": 1, "workers": workers, "batch_size": 4, "checkpoint_steps": 1}
    with pytest.raises(DataError) as error:
        finetune(tiny(), data, None, config(tmp_path / "run", **settings))
    assert str(error.value).startswith(bad) and "\n" not in str(error.value)
    Path(bad).write_bytes(good)
    result = finetune(tiny(), data, None, config(tmp_path / "run", **settings, resume=True))
    expected = finetune(tiny(), data, None, config(tmp_path / "whole", **settings))
    same(dict(result.model.state_dict()), dict(expected.model.state_dict()))


def test_data_that_cannot_be_trained_on(stripes, tmp_path):
    output = tmp_path / "run"

    def refused(match, val=None):
        with pytest.raises(DataError, match=match):
            finetune(tiny(), tmp_path / "data", val, config(output))
        assert not output.exists()

    shutil.copytree(stripes / "down", tmp_path / "data" / "down")
    refused("at least two classes, got 1")
    (tmp_path / "data" / "empty").mkdir()
    refused("every class folder must hold a picture.*: empty")
    (tmp_path / "data" / "empty").rmdir()
    shutil.copytree(stripes / "across", tmp_path / "data" / "across")
    shutil.copytree(stripes, tmp_path / "val")
    refused(r"among the 2 classes.*slanted \(16\)", tmp_path / "val")


def test_weights_that_are_not_float32(stripes, tmp_path):
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        with pytest.raises(TrainError, match=rf"got weights in {dtype}\. Train model\.float\(\)"):
            finetune(tiny().to(dtype), stripes, None, config(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_held_out_classes_are_matched_by_name(stripes, tmp_path):
    """However both come: fewer classes count as they are called, others are refused."""
    for part, names in (("val", ("down", "slanted")), ("more", ("across", "zigzag"))):
        for name in names:
            real = stripes / (name if name != "zigzag" else "down")
            shutil.copytree(real, tmp_path / part / name)
    train, val = find(stripes, val_fraction=0).train, find_split(tmp_path / "val").source
    settings = {"epochs": 1, "keep": "last"}
    scores = []
    for number, (one, other) in enumerate(
        ((train, val), (train, tmp_path / "val"), (stripes, val), (stripes, tmp_path / "val"))
    ):
        result = finetune(tiny(), one, other, config(tmp_path / f"{number}", **settings))
        assert result.confusion.sum(1).tolist() == [0, 16, 16]
        scores.append(result.scores)
    assert all(each == scores[0] for each in scores)
    for data in (find_split(tmp_path / "more").source, tmp_path / "more"):
        with pytest.raises(DataError, match=r"among the 3 classes.*zigzag \(16\)"):
            finetune(tiny(), train, data, config(tmp_path / "refused"))
    assert not (tmp_path / "refused").exists()


def test_a_score_that_is_none(stripes, tmp_path, monkeypatch, capsys):
    """No epoch is lost to it, none is best by it, and the run may be continued."""
    values = iter((0.5, math.nan, 0.4, math.nan, 0.3))  # three epochs, the kept one twice

    def score(self, found):
        return {"val_loss": 1.0, "val_accuracy": next(values)}

    monkeypatch.setattr(Classification, "score", score)
    settings = {"epochs": 3, "keep": "best"}
    result = finetune(tiny(), stripes, None, config(tmp_path / "run", **settings))
    assert result.epoch == 1 and len(result.history) == 3 and result.scores == {}
    assert "val_loss" not in result.history[1] and (result.folder / "model").is_dir()
    told = "scores must be finite, got val_accuracy nan: this examination does not count"
    assert capsys.readouterr().err.count(told) == 2
    again = finetune(tiny(), stripes, None, config(tmp_path / "run", resume=True, **settings))
    assert again.scores == {"val_loss": 1.0, "val_accuracy": 0.3}


def test_a_loss_that_is_none(stripes, tmp_path):
    """The last checkpoint stays, and the weights in it are finite."""
    model = tiny()
    with torch.no_grad():
        model.head.weight.fill_(float("nan"))
    with pytest.raises(TrainError, match=r"the loss must be finite.*Lower lr"):
        finetune(model, stripes, None, config(tmp_path / "run", head="keep", epochs=1))
    assert step_of(tmp_path / "run" / "checkpoint" / "state.json") == 0


def test_a_damaged_checkpoint(stripes, tmp_path):
    output = tmp_path / "run"
    finetune(tiny(), stripes, None, config(output, epochs=1))
    state = output / "checkpoint" / "state.json"
    state.write_text(state.read_text().replace('"step": 7', '"step": 6'))
    with pytest.raises(Corrupt, match="must be of step 6, it is of 7"):
        finetune(tiny(), stripes, None, config(output, epochs=1, resume=True))
    state.write_text("{")
    with pytest.raises(Corrupt, match="not the state of a run"):
        finetune(tiny(), stripes, None, config(output, epochs=1, resume=True))


def test_precisions_that_need_a_gpu(stripes, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    for changes, match in (({"mixed_precision": "fp16"}, "needs a GPU"), ({"fsdp": True}, "GPUs")):
        with pytest.raises(TrainError, match=match):
            finetune(tiny(), stripes, None, config(tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_a_log_that_nobody_can_read_ends_no_run(monkeypatch):
    class Gone:
        def write(self, text):
            raise OSError(errno.EIO, "Input/output error")

    bar = run.Bar(config("somewhere"), 0, 1, shown=False)
    monkeypatch.setattr(sys, "stderr", Gone())
    bar.say("epoch 1")
