"""`natcupy segment` and `natcupy detect`: tables, JSON, pictures; and what they refuse."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from small_models import small

import natcupy
from natcupy.cli.detect import run_lengths
from natcupy.cli.painting import paint_detections, paint_segmentation
from natcupy.cli.pictures import LOSSLESS, save, targets
from natcupy.cli.segment import _numbers
from natcupy.zoo import ModelConfig
from natcupy.zoo.dense import DenseConfig, Detections, Segmentation, build_dense_model
from natcupy.zoo.dense.names import ADE20K, ADE20K_PALETTE, palette
from natcupy.zoo.dense.shapes import NAMES, SEGMENT_NAMES, make_scene

BACKBONE = ModelConfig(
    family="nat", embed_dim=8, depths=(1, 1), num_heads=(1, 2), kernel_size=3, out_indices=(0, 1),
)  # fmt: skip
CONFIGS = {
    "segmentation": DenseConfig("upernet", BACKBONE, 4, channels=8, aux_channels=4),
    "detection": DenseConfig("mask_rcnn", BACKBONE, 3, channels=8, fc_channels=16),
}


@pytest.fixture
def model(tmp_path, request):
    """The folder of a small model with random weights that finds something everywhere."""
    torch.manual_seed(0)
    config = CONFIGS[request.param]
    model = build_dense_model(config)
    for name, parameter in model.named_parameters():
        if "bias" not in name:
            torch.nn.init.normal_(parameter, std=0.3)
    names = SEGMENT_NAMES if config.task == "segmentation" else NAMES
    model.pretrained_cfg |= {"long_side": 96, "short_side": 64, "label_names": names}
    return model.save_pretrained(tmp_path / "model")


segments = pytest.mark.parametrize("model", ["segmentation"], indirect=True)
detects = pytest.mark.parametrize("model", ["detection"], indirect=True)


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.jpg"
    Image.fromarray(make_scene(3, 70, 100).pixels.numpy()).save(path, quality=95)
    return path


@segments
def test_segment(run, model, photo, tmp_path):
    status, out, err = run("segment", photo, "--model", model, "-o", "out.png", "--labels", "l.png")
    assert (status, err) == (0, "") and "out.png" in out and " %" in out
    assert Image.open("out.png").size[1] >= 480
    truth = natcupy.from_pretrained(model).predict(photo)
    with Image.open("l.png") as labels:
        assert np.array_equal(np.asarray(labels), truth.labels.numpy())
    status, out, _ = run("segment", photo, "--model", model, "--json")
    record = json.loads(out)["results"][0]
    assert status == 0 and (record["height"], record["width"]) == (70, 100)
    found = {each["name"]: each["share"] for each in record["classes"]}
    assert found == pytest.approx(dict(truth.areas())) and sum(found.values()) == pytest.approx(1)
    assert all(0 < each["confidence"] <= 1 for each in record["classes"])


@pytest.mark.parametrize(
    ("model", "command"),
    [("segmentation", "segment"), ("detection", "detect")],
    indirect=["model"],
)
def test_a_folder_that_cannot_be_listed_stops_no_picture(run, model, command, photo, closed):
    status, out, err = run(command, closed / "more", photo, "--model", model, "--json")
    (record,) = json.loads(out)["results"]
    assert status == 1 and record["file"] == str(photo) and "error" not in record
    assert err.startswith("natcupy: warning: ") and "more (Permission denied)" in err


@pytest.mark.parametrize(
    ("model", "command"),
    [("segmentation", "segment"), ("detection", "detect")],
    indirect=["model"],
)
def test_a_grey_picture_of_sixteen_bits(run, model, command):
    grey = make_scene(3, 60, 80).pixels.numpy().mean(-1)
    Image.fromarray(grey.astype(np.uint8)).save("eight.png")
    Image.fromarray(grey.astype(np.uint8).astype(np.uint16) * 257).save("sixteen.png")
    found = []
    for name in ("eight.png", "sixteen.png"):
        status, out, err = run(command, name, "--model", model, "-o", f"out-{name}", "--json")
        assert (status, err) == (0, "")
        (result,) = json.loads(out)["results"]
        found.append(len(result["classes"] if command == "segment" else result["objects"]))
    assert found[0] == found[1] > 0
    # Floats are resized without rounding, so results are near, not equal.
    means = [np.asarray(Image.open(f"out-{name}")).mean() for name in ("eight.png", "sixteen.png")]
    assert abs(means[0] - means[1]) < 10


@segments
def test_segment_with_scales_and_flips(run, model, photo):
    status, out, _ = run("segment", photo, "--model", model, "--json", "--multi-scale")
    truth = natcupy.from_pretrained(model).predict(
        photo, (0.5, 0.75, 1.0, 1.25, 1.5, 1.75), flip=True
    )
    found = {each["name"]: each["share"] for each in json.loads(out)["results"][0]["classes"]}
    assert status == 0 and found == pytest.approx(dict(truth.areas()))


@detects
def test_detect(run, model, photo):
    status, out, _ = run(
        "detect", photo, "--model", model, "--json", "--score-threshold", 0, "-o", "o.png"
    )
    found = json.loads(out)
    objects = found["results"][0]["objects"]
    assert status == 0 and objects and Image.open("o.png").mode == "RGB"
    scores = [each["score"] for each in objects]
    assert scores == sorted(scores, reverse=True)
    middle = sorted(scores)[len(scores) // 2]
    _, out, _ = run("detect", photo, "--model", model, "--json", "--score-threshold", middle)
    kept = json.loads(out)["results"][0]["objects"]
    assert [each["score"] for each in kept] == [s for s in scores if s >= middle]
    for each in objects:
        assert each["mask"]["size"] == [70, 100] and sum(each["mask"]["counts"]) == 7000
        assert sum(each["mask"]["counts"][1::2]) == each["area"] and each["name"] in NAMES
    _, out, _ = run("detect", photo, "--model", model, "--json", "--no-masks")
    assert all("mask" not in each for each in json.loads(out)["results"][0]["objects"])
    status, out, _ = run("detect", photo, "--model", model, "--score-threshold", 1)
    assert status == 0 and "nothing above the threshold" in out


@segments
def test_several_pictures_and_one_that_is_none(run, model, photo, tmp_path):
    (tmp_path / "folder/more").mkdir(parents=True)
    for name in ("folder/a.png", "folder/more/a.jpg"):
        Image.open(photo).save(tmp_path / name)
    (tmp_path / "folder/broken.png").write_bytes(b"no picture")
    status, out, err = run("segment", "folder", "--model", model, "-o", "drawn", "--json")
    results = json.loads(out)["results"]
    assert status == 1 and "broken.png" in err and len(results) == 3
    assert sorted(p.name for p in (tmp_path / "drawn").iterdir()) == ["a-2.png", "a.png"]
    status, out, err = run("segment", "folder", "--model", model, "-o", "x.png")
    assert (status, out) == (1, "") and "must be a folder for several pictures, got x.png" in err
    assert not (tmp_path / "x.png").exists()
    assert [("error" in each) for each in results] == [False, True, False]


@segments
@pytest.mark.parametrize("size", [(1, 1), (1, 300), (400, 3)])
def test_pictures_of_odd_sizes(run, model, tmp_path, size):
    Image.new("RGB", size, (10, 200, 30)).save("odd.png")
    status, out, err = run("segment", "odd.png", "--model", model, "-o", "out.png", "--json")
    assert (status, err) == (0, "") and json.loads(out)["results"][0]["width"] == size[0]


@detects
def test_a_large_picture(run, model):
    Image.fromarray(make_scene(3, 300, 400).pixels.numpy()).resize((4000, 3000)).save("large.jpg")
    status, _, err = run("detect", "large.jpg", "--model", model, "-o", "out.jpg", "--no-masks")
    assert (status, err) == (0, "") and Image.open("out.jpg").size == (4000, 3000)


@segments
def test_wrong_models_and_places(run, model, photo):
    status, _, err = run("detect", photo, "--model", model)
    assert status == 1 and "must be a detection model" in err
    status, _, err = run("segment", photo, "--model", "nat-digits")
    assert status == 1 and "a classifier" in err
    status, _, err = run("classify", photo, "--model", model)
    assert status == 1 and "natcupy segment" in err
    status, _, err = run("attend", photo, "--model", model)
    assert status == 1 and "must be a classifier" in err
    for command, name, other in (
        ("classify", "upernet-nat-tiny", "segment"),
        ("attend", "mask_rcnn_nat_mini.coco", "detect"),
        ("detect", "upernet-nat-tiny", "segment"),
        ("segment", "nat-tiny", "classify"),
        ("segment", "shi-labs/nat-tiny-in1k-224@main", "classify"),
    ):  # before anything is asked of the Hub or of a folder
        status, _, err = run(command, photo, "--model", name)
        assert status == 1 and f"`natcupy {other}` takes it" in err, err
    small("nat", out_indices=(0, 1)).save_pretrained("backbone")
    status, _, err = run("segment", photo, "--model", "./backbone")
    assert status == 1 and "a backbone; `natcupy attend` takes it" in err
    status, _, err = run("classify", photo, "--model", "./backbone")
    assert status == 1 and "a backbone; `natcupy attend` takes it" in err
    status, _, err = run("segment", photo, "--model", "upernet-nat-tiny")
    assert status == 1 and "nat_tiny_upernet.pth" in err and "--backbone nat-tiny" in err
    (photo.parent / "run").mkdir()
    status, _, err = run("segment", photo, "--model", "run/model")
    assert status == 1 and "there is no folder or file run/model here (run holds nothing)" in err
    status, _, err = run("segment", photo, "--model", model, "-o", photo)
    assert status == 1 and "must not replace" in err and Image.open(photo).format == "JPEG"
    status, _, err = run("segment", photo, "--model", model, "-o", "out.txt")
    assert status == 1 and ".png" in err


@segments
def test_overlays_and_labels_have_places_of_their_own(run, model, photo, tmp_path):
    alike = ("--model", model, "-o", "out.png", "--labels", tmp_path / "out.png")
    status, _, err = run("segment", photo, *alike)
    assert status == 1 and "--output and --labels must name different" in err
    assert not (tmp_path / "out.png").exists()
    Image.open(photo).save("more.png")
    status, _, err = run(
        "segment", photo, "more.png", "--model", model, "-o", "all", "--labels", "./all/"
    )
    assert status == 1 and "--output and --labels must name different" in err
    assert not (tmp_path / "all").exists()


@segments
def test_labels_lose_nothing(run, model, photo, tmp_path):
    truth = natcupy.from_pretrained(model).predict(photo).labels.numpy()
    for suffix in LOSSLESS:
        assert run("segment", photo, "--model", model, "--labels", f"l{suffix}")[0] == 0
        with Image.open(f"l{suffix}") as labels:
            assert np.array_equal(np.asarray(labels), truth)
    for suffix in (".jpg", ".webp", ".gif", ".txt"):
        status, _, err = run("segment", photo, "--model", model, "--labels", f"l{suffix}")
        assert (
            status == 1
            and f"--labels must end in .png or .tif, .tiff, .bmp, .pgm, got l{suffix}" in err
        )
        assert not (tmp_path / f"l{suffix}").exists()


@pytest.mark.parametrize("suffix", [".png", ".tif", ".tiff", ".pgm"])
def test_labels_of_many_classes_lose_nothing(tmp_path, suffix):
    labels = torch.arange(300).reshape(15, 20)
    found = Segmentation(labels, torch.ones(15, 20), tuple(map(str, range(300))))
    save(_numbers(found), tmp_path / f"l{suffix}")
    with Image.open(tmp_path / f"l{suffix}") as again:
        assert np.array_equal(np.asarray(again), labels.numpy())


def test_targets(tmp_path):
    from pathlib import Path

    files = [Path("a/x.jpg"), Path("b/X.png"), Path("c/y.jpg")]
    names = [path.name for path in targets(files, str(tmp_path / "new"))]
    assert names == ["x.png", "X-2.png", "y.png"]
    assert targets(files, None) == [None] * 3
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="must be a folder"):
        targets(files, str(tmp_path / "file"))
    for name in ("x.png", "x.JPG"):
        told = rf"--output must be a folder for several pictures, got {name} for 3\. Name a"
        with pytest.raises(ValueError, match=told):
            targets(files, name)
    with pytest.raises(ValueError, match="--labels must be a folder"):  # no file of labels, either
        targets(files, "x.jpg", "--labels", LOSSLESS)
    (tmp_path / "folder.png").mkdir()
    for name in ("folder.png", "new.png/", "run.1"):
        assert targets(files, str(tmp_path) + "/" + name)[0] == tmp_path / name / "x.png"
    assert targets(files[:1], "x.png") == [Path("x.png")]
    with pytest.raises(ValueError, match=r"got drawn\. Write drawn/ for a folder"):
        targets(files[:1], "drawn")


# -- run lengths and drawings ---------------------------------------------------------------------


def test_run_lengths_are_cocos():
    masks = pytest.importorskip("pycocotools.mask")
    rng = torch.Generator().manual_seed(0)
    for density in (0.0, 0.02, 0.5, 1.0):
        mask = torch.rand(13, 9, generator=rng) < density
        own = run_lengths(mask)
        packed = masks.frPyObjects(own, *own["size"])
        assert np.array_equal(masks.decode(packed).astype(bool), mask.numpy())


def test_the_overlay_has_the_classes_colours():
    labels = torch.zeros(480, 500, dtype=torch.int64)
    labels[:, 250:] = 2
    found = Segmentation(labels, torch.ones(480, 500), SEGMENT_NAMES)
    grey = np.full((480, 500, 3), 100, dtype=np.uint8)
    drawn = np.asarray(paint_segmentation(grey, found))
    assert tuple(drawn[10, 10]) == (100, 100, 100)  # background stays
    expected = 0.45 * 100 + 0.55 * np.array(palette(4)[2])
    assert np.abs(drawn[10, 400] - expected).max() <= 1
    assert drawn.shape[1] > 500  # the legend
    assert (drawn[10:470, 249] == 245).all()


def test_the_legend_holds_every_size():
    rng = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 150, (60, 40), generator=rng)
    found = Segmentation(labels, torch.ones(60, 40), ADE20K)
    drawn = np.asarray(paint_segmentation(np.zeros((60, 40, 3), dtype=np.uint8), found))
    assert drawn.shape[0] == 720 and drawn.shape[1] > 480
    seen = {tuple(colour) for colour in drawn[:, 480:].reshape(-1, 3)}
    assert len(seen & set(ADE20K_PALETTE)) >= 5


def test_objects_are_outlined_and_labels_stay_inside():
    boxes = torch.tensor([[100.0, 120.0, 300.0, 400.0], [0.0, 0.0, 20.0, 20.0],
                          [590.0, 470.0, 600.0, 480.0], [0.0, 0.0, 1.0, 0.4]])  # fmt: skip
    found = Detections(
        boxes, torch.tensor([0.9, 0.8, 0.7, 0.6]), torch.tensor([0, 1, 2, 2]),
        torch.ones(4, 28, 28), (480, 600), NAMES,
    )  # fmt: skip
    drawn = np.asarray(paint_detections(np.full((480, 600, 3), 100, dtype=np.uint8), found))
    assert drawn.shape == (480, 600, 3)
    colours = np.array(palette(3))
    assert (drawn[250, 100] == colours[0]).all() and (drawn[399, 200] == colours[0]).all()
    expected = 0.55 * 100 + 0.45 * colours[0]
    assert np.abs(drawn[300, 200] - expected).max() <= 1
    assert (drawn[450, 100] == 100).all()
    empty = found[found.scores > 1]
    assert (np.asarray(paint_detections(np.full((480, 600, 3), 7, np.uint8), empty)) == 7).all()
