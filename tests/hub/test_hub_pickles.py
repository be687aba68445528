"""Foreign checkpoints: plain tensors come out; code, tricks and bombs do not, and nothing runs."""

import argparse
import collections
import os
import subprocess
import sys
import zipfile

import pytest
import torch
from damage import FORMS, GADGETS, STATE, Runs, gadget_file, mutated_pickles, with_program

from natcupy.hub import pickles
from natcupy.hub.errors import HtmlPage, HubError, LfsPointer, Truncated, UnsafePickle
from natcupy.hub.pickles import read_pickle
from natcupy.hub.tensors import read_tensors


def saved(path, value, **how):
    torch.save(value, path, **how)
    return path


def refused(path, word=None):
    with pytest.raises(UnsafePickle, match=word):
        read_pickle(path)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: collections.OrderedDict(s),
        lambda s: {"state_dict": s},
        lambda s: {"model": s, "epoch": 299, "args": argparse.Namespace(lr=1e-3, name="x")},
        lambda s: {"state_dict": s, "state_dict_ema": {k: v + 1 for k, v in s.items()}},
        lambda s: {"model": {f"module.{k}": v for k, v in s.items()}},
        lambda s: {"meta": {"CLASSES": ("a", "b"), "seed": 3}, "state_dict": s, "optimizer": {}},
        lambda s: {k: torch.nn.Parameter(v) for k, v in s.items()},
    ],
)
def test_usual_wrappers(tmp_path, wrap):
    wrapped = wrap(STATE)
    read = read_pickle(saved(tmp_path / "x.pth", wrapped))
    plus = 1 if "state_dict_ema" in wrapped else 0
    assert read.tensors.keys() == STATE.keys()
    for name, tensor in STATE.items():
        assert type(read.tensors[name]) is torch.Tensor
        assert torch.equal(read.tensors[name], tensor + plus)


def test_a_module_state_dict(tmp_path):
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    read = read_pickle(saved(tmp_path / "x.bin", module.state_dict()))
    assert all(torch.equal(read.tensors[k], v) for k, v in module.state_dict().items())


def test_old_torch_is_refused_with_the_remedy():
    for version in ("2.9.1", "2.6.0+cu124", "1.13"):
        with pytest.raises(UnsafePickle, match="Upgrade torch"):
            pickles._require_torch(version)
    for version in ("2.10.0", "2.13.0+cpu", "3.0"):
        pickles._require_torch(version)


# ---------------------------------------------------------------- code


@pytest.mark.parametrize("number", range(GADGETS))
@pytest.mark.parametrize("form", FORMS)
def test_gadgets_never_run(tmp_path, number, form):
    canary = tmp_path / "canary"
    refused(gadget_file(tmp_path / "pytorch_model.bin", number, form, canary))
    assert not canary.exists()


def test_the_refusal_names_what_was_asked_for(tmp_path):
    import os

    refused(saved(tmp_path / "x.bin", Runs(os.system, "true")), r"(posix|nt)\.system")


PROGRAMS = {
    "inst": b"(S'true'\nios\nsystem\n.",
    "obj": b"(cos\nsystem\nS'true'\no.",
    "stack global": b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R.",
    "extension": b"\x80\x02\x82\x01.",
    "persistent id as text": b"Pstorage\n.",
    "second pickle after the first": b"\x80\x02}.cos\nsystem\n.",
    "build on a type": b"\x80\x02ctorch\nSize\n}q\x00b.",
    "deep": b"\x80\x02" + b"(" * 50_000 + b".",
    "no stop": b"\x80\x02}",
    "memo from nowhere": b"\x80\x02h\x63.",
    "long claims a gigabyte": b"\x80\x02\x8b\x00\x00\x00\x40.",
    "string claims a terabyte": b"\x80\x04\x8d\x00\x00\x00\x00\x00\x01\x00\x00.",
    "empty": b"",
}


@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
def test_hand_made_programs(tmp_path, program):
    refused(with_program(tmp_path / "x.pth", program))


# ---------------------------------------------------------------- odd tensors and values


def odd_values():
    yield "expanded", torch.ones(1).expand(1_000_000)
    yield "stride 0 on one axis", torch.ones(1, 5).expand(1000, 5)
    yield "overlapping", torch.ones(119).as_strided((60, 60), (1, 1))
    yield "sparse", torch.ones(3, 3).to_sparse()
    yield "csr", torch.ones(3, 3).to_sparse_csr()
    yield "complex", torch.ones(3, dtype=torch.complex64)
    yield "conjugate", torch.ones(3, dtype=torch.complex64).conj()
    yield "meta", torch.empty(10**9, device="meta")
    yield "quantized", torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)
    yield "float8", torch.ones(3).to(torch.float8_e4m3fn)
    yield "nested", torch.nested.nested_tensor([torch.ones(1), torch.ones(2)])
    yield "number", 3
    yield "text", "tensor"
    yield "list of tensors", [torch.ones(1)]
    yield "none", None


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("number", range(15))
def test_odd_tensors_are_refused(tmp_path, number):
    _, value = list(odd_values())[number]
    refused(saved(tmp_path / "x.pth", {"head.weight": value}))


def test_transposed_and_offset_views_are_fine(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    value = {"a": base.t(), "b": base[1:], "c": base[:, 1]}
    read = read_pickle(saved(tmp_path / "x.pth", value))
    assert all(torch.equal(read.tensors[k], v) for k, v in value.items())


def test_many_views_of_one_storage_are_a_bomb(tmp_path):
    base = torch.ones(100_000)
    refused(saved(tmp_path / "x.pth", {f"a{n}": base for n in range(50)}), "memory")


@pytest.mark.parametrize("key", ["../x", "a/b", "", 3, ("a",)])
def test_keys_are_dotted_names(tmp_path, key):
    refused(saved(tmp_path / "x.pth", {key: torch.ones(1)}), "keys")


@pytest.mark.parametrize("value", [[], {}, torch.ones(2), [torch.ones(2)], 7, {"state_dict": {}}])
def test_a_checkpoint_is_a_state_dict(tmp_path, value):
    refused(saved(tmp_path / "x.pth", value))


def test_doubled_names_are_refused(tmp_path):
    value = {"module.a": torch.ones(1), "a": torch.zeros(1)}
    refused(saved(tmp_path / "x.pth", value), "module")


# ---------------------------------------------------------------- the container


def test_compressed_entries_are_refused(tmp_path):
    saved(tmp_path / "a.pth", {"a": torch.zeros(1_000_000)})
    packed = zipfile.ZipFile(tmp_path / "b.pth", "w", zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(tmp_path / "a.pth") as old, packed as new:
        for item in old.infolist():
            new.writestr(item.filename, old.read(item))
    assert (tmp_path / "b.pth").stat().st_size < 20_000
    refused(tmp_path / "b.pth", "compressed")


def test_lookalikes(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    for content, kind in (
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", LfsPointer),
        (b"<html>", HtmlPage),
        (b"", Truncated),
    ):
        path.write_bytes(content)
        with pytest.raises(kind):
            read_pickle(path)


def test_truncations(tmp_path):
    data = saved(tmp_path / "x.pth", STATE).read_bytes()
    for length in range(4, len(data), 97):
        (tmp_path / "x.pth").write_bytes(data[:length])
        with pytest.raises(HubError):
            read_pickle(tmp_path / "x.pth")


def test_a_torchscript_archive_is_refused(tmp_path):
    with pytest.warns((DeprecationWarning, FutureWarning)):
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "x.pt")
    refused(tmp_path / "x.pt")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # odd escapes in damaged text
def test_mutations_raise_one_class(tmp_path):
    assert mutated_pickles(1500, 20261124, tmp_path) > 750


def test_the_child_finds_packages_where_the_parent_did(tmp_path):
    """Torch may come from PYTHONPATH (environment modules) and not from the interpreter's own."""
    path = tmp_path / "weights.pth"
    torch.save({"a": torch.ones(3)}, path)
    script = "import sys; from natcupy.hub import sandbox; sandbox.convert_pickle(*sys.argv[1:])"
    python = os.path.realpath(sys.executable)  # without this environment's packages
    done = subprocess.run(
        [python, "-c", script, str(path), str(tmp_path / "out.safetensors")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-1500:]
    assert torch.equal(read_tensors(tmp_path / "out.safetensors").tensors["a"], torch.ones(3))
