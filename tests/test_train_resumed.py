"""Runs that were stopped or finished: continued, extended, begun anew, or held by a process."""

import copy
import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from runs import LONG, ROOT, config, locks_of, same, settled, step_of, tiny, weights

from natcupy.data import Subset, find
from natcupy.train import TrainError, finetune, run
from natcupy.train.optimizer import rate
from tests.pictures import noise

pytest.importorskip("accelerate", reason="training needs accelerate: pip install 'natcupy[train]'")


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


# ---------------------------------------------------------------- with other pictures, other shares


def test_other_pictures_are_refused(stripes, tmp_path, stop_at):
    """Also where there are as many, of classes called the same; a folder may be moved."""
    data, output = tmp_path / "data", tmp_path / "run"
    shutil.copytree(stripes, data)
    stop_at(4)
    with pytest.raises(StoppedError):
        finetune(tiny(), data, None, config(output, **LONG))
    stop_at(10**9)
    label = data / "down" / "07.png"
    label.rename(data / "down" / "other.png")
    with pytest.raises(TrainError, match=r"differs in names and labels of the pictures \(was '"):
        finetune(tiny(), data, None, config(output, resume=True, **LONG))
    (data / "down" / "other.png").rename(label)
    assert finetune(tiny(), data.rename(tmp_path / "b"), None, config(output, resume=True, **LONG))


def test_another_dataset_of_equal_labels_is_refused(tmp_path):
    """Rows have numbers alone; their pictures tell them apart, stored within or beside."""
    datasets = pytest.importorskip("datasets", reason="reading datasets needs `datasets`")

    def rows(seed, beside=None):
        drawn = [noise(seed + index) for index in range(24)]
        if beside:
            beside.mkdir()
            for index, picture in enumerate(drawn):
                picture.save(beside / f"{index}.png")
            drawn = [str(beside / f"{index}.png") for index in range(24)]
        values = {"image": drawn, "label": [index % 2 for index in range(24)]}
        kinds = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])}
        return datasets.Dataset.from_dict(values, features=datasets.Features(kinds))

    for first, again, other in (
        (rows(0), rows(0), rows(50)),
        (rows(0, tmp_path / "a"), rows(0, tmp_path / "b"), rows(50, tmp_path / "c")),
    ):
        settings = {"epochs": 1, "resume": True}
        output = tmp_path / f"run {len(os.listdir(tmp_path))}"
        finetune(tiny(), first, None, config(output, **settings))
        finetune(tiny(), again, None, config(output, **settings))
        with pytest.raises(TrainError, match="differs in names and labels of the pictures"):
            finetune(tiny(), other, None, config(output, **settings))


def test_labels_and_held_out_pictures_are_looked_at(stripes, tmp_path):
    """Two pictures that swap their labels; another one held out."""
    split = find(stripes)
    settings = {"epochs": 1, "resume": True}
    finetune(tiny(), split.train, split.val, config(tmp_path / "run", **settings))
    swapped = copy.copy(split.train)
    swapped.labels = swapped.labels[::-1].copy()
    for train, val in ((swapped, split.val), (split.train, Subset(split.val, [0, 1, 2, 3, 4, 4]))):
        with pytest.raises(TrainError, match="differs in names and labels of the pictures"):
            finetune(tiny(), train, val, config(tmp_path / "run", **settings))


def test_a_run_that_kept_no_names_of_pictures_goes_on(done, stripes, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(done.folder, output)
    record = json.loads((output / run.RUN).read_text())
    del record["facts"]["names and labels of the pictures"]
    (output / run.RUN).write_text(json.dumps(record))
    result = finetune(tiny(), stripes, None, config(output, **LONG, resume=True))
    assert result.history == done.history


def test_a_step_may_be_shared_otherwise(stripes, tmp_path, stop_at, one_thread):
    """On another number of processes too, as long as a step sees equally many pictures."""
    plain = {"epochs": 2, "checkpoint_steps": 1, "drop_path": 0.0}
    whole, output = tmp_path / "whole", tmp_path / "run"
    expected = finetune(tiny(), stripes, None, config(whole, batch_size=8, **plain))
    stop_at(3)
    with pytest.raises(StoppedError):
        finetune(tiny(), stripes, None, config(output, batch_size=8, **plain))
    stop_at(10**9)
    with pytest.raises(TrainError, match=r"took 8 items a step .* it would be 4 .*Change the num"):
        finetune(tiny(), stripes, None, config(output, batch_size=4, resume=True, **plain))
    shares = {"batch_size": 4, "accumulate": 2}
    result = finetune(tiny(), stripes, None, config(output, **shares, resume=True, **plain))
    assert len(result.history) == len(expected.history) == 2
    for row, other in zip(result.history, expected.history, strict=True):
        assert row["step"] == other["step"] and row["lr"] == other["lr"]
        assert row["train_loss"] == pytest.approx(other["train_loss"], rel=1e-4)
    for name, tensor in weights(whole).items():
        torch.testing.assert_close(weights(output)[name], tensor, rtol=1e-3, atol=1e-4)


def test_logs_that_could_not_be_written_are_later(stripes, tmp_path, monkeypatch):
    """Those of the last epoch, too, after which there is nothing left to train."""
    output, write = tmp_path / "run", run.write_logs

    def fail_at_the_end(folder, rows, made):
        if len(rows) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(folder, rows, made)

    with monkeypatch.context() as patch:
        patch.setattr(run, "write_logs", fail_at_the_end)
        with pytest.raises(OSError, match="No space left"):
            finetune(tiny(), stripes, None, config(output))
    assert len(settled(output / "log.csv")) == 1
    result = finetune(tiny(), stripes, None, config(output, resume=True))
    assert len(settled(output / "log.csv")) == 2
    assert json.loads((output / "log.json").read_text())["epochs"] == result.history
    before = (output / "log.json").stat().st_mtime_ns
    finetune(tiny(), stripes, None, config(output, resume=True))
    assert (output / "log.json").stat().st_mtime_ns == before  # nothing was missing


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
