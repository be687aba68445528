"""Training of segmentation and detection models: a few steps, what is written, what is refused."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import natcupy
from natcupy.cli import main
from natcupy.cli.finetune_dense import data_of
from natcupy.cli.finetune_resume import completed
from natcupy.cli.parser import build_parser
from natcupy.data.coco import CocoPictures
from natcupy.data.dense_augment import DetectionViews, SegmentationViews
from natcupy.data.label_maps import find_maps
from natcupy.data.source import DataError
from natcupy.hub.dense import CLASSIFIERS
from natcupy.train import TrainConfig, TrainError
from natcupy.train.dense_finetuning import finetune_dense, load_dense, prepare
from natcupy.train.optimizer import make_optimizer
from natcupy.zoo import ModelConfig, build_model
from natcupy.zoo.config import ConfigError
from natcupy.zoo.dense import DenseConfig, build_dense_model
from natcupy.zoo.dense.rpn import ProposalRules
from natcupy.zoo.dense.shapes import NAMES, SEGMENT_NAMES, make_scene

pytest.importorskip("accelerate")
codec = pytest.importorskip("pycocotools.mask")

SIDE = 64
BACKBONE = ModelConfig(
    family="nat", embed_dim=16, depths=(1, 1, 1), num_heads=(1, 2, 4), kernel_size=3,
    mlp_ratio=2.0, out_indices=(0, 1, 2),
)  # fmt: skip


def small(architecture, classes, names):
    torch.manual_seed(0)
    widths = {"channels": 16, "aux_channels": 8} if architecture == "upernet" else {
        "channels": 16, "fc_channels": 32}  # fmt: skip
    model = build_dense_model(
        DenseConfig(architecture, BACKBONE, classes, **widths),
        {"label_names": names, "long_side": SIDE, "short_side": SIDE},
    )
    if architecture != "upernet":
        model.train_proposals = ProposalRules(per_level=50, most=30)
    return model


@pytest.fixture(scope="module")
def maps(tmp_path_factory):
    root = tmp_path_factory.mktemp("maps")
    for part, seeds in (("train", range(12)), ("val", range(100, 103))):
        for kind in ("images", "masks"):
            (root / part / kind).mkdir(parents=True)
        for seed in seeds:
            scene = make_scene(seed, SIDE, SIDE)
            Image.fromarray(scene.pixels.numpy()).save(root / part / f"images/{seed}.png")
            labels = Image.fromarray(scene.labels.numpy().astype(np.uint8))
            labels.save(root / part / f"masks/{seed}.png")
    (root / "classes.txt").write_text("\n".join(SEGMENT_NAMES))
    return root


@pytest.fixture(scope="module")
def objects(tmp_path_factory):
    root = tmp_path_factory.mktemp("objects")
    images, annotations = [], []
    for seed in range(10):
        scene = make_scene(seed, SIDE, SIDE, most=0 if seed == 9 else 3)
        Image.fromarray(scene.pixels.numpy()).save(root / f"{seed}.png")
        images.append({"id": seed, "file_name": f"{seed}.png", "height": SIDE, "width": SIDE})
        truth = scene.objects
        for box, label, mask in zip(truth.boxes, truth.labels, truth.masks, strict=True):
            x1, y1, x2, y2 = box.tolist()
            runs = codec.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))
            annotations.append({
                "id": len(annotations) + 1, "image_id": seed, "category_id": int(label) + 1,
                "bbox": [x1, y1, x2 - x1, y2 - y1], "area": int(mask.sum()), "iscrowd": 0,
                "segmentation": {"size": [SIDE, SIDE], "counts": runs["counts"].decode()},
            })  # fmt: skip
    categories = [{"id": number, "name": name} for number, name in enumerate(NAMES, 1)]
    path = root / "objects.json"
    content = {"images": images, "annotations": annotations, "categories": categories}
    path.write_text(json.dumps(content))
    return path


def config(folder, **changes):
    usual = {"epochs": 4, "batch_size": 4, "lr": 2e-3, "layer_decay": 1.0, "workers": 0}
    return TrainConfig(output=folder, **{**usual, **changes})


def typed(*words):
    return completed(build_parser().parse_args(words))


PLAIN = {
    "segmentation": SegmentationViews(SIDE, SIDE, (1.0, 1.0), (SIDE, SIDE), photometric=False),
    "detection": DetectionViews((SIDE,), SIDE, cut_short_sides=()),
}


def test_segmentation_learns_and_leaves_a_folder(maps, tmp_path):
    parts = find_maps(maps)
    model = small("upernet", 4, SEGMENT_NAMES)
    result = finetune_dense(
        model, parts["train"], parts["val"], config(tmp_path / "run", lr=1e-2, epochs=5),
        views=PLAIN["segmentation"], data_name="made scenes", license="mit",
    )  # fmt: skip
    losses = [row["train_loss"] for row in result.history]
    assert losses[-1] < 0.9 * losses[0]
    assert 0 < result.scores["val_miou"] < 1 and result.scores["val_pixel_accuracy"] > 0.3
    assert {"log.csv", "log.json", "curves.png", "model"} <= {
        path.name for path in result.folder.iterdir()
    }
    again = natcupy.from_pretrained(result.folder / "model")
    scene = make_scene(100, SIDE, SIDE).pixels
    assert torch.equal(again.predict(scene).labels, result.model.predict(scene).labels)
    card = (result.folder / "model/README.md").read_text()
    assert "stochastic depth" in card and "label smoothing" not in card
    assert "Mean IoU" in card and "image-segmentation" in card and "made scenes" in card
    # the score is what the saved model does on the held-out pictures
    from natcupy.zoo.dense.metrics import confusion, mean_iou

    matrix = sum(
        confusion(again.predict(item.pixels).labels, item.labels, 4)
        for item in map(parts["val"].__getitem__, range(3))
    )
    assert mean_iou(matrix)[0] == pytest.approx(result.scores["val_miou"])


@pytest.mark.parametrize("architecture", ["mask_rcnn", "cascade_mask_rcnn"])
def test_detection_learns_and_leaves_a_folder(architecture, objects, tmp_path):
    data = CocoPictures(objects)
    model = small(architecture, 3, NAMES)
    result = finetune_dense(
        model, data.subset(range(8)), data.subset([8, 9]), config(tmp_path / "run", epochs=3),
        views=PLAIN["detection"],
    )  # fmt: skip
    losses = [row["train_loss"] for row in result.history]
    assert losses[-1] < losses[0] and np.isfinite(losses).all()
    assert 0 <= result.scores["val_box_ap"] <= 1 and "val_mask_ap" in result.scores
    again = natcupy.from_pretrained(result.folder / "model")
    scene = make_scene(8, SIDE, SIDE).pixels
    one, other = again.predict(scene), result.model.predict(scene)
    assert torch.equal(one.boxes, other.boxes) and again.label_names == NAMES
    assert "Box AP" in (result.folder / "model/README.md").read_text()


SHARDED = """
import atexit, sys
sys.path.insert(0, sys.argv[1])
import torch
atexit.register(lambda: print("a group is left:", torch.distributed.is_initialized()))  # the last
torch.set_num_threads(1)
import sharding
import test_train_dense as own
architecture, data, output = sys.argv[2:]
sharding.on_gloo(2)
if architecture == "upernet":
    parts = own.find_maps(data)
    train, val, names = parts["train"], parts["val"], own.SEGMENT_NAMES
else:
    pictures = own.CocoPictures(data)
    train, val, names = pictures.subset(range(7)), pictures.subset([7, 8, 9]), own.NAMES
model = own.small(architecture, len(names), names)
settings = own.config(output, epochs=1, batch_size=2, channels_last=False)
own.finetune_dense(model, train, val, settings, views=own.PLAIN[model.config.task])
"""


@pytest.mark.parametrize("architecture", ["upernet", "mask_rcnn"])
def test_two_sharded_processes(architecture, maps, objects, tmp_path):
    """They train and examine three held-out pictures, of which one process has only one."""
    data = maps if architecture == "upernet" else objects
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    tests = Path(__file__).parent
    words = ["-c", SHARDED, str(tests), architecture, str(data), str(tmp_path / "run")]
    place |= {"WORLD_SIZE": "2", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tests.parent)}
    started = [
        subprocess.Popen(
            [sys.executable, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, **place, "RANK": rank, "LOCAL_RANK": rank},
        )
        for rank in "01"
    ]  # fmt: skip
    try:
        told = [process.communicate(timeout=180) for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], told
    assert all("a group is left: False" in out for out, _ in told)  # else gloo aborts, sometimes
    (row,) = json.loads((tmp_path / "run/log.json").read_text())["epochs"]
    assert 0 <= row["val_miou" if architecture == "upernet" else "val_box_ap"] <= 1


def test_the_command(maps, objects, tmp_path, capsys):
    start = small("upernet", 4, SEGMENT_NAMES).save_pretrained(tmp_path / "start")
    few = ["--epochs", "1", "--workers", "0", "--batch-size", "2", "--json"]
    command = ["finetune", str(maps), "--task", "segmentation", "--model", str(start)]
    assert main([*command, "--output", str(tmp_path / "a"), *few]) == 0
    told = json.loads(capsys.readouterr().out.split("MiB on cpu\n")[-1])
    assert told["scores"]["val_miou"] > 0
    assert main(["finetune", "--resume", str(tmp_path / "a"), "--epochs", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.split("MiB on cpu\n")[-1])["epoch"] in (1, 2)
    start = small("mask_rcnn", 5, None).save_pretrained(tmp_path / "other")
    command = ["finetune", str(objects), "--task", "detection", "--model", str(start)]
    assert main([*command, "--output", str(tmp_path / "b"), *few, "--val-fraction", "0.3"]) == 0
    model = natcupy.from_pretrained(tmp_path / "b/model")
    assert model.num_classes == 3 and model.label_names == NAMES
    command[3] = "segmentation"
    assert main([*command, "--output", str(tmp_path / "c"), *few]) == 1
    capsys.readouterr()
    command = ["finetune", str(maps), "--task", "detection", "--model", str(start)]
    assert main([*command, "--output", str(tmp_path / "c"), *few]) == 1
    assert not (tmp_path / "c").exists()


def test_a_batch_of_one_is_refused_before_the_first_step(maps, objects, tmp_path):
    """A UPerNet cannot learn from it; the folder stays free for better numbers."""
    parts = find_maps(maps)
    for changes, told in (
        ({"batch_size": 1}, r"at least 2 pictures, got 1 \(batch_size 1;.*Set batch_size to 2"),
        ({"accumulate": 7}, r"got 1 \(batch_size 4; 12 pictures for 1.*7 passes\).*Add pictures"),
    ):
        with pytest.raises(TrainError, match=told):
            finetune_dense(
                small("upernet", 4, SEGMENT_NAMES), parts["train"], None,
                config(tmp_path / "run", epochs=1, **changes),
            )  # fmt: skip
        assert not (tmp_path / "run").exists()
    finetune_dense(
        small("mask_rcnn", 3, NAMES), CocoPictures(objects).subset(range(3)), None,
        config(tmp_path / "other", epochs=1, batch_size=1), views=PLAIN["detection"],
    )  # fmt: skip


def test_cocos_own_layout(objects, tmp_path):
    """Two files in `annotations`, a folder of pictures for each; or folders by any name."""
    (tmp_path / "annotations").mkdir()
    for part in ("train2017", "val2017"):
        shutil.copytree(objects.parent, tmp_path / part)
        (tmp_path / part / objects.name).unlink()
        chosen = range(8) if part == "train2017" else range(8, 10)
        text = json.dumps(CocoPictures(objects).subset(chosen).dataset)
        (tmp_path / f"annotations/instances_{part}.json").write_text(text)
    words = ["finetune", str(tmp_path / "annotations/instances_train2017.json"), "--val",
             str(tmp_path / "annotations/instances_val2017.json"), "--task", "detection",
             "--model", "m", "--output", "o"]  # fmt: skip

    def folders(*more):
        found = data_of(typed(*words, *more), 0)
        return [data.folder.name for data in found]

    assert folders() == ["train2017", "val2017"]
    (tmp_path / "train2017").rename(tmp_path / "a")
    (tmp_path / "val2017").rename(tmp_path / "b")
    one, other = str(tmp_path / "a"), str(tmp_path / "b")
    assert folders("--images", one, "--val-images", other) == ["a", "b"]
    assert folders("--images", one) == ["a", "a"]


def test_a_part_to_examine_is_not_trained_on(maps, tmp_path):
    shutil.copytree(maps / "val", tmp_path / "val")
    words = ["finetune", str(tmp_path), "--task", "segmentation", "--model", "m", "--output", "o"]
    with pytest.raises(DataError, match="must have a part called train, got val"):
        data_of(typed(*words), 0)
    words[1] = str(tmp_path / "val")
    assert [len(data) for data in data_of(typed(*words), 0)] == [2, 1]


def test_held_out_pictures_are_not_trained_on(maps, objects, tmp_path, capsys):
    """A share is set apart, which a note tells; the pictures trained on are refused as others."""
    words = {"segmentation": [str(maps / "train")], "detection": [str(objects)]}
    for task, data in words.items():
        command = ["finetune", *data, "--task", task, "--model", "m", "--output", "o"]
        train, val = data_of(typed(*command), 0)
        whole = len(train) + len(val)
        assert not {train.where(i) for i in range(len(train))} & {val.where(0)}
        assert train.notes[-1] == f"1 of {whole} pictures are held out: 10 %, by seed 0"
        train, val = data_of(typed(*command, "--val-fraction", "0"), 0)
        assert val is None and not any("held out" in note for note in train.notes)
        told = rf"others than those trained on, got {whole} of {whole} that are the same: .*\.png"
        with pytest.raises(DataError, match=told):
            data_of(typed(*command, "--val", *data), 0)
    start = small("mask_rcnn", 3, NAMES).save_pretrained(tmp_path / "start")
    few = ["--epochs", "1", "--workers", "0", "--output", str(tmp_path / "run")]
    command = ["finetune", str(objects), "--task", "detection", "--model", str(start), *few]
    assert main(command) == 0
    told = capsys.readouterr().out
    assert "1 of 10 pictures are held out: 10 %, by seed 0\n" in told and "% held out" in told


@pytest.mark.parametrize("fraction", ["-0.5", "nan", "0.95", "inf"])
def test_a_share_to_hold_out_that_is_none(maps, tmp_path, capsys, fraction):
    """Said before anything is begun, also where other pictures are held out."""
    command = ["finetune", str(maps), "--task", "segmentation", "--model", "m"]
    for data in (str(maps), str(maps / "train")):
        command[1] = data
        assert main([*command, "--output", str(tmp_path / "a"), "--val-fraction", fraction]) == 1
        told = f"--val-fraction must lie in 0..0.9, got {float(fraction)}. Name a share"
        assert told in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


@pytest.fixture(params=["{part}/{kind}", "{kind}/{part}"])
def four_parts(request, maps, tmp_path):
    """train, validation, Test and other."""
    root = tmp_path / "parts"
    for part, count in {"train": 4, "validation": 1, "Test": 2, "other": 3}.items():
        for kind in ("images", "masks"):
            place = root / request.param.format(part=part, kind=kind)
            place.mkdir(parents=True)
            for seed in range(count):
                shutil.copy(maps / "train" / kind / f"{seed}.png", place)
    shutil.copy(maps / "classes.txt", root)
    return root


def test_a_part_named_to_be_held_out(four_parts, maps):
    """In capitals or not, by a part's own name or by what it is; not the one trained on."""
    words = ["finetune", str(four_parts), "--task", "segmentation", "--model", "m", "--output", "o"]

    def counts(*val):
        return [len(each) for each in data_of(typed(*words, *val), 0)]

    assert counts("--val", "test") == counts("--val", "Test") == [4, 2]
    assert counts("--val", "other") == [4, 3]
    assert counts("--val", "validation") == counts("--val", "val") == [4, 1]
    assert counts("--val", str(maps)) == [4, 3]  # its part val
    with pytest.raises(DataError, match="another part than the one to train on, got Train"):
        counts("--val", "Train")
    with pytest.raises(DataError, match="nowhere must hold a folder of pictures"):
        counts("--val", "nowhere")


def test_other_classes_keep_the_rest():
    model = small("mask_rcnn", 5, tuple("abcde"))
    other = prepare(model, NAMES, config("x"))
    assert other.num_classes == 3 and other.label_names == NAMES
    mine, theirs = model.state_dict(), other.state_dict()
    changed = {n for n in mine if mine[n].shape != theirs[n].shape}
    assert {n.split(".")[-2] for n in changed} == {"fc_cls", "fc_reg", "conv_logits"}
    assert all(torch.equal(mine[n], theirs[n]) for n in mine.keys() - changed)
    same = small("mask_rcnn", 3, NAMES)
    assert prepare(same, NAMES, config("x")) is same
    sized = prepare(same, NAMES, config("x", image_size=32, drop_path=0.4))
    assert (sized.recipe.short_side, sized.recipe.long_side) == (32, 32)
    assert sized.config.backbone.drop_path_rate == 0.4
    assert sized.backbone.levels[2].blocks[0].drop_path.rate == pytest.approx(0.4)
    with pytest.raises(TrainError, match=r"in torch.float64\. Train model.float\(\)"):
        prepare(small("upernet", 5, None).double(), NAMES, config("x"))
    with pytest.raises(ConfigError, match="a row per class"):
        prepare(small("upernet", 3, None), (*NAMES, "x"), config("x", head="keep"))
    with pytest.raises(ConfigError, match="mixup belongs to classification"):
        prepare(same, NAMES, config("x", mixup=0.2))


@pytest.mark.parametrize("architecture", ["upernet", "mask_rcnn", "cascade_mask_rcnn"])
def test_known_classes_keep_their_rows(architecture, caplog):
    """In every head; of detectors with the deltas of a class, and the row of the background."""
    model = small(architecture, 5, ("ant", "bee", "cat", "dog", "elk"))
    for name, parameter in model.named_parameters():
        if CLASSIFIERS.fullmatch(name):
            torch.nn.init.normal_(parameter)
    model.source = "somewhere"
    other = prepare(model, ("dog", "fox", "ant"), config("x"))
    mine, theirs = model.state_dict(), other.state_dict()
    assert all(torch.equal(mine[n], theirs[n]) for n in mine if not CLASSIFIERS.fullmatch(n))
    heads = [name for name in mine if CLASSIFIERS.fullmatch(name)]
    assert len(heads) == {"upernet": 4, "mask_rcnn": 6, "cascade_mask_rcnn": 18}[architecture]
    for name in heads:
        each = 4 if "fc_reg" in name else 1
        had, has = mine[name].split(each), theirs[name].split(each)
        assert torch.equal(has[0], had[3]) and torch.equal(has[2], had[0])
        assert not any(torch.equal(has[1], row) for row in had)
        assert "fc_cls" not in name or torch.equal(has[3], had[5])
    assert "keeps its rows of 2 classes by name (dog, ant) and begins anew for 1: fox." in (
        caplog.text
    )
    caplog.clear()
    prepare(model, ("dog", "fox", "ant"), config("x", head="fresh"))
    assert not caplog.text


def test_a_fresh_model_says_nothing_of_rows(tmp_path, caplog):
    """Also where its backbone has a source: names alone, such as ADE20K's, have learned nothing."""
    sizes = {"embed_dim": 16, "num_heads": (1, 2, 4, 8), "depths": (1, 1, 1, 1)}
    classifier = build_model(natcupy.zoo.model_config("nat_mini", **sizes))
    folder = str(classifier.save_pretrained(tmp_path / "classifier"))
    few = {"channels": 8, "aux_channels": 4, **sizes}
    model = load_dense("upernet-nat-mini", config("x"), backbone=folder, **few)
    assert prepare(model, ("wall", "sky"), config("x")).label_names == ("wall", "sky")
    assert "rows" not in caplog.text and "anew" not in caplog.text


def test_other_classes_keep_what_is_frozen():
    model = small("upernet", 5, None)
    model.backbone.requires_grad_(False)
    model.set_grad_checkpointing(True)
    other = prepare(model, NAMES, config("x"))
    assert other is not model
    trained = {name for name, each in other.named_parameters() if each.requires_grad}
    assert trained == {name for name, each in model.named_parameters() if each.requires_grad}
    assert any(getattr(each, "grad_checkpointing", False) for each in other.modules())


@pytest.mark.parametrize("architecture", ["upernet", "mask_rcnn"])
def test_layer_decay(architecture):
    """Heads learn at the full rate, the backbone's layers below at ever smaller ones."""
    model = small(architecture, 3, None)
    made = make_optimizer(model, config("x", lr=1.0, layer_decay=0.5))
    names = {id(p): name for name, p in model.named_parameters()}
    rates = {names[id(p)]: group["lr"] for group in made.param_groups for p in group["params"]}
    assert {r for name, r in rates.items() if not name.startswith("backbone.")} == {1.0}
    blocks = [rates[f"backbone.levels.{i}.blocks.0.attn.qkv.weight"] for i in range(3)]
    assert blocks == [0.125, 0.25, 0.5]
    assert rates["backbone.patch_embed.proj.0.weight"] == 0.0625
    assert rates["backbone.levels.0.downsample.reduction.weight"] == 0.125
    assert rates["backbone.norm0.weight"] == 0.5
    assert list(model.group_matcher(coarse=True)) == ["stem", "blocks"]


def test_a_backbone_starts_from_a_classifier(tmp_path):
    numbers = natcupy.zoo.model_config(
        "nat_mini", embed_dim=16, num_heads=(1, 2, 4, 8), depths=(1, 1, 1, 1)
    )
    classifier = build_model(numbers)
    folder = classifier.save_pretrained(tmp_path / "classifier")
    model = load_dense(
        "upernet-nat-mini", config("x"), backbone=str(folder), num_classes=3, channels=8,
        aux_channels=4, embed_dim=16, num_heads=(1, 2, 4, 8), depths=(1, 1, 1, 1),
    )  # fmt: skip
    assert torch.equal(
        model.backbone.patch_embed.proj[0].weight, classifier.patch_embed.proj[0].weight
    )
    assert (model.backbone.norm3.weight == 1).all()
    with pytest.raises(TrainError, match="segmentation or detection model"):
        load_dense("nat-digits", config("x"))


def test_data_that_does_not_belong(maps, objects, tmp_path):
    data, parts = CocoPictures(objects), find_maps(maps)
    with pytest.raises(DataError, match="LabelledMaps"):
        finetune_dense(small("upernet", 3, None), data, None, config(tmp_path / "run"))
    with pytest.raises(DataError, match="CocoPictures"):
        finetune_dense(small("mask_rcnn", 3, None), parts["train"], None, config(tmp_path / "run"))
    with pytest.raises(DataError, match="at least one object"):
        finetune_dense(
            small("mask_rcnn", 3, None), data.subset([9]), None, config(tmp_path / "run")
        )
    one = find_maps(maps, classes=("a",))["train"]
    with pytest.raises(DataError, match=r"at least two classes, got 1: a.*foreground as 1"):
        finetune_dense(small("upernet", 1, None), one, None, config(tmp_path / "run"))
    other = find_maps(maps, classes=("a", "b", "c", "d"))["val"]
    with pytest.raises(DataError, match="in the same order"):
        finetune_dense(small("upernet", 4, None), parts["train"], other, config(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
