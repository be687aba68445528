"""The store of binaries within one process: keys, entries, trust, size, threads."""

import hashlib
import json
import os
import random
import stat
import string
import subprocess
import sys
import time
from pathlib import Path

import pytest
from at_once import at_once

from natcupy import cache
from natcupy.cache import CacheWarning, Store, key_of

FILE = Path(cache.__file__)

INGREDIENTS = {
    "engine": "cuda",
    "entry": "na_fwd",
    "constants": "RANK=2 SCALAR=BF16",
    "text": "extern",
    "arch": "90a",
    "form": "cubin",
    "options": "-std=c++17",
    "compiler": "NVRTC 13.0",
    "build": "V13.0.88",
    "driver": "580",
    "version": "0.1.0",
    "cpu": "x86-64-v3",
    "features": "avx2",
    "system": "linux",
}


def named(name):
    return {"engine": "test", "name": str(name)}


class Builder:
    """A build() that counts its calls."""

    def __init__(self, image):
        self.image, self.calls = image, 0

    def __call__(self):
        self.calls += 1
        return self.image


def entry_of(folder, ingredients):
    return Path(folder) / f"{key_of(ingredients)}.bin"


def test_first_call_builds_and_a_new_store_reads(tmp_path):
    build = Builder(bytes(range(256)) * 40)
    assert Store(tmp_path / "c").get_or_build(INGREDIENTS, build) == build.image
    assert Store(tmp_path / "c").get_or_build(INGREDIENTS, build) == build.image
    assert build.calls == 1
    assert Store(tmp_path / "c").describe() == {
        "folder": str(tmp_path / "c"),
        "state": "disk",
        "why": "",
        "entries": 1,
        "bytes": entry_of(tmp_path / "c", INGREDIENTS).stat().st_size,
        "limit": cache.DEFAULT_LIMIT,
        "in_memory": 0,
    }


def test_folder_and_entry_are_the_owners_alone(tmp_path):
    Store(tmp_path / "deep" / "c").get_or_build(INGREDIENTS, Builder(b"x"))
    assert [p.suffix for p in (tmp_path / "deep" / "c").iterdir()] == [".bin"]
    if os.name == "posix":
        assert stat.S_IMODE((tmp_path / "deep" / "c").stat().st_mode) == 0o700
        entry = entry_of(tmp_path / "deep" / "c", INGREDIENTS)
        assert stat.S_IMODE(entry.stat().st_mode) == 0o600


def test_importing_needs_the_standard_library_alone():
    code = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('cache', {str(FILE)!r})\n"
        "cache = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(cache)\n"
        "print(sorted({'torch', 'numpy', 'cupy', 'natcupy'} & set(sys.modules)))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "[]\n"), result.stderr


# -- keys -----------------------------------------------------------------------------------------


def test_every_ingredient_changes_the_key():
    keys = {key_of(INGREDIENTS)}
    for name in INGREDIENTS:
        keys.add(key_of({**INGREDIENTS, name: INGREDIENTS[name] + "x"}))
        keys.add(key_of({k: v for k, v in INGREDIENTS.items() if k != name}))
        keys.add(key_of({**INGREDIENTS, name + "2": ""}))
    assert len(keys) == 1 + 3 * len(INGREDIENTS)


def test_where_one_ingredient_ends_and_the_next_begins_counts():
    pairs = [
        ({"a": "bc", "d": ""}, {"a": "b", "d": "c"}),
        ({"a": '", "b": "c'}, {"a": "", "b": "c"}),
        ({"a": "\\n"}, {"a": "\n"}),
        ({"a": "é"}, {"a": "e\u0301"}),
        ({"a": "\ud800"}, {"a": "?"}),
    ]
    for one, other in pairs:
        assert key_of(one) != key_of(other)


def test_the_key_is_the_same_in_any_order_and_process():
    backwards = dict(reversed(INGREDIENTS.items()))
    assert key_of(backwards) == key_of(INGREDIENTS)
    code = (
        "import importlib.util, json, sys\n"
        f"spec = importlib.util.spec_from_file_location('cache', {str(FILE)!r})\n"
        "cache = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(cache)\n"
        "print(cache.key_of(json.loads(sys.argv[1])))\n"
    )
    for seed in "01":
        result = subprocess.run(
            [sys.executable, "-c", code, json.dumps(INGREDIENTS)],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
            check=True,
        )
        assert result.stdout.strip() == key_of(INGREDIENTS)


def test_hostile_ingredients_name_no_path(tmp_path):
    random_text = random.Random(1)
    hostile = ["../../x", "/etc/passwd", "a\0b", "\n", "\ud83d", "C:\\x", "*" * 5000, ""]
    alphabet = string.printable + "\0\u202e\U0001f600\ud800"
    hostile += ["".join(random_text.choices(alphabet, k=20)) for _ in range(200)]
    store = Store(tmp_path / "c")
    for text in hostile:
        assert store.get_or_build({"name": text, text or "-": "v"}, lambda: b"built") == b"built"
    assert {p.name for p in tmp_path.iterdir()} == {"c"}
    assert all(len(p.name) == 68 for p in (tmp_path / "c").iterdir())


@pytest.mark.parametrize("wrong", [{"a": 1}, {"a": b"x"}, {1: "a"}, {"a": None}])
def test_ingredients_that_are_not_text_are_refused(wrong, tmp_path):
    with pytest.raises(TypeError, match=r"str\(\)"):
        Store(tmp_path / "c").get_or_build(wrong, lambda: b"x")


def test_no_ingredients_are_refused(tmp_path):
    with pytest.raises(ValueError, match="at least one"):
        Store(tmp_path / "c").get_or_build({}, lambda: b"x")


@pytest.mark.parametrize("wrong", [b"", None, "text", bytearray(b"x")])
def test_a_build_that_gives_no_bytes_is_refused_and_leaves_nothing(wrong, tmp_path):
    store = Store(tmp_path / "c")
    with pytest.raises(TypeError, match="non-empty bytes"):
        store.get_or_build(INGREDIENTS, lambda: wrong)
    assert list((tmp_path / "c").iterdir()) == []
    assert store.get_or_build(INGREDIENTS, lambda: b"right") == b"right"


def test_what_build_raises_comes_through_and_the_next_call_tries_again(tmp_path):
    store = Store(tmp_path / "c")
    with pytest.raises(ZeroDivisionError):
        store.get_or_build(INGREDIENTS, lambda: 1 // 0)
    assert list((tmp_path / "c").iterdir()) == []
    assert store.get_or_build(INGREDIENTS, lambda: b"x") == b"x"


def test_discard_forgets(tmp_path):
    for store in (Store(tmp_path / "c"), Store(None)):
        build = Builder(b"x")
        store.discard(INGREDIENTS)
        store.get_or_build(INGREDIENTS, build)
        store.discard(INGREDIENTS)
        store.get_or_build(INGREDIENTS, build)
        assert build.calls == 2


def test_the_folder_may_be_deleted_at_any_time(tmp_path):
    store = Store(tmp_path / "c")
    store.get_or_build(named(1), lambda: b"1")
    entry_of(tmp_path / "c", named(1)).unlink()
    (tmp_path / "c").rmdir()
    assert store.get_or_build(named(1), lambda: b"1") == b"1"
    assert store.describe()["entries"] == 1


# -- corruption -----------------------------------------------------------------------------------


def mutants(good, other, count, seed=0):
    """`count` spoilt versions of the entry `good`; `other` is a sound entry of another key."""
    yield from (b"", b"\0", other, good + b"\0", good[1:], good[::-1], good + good)
    yield from (good[:length] for length in range(0, len(good), 7))
    rng = random.Random(seed)
    for _ in range(count):
        spoilt = bytearray(good)
        for _ in range(rng.choice((1, 1, 1, 2, 8))):
            spoilt[rng.randrange(len(spoilt))] ^= 1 << rng.randrange(8)
        if rng.random() < 0.2:
            del spoilt[rng.randrange(len(spoilt)) :]
        if rng.random() < 0.1:
            at = rng.randrange(len(spoilt) + 1)
            spoilt[at:at] = rng.randbytes(rng.randrange(1, 40))
        yield bytes(spoilt)


def test_5000_spoilt_entries_are_all_built_anew(tmp_path):
    folder = tmp_path / "c"
    image = random.Random(2).randbytes(1200)
    store = Store(folder)
    store.get_or_build(named("other"), lambda: b"the binary of another kernel")
    store.get_or_build(INGREDIENTS, lambda: image)
    entry = entry_of(folder, INGREDIENTS)
    good, other = entry.read_bytes(), entry_of(folder, named("other")).read_bytes()
    tried = 0
    for spoilt in mutants(good, other, 5000):
        if spoilt == good:
            continue
        entry.write_bytes(spoilt)
        build = Builder(image)
        assert store.get_or_build(INGREDIENTS, build) == image
        assert build.calls == 1
        tried += 1
    assert tried >= 5000
    assert entry.read_bytes() == good
    assert store.describe()["state"] == "disk"


def test_a_link_to_nowhere_is_named(tmp_path):
    (tmp_path / "link").symlink_to("nowhere")
    store = Store(tmp_path / "link" / "binaries")
    with pytest.warns(CacheWarning, match="link is not a folder, or a link to nowhere"):
        assert store.get_or_build(INGREDIENTS, lambda: b"mine") == b"mine"


# -- trust ----------------------------------------------------------------------------------------

posix = pytest.mark.skipif(os.name != "posix", reason="owners and modes are POSIX")


def assert_refused(store, match, planted=INGREDIENTS):
    """Nothing is read, one warning names the variable, and the call still gets its binary."""
    with pytest.warns(CacheWarning, match=match) as warned:
        assert store.get_or_build(planted, lambda: b"mine") == b"mine"
        assert store.get_or_build(planted, lambda: b"twice") == b"mine"
        assert store.get_or_build(named("next"), lambda: b"next") == b"next"
    assert len(warned) == 1
    assert "NATCUPY_CACHE_DIR" in str(warned[0].message)
    facts = store.describe()
    assert (facts["state"], facts["entries"], facts["in_memory"]) == ("memory", 0, 2)
    assert facts["why"] in str(warned[0].message)


@pytest.fixture
def planted(tmp_path):
    """A folder with a sound entry that holds someone else's code."""
    Store(tmp_path / "c").get_or_build(INGREDIENTS, lambda: b"theirs")
    return tmp_path / "c"


@posix
@pytest.mark.parametrize("mode", [0o777, 0o770, 0o720, 0o702])
def test_a_folder_others_can_write_is_not_read(planted, mode):
    planted.chmod(mode)
    assert_refused(Store(planted), "can be written by other users")


@posix
def test_a_folder_of_another_user_is_not_read(planted, monkeypatch):
    me = os.geteuid()
    monkeypatch.setattr(cache.os, "geteuid", lambda: me + 1)
    assert_refused(Store(planted), f"belongs to another user \\(id {me}\\)")


@posix
def test_a_folder_others_can_replace_is_not_read(planted):
    planted.parent.chmod(0o777)
    try:
        assert_refused(Store(planted), "can be written by every user")
        planted.parent.chmod(0o1777)  # with the sticky bit nobody can replace it
        assert Store(planted).get_or_build(INGREDIENTS, lambda: b"mine") == b"theirs"
    finally:
        planted.parent.chmod(0o700)


@posix
def test_an_entry_others_can_write_is_not_read(planted):
    entry_of(planted, INGREDIENTS).chmod(0o666)
    assert_refused(Store(planted), "can be written by other users")


@posix
def test_an_entry_of_another_user_is_not_read(planted, monkeypatch):
    real, entry = os.fstat, entry_of(planted, INGREDIENTS).stat().st_ino

    def fstat(file):
        info = real(file)
        fields = list(info)
        fields[stat.ST_UID] += info.st_ino == entry
        return os.stat_result(fields)

    monkeypatch.setattr(cache.os, "fstat", fstat)
    assert_refused(Store(planted), "belongs to another user")


@posix
@pytest.mark.parametrize("kind", ["symlink", "dangling", "fifo", "folder"])
def test_an_entry_that_is_no_plain_file_is_not_read(planted, kind):
    entry = entry_of(planted, INGREDIENTS)
    elsewhere = planted.parent / "elsewhere"
    entry.rename(elsewhere)
    if kind == "symlink":
        entry.symlink_to(elsewhere)
    elif kind == "dangling":
        entry.symlink_to(planted.parent / "nowhere")
    elif kind == "fifo":
        os.mkfifo(entry, 0o600)
    else:
        entry.mkdir()
    assert_refused(Store(planted), "symbolic link|not a plain file")


@posix
def test_a_symlinked_folder_is_judged_by_its_target(planted, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(planted)
    assert Store(link).get_or_build(INGREDIENTS, lambda: b"mine") == b"theirs"
    planted.chmod(0o777)
    assert_refused(Store(link), "can be written by other users")


# -- size -----------------------------------------------------------------------------------------


def age(folder, ingredients, seconds):
    then = time.time() - seconds
    os.utime(entry_of(folder, ingredients), (then, then))


def test_the_oldest_entries_go_first_and_the_limit_holds(tmp_path):
    folder, limit = tmp_path / "c", 100_000
    store = Store(folder, limit)
    for number in range(20):  # twice the limit
        store.get_or_build(named(number), lambda: b"x" * 10_000)
        age(folder, named(number), 10_000 - number)
        assert store.describe()["bytes"] <= limit + 10_400
    store.get_or_build(named("last"), lambda: b"x" * 10_000)
    assert store.describe()["bytes"] <= limit
    kept = [number for number in range(20) if entry_of(folder, named(number)).exists()]
    assert kept == list(range(12, 20))  # eight old ones and the last fill it


def test_an_entry_just_used_is_never_evicted(tmp_path):
    folder = tmp_path / "c"
    store = Store(folder, 50_000)
    for number in range(4):
        store.get_or_build(named(number), lambda: b"x" * 10_000)
        age(folder, named(number), 1000 - number)
    store.get_or_build(named(0), Builder(b"not called"))  # the oldest, used now
    for number in range(4, 8):
        store.get_or_build(named(number), lambda: b"x" * 10_000)
    left = {number for number in range(8) if entry_of(folder, named(number)).exists()}
    assert left == {0, 4, 5, 6, 7}


def test_a_full_folder_is_not_listed_for_every_entry(tmp_path, monkeypatch):
    """Thousands of entries take long to list, for a thread that others keep from running most."""
    store, listed = Store(tmp_path / "c", 640_000), []
    files = store._files
    monkeypatch.setattr(store, "_files", lambda: listed.append(1) or files())
    for number in range(30):  # 1000 bytes each, and 10 000 may come unlisted
        store.get_or_build({"n": str(number)}, lambda: b"x" * 1000)
    assert len(listed) == 1 + 2


def test_an_image_above_the_limit_stays_in_memory(tmp_path):
    store, build = Store(tmp_path / "c", 100), Builder(b"x" * 101)
    for _ in range(2):
        assert store.get_or_build(INGREDIENTS, build) == build.image
    assert build.calls == 1
    assert store.describe()["entries"] == 0


def test_what_dead_writers_left_is_swept(tmp_path):
    folder = tmp_path / "c"
    Store(folder).get_or_build(named(1), lambda: b"1")
    for name, seconds in (("a.tmp", 1e5), ("b.lock", 1e5), ("c.tmp", 5), ("d.lock", 5)):
        (folder / name).write_bytes(b"")
        then = time.time() - seconds
        os.utime(folder / name, (then, then))
    Store(folder).get_or_build(named(2), lambda: b"2")  # as the next process does
    assert {p.name for p in folder.iterdir() if p.suffix != ".bin"} == {"c.tmp", "d.lock"}


# -- threads --------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["disk", "memory"])
def test_64_threads_build_each_key_once(tmp_path, where):
    store = Store(tmp_path / "c" if where == "disk" else None)

    class Slow(Builder):
        def __call__(self):
            hashlib.pbkdf2_hmac("sha256", b"", b"", 10_000)  # lets other threads run meanwhile
            return super().__call__()

    builders = [Slow(bytes([number]) * 1000) for number in range(4)]
    wrong = []

    def ask(thread):
        for step in range(4):
            number = (thread + step) % 4
            if store.get_or_build(named(number), builders[number]) != builders[number].image:
                wrong.append((thread, number))

    at_once(ask)
    assert wrong == []
    assert [builder.calls for builder in builders] == [1, 1, 1, 1]


# -- where ----------------------------------------------------------------------------------------


@pytest.fixture
def environment(monkeypatch):
    for name in ("NATCUPY_CACHE", "NATCUPY_CACHE_DIR", "NATCUPY_CACHE_MB", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    cache._store.cache_clear()
    yield monkeypatch
    cache._store.cache_clear()


def test_the_environment_says_where(environment, tmp_path):
    environment.setenv("HOME", str(tmp_path))
    if sys.platform.startswith("linux"):
        assert cache.default_store().describe()["folder"] == f"{tmp_path}/.cache/natcupy/binaries"
    environment.setenv("NATCUPY_CACHE_DIR", str(tmp_path / "own"))
    environment.setenv("NATCUPY_CACHE_MB", "3")
    store = cache.default_store()
    assert store is cache.default_store()
    assert store.describe()["folder"] == str(tmp_path / "own" / "binaries")
    assert store.describe()["limit"] == 3 << 20


def test_switched_off_nothing_is_written_or_warned(environment, tmp_path, recwarn):
    environment.setenv("HOME", str(tmp_path))
    environment.setenv("NATCUPY_CACHE", "off")
    build = Builder(b"x")
    for _ in range(2):
        assert cache.default_store().get_or_build(INGREDIENTS, build) == b"x"
    assert cache.default_store().describe()["state"] == "off"
    assert build.calls == 1
    assert list(tmp_path.iterdir()) == []
    assert len(recwarn) == 0


def test_a_switch_that_is_neither_on_nor_off_is_told(environment, tmp_path):
    environment.setenv("HOME", str(tmp_path))
    environment.setenv("NATCUPY_CACHE", "none")
    with pytest.warns(CacheWarning, match=r"NATCUPY_CACHE must be on or off, got 'none'"):
        assert cache.default_store().describe()["state"] == "disk"


def test_without_a_home_it_works_in_memory_and_warns_once(environment):
    environment.setattr(cache.os.path, "expanduser", lambda path: path)
    build = Builder(b"x")
    with pytest.warns(CacheWarning, match="no home folder") as warned:
        for _ in range(2):
            assert cache.default_store().get_or_build(INGREDIENTS, build) == b"x"
    assert (len(warned), build.calls) == (1, 1)
    assert cache.default_store().describe()["state"] == "memory"
