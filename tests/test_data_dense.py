"""Pictures with objects (COCO's format) and with maps of classes: reading, views, evaluation."""

import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from natcupy.data import dense_augment as augment
from natcupy.data.coco import CocoPictures, decode_mask
from natcupy.data.coco_ap import as_results, average_precision, encode_mask
from natcupy.data.dense_augment import DetectionViews, SegmentationViews
from natcupy.data.label_maps import LabelledMaps, find_maps
from natcupy.data.source import DataError
from natcupy.zoo.dense import Detections
from natcupy.zoo.dense.shapes import NAMES, boxes_of, make_scene
from natcupy.zoo.dense.targets import Objects

codec = pytest.importorskip("pycocotools.mask")


def rle(mask):
    return encode_mask(mask)


@pytest.fixture
def coco(tmp_path):
    """Three scenes as a COCO file: run lengths, polygons, a crowd, a box without area."""
    images, annotations = [], []
    for number in range(3):
        scene = make_scene(number, 60, 80, most=0 if number == 2 else 3)
        Image.fromarray(scene.pixels.numpy()).save(tmp_path / f"{number}.png")
        images.append({"id": 10 + number, "file_name": f"{number}.png", "height": 60, "width": 80})
        objects = scene.objects
        for box, label, mask in zip(objects.boxes, objects.labels, objects.masks, strict=True):
            x1, y1, x2, y2 = box.tolist()
            annotations.append({
                "id": len(annotations) + 1, "image_id": 10 + number, "iscrowd": 0,
                "category_id": 5 + 2 * int(label), "bbox": [x1, y1, x2 - x1, y2 - y1],
                "area": int(mask.sum()), "segmentation": rle(mask),
            })  # fmt: skip
    annotations += [
        {"id": 90, "image_id": 10, "category_id": 5, "bbox": [5, 5, 20, 10], "area": 200,
         "iscrowd": 0, "segmentation": [[5, 5, 25, 5, 25, 15, 5, 15]]},
        {"id": 91, "image_id": 10, "category_id": 5, "bbox": [1, 1, 0, 9], "area": 0, "iscrowd": 0,
         "segmentation": [[1, 1, 1, 10, 1, 5]]},
        {"id": 92, "image_id": 11, "category_id": 7, "bbox": [0, 0, 80, 60], "area": 4800,
         "iscrowd": 1, "segmentation": {"size": [60, 80], "counts": [0, 4800]}},
    ]  # fmt: skip
    categories = [{"id": 5 + 2 * label, "name": name} for label, name in enumerate(NAMES)]
    path = tmp_path / "scenes.json"
    content = {"images": images, "annotations": annotations, "categories": categories[::-1]}
    path.write_text(json.dumps(content))
    return path


def edited(path, change):
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
    return path


def test_a_coco_file(coco):
    data = CocoPictures(coco)
    assert data.classes == NAMES and len(data) == 3
    assert [note.split(":")[1].split()[0] for note in data.notes] == ["1", "1"]
    for number in range(3):
        scene, true = data[number], make_scene(number, 60, 80, most=0 if number == 2 else 3)
        count = len(true.objects.labels)
        assert torch.equal(scene.pixels, true.pixels)
        assert torch.equal(scene.objects.boxes[:count], true.objects.boxes)
        assert torch.equal(scene.objects.labels[:count], true.objects.labels)
        assert torch.equal(scene.objects.masks[:count], true.objects.masks)
    polygon = data[0].objects
    assert polygon.boxes[-1].tolist() == [5, 5, 25, 15] and polygon.masks[-1].sum() == 200
    assert polygon.masks[-1][5:15, 5:25].all()
    assert data[2].objects.boxes.shape == (0, 4) and data[2].objects.masks.shape == (0, 60, 80)
    assert sum(data.counts()) == sum(len(data[i].objects.labels) for i in range(3))
    again = pickle.loads(pickle.dumps(data))
    assert torch.equal(again[1].objects.masks, data[1].objects.masks)


def test_some_of_the_classes(coco):
    data = CocoPictures(coco, classes=("triangle", "circle"))
    assert data.classes == ("triangle", "circle") and data.category_id(0) == 9
    assert any("other classes" in note for note in data.notes)
    with pytest.raises(DataError, match="dog"):
        CocoPictures(coco, classes=("dog",))


def test_boxes_beyond_the_picture_are_cut(coco):
    edited(coco, lambda v: v["annotations"][0].update(bbox=[-5, 50, 30, 40]))
    assert CocoPictures(coco)[0].objects.boxes[0].tolist() == [0, 50, 25, 60]
    edited(coco, lambda v: v["annotations"][0].update(bbox=[100, 50, 30, 40]))
    assert any("2 boxes smaller" in note for note in CocoPictures(coco).notes)


BAD = [
    (lambda v: v.pop("categories"), "COCO's format"),
    (lambda v: v["categories"].clear(), "list categories"),
    (lambda v: v["categories"].append({"id": 5, "name": "dog"}), "there twice"),
    (lambda v: v["images"].clear(), "list pictures"),
    (lambda v: v["images"].append(v["images"][0]), "id of its own"),
    (lambda v: v["images"][0].update(file_name="gone.png"), "1 of 3 are missing: gone.png"),
    (lambda v: v["images"][0].update(file_name="../0.png"), "within its folder"),
    (lambda v: v["images"][0].update(height=0), "height and width"),
    (lambda v: v["annotations"][0].update(image_id=7), "image_id 7"),
    (lambda v: v["annotations"][0].update(category_id=6), "category ids, got 6"),
    (lambda v: v["annotations"][0].update(id=2), "two annotations have this id"),
    (lambda v: v["annotations"][0].update(bbox=[1, 2, 3]), "bbox"),
    (lambda v: v["annotations"][0].update(bbox=[1, 2, float("nan"), 3]), "finite"),
    (lambda v: v["annotations"][0].pop("segmentation"), "must have a segmentation"),
    (lambda v: v["annotations"][0].update(segmentation=[[1, 2, 3, 4]]), "three points"),
    (lambda v: v["annotations"][0].update(category_id=[5]), r"category ids, got \[5\]"),
    (lambda v: v["annotations"][0].update(area="9"), "a finite number, or none, got 9"),
    (lambda v: v["annotations"][-1].pop("segmentation"), "92 must have a segmentation"),
    (lambda v: v["annotations"][-1].update(segmentation=[]), "92 must have a segmentation"),
    (lambda v: v["annotations"][0]["segmentation"].update(counts=""), "its 4800 pixels, got 0"),
    (lambda v: v["annotations"][0]["segmentation"].update(counts="zzz~"), "pixels, got none"),
    (
        lambda v: v["annotations"][0].update(segmentation={"size": [80, 60], "counts": "x"}),
        r"picture's size \[60, 80\], got \[80, 60\]",
    ),
    (
        lambda v: v["annotations"][0].update(segmentation={"size": [60, 80], "counts": [1, 2]}),
        "add up to its 4800",
    ),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_wrong_coco_files(coco, change, message):
    with pytest.raises(DataError, match=message):
        CocoPictures(edited(coco, change))


def test_wrong_pictures(coco, tmp_path):
    Image.new("RGB", (81, 60)).save(tmp_path / "1.png")
    with pytest.raises(DataError, match=r"1\.png must have the size .* 80 x 60, got 81 x 60"):
        CocoPictures(coco)[1]
    (tmp_path / "1.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"1\.png cannot be read"):
        CocoPictures(coco)[1]
    with pytest.raises(DataError, match="is not there"):
        CocoPictures(coco, tmp_path / "nowhere")
    coco.write_text("{")
    with pytest.raises(DataError, match="not valid JSON"):
        CocoPictures(coco)
    with pytest.raises(DataError, match="no such file"):
        CocoPictures(tmp_path / "none.json")


# -- evaluation -----------------------------------------------------------------------------------


def exact(objects, scores):
    """Detections that say just what the objects are; masks filled boxes."""
    count = len(objects.labels)
    return Detections(
        objects.boxes, scores[:count], objects.labels, torch.ones(count, 28, 28), (60, 80), NAMES
    )


def test_average_precision(coco):
    full = CocoPictures(coco)
    data = CocoPictures(edited(coco, lambda v: v["annotations"].pop(-2)))
    results = []
    for index in range(3):
        found = exact(data[index].objects, torch.linspace(0.9, 0.5, 9))
        results += as_results(found, data, index)
    scores = average_precision(data, results)
    assert scores["box_ap"] == scores["box_ap50"] == pytest.approx(1)
    assert 0 < scores["mask_ap"] < 1  # boxes are not circles
    assert average_precision(full, results)["box_ap"] < 1  # the box without area is missed
    assert average_precision(data, [])["box_ap"] == 0
    # what lies in the crowd is not wrong
    inside = exact(
        Objects(torch.tensor([[0.0, 0.0, 9.0, 9.0]]), torch.tensor([1]), torch.zeros(1, 60, 80)),
        torch.tensor([0.99]),
    )
    more = results + as_results(inside, data, 1)
    assert average_precision(data, more)["box_ap"] == pytest.approx(1)
    wrong = results + as_results(inside, data, 2)
    assert average_precision(data, wrong)["box_ap"] < 1


LEFT_OUT = [
    {"bbox": [3, 3, 0, 0], "area": 0, "segmentation": []},
    {"bbox": [3, 3, 0, 0], "area": 0, "segmentation": [[3, 3]]},
    {"bbox": [3, 3, 9, 9], "area": 0, "segmentation": []},
    {"bbox": [3, 3, 9, 9], "area": 0},
]


@pytest.mark.parametrize("change", LEFT_OUT)
def test_objects_that_are_left_out_need_no_mask(coco, change):
    """They are missed in the evaluation, as any that is not found."""
    data = CocoPictures(coco)
    results = as_results(exact(data[0].objects, torch.linspace(0.9, 0.5, 9)), data, 0)
    before = average_precision(data, results)

    def add(values):
        values["annotations"].append({"id": 93, "image_id": 10, "category_id": 5, **change})

    data = CocoPictures(edited(coco, add))
    after = average_precision(data, results)
    assert after.keys() == before.keys() and after["mask_ap"] <= before["mask_ap"]


@pytest.mark.parametrize("key", ["iscrowd", "area"])
def test_null_is_as_good_as_absent(coco, key):
    CocoPictures(edited(coco, lambda v: v["annotations"][0].pop(key)))
    data = CocoPictures(coco)
    results = as_results(exact(data[0].objects, torch.linspace(0.9, 0.5, 9)), data, 0)
    absent = average_precision(data, results)
    edited(coco, lambda v: v["annotations"][0].update({key: None}))
    assert average_precision(CocoPictures(coco), results) == absent


def test_objects_of_other_classes_may_lack_anything(coco):
    def add(values):
        values["categories"].append({"id": 99, "name": "face"})
        values["annotations"].append({"id": 93, "image_id": 10, "category_id": 99})

    data = CocoPictures(edited(coco, add), classes=NAMES)
    results = as_results(exact(data[0].objects, torch.linspace(0.9, 0.5, 9)), data, 0)
    assert average_precision(data, results)["box_ap"] > 0


@pytest.mark.parametrize("runs", ["", "0", "zzzz~~", "é"])
def test_runs_that_end_early_are_no_mask(runs):
    """What follows them would be whatever the memory held."""
    with pytest.raises(DataError, match="must add up to its 400 pixels"):
        decode_mask({"size": [20, 20], "counts": runs}, (20, 20))
    with pytest.raises(DataError, match="must add up to its 400 pixels"):
        decode_mask({"size": [20, 20], "counts": rle(torch.eye(8).bool())["counts"]}, (20, 20))


def test_compressed_runs_are_added_up():
    draw = torch.Generator().manual_seed(0)
    for height, width, share in ((1, 1, 0.5), (7, 300, 0.1), (90, 90, 0.99), (300, 200, 0.0)):
        mask = torch.rand(height, width, generator=draw) < share
        assert torch.equal(decode_mask(rle(mask), (height, width)), mask)


# -- maps -----------------------------------------------------------------------------------------


@pytest.fixture
def maps(tmp_path):
    """A folder with parts of pictures and maps."""
    for part, seeds in (("training", range(3)), ("validation", range(3, 6))):
        for kind in ("images", "annotations"):
            (tmp_path / "set" / kind / part).mkdir(parents=True)
        for seed in seeds:
            scene = make_scene(seed, 50, 70)
            Image.fromarray(scene.pixels.numpy()).save(
                tmp_path / f"set/images/{part}/{seed}.jpg", quality=100
            )
            image = Image.fromarray(scene.labels.numpy().astype(np.uint8))
            image.save(tmp_path / f"set/annotations/{part}/{seed}.png")
    return tmp_path / "set"


def test_maps(maps):
    parts = find_maps(maps)
    assert {name: len(part) for name, part in parts.items()} == {"train": 3, "val": 3}
    found = parts["train"][1]
    assert torch.equal(found.labels, make_scene(1, 50, 70).labels)
    assert found.pixels.shape == (50, 70, 3) and parts["val"].classes == parts["train"].classes
    assert parts["train"].classes == tuple(f"class {i}" for i in range(4))
    (maps / "classes.txt").write_text("ground\ncircle\nsquare\ntriangle\n")
    assert find_maps(maps)["val"].classes[3] == "triangle"
    reduced = find_maps(maps, classes=NAMES, reduce_zero_label=True)["train"][1].labels
    true = make_scene(1, 50, 70).labels
    assert torch.equal(reduced == 255, true == 0) and torch.equal(
        reduced[true > 0], true[true > 0] - 1
    )
    assert [parts["train"].subset([2]).key(0)] == ["2.jpg"]


def test_other_layouts_of_maps(maps, tmp_path):
    whole = LabelledMaps(maps / "images/training", maps / "annotations/training")
    assert len(whole) == 3 and "0.jpg" in whole.where(0)
    (maps / "images").rename(tmp_path / "x")
    (tmp_path / "new/train").mkdir(parents=True)
    (tmp_path / "x/training").rename(tmp_path / "new/train/images")
    (maps / "annotations/training").rename(tmp_path / "new/train/masks")
    assert {name: len(part) for name, part in find_maps(tmp_path / "new").items()} == {"train": 3}
    assert list(find_maps(tmp_path / "new/train")) == [""]


def test_palette_maps_hold_their_numbers(maps):
    path = maps / "annotations/training/0.png"
    image = Image.open(path)
    true = np.asarray(image)
    coloured = Image.fromarray(true, mode="P")
    coloured.putpalette([9, 9, 9, 200, 0, 0, 0, 200, 0, 0, 0, 200])
    coloured.save(path)
    assert np.array_equal(find_maps(maps)["train"][0].labels.numpy(), true)


def test_wrong_maps(maps, tmp_path):
    path = maps / "annotations/training/0.png"
    Image.new("L", (71, 50)).save(path)
    with pytest.raises(DataError, match="as large as its picture, 70 x 50, got 71 x 50"):
        find_maps(maps)["train"][0]
    Image.new("L", (70, 50), 9).save(path)
    with pytest.raises(DataError, match=r"0\.\.2 or 255.*got 9 in 3500"):
        find_maps(maps, classes=NAMES)["train"][0]
    Image.fromarray(np.full((50, 70), -1, np.int32)).save(path.with_suffix(".tif"))
    path.unlink()
    with pytest.raises(DataError, match=r"0\.tif must hold numbers .* got -1 in 3500"):
        find_maps(maps)["train"][0]
    path.with_suffix(".tif").unlink()
    Image.new("RGB", (70, 50), 9).save(path)
    with pytest.raises(DataError, match="not their colours"):
        find_maps(maps, classes=NAMES)["train"][0]
    path.write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"0\.png cannot be read"):
        find_maps(maps, classes=NAMES)["train"][0]
    path.unlink()
    with pytest.raises(DataError, match=r"0\.jpg must have a map"):
        find_maps(maps)
    (maps / "images/training/0.jpg").unlink()
    Image.new("L", (70, 50)).save(maps / "annotations/training/8.png")
    with pytest.raises(DataError, match=r"without a picture: 8\.png"):
        find_maps(maps)
    with pytest.raises(DataError, match="must hold a folder of pictures"):
        find_maps(tmp_path / "none")


def test_names_of_classes_are_looked_for_in_the_data_alone(maps, tmp_path, monkeypatch):
    (tmp_path / "classes.txt").write_text("a\nb\nc\nd\n")
    monkeypatch.chdir(tmp_path)
    pair = ("set/images/training", "set/annotations/training")
    for found in (find_maps("set")["train"], LabelledMaps(*pair)):
        assert found.classes[0] == "class 0" and "names from" not in "".join(found.notes)
    (maps / "classes.txt").write_bytes(b"\xef\xbb\xbfground\ncircle\nsquare\ntriangle\n")
    for found in (find_maps("set")["train"], LabelledMaps(*pair)):
        assert found.classes == ("ground", "circle", "square", "triangle")
        assert found.notes == (f"4 class names from {maps / 'classes.txt'}",)
    (maps / "classes.txt").write_bytes("Stra\u00dfe\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"set/classes\.txt must be UTF-8 text"):
        find_maps("set")


def test_numbers_that_no_pixel_has_are_told(maps):
    for part, values in (("training", [0, 2]), ("validation", [0, 1, 2, 255])):
        for path in (maps / "annotations" / part).iterdir():
            Image.fromarray(np.resize(np.array(values, np.uint8), (50, 70))).save(path)
    parts = find_maps(maps)
    assert parts["train"].notes == ("no pixel has class 1",) and parts["val"].notes == ()
    for path in (maps / "annotations/validation").iterdir():
        Image.new("L", (70, 50), 4).save(path)
    assert find_maps(maps)["train"].notes == ("no pixel has class 1, 3, 4",)
    assert find_maps(maps, classes=tuple("abcde"))["train"].notes == ()


def test_a_mask_of_0_and_255_is_told(maps):
    """255 means no class: with names given, one would train on the background alone."""
    (maps / "classes.txt").write_text("background\ncat\n")

    def save(*values):
        for path in (maps / "annotations/training").iterdir():
            Image.fromarray(np.resize(np.array(values, np.uint8), (50, 70))).save(path)
        return find_maps(maps)["train"].notes[1:]

    (note,) = save(0, 255)
    assert "3 of 3 maps were looked at and hold 0 and 255 alone" in note and "as 0..1" in note
    assert "hold 255 alone" in save(255)[0]
    assert save(0, 1) == save(0, 1, 255) == save(0) == save(1, 255) == ()
    save(0, 1)
    assert len(find_maps(maps, reduce_zero_label=True)["train"].notes) == 1


def test_maps_without_any_class(tmp_path):
    for kind in ("images", "masks"):
        (tmp_path / kind).mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "images/a.png")
    Image.new("L", (9, 9), 255).save(tmp_path / "masks/a.png")
    with pytest.raises(DataError, match="no class"):
        find_maps(tmp_path)
    found = find_maps(tmp_path, classes=("a",))[""][0]
    assert (found.labels == 255).all()


# -- views ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(60, 80), (1, 1), (1, 90), (200, 30)])
def test_segmentation_views_keep_pixels_and_labels_together(size):
    torch.manual_seed(0)
    height, width = size
    labels = torch.arange(height)[:, None] * 3 // height * 3 + torch.arange(width) * 3 // width
    pixels = labels[..., None].expand(-1, -1, 3).to(torch.uint8) * 25
    views = SegmentationViews(128, 64, crop=(40, 48), photometric=False)
    for _ in range(20):
        view, found = views(pixels, labels)
        assert view.shape[:2] == found.shape and found.shape[0] <= 40 and found.shape[1] <= 48
        off = (view[..., 0].float() / 25 - found).abs()
        assert (off < 0.5).float().mean() > 0.7  # but at borders between classes
        x, filled = views.fill(view.permute(2, 0, 1).float(), found)
        assert x.shape == (3, 40, 48) and filled.shape == (40, 48)
        assert (filled[found.shape[0] :] == 255).all() and (x[:, :, found.shape[1] :] == 0).all()


def test_crops_avoid_a_single_class():
    torch.manual_seed(0)
    labels = torch.zeros(64, 64, dtype=torch.int64)
    labels[:, 48:] = 1
    labels[:4] = 255
    views = SegmentationViews(64, 64, (1.0, 1.0), (16, 16), photometric=False)
    shares = []
    for _ in range(60):
        _, found = views(torch.zeros(64, 64, 3, dtype=torch.uint8), labels)
        counts = found[found != 255].bincount(minlength=2).float()
        shares.append((counts.max() / counts.sum()).item())
    assert np.mean([share < 0.75 for share in shares]) > 0.5
    assert np.mean([(labels[4:, x : x + 16] == 0).float().mean() < 0.75 for x in range(49)]) < 0.4


@pytest.mark.parametrize("seed", range(6))
def test_detection_views_move_boxes_and_masks_together(seed):
    torch.manual_seed(seed)
    scene = make_scene(seed, 96, 128)
    views = DetectionViews.of_size(213, 128)
    pixels, objects = views(scene.pixels, scene.objects)
    assert min(pixels.shape[:2]) <= 128 and max(pixels.shape[:2]) <= 213
    assert objects.masks.shape[1:] == pixels.shape[:2]
    whole = objects.masks.flatten(1).any(1)
    tight = boxes_of(objects.masks[whole])
    scale = min(pixels.shape[:2]) / 40  # pixels of the view per pixel of the coarsest cut
    assert (tight - objects.boxes[whole]).abs().max() <= 1 + scale if len(tight) else True


def test_detection_views_of_the_papers():
    assert DetectionViews.of_size(1333, 800) == DetectionViews()
    assert DetectionViews().short_sides == (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)
    small = DetectionViews.of_size(200, 100)
    assert small.short_sides[0] == 60 and small.short_sides[-1] == 100 and small.cut == (48, 75)


def test_mirroring_twice_and_cutting_nothing():
    scene = make_scene(5, 60, 90)
    twice = augment.mirrored(augment.mirrored(scene.objects, 90), 90)
    assert torch.equal(twice.boxes, scene.objects.boxes)
    assert torch.equal(twice.masks, scene.objects.masks)
    once = augment.mirrored(scene.objects, 90)
    assert torch.equal(once.boxes, boxes_of(once.masks))
    pixels, same = augment.cut_out(scene.pixels, scene.objects, (0, 0, 60, 90))
    assert torch.equal(same.boxes, scene.objects.boxes) and torch.equal(pixels, scene.pixels)
    _, none = augment.cut_out(scene.pixels, scene.objects, (0, 0, 1, 1))
    assert len(none.labels) == 0 and none.masks.shape == (0, 1, 1)


def test_colours():
    import colorsys

    rng = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (20, 20, 3), generator=rng, dtype=torch.uint8)
    hue, saturation, value = augment._to_hsv(pixels)
    for row, column in ((0, 0), (3, 7), (19, 19)):
        true = colorsys.rgb_to_hsv(*(pixels[row, column] / 255).tolist())
        ours = (hue[row, column], saturation[row, column], value[row, column] / 255)
        assert torch.allclose(torch.stack(ours), torch.tensor(true), atol=1e-5)
    assert torch.equal(augment._from_hsv(hue, saturation, value), pixels)
    grey = torch.full((4, 4, 3), 77, dtype=torch.uint8)
    assert torch.equal(augment._from_hsv(*augment._to_hsv(grey)), grey)
    torch.manual_seed(0)
    varied = [augment.vary_colours(pixels) for _ in range(40)]
    assert all(v.dtype == torch.uint8 and v.shape == pixels.shape for v in varied)
    means = torch.stack([v.float().mean() for v in varied])
    assert 5 < means.std() < 60 and abs(means.mean() - pixels.float().mean()) < 15


def test_labels_are_resized_to_the_nearest():
    labels = torch.arange(12).reshape(3, 4)
    assert torch.equal(augment.resize_labels(labels, (3, 4)), labels)
    assert torch.equal(augment.resize_labels(labels, (6, 8))[::2, ::2], labels)
    true = torch.nn.functional.interpolate(labels[None, None].float(), (5, 3), mode="nearest")
    assert torch.equal(augment.resize_labels(labels, (5, 3)), true[0, 0].long())
