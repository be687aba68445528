"""ModelConfig: a closed record with bounds, out of JSON and back."""

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from natcupy.zoo import MODELS, ConfigError, ModelConfig, model_config, num_parameters
from natcupy.zoo.config import pick_stages

GOOD = {
    "family": "nat",
    "embed_dim": 64,
    "depths": [3, 4, 6, 5],
    "num_heads": [2, 4, 8, 16],
    "dilations": [[1, 8, 1], [1] * 4, [1] * 6, [1] * 5],
}
FLAT = {"family": "vitrpb", "embed_dim": 64, "depths": [2], "num_heads": [2], "kernel_size": None}


@pytest.mark.parametrize("name", MODELS)
def test_round_trip_through_json(name):
    for overrides in ({}, {"features_only": True}):
        config = model_config(name, **overrides)
        again = ModelConfig.from_dict(json.loads(json.dumps(config.to_dict())))
        assert again == config
        assert hash(again) == hash(config)


BAD = [  # (field to change, value, words of the message)
    ("family", "resnet", "family must be one of 'nat'"),
    ("family", ["nat"], "family must be one of"),
    ("embed_dim", 0, "embed_dim must be an int in 1..8192, got 0"),
    ("embed_dim", 64.0, "embed_dim must be an int"),
    ("embed_dim", True, "embed_dim must be an int"),
    ("embed_dim", 10**400, "embed_dim must be an int"),
    ("embed_dim", 63, "embed_dim must be even"),
    ("depths", [], "depths must be a list of 1 to 6"),
    ("depths", 5, "depths must be a list"),
    ("depths", [1] * 7, "depths must be a list of 1 to 6"),
    ("depths", [1, 1, 1, 10**6], r"depths\[3\] must be an int in 1..256"),
    ("depths", [[1]] * 4, r"depths\[0\] must be an int"),
    ("num_heads", [2, 4, 8], "num_heads must have one entry per level, got 3 for 4"),
    ("num_heads", [2, 4, 8, 7], "num_heads must divide the channels"),
    ("kernel_size", 0, "kernel_size must be an int in 1..255"),
    ("kernel_size", None, "kernel_size must be an int"),
    ("kernel_size", "7", "kernel_size must be an int"),
    ("dilations", [[1, 8, 1]], "dilations must have one list per level, got 1"),
    ("dilations", [[1, 8], [1] * 4, [1] * 6, [1] * 5], r"dilations\[0\] must have one entry per"),
    ("dilations", [[1, 0, 1], [1] * 4, [1] * 6, [1] * 5], r"dilations\[0\]\[1\] must be an int"),
    ("dilations", {"a": 1}, "dilations must be a list"),
    ("mlp_ratio", math.nan, "mlp_ratio must be a number"),
    ("mlp_ratio", math.inf, "mlp_ratio must be a number"),
    ("mlp_ratio", 0, "mlp_ratio must be a number"),
    ("mlp_ratio", "3", "mlp_ratio must be a number"),
    ("mlp_ratio", 10**400, "mlp_ratio must be a number"),
    ("mlp_ratio", [10**9999], "mlp_ratio must be a number"),
    ("layer_scale", 0.0, "layer_scale must be a number"),
    ("layer_scale", True, "layer_scale must be a number"),
    ("drop_path_rate", 1.0, "drop_path_rate must be a number in 0..0.999"),
    ("drop_path_rate", -0.1, "drop_path_rate must be a number"),
    ("num_classes", -1, "num_classes must be an int in 0"),
    ("num_classes", 10**9, "num_classes must be an int in 0"),
    ("in_chans", 0, "in_chans must be an int"),
    ("img_size", 224, "img_size must be None for family 'nat'"),
    ("out_indices", [4], r"out_indices\[0\] must be an int in -4..3"),
    ("out_indices", [1, 1], "out_indices must ascend"),
    ("out_indices", [], "out_indices must be a list"),
    ("out_indices", 5, "out_indices must be an int in 1..4"),
    ("auto_map", "evil.py", "no field 'auto_map'"),
    ("kernel_sise", 7, "did you mean 'kernel_size'"),
]


@pytest.mark.parametrize(
    ("field", "value", "words"), BAD, ids=[f"{n}-{b[0]}" for n, b in enumerate(BAD)]
)
def test_bad_values_name_the_field(field, value, words):
    with pytest.raises(ConfigError, match=words) as caught:
        ModelConfig.from_dict({**GOOD, field: value})
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"img_size": None}, "img_size must be an int"),
        ({"img_size": 225}, "img_size must be a multiple of 16, got 225"),
        ({"img_size": 1 << 14}, "img_size must be an int in 16..1024"),
        ({"img_size": 224, "kernel_size": 7}, "kernel_size must be None for family 'vitrpb'"),
        ({"img_size": 224, "dilations": [[1, 1]]}, "dilations must be None"),
        ({"img_size": 224, "depths": [1, 1], "num_heads": [2, 2]}, "exactly one level"),
    ],
)
def test_bad_values_of_single_level_families(changes, words):
    with pytest.raises(ConfigError, match=words):
        ModelConfig.from_dict({**FLAT, **changes})


def test_missing_fields_and_wrong_kinds():
    with pytest.raises(ConfigError, match="embed_dim, num_heads; they are missing"):
        ModelConfig.from_dict({"family": "nat", "depths": [1]})
    for value in (None, [], "nat", 3):
        with pytest.raises(ConfigError, match="must be an object"):
            ModelConfig.from_dict(value)
    with pytest.raises(ConfigError, match="no field 3"):
        ModelConfig.from_dict({**GOOD, 3: 4})


def test_too_many_parameters():
    big = {**GOOD, "embed_dim": 8192}
    with pytest.raises(ConfigError, match="at most 1,000,000,000 parameters"):
        ModelConfig.from_dict(big)
    assert num_parameters(ModelConfig.from_dict(big, max_parameters=10**13)) > 10**11


def test_replace_is_checked():
    config = ModelConfig.from_dict(GOOD)
    assert config.replace(num_classes=5).num_classes == 5
    with pytest.raises(ConfigError, match="num_classes"):
        config.replace(num_classes=1.5)
    with pytest.raises(ConfigError, match="no field 'n'"):
        config.replace(n=1)


def test_pick_stages():
    assert pick_stages(None, 4) == (0, 1, 2, 3)
    assert pick_stages(2, 4) == (2, 3)
    assert pick_stages([0, -1], 4) == (0, 3)
    with pytest.raises(ConfigError, match="ascend"):
        pick_stages((3, 0), 4)
    with pytest.raises(ConfigError, match=r"1\.\.4, got 0"):
        pick_stages(0, 4)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=8) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.sampled_from([*GOOD, "mlp_ratio", "img_size", "layer_scale"]), JSON))
def test_any_json_is_a_config_or_a_config_error(changes):
    try:
        config = ModelConfig.from_dict({**GOOD, **changes})
    except ConfigError:
        return
    assert ModelConfig.from_dict(config.to_dict()) == config
