"""The README: its Python runs, its table is the library's, its file tree and commands exist."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import readme_table

from natcupy.cli import main
from natcupy.cli.parser import build_parser

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize(
    ("snippet", "output"),
    re.findall(r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", README, re.S),
)
def test_python_snippets_print_what_is_said(snippet, output):
    done = subprocess.run(
        [sys.executable, "-c", snippet],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == output


def test_the_first_screen_installs_and_answers():
    """What it is, two commands, an example with its output and where to go next: 40 lines."""
    first = README.splitlines()[:40]
    commands = [line for line in first if line.startswith(("python3 -m", "pip install"))]
    assert len(commands) == 2 and "```text" in first
    assert any(line.startswith("Where to go next") for line in first)


def test_models_table_is_what_the_command_prints(capsys):
    between = re.search(r"<!-- models.*?-->\n(.*?)\n<!-- end of models -->", README, re.S)
    assert between.group(1) == readme_table.table()
    assert main(["models"]) == 0
    printed, *_ = capsys.readouterr().out.split("\n\n")
    rows = [re.split(r" \| ", line.strip("| ")) for line in between.group(1).splitlines()]
    assert [[cell.strip("`-") for cell in row] for row in rows] == [
        [cell.strip("-") for cell in re.split(r" {2,}", line)] for line in printed.splitlines()
    ]


def test_every_named_file_exists():
    tree = re.search(r"```\n(.*?)```", (ROOT / "docs/files.md").read_text(), re.S).group(1)
    folder = ROOT
    for line in tree.splitlines():
        names = re.split(r" {2,}", line.strip())[0]
        if not line.startswith(" "):
            folder = ROOT / names
            assert folder.is_dir(), names
            continue
        for name in names.split(", "):
            assert (folder / name).exists(), f"{folder.name}/{name}"


def test_every_named_folder_exists():
    tree = re.findall(r"^([a-z]+)/  ", README, re.M)
    assert len(tree) == 8 and all((ROOT / name).is_dir() for name in tree)


def test_every_named_command_parses():
    rows = re.findall(r"^\| `natcupy (.*?)`(?:, `natcupy (.*?)`)?", README, re.M)
    commands = [command for row in rows for command in row if command]
    assert len(commands) >= 6
    for command in commands:
        words = command.replace("IMAGE...", "a.png").replace("IMAGE", "a.png").split()
        assert build_parser().parse_args(words).command == words[0]


def test_set_up_commands_are_what_ci_runs():
    lines = [line for line in README.splitlines() if line.startswith("pip install ")]
    assert len(lines) == 2
    assert lines[0].endswith("&& natcupy demo") and lines[1].endswith("&& python -m pytest")
    assert all("-c constraints.txt" in line for line in lines)
    assert "README.md" in (ROOT / ".ci/run").read_text()
