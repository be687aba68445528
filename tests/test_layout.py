"""The house itself: one-way imports, heavy packages in their rooms, a right wheel."""

import ast
import subprocess
import sys
import sysconfig
import zipfile
from functools import cache
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {"natcupy": "natcupy", "zoo": "natcupy.zoo", "hub": "natcupy.hub"}

# lower floors first; a room may import its own floor and the floors before it
FLOORS = [
    (
        "natcupy.cache",
        "natcupy.neighborhood",
        "natcupy.kernels",
        "natcupy.interop",
        "natcupy.eager",
    ),
    ("natcupy.layouts", "natcupy.arguments", "natcupy.dtype_errors"),
    ("natcupy.cuda.source", "natcupy.cuda.arch", "natcupy.cuda.nvrtc", "natcupy.cuda.launch"),
    ("natcupy.cuda.jit",),
    ("natcupy.cuda.params", "natcupy.cuda.tiling"),
    ("natcupy.cuda.recipes",),
    ("natcupy.cuda.heuristics",),
    ("natcupy.cuda.small_tiles",),
    ("natcupy.cuda.small", "natcupy.cuda.mma"),
    ("natcupy.cuda.plan",),
    ("natcupy.tiles", "natcupy.reference", "natcupy.cuda", "natcupy.cpu"),
    ("natcupy.backends", "natcupy.known_calls"),
    ("natcupy.functional",),
    ("natcupy.modules", "natcupy.maps"),
    ("natcupy.natten",),
    ("natcupy.warmup", "natcupy.graphs"),
    ("natcupy.zoo",),
    ("natcupy.hub", "natcupy.digits", "natcupy.timm", "natcupy.transformers"),
    ("natcupy.data", "natcupy.processes"),
    ("natcupy.inference",),
    ("natcupy.train",),
    ("natcupy.cli", "natcupy.__main__"),
]
ROOMS_OF = {  # package: the only rooms that may import it
    "cupy": ("natcupy.cuda.jit", "natcupy.cuda.nvrtc", "natcupy.cuda.launch"),
    "cupy_backends": ("natcupy.cuda.jit", "natcupy.cuda.nvrtc", "natcupy.cuda.launch"),
    "llvmlite": ("natcupy.cpu",),
    "huggingface_hub": ("natcupy.hub",),
    "datasets": ("natcupy.data.hf",),
    "pycocotools": ("natcupy.data.coco", "natcupy.data.coco_ap"),
    "pyarrow": ("natcupy.inference.tables",),
    "sklearn": ("natcupy.digits",),
    "matplotlib": ("natcupy.digits", "natcupy.train.plots"),
    "accelerate": ("natcupy.train.machine",),
    "timm": ("natcupy.timm", "natcupy.train.timm_parts"),
    "transformers": ("natcupy.transformers",),
}
BANNED = {"pickle", "dill", "marshal", "shelve"}


@cache
def parsed(path):
    return ast.parse(path.read_text())


def modules():
    for folder, package in PACKAGES.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            if path.is_symlink() or any((ROOT / folder / p).is_symlink() for p in parts[:1]):
                continue
            name = ".".join([package, *parts])
            yield name.removesuffix(".__init__"), path


def imported(path, package):
    """(module, line) of every import statement, at any depth of the file."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import on line {node.lineno}"
            for alias in node.names:
                yield f"{node.module}.{alias.name}", node.lineno


def under(name, prefixes):
    return any(name == p or name.startswith(p + ".") for p in prefixes)


def floor_of(name):
    """The floor with the longest matching room name."""
    rooms = [(len(room), n) for n, rooms in enumerate(FLOORS) for room in rooms]
    best = [(size, n) for (size, n), room in zip(rooms, sum(FLOORS, ()), strict=True)
            if under(name, [room])]  # fmt: skip
    return max(best)[1] if best else None


def test_every_room_has_a_floor():
    assert all(floor_of(name) is not None for name, _ in modules() if name != "natcupy")


def test_imports_point_one_way():
    wrong = []
    for name, path in modules():
        if name == "natcupy":
            continue
        for target, line in imported(path, name):
            floor = floor_of(target)
            if floor is not None and floor > floor_of(name):
                wrong.append(f"{name}:{line} imports {target}")
    # the one door upward: a model's save_pretrained, push_to_hub and pretrained=True
    assert [w for w in wrong if not w.startswith("natcupy.zoo.base:")] == []
    assert len([w for w in wrong if w.startswith("natcupy.zoo.base:")]) <= 1


def test_heavy_packages_stay_in_their_rooms():
    for name, path in modules():
        for target, line in imported(path, name):
            rooms = ROOMS_OF.get(target.split(".")[0])
            assert rooms is None or under(name, rooms), f"{name}:{line} imports {target}"


def dotted(node):
    """The name that is called: "torch.load"; "" for what is no name."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def test_nothing_unsafe_is_used():
    """No pickle, eval, exec or shell; torch.load only as the safe unpickler."""
    for name, path in modules():
        for target, line in imported(path, name):
            assert target.split(".")[0] not in BANNED, f"{name}:{line} imports {target}"
        for node in ast.walk(parsed(path)):
            if not isinstance(node, ast.Call):
                continue
            keywords = {
                k.arg: ast.unparse(k.value)
                for k in node.keywords
                if k.arg in ("shell", "weights_only")
            }
            called = dotted(node.func)
            assert called not in ("eval", "exec", "os.system"), f"{name}:{node.lineno} {called}"
            assert keywords.get("shell") != "True", f"{name}:{node.lineno} uses a shell"
            assert called != "torch.load" or keywords.get("weights_only") == "True", name


def test_every_room_says_what_it_is():
    for name, path in modules():
        text = ast.get_docstring(parsed(path))
        assert text and len(text) > 20, f"{name} opens without a word"


IMPORT = """
import sys, torch
before = {name.split(".")[0] for name in sys.modules}
import natcupy
after = {name.split(".")[0] for name in sys.modules}
print(sorted(after - before), torch.cuda.is_initialized(), "natcupy.zoo" in sys.modules)
"""


def test_import_is_light_and_silent():
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", IMPORT], capture_output=True, text=True, cwd=ROOT
    )
    assert done.stderr == ""
    assert done.stdout == "['natcupy'] False False\n"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel as `pip install .` builds it, from a copy of the tracked files."""
    pytest.importorskip("setuptools", minversion="77", reason="building needs setuptools >= 77")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    files = subprocess.run(
        ["git", "ls-files", "-z"], capture_output=True, text=True, cwd=ROOT, check=True
    ).stdout.split("\0")
    for name in filter(None, files):
        if (ROOT / name).is_symlink():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).symlink_to((ROOT / name).readlink())
        elif (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    build = "from setuptools.build_meta import build_wheel; print(build_wheel({!r}))"
    done = subprocess.run(
        [sys.executable, "-c", build.format(str(out))], capture_output=True, text=True, cwd=source
    )
    assert done.returncode == 0, done.stderr
    return next(out.glob("*.whl"))


def test_wheel(wheel):
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"natcupy"}
    assert len(names) == len(set(names))
    for needed in (
        "natcupy/py.typed",
        "natcupy/cli/__init__.py",
        "natcupy/zoo/nat.py",
        "natcupy/hub/embedded/nat-digits/model.safetensors",
        "natcupy/hub/embedded/nat-digits/config.json",
        "natcupy/kernels/na_fwd.cu",
        "natcupy/kernels/neighborhood.cuh",
    ):
        assert needed in names
    for name, path in modules():
        inside = name.replace(".", "/")
        assert f"{inside}.py" in names or f"{inside}/__init__.py" in names, path
    assert wheel.stat().st_size < 4 << 20


def requirements():
    """Requirements of an install for development: the package's own and those of `dev`."""
    tomllib = pytest.importorskip("tomllib" if sys.version_info >= (3, 11) else "tomli")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return project["dependencies"] + project["optional-dependencies"]["dev"]


def test_everything_an_install_for_development_brings_is_pinned():
    """Each requirement, and what the installed ones require, has a pin that it allows."""
    packaging = pytest.importorskip("packaging.requirements")
    canonical = pytest.importorskip("packaging.utils").canonicalize_name
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    parsed = [packaging.Requirement(line) for line in lines if line and line[0] != "#"]
    parsed = [pin for pin in parsed if pin.marker is None or pin.marker.evaluate()]
    pins = {canonical(pin.name): str(pin.specifier).removeprefix("==") for pin in parsed}
    assert len(pins) == len(parsed)
    todo, seen = [packaging.Requirement(text) for text in requirements()], set()
    while todo:
        wanted = todo.pop()
        name = canonical(wanted.name)
        if wanted.marker and not wanted.marker.evaluate({"extra": ""}):
            continue
        assert name in pins, f"{name} has no pin in constraints.txt"
        assert wanted.specifier.contains(pins[name], prereleases=True), f"{wanted}: {pins[name]}"
        if name in seen:
            continue
        seen.add(name)
        try:
            further = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        todo += [packaging.Requirement(text) for text in further]
    assert len(seen) > 20


def test_running_from_the_checkout_or_an_install():
    import natcupy.zoo

    assert Path(natcupy.zoo.__file__).resolve().parent in (
        ROOT / "zoo",
        Path(sysconfig.get_paths()["purelib"]) / "natcupy" / "zoo",
    )
    assert "zoo" not in sys.modules and "hub" not in sys.modules
