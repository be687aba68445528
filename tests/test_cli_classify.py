"""`natcupy classify`, `natcupy demo` and `natcupy train-digits`: answers, refusals, exit status."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from cli_runs import one_error_line
from PIL import Image

import natcupy
from natcupy.cli import demo

ROOT = Path(__file__).parent.parent


# -- classify -------------------------------------------------------------------------------------


def test_classify_prints_a_table(run, digits):
    status, out, err = run("classify", digits / "a.png")
    lines = out.splitlines()
    assert (status, err) == (0, "")
    assert lines[0].split() == ["file", "answer", "confidence", "next"]
    assert lines[2].split()[:2] == [str(digits / "a.png"), "4"]
    assert "nat-digits is the default" in out and "backend" in out


def test_classify_takes_folders_and_gives_json(run, digits):
    more = ("--topk", "3", "--batch-size", "2", "--device", "cpu")
    status, out, err = run("classify", digits, "--json", *more)
    found = json.loads(out)
    assert (status, err, found["model"], found["device"]) == (0, "", "nat-digits", "cpu")
    names = [Path(result["file"]).name for result in found["results"]]
    assert names == ["a.png", "b.jpg", "c.PNG"]
    for result, label in zip(found["results"], "472", strict=True):
        chances = [answer["probability"] for answer in result["answers"]]
        assert result["answers"][0]["label"] == label == str(result["answers"][0]["index"])
        assert len(chances) == 3 and chances == sorted(chances, reverse=True)
        assert 0 < sum(chances) <= 1 and result["seconds"] > 0


def test_all_classes_sum_to_one(run, digits):
    _, out, _ = run("classify", digits / "a.png", "--json", "--topk", "99")
    answers = json.loads(out)["results"][0]["answers"]
    assert len(answers) == 10
    assert abs(sum(answer["probability"] for answer in answers) - 1) < 1e-5


def test_bad_files_are_named_and_the_others_answered(run, digits, tmp_path):
    (tmp_path / "empty.png").touch()
    Image.new("L", (30, 30), 128).save(tmp_path / "blank.png")
    cut = (digits / "a.png").read_bytes()[:60]
    (tmp_path / "cut.png").write_bytes(cut)
    bad = (
        "empty.png",
        "blank.png",
        "cut.png",
        digits / "notes.txt",
        "missing.png",
        digits / "a.png",
    )
    status, out, err = run("classify", *bad)
    lines = err.splitlines()
    assert status == 1 and len(lines) == 5
    for line, name in zip(lines, bad, strict=False):
        assert line.startswith(f"natcupy: error: {name}: ") and len(line) < 300
    assert "no such file" in lines[4] and "something drawn" in lines[1]
    assert f"{digits / 'a.png'}" in out and " 4 " in out
    status, out, _ = run("classify", *bad, "--json")
    results = json.loads(out)["results"]
    assert status == 1 and [("error" in result) for result in results] == [True] * 5 + [False]


def test_classify_with_a_saved_model_without_names(run, digits, tmp_path):
    numbers = {"embed_dim": 8, "depths": (1, 1), "num_heads": (1, 2), "num_classes": 3}
    model = natcupy.create_model("nat-mini", **numbers)
    natcupy.save_pretrained(model, tmp_path / "small")
    status, out, _ = run("classify", digits / "a.png", "--model", tmp_path / "small", "--json")
    answers = json.loads(out)["results"][0]["answers"]
    assert status == 0 and {a["label"] for a in answers} == {"class 0", "class 1", "class 2"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--model", "nat-tny"), "nat-tiny"),
        (("--model", "./no-such-folder"), "no-such-folder"),
        (("--device", "gpu9"), "--device"),
    ],
)
def test_what_cannot_be_done_is_one_line(run, digits, arguments, words):
    status, out, err = run("classify", digits / "a.png", *arguments)
    assert (status, out) == (1, "") and words in one_error_line(err)


@pytest.mark.parametrize("model", ["nat-tiny", "somebody/else"])
def test_offline_and_not_in_the_cache(digits, tmp_path, model):
    """In a process of its own: the Hub client reads its environment once, at import."""
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-m", "natcupy", "classify", str(digits / "a.png"), "--model", model],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**kept, **offline},
    )
    assert (done.returncode, done.stdout) == (1, "")
    line = one_error_line(done.stderr)
    assert "not in the cache" in line and "natcupy demo" in line


def test_a_folder_without_pictures(run, tmp_path):
    (tmp_path / "none").mkdir()
    status, _, err = run("classify", "none")
    assert status == 1 and "must hold pictures" in one_error_line(err)


def test_debug_shows_the_traceback(run, monkeypatch):
    monkeypatch.setenv("NATCUPY_DEBUG", "1")
    with pytest.raises(FileNotFoundError):
        run("classify", "x.png", "--model", "nat-tny")


def test_what_cannot_be_looked_at_stops_no_other_picture(run, digits):
    (digits / "circle.png").symlink_to("circle.png")
    status, out, err = run("classify", digits, "--json")
    assert status == 1 and err.startswith(f"natcupy: error: {digits / 'circle.png'}: ")
    assert sum("answers" in result for result in json.loads(out)["results"]) == 3


def test_folders_that_cannot_be_listed_stop_no_other(run, closed):
    status, out, err = run("classify", closed, "--json")
    names = [Path(result["file"]).name for result in json.loads(out)["results"]]
    assert status == 1 and names == ["a.png", "b.jpg"]
    told = "natcupy: warning: folders that cannot be listed are left out, 1 of them: "
    assert err == f"{told}{closed / 'more'} (Permission denied)\n"


def test_folders_that_cannot_be_listed_and_nothing_else(run, closed):
    status, out, err = run("classify", closed / "more")
    assert (status, out) == (1, "") and "more (Permission denied)" in one_error_line(err)
    assert "there must be a picture" in err


def test_weights_that_are_no_numbers_give_json_all_the_same(run, digits, tmp_path):
    model = natcupy.from_pretrained("nat-digits")
    model.head.bias.data.fill_(float("nan"))
    model.save_pretrained(tmp_path / "broken")

    def no_word(name):
        raise AssertionError(name)

    _, out, _ = run("classify", digits / "a.png", "--model", "./broken", "--json")
    answers = json.loads(out, parse_constant=no_word)["results"][0]["answers"]
    assert answers[0]["probability"] is None
    _, out, _ = run("classify", digits / "a.png", "--model", "./broken")
    assert "nan %" in out and "99.9" not in out


# -- demo -----------------------------------------------------------------------------------------


def test_the_demo_shows_what_it_does(run):
    status, out, err = run("demo", "--device", "cpu")
    assert (status, err) == (0, "")
    assert "12 of 12 right" in out and "no network was used" in out and "on cpu, backend" in out
    rows = [line.split() for line in out.splitlines() if line.endswith("right")]
    assert len(rows) == 12
    assert all(row[0][0] == row[1] == row[2] for row in rows)


def test_a_wrong_answer_is_told_and_counts(run, monkeypatch, tmp_path):
    (tmp_path / "pictures").mkdir()
    for name in ("2-plotter.png", "5-plotter.png"):
        (tmp_path / "pictures" / name).write_bytes((demo.SAMPLES / "2-plotter.png").read_bytes())
    monkeypatch.setattr(demo, "SAMPLES", tmp_path / "pictures")
    status, out, _ = run("demo")
    assert status == 1 and "1 of 2 right" in out and "WRONG" in out


# -- train-digits ---------------------------------------------------------------------------------


def test_train_digits_makes_a_model(run, tmp_path, monkeypatch):
    """From pictures to card; the examination with few pictures of each kind."""
    pytest.importorskip("sklearn", reason="the scans ship with scikit-learn")
    pytest.importorskip("matplotlib", reason="the fonts ship with matplotlib")
    from natcupy.digits import datasets, training

    few = datasets.examinations.__wrapped__(per_digit=2)
    monkeypatch.setattr(training, "examinations", lambda: few)
    status, out, err = run("train-digits", "--output", "made", "--pictures", 64, "--epochs", 1)
    assert status == 0, err
    assert "scikit-learn digits" in out
    model = natcupy.from_pretrained(tmp_path / "made")
    assert model.config == natcupy.from_pretrained("nat-digits").config
    assert "64 pictures drawn" in (tmp_path / "made" / "README.md").read_text()


def test_train_digits_without_the_scans_begins_nothing(run, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="its fonts are asked for before the scans")
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    status, out, err = run("train-digits", "--output", "made")
    assert (status, out) == (1, "") and "natcupy[train]" in one_error_line(err)
    assert not (tmp_path / "made").exists()


def test_train_digits_refuses_an_output_that_cannot_be(run, tmp_path):
    (tmp_path / "file").touch()
    status, _, err = run("train-digits", "--output", "file", "--pictures", 10**9)
    assert status == 1
    one_error_line(err)
