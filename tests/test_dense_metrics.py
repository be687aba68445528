"""Mean IoU and average precision by hand and against pycocotools; the made scenes."""

import contextlib
import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from natcupy.data.coco import CocoPictures
from natcupy.data.coco_ap import average_precision as coco_average_precision
from natcupy.data.coco_ap import encode_mask
from natcupy.zoo.dense import shapes
from natcupy.zoo.dense.detections import Detections
from natcupy.zoo.dense.metrics import average_precision, confusion, mean_iou
from natcupy.zoo.dense.shapes import boxes_of, make_scene
from natcupy.zoo.dense.targets import Objects


def test_mean_iou():
    truth = torch.tensor([[0, 0, 1, 255], [1, 1, 3, 255]])
    predicted = torch.tensor([[0, 1, 1, 2], [1, 1, 3, 2]])
    matrix = confusion(predicted, truth, 4)
    assert matrix.tolist() == [[1, 1, 0, 0], [0, 3, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]]
    mean, per_class = mean_iou(matrix)
    assert per_class[[0, 1, 3]].tolist() == [0.5, 0.75, 1.0] and per_class[2].isnan()
    assert mean == pytest.approx(0.75)
    assert mean_iou(matrix + matrix)[0] == mean
    with pytest.raises(ValueError, match="same shape"):
        confusion(predicted[:1], truth, 4)


def guess(scene, rng):
    """Detections near a scene's objects: moved, renamed, doubled or missed by chance."""
    boxes, scores, labels, masks = [], [], [], []
    for box, label, mask in zip(
        scene.objects.boxes, scene.objects.labels, scene.objects.masks, strict=True
    ):
        for _ in range(rng.integers(0, 4)):
            moved = box + torch.from_numpy(rng.normal(0, 4, 4)).float()
            x1, y1, x2, y2 = moved.round().long().clamp(0, 63).tolist()
            if x2 <= x1 or y2 <= y1:
                continue
            boxes.append([x1, y1, x2, y2])
            scores.append(float(rng.random()))
            labels.append(int(label) if rng.random() < 0.8 else int(rng.integers(0, 3)))
            crop = mask[y1:y2, x1:x2].float()[None, None]
            small = torch.nn.functional.interpolate(crop, (28, 28), mode="bilinear")
            masks.append(small[0, 0])
    return Detections(
        torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        torch.tensor(scores),
        torch.tensor(labels, dtype=torch.int64),
        torch.stack(masks) if masks else torch.zeros(0, 28, 28),
        (64, 64),
        shapes.NAMES,
    )


def official(found, truth, masks):
    """AP, AP50 by COCO's own code."""
    coco = pytest.importorskip("pycocotools.coco")
    from pycocotools import mask as codec
    from pycocotools.cocoeval import COCOeval

    def encoded(mask):
        return codec.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))

    annotations, results = [], []
    for index, (detections, objects) in enumerate(zip(found, truth, strict=True)):
        pairs = zip(objects.boxes.tolist(), objects.labels.tolist(), objects.masks, strict=True)
        for (x1, y1, x2, y2), label, mask in pairs:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": index,
                    "category_id": label,
                    "iscrowd": 0,
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": float(mask.sum()),
                    "segmentation": encoded(mask),
                }
            )
        for number, (x1, y1, x2, y2) in enumerate(detections.boxes.tolist()):
            one = {
                "image_id": index,
                "category_id": detections.labels[number].item(),
                "score": detections.scores[number].item(),
            }
            if masks:
                one["segmentation"] = encoded(detections.mask(number))
            else:
                one["bbox"] = [x1, y1, x2 - x1, y2 - y1]
            results.append(one)
    with contextlib.redirect_stdout(io.StringIO()):
        data = coco.COCO()
        data.dataset = {
            "info": {},
            "images": [{"id": i, "height": 64, "width": 64} for i in range(len(truth))],
            "categories": [{"id": i, "name": name} for i, name in enumerate(shapes.NAMES)],
            "annotations": annotations,
        }
        data.createIndex()
        judge = COCOeval(data, data.loadRes(results), "segm" if masks else "bbox")
        judge.evaluate(), judge.accumulate(), judge.summarize()
    return judge.stats[:2].tolist()


@pytest.mark.parametrize("masks", [False, True])
def test_average_precision_is_cocos(masks):
    rng = np.random.default_rng(5)
    scenes = [make_scene(seed, 64, 64) for seed in range(25)]
    found, truth = [guess(scene, rng) for scene in scenes], [scene.objects for scene in scenes]
    ours = [average_precision(found, truth, masks=masks)]
    ours.append(average_precision(found, truth, (0.5,), masks=masks))
    assert 0.05 < ours[0] < ours[1] < 0.9
    assert ours == pytest.approx(official(found, truth, masks), abs=1e-9)


def test_average_precision_by_hand():
    """One object of class 0 found at once, one found after a miss; class 2 not found."""
    boxes = torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30]])
    masks = torch.zeros(2, 40, 40, dtype=torch.bool)
    truth = [Objects(boxes, torch.tensor([0, 0]), masks)]
    found = Detections(
        torch.cat([boxes[:1], boxes[:1] + 10, boxes[1:]]),
        torch.tensor([0.9, 0.8, 0.7]),
        torch.tensor([0, 0, 0]),
        None,
        (40, 40),
        shapes.NAMES,
    )
    # Recall 0.5 at precision 1 (51 of 101 points), then recall 1 at precision 2/3.
    value = (51 + 50 * 2 / 3) / 101
    assert average_precision([found], truth, (0.5,)) == pytest.approx(value)
    other = [Objects(boxes, torch.tensor([0, 2]), masks)]
    assert average_precision([found], other, (0.5,)) == pytest.approx(0.5)
    assert average_precision([found[:0]], truth) == 0.0
    with pytest.raises(ValueError, match="at least one true object"):
        average_precision([found], [Objects(boxes[:0], torch.zeros(0).long(), masks[:0])])
    with pytest.raises(ValueError, match="one truth per picture"):
        average_precision([found], [])


def test_the_device_does_not_matter():
    """Neither that of the results nor torch's default one."""
    scenes = [make_scene(seed, 64, 64) for seed in range(3)]
    rng = np.random.default_rng(5)
    found, truth = [guess(scene, rng) for scene in scenes], [scene.objects for scene in scenes]
    for masks in (False, True):
        expected = average_precision(found, truth, masks=masks)
        with torch.device("meta"):
            assert average_precision(found, truth, masks=masks) == expected
        if torch.cuda.is_available():
            there = [to_cuda(each) for each in found], [each.to("cuda") for each in truth]
            assert average_precision(*there, masks=masks) == expected


def to_cuda(found):
    tensors = {name: value.cuda() for name, value in vars(found).items() if torch.is_tensor(value)}
    return replace(found, **tensors)


def test_masks_are_small_or_large_by_their_own_area(tmp_path):
    """A thin diagonal is small, though its box is large; so is a wrong one beside it."""
    pytest.importorskip("pycocotools")
    true = torch.zeros(200, 200, dtype=torch.bool)
    for step in range(100):
        true[20 + step, 20 + step : 26 + step] = True
    Image.new("RGB", (200, 200)).save(tmp_path / "a.png")
    content = {
        "images": [{"id": 1, "file_name": "a.png", "height": 200, "width": 200}],
        "categories": [{"id": 1, "name": "x"}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 1, "bbox": [20, 20, 105, 100],
             "area": int(true.sum()), "segmentation": encode_mask(true)},
        ],
    }  # fmt: skip
    (tmp_path / "c.json").write_text(json.dumps(content))
    data = CocoPictures(tmp_path / "c.json")
    results = [
        {"image_id": 1, "category_id": 1, "score": score, "bbox": [20 + right, 20, 105, 100],
         "segmentation": encode_mask(true.roll(right, 1))}
        for score, right in ((0.9, 60), (0.8, 0))
    ]  # fmt: skip
    scores = coco_average_precision(data, results)
    assert scores["mask_ap"] == scores["mask_ap_small"] == pytest.approx(0.5)
    assert "mask_ap_large" not in scores and all("bbox" in each for each in results)


# -- scenes ---------------------------------------------------------------------------------------


def test_scenes_come_from_their_seed():
    one, again, other = make_scene(7), make_scene(7), make_scene(8)
    assert one.pixels.equal(again.pixels) and one.labels.equal(again.labels)
    assert not one.pixels.equal(other.pixels)
    assert one.pixels.dtype == torch.uint8 and one.pixels.shape == (128, 128, 3)


def test_scenes_are_consistent():
    seen = set()
    for seed in range(40):
        scene = make_scene(seed, 96, 80)
        found = scene.objects
        assert 1 <= len(found.labels) <= 4 and found.masks.shape[1:] == (96, 80)
        assert (found.masks.sum(0) <= 1).all()  # a pixel belongs to what is on top
        painted = torch.zeros(96, 80, dtype=torch.int64)
        for box, label, mask in zip(found.boxes, found.labels, found.masks, strict=True):
            painted[mask] = label + 1
            rows, columns = mask.nonzero().unbind(1)
            tight = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert box.tolist() == [side.item() for side in tight]
        assert painted.equal(scene.labels)
        seen |= set(found.labels.tolist())
    assert seen == {0, 1, 2}


def test_bare_ground():
    scene = make_scene(0, 64, 64, most=0)
    assert scene.objects.boxes.shape == (0, 4) and scene.objects.masks.shape == (0, 64, 64)
    assert not scene.labels.any()
    assert boxes_of(torch.ones(1, 5, 3, dtype=torch.bool)).tolist() == [[0, 0, 3, 5]]
    with pytest.raises(ValueError, match="at least 32 x 32"):
        make_scene(0, 16, 64)
