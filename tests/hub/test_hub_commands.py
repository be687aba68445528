"""The commands push, pull, convert and publish, with the real client and a local Hub."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from small import CONFIGS, invented, same

import natcupy
from natcupy.cli import main
from natcupy.hub import card, convert, converting, sandbox, weights
from natcupy.hub.client import Access
from natcupy.hub.errors import CheckpointError, NotFound, UnsafePickle
from natcupy.hub.files import sha256_file
from natcupy.hub.publish import publish
from natcupy.hub.tensors import read_tensors, write_tensors

ALICE = "hf_alice"


@pytest.fixture
def login(monkeypatch):
    """Alice is logged in, as `hf auth login` or HF_TOKEN leave it."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", False)
    monkeypatch.setenv("HF_TOKEN", ALICE)


def run(capsys, *arguments):
    """Exit status, the JSON of stdout, stderr."""
    status = main([*map(str, arguments), "--json"])
    captured = capsys.readouterr()
    return status, json.loads(captured.out) if captured.out else None, captured.err


# ---------------------------------------------------------------- push and pull


def test_push_and_pull(hub, login, tmp_path, capsys):
    model = invented("nat")
    folder = model.save_pretrained(tmp_path / "model")
    status, done, _ = run(
        capsys, "push", folder, "me/mine", "--license", "mit", "--metric", "accuracy=0.5",
        "--metric", "f1=0.25", "--dataset", "cifar10", "--trained-on", "cifar10", "--tag", "fine",
        "--private",
    )  # fmt: skip
    assert status == 0 and done["commit"] == hub.repos["me/mine"].refs["main"]
    assert hub.repos["me/mine"].private
    meta = card.stated(hub.tree("me/mine")["README.md"].decode())
    assert meta["license"] == "mit" and meta["datasets"] == ["cifar10"]
    assert len(meta["model-index"][0]["results"]) == 2
    cache = ("--cache-dir", tmp_path / "cache")
    status, done, _ = run(capsys, "pull", "me/mine", tmp_path / "copy", *cache)
    assert status == 0 and set(done["files"]) == set(hub.tree("me/mine")) - {".gitattributes"}
    same(natcupy.from_pretrained(tmp_path / "copy").state_dict(), model.state_dict())
    assert (tmp_path / "copy/model.safetensors").read_bytes() == hub.tree("me/mine")[
        "model.safetensors"
    ]
    assert main(["pull", "me/mine", *map(str, cache)]) == 0
    assert "model.safetensors" in capsys.readouterr().out
    status, again, _ = run(capsys, "push", folder, "me/mine", "--revision", "dev")
    assert status == 0 and again["branch"] == "dev"
    status, _, error = run(capsys, "push", folder, "not a name")
    assert status == 1 and "owner/name" in error
    status, _, error = run(capsys, "pull", tmp_path / "copy")
    assert status == 1 and "here already" in error


def test_a_card_in_the_folder_goes_along(hub, login, tmp_path, capsys):
    folder = invented("nat").save_pretrained(tmp_path / "model")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Written by hand\n")
    assert run(capsys, "push", folder, "me/mine")[0] == 0
    assert hub.tree("me/mine")["README.md"].endswith(b"# Written by hand\n")


def test_what_a_generated_card_says_goes_along(hub, login, tmp_path, capsys):
    """With the weights: numbers, training, base and its commit; not the name of the folder."""
    invented("nat").push_to_hub("me/base", token=ALICE, license="cc-by-nc-4.0")
    tuned = natcupy.from_pretrained("me/base", num_classes=3, cache_dir=tmp_path / "cache")
    folder = tuned.save_pretrained(
        tmp_path / "model", metrics={"accuracy": 0.91}, dataset="flowers", datasets=["flowers"],
        tags=["petals"], training={"recipe": "finetune", "epochs": "20"},
    )  # fmt: skip
    assert run(capsys, "push", folder, "me/flowers")[0] == 0
    local, there = (folder / "README.md").read_text(), hub.tree("me/flowers")["README.md"].decode()
    stated = card.stated(there)
    assert {**stated, "model-index": 0} == {**card.stated(local), "model-index": 0}
    assert stated["model-index"][0]["results"] == card.stated(local)["model-index"][0]["results"]
    assert stated["base_commit"] == tuned.source.commit
    assert stated["training"] == {"recipe": "finetune", "epochs": "20"}
    assert card.is_generated(there) and 'from_pretrained("me/flowers")' in there
    status, _, _ = run(capsys, "push", folder, "me/flowers", "--tag", "roses", "--metric",
                       "accuracy=0.5", "--dataset", "roses")  # fmt: skip
    again = card.stated(hub.tree("me/flowers")["README.md"].decode())
    assert status == 0 and again["tags"][-1] == "roses" and again["base_model"] == "me/base"
    assert [r["dataset"]["type"] for r in again["model-index"][0]["results"]] == ["roses"]


def test_the_origin_of_a_converted_model_goes_along(hub, login, tmp_path, capsys):
    source = checkpoint(tmp_path / "nat_mini.pth", natcupy.create_model("nat-mini", num_classes=3))
    assert run(capsys, "convert", source, tmp_path / "out")[0] == 0
    assert run(capsys, "push", tmp_path / "out", "me/mini")[0] == 0
    told = f"Converted from `nat_mini.pth`, SHA-256 `{sha256_file(source)}`"
    assert told in hub.tree("me/mini")["README.md"].decode()


def test_the_card_is_that_of_the_folder_that_was_loaded(hub, login, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    edited = "---\nlicense: mit\n---\n# Mine\n"
    (invented("nat").save_pretrained(tmp_path / "m") / "README.md").write_text(edited)
    assert run(capsys, "push", "~/m", "me/tilde")[0] == 0
    assert hub.tree("me/tilde")["README.md"] == edited.encode()
    other = invented("nat").save_pretrained(tmp_path / "nat-digits")
    (other / "README.md").write_text("# Of another model\n")
    assert run(capsys, "push", "nat-digits", "me/digits")[0] == 0
    assert card.is_generated(hub.tree("me/digits")["README.md"].decode())


def test_a_pull_of_shards_replaces_one_file(hub, tmp_path):
    from natcupy.hub.pull import pull

    model = invented("dinat")
    target = model.save_pretrained(tmp_path / "x")
    model.push_to_hub("me/mine", token=ALICE, max_shard_bytes=8000)
    done = pull("me/mine", target, access=Access(cache_dir=tmp_path / "cache"))
    assert not (target / "model.safetensors").exists() and len(done.files) > 5
    same(natcupy.from_pretrained(target).state_dict(), model.state_dict())
    with pytest.raises(NotFound, match="here already"):
        pull("nat-digits")


# ---------------------------------------------------------------- convert


def checkpoint(path, model, layout="natcupy"):
    state = model.state_dict()
    if layout == "transformers":
        state = convert.to_transformers(state, "nat.")
    torch.save({"model": state}, path)
    return path


def test_a_checkpoint_that_fits_nothing_is_named_as_the_user_names_it(tmp_path, capsys):
    source = checkpoint(tmp_path / "mine.pth", invented("nat"))
    status, _, error = run(capsys, "convert", source, tmp_path / "out")
    assert status == 1 and f"{source} has the shapes of no model" in error
    assert not (tmp_path / "out").exists()


def test_another_librarys_model_is_told(tmp_path):
    for act in (natcupy.save_pretrained, natcupy.push_to_hub):
        with pytest.raises(TypeError, match=r"one of natcupy's zoo .*, got Linear"):
            act(torch.nn.Linear(2, 2), str(tmp_path / "x") if "save" in act.__name__ else "me/x")
    assert not (tmp_path / "x").exists()


def test_a_misspelt_architecture_names_the_nearest(tmp_path, capsys):
    source = checkpoint(tmp_path / "a.pth", invented("nat"))
    words = ["convert", str(source), str(tmp_path / "out"), "--architecture", "nat-minni"]
    assert main(words) == 1 and "(near: nat-mini)" in capsys.readouterr().err


def test_convert_tells_how_to_name_the_architecture(tmp_path, capsys):
    source = checkpoint(tmp_path / "mine.pth", natcupy.create_model("nat-mini"))
    status, _, error = run(capsys, "convert", source, tmp_path / "out")
    assert status == 1 and f"{source} fits nat-mini, dinat-mini" in error
    assert "natcupy convert FILE FOLDER --architecture nat-mini" in error
    status, done, _ = run(
        capsys, "convert", source, tmp_path / "out", "--architecture", "dinat-mini"
    )
    assert status == 0 and done["architecture"] == "dinat_mini"


def test_convert_a_checkpoint(tmp_path, capsys, no_sockets):
    torch.manual_seed(0)
    model = natcupy.create_model("nat-mini", num_classes=3)
    source = checkpoint(tmp_path / "nat_mini.pth", model)
    status, done, _ = run(capsys, "convert", source, tmp_path / "out")
    assert status == 0 and done["source_sha256"] == sha256_file(source)
    assert done["sha256"] == sha256_file(tmp_path / "out/model.safetensors")
    assert done["tensors"] == len(model.state_dict()) and done["largest_difference"] == 0
    same(natcupy.from_pretrained(tmp_path / "out").state_dict(), model.state_dict())
    text = (tmp_path / "out/README.md").read_text()
    assert done["source_sha256"] in text and "`nat_mini.pth`" in text and 'license: "mit"' in text
    small = invented("nat").save_pretrained(tmp_path / "small")
    assert main(["convert", str(small), str(tmp_path / "out")]) == 0
    assert "equal bit by bit" in capsys.readouterr().out


def test_convert_keeps_an_edited_card(tmp_path, capsys, caplog):
    folder = invented("nat").save_pretrained(tmp_path / "in")
    assert run(capsys, "convert", folder, tmp_path / "out")[0] == 0
    assert run(capsys, "convert", folder, tmp_path / "out")[0] == 0 and caplog.text == ""
    (tmp_path / "out/README.md").write_text("# Hours of work\n")
    invented("nat", 1).save_pretrained(folder)
    assert run(capsys, "convert", folder, tmp_path / "out")[0] == 0
    assert (tmp_path / "out/README.md").read_text() == "# Hours of work\n"
    assert f"{tmp_path / 'out'} keeps its edited README.md" in caplog.text
    back = natcupy.from_pretrained(tmp_path / "out")
    same(back.state_dict(), invented("nat", 1).state_dict())


@pytest.mark.parametrize("layout", ["transformers", "backbone", "natcupy"])
def test_every_layout_is_proven_equal(tmp_path, layout):
    name = "backbone" if layout == "backbone" else "dinat"
    model = invented(name)
    folder = model.save_pretrained(tmp_path / "in")
    state = dict(model.state_dict())
    if layout == "transformers":
        state = convert.to_transformers(state, "dinat.")
    if layout == "backbone":
        state = {**convert.to_backbone(state), "decode_head.weight": torch.zeros(3)}
    (folder / "model.safetensors").unlink()
    write_tensors(state, folder / "model.safetensors")
    done = converting.convert_checkpoint(folder, tmp_path / "out")
    assert done.layout == layout and done.tensors >= len(model.state_dict())
    same(natcupy.from_pretrained(tmp_path / "out").state_dict(), model.state_dict())


def test_a_conversion_that_changes_a_number_is_noticed(tmp_path, monkeypatch):
    folder = invented("nat").save_pretrained(tmp_path / "in")
    real = converting.write

    def bent(package, target, overwrite_card):
        target = real(package, target, overwrite_card)
        path = target / "model.safetensors"
        tensors = dict(read_tensors(path).tensors)
        tensors["head.bias"] = torch.nextafter(tensors["head.bias"], torch.tensor(9.0))
        path.unlink()
        write_tensors(tensors, path)
        return target

    monkeypatch.setattr(converting, "write", bent)
    with pytest.raises(CheckpointError, match=r"head\.bias differ"):
        converting.convert_checkpoint(folder, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    old = invented("dinat").save_pretrained(tmp_path / "old")
    before = {path.name: path.read_bytes() for path in old.iterdir()}
    with pytest.raises(CheckpointError, match="Nothing was written"):
        converting.convert_checkpoint(folder, old)
    assert {path.name: path.read_bytes() for path in old.iterdir()} == before


def test_a_conversion_without_room_tells_where(tmp_path, monkeypatch, capsys):
    """The folder that was asked for, not the temporary one; and nothing is left."""
    folder = invented("nat").save_pretrained(tmp_path / "in")

    def full(package, target, overwrite_card):
        raise OSError(28, "No space left on device", str(target / "config.json"))

    monkeypatch.setattr(converting, "write", full)
    assert main(["convert", str(folder), str(tmp_path / "no" / "out")]) == 1
    told = f"natcupy: error: {tmp_path / 'no' / 'out'}: No space left on device\n"
    assert capsys.readouterr().err == told
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_checkpoint_whose_copy_cannot_be_written(tmp_path):
    """The child's error is the system's, which says nothing against the checkpoint."""
    source = tmp_path / "x.pth"
    torch.save({"a": torch.ones(2)}, source)
    with pytest.raises(FileNotFoundError) as caught:
        sandbox.convert_pickle(source, tmp_path / "none" / "y")
    assert caught.value.filename == str(tmp_path / "none" / "y")


def test_offline_mode_is_told_as_such(monkeypatch, capsys):
    """Also to who checks or pushes, which no cache could answer."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_TOKEN", "hf_invented")
    for words in (["verify", "me/absent"], ["push", "nat-digits", "me/absent"]):
        assert main(words) == 1
        assert "the Hub is switched off (offline mode)" in capsys.readouterr().err


class Gadget:
    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return (os.system, (f"touch {self.canary}",))


def test_hostile_checkpoints_run_nothing(tmp_path, capsys):
    canary = tmp_path / "canary"
    source = tmp_path / "bad.pth"
    torch.save({"model": Gadget(canary)}, source)
    status, done, error = run(capsys, "convert", source, tmp_path / "out")
    assert status == 1 and done is None and "system" in error
    assert not canary.exists() and not (tmp_path / "out").exists()
    torch.load(source, weights_only=False)  # the file does bite
    assert canary.exists()


def test_a_checkpoint_that_does_not_fit_its_limits(tmp_path, monkeypatch):
    """The child's memory and time are bounded; its death is an error, not a second attempt."""
    source = checkpoint(tmp_path / "x.pth", invented("nat"))
    monkeypatch.setattr(sandbox, "_KEPT", ())  # the child's environment can be empty, too
    target = tmp_path / "out.safetensors"
    assert sandbox.convert_pickle(source, target) == sha256_file(source)
    assert read_tensors(target).tensors.keys() == invented("nat").state_dict().keys()
    if not Path("/proc/self/statm").is_file():
        pytest.skip("memory limits are set where /proc says how much is in use")
    code = (
        "import sys\nfrom natcupy.hub import sandbox\n"
        "def greedy(path):\n    return [bytearray(1 << 28) for _ in range(64)]\n"
        "sandbox.read_pickle = greedy\nsys.exit(sandbox.main(*sys.argv[1:]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, source, target, "60"], check=False, capture_output=True,
        text=True, env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    assert done.returncode == 1 and json.loads(done.stdout)["error"] == "MemoryError"
    with pytest.raises(UnsafePickle, match="limits"):
        sandbox._understood(done, source)
    assert not target.exists()


def test_the_child_has_no_token(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    seen = {}

    def spy(command, env, **how):
        seen.update(env)
        return subprocess.CompletedProcess(command, 0, json.dumps({"sha256": "0"}), "")

    monkeypatch.setattr(sandbox.subprocess, "run", spy)
    sandbox.convert_pickle(tmp_path / "x.pth", tmp_path / "y")
    assert "hf_secret" not in seen.values() and "HF_TOKEN" not in seen and "PYTHONPATH" in seen


def test_bombs_are_refused(tmp_path):
    source = tmp_path / "bomb.pth"
    with zipfile.ZipFile(source, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", b"\0" * (1 << 24))
    with pytest.raises(UnsafePickle, match="compressed"):
        sandbox.convert_pickle(source, tmp_path / "y")


# ---------------------------------------------------------------- publish


@pytest.fixture
def tiny_release(monkeypatch):
    """The table, with the architecture of one row made small (the full one takes seconds)."""
    config = CONFIGS["nat"]
    real = natcupy.zoo.MODELS["nat_mini"]

    def nat_mini(**overrides):
        model = natcupy.zoo.build_model(config, real(**{}).pretrained_cfg)
        model.pretrained_cfg["num_classes"] = config.num_classes
        return model

    monkeypatch.setitem(natcupy.zoo.MODELS, "nat_mini", nat_mini)
    from natcupy.hub import architecture

    architecture._default_facts.cache_clear()
    architecture._zoo_configs.cache_clear()
    yield
    architecture._default_facts.cache_clear()
    architecture._zoo_configs.cache_clear()


def test_publish(hub, login, tiny_release, tmp_path, capsys):
    model = invented("nat")
    checkpoint(tmp_path / "pytorch_model.bin", model, "transformers")
    theirs = {
        "model_type": "nat", "embed_dim": 8, "depths": [1, 2], "num_heads": [1, 2],
        "kernel_size": 3, "id2label": {str(i): f"thing {i}" for i in range(5)},
    }  # fmt: skip
    hub.commit("shi-labs/nat-mini-in1k-224", {
        "config.json": json.dumps(theirs).encode(),
        "pytorch_model.bin": (tmp_path / "pytorch_model.bin").read_bytes(),
    })  # fmt: skip
    common = ("--org", "me", "--cache-dir", tmp_path / "cache")
    assert main(["publish", "nat-mini", *map(str, common), "--dry-run"]) == 0
    assert "dry run" in capsys.readouterr().out and "me/nat_mini.in1k" not in hub.repos
    status, [entry], _ = run(capsys, "publish", "nat-mini", *common)
    assert status == 0 and entry["repo"] == "me/nat_mini.in1k"
    made = entry["conversion"]
    assert made["largest_difference"] == 0 and made["layout"] == "transformers"
    assert made["source_sha256"] == sha256_file(tmp_path / "pytorch_model.bin")
    text = hub.tree("me/nat_mini.in1k")["README.md"].decode()
    meta = card.stated(text)
    measured = meta["model-index"][0]["results"][0]
    assert measured["metrics"][0]["value"] == 81.8 and meta["license"] == "mit"
    assert measured["dataset"]["type"] == "ILSVRC/imagenet-1k"
    assert made["source_sha256"] in text and "`shi-labs/nat-mini-in1k-224`" in text
    back = natcupy.from_pretrained("me/nat_mini.in1k", cache_dir=tmp_path / "cache")
    same(back.state_dict(), model.state_dict())
    assert back.pretrained_cfg["label_names"][4] == "thing 4"
    again = list(publish(["nat-mini"], "me", access=Access(ALICE, tmp_path / "cache")))
    assert again[0].pushed.files == ()


def test_publish_checks_names_first_and_goes_on_after_a_failure(hub, tmp_path, capsys):
    access = Access(ALICE, tmp_path / "cache")
    with pytest.raises(ValueError, match="nat-tiny"):
        list(publish(["nat-mini", "nat-tinny"], "me", access=access))
    with pytest.raises(ValueError, match="owner/name"):
        list(publish(["nat-mini"], "no/such", access=access))
    assert hub.requests == []
    done = list(publish(["nat-mini", "vitrpb-small"], "me", dry_run=True, access=access))
    assert "does not exist" in done[0].error and ".pth file only" in done[1].error
    status, entries, error = run(capsys, "publish", "vitrpb-small", "--org", "me", "--dry-run")
    assert status == 1 and entries[0]["error"] and "vitrpb_small.in1k" in error


def test_the_table_of_a_dense_model(capsys, no_sockets):
    assert main(["publish", "upernet-nat-mini", "--org", "me", "--dry-run"]) == 1
    told = capsys.readouterr()
    assert "upernet_nat_mini.ade20k  me/upernet_nat_mini.ade20k" in told.out
    assert "create_model('upernet-nat-mini')" in told.err and no_sockets == []


def test_originals_are_preferred(tiny_release, tmp_path, no_sockets):
    model = invented("nat")
    checkpoint(tmp_path / "nat_mini.pth", model)
    [done] = publish(["nat-mini"], "me", dry_run=True, originals=tmp_path)
    assert done.error is None and done.pushed is None
    assert done.conversion.source.endswith("nat_mini.pth")
    assert done.conversion.tensors == len(model.state_dict())


def test_every_row_has_a_dataset_for_its_card():
    from natcupy.hub import publish as publishing

    for row in weights.WEIGHTS.values():
        stated = publishing._facts(row, f"me/{row.tag}")
        assert stated["datasets"] and stated["license"] == "mit"
        assert bool(stated["metrics"]) == (row.top1 is not None)
