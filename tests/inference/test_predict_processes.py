"""predict by several processes: they end together, with one answer, whatever one of them met."""

import csv
import json
import os
import subprocess
import sys

import pytest

from tests.inference.cases import ROOT, free_port
from tests.pictures import class_folders

# What torchrun starts: the command `natcupy`, whose second process is slow at what is named.
SLOW = """
import sys, time
from natcupy.cli import console, main
from natcupy.inference import prediction, ranks

def slowed(place, name, rank):
    usual = getattr(place, name)

    def slow(*arguments):
        if ranks.world_rank() == rank:
            time.sleep(SLEEP)
        return usual(*arguments)

    setattr(place, name, slow)

what, SLEEP, *words = sys.argv[1:]
SLEEP = float(SLEEP)
if what == "work":
    slowed(prediction, "_answers", 1)
else:
    slowed(console, "print_json", 0)
sys.exit(main(words))
"""


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    return model.save_pretrained(tmp_path_factory.mktemp("saved") / "model")


def torchrun(folder, what, seconds, *words):
    script = folder / "slow.py"
    script.write_text(SLOW)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    done = subprocess.run(
        [*command, str(script), what, str(seconds), *map(str, words), "--workers", "0", "--json"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, cwd=folder, timeout=300,
    )  # fmt: skip
    return done


@pytest.fixture
def one_bad(tmp_path):
    """Twelve files, of which the first, so one of the first process, is no picture."""
    data = class_folders(tmp_path / "data", {"ant": 11})
    (data / "ant" / "0.jpg").write_text("not a picture")
    return data


def test_a_process_with_a_bad_picture_waits_for_the_others(saved, tmp_path, one_bad):
    """It is done long before the second: the table comes out, and one document on stdout."""
    words = ["--out", "p.csv", "--batch-size", "4", "--part-pictures", "4"]
    done = torchrun(tmp_path, "work", 4, "predict", one_bad, "--model", saved, *words)
    assert done.returncode == 1 and (tmp_path / "p.csv").exists(), done.stderr
    found = json.loads(done.stdout)
    assert found["complete"] and found["pictures"] == 12 and len(found["bad"]) == 1
    assert done.stderr.count("natcupy: error: ") == 1
    with open(tmp_path / "p.csv", encoding="utf-8") as file:
        assert len(list(csv.DictReader(file))) == 11


@pytest.mark.parametrize("command", ["predict", "evaluate"])
def test_the_others_wait_until_the_first_has_printed(saved, tmp_path, one_bad, command):
    """They exit with 1 for the bad picture, upon which torchrun ends whoever is still there."""
    words = ["--out", "p.csv"] if command == "predict" else []
    done = torchrun(tmp_path, "print", 4, command, one_bad, "--model", saved, *words)
    assert done.returncode == 1, done.stderr
    assert len(json.loads(done.stdout)["bad"]) == 1
