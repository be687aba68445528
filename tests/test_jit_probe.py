"""What CuPy, NVRTC and torch say of themselves, and what is said where one is missing."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from natcupy import cache
from natcupy.cuda import jit, nvrtc

needs_nvrtc = pytest.mark.skipif(
    importlib.util.find_spec("cupy") is None,
    reason="CuPy, which brings the compiler, is not installed",
)
IMPORT = """
import sys
sys.modules["torch"] = type(sys)("torch")  # not needed here, and slow to import
sys.modules["torch"].version = type(sys)("version")
sys.modules["torch"].version.cuda = {cuda!r}
package = type(sys)("natcupy")
package.__path__ = [{package!r}]
sys.modules["natcupy"] = package
from natcupy.cuda import nvrtc
assert "cupy" not in sys.modules
{then}
"""


def run(then, cuda="13.0", **environment):
    code = IMPORT.format(cuda=cuda, package=str(Path(cache.__file__).parent), then=then)
    environment = {**os.environ, **environment}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )


@needs_nvrtc
def test_cupy_is_imported_although_its_cache_folder_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    below = str(tmp_path / "file" / "below")
    then = (
        "import os\nprint(nvrtc.toolkit().version[0] >= 12, 'CUPY_CACHE_DIR' in os.environ, "
        "os.environ.get('CUPY_CACHE_DIR'))"
    )
    result = run(then, HOME=below, TMPDIR=str(tmp_path))
    assert result.stdout == "True False None\n", result.stderr
    result = run(then, CUPY_CACHE_DIR=below, TMPDIR=str(tmp_path))
    assert result.stdout == f"True True {below}\n", result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["file"]  # the spare folder is gone


@pytest.mark.parametrize(
    ("cuda", "extra"), [("12.8", "cuda12"), ("13.0", "cuda13"), (None, "cuda13")]
)
def test_without_cupy_one_sentence_says_what_to_install(cuda, extra):
    then = "sys.modules['cupy'] = None\nsys.meta_path.insert(0, No())\nnvrtc.toolkit()"
    no = (
        "class No:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'cupy':\n"
        "            raise ModuleNotFoundError('no cupy', name='cupy')\n"
    )
    result = run(no + then.replace("sys.modules['cupy'] = None\n", ""), cuda=cuda)
    last = result.stderr.strip().splitlines()[-1]
    assert last == (
        "ImportError: the CUDA backend needs CuPy, which is not installed; "
        f"pip install 'natcupy[{extra}]'."
    )


def test_a_broken_cupy_one_sentence_says_what_to_do(tmp_path):
    (tmp_path / "cupy.py").write_text("raise OSError('libcudart.so.12: no such file')\n")
    result = run("nvrtc.toolkit()", PYTHONPATH=str(tmp_path), HOME=str(tmp_path))
    last = result.stderr.strip().splitlines()[-1]
    assert "cannot be imported (OSError: libcudart.so.12: no such file)" in last
    assert "keep one CuPy package" in last and "natcupy[cuda13]" in last


def test_without_nvrtc_one_sentence_says_what_to_install(tmp_path):
    backend = tmp_path / "cupy_backends" / "cuda" / "libs"
    backend.mkdir(parents=True)
    for package in (backend, backend.parent, backend.parent.parent):
        (package / "__init__.py").write_text("")
    (tmp_path / "cupy.py").write_text("")
    (backend / "nvrtc.py").write_text(
        "def getVersion():\n    raise RuntimeError('libnvrtc.so.13 not found\\nmore')\n"
    )
    result = run("nvrtc.toolkit()", PYTHONPATH=str(tmp_path), HOME=str(tmp_path))
    last = result.stderr.strip().splitlines()[-1]
    assert "finds no working NVRTC" in last and "(libnvrtc.so.13 not found)" in last
    assert "natcupy[cuda13]" in last


@needs_nvrtc
def test_probe_tells_all_and_raises_nothing():
    facts = jit.probe()
    assert facts["nvrtc"] == ".".join(map(str, jit.toolkit().version))
    assert facts["cupy"] and facts["cupy_packages"]
    assert 80 in facts["nvrtc_archs"]
    if sys.platform.startswith("linux"):
        assert Path(facts["nvrtc_path"]).name.startswith("libnvrtc.so")
    assert len(facts["devices"]) == (jit.torch.cuda.device_count() if facts["driver_cuda"] else 0)


@pytest.mark.parametrize(
    ("torch_cuda", "cupy", "compiler", "words"),
    [
        ("13.0", 13, (13, 0), None),
        ("12.8", 12, (12, 9), None),
        ("12.8", 13, (13, 0), "natcupy[cuda12]"),
        ("13.0", 12, (12, 8), "natcupy[cuda13]"),
        ("13.0", 13, (12, 8), "NVRTC 12.8"),
        (None, 13, (13, 0), "without CUDA"),
    ],
)
def test_probe_compares_the_cuda_majors(torch_cuda, cupy, compiler, words, monkeypatch):
    monkeypatch.setattr(nvrtc.torch.version, "cuda", torch_cuda)
    problems = jit._mismatch(torch_cuda, cupy, compiler)
    assert [words in problem for problem in problems] == ([] if words is None else [True])


def test_probe_names_several_cupy_packages(monkeypatch):
    packages = {"cupy-cuda12x": "14.1", "cupy-cuda13x": "14.2"}
    monkeypatch.setattr(jit, "_cupy_packages", lambda: packages)

    def broken():
        raise ImportError("no compiler")

    monkeypatch.setattr(jit, "toolkit", broken)
    problems = jit.probe()["problems"]
    assert "cupy-cuda12x, cupy-cuda13x" in problems[0]
    assert problems[1] == "no compiler"
