"""config.json: what is written reads back; foreign files read; anything else is one error."""

import json
import math
import sys

import pytest
from damage import mutated_configs, own_config
from small import CONFIGS

from natcupy.hub.config import config_text, model_type, parse_config
from natcupy.hub.preprocessor import parse_preprocessor
from natcupy.hub.schema import MAX_CONFIG_BYTES
from natcupy.zoo import ConfigError, ModelConfig, model_config

THEIRS = {
    "architectures": ["NatForImageClassification"],
    "attention_probs_dropout_prob": 0.0,
    "depths": [3, 4, 18, 5],
    "drop_path_rate": 0.3,
    "embed_dim": 96,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.0,
    "hidden_size": 512,  # wrong in the released files, on purpose here
    "id2label": {"0": "tench, Tinca tinca", "1": "goldfish", "2": "great white shark"},
    "initializer_range": 0.02,
    "kernel_size": 7,
    "label2id": {"tench, Tinca tinca": 0, "goldfish": 1, "great white shark": 2},
    "layer_norm_eps": 1e-05,
    "layer_scale_init_value": 1e-05,
    "mlp_ratio": 2.0,
    "model_type": "nat",
    "num_channels": 3,
    "num_heads": [3, 6, 12, 24],
    "num_layers": 4,
    "patch_size": 4,
    "path_norm": True,
    "qkv_bias": True,
    "torch_dtype": "float32",
    "transformers_version": "4.22.0.dev0",
}


def read(values, **how):
    return parse_config(json.dumps(values).encode(), "config.json", **how)


def refused(values, word):
    with pytest.raises(ConfigError, match=word) as caught:
        read(values)
    assert str(caught.value).startswith("config.json")


def own(name="nat", **changes):
    return {**own_config(name), **changes}


@pytest.mark.parametrize("name", CONFIGS)
def test_round_trip(name):
    config = CONFIGS[name]
    side = config.img_size or 64
    cfg = {
        "architecture": "mine.v2", "tag": "", "license": "apache-2.0", "crop_pct": 0.9,
        "num_classes": config.num_classes, "input_size": (config.in_chans, side, side),
        "interpolation": "bilinear", "crop_mode": "squash", "mean": (0.25,) * config.in_chans,
        "std": (0.5,) * config.in_chans, "fixed_input_size": False,
        "label_names": [f"chat {i} — ü" for i in range(config.num_classes)],
    }  # fmt: skip
    text = config_text(config, {**cfg, "hf_hub_id": "a/b", "url": "http://x"}, "0.1.0")
    again, facts = parse_config(text.encode())
    assert again == config and facts == cfg
    assert config_text(again, facts, "0.1.0") == text
    assert "http" not in text and "a/b" not in text


def test_one_file_for_three_libraries():
    values = own("dinat", **{})
    assert values["model_type"] == "dinat"
    assert values["architectures"] == ["DinatForImageClassification"]
    assert values["num_labels"] == 4 and "id2label" not in values  # nothing is made up
    named = json.loads(config_text(CONFIGS["dinat"], {"label_names": list("abcd")}, "0.1.0"))
    assert named["id2label"] == {"0": "a", "1": "b", "2": "c", "3": "d"}
    assert named["label2id"]["d"] == 3 and named["label_names"] == ["a", "b", "c", "d"]
    assert values["layer_scale_init_value"] == 0.5 and values["num_channels"] == 1
    assert values["num_classes"] == 4 and values["num_features"] == 32
    assert values["architecture"] and values["global_pool"] == "avg" and values["pretrained_cfg"]
    assert values["depths"] == [2, 2, 1] and values["dilations"] == [[1, 2], [1, 3], [1]]
    assert model_type(CONFIGS["nat"]) == "nat" and model_type(CONFIGS["vitrpb"]) == "vitrpb"
    backbone = own("backbone")
    assert backbone["out_features"] == ["stage1", "stage2"]
    assert backbone["architectures"] == ["NatBackbone"]


def test_a_released_file():
    config, cfg = read(THEIRS)
    assert config == model_config("nat_small", num_classes=3)
    assert cfg == {"label_names": ["tench, Tinca tinca", "goldfish", "great white shark"]}


def test_keys_that_their_files_leave_out():
    bare = {"model_type": "nat", "architectures": ["NatForImageClassification"]}
    config, cfg = read(bare)
    assert config == model_config("nat_mini", num_classes=2, drop_path_rate=0.1) and cfg == {}
    dilated, _ = read({"model_type": "dinat"})
    assert dilated.dilations == model_config("dinat_mini").dilations
    headless, _ = read({**bare, "architectures": ["NatModel"]})
    assert headless.num_classes == 0
    for stages in ({"out_features": ["stage1", "stage4"]}, {"out_indices": [1, 4]}):
        backbone, _ = read({**bare, "architectures": ["NatBackbone"], **stages})
        assert backbone.out_indices == (0, 3)
    last, _ = read({**bare, "architectures": ["NatBackbone"]})
    assert last.out_indices == (3,)
    tuned, cfg = read({**THEIRS, "out_features": ["stage4"], "stage_names": ["stem"]})
    assert tuned.out_indices is None
    plain, cfg = read({**bare, "id2label": {"0": "LABEL_0", "1": "LABEL_1"}})
    assert plain.num_classes == 2 and "label_names" not in cfg


CODE = {
    "auto_map": {"AutoModel": "modeling.Evil"},
    "custom_pipelines": {},
    "trust_remote_code": True,
    "_attn_implementation": "someone/kernel",
    "attn_implementation": "someone/kernel",
    "kernel_config": {},
    "hf_hub_id": "someone/else",
    "url": "http://somewhere",
    "quantization_config": {},
    "weights": "../../x",
}


@pytest.mark.parametrize("key", CODE)
def test_no_key_names_code_or_places(key):
    before = set(sys.modules)
    refused({**THEIRS, key: CODE[key]}, key)
    refused(own(**{key: CODE[key]}), key)
    refused(own(pretrained_cfg={key: CODE[key]}), key)
    assert set(sys.modules) == before


BAD = {
    "kernel_size": [0, -1, 2.5, "7", True, None, [7], 10**9, {}],
    "embed_dim": [0, -8, 10**12, "64", None, True, 63],
    "depths": [[], [0], [1] * 7, "3", [[1]], [10**9], None, [1.5]],
    "num_heads": [[3], [0, 1], ["1", "2"], [10**6, 1]],
    "mlp_ratio": [0, -1, "2", None, 1e9, True],
    "drop_path_rate": [-0.1, 1.5, "0", None],
    "num_classes": [-1, 10**10, "5", None, 2.0],
    "in_chans": [0, "3", 10**7],
    "dilations": [[[1]], [[1], [0, 1]], "1", [[1], [1, 10**9]], 3],
    "layer_scale": [-1, "a", True],
    "family": ["resnet", None, 3, ["nat"]],
    "label_names": [["a"], "abcde", [1, 2, 3, 4, 5], ["a\nb", "c", "d", "e", "f"]],
    "pretrained_cfg": [[], "x", {"crop_pct": 0}, {"crop_pct": "1"}, {"interpolation": "magic"},
                       {"mean": [1e9] * 3}, {"std": [0, 1, 1]}, {"input_size": [3, 0, 1]},
                       {"input_size": [4, 9, 9]}, {"license": "a b"}, {"num_classes": 6},
                       {"architecture": "../x"}, {"crop_mode": 3}, {"fixed_input_size": 1}],
    "architecture": ["a/b", "", 3, "x" * 200],
    "id2label": [{"0": "a"}, [], "x"],
    "num_channels": [1],
    "layer_scale_init_value": [0.3],
    "feature_indices": [[5], "0", [1, 0], [True]],
}  # fmt: skip


@pytest.mark.parametrize("key", BAD)
def test_bad_values_name_their_key(key):
    for value in BAD[key]:
        with pytest.raises(ConfigError) as caught:
            read(own(**{key: value}))
        assert any(w in str(caught.value) for w in key.split("_")), (key, value, caught.value)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"patch_size": 16}, "patch_size"),
        ({"hidden_act": "relu"}, "hidden_act"),
        ({"qkv_bias": False}, "qkv_bias"),
        ({"layer_norm_eps": 1e-6}, "layer_norm_eps"),
        ({"id2label": {"1": "a"}}, "id2label"),
        ({"id2label": {"0": "a\x07"}}, "id2label"),
        ({"architectures": ["BertModel"]}, "architectures"),
        ({"architectures": [{"a": 1}]}, "architectures"),
        ({"model_type": "vit"}, "model_type"),
        ({"model_type": ["nat"]}, "model_type"),
        ({"layer_scale_init_value": "x"}, "layer_scale"),
        ({"unheard_of": 1}, "unheard_of"),
    ],
)
def test_bad_foreign_values(change, word):
    refused({**THEIRS, **change}, word)


def test_size_depth_numbers_and_duplicates():
    deep = b"[" * 100_000 + b"]" * 100_000
    for data, word in (
        (b" " * (MAX_CONFIG_BYTES + 1), "bytes"),
        (b'{"a":' * 500_00 + b"1" + b"}" * 500_00, "JSON"),
        (deep, "JSON"),
        (b'{"natcupy_version": NaN}', "NaN"),
        (b'{"embed_dim": Infinity}', "Infinity"),
        (b'{"depths": ' + b"9" * 10_000 + b"}", "JSON"),
        (b'{"a": 1, "a": 2}', "twice"),
        (b"[]", "object"),
        (b"\xff\xfe", "JSON"),
        (b"", "JSON"),
    ):
        with pytest.raises(ConfigError, match=word):
            parse_config(data)
    refused(own(pretrained_cfg={"mean": [[[[[[[[1]]]]]]]]}), "deep")


def test_parameters_are_counted_before_anything_is_built():
    huge = own(embed_dim=8192, depths=[256] * 2, num_heads=[1, 1])
    refused(huge, "parameters")
    values = own()
    with pytest.raises(ConfigError, match="parameters"):
        read(values, max_parameters=100)
    assert isinstance(read(values, max_parameters=10**6)[0], ModelConfig)


def test_mutations_raise_one_class():
    originals = (THEIRS, own("dinat"), own("vitrpb"))
    assert mutated_configs(2000, 20261124, originals) > 1500


def test_their_preprocessors():
    squash = {"do_normalize": True, "do_resize": True, "image_mean": [0.485, 0.456, 0.406],
              "image_std": [0.229, 0.224, 0.225], "resample": 3, "size": 224,
              "feature_extractor_type": "ViTFeatureExtractor"}  # fmt: skip
    cfg = parse_preprocessor(json.dumps(squash).encode(), "p")
    assert cfg == {
        "crop_mode": "squash", "input_size": (3, 224, 224), "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225),
    }  # fmt: skip
    crops = {"size": {"shortest_edge": 256}, "do_center_crop": True, "resample": 2,
             "crop_size": {"height": 224, "width": 224}}  # fmt: skip
    cfg = parse_preprocessor(json.dumps(crops).encode(), "p")
    assert cfg == {"crop_mode": "center", "crop_pct": 0.875, "input_size": (3, 224, 224),
                   "interpolation": "bilinear"}  # fmt: skip
    for bad in ({"size": "big"}, {"size": {}}, {"resample": 9}, {"image_std": [0, 0, 0]},
                {"size": 10**9}, {"image_mean": "x"}):  # fmt: skip
        with pytest.raises(ConfigError, match=r"^p"):
            parse_preprocessor(json.dumps(bad).encode(), "p")


@pytest.mark.parametrize("crop, resized", [(9, 14), (224, 256), (49, 50), (224, 200), (3, 7)])
def test_their_crops_are_cut_from_pictures_of_their_size(crop, resized):
    file = {"size": {"shortest_edge": resized}, "do_center_crop": True, "crop_size": crop}
    cfg = parse_preprocessor(json.dumps(file).encode(), "p")
    assert math.floor(crop / cfg["crop_pct"]) == max(crop, resized)


def test_their_pictures_need_not_be_square():
    file = {"size": {"height": 192, "width": 640}}
    assert parse_preprocessor(json.dumps(file).encode(), "p")["input_size"] == (3, 192, 640)
    file = {"size": {"shortest_edge": 200}, "do_center_crop": True,
            "crop_size": {"height": 150, "width": 100}}  # fmt: skip
    cfg = parse_preprocessor(json.dumps(file).encode(), "p")
    assert cfg["input_size"] == (3, 150, 100) and math.floor(100 / cfg["crop_pct"]) == 200


@pytest.mark.parametrize(
    "told, wanted",
    [
        ({}, lambda x: (x - 0.4) / 0.2),
        ({"do_normalize": False}, lambda x: x),
        ({"do_rescale": False}, lambda x: (255 * x - 0.4) / 0.2),
        ({"rescale_factor": 1 / 127.5}, lambda x: (2 * x - 0.4) / 0.2),
        ({"do_rescale": False, "do_normalize": False}, lambda x: 255 * x),
        ({"rescale_factor": 1 / 255}, lambda x: (x - 0.4) / 0.2),
    ],
)
def test_their_switches_count(told, wanted):
    file = {"size": 8, "image_mean": [0.4] * 3, "image_std": [0.2] * 3, **told}
    cfg = parse_preprocessor(json.dumps(file).encode(), "p")
    x = 0.7
    for mean, std in zip(cfg["mean"], cfg["std"], strict=True):
        assert (x - mean) / std == pytest.approx(wanted(x))
