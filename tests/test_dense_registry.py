"""Every published dense model: parameters, multiply-adds, dilations, rates, state-dict keys."""

from functools import lru_cache

import pytest
import torch

from natcupy.zoo.config import ConfigError
from natcupy.zoo.dense import (
    DENSE_MODELS,
    DENSE_PUBLISHED,
    DenseConfig,
    build_dense_model,
    count_dense_macs,
    create_dense_model,
    dense_name,
)

# size: (10^6 parameters, tensors in the state dict, 10^9 multiply-adds) of the three architectures
COUNTS = {
    "upernet_nat_mini": (49.78, 339, 900.5),
    "upernet_nat_tiny": (57.70, 495, 934.1),
    "upernet_nat_small": (82.40, 555, 1010.1),
    "upernet_nat_base": (123.28, 555, 1136.9),
    "upernet_dinat_mini": (49.78, 339, 900.5),
    "upernet_dinat_tiny": (57.70, 495, 934.1),
    "upernet_dinat_small": (82.37, 495, 1010.1),
    "upernet_dinat_base": (123.28, 555, 1136.9),
    "upernet_dinat_large": (238.17, 495, 2334.8),
    "upernet_dinat_s_tiny": (59.94, 259, 941.2),
    "upernet_dinat_s_small": (81.26, 415, 1030.2),
    "upernet_dinat_s_base": (121.28, 415, 1173.4),
    "upernet_dinat_s_large": (233.76, 415, 2465.6),
    "mask_rcnn_nat_mini": (39.62, 299, 225.4),
    "mask_rcnn_nat_tiny": (47.54, 455, 258.2),
    "mask_rcnn_nat_small": (70.25, 515, 330.4),
    "mask_rcnn_dinat_mini": (39.62, 299, 225.4),
    "mask_rcnn_dinat_tiny": (47.54, 455, 258.2),
    "mask_rcnn_dinat_small": (70.23, 455, 330.4),
    "mask_rcnn_dinat_s_tiny": (47.79, 219, 263.1),
    "mask_rcnn_dinat_s_small": (69.11, 375, 350.1),
    "cascade_mask_rcnn_nat_mini": (77.46, 405, 704.0),
    "cascade_mask_rcnn_nat_tiny": (85.38, 561, 736.8),
    "cascade_mask_rcnn_nat_small": (108.08, 621, 809.0),
    "cascade_mask_rcnn_nat_base": (146.98, 621, 930.8),
    "cascade_mask_rcnn_dinat_mini": (77.46, 405, 704.0),
    "cascade_mask_rcnn_dinat_tiny": (85.38, 561, 736.8),
    "cascade_mask_rcnn_dinat_small": (108.06, 561, 809.0),
    "cascade_mask_rcnn_dinat_base": (146.98, 621, 930.8),
    "cascade_mask_rcnn_dinat_large": (257.89, 561, 1275.7),
    "cascade_mask_rcnn_dinat_s_tiny": (85.63, 325, 741.7),
    "cascade_mask_rcnn_dinat_s_small": (106.95, 481, 828.6),
    "cascade_mask_rcnn_dinat_s_base": (144.98, 481, 966.4),
    "cascade_mask_rcnn_dinat_s_large": (253.48, 481, 1357.5),
}


def on_meta(name, **overrides):
    with torch.device("meta"):
        return create_dense_model(name, **overrides)


@lru_cache
def published(name):
    return on_meta(name)


@pytest.mark.parametrize("name", DENSE_MODELS)
def test_counts(name):
    model, row = published(name), DENSE_PUBLISHED[name]
    params, tensors, gmacs = COUNTS[name]
    counted = sum(p.numel() for p in model.parameters()) / 1e6
    assert counted == pytest.approx(params, abs=0.005) and round(counted) == row.params
    assert len(model.state_dict()) == tensors
    macs = count_dense_macs(model.config, *row.size).total / 1e9
    assert macs == pytest.approx(gmacs, abs=0.06) and round(macs) == row.gmacs
    assert model.name == name and model.name == DENSE_MODELS[name].__name__
    assert len(model.label_names) == (150 if name.startswith("upernet") else 80)


def test_tables_agree():
    assert set(COUNTS) == set(DENSE_MODELS) == set(DENSE_PUBLISHED)


def test_macs_by_part():
    macs = count_dense_macs(published("mask_rcnn_nat_mini").config, 800, 1280)
    parts = (macs.backbone + macs.neck, macs.rpn, macs.boxes, macs.masks)
    assert [round(part / 1e8) / 10 for part in parts] == [107.5, 50.6, 14.3, 53.0]
    macs = count_dense_macs(published("cascade_mask_rcnn_nat_mini").config, 800, 1280)
    assert [round(part / 1e8) / 10 for part in (macs.boxes, macs.masks)] == [386.9, 159.0]


MINI_14 = ((1, 28, 1), (1, 7, 1, 14), (1, 3, 1, 5, 1, 7), (1, 3, 1, 3, 1))


@pytest.mark.parametrize(
    ("name", "rate", "dilations"),
    [
        ("upernet_nat_small", 0.5, None),
        ("cascade_mask_rcnn_nat_tiny", 0.3, None),
        ("cascade_mask_rcnn_nat_mini", 0.2, None),
        ("mask_rcnn_dinat_small", 0.35, (*MINI_14[:2], MINI_14[2] * 3, MINI_14[3])),
        ("cascade_mask_rcnn_dinat_mini", 0.2, MINI_14),
        ("cascade_mask_rcnn_dinat_s_tiny", 0.3, ((1, 28), (1, 14), (1, 3, 1, 5, 1, 7), (1, 3))),
        (
            "upernet_dinat_tiny",
            0.3,
            ((1, 16, 1), (1, 4, 1, 8), (1, 2, 1, 3, 1, 4) * 3, (1, 2, 1, 2, 1)),
        ),
        (
            "upernet_dinat_large",
            0.3,
            (
                (1, 20, 1),
                (1, 5, 1, 10),
                (1, 2, 1, 3, 1, 4, 1, 5, 1, 2, 1, 3, 1, 4, 1, 5, 1, 5),
                (1, 2, 1, 2, 1),
            ),
        ),
        ("upernet_dinat_s_base", 0.3, ((1, 16), (1, 8), (1, 2, 1, 3, 1, 4) * 3, (1, 2))),
    ],
)
def test_downstream_backbones(name, rate, dilations):
    config = published(name).config.backbone
    assert (config.drop_path_rate, config.dilations) == (rate, dilations)


def test_layer_scale_is_where_the_checkpoints_have_it():
    scaled = {n for n in DENSE_MODELS if published(n).config.backbone.layer_scale is not None}
    sizes = ("_nat_small", "_nat_base", "_dinat_base")
    assert scaled == {n for n in DENSE_MODELS if n.endswith(sizes)}


def expected_heads(name, dims, classes):
    """Names and shapes of the tensors beside the backbone, as the checkpoints have them."""
    shapes = {}

    def conv(key, out, into, side, bias=True):
        shapes[f"{key}.weight"] = (out, into, side, side)
        if bias:
            shapes[f"{key}.bias"] = (out,)

    def unit(key, out, into, side):
        conv(f"{key}.conv", out, into, side, bias=False)
        for leaf in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{key}.bn.{leaf}"] = (out,)
        shapes[f"{key}.bn.num_batches_tracked"] = ()

    def linear(key, out, into):
        shapes[f"{key}.weight"], shapes[f"{key}.bias"] = (out, into), (out,)

    def mask_head(key):
        for i in range(4):
            conv(f"{key}.convs.{i}.conv", 256, 256, 3)
        conv(f"{key}.upsample", 256, 256, 2)
        conv(f"{key}.conv_logits", classes, 256, 1)

    if name.startswith("upernet"):
        conv("decode_head.conv_seg", classes, 512, 1)
        for i in range(4):
            unit(f"decode_head.psp_modules.{i}.1", 512, dims[3], 1)
        unit("decode_head.bottleneck", 512, dims[3] + 2048, 3)
        for i in range(3):
            unit(f"decode_head.lateral_convs.{i}", 512, dims[i], 1)
            unit(f"decode_head.fpn_convs.{i}", 512, 512, 3)
        unit("decode_head.fpn_bottleneck", 512, 2048, 3)
        unit("auxiliary_head.convs.0", 256, dims[2], 3)
        conv("auxiliary_head.conv_seg", classes, 256, 1)
        return shapes
    for i in range(4):
        conv(f"neck.lateral_convs.{i}.conv", 256, dims[i], 1)
        conv(f"neck.fpn_convs.{i}.conv", 256, 256, 3)
    conv("rpn_head.rpn_conv", 256, 256, 3)
    conv("rpn_head.rpn_cls", 3, 256, 1)
    conv("rpn_head.rpn_reg", 12, 256, 1)
    if name.startswith("mask_rcnn"):
        box = "roi_head.bbox_head"
        linear(f"{box}.shared_fcs.0", 1024, 12544)
        linear(f"{box}.shared_fcs.1", 1024, 1024)
        linear(f"{box}.fc_cls", classes + 1, 1024)
        linear(f"{box}.fc_reg", 4 * classes, 1024)
        mask_head("roi_head.mask_head")
        return shapes
    for stage in range(3):
        box = f"roi_head.bbox_head.{stage}"
        for i in range(4):
            unit(f"{box}.shared_convs.{i}", 256, 256, 3)
        linear(f"{box}.shared_fcs.0", 1024, 12544)
        linear(f"{box}.fc_cls", classes + 1, 1024)
        linear(f"{box}.fc_reg", 4 * classes, 1024)
        mask_head(f"roi_head.mask_head.{stage}")
    return shapes


@pytest.mark.parametrize(
    "name",
    ["upernet_nat_tiny", "mask_rcnn_nat_mini", "cascade_mask_rcnn_dinat_s_large"],
)
def test_state_dict(name):
    model = published(name)
    dims = model.config.backbone.dims
    shapes = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    heads = {k: v for k, v in shapes.items() if not k.startswith("backbone.")}
    assert heads == expected_heads(name, dims, model.num_classes)
    for i, dim in enumerate(dims):
        assert shapes[f"backbone.norm{i}.weight"] == (dim,)
    assert not any(k.startswith(("backbone.norm.", "backbone.head.")) for k in shapes)


TINY = {"embed_dim": 8, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1), "channels": 4}


@pytest.mark.parametrize("name", ["upernet_dinat_mini", "mask_rcnn_nat_mini"])
def test_config_round_trip(name):
    model = create_dense_model(name, num_classes=3, **TINY)
    config = DenseConfig.from_dict(model.config.to_dict())
    assert config == model.config
    again = build_dense_model(config, model.pretrained_cfg)
    again.load_state_dict(model.state_dict(), strict=True)
    assert again.name == name and again.label_names == ("class 0", "class 1", "class 2")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "deeplab"}, "architecture must be one of"),
        ({"num_classes": 0}, "num_classes must be an int"),
        ({"num_classes": True}, "num_classes must be an int"),
        ({"channels": 1e3}, "channels must be an int"),
        ({"fc_channels": 7}, "fc_channels must be None"),
        ({"aux_channels": None}, "aux_channels must be an int"),
        ({"backbone": {}}, "must state family"),
        ({"backbone": 5}, "must be an object"),
        ({"colour": 5}, "no field 'colour'"),
    ],
)
def test_bad_configs(changes, message):
    values = on_meta("upernet_nat_mini", **TINY).config.to_dict()
    with pytest.raises(ConfigError, match=message):
        DenseConfig.from_dict({**values, **changes})


def test_backbones_that_do_not_fit():
    config = published("upernet_nat_mini").config
    with pytest.raises(ConfigError, match="hand out all"):
        config.replace(backbone=config.backbone.replace(out_indices=(1, 2)))
    with pytest.raises(ConfigError, match="several levels"):
        single = {"family": "isotropic", "embed_dim": 8, "depths": (2,), "num_heads": (1,)}
        config.replace(backbone=type(config.backbone)(**single, img_size=32, out_indices=(1,)))


def test_names():
    assert dense_name("upernet-nat-tiny") == "upernet_nat_tiny"
    assert dense_name("nat_tiny") is None and dense_name("") is None
    with pytest.raises(ValueError, match="upernet-nat-tiny"):
        create_dense_model("upernet_nat_tinny")
    with pytest.raises(TypeError, match="did you mean 'num_classes'"):
        create_dense_model("upernet_nat_tiny", num_class=3)
    with pytest.raises(TypeError, match="fc_channels"):
        create_dense_model("upernet_nat_tiny", fc_channels=3)


def test_overrides_reach_the_backbone():
    model = on_meta("upernet_dinat_mini", depths=(1, 2, 7, 2), drop_path_rate=0.0)
    config = model.config.backbone
    assert config.dilations == ((1,), (1, 4), (1, 2, 1, 3, 1, 4, 1), (1, 2))
    assert config.drop_path_rate == 0
    given = ((1, 2, 1), (1,) * 4, (1,) * 6, (1,) * 5)
    assert on_meta("upernet_dinat_mini", dilations=given).config.backbone.dilations == given


def test_a_classifier_starts_the_backbone():
    from natcupy.zoo import create_model

    numbers = {k: v for k, v in TINY.items() if k != "channels"}
    classifier = create_model("dinat_mini", **numbers)
    model = create_dense_model("mask_rcnn_dinat_mini", **TINY)
    model.load_classifier(classifier.state_dict(), classifier.config)
    ours, theirs = model.backbone.state_dict(), classifier.state_dict()
    shared = [key for key in ours if key in theirs]
    assert len(shared) == len(theirs) - 4
    assert all(torch.equal(ours[key], theirs[key]) for key in shared)
    assert model.backbone.norm2.weight.eq(1).all() and model.backbone.norm2.bias.eq(0).all()
    with pytest.raises(ValueError, match="embed_dim"):
        other = create_model("dinat_mini", **{**numbers, "embed_dim": 16})
        model.load_classifier(other.state_dict(), other.config)


def test_what_is_not_decayed():
    names = on_meta("upernet_nat_mini", **TINY).no_weight_decay()
    assert "backbone.norm0.weight" in names and "backbone.levels.0.blocks.0.attn.rpb" in names
    assert not any(".bn." in name for name in names)


def test_the_zoo_knows_the_names():
    from natcupy import zoo

    assert zoo.upernet_nat_tiny is DENSE_MODELS["upernet_nat_tiny"]
    assert not hasattr(zoo, "upernet_nat_huge") and not hasattr(zoo, "nat_huge")
    with torch.device("meta"):
        model = zoo.create_model("Mask-RCNN-NAT-Mini", num_classes=2)
    assert model.name == "mask_rcnn_nat_mini" and model.num_classes == 2
    assert zoo.is_model("cascade-mask-rcnn-dinat-s-tiny") and not zoo.is_model("upernet_nat_huge")
    tasks = {task: zoo.list_models(task=task) for task in ("segmentation", "detection")}
    assert {task: len(names) for task, names in tasks.items()} == {
        "segmentation": 13,
        "detection": 21,
    }
    assert {name for names in tasks.values() for name in names} == set(DENSE_MODELS)
    assert zoo.list_models("mask-rcnn-dinat*", task="detection")[0] == "mask_rcnn_dinat_mini"
    assert zoo.list_models(task="detection", pretrained=True) == []
    with pytest.raises(ValueError, match="nearest are upernet-nat-tiny"):
        zoo.create_model("upernet-nat-tny")
    with pytest.raises(ValueError, match="task must be one of"):
        zoo.list_models(task="sewing")
