"""Cards: what they say is true, what they show runs, and nothing hostile gets in."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small import CONFIGS, invented

import natcupy
from natcupy.hub import card, facts, saving
from natcupy.hub.pretrained import Source
from natcupy.zoo import build_model, count_macs, num_parameters

ROOT = Path(__file__).parents[2]
yaml = pytest.importorskip("yaml")


def made(name="nat", cfg=None, **given):
    model = build_model(CONFIGS[name], cfg)
    stated = saving.state_facts(model, given.pop("repo", None), **given)
    text = saving.pack(model, stated).card()
    return yaml.safe_load(text.split("---\n")[1]), text


def test_everything_stated_is_in_the_metadata():
    metrics = [facts.Metric("accuracy", 83.2, "ILSVRC/imagenet-1k", "Top-1", "ImageNet-1K", "val")]
    meta, text = made(
        repo="me/mine", license="apache-2.0", metrics=metrics, datasets=["ILSVRC/imagenet-1k"],
        tags=["birds"], base_model="org/base",
    )  # fmt: skip
    assert meta == {
        "library_name": "natcupy", "pipeline_tag": "image-classification",
        "license": "apache-2.0", "base_model": "org/base", "datasets": ["ILSVRC/imagenet-1k"],
        "tags": ["natcupy", "neighborhood-attention", "nat", "birds"],
        "model-index": [{"name": "mine", "results": [{
            "task": {"type": "image-classification"},
            "dataset": {"type": "ILSVRC/imagenet-1k", "name": "ImageNet-1K", "split": "val"},
            "metrics": [{"type": "accuracy", "value": 83.2, "name": "Top-1"}],
        }]}],
    }  # fmt: skip
    assert "| ImageNet-1K, val | Top-1 | 83.2 |" in text and "`org/base`" in text
    assert f"{num_parameters(CONFIGS['nat']):,}" in text
    macs = count_macs(CONFIGS["nat"], 224, 224).papers
    assert f"{macs / 1e6:.2f} M" in text or f"{macs / 1e9:.2f} G" in text


def test_the_client_reads_it_as_a_card():
    """The Hub's own card classes take the metadata back, evaluation results included."""
    ModelCard = pytest.importorskip("huggingface_hub").ModelCard
    _, text = made(repo="me/mine", license="mit", metrics={"accuracy": 0.5}, dataset="cifar10")
    data = ModelCard(text).data
    assert data.eval_results[0].metric_value == 0.5
    assert data.eval_results[0].dataset_type == "cifar10" and data.license == "mit"


def test_a_plain_mapping_needs_its_dataset():
    meta, _ = made(metrics={"accuracy": 0.5, "f1": 0.25}, dataset="cifar10")
    results = meta["model-index"][0]["results"]
    assert [r["metrics"][0]["value"] for r in results] == [0.5, 0.25]
    assert {r["dataset"]["type"] for r in results} == {"cifar10"}


def test_nothing_stated_nothing_claimed():
    meta, text = made()
    assert meta.keys() == {"library_name", "pipeline_tag", "tags"}
    assert "No licence is stated" in text and "Results" not in text and "Trained on" not in text


def test_licences_are_inherited_with_the_weights():
    model = invented("nat")
    model.source = Source("hub", "x", "0", repo="org/base", commit="a" * 40, license="mit")
    text = saving.pack(model, saving.state_facts(model)).card()
    assert 'license: "mit"' in text and 'base_model: "org/base"' in text and "a" * 40 in text
    text = saving.pack(model, saving.state_facts(model, license="apache-2.0")).card()
    assert 'license: "apache-2.0"' in text
    assert "The weights it started from are under `mit`" in text


@pytest.mark.parametrize("inherited", sorted(facts.LICENSES - facts.PERMISSIVE))
def test_a_binding_licence_cannot_be_changed(inherited):
    with pytest.raises(ValueError, match="keep that licence"):
        facts.check(license="mit", base_license=inherited)
    assert facts.check(base_license=inherited).license == inherited


def test_licences_known_to_the_hub():
    assert facts.PERMISSIVE < facts.LICENSES and len(facts.LICENSES) > 60
    assert all(re.fullmatch(r"[a-z0-9.\-]+", name) for name in facts.LICENSES)


def test_generated_cards_are_told_from_edited_ones():
    _, text = made(repo="me/mine", license="mit", metrics={"accuracy": 0.5}, dataset="cifar10")
    assert card.is_generated(text) and card.stated(text)["license"] == "mit"
    for other in (
        text.replace("mit", "MIT", 1), text + "\n\n", " " + text, text + "more",
        "\n".join(text.splitlines()[:-1]), "", "# mine", text.replace("\n", "\r\n"),
    ):  # fmt: skip
        assert not card.is_generated(other)


def test_the_newer_card_replaces_only_an_unedited_one(tmp_path):
    model = invented("nat")
    path = model.save_pretrained(tmp_path / "x") / "README.md"
    model.save_pretrained(tmp_path / "x", license="mit")
    assert b'license: "mit"' in path.read_bytes()
    path.write_text(path.read_text().replace("## Use", "## How to use it"))
    model.save_pretrained(tmp_path / "x", license="apache-2.0")
    assert "How to use it" in path.read_text() and "apache" not in path.read_text()


RUN = """
import sys
from PIL import Image
Image.new("RGB", (40, 50), (200, 30, 90)).save("picture.png")
"""


def test_what_a_card_shows_runs(hub, tmp_path):
    """The code on the cards of pushed models, in an empty folder and a fresh process."""
    codes = []
    for name in ("nat", "vitrpb", "backbone"):
        model = invented(name)
        model.pretrained_cfg["input_size"] = (3, 32, 32)
        model.push_to_hub(f"me/{name}", token="hf_alice")
        text = hub.tree(f"me/{name}")["README.md"].decode()
        codes.append(text.split("```python\n")[1].split("```")[0])
        assert f'from_pretrained("me/{name}")' in codes[-1]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "home"),
                   "OMP_NUM_THREADS": "1"}  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", RUN + "\n".join(codes)], cwd=tmp_path,
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("tensor") >= 3


HOSTILE = ["<script>", "](http://x)", "a\nlicense: mit", "---", "{{x}}", "`x`", "a|b", "\x00", "é"]


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_nothing_hostile_is_stated(text):
    for given in (
        {"license": text}, {"tags": [text]}, {"datasets": [text]}, {"base_model": text},
        {"base_model": f"a/{text}"}, {"repo": f"a/{text}"},
        {"metrics": {text: 1.0}, "dataset": "x"}, {"metrics": {"accuracy": 1.0}, "dataset": text},
        {"metrics": [facts.Metric("accuracy", 1.0, "x", name=text)]},
        {"metrics": [facts.Metric("accuracy", 1.0, "x", dataset_name=text)]},
        {"metrics": [facts.Metric("accuracy", 1.0, "x", split=text)]},
        {"converted": facts.Converted(text, "0" * 64)},
        {"converted": facts.Converted("x.pth", text)},
    ):  # fmt: skip
        with pytest.raises(ValueError):
            facts.check(**given)


def test_the_labels_of_a_model_stay_out():
    cfg = {"label_names": ["<script>", "](http://x)", "|", "#", "e"]}
    _, text = made(cfg=cfg)
    assert "script" not in text and "http" not in text


def test_every_model_of_the_zoo_has_a_card():
    for name in natcupy.list_models():
        with torch.device("meta"):
            model = natcupy.create_model(name)
        text = saving.pack(model, saving.state_facts(model, "me/mine")).card()
        assert yaml.safe_load(text.split("---\n")[1])["library_name"] == "natcupy"
        assert f"{num_parameters(model.config):,}" in text and "bibtex" in text
