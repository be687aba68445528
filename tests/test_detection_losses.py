"""Training targets and losses of the detectors: assignment, sampling, values by hand, bad input."""

import math

import dense_oracles as slow
import numpy as np
import pytest
import torch
from test_detection_models import lively

from natcupy.zoo.dense import detection_losses
from natcupy.zoo.dense.anchors import within
from natcupy.zoo.dense.boxes import encode
from natcupy.zoo.dense.cascade import MATCHINGS
from natcupy.zoo.dense.detection_losses import (
    RPN_MATCHING,
    box_losses,
    class_targets,
    mask_loss,
    mask_targets,
    rpn_losses,
    smooth_l1,
)
from natcupy.zoo.dense.images import Frame
from natcupy.zoo.dense.mask_rcnn import MATCHING
from natcupy.zoo.dense.targets import (
    BACKGROUND,
    IGNORED,
    Objects,
    Sample,
    Sampling,
    assign,
    sample,
    sample_proposals,
)


def objects(boxes, labels, size=(64, 96)):
    """Objects whose masks fill their boxes."""
    masks = torch.zeros(len(boxes), *size, dtype=torch.bool)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes, strict=True):
        mask[int(y1) : int(y2), int(x1) : int(x2)] = True
    boxes = torch.tensor(boxes, dtype=torch.float64).reshape(-1, 4)
    return Objects(boxes, torch.tensor(labels, dtype=torch.int64), masks)


NONE = objects([], [])
WIDE = objects([[4, 2, 174, 64]], [0])  # fits no anchor well and one of them best
TWO = objects([[8, 8, 40, 40], [50, 10, 90, 60]], [1, 2])


@pytest.mark.parametrize("rules", [RPN_MATCHING, MATCHING, *MATCHINGS])
@pytest.mark.parametrize("seed", range(4))
def test_assignment(rules, seed):
    rng = np.random.default_rng(seed)
    corners = rng.integers(0, 13, (150, 2, 2)) * 2.0
    boxes = np.concatenate([corners.min(1), corners.max(1) + 2], 1)
    truth, boxes = boxes[:6], boxes[6:]
    true = slow.assign(
        boxes.tolist(),
        truth.tolist(),
        rules.positive,
        rules.negative,
        rules.least,
        rules.low_quality,
    )
    assert assign(torch.from_numpy(boxes), torch.from_numpy(truth), rules).tolist() == true
    assert set(true) > {-1}


def test_assignment_in_words():
    truth = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 8]])
    # IoU with the first 0.9 and 0.89; 0.5 and 0.63; 0.2; none
    boxes = torch.tensor([[0.0, 0, 10, 9], [0, 0, 10, 5], [0, 0, 10, 2], [50, 50, 60, 60]])
    # The first box is the best of both objects: the last one that wants it gets it.
    assert assign(boxes, truth, RPN_MATCHING).tolist() == [1, IGNORED, BACKGROUND, BACKGROUND]
    assert assign(boxes, truth, MATCHINGS[0]).tolist() == [0, 1, BACKGROUND, BACKGROUND]
    assert assign(boxes, truth[:0], MATCHINGS[0]).tolist() == [BACKGROUND] * 4
    assert assign(boxes[:0], truth, MATCHINGS[0]).tolist() == []


def test_sampling():
    assignment = torch.tensor([0, BACKGROUND, IGNORED, 3] * 100)
    generator = torch.Generator().manual_seed(0)
    positive, negative = sample(assignment, Sampling(64, 0.25), generator)
    assert positive.numel() == 16 and negative.numel() == 48
    assert (assignment[positive] >= 0).all() and (assignment[negative] == BACKGROUND).all()
    assert len(set(positive.tolist())) == 16 and len(set(negative.tolist())) == 48
    again = sample(assignment, Sampling(64, 0.25), generator.manual_seed(0))
    assert again[0].equal(positive) and again[1].equal(negative)
    few, rest = sample(assignment[:8], Sampling(64, 0.25), generator)
    assert few.tolist() == [0, 3, 4, 7] and rest.tolist() == [1, 5]


def test_true_boxes_join_the_proposals():
    proposals = torch.tensor([[0.0, 0, 4, 4], [8, 8, 40, 41]], dtype=torch.float64)
    picked = sample_proposals(proposals, TWO, MATCHING, Sampling(512, 0.25))
    assert picked.objects.tolist() == [0, 1, 0]
    assert picked.true_boxes.tolist() == [True, True, False, False]
    assert picked.boxes[2:].equal(proposals.flip(0))
    nothing = sample_proposals(proposals, NONE, MATCHING, Sampling(512, 0.25))
    assert nothing.objects.numel() == 0 and nothing.boxes.shape == (2, 4)


def test_classes_of_a_batch():
    samples = [
        Sample(torch.zeros(3, 4), torch.tensor([1, 0]), torch.zeros(3, dtype=torch.bool)),
        Sample(torch.zeros(2, 4), torch.tensor([], dtype=torch.int64), torch.zeros(2).bool()),
    ]
    assert class_targets(samples, [TWO, NONE], 3).tolist() == [2, 1, 3, 3, 3]


def test_rpn_losses_by_hand():
    """Few enough anchors that all count: no chance in it."""
    shapes, strides = ((4, 6), (2, 3)), (16, 32)
    rng = torch.Generator().manual_seed(0)
    logits = [torch.randn(2, 3, *s, generator=rng, dtype=torch.float64).float() for s in shapes]
    deltas = [torch.randn(2, 12, *s, generator=rng, dtype=torch.float64).float() for s in shapes]
    sizes = [(64, 96), (32, 64)]  # the second picture's anchors end early
    ours = rpn_losses(logits, deltas, strides, sizes, [WIDE, NONE], beta=1 / 9)
    score = regression = count = 0.0
    for b, (size, found) in enumerate(zip(sizes, (WIDE, NONE), strict=True)):
        anchors, outputs = [], []
        for level, stride in enumerate(strides):
            for row in range(math.ceil(size[0] / stride)):
                for column in range(math.ceil(size[1] / stride)):
                    for a, ratio in enumerate((0.5, 1.0, 2.0)):
                        w, h = 8 * stride / ratio**0.5, 8 * stride * ratio**0.5
                        x, y = column * stride, row * stride
                        anchors.append((x - w / 2, y - h / 2, x + w / 2, y + h / 2))
                        reg = deltas[level][b, 4 * a : 4 * a + 4, row, column]
                        outputs.append((logits[level][b, a, row, column].item(), reg.double()))
        owners = slow.assign(anchors, found.boxes.tolist(), 0.7, 0.3, 0.3, True)
        assert len(owners) <= 128 and (b == 1 or max(owners) >= 0)
        positives = 0
        for anchor, owner, (logit, reg) in zip(anchors, owners, outputs, strict=True):
            if owner >= 0:
                positives += 1
                score += math.log(1 + math.exp(-logit))
                anchor = torch.tensor(anchor, dtype=torch.float64)
                target = encode(anchor[None], found.boxes[owner][None], (1, 1, 1, 1))[0]
                for d in (reg - target).abs().tolist():
                    regression += 4.5 * d * d if d < 1 / 9 else d - 1 / 18
            elif owner == -1:
                score += math.log(1 + math.exp(logit))
        count += max(positives, 1) + max(owners.count(-1), 1)
    assert ours["loss_rpn_cls"].item() == pytest.approx(score / count, rel=1e-5)
    assert ours["loss_rpn_bbox"].item() == pytest.approx(regression / count, rel=1e-5)


@pytest.mark.parametrize("name", ["mask_rcnn", "cascade_mask_rcnn"])
def test_anchors_across_an_edge(name, monkeypatch):
    """The cascade does not train them, unless the picture is too small for any other."""
    seen = []

    def spy(boxes, truth, rules):
        if rules is RPN_MATCHING:
            seen.append(boxes)
        return assign(boxes, truth, rules)

    monkeypatch.setattr(detection_losses, "assign", spy)
    torch.manual_seed(0)
    model = lively(name, torch.float32).train()
    found = objects([[40, 40, 120, 110]], [0], (150, 188))
    model.losses(torch.randn(1, 3, 160, 192), [Frame((150, 188), (150, 188))], [found])
    model.losses(torch.randn(1, 3, 16, 16), None, [objects([], [], (16, 16))])
    large, small = seen
    x1, y1, x2, y2 = large.unbind(1)
    kept = (x1 >= 0) & (y1 >= 0) & (x2 < 188) & (y2 < 150)  # of the picture without padding
    assert kept.any() and kept.all() == (name == "cascade_mask_rcnn")
    assert small.shape[0] == 3 * (16 + 4 + 1 + 1 + 1)


def test_an_anchor_within_a_picture():
    """Left and upper limits belong to it, right and lower ones do not."""
    anchors = torch.tensor([[0.0, 0, 9, 7], [0, 0, 10, 7], [0, 0, 9, 8], [-1, 0, 9, 7]])
    assert within(anchors, (8, 10), 0).tolist() == [True, False, False, False]
    assert within(anchors, (8, 10), 1).tolist() == [True] * 4


def three_samples():
    boxes = torch.tensor([[8.0, 8, 40, 44], [50, 10, 80, 60], [0, 0, 9, 9]], dtype=torch.float64)
    return [Sample(boxes, torch.tensor([0, 1]), torch.zeros(3, dtype=torch.bool))]


def test_box_losses_by_hand():
    logits = torch.randn(3, 4, dtype=torch.float64)
    deltas = torch.randn(3, 12, dtype=torch.float64)
    labels = class_targets(three_samples(), [TWO], 3)
    stds = (0.1, 0.1, 0.2, 0.2)
    ours = box_losses(logits, deltas, labels, three_samples(), [TWO], stds)
    score = -logits.log_softmax(1)[range(3), [1, 2, 3]].mean()
    assert ours["loss_cls"].item() == pytest.approx(score.item(), rel=1e-5)
    target = encode(three_samples()[0].boxes[:2], TWO.boxes, stds)
    own = torch.stack([deltas[0, 4:8], deltas[1, 8:12]])
    assert ours["loss_bbox"].item() == pytest.approx(
        (own - target).abs().sum().item() / 3, rel=1e-5
    )


def test_decoded_box_loss():
    """Ten times one minus the generalised IoU; zero deltas leave the sampled boxes."""
    labels = class_targets(three_samples(), [TWO], 3)
    zero = torch.zeros(3, 12, dtype=torch.float64)
    ours = box_losses(
        torch.zeros(3, 4), zero, labels, three_samples(), [TWO], (1, 1, 1, 1), decoded=True
    )
    boxes = three_samples()[0].boxes[:2].tolist()
    ious = [slow.overlap(a, b) for a, b in zip(boxes, TWO.boxes.tolist(), strict=True)]
    # Each box lies within or around its object, so that hull and union are the same.
    assert ours["loss_bbox"].item() == pytest.approx(10 * (2 - sum(ious)) / 3, rel=1e-5)


def test_mask_targets():
    """The object's mask within the box: here its upper 32 of 36 rows; and the left 40/50."""
    targets = mask_targets(three_samples(), [TWO])
    assert targets.shape == (2, 28, 28) and set(targets.unique().tolist()) == {0.0, 1.0}
    rows = targets[0].mean(1)
    assert rows[:24].eq(1).all() and rows[26:].eq(0).all()
    assert targets[1].eq(1).all()
    beyond = [Sample(torch.tensor([[60.0, 30, 120, 90]]), torch.tensor([1]), torch.zeros(1).bool())]
    # Clipped to the picture first: 60..96 x 30..64 of which 60..90 x 30..60 are the object.
    half = mask_targets(beyond, [TWO])[0]
    assert half[:24, :23].eq(1).all() and half[25:].eq(0).all() and half[:, 24:].eq(0).all()


def test_mask_loss():
    logits = torch.randn(2, 3, 28, 28)
    targets = (torch.rand(2, 28, 28) > 0.5).float()
    own = torch.stack([logits[0, 2], logits[1, 0]]).sigmoid()
    true = -(targets * own.log() + (1 - targets) * (1 - own).log()).mean()
    assert mask_loss(logits, torch.tensor([2, 0]), targets).item() == pytest.approx(true.item())
    none = torch.zeros(0, 3, 28, 28, requires_grad=True)
    loss = mask_loss(none, torch.zeros(0, dtype=torch.int64), torch.zeros(0, 28, 28))
    assert loss.item() == 0 and loss.requires_grad


def test_smooth_l1():
    a, b = torch.tensor([0.05, 2.0]), torch.zeros(2)
    assert smooth_l1(a, b, 0.0).item() == pytest.approx(2.05)
    assert smooth_l1(a, b, 0.1).item() == pytest.approx(0.5 * 0.05**2 / 0.1 + 1.95)


NAMES = {
    "mask_rcnn": ["loss_cls", "loss_bbox", "loss_mask"],
    "cascade_mask_rcnn": [
        f"s{stage}.{name}" for stage in range(3) for name in ("loss_cls", "loss_bbox", "loss_mask")
    ],
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("found", [(TWO, NONE), (NONE, NONE)], ids=["some", "none"])
def test_every_parameter_learns(name, found):
    """Also from a batch without any object, so that distributed training never waits."""
    torch.manual_seed(0)
    model = lively(name, torch.float32).train()
    losses = model.losses(torch.randn(2, 3, 64, 96), None, found)
    assert list(losses) == ["loss_rpn_cls", "loss_rpn_bbox", *NAMES[name]]
    assert all(math.isfinite(value.item()) for value in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_the_cascade_weighs_its_stages(monkeypatch):
    """With every head's losses replaced by one, the stages count 1, 0.5 and 0.25."""
    from natcupy.zoo.dense import cascade

    one = torch.ones(())
    monkeypatch.setattr(cascade, "box_losses", lambda *a, **k: {"loss_cls": one, "loss_bbox": one})
    monkeypatch.setattr(cascade, "mask_loss", lambda *a: one)
    model = lively("cascade_mask_rcnn", torch.float32).train()
    losses = model.losses(torch.randn(1, 3, 64, 96), None, [TWO])
    assert [losses[f"s{stage}.loss_mask"].item() for stage in range(3)] == [1, 0.5, 0.25]


def test_the_cascade_refines_without_true_boxes(monkeypatch):
    """From stage to stage go the sampled proposals, moved; objects join anew each time."""
    from natcupy.zoo.dense import cascade

    seen = []
    original = cascade.sample_proposals

    def spy(proposals, *rest):
        seen.append(proposals)
        return original(proposals, *rest)

    monkeypatch.setattr(cascade, "sample_proposals", spy)
    torch.manual_seed(0)
    model = lively("cascade_mask_rcnn", torch.float32).eval()
    model.losses(torch.randn(1, 3, 64, 96), None, [TWO])
    first = original(seen[0], TWO, MATCHINGS[0], Sampling(512, 0.25))
    assert seen[1].shape[0] == first.boxes.shape[0] - 2
    limit = torch.tensor([96.0, 64, 96, 64])
    assert (seen[1] >= 0).all() and (seen[1] <= limit).all() and not seen[1].requires_grad


BAD = [
    (Objects(torch.zeros(1, 3), TWO.labels[:1], TWO.masks[:1]), "floating point"),
    (Objects(TWO.boxes.long(), TWO.labels, TWO.masks), "floating point"),
    (Objects(TWO.boxes, TWO.labels[:1], TWO.masks), "one for each of the 2 boxes"),
    (Objects(TWO.boxes, TWO.labels.int(), TWO.masks), "int64"),
    (Objects(TWO.boxes, TWO.labels, TWO.masks[:, :60]), "as large as the resized picture"),
    (Objects(TWO.boxes, TWO.labels + 1, TWO.masks), "got 3"),
    (Objects(TWO.boxes, TWO.labels - 2, TWO.masks), "got -1"),
    (Objects(TWO.boxes * 0, TWO.labels, TWO.masks), "x2 > x1"),
    (Objects(TWO.boxes * float("nan"), TWO.labels, TWO.masks), "finite"),
]


@pytest.mark.parametrize(("found", "message"), BAD)
def test_bad_objects(found, message):
    model = lively("mask_rcnn", torch.float32)
    with pytest.raises(ValueError, match=message):
        model.losses(torch.zeros(1, 3, 64, 96), None, [found])


def test_bad_batches():
    model = lively("mask_rcnn", torch.float32)
    with pytest.raises(ValueError, match="one Objects per picture"):
        model.losses(torch.zeros(1, 3, 64, 96), None, [TWO, TWO])
    with pytest.raises(ValueError, match="64, 90"):
        model.losses(torch.zeros(1, 3, 64, 96), [Frame((64, 90), (64, 90))], [TWO])
