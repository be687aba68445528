"""Attention maps: right to the last weight, and drawn where they belong."""

import copy

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

import natcupy
from natcupy.cli import attend, main
from natcupy.maps import attention_map, attention_weights
from natcupy.modules import NeighborhoodAttention2D

PICTURE_SIDE = 64


@pytest.fixture(scope="module")
def small():
    """An untrained DiNAT of two levels with biases that are not zero."""
    torch.manual_seed(0)
    numbers = {"embed_dim": 16, "depths": (2, 1), "num_heads": (2, 4), "kernel_size": 3}
    model = natcupy.create_model("nat-mini", dilations=((1, 4), (1,)), num_classes=5, **numbers)
    for name, parameter in model.named_parameters():
        if name.endswith("rpb"):
            torch.nn.init.normal_(parameter)
    return model.eval()


@pytest.fixture
def picture_file(tmp_path):
    sheet = Image.new("RGB", (120, 120), "white")
    ImageDraw.Draw(sheet).line([(30, 20), (80, 20), (50, 100)], fill="black", width=9)
    sheet.save(tmp_path / "seven.png")
    return tmp_path / "seven.png"


def layers(model):
    return [m for m in model.modules() if isinstance(m, NeighborhoodAttention2D)]


@pytest.mark.parametrize("shape", [(9, 11), (3, 12), (2, 5)])
@pytest.mark.parametrize("dilation", [1, 2])
def test_weights_times_values_is_the_layer(shape, dilation):
    torch.manual_seed(1)
    layer = NeighborhoodAttention2D(24, 3, 3, dilation=dilation, rel_pos_bias=True).double()
    torch.nn.init.normal_(layer.rpb)
    x = torch.randn(2, *shape, 24, dtype=torch.float64)
    weights = attention_weights(layer, x)
    assert torch.allclose(weights.sum(-1), torch.ones_like(weights[..., 0]))
    padded = layer._pad(x)
    value = layer.qkv(padded).unflatten(-1, (3, 3, 8)).unbind(-3)[2]
    mixed = natcupy.na2d_av(weights, value, 3, dilation=dilation).flatten(-2)
    out = layer.proj(mixed[:, : shape[0], : shape[1]])
    torch.testing.assert_close(out, layer(x))


def test_a_map_sums_to_one_inside_its_window(small):
    picture = torch.randn(1, 3, PICTURE_SIDE, 96)
    for layer in layers(small):
        found = attention_map(small, picture, layer, (0.99, 0.0))
        heads, height, width = found.weights.shape
        assert heads == layer.num_heads and found.query == (0, width - 1)
        assert torch.allclose(found.weights.sum((1, 2)) + found.outside, torch.ones(heads))
        assert not found.weights[:, ~found.window].any()
        assert (found.weights[:, found.window] > 0).all()
        assert found.window[found.query] and found.window.sum() == 9
    assert (height, width) == (8, 12) and found.outside.abs().max() < 1e-6


def test_the_window_of_a_dilated_layer(small):
    found = attention_map(small, torch.randn(1, 3, 64, 64), layers(small)[1], (0.5, 0.5))
    rows, columns = (sorted(set(axis.tolist())) for axis in found.window.nonzero().T)
    assert found.query == (8, 8) and rows == columns == [4, 8, 12]


def test_weights_that_go_to_padding_are_counted(small):
    """A 2 x 2 map is padded to 3 x 3."""
    found = attention_map(small, torch.randn(1, 3, 16, 16), layers(small)[2], (0, 0))
    assert found.weights.shape[1:] == (2, 2) and (found.outside > 0.01).all()
    assert torch.allclose(found.weights.sum((1, 2)), 1 - found.outside)


def test_the_hook_is_gone(small):
    layer = layers(small)[0]
    attention_map(small, torch.randn(1, 3, 64, 64), layer, (0, 0))
    assert not layer._forward_pre_hooks


def test_the_command_draws_a_picture(picture_file, tmp_path, capsys):
    output = tmp_path / "map.png"
    status = main(["attend", str(picture_file), "-o", str(output), "--query", "0.6,0.2"])
    said = capsys.readouterr()
    assert (status, said.err) == (0, "")
    assert "query at row 1, column 4 of a map of 8 x 8." in said.out
    with Image.open(output) as drawn:
        pixels = np.asarray(drawn.convert("RGB")).reshape(-1, 3)
    assert drawn.size[0] > 2 * attend.PANEL
    marked = (pixels == attend.QUERY).all(1).sum()
    assert marked > 300  # the query's outline on both panels and on those of the heads


def test_the_picture_is_never_replaced(picture_file, capsys):
    before = picture_file.read_bytes()
    assert main(["attend", str(picture_file), "-o", str(picture_file)]) == 1
    assert "must not replace" in capsys.readouterr().err
    assert picture_file.read_bytes() == before


def test_a_bad_picture_is_named(tmp_path, capsys):
    (tmp_path / "half.png").write_bytes(b"\x89PNG")
    assert main(["attend", str(tmp_path / "half.png"), "-o", str(tmp_path / "o.png")]) == 1
    assert "half.png" in capsys.readouterr().err


def test_cells_cover_the_panel_once(small):
    found = attention_map(small, torch.randn(1, 3, 64, 96), layers(small)[0], (0, 0))
    panel = Image.new("RGB", (attend.PANEL, 281))
    covered = np.zeros((panel.height, panel.width), int)
    rows, columns = found.weights.shape[1:]
    for row in range(rows):
        for column in range(columns):
            left, top, right, bottom = attend._cell(panel, found, row, column)
            covered[top : bottom + 1, left : right + 1] += 1
    assert (covered == 1).all()


def test_heat_is_strongest_where_the_weight_is(small):
    found = attention_map(small, torch.randn(1, 3, 64, 64), layers(small)[0], (0.5, 0.5))
    panel = Image.new("RGB", (160, 160), (90, 90, 90))
    weights = found.weights[0]
    drawn = np.asarray(attend._overlaid(panel, weights, found), float).sum(-1)

    def brightness(row, column):
        left, top, right, bottom = attend._cell(panel, found, row, column)
        return drawn[top + 3 : bottom - 2, left + 3 : right - 2].mean()

    places = [tuple(place) for place in found.window.nonzero().tolist()]
    order = sorted(places, key=lambda place: float(weights[place]))
    assert [brightness(*place) for place in order] == sorted(brightness(*p) for p in places)


def test_the_shown_picture_is_what_the_model_sees():
    model = natcupy.from_pretrained("nat-digits")
    sheet = Image.new("L", (50, 50), 255)
    ImageDraw.Draw(sheet).line([(10, 10), (40, 40)], fill=0, width=5)
    shown = attend.as_image(model.preprocess(sheet), model)
    from natcupy.zoo.ink import ink

    difference = np.asarray(shown, float)[..., 0] - np.asarray(ink(sheet, (32, 32)), float)
    assert np.abs(difference).max() <= 1


def test_places_are_picked_and_refused(small):
    assert attend.pick_layer(small, 0, None)[1:] == (0, 1)
    assert attend.pick_layer(small, 1, -1)[1:] == (1, 0)
    assert attend.pick_layer(small, None, None)[1] == 1  # 28 x 28 at its usual picture size
    for stage, block, word in ((2, 0, "--stage"), (-1, 0, "--stage"), (0, 2, "--block")):
        with pytest.raises(ValueError, match=word):
            attend.pick_layer(small, stage, block)
    numbers = {"embed_dim": 12, "depths": (1,), "num_heads": (2,), "img_size": 32}
    whole = natcupy.create_model("vitrpb-small", **numbers)
    with pytest.raises(ValueError, match="neighborhood attention"):
        attend.pick_layer(whole, None, None)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("missing.png",), "missing.png"),
        (("seven.png", "-o", "map.xyz"), "--output"),
        (("seven.png", "--head", "9"), "--head"),
        (("seven.png", "--stage", "9"), "--stage"),
        (("seven.png", "-o", "no/such/folder/map.png"), "folder"),
    ],
)
def test_what_cannot_be_drawn(picture_file, monkeypatch, capsys, arguments, word):
    monkeypatch.chdir(picture_file.parent)
    status = main(["attend", *arguments])
    said = capsys.readouterr()
    assert status == 1 and said.out == "" and word in said.err
    assert said.err.startswith("natcupy: error: ") and said.err.count("\n") == 1


def test_what_has_no_map(small):
    picture, layer = torch.randn(1, 3, 64, 64), layers(small)[0]
    for place in ((-0.5, 0.5), (0.5, 1.01), (float("nan"), 0.5)):
        with pytest.raises(ValueError, match=r"query must be \(x, y\) as fractions.*from 0 to 1"):
            attention_map(small, picture, layer, place)
    with pytest.raises(ValueError, match="layer must be one that the model runs"):
        attention_map(small, picture, copy.deepcopy(layer), (0.5, 0.5))
    with pytest.raises(TypeError, match="must be a NeighborhoodAttention2D, got Linear"):
        attention_map(small, picture, layer.qkv, (0.5, 0.5))
