"""Whole runs: finetuned, stopped, continued, and refused without losing anything."""

import errno
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from runs import LONG, ROOT, config, draw_stripes, locks_of, same, settled, step_of, tiny, weights

import natcupy
from natcupy.data import DataError, find, find_split
from natcupy.hub import Corrupt
from natcupy.train import Classification, TrainError, finetune, run
from natcupy.train.optimizer import rate

pytest.importorskip("accelerate", reason="training needs accelerate: pip install 'natcupy[train]'")


@pytest.fixture(scope="module")
def stripes(tmp_path_factory):
    return draw_stripes(tmp_path_factory.mktemp("data") / "stripes")


@pytest.fixture(scope="module")
def done(stripes, tmp_path_factory):
    """One finished run."""
    output = tmp_path_factory.mktemp("done") / "run"
    return finetune(tiny(), stripes, None, config(output, **LONG))


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
    assert result.history[0]["step"] == 1


def test_half_precision(stripes, tmp_path):
    result = finetune(
        tiny(), stripes, None, config(tmp_path / "run", epochs=1, mixed_precision="bf16")
    )
    assert next(result.model.parameters()).dtype == torch.float32
    assert np.isfinite(result.history[0]["train_loss"])


# ---------------------------------------------------------------- interrupted and continued


class StoppedError(Exception):
    pass


@pytest.fixture
def stop_at(monkeypatch):
    """Make a run stop with an exception after so many steps."""
    from natcupy.train import engine

    step = engine._Engine._step

    def arm(count):
        left = [count]

        def counted(self, batches):
            if not left[0]:
                raise StoppedError
            left[0] -= 1
            return step(self, batches)

        monkeypatch.setattr(engine._Engine, "_step", counted)

    yield arm


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_continued_anywhere(stripes, tmp_path, stop_at, one_thread):
    """Stopped before the first step, within an epoch, between two: the same bits in the end."""
    expected = finetune(tiny(), stripes, None, config(tmp_path / "whole", **LONG))
    output = tmp_path / "run"
    for steps in (0, 2, 5, 4):
        stop_at(steps)
        with pytest.raises(StoppedError):
            finetune(tiny(), stripes, None, config(output, resume=True, **LONG))
    stop_at(10**9)
    result = finetune(tiny(), stripes, None, config(output, resume=True, **LONG))
    same(weights(output), weights(tmp_path / "whole"))
    assert settled(output / "log.csv") == settled(tmp_path / "whole" / "log.csv")
    assert result.scores == expected.scores
    again = finetune(tiny(), stripes, None, config(output, resume=True, **LONG))
    assert again.scores == result.scores  # nothing left to do


def test_a_finished_run_is_extended(stripes, tmp_path, stop_at, one_thread):
    """At a constant rate to the bits of a run that was to be so long, also after a stop."""
    settings = {**LONG, "schedule": "constant", "warmup_epochs": 0}
    expected = finetune(tiny(), stripes, None, config(tmp_path / "whole", **settings))
    output = tmp_path / "run"
    finetune(tiny(), stripes, None, config(output, **{**settings, "epochs": 2}))
    settings["resume"] = True
    stop_at(2)
    with pytest.raises(StoppedError):
        finetune(tiny(), stripes, None, config(output, **settings))
    stop_at(10**9)
    for epochs in (2, 4):  # to less than planned by now, and to more before it is finished
        with pytest.raises(TrainError, match=rf"has done 2 of 3 \(epochs was 3, now {epochs}\)"):
            finetune(tiny(), stripes, None, config(output, **{**settings, "epochs": epochs}))
    result = finetune(tiny(), stripes, None, config(output, **settings))
    same(weights(output), weights(tmp_path / "whole"))
    assert settled(output / "log.csv") == settled(tmp_path / "whole" / "log.csv")
    assert result.scores == expected.scores
    assert "2, extended to 3" in (output / "model" / "README.md").read_text()


def test_an_extended_run_has_the_rates_of_a_longer_one(done, stripes, tmp_path, capsys):
    output = tmp_path / "run"
    shutil.copytree(done.folder, output)
    longer = config(output, **{**LONG, "epochs": 5}, resume=True)
    result = finetune(tiny(), stripes, None, longer)
    assert result.history[:3] == done.history
    steps = done.history[0]["step"]
    for row in result.history[3:]:
        assert row["lr"] == pytest.approx(rate(row["step"] - 1, longer, steps), rel=1e-12)
    assert result.history[3]["lr"] > done.history[2]["lr"]
    assert "3 epochs are done; extended to 5" in capsys.readouterr().err


def test_a_finished_run_says_that_nothing_is_left(done, stripes, tmp_path, capsys):
    output = tmp_path / "run"
    shutil.copytree(done.folder, output)
    result = finetune(tiny(), stripes, None, config(output, **LONG, resume=True))
    told = "the run is finished (3 of 3 epochs), nothing is left to train. More --epochs (epochs=)"
    assert told in capsys.readouterr().err and result.history == done.history
    finetune(tiny(), stripes, None, config(output, **{**LONG, "epochs": 4}, resume=True))
    finetune(tiny(), stripes, None, config(tmp_path / "other", epochs=1, resume=True))
    assert "nothing is left" not in capsys.readouterr().err


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_that_kept_no_step_begins_anew(stripes, tmp_path, stop_at, one_thread, resume):
    """Nothing of it is to be lost: other numbers reach what they reach in an empty folder."""
    output = tmp_path / "run"
    stop_at(0)
    with pytest.raises(StoppedError):
        finetune(tiny(), stripes, None, config(output, **LONG))
    stop_at(10**9)
    other = {**LONG, "lr": 1e-3, "epochs": 2, "seed": 3, "ema_decay": 0.0}
    finetune(tiny(), stripes, None, config(output, **other, resume=resume))
    finetune(tiny(), stripes, None, config(tmp_path / "whole", **other))
    same(weights(output), weights(tmp_path / "whole"))
    assert settled(output / "log.csv") == settled(tmp_path / "whole" / "log.csv")
    records = [json.loads((each / run.RUN).read_text()) for each in (output, tmp_path / "whole")]
    assert records[0] == records[1]
    assert not (output / "checkpoint" / "average.safetensors").exists()


def test_a_run_that_kept_a_step_is_not_begun_anew(stripes, tmp_path, stop_at):
    output = tmp_path / "run"
    stop_at(4)
    with pytest.raises(StoppedError):
        finetune(tiny(), stripes, None, config(output, **LONG))
    with pytest.raises(TrainError, match="holds a run already"):
        finetune(tiny(), stripes, None, config(output, **LONG))
    with pytest.raises(TrainError, match=r"differs in lr \(was 0.005, now 0.1\)"):
        finetune(tiny(), stripes, None, config(output, **{**LONG, "lr": 0.1}, resume=True))
    assert step_of(output / "checkpoint" / "state.json") == 3


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


def test_a_full_disk(stripes, tmp_path, stop_at, one_thread):
    """A checkpoint that does not fit is reported; the run goes on from the one before."""
    output, settings = tmp_path / "run", {**LONG, "epochs": 1}
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    stop_at(2)
    with pytest.raises(StoppedError):
        finetune(tiny(), stripes, None, config(output, **settings))
    stop_at(10**9)
    before = {path.name: path.read_bytes() for path in (output / "checkpoint").iterdir()}
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit[1]))  # a file may grow no more
        with pytest.raises(TrainError, match=r"step 3 cannot be written.*one before is whole"):
            finetune(tiny(), stripes, None, config(output, resume=True, **settings))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert before == {path.name: path.read_bytes() for path in (output / "checkpoint").iterdir()}
    finetune(tiny(), stripes, None, config(output, resume=True, **settings))
    finetune(tiny(), stripes, None, config(tmp_path / "whole", **settings))
    same(weights(output), weights(tmp_path / "whole"))


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


# ---------------------------------------------------------------- two at once


HOLDER = """
import sys
from pathlib import Path
from runs import locks_of
locks_of(sys.argv[2], setattr)
from natcupy.train.run import Hold
with Hold() as hold:
    hold.take(Path(sys.argv[1]))
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.skipif(os.name == "nt", reason="both kinds of lock are made of those of Unix")
@pytest.mark.parametrize("system", ["unix", "windows"])
def test_a_run_that_another_process_trains(stripes, tmp_path, monkeypatch, system):
    """The second is told who is at work, changes nothing, and may begin once that one is killed."""
    output = tmp_path / "run"
    output.mkdir()
    locks_of(system, monkeypatch.setattr)
    command = [sys.executable, "-c", HOLDER, str(output), system]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT / "tests", **pipes) as other:
        assert other.stdout.readline() == b"held\n"
        told = rf"process {other.pid} of .*, trains in .*run\. Wait for its end.*--resume"
        with pytest.raises(TrainError, match=told):
            finetune(tiny(), stripes, None, config(output, epochs=1))
        assert [path.name for path in output.iterdir()] == [run.RUNNING]
        other.kill()
    finetune(tiny(), stripes, None, config(output, epochs=1))
    assert not (output / run.RUNNING).exists() and (output / "model").is_dir()


@pytest.mark.skipif(os.name == "nt", reason="the lock of Unix")
def test_a_run_without_steps_that_another_process_trains(stripes, tmp_path, stop_at):
    """It is not begun anew under that process's feet."""
    output = tmp_path / "run"
    stop_at(0)
    with pytest.raises(StoppedError):
        finetune(tiny(), stripes, None, config(output, epochs=1))
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    command = [sys.executable, "-c", HOLDER, str(output), "unix"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT / "tests", **pipes) as other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(TrainError, match=rf"process {other.pid} of .*trains in"):
            finetune(tiny(), stripes, None, config(output, epochs=2))
        assert before == {path: path.read_bytes() for path in before}
        other.kill()


def test_a_run_that_takes_its_first_steps_meanwhile(done, stripes, tmp_path, stop_at, monkeypatch):
    """Whether there is something to lose is asked again once the folder is held."""
    output = tmp_path / "run"
    stop_at(0)
    with pytest.raises(StoppedError):
        finetune(tiny(), stripes, None, config(output, **LONG))
    take = run.Hold.take

    def late(self, folder):
        shutil.copytree(done.folder / "checkpoint", folder / "checkpoint", dirs_exist_ok=True)
        take(self, folder)

    monkeypatch.setattr(run.Hold, "take", late)
    with pytest.raises(TrainError, match="holds a run already"):
        finetune(tiny(), stripes, None, config(output, **LONG))
    kept = output / "checkpoint" / "state.json"
    assert kept.read_bytes() == (done.folder / "checkpoint" / "state.json").read_bytes()
    assert not (output / run.RUNNING).exists()


def test_a_log_that_nobody_can_read_ends_no_run(monkeypatch):
    class Gone:
        def write(self, text):
            raise OSError(errno.EIO, "Input/output error")

    bar = run.Bar(config("somewhere"), 0, 1, shown=False)
    monkeypatch.setattr(sys, "stderr", Gone())
    bar.say("epoch 1")
