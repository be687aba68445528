"""predict, stopped, killed, in shards and in several processes: nothing lost or doubled."""

import contextlib
import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys

import pytest
import torch

from natcupy.inference import evaluate, feed, parts, predict
from tests.inference.cases import ROOT, SETTINGS, small
from tests.pictures import broken, class_folders, noise


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


def test_a_picture_repaired_before_resuming_is_not_told_of(model, tmp_path, seven, monkeypatch):
    """Also where the part failed when its list of bad pictures was there already."""
    out, first = tmp_path / "out.csv", sorted((seven / "GNU").iterdir())[0]
    whole = first.read_bytes()
    first.write_bytes(b"not a picture")
    interrupted(model, seven, out, 2, monkeypatch, **SETTINGS)
    assert (tmp_path / "out.csv.parts" / "0.bad").exists()
    first.write_bytes(whole)
    report = predict(model, seven, out, resume=True, **SETTINGS)
    assert report.complete and report.bad == ()
    assert json.loads((tmp_path / "out.csv.run.json").read_text())["bad"] == []


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
from tests.inference.cases import small, SETTINGS
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


@pytest.mark.parametrize(("suffix", "kills", "workers"), [(".csv", 8, 0), (".jsonl", 4, 1)])
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


# One process imports once, then forks the processes of each group, with torchrun's environment.
RANKS = """
import json, os, sys, traceback
import torch
torch.set_num_threads(1)  # so that forking is safe
from dataclasses import asdict
import natcupy
from natcupy.inference import ranks
from tests.inference.cases import free_port, small, SETTINGS
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
