"""Detectors end to end against plain loops over the heads' outputs; batches, sizes, bad input."""

import dense_oracles as slow
import numpy as np
import pytest
import torch
from tolerances import close

from natcupy.zoo.dense import create_dense_model
from natcupy.zoo.dense.detector import DetectionRules, select
from natcupy.zoo.dense.images import Frame, Recipe, stack
from natcupy.zoo.dense.rpn import ProposalRules, propose

TINY = {
    "embed_dim": 8,
    "depths": (1, 1, 1, 1),
    "num_heads": (1, 1, 1, 1),
    "kernel_size": 3,
    "channels": 4,
    "fc_channels": 12,
    "num_classes": 3,
    "dilations": None,
}
FRAME = Frame((90, 120), (60, 80))  # scaled by 1.5; the input is padded to 96 x 128
RULES = DetectionRules(score=0.1, iou=0.5, most=12, proposals=ProposalRules(25, 0.7, 20))


def lively(name, dtype=torch.float64):
    """A tiny detector whose outputs differ from place to place."""
    torch.manual_seed(3)
    model = create_dense_model(f"{name}_nat_mini", **TINY).to(dtype).eval()
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if key.startswith(("neck", "rpn_head", "roi_head")) and tensor.is_floating_point():
                spread = tensor[0].numel() ** -0.5 if tensor.dim() > 1 else 0.1
                tensor.normal_(0, spread)
                if key.endswith("running_var"):
                    tensor.abs_().add_(0.5)
    return model


def spread_out(seed, *shape):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def test_torchs_default_device_moves_nothing():
    model = lively("mask_rcnn", torch.float32)
    picture = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    expected = model.predict(picture, RULES)
    with torch.device("meta"):
        found = model.predict(picture, RULES)
    assert len(found) and torch.equal(found.boxes, expected.boxes)


@torch.no_grad()
def test_compiled():
    model, x = lively("mask_rcnn", torch.float32), torch.randn(1, 3, 64, 64)
    expected, found = model(x)[0], torch.compile(model, backend="eager")(x)[0]
    assert len(found) == len(expected) > 0 and found.labels.equal(expected.labels)
    close(found.boxes.double(), expected.boxes.double(), torch.float32)


# -- proposals ------------------------------------------------------------------------------------


def slow_proposals(logits, deltas, strides, size, rules):
    boxes, scores, levels = [], [], []
    for level, (cls, reg) in enumerate(zip(logits, deltas, strict=True)):
        found, stride = [], strides[level]
        for row in range(cls.shape[1]):
            for column in range(cls.shape[2]):
                for a, ratio in enumerate((0.5, 1.0, 2.0)):
                    width, height = 8 * stride / ratio**0.5, 8 * stride * ratio**0.5
                    x, y = column * stride, row * stride
                    anchor = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
                    delta = reg[4 * a : 4 * a + 4, row, column]
                    score = 1 / (1 + np.exp(-cls[a, row, column]))
                    found.append((score, slow.decode(anchor, delta, (1, 1, 1, 1), size)))
        found.sort(key=lambda pair: -pair[0])
        for score, box in found[: rules.per_level]:
            if box[2] > box[0] and box[3] > box[1]:
                boxes.append(box), scores.append(score), levels.append(level)
    kept = slow.greedy_nms(boxes, scores, rules.iou, levels)
    return [boxes[i] for i in kept[: rules.most]]


def test_proposals():
    shapes, strides = ((8, 9), (4, 5), (2, 3)), (4, 8, 16)
    logits = [spread_out(i, 1, 3, *shape) for i, shape in enumerate(shapes)]
    deltas = [spread_out(9 + i, 1, 12, *shape) for i, shape in enumerate(shapes)]
    frame, rules = Frame((30, 33), (30, 33)), ProposalRules(40, 0.7, 30)
    ours = propose(logits, deltas, strides, [frame], rules)[0]
    true = slow_proposals(
        [x[0].numpy() for x in logits], [x[0].numpy() for x in deltas], strides, (30, 33), rules
    )
    # Anchors are float32 by definition, as the released models have them.
    close(ours, torch.tensor(true).double(), torch.float32)


# -- the whole way from maps to detections ---------------------------------------------------------


def slow_pool(maps, boxes, side):
    pooled = []
    for box in boxes:
        size = np.sqrt((box[2] - box[0]) * (box[3] - box[1]))
        level = int(np.clip(np.floor(np.log2(size / 56 + 1e-6)), 0, 3))
        roi = [[0, *box]]
        pooled.append(slow.roi_align(maps[level].numpy(), roi, side, 1 / (4 << level))[0])
    return torch.from_numpy(np.stack(pooled))


def slow_detect(boxes, deltas, probabilities, stds, rules):
    """Boxes follow every class, go back to the picture, compete within their class."""
    found, scores, labels = [], [], []
    for box, delta, row in zip(boxes, deltas.tolist(), probabilities.tolist(), strict=True):
        for label in range(3):
            if row[label] > rules.score:
                moved = slow.decode(box, delta[4 * label : 4 * label + 4], stds, FRAME.size)
                found.append([v / 1.5 for v in moved])
                scores.append(row[label]), labels.append(label)
    kept = slow.greedy_nms(found, scores, rules.iou, labels)[: rules.most]
    return [(found[i], scores[i], labels[i]) for i in kept]


def compare(ours, true, masks):
    assert len(ours) == len(true) > 3
    assert ours.labels.tolist() == [label for _, _, label in true]
    close(ours.scores, torch.tensor([score for _, score, _ in true]).double(), torch.float32)
    close(ours.boxes, torch.tensor([box for box, _, _ in true]).double(), torch.float32)
    close(ours.mask_probabilities.double(), masks, torch.float32)
    small, drawn = ours.mask_probabilities.numpy(), ours.masks().numpy()
    for index in range(len(ours)):
        near = [slow.paste(small[index] + s, ours.boxes[index].tolist(), (60, 80))
                for s in (-1e-4, 1e-4)]  # fmt: skip
        assert (drawn[index] >= near[0]).all() and (drawn[index] <= near[1]).all()


@torch.no_grad()
def test_mask_rcnn():
    model, x = lively("mask_rcnn"), spread_out(1, 1, 3, 96, 128)
    ours = model.detect(x, [FRAME], RULES)[0]
    maps = model.pyramid(x)
    proposals = propose(*model.rpn_head(maps), model.strides, [FRAME], RULES.proposals)[0].tolist()
    logits, deltas = model.roi_head.bbox_head(slow_pool(maps, proposals, 7))
    probabilities = logits.softmax(1)
    true = slow_detect(proposals, deltas, probabilities, (0.1, 0.1, 0.2, 0.2), RULES)
    features = slow_pool(maps, [[v * 1.5 for v in box] for box, _, _ in true], 14)
    masks = model.roi_head.mask_head(features).sigmoid()
    compare(
        ours, true, torch.stack([m[label] for m, (_, _, label) in zip(masks, true, strict=True)])
    )


@torch.no_grad()
def test_cascade():
    model, x = lively("cascade_mask_rcnn"), spread_out(2, 1, 3, 96, 128)
    rules = DetectionRules(score=0.2, iou=0.6, most=12, proposals=ProposalRules(25, 0.7, 12))
    ours = model.detect(x, [FRAME], rules)[0]
    maps = model.pyramid(x)
    boxes = propose(*model.rpn_head(maps), model.strides, [FRAME], rules.proposals)[0].tolist()
    stages = (0.1, 0.1, 0.2, 0.2), (0.05, 0.05, 0.1, 0.1), (0.033, 0.033, 0.067, 0.067)
    mean = 0
    for stage, stds in enumerate(stages):
        logits, deltas = model.roi_head.bbox_head[stage](slow_pool(maps, boxes, 7))
        mean = mean + logits / 3
        if stage < 2:
            best = logits[:, :3].argmax(1).tolist()
            boxes = [
                slow.decode(box, delta[4 * label : 4 * label + 4], stds, FRAME.size)
                for box, delta, label in zip(boxes, deltas.tolist(), best, strict=True)
            ]
    true = slow_detect(boxes, deltas, mean.softmax(1), stages[2], rules)
    features = slow_pool(maps, [[v * 1.5 for v in box] for box, _, _ in true], 14)
    masks = sum(head(features).sigmoid() for head in model.roi_head.mask_head) / 3
    compare(
        ours, true, torch.stack([m[label] for m, (_, _, label) in zip(masks, true, strict=True)])
    )


# -- batches, sizes, bad input ---------------------------------------------------------------------


def test_a_batch_is_its_pictures():
    """Padding by a larger neighbour in the batch leaves a picture's detections (almost) alone.

    The backbone sees the further padding, so only pictures that need none can agree exactly.
    """
    model = lively("mask_rcnn")
    x = spread_out(4, 2, 3, 64, 96)
    both = model.detect(x, rules=RULES)
    for index in range(2):
        one = model.detect(x[index : index + 1], rules=RULES)[0]
        assert one.labels.equal(both[index].labels)
        close(one.boxes, both[index].boxes, torch.float64)
        close(one.mask_probabilities.double(), both[index].mask_probabilities.double(),
              torch.float32)  # fmt: skip


@pytest.mark.parametrize("size", [(1, 1), (1, 200), (37, 61)])
@pytest.mark.parametrize("name", ["mask_rcnn", "cascade_mask_rcnn"])
def test_any_picture(name, size):
    model = lively(name, torch.float32)
    model.pretrained_cfg |= {"long_side": 200, "short_side": 96}
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    found = model.predict(image, DetectionRules(score=0.0))
    assert found.size == size and found.masks().shape == (len(found), *size)
    assert (found.boxes >= 0).all() and (found.boxes[:, 2:] <= torch.tensor(size[::-1])).all()
    assert (found.scores[:-1] >= found.scores[1:]).all()
    without = model.predict(image, DetectionRules(score=0.0), masks=False)
    assert without.boxes.equal(found.boxes)
    with pytest.raises(ValueError, match="masks=True"):
        without.mask(0)


def test_nothing_found():
    model = lively("cascade_mask_rcnn", torch.float32)
    found = model.detect(torch.zeros(1, 3, 64, 64), rules=DetectionRules(score=1.0))[0]
    assert len(found) == 0 and found.masks().shape == (0, 64, 64)
    assert found.mask_probabilities.shape == (0, 28, 28)


def test_no_proposals():
    """A picture without area left by clipping goes through every head."""
    model = lively("mask_rcnn", torch.float32)
    maps = model.pyramid(torch.zeros(2, 3, 64, 64))
    none = [torch.zeros(0, 4), torch.zeros(0, 4)]
    frames = [Frame((64, 64), (64, 64))] * 2
    for boxes, probabilities in model.classify(maps[:-1], none, frames):
        assert boxes.shape == (0, 3, 4) and probabilities.shape == (0, 4)


def test_select():
    boxes = torch.tensor([[[0.0, 0, 9, 9], [0, 0, 9, 9]], [[0, 0, 9, 8], [50, 50, 60, 60]]])
    probabilities = torch.tensor([[0.6, 0.3, 0.1], [0.5, 0.05, 0.45]])
    kept, scores, labels = select(boxes, probabilities, DetectionRules())
    # the second box of class 0 overlaps the first; 0.05 does not exceed the threshold
    assert labels.tolist() == [0, 1]
    assert scores.tolist() == pytest.approx([0.6, 0.3])
    assert kept.tolist() == [[0, 0, 9, 9]] * 2


def test_picking_detections():
    model = lively("mask_rcnn", torch.float32)
    found = model.detect(torch.randn(1, 3, 64, 64), rules=DetectionRules(score=0.0))[0]
    few = found.above(found.scores[3].item())
    assert len(few) == 4 and few.masks().equal(found[:4].masks())


def test_bad_frames():
    model = lively("mask_rcnn", torch.float32)
    x = torch.zeros(1, 3, 64, 64)
    for frames in ([], [Frame((65, 64), (1, 1))]):
        with pytest.raises(ValueError, match="one frame per picture"):
            model.detect(x, frames)
    with pytest.raises(ValueError, match="takes pictures"):
        model.detect(torch.zeros(3, 64, 64))


def test_stacked_pictures():
    recipe = Recipe(64, 48, pad_divisor=32)
    sizes = ((48, 64), (64, 40))
    pictures = [np.zeros((*size, 3), dtype=np.uint8) for size in sizes]
    x, frames = stack([recipe.prepare(picture) for picture in pictures])
    assert x.shape == (2, 3, 64, 64)
    assert [frame.size for frame in frames] == [(48, 64), (64, 40)]
    assert x[0, :, 48:].eq(0).all() and x[1, :, :, 40:].eq(0).all() and x[0, :, :48].lt(0).all()
