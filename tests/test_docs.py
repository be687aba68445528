"""The pages under docs/ and benchmarks/: files that they name exist, their links lead somewhere."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks" / "README.md"]
FOLDERS = ("benchmarks", "docs", "examples", "hub", "kernels", "natcupy", "tests", "zoo")
FILE = re.compile(r"`(?:python )?([\w./*-]+\.(?:py|cu|cuh|md|json|jsonl|toml))\b")
LINK = re.compile(r"\]\(([^)#]+)")
COMMAND = re.compile(r"python -m (benchmarks\.\w+)")


def files():
    found = [ROOT / "README.md", ROOT / "CHANGELOG.md"]
    for folder in FOLDERS:
        found += (path for path in (ROOT / folder).rglob("*.*") if "__pycache__" not in path.parts)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_commands_that_a_page_names_exist(page):
    text, known = page.read_text(), files()
    for name in FILE.findall(text):
        # NAME stands for a file to be written
        assert "NAME" in name or any(path.match(name) for path in known), name
    for link in LINK.findall(text):
        if "://" not in link:
            assert (page.parent / link).exists(), link
    for command in COMMAND.findall(text):
        assert (ROOT / command.replace(".", "/")).with_suffix(".py").exists(), command


def test_the_check_finds_what_is_not_there():
    known = files()
    assert FILE.findall("see `cpu/nothing.py` and `python tests/test_docs.py [x]`") == [
        "cpu/nothing.py",
        "tests/test_docs.py",
    ]
    assert not any(path.match("cpu/nothing.py") for path in known)
    assert any(path.match("tests/test_docs.py") for path in known)
