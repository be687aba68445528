"""UPerNet: whole-picture results in strips, multi-scale testing, losses, bad input."""

import numpy as np
import pytest
import torch
from tolerances import close
from torch.nn import functional as F

from natcupy.zoo.dense import create_dense_model, segment
from natcupy.zoo.dense.segment import Variant, combine
from natcupy.zoo.dense.upernet import pixel_loss

TINY = {
    "embed_dim": 8,
    "depths": (1, 1, 1, 1),
    "num_heads": (1, 1, 1, 1),
    "kernel_size": 3,
    "channels": 8,
    "aux_channels": 4,
    "num_classes": 5,
    "dilations": None,
}


def tiny():
    torch.manual_seed(0)
    model = create_dense_model("upernet_nat_mini", **TINY).double().eval()
    torch.nn.init.normal_(model.decode_head.conv_seg.weight)
    model.pretrained_cfg |= {"long_side": 96, "short_side": 48}
    return model


def picture(height, width):
    return np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)


def directly(model, image, scale, mirrored):
    """Probabilities by whole-map resizes, in float64."""
    prepared = model.recipe.scaled(scale).prepare(image)
    x = prepared.pixels.double()
    logits = model(x.flip(3) if mirrored else x)
    logits = F.interpolate(logits, image.shape[:2], mode="bilinear", align_corners=False)
    probabilities = logits.softmax(1)[0]
    return probabilities.flip(2) if mirrored else probabilities


@torch.no_grad()
@pytest.mark.parametrize("size", [(40, 61), (133, 20), (1, 1), (1, 300)])
@pytest.mark.parametrize(("scales", "flip"), [((1.0,), False), ((0.5, 1.0, 1.75), True)])
def test_predict(size, scales, flip, monkeypatch):
    model, image = tiny(), picture(*size)
    passes = [(scale, m) for scale in scales for m in ((False, True) if flip else (False,))]
    true = sum(directly(model, image, *p) for p in passes) / len(passes)
    for elements in (1, 5 * size[1] * 7, 1 << 30):  # rows one by one, by sevens, all at once
        monkeypatch.setattr(segment, "STRIP_ELEMENTS", elements)
        ours = model.predict(image, scales, flip)
        assert ours.labels.shape == ours.confidence.shape == size
        close(ours.confidence, true.max(0).values, torch.float64)
        top = true.topk(2, dim=0).values
        clear = top[0] - top[1] > 1e-9
        assert clear.float().mean() > 0.99
        assert ours.labels[clear].equal(true.argmax(0)[clear])


def test_strips_of_a_large_picture():
    """A small map to a large picture of a great many classes, within a few rows' memory."""
    logits = torch.randn(150, 20, 30, generator=torch.Generator().manual_seed(1))
    whole = combine([Variant(logits, (77, 118))], (300, 401), ("x",) * 150)
    direct = F.interpolate(logits[None], (77, 118), mode="bilinear", align_corners=False)
    direct = F.interpolate(direct, (300, 401), mode="bilinear", align_corners=False)[0]
    close(whole.confidence, direct.double().softmax(0).max(0).values, torch.float32)


def test_areas():
    labels = torch.tensor([[2, 2, 0], [2, 2, 2]])
    found = segment.Segmentation(labels, labels.float(), ("wall", "sky", "tree"))
    assert found.areas() == [("tree", 5 / 6), ("wall", 1 / 6)]


def test_forward_is_as_large_as_the_picture():
    model = tiny()
    for size in ((64, 96), (33, 47), (5, 3)):
        assert model(torch.zeros(2, 3, *size).double()).shape == (2, 5, *size)


def test_pixel_loss():
    """Pixels that do not count lower the loss: the mean is over all pixels."""
    logits = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    labels = torch.randint(0, 3, (2, 4, 6))
    labels[0, 0] = 255
    total = 0.0
    for b, i, j in np.ndindex(2, 4, 6):
        if labels[b, i, j] != 255:
            total -= logits[b, :, i, j].log_softmax(0)[labels[b, i, j]].item()
    assert pixel_loss(logits, labels).item() == pytest.approx(total / 48)


def test_pixel_loss_in_half_precision():
    """The sum over a picture's pixels is beyond float16's range, the mean is not."""
    labels = torch.randint(0, 3, (1, 320, 320))
    logits = torch.randn(1, 3, 80, 80)
    close(pixel_loss(logits.half(), labels), pixel_loss(logits.half().double(), labels),
          torch.float32)  # fmt: skip


def test_grey_pictures():
    """The means and deviations of three channels stand for one by their average."""
    model = create_dense_model("upernet_nat_mini", **TINY, in_chans=1).eval()
    model.pretrained_cfg |= {"long_side": 96, "short_side": 48}
    assert model.recipe.mean == pytest.approx((114.495,)) and len(model.recipe.std) == 1
    assert model.predict(picture(40, 61)).labels.shape == (40, 61)
    with pytest.raises(ValueError, match=r"batch, 1, .*; model.recipe.prepare\(image\).pixels"):
        model(torch.zeros(1, 3, 32, 32))


def test_losses():
    torch.manual_seed(0)
    model = tiny().train()
    x, labels = torch.randn(2, 3, 32, 48).double(), torch.randint(0, 5, (2, 32, 48))
    losses = model.losses(x, labels)
    assert set(losses) == {"decode", "aux"}
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.parameters())
    ignored = model.losses(x, torch.full_like(labels, 255))
    assert sum(ignored.values()) == 0


def test_the_auxiliary_loss_weighs_less():
    model = tiny()
    x, labels = torch.randn(1, 3, 32, 48).double(), torch.randint(0, 5, (1, 32, 48))
    maps = model.backbone(x)
    aux = F.interpolate(model.auxiliary_head(maps[2]), (32, 48), mode="bilinear")
    true = 0.4 * F.cross_entropy(aux, labels)
    assert model.losses(x, labels)["aux"].item() == pytest.approx(true.item())


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        (torch.zeros(1, 32, 47, dtype=torch.int64), ValueError, "of the pictures"),
        (torch.zeros(1, 32, 48), TypeError, "int64"),
        (torch.full((1, 32, 48), 5), ValueError, "0..4 or 255"),
        (torch.full((1, 32, 48), -1), ValueError, "got -1"),
    ],
)
def test_bad_labels(labels, error, message):
    with pytest.raises(error, match=message):
        tiny().losses(torch.zeros(1, 3, 32, 48).double(), labels)


def test_bad_pictures_and_scales():
    model = tiny()
    with pytest.raises(ValueError, match="not empty"):
        model(torch.zeros(0, 3, 32, 32).double())
    with pytest.raises(ValueError, match="at least one scale"):
        model.predict(picture(8, 8), scales=())
    with pytest.raises(ValueError, match="a scale must be above 0"):
        model.predict(picture(8, 8), scales=(0.0,))
