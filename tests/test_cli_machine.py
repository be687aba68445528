"""The command `natcupy` on odd machines: full disks, closed streams, signals, odd names."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
import warnings

import pytest
from PIL import Image

from natcupy import cache, cli
from natcupy.cli import doctor, main, pictures


def test_a_reader_that_leaves_early_is_no_error():
    command = f"{sys.executable} -m natcupy models | head -n 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.stdout.startswith("name") and done.stderr == ""


@pytest.mark.skipif(os.name == "nt", reason="a shell of Unix closes the streams")
def test_closed_streams_are_no_error():
    command = f"{sys.executable} -m natcupy models >&- 2>&-"
    assert subprocess.run(command, shell=True, check=False).returncode == 0


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are Unicode elsewhere")
@pytest.mark.parametrize("encoding", ["utf-8:strict", "ascii"])
def test_names_that_are_no_text_are_printed(digits, encoding):
    name = os.fsdecode(b"caf\xe9 \xc3\xa9.png")
    (digits / "a.png").rename(digits / name)
    command = [sys.executable, "-m", "natcupy", "classify", str(digits)]
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "1"}
    done = subprocess.run([*command, "--json"], capture_output=True, env=environment, check=True)
    files = [found["file"] for found in json.loads(done.stdout.decode())["results"]]
    assert str(digits / name) in files
    done = subprocess.run(command, capture_output=True, env=environment, check=True)
    assert len(done.stdout.decode().splitlines()) == 8


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
@pytest.mark.parametrize(
    "arguments", [("models",), ("--version",), ("--help",), ("classify", "--help")]
)
@pytest.mark.parametrize("buffering", [1, -1])
def test_an_output_that_is_full(run, monkeypatch, capsys, arguments, buffering):
    """The device is named by what it is to the user, since the system's error has no file."""
    full = os.open("/dev/full", os.O_WRONLY)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", os.fdopen(full, "w", buffering))
        assert main(arguments) == 1
    assert capsys.readouterr().err == "natcupy: error: standard output: No space left on device\n"


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (MemoryError(), "this needs more memory than there is"),
        (MemoryError("Unable to allocate 3 GiB"), "Unable to allocate 3 GiB"),
        (cache.CacheWarning("kept in memory,\nbecause"), "kept in memory, because"),
        (OSError(28, "No space left on device", "x.png"), "x.png: No space left on device"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (BlockingIOError(11, "Try again"), "no process can be started (Try again); try --workers"),
    ],
)
def test_errors_of_the_machine_are_one_line(run, monkeypatch, error, text):
    def fails(arguments):
        raise error

    monkeypatch.setattr("natcupy.cli.models.run", fails)
    status, _, err = run("models")
    assert status == 1 and err.startswith(f"natcupy: error: {text}") and err.count("\n") == 1


def test_own_warnings_are_one_line():
    told = cli._format_warning(cache.CacheWarning("a\nb"), cache.CacheWarning, "cache.py", 3)
    assert told == "natcupy: warning: a b\n"
    usual, other = warnings.formatwarning, ("x", UserWarning, "other.py", 3)
    assert cli._format_warning(*other) == usual(*other)
    assert main(["--version"]) == 0 and warnings.formatwarning is usual


def test_doctor_without_a_home(monkeypatch):
    def unreadable(access):
        raise PermissionError(13, "Permission denied", "/home/someone/token")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", "~no-such-user/hub")
    monkeypatch.setattr("natcupy.hub.client.has_login", unreadable)
    found = doctor._hub()
    assert (found["cache"], found["cache_exists"], found["token"]) == (None, False, None)
    home, token = found["problems"]
    assert "~no-such-user/hub, and this user has no home folder. Set HF_HOME" in home
    assert token == "the token cannot be read: /home/someone/token: Permission denied"


def test_doctor_tells_of_a_torchvision_of_another_build(monkeypatch, tmp_path):
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator nms does not exist')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    told = doctor._misfit()
    assert "(operator nms does not exist): it must be of torch's own build" in told
    (tmp_path / "torchvision.py").unlink()
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text("")
    importlib.invalidate_caches()
    assert doctor._misfit() is None


def test_a_machine_without_a_gpu_has_no_problem():
    facts = {"torch_cuda": None, "problems": ["no NVIDIA driver was found."], "devices": []}
    assert doctor._cuda(facts)[-1] == ("missing", "no NVIDIA driver was found.")
    facts |= {"driver_cuda": "13.0", "problems": ["it is too old."]}
    assert doctor._cuda(facts)[-1] == ("problem", "it is too old.")
    backends = [{"backend": b, "device": d} for b in ("cpu", "cuda") for d in ("cpu", "cuda:0")]
    told = [(b["backend"], b["device"]) for b in doctor._worth_telling(backends)]
    assert told == [("cpu", "cpu"), ("cpu", "cuda:0"), ("cuda", "cuda:0")]


def test_a_picture_that_cannot_be_saved(tmp_path):
    """The error names the place that was asked for, and nothing is left."""

    class Full:
        def save(self, path):
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space") as caught:
        pictures.save(Full(), tmp_path / "out.png")
    assert caught.value.filename == str(tmp_path / "out.png") and not list(tmp_path.iterdir())


def test_a_result_that_cannot_be_written_is_told_by_its_own_name(digits):
    def work(number, pixels):
        raise OSError(28, "No space left on device", "out.png")

    (record,) = pictures.each([digits / "a.png"], 1, work)
    assert record == {"file": str(digits / "a.png"), "error": "out.png: No space left on device"}


def test_two_processes_save_one_picture(tmp_path):
    """What one of them writes meanwhile is not the other's."""

    class Slow:
        def save(self, path):
            Image.new("L", (3, 3)).save(path)
            pictures.save(Image.new("L", (2, 2)), tmp_path / "out.png")

    pictures.save(Slow(), tmp_path / "out.png")
    assert Image.open(tmp_path / "out.png").size == (3, 3)
    assert [path.name for path in tmp_path.iterdir()] == ["out.png"]


@pytest.mark.skipif(os.name == "nt", reason="signals of Unix")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_command_that_is_ended_tidies_up(run, monkeypatch, name):
    number, tidied = getattr(signal, name), []

    def working(arguments):
        try:
            os.kill(os.getpid(), number)
            time.sleep(10)
        finally:
            tidied.append(True)

    monkeypatch.setattr("natcupy.cli.models.run", working)
    before = signal.signal(number, signal.SIG_DFL)
    try:
        assert run("models") == (128 + number, "", "natcupy: stopped\n")
        assert tidied and signal.getsignal(number) is signal.SIG_DFL
    finally:
        signal.signal(number, before)
