"""State dicts between layouts: both ways, bit for bit; numbers back from shapes; resizing."""

import pytest
import torch
from small import CONFIGS, invented, same
from torch.nn.functional import interpolate

from natcupy.hub import convert
from natcupy.hub.errors import CheckpointError
from natcupy.zoo import create_model, model_config

HIERARCHICAL = ("nat", "dinat", "backbone")


def meta(state):
    return {k: torch.empty(v.shape, dtype=v.dtype, device="meta") for k, v in state.items()}


@pytest.mark.parametrize("name", HIERARCHICAL)
@pytest.mark.parametrize("prefix", ["nat.", "dinat.", ""])
def test_transformers_and_back(name, prefix):
    state = invented(name).state_dict()
    theirs = convert.to_transformers(state, prefix)
    assert convert.detect_layout(theirs) == "transformers"
    same(convert.from_transformers(theirs), state)
    same(convert.to_transformers(convert.from_transformers(theirs), prefix), theirs)


def test_transformers_names_and_values():
    """The mapping of one block, written out by hand."""
    state = invented("dinat").state_dict()
    theirs = convert.to_transformers(state, "dinat.")
    ours, block = "levels.1.blocks.0.", "dinat.encoder.levels.1.layers.0."
    level = "dinat.encoder.levels.0."
    dim = CONFIGS["dinat"].dims[1]
    for index, part in enumerate(("query", "key", "value")):
        rows = slice(index * dim, (index + 1) * dim)
        for kind in ("weight", "bias"):
            expected = state[f"{ours}attn.qkv.{kind}"][rows]
            assert torch.equal(theirs[f"{block}attention.self.{part}.{kind}"], expected)
    for there, here in {
        "attention.self.rpb": "attn.rpb",
        "attention.output.dense.weight": "attn.proj.weight",
        "layernorm_before.bias": "norm1.bias",
        "layernorm_after.weight": "norm2.weight",
        "intermediate.dense.weight": "mlp.fc1.weight",
        "output.dense.weight": "mlp.fc2.weight",
    }.items():
        assert torch.equal(theirs[block + there], state[ours + here])
    scales = theirs[block + "layer_scale_parameters"]
    assert torch.equal(scales[0], state[ours + "gamma1"])
    assert torch.equal(scales[1], state[ours + "gamma2"])
    for there, here in {
        "dinat.embeddings.patch_embeddings.projection.1.weight": "patch_embed.proj.1.weight",
        "dinat.embeddings.norm.bias": "patch_embed.norm.bias",
        f"{level}downsample.reduction.weight": "levels.0.downsample.reduction.weight",
        f"{level}downsample.norm.weight": "levels.0.downsample.norm.weight",
        "dinat.layernorm.weight": "norm.weight",
        "classifier.weight": "head.weight",
    }.items():
        assert torch.equal(theirs[there], state[here])
    blocks = sum(CONFIGS["dinat"].depths)
    levels = len(CONFIGS["dinat"].depths)
    assert len(theirs) == 18 * blocks + 6 + 3 * (levels - 1) + 4


def test_backbone_norms_follow_the_stages():
    theirs = convert.to_transformers(invented("backbone").state_dict(), "")
    assert {n for n in theirs if n.startswith("hidden_states_norms.")} == {
        f"hidden_states_norms.stage{stage}.{kind}"
        for stage in (1, 2)
        for kind in ("weight", "bias")
    }


@pytest.mark.parametrize("name", CONFIGS)
def test_original_names_are_ours(name):
    state = invented(name).state_dict()
    assert convert.detect_layout(state) == "natcupy"
    same(convert.to_natcupy(state), state)


def test_tensor_counts_of_the_released_files():
    for name, counts in {
        "nat_mini": (253, 325),
        "nat_small": (469, 559),
        "dinat_small": (409, None),
        "dinat_s_tiny": (173, None),
        "nat_isotropic_small": (164, None),
        "vitrpb_small": (176, None),
    }.items():
        with torch.device("meta"):
            state = create_model(name).state_dict()
        assert len(state) == counts[0]
        if counts[1]:
            assert len(convert.to_transformers(state)) == counts[1]


def test_detector_checkpoints():
    inner = invented("backbone").state_dict()
    state = {**convert.to_backbone(inner), "neck.lateral_convs.0.conv.weight": torch.ones(1)}
    state["roi_head.bbox_head.fc_cls.bias"] = torch.ones(3)
    assert convert.detect_layout(state) == "backbone"
    same(convert.to_natcupy(state), inner)
    same(convert.from_backbone(state), inner)
    bare = convert.from_backbone(state, norms="drop")
    assert inner.keys() - bare.keys() == {
        f"norm{i}.{k}" for i in (0, 1) for k in ("weight", "bias")
    }
    with pytest.raises(ValueError, match="keep"):
        convert.from_backbone(state, norms="maybe")


def test_shapes_alone_convert_the_same():
    """Everything works on meta tensors, so shapes are known before memory is spent."""
    for name in HIERARCHICAL:
        theirs = convert.to_transformers(invented(name).state_dict())
        real, flat = convert.to_natcupy(theirs), convert.to_natcupy(meta(theirs))
        assert {k: v.shape for k, v in real.items()} == {k: v.shape for k, v in flat.items()}
        assert all(tensor.is_meta for tensor in flat.values())


def test_unknown_names_stay_to_be_reported():
    state = convert.to_transformers(invented("nat").state_dict())
    state["nat.encoder.levels.0.layers.0.extra.weight"] = torch.ones(1)
    state["nat.pooler.weight"] = torch.ones(1)
    out = convert.from_transformers(state)
    assert {"nat.encoder.levels.0.layers.0.extra.weight", "nat.pooler.weight"} <= out.keys()


def test_incomplete_attention_is_named():
    state = convert.to_transformers(invented("nat").state_dict())
    del state["nat.encoder.levels.0.layers.0.attention.self.key.weight"]
    with pytest.raises(CheckpointError, match=r"levels\.0\.blocks\.0\.attn\.qkv\.weight"):
        convert.from_transformers(state)
    state["nat.encoder.levels.0.layers.0.attention.self.key.weight"] = torch.ones(3, 8)
    with pytest.raises(CheckpointError, match="one shape"):
        convert.from_transformers(state)


@pytest.mark.parametrize("name", ["dinat_s", "isotropic", "vitrpb"])
def test_transformers_has_no_other_family(name):
    with pytest.raises(ValueError, match="family 'nat'"):
        convert.to_transformers(invented(name).state_dict())


def test_no_layout():
    for names in ([], ["conv1.weight", "fc.bias"], ["levels.weight"]):
        with pytest.raises(CheckpointError, match=r"levels\.0\.blocks\.0"):
            convert.detect_layout(names)
    with pytest.raises(ValueError, match="prefix"):
        convert.to_transformers({}, "vit.")


@pytest.mark.parametrize("name", CONFIGS)
def test_numbers_come_back_from_shapes(name):
    config = CONFIGS[name]
    seen = convert.infer_config(meta(invented(name).state_dict()))
    hidden = {"dilations", "drop_path_rate", "layer_scale"}
    hidden |= {"img_size"} if name == "isotropic" else set()
    hidden |= {"num_classes"} if name == "backbone" else set()
    for field, value in config.to_dict().items():
        if field not in hidden:
            assert seen.to_dict()[field] == value, field
    assert (seen.layer_scale is None) == (config.layer_scale is None)
    assert seen.dilations is None


@pytest.mark.parametrize("name", ["nat_mini", "dinat_large_384_11x11", "dinat_s_tiny"])
def test_numbers_of_released_models(name):
    with torch.device("meta"):
        seen = convert.infer_config(create_model(name).state_dict())
    known = model_config(name)
    for field in ("family", "embed_dim", "depths", "num_heads", "kernel_size", "mlp_ratio"):
        assert getattr(seen, field) == getattr(known, field)


def test_missing_or_odd_tensors_decide_nothing():
    good = meta(invented("nat").state_dict())
    for name in (
        "patch_embed.norm.weight",
        "patch_embed.proj.0.weight",
        "levels.0.blocks.0.attn.rpb",
        "levels.0.blocks.0.mlp.fc1.weight",
        "levels.1.blocks.0.attn.rpb",
    ):
        with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
            convert.infer_config({k: v for k, v in good.items() if k != name})
        with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
            convert.infer_config({**good, name: torch.empty(0, device="meta")})
    with pytest.raises(CheckpointError, match="gaps"):
        convert.infer_config({**good, "levels.1.blocks.7.norm1.weight": torch.ones(1)})
    with pytest.raises(CheckpointError, match="family"):
        convert.infer_config({"levels.0.blocks.1.norm1.weight": torch.ones(1)})


# ---------------------------------------------------------------- fitting


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_bias_tables_resize_bicubically(dtype):
    torch.manual_seed(0)
    table = torch.randn(4, 13, 13).to(dtype)
    wide = convert.resize_rpb(table, 11)
    assert wide.shape == (4, 21, 21) and wide.dtype == dtype
    expected = interpolate(table.float().unsqueeze(1), size=(21, 21), mode="bicubic")[:, 0]
    assert torch.equal(wide, expected.to(dtype))
    assert convert.resize_rpb(table, 7) is table
    with pytest.raises(CheckpointError, match="2K-1"):
        convert.resize_rpb(table[0], 11)


def test_a_ramp_by_hand():
    """The same by a plain loop: cubic convolution with a = -0.75, borders repeated."""

    def weight(distance, a=-0.75):
        d = abs(distance)
        if d <= 1:
            return (a + 2) * d**3 - (a + 3) * d**2 + 1
        return a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a if d < 2 else 0.0

    values = [n**2 / 10 for n in range(13)]
    wide = convert.resize_rpb(torch.tensor(values).repeat(1, 13, 1), 11)[0, 10]
    for position in range(21):
        centre = (position + 0.5) * 13 / 21 - 0.5
        near = range(int(centre // 1) - 1, int(centre // 1) + 3)
        expected = sum(weight(centre - n) * values[min(max(n, 0), 12)] for n in near)
        assert wide[position].item() == pytest.approx(expected, abs=1e-4)


def test_inputs_adapt():
    torch.manual_seed(0)
    weight = torch.randn(4, 3, 3, 3)
    grey = torch.rand(1, 1, 8, 8)
    once = torch.nn.functional.conv2d(grey.repeat(1, 3, 1, 1), weight)
    single = torch.nn.functional.conv2d(grey, convert.adapt_input(weight, 1))
    torch.testing.assert_close(once, single)
    six = convert.adapt_input(weight, 6)
    torch.testing.assert_close(torch.nn.functional.conv2d(grey.repeat(1, 6, 1, 1), six), once)
    assert convert.adapt_input(weight, 4).shape == (4, 4, 3, 3)


def test_fit_changes_only_what_is_asked():
    config, state = CONFIGS["dinat"], invented("dinat").state_dict()
    same(convert.fit(state, config, config)[0], state)
    same(convert.fit(state, config, config.replace(drop_path_rate=0.3))[0], state)
    fitted, fresh = convert.fit(state, config, config.replace(num_classes=9))
    assert fresh == {"head.weight", "head.bias"} and state.keys() - fitted.keys() == fresh
    fitted, fresh = convert.fit(state, config, config.replace(num_classes=0))
    assert not fresh and "head.weight" not in fitted
    fitted, fresh = convert.fit(state, config, config.replace(kernel_size=5))
    assert not fresh and fitted["levels.0.blocks.0.attn.rpb"].shape == (2, 9, 9)
    fitted, fresh = convert.fit(state, config, config.replace(out_indices=(0, 2)))
    assert fresh == {f"norm{i}.{k}" for i in (0, 2) for k in ("weight", "bias")}
    assert not {"norm.weight", "head.weight"} & fitted.keys()
    backbone = config.replace(out_indices=(0, 1))
    state = {**fitted, "norm0.weight": torch.ones(8), "norm1.weight": torch.ones(16)}
    fitted, fresh = convert.fit(state, backbone, config)
    assert fresh == {"norm.weight", "norm.bias", "head.weight", "head.bias"}
    assert not {"norm0.weight", "norm1.weight"} & fitted.keys()
