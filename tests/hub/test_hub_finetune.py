"""Finetuning beside others: the push at the end, timm's parts in recipes, PEFT's adapters."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from ecosystem import library
from PIL import Image

import natcupy
from natcupy import hub as natcupy_hub
from natcupy.data import find
from natcupy.hub import card
from natcupy.train import TrainConfig, TrainError, finetune
from natcupy.train.optimizer import make_optimizer
from natcupy.zoo import ModelConfig, build_model
from natcupy.zoo.config import ConfigError

pytest.importorskip("accelerate", reason="training needs accelerate: pip install 'natcupy[train]'")
ROOT = Path(__file__).parents[2]
TINY = ModelConfig(
    family="nat", embed_dim=8, depths=(1, 2), num_heads=(1, 2), kernel_size=3, num_classes=2,
    mlp_ratio=2.0,
)  # fmt: skip


def tiny():
    torch.manual_seed(0)
    return build_model(TINY, {"input_size": (3, 16, 16), "crop_pct": 1.0})


def config(output, **changes):
    return TrainConfig(**{"output": output, "epochs": 1, "batch_size": 4, "workers": 0, **changes})


@pytest.fixture(scope="module")
def shades(tmp_path_factory):
    """Two classes: dark pictures and bright ones."""
    root, draw = tmp_path_factory.mktemp("shades"), np.random.default_rng(0)
    for name, level in (("bright", 170), ("dark", 80)):
        (root / name).mkdir()
        for index in range(10):
            pixels = draw.normal(level, 30, (20, 20, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{index}.png")
    return root


# ---------------------------------------------------------------- the push


def test_pushed_in_one_commit(hub, shades, tmp_path):
    result = finetune(
        tiny(), shades, None, config(tmp_path / "run"), push="me/shades", license="mit",
        token="hf_alice",
    )  # fmt: skip
    assert result.pushed.repo == "me/shades" and "model.safetensors" in result.pushed.files
    model = natcupy.from_pretrained("me/shades", cache_dir=tmp_path / "cache")
    assert model.pretrained_cfg["label_names"] == ["bright", "dark"]
    for name, tensor in result.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)
    again = finetune(
        tiny(), shades, None, config(tmp_path / "run", resume=True), push="me/shades",
        license="mit", token="hf_alice",
    )  # fmt: skip
    assert again.pushed.commit == result.pushed.commit  # the same files: nothing to push
    text = (tmp_path / "run" / "model" / "README.md").read_text()
    assert 'license: "mit"' in text and "## Training" in text
    assert card.stated(text)["training"]["first weights"] == "fresh"
    tuned = finetune(model, shades, None, config(tmp_path / "again"))
    told = card.stated((tuned.folder / "model" / "README.md").read_text())["training"]
    assert told["first weights"] == f"me/shades at {model.source.commit[:12]}"


@pytest.mark.parametrize(
    ("push", "error", "match"),
    [
        ({"push": "shades"}, ValueError, "named owner/name"),
        ({"push": "me/x", "license": "my own"}, ValueError, "license must be an identifier"),
        ({"push": "me/x", "token": False}, natcupy_hub.BadToken, "needs a login"),
        ({"push": "me/x", "token": "hf_nobody"}, natcupy_hub.HubError, "token|login"),
        ({"push": "me/x", "private": "yes"}, ValueError, "private must be"),
    ],
)
def test_a_push_is_checked_before_training(hub, shades, tmp_path, push, error, match):
    output = tmp_path / "run"
    with pytest.raises(error, match=match):
        finetune(tiny(), shades, None, config(output), **{"token": "hf_alice", **push})
    assert not output.exists()
    assert [path for method, path, *_ in hub.requests if method == "POST"] == []


def test_a_licence_that_binds_copies(shades, tmp_path):
    model = tiny()
    model.pretrained_cfg["license"] = "gpl-3.0"
    with pytest.raises(ValueError, match="keep that licence"):
        finetune(model, shades, None, config(tmp_path / "run"), license="mit")
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------- timm


def test_groups_are_timms():
    """Rates and weight decay of every parameter are those of timm's own grouping."""
    library("timm")
    from timm.optim import param_groups_layer_decay

    model = build_model(TINY.replace(depths=(2, 2), layer_scale=0.1))
    theirs = {
        id(p): (group["lr_scale"], group["weight_decay"])
        for group in param_groups_layer_decay(
            model, weight_decay=0.05, layer_decay=0.7, no_weight_decay_list=model.no_weight_decay()
        )
        for p in group["params"]
    }
    made = make_optimizer(model, config("x", lr=1.0, layer_decay=0.7, weight_decay=0.05))
    ours = {id(p): (g["lr"], g["weight_decay"]) for g in made.param_groups for p in g["params"]}
    assert ours.keys() == theirs.keys()
    for name, parameter in model.named_parameters():
        assert ours[id(parameter)] == pytest.approx(theirs[id(parameter)]), name


def test_the_papers_recipe_runs(shades, tmp_path):
    """nat-in1k with its RandAugment, erasing, Mixup and CutMix, cut to two epochs; and resumed."""
    library("timm")
    changes = {"epochs": 1, "warmup_epochs": 0.5, "cooldown_epochs": 1, "batch_size": 4,
               "workers": 0, "mixed_precision": "no"}  # fmt: skip
    made = TrainConfig.of("nat-in1k", output=tmp_path / "run", **changes)
    result = finetune(tiny(), shades, None, made)
    assert [row["lr"] for row in result.history][1] == pytest.approx(made.min_lr)
    assert np.isfinite(result.history[-1]["train_loss"])
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert "rand-m9-mstd0.5-inc1" in card and "mixup 0.8" in card and "nat-in1k" in card


def test_without_timm(shades, tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "timm"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r"mixup, cutmix=.*natcupy\[train\].*needs neither"):
        finetune(tiny(), shades, None, config(tmp_path / "run", mixup=0.5))
    finetune(tiny(), shades, None, config(tmp_path / "run"))


# ---------------------------------------------------------------- PEFT


def test_lora(shades, tmp_path, monkeypatch):
    """The example: adapters train, the rest does not move, the result is a plain model."""
    library("peft")
    spec = importlib.util.spec_from_file_location("lora", ROOT / "examples" / "lora.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    result = example.finetune_lora(
        str(shades), str(tmp_path / "run"), epochs=2, batch_size=4, workers=0
    )
    before = natcupy.from_pretrained("nat-digits", num_classes=2).state_dict()
    model = natcupy.from_pretrained(tmp_path / "run" / "model")
    changed = {n for n, tensor in model.state_dict().items() if not torch.equal(tensor, before[n])}
    adapted = {n for n in before if n.endswith(("attn.qkv.weight", "attn.proj.weight"))}
    assert changed == {*adapted, "head.weight", "head.bias"}
    picture = find(shades).val.open(0)
    with torch.no_grad():
        assert torch.equal(
            model(model.preprocess(picture)), result.model(model.preprocess(picture))
        )


def test_a_wrapped_model_keeps_its_head(shades, tmp_path):
    peft = library("peft")
    base = natcupy.from_pretrained("nat-digits")
    lora = peft.get_peft_model(base, peft.LoraConfig(target_modules=r".*\.attn\.qkv"))
    with pytest.raises(ConfigError, match=r"got 10 for 2 classes\. Load the model"):
        finetune(lora, shades, None, config(tmp_path / "run"))
    with pytest.raises(TrainError, match="got Linear"):
        finetune(torch.nn.Linear(1, 1), shades, None, config(tmp_path / "run"))
