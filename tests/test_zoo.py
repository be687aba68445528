"""The registry: names, sizes, state-dict keys, parameters and multiply-adds of every model."""

import math
import sys

import pytest
import torch

from natcupy import zoo
from natcupy.zoo import (
    MODELS,
    PUBLISHED,
    TASKS,
    count_macs,
    create_model,
    is_model,
    list_models,
    model_config,
    num_parameters,
)

# name: (parameters, tensors in the state dict, 10^9 MACs plain, the papers' counting)
COUNTS = {
    "nat_mini": (19_984_174, 253, 2.695, 2.713),
    "nat_tiny": (27_901_582, 409, 4.295, 4.321),
    "nat_small": (50_743_297, 469, 7.772, 7.811),
    "nat_base": (89_769_652, 469, 13.677, 13.728),
    "dinat_mini": (19_984_174, 253, 2.695, 2.713),
    "dinat_tiny": (27_901_582, 409, 4.295, 4.321),
    "dinat_small": (50_719_681, 409, 7.772, 7.811),
    "dinat_base": (89_769_652, 469, 13.677, 13.728),
    "dinat_large": (200_943_514, 409, 30.458, 30.534),
    "dinat_large_384": (200_943_514, 409, 89.505, 89.730),
    "dinat_large_384_11x11": (201_144_250, 409, 92.085, 92.350),
    "dinat_s_tiny": (28_288_354, 173, 4.491, 4.511),
    "dinat_s_small": (49_606_258, 329, 8.741, 8.772),
    "dinat_s_base": (87_768_224, 329, 15.431, 15.473),
    "dinat_s_large": (196_532_476, 329, 34.476, 34.538),
    "dinat_s_large_384": (196_532_476, 329, 101.314, 101.497),
    "nat_isotropic_small": (21_999_736, 164, 4.308, 4.320),
    "nat_isotropic_base": (86_465_800, 164, 16.941, 16.963),
    "dinat_isotropic_small": (21_999_736, 164, 4.308, 4.320),
    "dinat_isotropic_base": (86_465_800, 164, 16.941, 16.963),
    "vitrpb_small": (22_080_376, 176, 4.574, 4.584),
    "vitrpb_base": (86_627_080, 176, 17.472, 17.491),
}
WITHOUT_TABLE = {"dinat_large_21k", "dinat_large_21k_11x11", "dinat_s_large_21k"}
# Printed digits that rounding the papers' own counting does not give; the table must say so.
MACS_DISAGREE = {
    "dinat_large",
    "dinat_s_small",
    "dinat_s_base",
    "nat_isotropic_base",
    "dinat_isotropic_base",
}
PARAMS_DISAGREE = {"dinat_large", "dinat_large_384", "dinat_large_384_11x11", "vitrpb_base"}


def on_meta(name, **overrides):
    with torch.device("meta"):
        return create_model(name, **overrides)


def test_every_model_is_covered():
    assert set(MODELS) == set(PUBLISHED) == set(COUNTS) | WITHOUT_TABLE


# -- sizes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_parameters_and_keys(name):
    model = on_meta(name)
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    assert shapes == expected_shapes(model.config)
    assert num_parameters(model.config) == sum(p.numel() for p in model.parameters())
    if name in COUNTS:
        assert (num_parameters(model.config), len(shapes)) == COUNTS[name][:2]


def expected_shapes(config):
    """The original checkpoints' names and shapes, written down from their documentation."""
    c, chans = config.embed_dim, config.in_chans
    if config.family == "nat":
        shapes = linear("patch_embed.proj.0", c // 2, (chans, 3, 3))
        shapes |= linear("patch_embed.proj.1", c, (c // 2, 3, 3))
    else:
        patch = 4 if config.family == "dinat_s" else 16
        shapes = linear("patch_embed.proj", c, (chans, patch, patch))
    shapes |= norm("patch_embed.norm", c)
    for level, depth in enumerate(config.depths):
        dim, heads = c * 2**level, config.num_heads[level]
        for j in range(depth):
            shapes |= block(block_prefix(config.family, level, j), dim, heads, config)
        if level < len(config.depths) - 1:
            shapes |= downsampler(config.family, level, dim)
    last = c * 2 ** (len(config.depths) - 1)
    return shapes | norm("norm", last) | linear("head", config.num_classes, (last,))


def block_prefix(family, level, j):
    if family == "nat":
        return f"levels.{level}.blocks.{j}"
    return f"layers.{level}.blocks.{j}" if family == "dinat_s" else f"layers.{j}"


def block(prefix, dim, heads, config):
    span = 27 if config.family == "vitrpb" else 2 * config.kernel_size - 1
    hidden = int(dim * config.mlp_ratio)
    shapes = norm(f"{prefix}.norm1", dim) | norm(f"{prefix}.norm2", dim)
    shapes |= {f"{prefix}.attn.rpb": (heads, span, span)}
    shapes |= linear(f"{prefix}.attn.qkv", 3 * dim, (dim,))
    shapes |= linear(f"{prefix}.attn.proj", dim, (dim,))
    shapes |= linear(f"{prefix}.mlp.fc1", hidden, (dim,))
    shapes |= linear(f"{prefix}.mlp.fc2", dim, (hidden,))
    if config.family == "vitrpb":
        shapes |= {f"{prefix}.attn.relative_position_index": (196, 196)}
    if config.layer_scale is not None:
        shapes |= {f"{prefix}.gamma1": (dim,), f"{prefix}.gamma2": (dim,)}
    return shapes


def downsampler(family, level, dim):
    if family == "nat":
        prefix = f"levels.{level}.downsample"
        reduction = {f"{prefix}.reduction.weight": (2 * dim, dim, 3, 3)}
        return reduction | norm(f"{prefix}.norm", 2 * dim)
    prefix = f"layers.{level}.downsample"
    return {f"{prefix}.reduction.weight": (2 * dim, 4 * dim)} | norm(f"{prefix}.norm", 4 * dim)


def linear(prefix, rows, inner):
    return {f"{prefix}.weight": (rows, *inner), f"{prefix}.bias": (rows,)}


def norm(prefix, dim):
    return {f"{prefix}.weight": (dim,), f"{prefix}.bias": (dim,)}


@pytest.mark.parametrize("name", COUNTS)
def test_macs(name):
    side = PUBLISHED[name].img_size
    macs = count_macs(model_config(name), side, side)
    _, _, plain, papers = COUNTS[name]
    assert round(macs.plain / 1e9, 3) == plain
    assert round(macs.papers / 1e9, 3) == papers


@pytest.mark.parametrize("name", COUNTS)
def test_published_digits(name):
    """The printed tables are what is counted here, but for the rows that say otherwise."""
    row, config = PUBLISHED[name], model_config(name)
    macs = count_macs(config, row.img_size, row.img_size)
    assert (f"{macs.papers / 1e9:.1f}" == row.gmacs) == (name not in MACS_DISAGREE)
    if name in MACS_DISAGREE - {"dinat_large"}:
        assert f"{macs.plain / 1e9:.1f}" == row.gmacs
    millions = num_parameters(config) / 1e6
    assert (round(millions) == row.params) == (name not in PARAMS_DISAGREE)
    if name in PARAMS_DISAGREE and "11x11" not in name:
        assert math.floor(millions) == row.params
    assert bool(row.note) == (name in MACS_DISAGREE | PARAMS_DISAGREE)


def test_the_printed_macs_of_dinat_large_are_those_with_the_22k_classifier():
    macs = count_macs(model_config("dinat_large", num_classes=21841), 224, 224)
    assert f"{macs.papers / 1e9:.1f}" == PUBLISHED["dinat_large"].gmacs


@pytest.mark.parametrize(
    ("name", "size"), [("dinat_mini", (160, 128)), ("dinat_s_tiny", (150, 134))]
)
def test_macs_against_what_runs(name, size):
    """Convolutions, linear layers and attention as the modules see them, on padded maps."""
    model = on_meta(name, depths=(1, 2, 1, 2))
    counted = []

    def hook(module, inputs, output):
        x = inputs[0]
        if isinstance(module, torch.nn.Conv2d):
            counted.append(output[0, 0].numel() * module.weight.numel())
        elif isinstance(module, torch.nn.Linear):
            counted.append(x.numel() // x.shape[-1] * module.weight.numel())
        if module in projections:  # what it makes is attended: q·k and weights·v
            counted.append(2 * 49 * x.numel())

    projections = {m for key, m in model.named_modules() if key.endswith("attn.qkv")}
    for module in model.modules():
        module.register_forward_hook(hook)
    model(torch.empty(1, 3, *size, device="meta"))
    assert sum(counted) == count_macs(model.config, *size).plain


def test_macs_refuse_bad_sizes():
    with pytest.raises(ValueError, match="at least 1, got 0 x 5"):
        count_macs(model_config("nat_mini"), 0, 5)
    with pytest.raises(ValueError, match="224 x 224 pictures only, got 256 x 224"):
        count_macs(model_config("nat_isotropic_small"), 256, 224)


# -- the numbers of each size -------------------------------------------------------------------

ALTERNATING = {  # largest dilation per level
    "dinat_mini": (8, 4, 2, 1),
    "dinat_tiny": (8, 4, 2, 1),
    "dinat_small": (8, 4, 2, 1),
    "dinat_base": (8, 4, 2, 1),
    "dinat_large": (8, 4, 2, 1),
    "dinat_large_384": (13, 6, 3, 1),
    "dinat_large_384_11x11": (8, 4, 2, 1),
    "dinat_large_21k": (8, 4, 2, 1),
    "dinat_large_21k_11x11": (8, 4, 2, 1),
    "dinat_s_tiny": (8, 4, 2, 1),
    "dinat_s_small": (8, 4, 2, 1),
    "dinat_s_base": (8, 4, 2, 1),
    "dinat_s_large": (8, 4, 2, 1),
    "dinat_s_large_384": (13, 6, 3, 1),
    "dinat_s_large_21k": (8, 4, 2, 1),
    "dinat_isotropic_small": (2,),
    "dinat_isotropic_base": (2,),
}
DROP_PATH = {
    "mini": 0.2, "tiny": 0.2, "small": 0.3, "base": 0.5, "large": 0.35, "21k": 0.2
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_dilations(name):
    dilations = model_config(name).dilations
    assert (dilations is not None) == (name in ALTERNATING)
    for row, largest in zip(dilations or (), ALTERNATING.get(name, ()), strict=True):
        assert set(row[::2]) == {1}
        assert set(row[1::2]) == {largest}


@pytest.mark.parametrize("name", MODELS)
def test_rates_heads_and_scales(name):
    model = on_meta(name)
    config = model.config
    single = config.family in ("isotropic", "vitrpb")
    size = "21k" if "21k" in name else name.split("_")[2 if name.startswith("dinat_s_") else 1]
    if single:
        rate = 0.1 if name.endswith("small") else 0.4
    else:
        rate = DROP_PATH[size]
    rates = [b.drop_path.rate for b in model.modules() if hasattr(b, "drop_path")]
    assert config.drop_path_rate == rate
    steps = len(rates) - 1
    assert rates == pytest.approx([rate * step / steps for step in range(len(rates))])
    assert all(dim // heads == 32 for dim, heads in zip(config.dims, config.num_heads, strict=True))
    assert config.layer_scale == (1e-5 if name in ("nat_small", "nat_base", "dinat_base") else None)
    assert config.mlp_ratio == (4 if config.family != "nat" else 3 if size in DROP_PATH and
                                config.embed_dim == 64 else 2)  # fmt: skip
    assert config.kernel_size == (None if "vit" in name else 11 if "11x11" in name else 7)
    assert config.num_classes == (21841 if "21k" in name else 1000)


@pytest.mark.parametrize("name", MODELS)
def test_pretrained_cfg(name):
    cfg, row = on_meta(name).pretrained_cfg, PUBLISHED[name]
    side = 384 if "384" in name else 224
    assert (cfg["architecture"], cfg["tag"]) == (name, row.tag)
    assert cfg["input_size"] == (3, side, side)
    assert cfg["crop_pct"] == (1.0 if side == 384 else 0.875)
    assert (cfg["interpolation"], cfg["crop_mode"]) == ("bicubic", "center")
    assert cfg["mean"] == (0.485, 0.456, 0.406)
    assert cfg["std"] == (0.229, 0.224, 0.225)
    assert cfg["first_conv"] == "patch_embed.proj" + (".0" if name in NAT_NAMES else "")
    assert cfg["fixed_input_size"] == ("isotropic" in name or "vit" in name)


NAT_NAMES = {name for name in MODELS if model_config(name).family == "nat"}


# -- names --------------------------------------------------------------------------------------


def test_names_in_every_spelling():
    for name in ("nat_tiny", "nat-tiny", "nat_tiny.in1k", "nat-tiny.in1k", "NAT-Tiny"):
        assert is_model(name)
        assert on_meta(name).name == "nat_tiny"
    assert not is_model("nat_huge")
    assert not is_model("nat_tiny.in22k")


def test_a_wrong_name_shows_the_nearest():
    with pytest.raises(ValueError, match=r"no model 'nat-tinny'; the nearest are nat-tiny"):
        create_model("nat-tinny")
    with pytest.raises(ValueError, match=r"no tag 'in22k' of nat-tiny.*nat-tiny\.in1k"):
        create_model("nat_tiny.in22k")
    with pytest.raises(ValueError, match=r"list_models"):
        create_model("????")
    with pytest.raises(TypeError, match="string, got int"):
        create_model(7)


def test_list_models():
    assert list_models() == sorted(MODELS)
    nats = ["nat_base", "nat_isotropic_base", "nat_isotropic_small"]
    assert list_models("nat*") == [*nats, "nat_mini", "nat_small", "nat_tiny"]
    assert list_models("dinat-s-*") == list_models("dinat_s_*") == list_models("dinat-s_*")
    assert len(list_models("dinat_s_*")) == 6
    assert list_models(["vitrpb*", "nat-m*"]) == ["nat_mini", "vitrpb_base", "vitrpb_small"]
    assert list_models("nat*", exclude_filters="*isotropic*") == [
        "nat_base", "nat_mini", "nat_small", "nat_tiny"
    ]  # fmt: skip
    assert list_models("resnet*") == []


def test_list_models_of_every_task():
    of_tasks = {name for task in TASKS for name in list_models(task=task)}
    every = list_models(task=None)
    assert every == sorted({*of_tasks, "nat_digits"})
    assert all(is_model(name) for name in every) and "nat_digits" not in list_models()
    assert {"upernet_nat_mini", "cascade_mask_rcnn_nat_mini"} <= {*every}
    assert list_models("*nat-mini", task=None, exclude_filters="*rcnn*") == [
        "dinat_mini", "nat_mini", "upernet_dinat_mini", "upernet_nat_mini"
    ]  # fmt: skip
    assert not any("-" in name for name in (*every, *list_models(pretrained=True, task=None)))
    assert list_models("*digits", pretrained=True) == ["nat_digits"]
    with pytest.raises(ValueError, match=r"task must be one of classification, .* or None"):
        list_models(task="all")


def test_list_models_with_weights():
    names = list_models("nat*", pretrained=True)
    assert "nat_tiny.in1k" in names
    assert list_models("nat-tiny", pretrained=True) == ["nat_tiny.in1k"]
    assert list_models("*.in22k_ft_in1k", pretrained=True) == [
        "dinat_large.in22k_ft_in1k",
        "dinat_large_384.in22k_ft_in1k",
        "dinat_large_384_11x11.in22k_ft_in1k",
    ]
    assert list_models("vitrpb*", pretrained=True) == []  # released outside the Hub


def test_size_functions_are_public():
    for name, function in MODELS.items():
        assert getattr(zoo, name) is function
        assert function.__name__ == name
        assert function.__doc__ or sys.flags.optimize > 1


# -- overrides ----------------------------------------------------------------------------------


def test_overrides_reach_the_model():
    model = on_meta(
        "dinat-mini", num_classes=10, in_chans=5, drop_path_rate=0.0, kernel_size=5,
        dilations=[[2] * 3, [1] * 4, [1] * 6, [3] * 5], layer_scale=1e-4,
    )  # fmt: skip
    assert model.head.out_features == model.num_classes == 10
    assert model.patch_embed.proj[0].in_channels == 5
    assert model.levels[0].blocks[0].attn.hood.dilation == (2, 2)
    assert model.levels[3].blocks[0].attn.hood.kernel_size == (5, 5)
    assert model.levels[0].blocks[1].gamma1.shape == (64,)
    assert {b.drop_path.rate for level in model.levels for b in level.blocks} == {0.0}
    assert model.pretrained_cfg["input_size"] == (5, 224, 224)
    assert num_parameters(model.config) == sum(p.numel() for p in model.parameters())


def test_dilations_follow_other_overrides():
    assert model_config("dinat_mini", depths=(1, 1, 3, 1)).dilations == (
        (1,),
        (1,),
        (1, 2, 1),
        (1,),
    )
    assert model_config("dinat_mini", kernel_size=3).dilations[0] == (1, 18, 1)
    assert model_config("dinat_mini", dilations=None).dilations is None
    assert model_config("dinat_isotropic_small", img_size=384).dilations[0][1] == 3


def test_any_number_of_levels():
    for depths, heads in (((2,), (2,)), ((1, 1), (1, 2)), ((1,) * 6, (1, 1, 2, 4, 8, 16))):
        model = on_meta("nat_mini", embed_dim=32, depths=depths, num_heads=heads, num_classes=3)
        assert num_parameters(model.config) == sum(p.numel() for p in model.parameters())
        assert model(torch.empty(2, 3, 64, 64, device="meta")).shape == (2, 3)


def test_unknown_overrides_are_named():
    with pytest.raises(TypeError, match=r"nat-mini has no option 'num_class'; did you mean 'num_c"):
        create_model("nat_mini", num_class=3)
    with pytest.raises(TypeError, match="no option 'family'"):
        create_model("nat_mini", family="vitrpb")
    with pytest.raises(ValueError, match="num_classes must be an int in 0"):
        create_model("nat_mini", num_classes=-1)


def test_pretrained_hands_over_to_the_hub(monkeypatch):
    class Hub:
        @staticmethod
        def from_pretrained(name, **overrides):
            return name, overrides

    monkeypatch.setattr(zoo, "_hub", lambda: Hub)
    got = create_model("some-org/some-nat", pretrained=True, num_classes=4)
    assert got == ("some-org/some-nat", {"num_classes": 4})
