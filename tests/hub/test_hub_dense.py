"""Segmentation and detection models on the hub: folders, cards, the authors' files, wishes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small import invented

import natcupy
from natcupy.cli import main
from natcupy.hub import dense, dense_weights, publish, weights
from natcupy.hub.config import config_text, parse_config
from natcupy.hub.errors import CheckpointError, ConfigError, NotFound
from natcupy.hub.tensors import read_tensors
from natcupy.zoo import ModelConfig
from natcupy.zoo.dense import (
    DENSE_MODELS,
    DENSE_PUBLISHED,
    DenseConfig,
    build_dense_model,
    create_dense_model,
    num_dense_parameters,
)

ROOT = Path(__file__).parents[2]
BACKBONE = ModelConfig(
    family="nat", embed_dim=8, depths=(1, 2), num_heads=(1, 2), kernel_size=3, out_indices=(0, 1),
    dilations=((1,), (1, 2)),
)  # fmt: skip
CONFIGS = {
    "upernet": DenseConfig("upernet", BACKBONE, 5, channels=8, aux_channels=4),
    "mask_rcnn": DenseConfig("mask_rcnn", BACKBONE, 3, channels=8, fc_channels=16),
    "cascade_mask_rcnn": DenseConfig("cascade_mask_rcnn", BACKBONE, 3, channels=8, fc_channels=16),
}


def made(name, seed=0):
    """A small model with random weights and statistics everywhere."""
    torch.manual_seed(seed)
    model = build_dense_model(CONFIGS[name]).eval()
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand_like(tensor) * 0.1 + 0.05)
        else:
            tensor.fill_(7)
    return model


def same(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_by_arithmetic(name):
    model = build_dense_model(CONFIGS[name])
    assert num_dense_parameters(model.config) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", CONFIGS)
def test_a_folder_and_back(name, tmp_path):
    model = made(name)
    model.pretrained_cfg |= {"short_side": 33, "label_names": list("abcde")[: model.num_classes]}
    folder = model.save_pretrained(tmp_path / "x", license="mit")
    assert sorted(p.name for p in folder.iterdir()) == [
        "README.md", "config.json", "model.safetensors",
    ]  # fmt: skip
    again = natcupy.from_pretrained(folder)
    assert type(again) is type(model) and again.config == model.config and not again.training
    same(again.state_dict(), model.state_dict())
    assert again.label_names == model.label_names and again.recipe == model.recipe
    assert again.pretrained_cfg["license"] == "mit"
    values = json.loads((folder / "config.json").read_text())
    assert values["id2label"]["1"] == "b" and values["task"] == model.config.task
    assert main(["verify", str(folder)]) == 0


def test_the_config_is_a_closed_schema():
    config = CONFIGS["mask_rcnn"]
    text = config_text(config, {"pad_divisor": 8}, "0")
    assert parse_config(text.encode())[0] == config
    for change, message in (
        ({"auto_map": {}}, "auto_map"),
        ({"task": "segmentation"}, "task must be 'detection'"),
        ({"dense": 3}, "dense must be an object"),
        ({"dense": {}}, "missing"),
        ({"pretrained_cfg": {"pad_divisor": 0}}, "pad_divisor"),
        ({"pretrained_cfg": {"crop_pct": 0.5}}, "crop_pct"),
        ({"pretrained_cfg": {"num_classes": 80}}, "num_classes"),
        ({"label_names": ["a"]}, "3 names"),
    ):
        values = {**json.loads(text), **change}
        with pytest.raises(ConfigError, match=message):
            parse_config(json.dumps(values).encode())
    wide = {**config.to_dict(), "channels": 4096}
    with pytest.raises(ConfigError, match="at most 1,000,000 parameters"):
        parse_config(json.dumps({**json.loads(text), "dense": wide}).encode(), max_parameters=10**6)


@pytest.mark.parametrize("name", CONFIGS)
def test_other_classes(name, tmp_path, caplog):
    model = made(name)
    folder = model.save_pretrained(tmp_path / "x")
    with caplog.at_level("WARNING", "natcupy.hub"):
        other = natcupy.from_pretrained(folder, num_classes=9, drop_path_rate=0.3)
    fresh = [n for n in other.state_dict() if n in caplog.text]
    assert "of another shape in model.safetensors" in caplog.text
    assert "not in model.safetensors" not in caplog.text
    assert fresh and all(n.split(".")[-2] in dense.CLASSIFIERS.pattern for n in fresh)
    assert other.num_classes == 9 == other.config.num_classes and len(other.label_names) == 9
    assert other.config.backbone.drop_path_rate == 0.3
    mine, theirs = model.state_dict(), other.state_dict()
    changed = [n for n in mine if mine[n].shape != theirs[n].shape]
    assert changed and all(dense.CLASSIFIERS.fullmatch(n) for n in changed)
    for key in mine.keys() - set(changed):
        if not dense.CLASSIFIERS.fullmatch(key):
            assert torch.equal(mine[key], theirs[key])


def test_other_windows_and_channels(tmp_path):
    folder = made("upernet").save_pretrained(tmp_path / "x")
    other = natcupy.from_pretrained(folder, kernel_size=5, in_chans=1, dilations=None)
    assert other.backbone.levels[0].blocks[0].attn.rpb.shape == (1, 9, 9)
    assert other(torch.rand(1, 1, 32, 40)).shape == (1, 5, 32, 40)
    with pytest.raises(TypeError, match="got widths"):
        natcupy.from_pretrained(folder, widths=3)
    with pytest.raises(CheckpointError, match="another shape"):
        natcupy.from_pretrained(folder, channels=9)
    with pytest.raises(TypeError, match="global_pool"):
        natcupy.from_pretrained(folder, global_pool="")


@pytest.mark.parametrize("name", CONFIGS)
def test_the_backbone_alone(name, tmp_path):
    model = made(name)
    folder = model.save_pretrained(tmp_path / "x")
    backbone = natcupy.from_pretrained(folder, features_only=True)
    assert backbone.config == BACKBONE
    same(backbone.state_dict(), model.backbone.state_dict())


@pytest.mark.parametrize("name", CONFIGS)
def test_a_push_its_card_and_the_way_back(hub, name, tmp_path):
    model = made(name)
    metrics = {"mean_iou": 0.5} if name == "upernet" else {"mean_average_precision": 0.25}
    model.push_to_hub(f"me/{name}", token="hf_alice", metrics=metrics, dataset="shapes")
    text = hub.tree(f"me/{name}")["README.md"].decode()
    task = "image-segmentation" if name == "upernet" else "object-detection"
    assert f'pipeline_tag: "{task}"' in text and f'"{name.replace("_", "-")}"' in text
    assert (f"{num_dense_parameters(model.config):,}" in text and "0.5" in text) or "0.25" in text
    same(natcupy.from_pretrained(f"me/{name}").state_dict(), model.state_dict())
    assert main(["pull", f"me/{name}", str(tmp_path / "pulled")]) == 0
    assert main(["verify", str(tmp_path / "pulled"), "--against", f"me/{name}"]) == 0
    if name == "cascade_mask_rcnn":
        return
    code = text.split("```python\n")[1].split("```")[0]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    make = "from PIL import Image\nImage.new('RGB', (40, 50), (200, 30, 90)).save('picture.png')\n"
    done = subprocess.run(
        [sys.executable, "-c", make + code], cwd=tmp_path, env=environment, check=False,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------- the authors' files


def test_the_table():
    rows = dense_weights.DENSE_WEIGHTS
    assert {row.arch for row in rows.values()} == set(DENSE_MODELS) == set(DENSE_PUBLISHED)
    assert len({row.original for row in rows.values()}) == len(rows)
    for row in rows.values():
        assert weights.find(row.arch.replace("_", "-")) is row is weights.find(row.tag)
        assert weights.find_original(row.file_name) is row
    # one of each family and task, as the authors' pages link them
    for arch, original in {
        "upernet_nat_tiny": "nat/checkpoints/SEG/nat_tiny_upernet.pth",
        "upernet_dinat_s_large": "dinat/checkpoints/ade20k/upernet_dinat_s_large.pth",
        "mask_rcnn_nat_mini": "nat/checkpoints/DET/nat_mini_maskrcnn.pth",
        "mask_rcnn_dinat_tiny": "dinat/checkpoints/coco/maskrcnn_dinat_tiny.pth",
        "cascade_mask_rcnn_nat_base": "nat/checkpoints/DET/nat_base_cascademaskrcnn.pth",
        "cascade_mask_rcnn_dinat_s_base": (
            "dinat/checkpoints/coco/cascadedmaskrcnn_dinat_s_base.pth"
        ),
    }.items():
        assert weights.find(arch).original == original


@pytest.mark.parametrize("name", ["upernet-nat-tiny", "cascade_mask_rcnn_dinat_small"])
def test_names_say_where_the_file_is(name):
    with pytest.raises(NotFound, match=r"https://shi-labs\.com/.*\.pth.*from_pretrained\('path/to"):
        natcupy.from_pretrained(name)
    with pytest.raises(NotFound, match=r"upernet-nat-tiny"):
        natcupy.from_pretrained("upernet-nat-tny")


@pytest.mark.parametrize(
    ("name", "others"),
    [
        ("upernet_nat_mini", ["upernet_dinat_mini"]),
        ("mask_rcnn_dinat_small", []),  # NAT-Small has layer scale, DiNAT-Small has not
        ("mask_rcnn_dinat_s_tiny", []),
    ],
)
def test_shapes_tell_the_model(name, others):
    with torch.device("meta"):
        model = create_dense_model(name, num_classes=7)
    seen = dense.infer_config(model.state_dict())
    assert sorted(dense.candidates(seen)) == sorted([name, *others])
    assert seen.num_classes == 7 and dense.differences(seen, model.config) == []
    assert dense.name_of(model.config) == name


def mmcv_file(model, path):
    """The weights as mmcv's runner saves them."""
    state = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    state |= {
        f"module.ema_{name.replace('.', '_')}": torch.zeros_like(parameter)
        for name, parameter in model.named_parameters()
    }
    state.pop("module.decode_head.bottleneck.bn.num_batches_tracked", None)
    meta = {"mmseg_version": "0.20.2", "CLASSES": ("wall", "sky"), "iter": 160000, "seed": 0}
    optimizer = {"state": {0: {"step": 3, "exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1}]}
    torch.save({"meta": meta, "state_dict": state, "optimizer": optimizer}, path)


@pytest.fixture
def released(monkeypatch):
    """A model that two of the released names stand for, in a size that tests can afford."""
    plain = CONFIGS["upernet"].replace(num_classes=150, backbone=BACKBONE.replace(dilations=None))
    small = {
        "upernet_nat_mini": plain,
        "upernet_dinat_mini": plain.replace(backbone=BACKBONE),
        "nat_mini": plain.backbone,
    }
    monkeypatch.setattr(dense, "named_config", lambda n: small.get(n, CONFIGS["mask_rcnn"]))
    monkeypatch.setattr("natcupy.zoo.model_config", small.get)
    torch.manual_seed(0)
    model = build_dense_model(plain).half().eval()
    for name, tensor in model.state_dict().items():
        if name.endswith("num_batches_tracked"):
            tensor.fill_(0 if "bottleneck" in name else 5)
    return model


def test_the_authors_file_converts_and_loads(released, tmp_path, capsys):
    path = tmp_path / "nat_mini_upernet.pth"
    mmcv_file(released, path)
    assert main(["convert", str(path), str(tmp_path / "out"), "--json"]) == 0
    done = json.loads(capsys.readouterr().out)
    assert done["architecture"] == "upernet_nat_mini" and done["largest_difference"] == 0
    assert done["tensors"] == len(released.state_dict())
    assert 'pipeline_tag: "image-segmentation"' in (tmp_path / "out/README.md").read_text()
    again = natcupy.from_pretrained(tmp_path / "out", dtype="auto")
    same(again.state_dict(), released.state_dict())
    assert again.name == "upernet_nat_mini" and again.label_names[2] == "sky"
    assert read_tensors(tmp_path / "out/model.safetensors").tensors.keys() == (
        released.state_dict().keys()
    )


def test_the_authors_file_itself(released, tmp_path):
    path = tmp_path / "mine.pth"
    mmcv_file(released, path)
    with pytest.raises(CheckpointError, match="upernet-nat-mini, upernet-dinat-mini"):
        natcupy.from_pretrained(path)
    with pytest.raises(CheckpointError, match="architecture upernet instead"):
        natcupy.from_pretrained(path, architecture="upernet-nat-tiny")
    model = natcupy.from_pretrained(path, architecture="upernet-dinat-mini", dtype="auto")
    assert model.config.backbone.dilations == BACKBONE.dilations
    same(model.state_dict(), released.state_dict())
    inner = natcupy.from_pretrained(path, architecture="nat-mini", dtype="auto")
    same(inner.state_dict(), released.backbone.state_dict())
    inner = natcupy.from_pretrained(
        path, architecture="upernet-dinat-mini", features_only=True, dtype="auto"
    )
    assert inner.config.dilations == BACKBONE.dilations


def test_publishing(released, tmp_path):
    mmcv_file(released, tmp_path / "nat_mini_upernet.pth")
    done = next(iter(publish.publish(["upernet-nat-mini"], "me", dry_run=True, originals=tmp_path)))
    assert done.error is None and done.conversion.tensors == len(released.state_dict())
    facts = publish._facts(weights.find("mask_rcnn_nat_tiny"), "me/x")
    assert [metric.value for metric in facts["metrics"]] == [47.7, 42.6]


def test_backbones_of_other_heads_still_load(tmp_path):
    inner = invented("backbone")
    state = {f"backbone.{name}": tensor for name, tensor in inner.state_dict().items()}
    assert dense.architecture_of(state) is None
    with pytest.raises(CheckpointError, match="none of these"):
        dense.infer_config(state)
