"""`natcupy evaluate` and `natcupy predict`: what they print, their exit status, and nat-digits."""

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.inference.cases import small
from tests.pictures import broken

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    """scikit-learn's held-out digits as pictures, one folder per digit below `test`."""
    pytest.importorskip("sklearn", reason="the scans ship with scikit-learn")
    from natcupy.digits.datasets import _scan, _scans

    folder = tmp_path_factory.mktemp("scans")
    for index, (pixels, digit) in enumerate(zip(*_scans(held_out=True), strict=True)):
        (folder / "test" / str(digit)).mkdir(parents=True, exist_ok=True)
        _scan(pixels).save(folder / "test" / str(digit) / f"{index:03}.png")
    return folder


def test_nat_digits_is_as_right_as_its_card_says(run, scans):
    card = (ROOT / "hub" / "embedded" / "nat-digits" / "README.md").read_text("utf-8")
    pictures, share = re.search(r"scikit-learn digits \| (\d+) \| ([\d.]+) %", card).groups()
    status, out, _ = run("evaluate", scans, "--json", "--per-class", "--workers", "0")
    found = json.loads(out)
    assert status == 0 and found["pictures"] == int(pictures)
    assert f"{100 * found['top1']:.1f}" == share
    assert sum(c["right"] for c in found["classes"]) == round(found["top1"] * int(pictures))


def test_evaluate_prints_facts_and_a_table(run, tmp_path, scans):
    some = tmp_path / "some"
    for digit in (3, 7):
        (some / str(digit)).mkdir(parents=True)
        for path in sorted((scans / "test" / str(digit)).iterdir())[:4]:
            (some / str(digit) / path.name).write_bytes(path.read_bytes())
    status, out, err = run("evaluate", some, "--per-class")
    assert (status, err) == (0, "")
    assert "top-1  100.00 % (8 of 8)" in out and "classes matched by name" in out
    assert re.search(r"^\s+7\s+4\s+4\s+100\.0 %\s+100\.0 %$", out, re.MULTILINE)
    reasons = broken(some / "7")
    status, out, err = run("evaluate", some)
    assert status == 1 and f"{len(reasons)} pictures that could not be read" in out
    assert err.count("natcupy: error: ") == len(reasons) and "class " not in out


def test_one_is_no_plural(run, tmp_path, scans):
    one = next((scans / "test" / "3").iterdir())
    (tmp_path / "one" / "3").mkdir(parents=True)
    (tmp_path / "one" / "3" / "a.png").write_bytes(one.read_bytes())
    _, out, _ = run("evaluate", tmp_path / "one")
    assert ": 1 picture, 1 class\n" in out
    _, out, _ = run("predict", tmp_path / "one", "--out", "one.csv")
    assert out.startswith("one.csv is complete, 1 picture in ")
    (tmp_path / "one" / "3" / "b.png").write_bytes(b"no picture")
    _, out, _ = run("evaluate", tmp_path / "one")
    assert "1 picture that could not be read" in out
    _, out, _ = run("predict", tmp_path / "one", "--out", "two.csv")
    assert " 1 picture could not be read." in out


def test_predict_prints_where_it_is(run, tmp_path, scans):
    status, out, err = run("predict", scans / "test" / "3", "--out", "p.csv", "--topk", "2")
    assert (status, err) == (0, "") and out.startswith("p.csv is complete, 37 pictures in ")
    with open("p.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 37 and all(row["label"] == "3" for row in rows)
    status, _, err = run("predict", scans / "test" / "3", "--out", "p.csv")
    assert status == 1 and err.startswith("natcupy: error: p.csv exists. ")
    broken(tmp_path / "bad")
    status, out, err = run("predict", "bad", "--out", "p.csv", "--overwrite", "--json")
    found = json.loads(out)
    assert status == 1 and len(found["bad"]) == len(err.splitlines()) and found["complete"]


@pytest.mark.parametrize("arguments", [
    ("evaluate",),
    ("evaluate", "x", "--dtype", "int8"),
    ("evaluate", "x", "--workers", "-1"),
    ("predict", "x"),
    ("predict", "x", "--out", "y.csv", "--shard", "2/2"),
    ("predict", "x", "--out", "y.csv", "--shard", "1"),
])  # fmt: skip
def test_wrong_usage_is_status_2(run, arguments):
    assert run(*arguments)[0] == 2


@pytest.mark.parametrize(("arguments", "text"), [
    (("evaluate", "no/such/folder"), "there is no folder"),
    (("predict", "no-such.png", "--out", "y.csv"), "there is no file or folder no-such.png"),
    (("predict", "{}", "--out", "y.txt"), "must end in .csv, .jsonl, .parquet"),
    (("evaluate", "{}", "--device", "cuda:77"), "--device must name a device that is there"),
    (("evaluate", "{}", "--split", "val"), "has the parts test"),
    (("evaluate", "{}", "--class-map", "nope.txt"), "nope.txt: no such file or folder"),
    (("predict", "{}", "--out", "/proc/x.csv"), "nothing can be written to /proc"),
])  # fmt: skip
def test_mistakes_are_one_line(run, scans, arguments, text):
    status, out, err = run(*(argument.format(scans) for argument in arguments))
    assert status == 1 and out == "" and text in err and err.count("\n") == 1


def test_other_dtypes_and_models(run, tmp_path, scans):
    status, out, _ = run(
        "evaluate", scans / "test", "--dtype", "bfloat16", "--json", "--workers", "0"
    )
    assert status == 0 and json.loads(out)["top1"] > 0.97
    small().save_pretrained(tmp_path / "model")
    (tmp_path / "map.csv").write_text("\n".join(f"{digit},{digit % 7}" for digit in range(10)))
    status, out, _ = run(
        "evaluate", scans, "--model", "model", "--class-map", "map.csv", "--workers", "0", "--json"
    )
    assert status == 0 and json.loads(out)["pictures"] == 360


def test_under_torchrun_the_first_process_prints(tmp_path, scans):
    from tests.inference.cases import free_port

    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    command += ["-m", "natcupy", "evaluate", str(scans), "--json", "--workers", "0"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    found = json.loads(done.stdout)
    assert (done.returncode, found["processes"], found["pictures"]) == (0, 2, 360)
    assert found["top1"] == 355 / 360
