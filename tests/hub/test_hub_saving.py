"""Saving whole models: the card says what is known; a kill leaves the old folder or the new one."""

import os
import threading
from pathlib import Path

import pytest
from damage import kill_while_saving
from small import CONFIGS, invented, same

import natcupy
from natcupy import hub
from natcupy.hub import files, pretrained
from natcupy.hub.config import config_text
from natcupy.zoo import ConfigError, build_model

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def offline(no_sockets):
    """Nothing in this file needs a network."""
    yield
    assert no_sockets == []


def test_the_card(tmp_path):
    yaml = pytest.importorskip("yaml")
    cfg = {"license": "cc-by-4.0", "label_names": ["<script>", "](http://x)", "|", "#", "e"]}
    model = build_model(CONFIGS["nat"], cfg)
    model.source = pretrained.Source("hub", "x", "0", repo="org/base", commit="a" * 40)
    text = (hub.save_pretrained(model, tmp_path / "x") / "README.md").read_text()
    meta = yaml.safe_load(text.split("---")[1])
    assert meta == {
        "library_name": "natcupy", "pipeline_tag": "image-classification",
        "license": "cc-by-4.0", "base_model": "org/base",
        "tags": ["natcupy", "neighborhood-attention", "nat"],
    }  # fmt: skip
    count = sum(p.numel() for p in model.parameters())
    assert f"{count:,}" in text and "arXiv:2204.07143" in text and "`org/base`" in text
    assert "script" not in text and "http" not in text  # nothing from label names
    code = text.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
    assert natcupy.from_pretrained(tmp_path / "x").pretrained_cfg["license"] == "cc-by-4.0"


def test_a_card_states_only_what_is_known(tmp_path):
    model = invented("backbone")
    model.source = pretrained.Source("hub", "x", "0", repo="evil](http://x)/y", commit="<b>")
    text = (hub.save_pretrained(model, tmp_path / "x") / "README.md").read_text()
    assert "license" not in text.split("---")[1] and "base_model" not in text
    assert "http" not in text and "<b>" not in text
    assert "image-feature-extraction" in text
    model.pretrained_cfg["license"] = "MIT)[x](y"
    with pytest.raises(ConfigError, match="license"):
        hub.save_pretrained(model, tmp_path / "y")
    assert not (tmp_path / "y").exists()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_while_saving(tmp_path):
    """Twenty kills, in the middle of files too; 100 is `python -m benchmarks.hub_faults`."""
    outcomes = kill_while_saving(tmp_path, [*range(16), -1, -300, -4000, -8000])
    assert sum(dead for dead, _ in outcomes) >= 15
    assert {(True, False), (True, True)} <= set(outcomes)


def test_config_text_is_stable():
    """The same model gives the same bytes, so that a push without changes changes nothing."""
    model = invented("dinat")
    texts = {config_text(model.config, model.pretrained_cfg, "0.1.0") for _ in range(3)}
    assert len(texts) == 1


@pytest.mark.skipif(files.fcntl is None, reason="folders cannot be locked here")
def test_a_load_gets_config_and_weights_of_one_save(tmp_path, monkeypatch):
    """A save that begins between the two waits until they are read."""
    dinat = CONFIGS["nat"].replace(dilations=((1,), (1, 2)))
    folder = hub.save_pretrained(invented("nat"), tmp_path / "x")
    saver = threading.Thread(target=hub.save_pretrained, args=(build_model(dinat), folder))
    load = pretrained.load

    def later(found, *args, **how):
        saver.start()
        saver.join(0.3)
        assert saver.is_alive()
        return load(found, *args, **how)

    monkeypatch.setattr(pretrained, "load", later)
    same(natcupy.from_pretrained(folder).state_dict(), invented("nat").state_dict())
    saver.join()
    monkeypatch.setattr(pretrained, "load", load)
    assert natcupy.from_pretrained(folder / "model.safetensors").config == dinat


def test_a_save_that_was_stopped_holds_up_no_load(tmp_path, monkeypatch):
    folder = hub.save_pretrained(invented("nat"), tmp_path / "x")
    monkeypatch.setattr(files, "READER_WAITS_S", 0.1)
    with files._turn(folder):
        same(natcupy.from_pretrained(folder).state_dict(), invented("nat").state_dict())


@pytest.mark.parametrize(
    ("name", "wish", "size"),
    [
        ("nat", {"in_chans": 1}, (1, 224, 224)),
        ("dinat", {"in_chans": 3}, (3, 224, 224)),
        ("vitrpb", {"img_size": 64}, (3, 64, 64)),
        ("isotropic", {"img_size": 48, "in_chans": 4}, (4, 48, 48)),
    ],
)
def test_models_of_other_pictures_can_be_saved(tmp_path, name, wish, size):
    folder = hub.save_pretrained(invented(name), tmp_path / "x")
    model = natcupy.from_pretrained(folder, **wish)
    again = natcupy.from_pretrained(hub.save_pretrained(model, tmp_path / "y"))
    assert again.pretrained_cfg["input_size"] == size
    same(again.state_dict(), model.state_dict())
