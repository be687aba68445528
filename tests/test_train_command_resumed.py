"""`natcupy finetune --resume RUN`: what a run began with needs no second typing, and is heeded."""

import json
import os
import shutil

import pytest
from runs import config, same, settled, tiny, weights

from natcupy.cli import main
from natcupy.cli.finetune_resume import command_of, completed
from natcupy.cli.parser import build_parser
from natcupy.train import finetune
from natcupy.train.run import RUN

pytest.importorskip("accelerate", reason="training needs accelerate: pip install 'natcupy[train]'")

NUMBERS = ["--epochs", "2", "--workers", "0", "--lr", "1e-3", "--batch-size", "16", "--seed", "3",
           "--val-fraction", "0.25", "--kernel-size", "5", "--checkpoint-steps", "1"]  # fmt: skip


def stop_at(monkeypatch, count):
    """Make a run stop as by Ctrl-C after so many steps."""
    from natcupy.train import engine

    step, left = engine._Engine._step, [count]

    def counted(self, batches):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return step(self, batches)

    monkeypatch.setattr(engine._Engine, "_step", counted)


@pytest.fixture
def begun(stripes, tmp_path, monkeypatch):
    """The command that began a run, and its folder; the run was stopped after three steps."""
    monkeypatch.chdir(stripes.parent)
    monkeypatch.setattr("torch.get_num_threads", lambda: 1)
    words = ["finetune", stripes.name, "--model", "nat-digits", *NUMBERS]
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        assert main([*words, "--output", str(tmp_path / "run")]) == 130
    return words, tmp_path / "run"


def facts(folder):
    return json.loads((folder / RUN).read_text())


@pytest.mark.parametrize("way", [["--resume", "run"], ["--output", "run", "--resume"]])
def test_a_run_goes_on_as_it_began(begun, tmp_path, monkeypatch, capsys, caplog, way):
    """Without a word more, from another folder, to what it would have reached; it is one line."""
    words, run = begun
    assert main([*words, "--output", str(tmp_path / "whole")]) == 0
    caplog.clear()
    monkeypatch.chdir(tmp_path)
    assert main(["finetune", *way]) == 0
    assert settled(run / "log.csv") == settled(tmp_path / "whole" / "log.csv")
    same(weights(run), weights(tmp_path / "whole"))
    assert "classifier" not in caplog.text  # the checkpoint has it


def test_a_finished_run_is_not_extended_unasked(begun, tmp_path, monkeypatch, capsys):
    """More epochs are taken, also by a stop within them; fewer are refused."""
    _, run = begun
    way = ["finetune", "--resume", str(run)]
    assert main(way) == main(way) == 0 and len(settled(run / "log.csv")) == 2
    assert "the run is finished (2 of 2 epochs)" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        stop_at(patch, 1)
        assert main([*way, "--epochs", "4"]) == 130
    assert main(way) == 0 and len(settled(run / "log.csv")) == 4
    assert main([*way, "--epochs", "3"]) == 1
    told = capsys.readouterr().err
    assert "epochs can only grow" in told and "Flags: --epochs." in told


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--lr", "1e-2"], r"differs in lr (was 0.001, now 0.01)"),
        (["--kernel-size", "3"], "differs in model"),
        (["--val-fraction", "0.5"], "differs in training items (was 36, now 24)"),
        (["--recipe", "nat-in1k"], "--recipe must be 'finetune', which"),
        (["--epochs", "1"], "epochs can only grow"),
        (["--epochs", "9"], "once a run is finished"),
    ],
)
def test_what_differs_is_refused(begun, capsys, words, told):
    _, run = begun
    before = (run / RUN).read_bytes()
    assert main(["finetune", "--resume", str(run), *words]) == 1
    assert told in capsys.readouterr().err
    assert (run / RUN).read_bytes() == before


def test_a_run_that_kept_no_step_may_have_another_recipe(stripes, tmp_path, monkeypatch):
    words = ["finetune", str(stripes), "--model", "nat-digits", "--epochs", "3", "--workers", "0"]
    with monkeypatch.context() as patch:
        stop_at(patch, 0)
        assert main([*words, "--output", str(tmp_path / "run")]) == 130
    way = ["finetune", "--resume", "--output", str(tmp_path / "run")]

    def full(*more):
        return completed(build_parser().parse_args([*way, *more]))

    assert (full().epochs, full().recipe) == (3, "finetune")
    other = full("--recipe", "nat-in1k")
    assert (other.epochs, other.recipe, other.model) == (None, "nat-in1k", "nat-digits")


def test_pictures_that_were_moved_are_named_once(begun, stripes, tmp_path, capsys):
    _, run = begun
    moved = shutil.copytree(stripes, tmp_path / "moved")
    record = facts(run)
    record["command"]["data"] = str(tmp_path / "gone")
    (run / RUN).write_text(json.dumps(record))
    assert main(["finetune", "--resume", str(run)]) == 1
    assert "gone" in capsys.readouterr().err
    assert main(["finetune", str(moved), "--output", str(run), "--resume"]) == 0
    after = facts(run)
    assert after.pop("command") == {**record.pop("command"), "data": str(moved)}
    assert after == record
    assert main(["finetune", "--resume", str(run)]) == 0


def test_a_run_that_python_began_needs_the_words(done, tmp_path, capsys):
    run = shutil.copytree(done.folder, tmp_path / "run")
    assert main(["finetune", "--resume", str(run)]) == 2
    assert "does not say all that it was begun with" in capsys.readouterr().err
    full = completed(build_parser().parse_args(
        ["finetune", "D", "--model", "m", "--output", str(run), "--resume", "--lr", "2e-3"]
    ))  # fmt: skip
    assert (full.epochs, full.accumulate, full.recipe, full.lr) == (3, 2, "", 2e-3)


def test_python_goes_on_with_a_run_of_the_command(begun, stripes):
    """What the command line said stays in the record."""
    _, run = begun
    before = facts(run)
    with pytest.raises(RuntimeError, match="differs in"):
        finetune(tiny(), stripes, None, config(run, resume=True))
    assert facts(run) == before


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "got no DATA, --model, --output. A run that was begun goes on with: natcupy finetune"),
        (["D"], "got no --model, --output."),
        (["D", "--model", "m"], "got no --output."),
        (["--model", "m", "--output", "o"], "got no DATA."),
        (["--resume"], "--resume alone needs the folder of a run, got none"),
        (["--resume", "D"], "got D, which holds none. Check the path; or name --model, --output"),
        (["--resume", "--output", "o"], "got o, which holds none. Check the path; or name DATA,"),
    ],
)
def test_what_must_be_named(tmp_path, monkeypatch, capsys, words, told):
    monkeypatch.chdir(tmp_path)
    assert main(["finetune", *words]) == 2
    said = capsys.readouterr().err
    assert said.startswith("usage: natcupy finetune") and told in said


def test_another_files_record_is_refused(tmp_path, capsys):
    record = {"natcupy run": 1, "config": {}, "facts": {}}
    others = ({}, [], {**record, "config": 3}, {**record, "command": {"data": []}})
    for text in ("no", *map(json.dumps, others)):
        (tmp_path / RUN).write_text(text)
        assert main(["finetune", "--resume", str(tmp_path)]) == 1
        assert "is not the record of a run" in capsys.readouterr().err


def test_paths_of_a_command_hold_from_any_folder(tmp_path, monkeypatch):
    """Names of models and of parts stay names, whatever is called so here."""
    monkeypatch.chdir(tmp_path)
    for name in ("d", "nat-tiny", "mine", "test", "more/val"):
        os.makedirs(name)
    (tmp_path / "val.json").touch()

    def said(*words):
        typed = ["finetune", "--output", "o", *words]
        return command_of(completed(build_parser().parse_args(typed)))

    told = said("d", "--model", "nat-tiny", "--val", "test", "--backbone", "mine")
    assert told["data"] == str(tmp_path / "d") and told["backbone"] == str(tmp_path / "mine")
    assert (told["model"], told["val"], told["val_fraction"]) == ("nat-tiny", "test", 0.1)
    told = said("me/pictures", "--model", "./nat-tiny", "--val", "more/val")
    assert (told["data"], told["model"]) == ("me/pictures", str(tmp_path / "nat-tiny"))
    assert told["val"] == str(tmp_path / "more/val")
    told = said("d", "--task", "detection", "--model", "me/m", "--val", "val.json")
    assert (told["model"], told["val"]) == ("me/m", str(tmp_path / "val.json"))
