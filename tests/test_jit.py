"""From spec to binary: what may reach the compiler, what it makes, what is kept. No GPU needed."""

import importlib.util
import os
import random
import string
import threading
from pathlib import Path

import pytest

from natcupy import cache
from natcupy.cuda import jit, nvrtc
from natcupy.cuda.jit import CompileError, Spec, Target

needs_nvrtc = pytest.mark.skipif(
    importlib.util.find_spec("cupy") is None,
    reason="CuPy, which brings the compiler, is not installed",
)
ARCHS = ("75", "80", "86", "89", "90a", "100a", "120a")
HERE = Path(__file__).parent
ADD = Spec("vector_add.cu", (("SCALE", 2),))


@pytest.fixture
def sources():
    with jit.use_sources(HERE):
        yield


@pytest.fixture
def folder(tmp_path):
    """A function that writes kernel files and makes them the sources."""

    def write(**files):
        for name, text in files.items():
            (tmp_path / name.replace("__", ".")).write_text(text)
        return jit.use_sources(tmp_path)

    return write


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("NATCUPY_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("NATCUPY_CACHE", raising=False)
    return cache.default_store()


# -- specs ----------------------------------------------------------------------------------------


def test_a_spec_is_its_content_in_any_order():
    one = Spec("na_fwd.cu", (("RANK", 2), ("CAUSAL", True), ("SCALAR", "BF16")))
    other = Spec("na_fwd.cu", (("SCALAR", "BF16"), ("RANK", 2), ("CAUSAL", 1)))
    assert one == other
    assert hash(one) == hash(other)
    assert one != Spec("na_fwd.cu", (("RANK", 3), ("CAUSAL", 1), ("SCALAR", "BF16")))
    assert one.entry == "na_fwd"
    assert str(one) == "na_fwd(CAUSAL=1, RANK=2, SCALAR=BF16)"


def test_a_constant_is_given_once():
    with pytest.raises(ValueError, match="once"):
        Spec("a.cu", (("RANK", 2), ("RANK", 3)))


@pytest.mark.parametrize("value", [2**31, -(2**31), 1.0, None, "FLOAT", "f32", b"F32", 10**40, [1]])
def test_a_constant_is_a_bounded_int_or_a_known_word(value):
    with pytest.raises(ValueError, match="the constant RANK must be an int from"):
        Spec("a.cu", (("RANK", value),))


class Sly(str):
    """A word by its looks; anything by its text."""

    def __format__(self, how):
        return "1\n#include </etc/passwd>"

    __str__ = __repr__ = lambda self: "1\n#include </etc/passwd>"


class SlyInt(int):
    __str__ = __repr__ = lambda self: "1\n#include </etc/passwd>"


@pytest.mark.parametrize("value", [Sly("F32"), SlyInt(3)])
def test_a_subclass_cannot_bring_its_own_text(value):
    with pytest.raises(ValueError, match="must be an int"):
        Spec("a.cu", (("RANK", value),))


def hostile_strings(count):
    rng = random.Random(7)
    pieces = [
        "\n",
        "\r",
        "\0",
        "#",
        "\\",
        '"',
        "'",
        "*/",
        "/*",
        "//",
        ";",
        "}",
        "(",
        " ",
        "\t",
        "$",
    ]
    pieces += ["\u2028", "\u202e", "\U0001f600", "\ud800", "é", "%s", "-DX", "..", "/", "??/", "`"]
    pieces += ["#include </etc/passwd>", "1\n#define Y", "__asm__", "BF16 ", "F32\n", "RANK\n"]
    for _ in range(count):
        parts = [rng.choice(pieces)]
        parts += [
            "".join(rng.choices(string.ascii_letters + string.digits + "_", k=rng.randrange(6)))
        ]
        parts += rng.choices(pieces, k=rng.randrange(3))
        rng.shuffle(parts)
        yield "".join(parts)


def test_10000_hostile_strings_never_reach_the_compiler(monkeypatch):
    reached = []
    monkeypatch.setattr(nvrtc, "_run", lambda *args, **options: reached.append(args))
    tried = 0
    for text in hostile_strings(2500):
        attempts = (
            lambda text=text: Spec(text),
            lambda text=text: Spec("na_fwd.cu", ((text, 1),)),
            lambda text=text: Spec("na_fwd.cu", (("RANK", text),)),
            lambda text=text: jit.compile_spec(Spec("na_fwd.cu"), text),
        )
        for attempt in attempts:
            with pytest.raises(ValueError):
                attempt()
            tried += 1
    assert tried == 10_000
    assert reached == []


# -- text -----------------------------------------------------------------------------------------


def test_prelude_headers_and_lines(folder):
    with folder(
        k__cu='#include "a.cuh"\n#include "b.cuh"  // twice\nint last = __LINE__;\n',
        a__cuh='#pragma once\n#include "b.cuh"\nint a;\n',
        b__cuh="int b;\n",
    ):
        assert jit.source_text(Spec("k.cu", (("B", -3), ("A", "F16")))) == (
            '#define A F16\n#define B (-3)\n#line 1 "k.cu"\n'
            '#line 1 "a.cuh"\n\n#line 1 "b.cuh"\nint b;\n#line 3 "a.cuh"\nint a;\n'
            '#line 2 "k.cu"\n#line 3 "k.cu"\nint last = __LINE__;\n'
        )


@pytest.mark.parametrize(
    "line",
    [
        "#include <cuda_fp16.h>",
        "#include </etc/passwd>",
        '#include "../x.cuh"',
        '#include "/etc/passwd"',
        '  #  include "x.h"',
        "#include HEADER",
        '#if 1\n#include "a.cuh"\n#endif',
    ],
)
def test_includes_that_cannot_be_pasted_are_refused(folder, line):
    with folder(k__cu=f"int first;\n{line}\n", a__cuh=""), pytest.raises(ValueError, match="line"):
        jit.source_text(Spec("k.cu"))


def test_a_missing_file_is_named(folder):
    with folder(), pytest.raises(FileNotFoundError, match=r"nowhere\.cu"):
        jit.source_text(Spec("nowhere.cu"))


def test_sources_are_the_packages_own_by_default():
    from importlib import resources

    with jit.use_sources(HERE):
        assert "SCALE" in jit.source_text(ADD)
    names = [item.name for item in resources.files("natcupy.kernels").iterdir()]
    for name in names:
        if name.endswith(".cu"):
            assert f'#line 1 "{name}"' in jit.source_text(Spec(name))
    with pytest.raises(FileNotFoundError):
        jit.source_text(ADD)


# -- compiling ------------------------------------------------------------------------------------


@needs_nvrtc
@pytest.mark.parametrize("arch", ARCHS)
def test_a_kernel_compiles_for_every_architecture_without_a_gpu(arch, sources):
    if int(arch.rstrip("a")) not in jit.toolkit().archs:
        pytest.skip(f"this NVRTC {jit.toolkit().version} does not know sm_{arch}")
    compiled = jit.compile_spec(ADD, arch)
    assert compiled.warnings == ()
    assert compiled.image[:4] == b"\x7fELF"
    assert b"vector_add" in compiled.image
    usage = jit.resource_usage(compiled.log)["vector_add"]
    assert usage.arch == arch
    assert 0 < usage.registers <= 32
    assert (usage.stack, usage.spill_stores, usage.spill_loads, usage.shared) == (0, 0, 0, 0)
    text = jit.compile_spec(ADD, arch, ptx=True).image.decode()
    assert f".target sm_{arch}" in text
    assert ".visible .entry vector_add(" in text


@needs_nvrtc
def test_the_image_is_the_same_each_time_and_whole(sources):
    images = {jit.compile_spec(ADD, "80").image for _ in range(3)}
    assert len(images) == 1
    image = images.pop()
    program_at, section_at = (int.from_bytes(image[at : at + 8], "little") for at in (32, 40))
    size, count = (int.from_bytes(image[at : at + 2], "little") for at in (54, 56))
    section_size, sections = (int.from_bytes(image[at : at + 2], "little") for at in (58, 60))
    assert len(image) == max(program_at + size * count, section_at + section_size * sections)


def test_only_a_cubin_that_is_one_byte_short_is_mended():
    head = bytearray(b"\x7fELF" + bytes(60))
    head[32:40] = (64).to_bytes(8, "little")
    head[54:56], head[56:58] = (56).to_bytes(2, "little"), (1).to_bytes(2, "little")
    whole = bytes(head) + bytes(56)
    assert nvrtc._whole_cubin(whole[:-1]) == whole
    for image in (whole, whole + b"\0", whole[:-2], b"\x7fELF", b"", b"// PTX text" * 20):
        assert nvrtc._whole_cubin(image) == image


@needs_nvrtc
def test_line_info_gives_the_interpreter_source_lines(sources):
    text = jit.compile_spec(ADD, "80", ptx=True, line_info=True).image.decode()
    assert "vector_add.cu" in text
    assert ".loc" in text


@needs_nvrtc
def test_an_error_shows_spec_options_and_the_line_in_its_own_file(folder, monkeypatch):
    monkeypatch.delenv("NATCUPY_DEBUG", raising=False)
    header = "int fine;\nWRONG here;\n"
    files = folder(k__cu='#include "h.cuh"\nint x;\n', h__cuh=header)
    with files, pytest.raises(CompileError) as error:
        jit.compile_spec(Spec("k.cu", (("RANK", 2),)), "80")
    message = str(error.value)
    assert "k(RANK=2) for sm_80" in message
    assert "-std=c++17" in message
    assert "h.cuh(2): error" in message
    assert "NATCUPY_DEBUG=1" in message


@needs_nvrtc
def test_debug_keeps_the_source_and_the_whole_log(folder, monkeypatch, tmp_path):
    monkeypatch.setenv("NATCUPY_DEBUG", "1")
    monkeypatch.setattr(nvrtc.tempfile, "tempdir", str(tmp_path))
    wrong = "\n".join(f"WRONG{number} here;" for number in range(60))
    with folder(k__cu=wrong), pytest.raises(CompileError) as error:
        jit.compile_spec(Spec("k.cu"), "80")
    kept = Path(str(error.value).rpartition("kept in ")[2].rstrip("."))
    assert (kept / "k.cu").read_text().startswith('#line 1 "k.cu"\nWRONG0')
    log = (kept / "k.cu.log").read_text()
    shown = [line for line in str(error.value).splitlines() if line.startswith("    ")]
    assert len(shown) == nvrtc.LOG_LINES < len(log.splitlines())
    assert shown[-1].strip() == log.splitlines()[-1].strip()
    if os.name == "posix":
        assert kept.stat().st_mode & 0o077 == 0


def test_paths_in_messages_are_shortened():
    for text, short in (
        ("/home/me/secret/k.cu(3): error: x", "k.cu(3): error: x"),
        ('cannot open "/home/me/a b/x.h"', None),
        (r"C:\Users\me\k.cu(1): error", "k.cu(1): error"),
        ("a / b and k.cu(3)", "a / b and k.cu(3)"),
    ):
        result = nvrtc._PATH.sub("", text)
        assert "/home/me" not in result and "Users" not in result
        assert short is None or result == short
    kit = nvrtc.Toolkit(nvrtc, (13, 0), (75,), "")
    refused = nvrtc._RefusedError("status", "line\n/home/me/secret/k.cu(3): error: x")
    message = nvrtc._explain(refused, "", "k.cu", ("-arch=sm_80",), "k for sm_80", kit)
    assert "\n    k.cu(3): error: x\n" in message


LOG = """
ptxas info    : 0 bytes gmem, 40 bytes cmem[4]
ptxas info    : Compiling entry function 'one' for 'sm_90a'
ptxas info    : Function properties for one
    96 bytes stack frame, 12 bytes spill stores, 20 bytes spill loads
ptxas info    : Used 255 registers, used 3 barriers, 96 bytes cumulative stack size, 4096 bytes smem
ptxas info    : Compile time = 12.500 ms
ptxas info    : Function properties for helper
    8 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Compiling entry function 'two' for 'sm_90a'
ptxas info    : Function properties for two
ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 8 registers
ptxas info    : (C7519) Potential Performance Loss: warpgroup.arrive has been injected in 'two'
k.cu(3): warning #177-D: variable "x" was declared but never referenced
"""


def test_the_log_is_read():
    usage = jit.resource_usage(LOG)
    assert usage["one"] == jit.Usage("90a", 255, 3, 4096, 96, 12, 20, 12.5)
    assert usage["two"] == jit.Usage("90a", 8, 0, 0, 0, 0, 0, 0.0)
    assert set(usage) == {"one", "two"}
    assert [line[:12] for line in jit.Compiled(b"", LOG).warnings] == [
        "ptxas info  ",
        "k.cu(3): war",
    ]
    assert jit.resource_usage("") == {}


@needs_nvrtc
def test_real_spills_and_warnings_are_seen(folder):
    body = "".join(f"  x[{i}] = p[{i}];\n" for i in range(64))
    body += "  int i = p[99];\n  x[i] += 1;\n  p[0] = x[p[98]];\n  int unused;\n"
    with folder(k__cu=f'extern "C" __global__ void k(int* p) {{\n  int x[64];\n{body}}}\n'):
        compiled = jit.compile_spec(Spec("k.cu"), "80")
    assert jit.resource_usage(compiled.log)["k"].stack >= 256
    assert len(compiled.warnings) == 1


# -- keeping --------------------------------------------------------------------------------------


@needs_nvrtc
def test_a_binary_is_compiled_once_and_found_by_another_store(sources, store, monkeypatch):
    compiles = []
    real = jit.compile_spec
    monkeypatch.setattr(
        jit,
        "compile_spec",
        lambda *args, **options: compiles.append(args) or real(*args, **options),
    )
    images = {jit.binary(ADD, Target("80")) for _ in range(3)}
    cache._store.cache_clear()
    images.add(jit.binary(ADD, Target("80")))
    assert len(images) == len(compiles) == 1
    assert jit.binary(ADD, Target("80", ptx=True)).startswith(b"//")
    assert len(compiles) == 2
    assert cache.default_store().describe()["entries"] == 2


@needs_nvrtc
def test_whatever_decides_the_binary_changes_its_key(folder, monkeypatch):
    def key(spec=ADD, target=Target("80")):  # noqa: B008
        return cache.key_of(jit.ingredients(spec, target))

    plain = {"vector_add__cu": '#include "h.cuh"\n', "h__cuh": "int h;\n", "other__cu": ""}
    with folder(**plain):
        keys = [key(), key(Spec(ADD.source, (("SCALE", 3),))), key(Spec("other.cu", ADD.constants))]
        keys += [key(Spec(ADD.source, (*ADD.constants, ("MORE", 0))))]
        keys += [key(target=Target("86")), key(target=Target("80", ptx=True))]
        keys += [key(target=Target("90a")), key(target=Target("90"))]
        monkeypatch.setattr(nvrtc, "OPTIONS", ("-std=c++20",))
        keys += [key()]
        monkeypatch.undo()
        kit = jit.toolkit()
        for change in ({"version": (99, 1)}, {"build": "V99.1.2"}):
            other = nvrtc.Toolkit(**{**vars(kit), **change})
            monkeypatch.setattr(jit, "toolkit", lambda other=other: other)
            keys += [key()]
        monkeypatch.undo()
        assert key() == keys[0]
    with folder(**{**plain, "vector_add__cu": '#include "h.cuh"\n\n'}):
        keys += [key()]
    with folder(**{**plain, "h__cuh": "int h; \n"}):
        keys += [key()]
    assert len(keys) == len(set(keys)) == 13


@needs_nvrtc
def test_many_are_compiled_in_parallel_each_once(sources, store):
    specs = [Spec("vector_add.cu", (("SCALE", number),)) for number in range(6)]
    seen = []
    images = jit.compile_many(
        specs + specs, "80", workers=3, progress=lambda *args: seen.append(args)
    )
    assert list(images) == specs
    assert [(done, total) for done, total, _ in seen] == [(number, 6) for number in range(1, 7)]
    assert {spec for *_, spec in seen} == set(specs)
    assert all(jit.compile_spec(spec, "80").image == image for spec, image in images.items())
    assert store.describe()["entries"] == 6


@needs_nvrtc
def test_one_failure_among_many_is_raised(sources, store):
    specs = [ADD, Spec("vector_add.cu")]  # without SCALE it cannot compile
    with pytest.raises(CompileError, match="SCALE"):
        jit.compile_many(specs, Target("80"), workers=2)
    assert threading.active_count() < 20


@needs_nvrtc
def test_a_long_compile_says_so_once_and_when_it_is_done(sources, store, monkeypatch, caplog):
    told = threading.Event()
    monkeypatch.setattr(jit, "PATIENCE", 0.0)
    real, tell = jit.compile_spec, jit._Patience._tell
    monkeypatch.setattr(jit._Patience, "_tell", lambda self: (tell(self), told.set()))
    monkeypatch.setattr(
        jit, "compile_spec", lambda *args, **options: told.wait(60) and real(*args, **options)
    )
    jit.binary(ADD, Target("80"))
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2
    assert "compiling vector_add(SCALE=2) for sm_80" in messages[0]
    assert " took " in messages[1]
