"""The real Hub client against a local Hub: what arrives is one commit, whole, or a clear error."""

import hashlib
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small import folder_of, invented, same

import natcupy
from natcupy import hub as hub_package
from natcupy.hub import client, convert, download
from natcupy.hub.download import Access
from natcupy.hub.errors import (
    BadToken,
    CheckpointError,
    Corrupt,
    Gated,
    LfsPointer,
    NotFound,
    Offline,
    Unavailable,
    UnsafePickle,
)

ROOT = Path(__file__).parents[2]


def paths(hub, word=""):
    return [path for _, path, _, _ in hub.requests if word in path]


# ---------------------------------------------------------------- loading


def test_a_natcupy_repository(hub, load, files, caplog):
    commit = hub.commit("me/mine", files)
    with caplog.at_level(logging.INFO):
        model = load("me/mine")
    same(model.state_dict(), invented("nat").state_dict())
    source = model.source
    assert (source.kind, source.repo, source.revision, source.commit) == (
        "hub", "me/mine", "main", commit,
    )  # fmt: skip
    assert source.sha256 == hashlib.sha256(files["model.safetensors"]).hexdigest()
    assert all(commit in path for path in paths(hub, "/resolve/"))


def test_revisions(hub, load, files, tmp_path):
    other = folder_of(invented("nat", seed=5), tmp_path / "other")
    first = hub.commit("me/mine", files)
    hub.commit("me/mine", other, branch="dev/new")
    assert load("me/mine@dev/new").source.revision == "dev/new"
    same(load("me/mine", revision="dev/new").state_dict(), invented("nat", seed=5).state_dict())
    same(load(f"me/mine@{first}").state_dict(), invented("nat").state_dict())
    with pytest.raises(ValueError, match="once"):
        load("me/mine@main", revision="dev/new")
    with pytest.raises(NotFound, match="no branch"):
        load("me/mine@v9")


def test_config_and_weights_come_from_one_commit(hub, load, files, tmp_path):
    """Somebody pushes between every two requests."""
    seeds = iter(range(1, 50))

    def push():
        changed = folder_of(invented("nat", next(seeds)), tmp_path / "push")
        hub.commit("me/mine", {**changed, "config.json": files["config.json"] + b" "})

    first = hub.commit("me/mine", files)
    hub.fault(r"/resolve/|/blobs/", times=20, call=push)
    model = load("me/mine")
    assert model.source.commit == first and len(hub.repos["me/mine"].commits) > 2
    same(model.state_dict(), invented("nat").state_dict())


def test_a_moved_branch_is_told(hub, load, files, caplog):
    old = hub.commit("me/mine", files)
    load("me/mine")
    new = hub.commit("me/mine", {"README.md": b"# changed"})
    assert load("me/mine").source.commit == new
    assert f"moved from {old} to {new}" in caplog.text


@pytest.mark.parametrize("name", ["nat", "dinat"])
def test_a_transformers_repository_with_a_pickle_only(hub, load, tmp_path, name):
    model = invented(name)
    word = "dinat" if model.config.dilations else "nat"
    values = {
        "model_type": word, "architectures": [f"{word.title()}ForImageClassification"],
        "num_channels": model.config.in_chans, "hidden_size": 512, "path_norm": True,
        "layer_scale_init_value": model.config.layer_scale or 0.0,
        "id2label": {str(i): f"thing {i}" for i in range(model.num_classes)},
        **{k: v for k, v in model.config.to_dict().items() if k in (
            "embed_dim", "depths", "num_heads", "kernel_size", "mlp_ratio", "drop_path_rate")},
    }  # fmt: skip
    if model.config.dilations:
        values["dilations"] = model.config.dilations
    path = tmp_path / "pytorch_model.bin"
    torch.save(convert.to_transformers(model.state_dict(), f"{word}."), path)
    recipe = {"size": 48, "resample": 3}
    hub.commit("lab/tuned", {
        "config.json": json.dumps(values).encode(), path.name: path.read_bytes(),
        "preprocessor_config.json": json.dumps(recipe).encode(),
    })  # fmt: skip
    loaded = load("lab/tuned")
    same(loaded.state_dict(), model.state_dict())
    assert loaded.pretrained_cfg["crop_mode"] == "squash"
    assert loaded.pretrained_cfg["label_names"][0] == "thing 0"
    path.unlink()
    torch.save({"a": print}, path)
    hub.commit("lab/tuned", {path.name: path.read_bytes()})
    with pytest.raises(UnsafePickle, match="print"):
        load("lab/tuned")


def test_a_released_name(hub, load, cache, tmp_path):
    """`nat-mini` means the table's repository; its preprocessing is the paper's, not the file's."""
    model = natcupy.create_model("nat-mini")
    labels = {str(i): f"n{i}" for i in range(1000)}
    path = tmp_path / "pytorch_model.bin"
    torch.save(convert.to_transformers(model.state_dict()), path)
    config = {"model_type": "nat", "drop_path_rate": 0.2, "id2label": labels}
    hub.commit("shi-labs/nat-mini-in1k-224", {
        "config.json": json.dumps(config).encode(), path.name: path.read_bytes(),
        "preprocessor_config.json": b'{"size": 224}',
    })  # fmt: skip
    for name in ("nat-mini", "nat_mini.in1k", "nat-mini@main", "shi-labs/nat-mini-in1k-224"):
        loaded = load(name)
        assert loaded.config == natcupy.zoo.model_config("nat_mini")
        assert loaded.source.tag == "nat_mini.in1k" and loaded.source.license == "mit"
        cfg = loaded.pretrained_cfg
        assert (cfg["crop_mode"], cfg["crop_pct"], cfg["license"]) == ("center", 0.875, "mit")
        assert cfg["label_names"][999] == "n999"
    same(loaded.state_dict(), model.state_dict())
    fresh = natcupy.create_model("nat-mini", pretrained=True, num_classes=3, cache_dir=cache)
    assert fresh.head.weight.shape == (3, 512) and fresh.source.repo == "shi-labs/nat-mini-in1k-224"


def test_safetensors_are_preferred_to_pickles(hub, load, files):
    hub.commit("me/mine", {**files, "pytorch_model.bin": b"never read"})
    load("me/mine")
    assert not paths(hub, "pytorch_model.bin")


def test_a_natcupy_repository_holds_no_pickle(hub, load, files):
    weights = files.pop("model.safetensors")
    hub.commit("me/mine", {**files, "pytorch_model.bin": weights})
    with pytest.raises(UnsafePickle, match=r"model\.safetensors"):
        load("me/mine")


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_incomplete_repositories(hub, load, files, missing):
    del files[missing]
    hub.commit("me/mine", files)
    with pytest.raises(NotFound, match="must hold"):
        load("me/mine")
    hub.commit("me/mine", {"pytorch_model.bin.index.json": b"{}"})
    if missing == "model.safetensors":
        with pytest.raises(NotFound, match="several pickles"):
            load("me/mine")


def test_a_pointer_committed_in_place_of_the_weights(hub, load, files):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:%064d\nsize 9\n" % 1
    hub.commit("me/mine", {**files, "model.safetensors": pointer})
    with pytest.raises(LfsPointer):
        load("me/mine")


def test_weights_of_another_model(hub, load, files, tmp_path):
    other = folder_of(invented("dinat"), tmp_path / "other")
    hub.commit("me/mine", {**files, "model.safetensors": other["model.safetensors"]})
    with pytest.raises(CheckpointError, match=r"unexpected: levels\.0\.blocks\.0\.gamma1"):
        load("me/mine")


# ---------------------------------------------------------------- damage on the way


@pytest.mark.parametrize("what", [r"/blobs/", r"resolve/.*/config\.json"])
def test_a_flipped_bit_is_caught_and_fetched_again(hub, load, files, caplog, what):
    hub.commit("me/mine", files)
    # A small file is asked for by HEAD first; only the GET carries a body.
    hub.fault(what, times=2 if "config" in what else 1, flip=True)
    model = load("me/mine")
    assert "damaged" in caplog.text
    same(model.state_dict(), invented("nat").state_dict())


@pytest.mark.parametrize("what", [r"/blobs/", r"resolve/.*/config\.json"])
def test_lasting_damage_is_an_error_and_leaves_no_trace(hub, load, files, cache, what):
    hub.commit("me/mine", files)
    hub.fault(what, times=100, flip=True)
    with pytest.raises(Corrupt, match="does not have the content"):
        load("me/mine")
    hub.faults.clear()
    same(load("me/mine").state_dict(), invented("nat").state_dict())


def test_a_known_hash_is_always_checked(hub, files, cache):
    """The table's hash wins over whatever the Hub itself says about the file."""
    hub.commit("me/mine", files)
    access = Access(cache_dir=cache)
    snapshot = download.resolve("me/mine", None, access)
    right = hashlib.sha256(files["model.safetensors"]).hexdigest()
    assert download.fetch(snapshot, "model.safetensors", access, sha256=right).is_file()
    with pytest.raises(Corrupt, match="0" * 64):
        download.fetch(snapshot, "model.safetensors", access, sha256="0" * 64)


@pytest.mark.parametrize("status", [500, 502, 503, 504, 429, 408])
def test_passing_trouble_is_waited_out(hub, load, files, status):
    hub.commit("me/mine", files)
    hub.fault(r"/api/models/", times=2, status=status)
    load("me/mine")
    assert len(hub.pauses) >= 2


def test_the_hub_says_how_long_to_wait(hub, load, files):
    hub.commit("me/mine", files)
    hub.fault(r"/api/models/", times=1, status=429, headers={"Retry-After": "7"})
    load("me/mine")
    assert hub.pauses[0] == 7


def test_lasting_trouble_is_unavailable(hub, load, files):
    hub.commit("me/mine", files)
    hub.fault(r"/api/models/", times=100, status=503)
    with pytest.raises(Unavailable, match="503"):
        load("me/mine")
    assert len(hub.pauses) == client.ATTEMPTS - 1
    assert hub.pauses == sorted(hub.pauses)


def test_cut_transfers_resume(hub, load, files):
    hub.commit("me/mine", files)
    hub.fault(r"/blobs/", times=2, cut=1000)
    same(load("me/mine").state_dict(), invented("nat").state_dict())


# ---------------------------------------------------------------- who may read


def test_not_found(hub, load):
    with pytest.raises(NotFound, match="does not exist on the Hub, or it is private") as caught:
        load("me/absent")
    assert str(caught.value).startswith("there is no folder or file me/absent here, and me/absent")
    with pytest.raises(NotFound, match="nat-tiny"):
        load("me/nat-tinny")
    for name in ("me/..", "me/a@..", "me/a@x y", "a/b/c", "https://hub/a/b"):
        with pytest.raises(NotFound):
            load(name)
    assert all(path.count("..") == 0 for path in paths(hub))


def test_private_and_gated(hub, load, files):
    hub.commit("me/mine", files)
    repo = hub.repos["me/mine"]
    repo.readers, repo.private = {"alice"}, True
    for token in (None, "hf_bob"):
        with pytest.raises(NotFound, match="private"):
            load("me/mine", token=token)
    load("me/mine", token="hf_alice")
    repo.private, repo.gated = False, True
    hub.commit("me/mine", {"config.json": files["config.json"] + b"\n"})
    for token in (None, "hf_bob"):
        with pytest.raises(Gated, match="accept the terms"):
            load("me/mine", token=token)
    load("me/mine", token="hf_alice")
    with pytest.raises(BadToken, match="hf auth login"):
        load("me/mine", token="hf_wrong")


def test_tokens_go_to_the_hub_and_nowhere_else(hub, load, files, cache, tmp_path, caplog):
    token = "hf_alice"
    hub.commit("me/mine", files)
    with caplog.at_level(logging.DEBUG):
        model = load("me/mine", token=token)
        hub.fault(r"/api/", times=100, status=403)
        with pytest.raises(Gated) as caught:
            load("me/mine", token=token)
    seen = {path.split("/")[1]: sent for _, path, _, sent in hub.requests}
    assert seen["api"] == token and seen["blobs"] == ""
    model.save_pretrained(tmp_path / "out")
    places = [p for p in (*cache.rglob("*"), *(tmp_path / "out").rglob("*")) if p.is_file()]
    assert places and not any(token.encode() in p.read_bytes() for p in places)
    texts = [caplog.text, str(caught.value), repr(model.source), repr(Access(token=token))]
    assert not any(token in text for text in texts)
    assert caught.value.__cause__ is None and caught.value.__suppress_context__
    assert not any(token in path for path in paths(hub))


# ---------------------------------------------------------------- names and rooms


def test_names_are_parsed():
    assert download.parse_name("org/name") == ("org/name", None)
    assert download.parse_name("hf-hub:org/na.me@v1.0") == ("org/na.me", "v1.0")
    assert download.parse_name("org/name@refs/pr/1") == ("org/name", "refs/pr/1")
    for text in ("name", "a/b/c", "org/name@", "../b", "org/..", "org/a..b", "org/n@a..b",
                 "org/n@/x", "org/n m", "http://a/b", "ö/b", "org/name@x?y"):  # fmt: skip
        assert download.parse_name(text) is None, text


def test_only_one_room_knows_the_client():
    for path in (ROOT / "hub").glob("*.py"):
        has = "huggingface_hub" in path.read_text()
        assert has == (path.name == "client.py"), path
    assert "huggingface_hub" not in dir(hub_package)


# ---------------------------------------------------------------- what is shown

SHOWN = """
import natcupy, sys
natcupy.from_pretrained("me/mine", cache_dir=sys.argv[1])
"""


@pytest.mark.parametrize("quiet", [False, True])
def test_one_switch_hides_the_bars(hub, files, cache, quiet):
    """The client reads the switch once, at import, so each is a process of its own."""
    hub.commit("me/mine", files)
    # TQDM_POSITION=-1: the client shows bars where there is no terminal, too.
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TQDM_POSITION": "-1"}
    env["HF_HUB_DISABLE_PROGRESS_BARS"] = str(int(quiet))
    done = subprocess.run(
        [sys.executable, "-c", SHOWN, cache], env=env, capture_output=True, text=True, check=True
    )
    assert done.stdout == "" and ("100%" in done.stderr) != quiet


# ---------------------------------------------------------------- what is not the Hub


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (json.JSONDecodeError("Expecting value", "<html>", 0), Unavailable, "a login page"),
        (KeyError("id"), Unavailable, r"is not the Hub \(KeyError: 'id'\)"),
        (
            type("InvalidURL", (Exception,), {})("http://user:secret@["),
            Offline,
            r"no valid address here.*HF_ENDPOINT",
        ),
    ],
)
def test_who_answers_is_not_the_hub(error, kind, text):
    with (
        pytest.raises(kind, match=text) as caught,
        client.explained(client.Subject("me/model", "main")),
    ):
        raise error
    assert "me/model@main" in str(caught.value) and "secret" not in str(caught.value)


def test_a_folder_of_the_client_that_cannot_be_read():
    with (
        pytest.raises(PermissionError, match="Permission denied; set HF_HOME") as caught,
        client.explained(client.Subject("me/model", "main")),
    ):
        raise PermissionError(13, "Permission denied", "/home/someone/token")
    assert caught.value.filename == "/home/someone/token"
