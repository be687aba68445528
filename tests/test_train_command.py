"""`natcupy finetune` as a command, and the examples: words in, a model or one line of error out."""

import json
import re
import subprocess
import sys

import pytest
from runs import ROOT, draw_stripes

pytest.importorskip("accelerate", reason="training needs accelerate: pip install 'natcupy[train]'")


@pytest.fixture(scope="module")
def stripes(tmp_path_factory):
    return draw_stripes(tmp_path_factory.mktemp("data") / "stripes")


def test_the_command(stripes, tmp_path, capsys):
    """From words to a model that classifies; JSON alone on stdout; errors in one line."""
    from natcupy.cli import main

    words = ["finetune", str(stripes), "--model", "nat-digits", "--output", str(tmp_path / "run"),
             "--epochs", "1", "--workers", "0", "--lr", "1e-3", "--kernel-size", "5"]  # fmt: skip
    assert main([*words, "--json"]) == 0
    said = capsys.readouterr()
    told = json.loads(said.out)
    assert told["scores"].keys() == {"val_loss", "val_accuracy"} and "epoch 1/1" in said.err
    assert json.loads((tmp_path / "run" / "model" / "config.json").read_text())["kernel_size"] == 5
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert re.search(r"^\| first weights \| nat-digits, in natcupy \|$", card, re.MULTILINE)
    picture = str(stripes / "down" / "00.png")
    assert main(["classify", picture, "--model", str(tmp_path / "run" / "model"), "--json"]) == 0
    assert "slanted" in capsys.readouterr().out
    assert main(words) == 1
    assert "holds a run already" in capsys.readouterr().err
    assert main([*words[:4], "--output", str(tmp_path / "x"), "--recipe", "nat-in1"]) == 2


@pytest.mark.parametrize(
    ("task", "model", "said"),
    [
        ("classification", "upernet-nat-tiny", "--task must be segmentation for upernet-nat-tiny"),
        ("detection", "upernet_nat_tiny.ade20k", "--task must be segmentation for upernet_nat_tin"),
        ("segmentation", "nat-tiny", "With --backbone nat-tiny, a model of that task starts from"),
    ],
)
def test_a_released_model_of_another_task_is_told_before_data_is_looked_for(
    task, model, said, tmp_path, capsys
):
    from natcupy.cli import main

    words = ["finetune", "nowhere", "--task", task, "--model", model]
    assert main([*words, "--output", str(tmp_path / "run")]) == 1
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--backbone", "nat-tiny"], "--backbone belongs to --task segmentation and detection"),
        (["--images", "p"], "--images belongs to --task detection, got it with classification"),
        (["--reduce-zero-label"], "--reduce-zero-label belongs to --task segmentation"),
        (
            ["--task", "detection", "--backbone", "nat-tiny", "--from-scratch"],
            "--backbone nat-tiny and --from-scratch exclude each other",
        ),
    ],
)
def test_words_that_would_change_nothing_are_refused(words, said, tmp_path, capsys):
    from natcupy.cli import main

    model = "mask-rcnn-nat-mini" if "--task" in words else "nat-digits"
    words = ["finetune", "nowhere", "--model", model, *words]
    assert main([*words, "--output", str(tmp_path / "run")]) == 1
    assert said in capsys.readouterr().err


def test_a_fresh_classifier_is_told(stripes, tmp_path, caplog):
    from natcupy.cli import main

    words = ["finetune", str(stripes), "--model", "nat-digits", "--epochs", "1", "--workers", "0"]
    assert main([*words, "--output", str(tmp_path / "one")]) == 0
    assert re.search(r"begins anew: .*slanted.* are not the model's 10\.", caplog.text)
    card = (tmp_path / "one" / "model" / "README.md").read_text()
    assert "1, number 1 kept" in card and re.search(r"\d s on 1 process\b", card)
    caplog.clear()
    words[3] = str(tmp_path / "one" / "model")
    assert main([*words, "--output", str(tmp_path / "two")]) == 0
    assert "begins anew" not in caplog.text


@pytest.mark.parametrize("begun", [False, True])
def test_a_run_that_is_stopped_says_how_to_go_on(stripes, tmp_path, capsys, monkeypatch, begun):
    """By Ctrl-C, once there is something to go on from."""
    from natcupy.cli import finetune, main
    from natcupy.train import engine

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(*((engine._Engine, "_step") if begun else (finetune, "load_model")), stop)
    words = ["finetune", str(stripes), "--model", "nat-digits", "--output", str(tmp_path / "run"),
             "--epochs", "1", "--workers", "0"]  # fmt: skip
    assert main(words) == 130
    way = ["finetune", "--resume", str(tmp_path / "run")]
    told = f"natcupy: natcupy {' '.join(way)} goes on from the last checkpoint\n"
    assert (told in capsys.readouterr().err) == begun
    monkeypatch.undo()
    assert main(way if begun else [*words, "--resume"]) == 0


@pytest.mark.parametrize("fraction", ["0", "0.1"])
def test_the_end_names_the_files_that_are_there(stripes, tmp_path, capsys, fraction):
    from natcupy.cli import main

    words = ["finetune", str(stripes), "--model", "nat-digits", "--output", str(tmp_path / "run"),
             "--epochs", "1", "--workers", "0", "--val-fraction", fraction]  # fmt: skip
    assert main(words) == 0
    files, folder = re.search(r"^logs +(.+) in (\S+)$", capsys.readouterr().out, re.M).groups()
    there = {path.name for path in (tmp_path / "run").iterdir() if path.suffix}
    assert folder == str(tmp_path / "run")
    assert set(files.split(", ")) == there - {"run.json"}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], r"channels and crop mode 'ink'\. Set it to ''\. Flags: --auto-augment "
             r"\(rand-m9-mstd0\.5-inc1 by --recipe nat-in1k\)\.$"),
        (["--epochs", "1"], r"fewer than epochs, got 20 of 1.* Flags: --warmup-epochs \(20 by "
                            r"--recipe nat-in1k\), --epochs\.$"),
        (["--epochs", "1", "--warmup-epochs", "2"], r"Flags: --warmup-epochs, --epochs\.$"),
    ],
)  # fmt: skip
def test_errors_about_numbers_name_their_flags(stripes, tmp_path, capsys, words, told):
    from natcupy.cli import main

    command = ["finetune", str(stripes), "--model", "nat-digits", "--recipe", "nat-in1k"]
    assert main([*command, "--output", str(tmp_path / "run"), *words]) == 1
    said = capsys.readouterr().err.strip()
    assert re.search(told, said), said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "flags"),
    [
        ("a head that is kept. Set head to 'auto'.", ["--head"]),
        ("the run in /runs/seed/lr-1 is one. Continue with --resume, or --epochs.", []),
        ("min_lr must not be above lr.", ["--min-lr", "--lr"]),
        (
            "crop_scale must be two numbers.",
            ["--crop-scale ((0.08, 1.0) by --recipe nat-in1k)"],
        ),
    ],
)
def test_flags_of_an_error(text, flags):
    from natcupy.cli.finetune_errors import flags_of
    from natcupy.cli.parser import build_parser

    words = ["finetune", "D", "--model", "m", "--output", "o", "--recipe", "nat-in1k"]
    typed = ["--head", "auto", "--lr", "1", "--min-lr", "2"]
    assert flags_of(text, build_parser().parse_args([*words, *typed])) == flags


# ---------------------------------------------------------------- examples


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda p: p.name)
def test_an_example_without_arguments_tells_its_usage(path):
    done = subprocess.run([sys.executable, path], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"usage: {path.name}") and "Traceback" not in done.stderr
