"""Feature maps of models: intermediates, backbones, stopping early, pruning."""

import pytest
import torch
from small_models import each_family, pictures, small
from torch import nn

from natcupy.zoo import num_parameters


@each_family
def test_intermediates_are_the_maps_before_downsampling(family):
    model, x = small(family), pictures()
    features, maps = model.forward_intermediates(x, output_fmt="NHWC")
    assert torch.equal(features, model.forward_features(x))
    assert len(maps) == model.config.num_stages
    here = model.patch_embed(x)
    for stage, one in zip(model.stages, maps, strict=True):
        here = stage(here)
        assert torch.equal(one, here)
        if stage.downsample is not None:
            here = stage.downsample(here)
    assert [m.shape[-1] for m in maps] == model.feature_info.channels()


@each_family
def test_intermediates_options(family):
    model, x = small(family), pictures()
    features, maps = model.forward_intermediates(x)
    last = len(maps) - 1
    for indices in ([0, last], (0, -1)):
        picked = model.forward_intermediates(x, indices, intermediates_only=True)
        assert [torch.equal(a, b) for a, b in zip(picked, (maps[0], maps[-1]), strict=True)]
    two = model.forward_intermediates(x, 2, intermediates_only=True, output_fmt="NHWC")
    assert torch.equal(two[0].permute(0, 3, 1, 2), maps[-2])
    normed = model.forward_intermediates(x, norm=True, intermediates_only=True)
    assert torch.equal(normed[-1], features.permute(0, 3, 1, 2))
    same_width = family in ("isotropic", "vitrpb")
    assert torch.equal(normed[0], maps[0]) == (not same_width)
    with pytest.raises(ValueError, match="output_fmt must be 'NCHW' or 'NHWC', got 'NLC'"):
        model.forward_intermediates(x, output_fmt="NLC")
    with pytest.raises(ValueError, match=r"indices\[0\] must be an int in"):
        model.forward_intermediates(x, [9])


@each_family
def test_stop_early_runs_no_later_stage(family):
    model, x, ran = small(family), pictures(), []
    for index, stage in enumerate(model.stages):
        stage.register_forward_hook(lambda *_, index=index: ran.append(index))
    reached, maps = model.forward_intermediates(x, [0, 1], stop_early=True, output_fmt="NHWC")
    assert ran == [0, 1]
    assert reached is maps[1]


@each_family
def test_features_only(family):
    classifier, x = small(family), pictures()
    count = classifier.config.num_stages
    backbone = small(family, features_only=True, out_indices=tuple(range(count)))
    names = set(backbone.state_dict())
    norms = {f"norm{i}.{kind}" for i in range(count) for kind in ("weight", "bias")}
    assert names - norms == {
        n for n in classifier.state_dict() if not n.startswith(("norm.", "head."))
    }
    assert norms <= names
    assert num_parameters(backbone.config) == sum(p.numel() for p in backbone.parameters())
    backbone.load_state_dict(classifier.state_dict(), strict=False)
    for stage in range(count):
        nn.init.normal_(getattr(backbone, f"norm{stage}").weight)
    maps = classifier.forward_intermediates(x, intermediates_only=True, output_fmt="NHWC")
    for stage, (got, raw) in enumerate(zip(backbone(x), maps, strict=True)):
        expected = getattr(backbone, f"norm{stage}")(raw).permute(0, 3, 1, 2)
        assert torch.equal(got, expected)


@each_family
def test_feature_info(family):
    single = family in ("isotropic", "vitrpb")
    backbone = small(family, features_only=True)
    maps = backbone(pictures())
    info = backbone.feature_info
    assert [m.shape[1] for m in maps] == info.channels()
    assert [64 // m.shape[2] for m in maps] == info.reduction()
    assert info.out_indices == ((2,) if single else (0, 1, 2, 3))
    assert info.channels() == ([64] if single else [32, 64, 128, 256])
    assert info.reduction() == ([16] if single else [4, 8, 16, 32])
    assert dict(backbone.named_modules())[info.module_name(0)] is backbone.stages[0]
    assert info.channels([0, 1]) == [info.channels(0), info.channels(1)]
    assert info.get_dicts(["num_chs"], 0) == {"num_chs": info[0]["num_chs"]}


def test_out_indices():
    backbone = small("nat", out_indices=[1, -1])
    assert backbone.config.out_indices == (1, 3)
    assert [m.shape[1] for m in backbone(pictures())] == backbone.feature_info.channels()
    assert {n for n in backbone.state_dict() if n.startswith("norm")} == {
        "norm1.weight", "norm1.bias", "norm3.weight", "norm3.bias"
    }  # fmt: skip
    assert small("nat", features_only=True, out_indices=2).config.out_indices == (2, 3)
    with pytest.raises(ValueError, match="features_only=False"):
        small("nat", features_only=False, out_indices=(0,))
    with pytest.raises(ValueError, match="no classifier to reset"):
        backbone.reset_classifier(3)


@each_family
def test_prune_intermediate_layers(family):
    model, x = small(family), pictures()
    maps = model.forward_intermediates(x, intermediates_only=True)
    assert model.prune_intermediate_layers([0, 1]) == [0, 1]
    assert len(model.stages) == 2
    pruned = model.forward_intermediates(x, [0, 1], intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(pruned, maps[:2], strict=True))
    assert not any("downsample" in n for n in model.stages[-1].state_dict())
    assert model(x).shape == (2, maps[1].shape[1])
    assert model.num_features == maps[1].shape[1]


def test_prune_keeps_what_it_is_told_to_keep():
    model, x = small("nat"), pictures()
    expected = model(x)
    assert model.prune_intermediate_layers(4, prune_norm=False, prune_head=False) == [0, 1, 2, 3]
    assert torch.equal(model(x), expected)
