"""The real client on a bad line: many pulls, many processes, flipped bits, and where tokens go."""

import hashlib
import logging
import os
import random
from pathlib import Path

import pytest
from small import CONFIGS, invented, same
from weather import Storm, cold_cache, pull_in_a_storm

import natcupy
from natcupy import hub as hub_package
from natcupy.hub import HubError, download
from natcupy.hub.tensors import read_tensors
from natcupy.zoo import build_model, list_models, model_config

ROOT = Path(__file__).parents[2]
ALICE = "hf_alice"


@pytest.fixture
def model(hub):
    model = invented("dinat")
    model.push_to_hub("me/mine", token=ALICE)
    return model


# ---------------------------------------------------------------- a tenth of all requests fails


def test_pulls_in_a_storm(hub, model, tmp_path, caplog):
    """The same with 1,000 pulls is `python benchmarks/hub_faults.py`."""
    caplog.set_level(logging.CRITICAL)

    def load(number):
        return natcupy.from_pretrained("me/mine", cache_dir=tmp_path / str(number)).state_dict()

    result = pull_in_a_storm(hub, load, model.state_dict(), rate=0.1, times=120)
    assert result["corrupt_accepted"] == 0, result
    assert result["right"] >= 119, result
    assert sum(result["faults"].values()) > 30 and len(result["faults"]) == 7, result


def test_pushes_in_a_storm(hub, tmp_path, caplog):
    """What a push reports is there; what it does not report is as before, or complete."""
    caplog.set_level(logging.CRITICAL)
    models = [invented("nat", seed) for seed in range(2)]
    storm = Storm(0.15, seed=3)
    done = 0
    for number in range(30):
        name, model = f"me/m{number % 3}", models[number // 3 % 2]
        before = hub.tree(name)
        hub.weather = storm
        try:
            commit = model.push_to_hub(name, token=ALICE).commit
            done += 1
        except HubError:
            commit = None
        hub.weather = lambda method, path: None
        after = hub.tree(name)
        assert commit in (None, hub.repos[name].refs["main"])
        if commit or (after != before and "model.safetensors" in after):
            loaded = natcupy.from_pretrained(f"{name}", cache_dir=tmp_path / str(number))
            same(loaded.state_dict(), model.state_dict())
        else:
            assert after == before or set(after) == {".gitattributes"}
    assert done >= 28 and sum(storm.kinds.values()) > 15


@pytest.mark.parametrize("seed", range(2))
def test_flipped_bits_are_never_accepted(hub, model, tmp_path, seed):
    """Any one bit of the weights file, wherever it is."""
    draw = random.Random(seed)
    data = hub.tree("me/mine")["model.safetensors"]
    right = hashlib.sha256(data).hexdigest()
    path = tmp_path / "x.safetensors"
    for _ in range(50):
        at = draw.randrange(len(data))
        path.write_bytes(data[:at] + bytes([data[at] ^ (1 << draw.randrange(8))]) + data[at + 1 :])
        with pytest.raises(HubError):
            if read_tensors(path).sha256 != right:
                raise hub_package.Corrupt("as loading a repository does")
    access = hub_package.client.Access(cache_dir=tmp_path / "cache")
    snapshot = download.resolve("me/mine", None, access)
    for _ in range(10):
        hub.fault(r"/blobs/", times=download.FETCHES, flip=True)
        with pytest.raises(hub_package.Corrupt, match="SHA-256"):
            download.fetch(snapshot, "model.safetensors", access)


# ---------------------------------------------------------------- many at once


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_many_processes_on_a_cold_cache(hub, model, tmp_path):
    """Sixteen start together; all get the same, and the weights come down once."""
    seen, downloads = cold_cache(hub, 16, tmp_path)
    weights = hashlib.sha256(hub.tree("me/mine")["model.safetensors"]).hexdigest()
    assert seen == [f"{weights} {hub.repos['me/mine'].refs['main']}"] * 16
    assert downloads == 1


# ---------------------------------------------------------------- every model of the zoo


def shrunk(name):
    """A model of the zoo with few and narrow blocks, all its other numbers kept."""
    config = model_config(name)
    depths = tuple(min(depth, 2) for depth in config.depths)
    rows = config.dilations
    return config.replace(
        embed_dim=4 * config.num_heads[0], depths=depths, num_classes=11,
        img_size=config.img_size and 32,
        dilations=rows and tuple(row[-d:] for row, d in zip(rows, depths, strict=True)),
    )  # fmt: skip


@pytest.mark.parametrize("name", list_models())
def test_every_model_goes_up_and_comes_back(hub, tmp_path, name):
    """Create, save, push, pull: bit-equal; and the full-size model's config says the same."""
    import torch

    torch.manual_seed(0)
    model = build_model(shrunk(name), {"architecture": f"small_{name}"})
    folder = model.save_pretrained(tmp_path / "saved")
    model.push_to_hub("me/mine", token=ALICE)
    pulled = natcupy.from_pretrained("me/mine", cache_dir=tmp_path / "cache")
    assert pulled.config == model.config
    same(pulled.state_dict(), model.state_dict())
    same(natcupy.from_pretrained(folder).state_dict(), model.state_dict())
    with torch.device("meta"):
        full = natcupy.create_model(name)
    text = hub_package.config.config_text(full.config, full.pretrained_cfg, "0.1.0").encode()
    config, cfg = hub_package.config.parse_config(text)
    assert config == full.config and cfg["architecture"] == name
    # what a file says is a list, what the model says a tuple
    kept = {k: v for k, v in full.pretrained_cfg.items() if k in cfg}
    assert hub_package.schema.plain(list(cfg.values())) == hub_package.schema.plain(
        [kept.get(key) for key in cfg]
    )


# ---------------------------------------------------------------- the token

SECRET = "hf_canaryCANARYcanary0123456789"


def test_the_token_is_nowhere(hub, tmp_path, capfd, caplog, monkeypatch):
    """Pull, push, fail in every way, at debug level: the token is in its header, nowhere else."""
    import traceback

    monkeypatch.setitem(hub.tokens, SECRET, "alice")
    caplog.set_level(logging.DEBUG)
    said = []

    def attempt(call, *args, **how):
        try:
            said.append(repr(call(*args, **how)))
        except Exception as error:
            said.append("".join(traceback.format_exception(error)) + repr(vars(error)))

    cache = {"token": SECRET, "cache_dir": tmp_path / "cache"}
    model = invented("nat")
    attempt(model.push_to_hub, "me/mine", token=SECRET, license="mit")
    attempt(natcupy.from_pretrained, "me/mine", **cache)
    attempt(natcupy.from_pretrained, "me/absent", **cache)
    attempt(model.push_to_hub, "bob/other", token=SECRET)
    for status in (401, 403, 404, 409, 412, 422, 500):
        for where in (r"/api/models/", r"/commit/", r"/resolve/", r"/repos/create", r"/lfs/"):
            hub.fault(where, times=30, status=status)
            attempt(invented("nat", 1).push_to_hub, f"me/n{status}", token=SECRET)
            attempt(natcupy.from_pretrained, "me/mine@x", **cache)
            hub.faults.clear()
    hub.weather = Storm(1.0, kinds=("drop",))
    attempt(model.push_to_hub, "me/mine", token=SECRET, branch="dev")
    hub.weather = lambda method, path: None
    model.save_pretrained(tmp_path / "folder")
    captured = capfd.readouterr()
    everything = [captured.out, captured.err, caplog.text, *said]
    assert len(said) > 70 and not any(SECRET in text for text in everything)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files and not any(SECRET.encode() in path.read_bytes() for path in files)
    assert not any(SECRET.encode() in data for data in hub.tree("me/mine").values())
    sent = [(path, token) for _, path, _, token in hub.requests]
    assert any(token == SECRET for _, token in sent)
    assert not any(SECRET in path for path, _ in sent)
    assert not any(token for path, token in sent if path.startswith(("/blobs/", "/lfs/put/")))


def test_names_of_the_zoo_are_small(hub):
    assert all(natcupy.zoo.num_parameters(shrunk(name)) < 1_500_000 for name in list_models())
    assert CONFIGS.keys() >= {"nat", "dinat", "dinat_s", "isotropic", "vitrpb"}
