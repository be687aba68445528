"""Saving whole models: the card says what is known; a kill leaves the old folder or the new one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from small import CONFIGS, invented, same

import natcupy
from natcupy import hub
from natcupy.hub import pretrained
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


# ---------------------------------------------------------------- killed while saving

# One process imports once, then forks a child for each kill: before its n-th call, or (negative
# numbers) when a file has grown to so many bytes.
KILLED = """
import os, resource, signal, sys, torch
from natcupy import hub
torch.set_num_threads(1)
folder, replacement = sys.argv[1:3]
model = hub.from_pretrained(replacement)

def counted(real):
    def run(*args):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args)
    return run

for number, when in enumerate(map(int, sys.argv[3:])):
    child = os.fork()
    if not child:
        if when < 0:
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (-when, -when))
        left = when if when >= 0 else 10**9
        for name in ("replace", "fsync", "open"):
            setattr(os, name, counted(getattr(os, name)))
        hub.files.Path.unlink = counted(hub.files.Path.unlink)
        model.save_pretrained(f"{folder}/{number}", overwrite_card=True)
        os._exit(0)
    print(os.WIFSIGNALED(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_while_saving(tmp_path):
    """Twenty kills, in the middle of files too: the folder always loads, as one model or the other.

    The two models have the same shapes but other weights and other dilations, so that a mixture of
    one's weights with the other's config would load without complaint.
    """
    old, new = invented("dinat", 1), invented("dinat", 2)
    new = build_model(new.config.replace(dilations=((3, 1), (2, 1), (1,))))
    hub.save_pretrained(new, tmp_path / "new")
    moments = [*range(16), -1, -300, -4000, -8000]
    for number in range(len(moments)):
        hub.save_pretrained(old, tmp_path / str(number))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", KILLED, tmp_path, tmp_path / "new", *map(str, moments)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    killed = [line == "True" for line in done.stdout.split()]
    assert len(killed) == len(moments), done.stderr
    assert sum(killed) >= 15
    seen = set()
    for number, dead in enumerate(killed):
        folder = tmp_path / str(number)
        loaded = hub.from_pretrained(folder)
        which = old if loaded.config == old.config else new
        assert loaded.config == which.config
        same(loaded.state_dict(), which.state_dict())
        assert dead or which is new
        seen.add((dead, which is new))
        hub.save_pretrained(old, folder)
        same(hub.from_pretrained(folder).state_dict(), old.state_dict())
    assert {(True, False), (True, True)} <= seen


def test_config_text_is_stable():
    """The same model gives the same bytes, so that a push without changes changes nothing."""
    model = invented("dinat")
    texts = {config_text(model.config, model.pretrained_cfg, "0.1.0") for _ in range(3)}
    assert len(texts) == 1
