"""What tests of the command line share: a way to run it, pictures of digits, a look at errors.

The fixtures are every test's, through `conftest`.
"""

import os

import pytest
from PIL import Image, ImageDraw, ImageFont

from natcupy.cli import main


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """Run a command in an empty folder, without a Hub; gives (status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.delenv("NATCUPY_DEBUG", raising=False)

    def call(*arguments):
        status = main([str(argument) for argument in arguments])
        return (status, *capsys.readouterr())

    return call


@pytest.fixture
def digits(tmp_path):
    """A folder with three digits, one of them a level down, and a file that is no picture."""
    folder = tmp_path / "digits"
    (folder / "more").mkdir(parents=True)
    for digit, name in ((4, "a.png"), (7, "b.jpg"), (2, "more/c.PNG")):
        sheet = Image.new("RGB", (90, 120), "white")
        pen = ImageDraw.Draw(sheet)
        pen.text((20, 10), str(digit), "black", ImageFont.load_default(80))
        sheet.save(folder / name)
    (folder / "notes.txt").write_text("not a picture")
    (folder / "paper.pdf").write_text("what Pillow can write but not read")
    (folder / ".hidden.png").write_text("")
    return folder


@pytest.fixture
def closed(digits, monkeypatch):
    """The folder of digits: `more` closed, also to root; `gone` vanishes when it is looked at."""
    (digits / "gone").mkdir()
    usual = os.scandir

    def scandir(path):
        if os.fspath(path).endswith("more"):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        if os.fspath(path).endswith("gone"):
            os.rmdir(path)
        return usual(path)

    monkeypatch.setattr(os, "scandir", scandir)
    return digits


def one_error_line(stderr):
    """What a failed command says on stderr: one line."""
    assert stderr.startswith("natcupy: error: ") and stderr.count("\n") == 1, stderr
    return stderr
