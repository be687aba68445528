"""natcupy in timm itself: names, tags, features, Hub repositories, transforms, layer decay."""

import json

import pytest
import torch
from ecosystem import library
from small import CONFIGS, invented, same

import natcupy
from natcupy.hub import convert
from natcupy.hub.config import parse_config
from natcupy.zoo import list_models

timm = library("timm")
library("timm.optim")
import natcupy.timm  # noqa: E402  (after the library that it needs)

ALICE = "hf_alice"
OTHERS = [name for name in CONFIGS if name != "backbone"]


def test_every_name_is_registered():
    known = set(timm.list_models())
    assert known >= {*list_models(), "natcupy_nat", "natcupy_isotropic"}
    weights = set(timm.list_pretrained("*nat_*"))
    assert {"nat_tiny.in1k", "dinat_large_384.in22k_ft_in1k"} <= weights
    assert "nat_isotropic_small.in1k" not in weights  # released as .pth only
    assert timm.is_model("nat_tiny.in1k") or timm.is_model("nat_tiny")


@pytest.mark.parametrize("name", ["nat_mini", "dinat_s_tiny", "dinat_isotropic_small"])
def test_models_by_name(name):
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=7, drop_rate=0.0, drop_path_rate=0.1)
        ours = natcupy.create_model(name, num_classes=7, drop_path_rate=0.1)
    assert model.config == ours.config and model.num_classes == 7
    assert model.state_dict().keys() == ours.state_dict().keys()
    assert model.pretrained_cfg["architecture"] == name
    with pytest.raises(ValueError, match="drop_rate"), torch.device("meta"):
        timm.create_model(name, drop_rate=0.5)
    with pytest.raises(TypeError, match="'drop_path'; did you mean 'drop_path_rate'"):
        timm.create_model(name, drop_path=0.1)


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("limit", [10**9, 8000])
def test_a_repository_gives_equal_logits(hub, tmp_path, name, limit):
    model = invented(name)
    size = model.config.img_size or 40
    model.pretrained_cfg["input_size"] = (model.config.in_chans, size, size)
    model.push_to_hub("me/mine", token=ALICE, max_shard_bytes=limit)
    theirs = timm.create_model("hf-hub:me/mine", pretrained=True, cache_dir=tmp_path / "c").eval()
    same(theirs.state_dict(), model.state_dict())
    x = torch.randn(2, model.config.in_chans, size, size)
    assert torch.equal(theirs(x), model(x))
    plain = timm.create_model("hf-hub:me/mine", cache_dir=tmp_path / "c")
    assert plain.config == model.config
    folder = model.save_pretrained(tmp_path / "folder")
    local = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert torch.equal(local(x), model(x))
    fewer = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=2)
    assert fewer(x).shape == (2, 2)


def test_released_weights_by_tag(hub, tmp_path):
    torch.manual_seed(0)
    model = natcupy.create_model("nat_mini")
    path = tmp_path / "pytorch_model.bin"
    torch.save(convert.to_transformers(model.state_dict()), path)
    labels = {str(i): f"n{i}" for i in range(1000)}
    hub.commit("shi-labs/nat-mini-in1k-224", {
        "config.json": json.dumps({"model_type": "nat", "id2label": labels}).encode(),
        path.name: path.read_bytes(),
    })  # fmt: skip
    cache = {"cache_dir": tmp_path / "c"}
    theirs = timm.create_model("nat_mini.in1k", pretrained=True, **cache)
    same(theirs.state_dict(), model.state_dict())
    features = timm.create_model(
        "nat_mini", pretrained=True, features_only=True, out_indices=(1, 3), in_chans=1, **cache
    )
    maps = features(torch.randn(1, 1, 64, 64))
    assert [tuple(m.shape[1:]) for m in maps] == [(128, 8, 8), (512, 2, 2)]
    with pytest.raises(RuntimeError, match="no weights were released"):
        timm.create_model("vitrpb_small", pretrained=True)


@pytest.mark.parametrize("name", ["nat", "isotropic"])
def test_features(name):
    config = CONFIGS[name]
    args = {k: v for k, v in config.to_dict().items() if k != "family" and v is not None}
    net = timm.create_model(f"natcupy_{name}", features_only=True, **args)
    size = config.img_size or 32
    maps = net(torch.randn(1, 3, size, size))
    assert [m.shape[1] for m in maps] == net.feature_info.channels()
    assert [size // m.shape[2] for m in maps] == net.feature_info.reduction()
    assert len(maps) == config.num_stages


def test_transforms_are_the_models_own(hub, tmp_path):
    np = pytest.importorskip("numpy")
    from PIL import Image

    model = invented("nat")
    model.pretrained_cfg |= {"input_size": (3, 48, 48), "crop_pct": 0.9}
    model.push_to_hub("me/mine", token=ALICE)
    theirs = timm.create_model("hf-hub:me/mine", cache_dir=tmp_path / "c")
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(theirs))
    pixels = np.random.default_rng(0).integers(0, 256, (61, 83, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    assert torch.equal(transform(image)[None], model.preprocess(image))


def test_layer_decay_and_weight_decay():
    config = CONFIGS["dinat"]
    args = {k: v for k, v in config.to_dict().items() if k != "family" and v is not None}
    model = timm.create_model("natcupy_nat", **args)
    optimizer = timm.optim.create_optimizer_v2(model, "adamw", lr=1.0, weight_decay=0.1,
                                               layer_decay=0.5)  # fmt: skip
    scales = {group["lr_scale"] for group in optimizer.param_groups}
    assert len(scales) >= len(config.depths) and max(scales) == 1.0
    tables = {p.data_ptr() for n, p in model.named_parameters() if n.endswith(".rpb")}
    for group in optimizer.param_groups:
        held = {p.data_ptr() for p in group["params"]}
        assert not (held & tables) or group["weight_decay"] == 0
    total = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    assert total == sum(p.numel() for p in model.parameters())


def test_what_a_card_shows_runs(hub):
    model = invented("nat")
    model.push_to_hub("me/mine", token=ALICE)
    blocks = hub.tree("me/mine")["README.md"].decode().split("```python\n")[1:]
    code = next(b.split("```")[0] for b in blocks if b.startswith("import natcupy.timm"))
    scope = {}
    exec(code, scope)
    same(scope["model"].state_dict(), model.state_dict())


def test_a_file_is_read_as_the_model_that_is_named(tmp_path):
    """Shapes cannot tell NAT from DiNAT, nor a file's name."""
    with torch.device("meta"):
        names = timm.create_model("nat_mini", num_classes=0).state_dict()
    torch.manual_seed(0)
    state = {name: torch.randn(x.shape) for name, x in names.items()}
    torch.save(state, tmp_path / "dinat_mini_in1k_224.pth")

    def create(name, path):
        overlay = {"file": str(path)}
        return timm.create_model(
            name, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=0
        )

    model = create("nat_mini", tmp_path / "dinat_mini_in1k_224.pth")
    assert model.config.dilations is None
    assert torch.equal(model.state_dict()["levels.0.blocks.0.attn.rpb"],
                       state["levels.0.blocks.0.attn.rpb"])  # fmt: skip
    folder = invented("nat").save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="must hold a nat_mini, it has embed_dim=8 instead of 64"):
        create("nat_mini", folder / "model.safetensors")


SMALL = {"embed_dim": 16, "depths": (1, 1), "num_heads": (1, 1), "kernel_size": 3}


def labelled(place):
    """A saved model of three named classes."""
    model = natcupy.create_model("nat-mini", num_classes=3, **SMALL)
    model.pretrained_cfg["label_names"] = ["cat", "dog", "eel"]
    return model.save_pretrained(place)


def file_of(model, path):
    torch.save(model.state_dict(), path)
    return {"pretrained": True, "pretrained_cfg_overlay": {"file": str(path)}}


@pytest.mark.parametrize(
    ("name", "changes", "size", "fixed"),
    [
        ("nat_mini", {"in_chans": 1, **SMALL}, (1, 224, 224), False),
        ("nat_isotropic_small", {"img_size": 64, "embed_dim": 16, "depths": (1,),
                                 "num_heads": (1,)}, (3, 64, 64), True),
        ("natcupy_isotropic", {"img_size": 32, "embed_dim": 16, "depths": (1,), "num_heads": (1,),
                               "kernel_size": 2}, (3, 32, 32), True),
    ],
)  # fmt: skip
def test_a_changed_model_says_what_it_is_and_is_saved(tmp_path, name, changes, size, fixed):
    model = timm.create_model(name, num_classes=4, **changes)
    facts = model.pretrained_cfg
    assert (facts["input_size"], facts["num_classes"], facts["fixed_input_size"]) == (
        size, 4, fixed,
    )  # fmt: skip
    assert timm.data.resolve_model_data_config(model)["input_size"] == size
    assert model.preprocess(torch.rand(3, 50, 60)).shape == (1, *size)
    again = natcupy.from_pretrained(model.save_pretrained(tmp_path / "saved"))
    assert again.config == model.config and again.pretrained_cfg["input_size"] == size
    features = timm.create_model(name, features_only=True, **changes)
    assert features.pretrained_cfg["input_size"] == size


def test_names_of_classes_stay_only_where_they_fit(tmp_path):
    folder = labelled(tmp_path / "three")
    same_classes = timm.create_model(f"local-dir:{folder}", pretrained=True, in_chans=1)
    assert list(same_classes.pretrained_cfg["label_names"]) == ["cat", "dog", "eel"]
    saved = natcupy.from_pretrained(same_classes.save_pretrained(tmp_path / "grey"))
    assert saved.pretrained_cfg["label_names"] == ["cat", "dog", "eel"]
    assert saved.pretrained_cfg["input_size"] == (1, 224, 224)
    for pretrained in (True, False):
        more = timm.create_model(f"local-dir:{folder}", pretrained=pretrained, num_classes=5)
        again = natcupy.from_pretrained(more.save_pretrained(tmp_path / "five"))
        assert again.num_classes == 5 and "label_names" not in again.pretrained_cfg


# ---------------------------------------------------------------- what timm itself saves


def timms_copy(model, place, **how):
    """The folder that timm writes for a model."""
    timm.models.save_for_hf(model, place, safe_serialization=True, **how)
    return place


@pytest.mark.parametrize("name", OTHERS)
def test_what_timm_saves_is_read(hub, tmp_path, name):
    config = CONFIGS[name]
    args = {k: v for k, v in config.to_dict().items() if k != "family" and v is not None}
    model = timm.create_model(f"natcupy_{config.family}", **args)
    model.load_state_dict(invented(name).state_dict())
    folder = timms_copy(model.eval(), tmp_path / "timms", model_args=args)
    assert "natcupy_version" not in (folder / "config.json").read_text()
    hub.commit("me/timms", {path.name: path.read_bytes() for path in folder.iterdir()})
    cache = {"cache_dir": tmp_path / "c"}
    size = config.img_size or 40
    x = torch.randn(2, config.in_chans, size, size)
    for read in (
        timm.create_model(f"local-dir:{folder}", pretrained=True),
        timm.create_model("hf-hub:me/timms", pretrained=True, **cache),
        natcupy.from_pretrained(folder),
        natcupy.from_pretrained("me/timms", **cache),
    ):
        assert read.config == config
        assert torch.equal(read.eval()(x), model(x))
        assert read.pretrained_cfg["num_classes"] == config.num_classes
        assert read.pretrained_cfg["input_size"][0] == config.in_chans
    again = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=7, in_chans=2)
    assert again.config == config.replace(num_classes=7, in_chans=2)


def test_timm_saves_a_named_model(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("nat_mini", num_classes=3)
    folder = timms_copy(model, tmp_path / "timms", model_config={"label_names": list("abc")})
    for read in (timm.create_model(f"local-dir:{folder}", pretrained=True),
                 natcupy.from_pretrained(folder)):  # fmt: skip
        assert read.config == model.config and read.name == "nat_mini"
        same(read.state_dict(), model.state_dict())
        assert read.pretrained_cfg["label_names"] == ["a", "b", "c"]
    # A layer scale or dilation that is switched off is a number, too.
    off = timm.create_model("nat_small", **SMALL, layer_scale=0.5)
    off = natcupy.zoo.build_model(off.config.replace(layer_scale=None), off.pretrained_cfg)
    first = off.save_pretrained(tmp_path / "off")
    second = timm.create_model(f"local-dir:{first}", pretrained=True)
    assert timm.create_model(f"local-dir:{first}").config == off.config
    third = natcupy.from_pretrained(timms_copy(second, tmp_path / "again"))
    same(third.state_dict(), off.state_dict())


def timms_config(**changes):
    """A config.json as timm writes it, parsed by natcupy."""
    args = {"embed_dim": 8, "depths": [2], "num_heads": [2], "kernel_size": 3, "img_size": [32, 32]}
    values = {
        "architecture": "natcupy_isotropic", "num_classes": 3, "num_features": 8,
        "global_pool": "avg", "model_args": {**args, "in_chans": 1, "global_pool": "avg"},
        "pretrained_cfg": {"tag": "x", "custom_load": False, "input_size": [3, 224, 224],
                           "fixed_input_size": False, "num_classes": 1000, "pool_size": None,
                           "first_conv": None, "classifier": "head"},
    }  # fmt: skip
    return parse_config(json.dumps({**values, **changes}).encode())


def test_timms_config_describes_the_saved_model():
    config, facts = timms_config()
    assert (config.img_size, config.in_chans, config.num_classes) == (32, 1, 3)
    # What timm kept of the weights that training began with gives way.
    assert (facts["input_size"], facts["num_classes"], facts["fixed_input_size"]) == (
        (1, 32, 32), 3, True,
    )  # fmt: skip
    _, named = timms_config(label_names={"0": "a", "1": "b", "2": "c"})
    assert named["label_names"] == ["a", "b", "c"]
    assert "label_names" not in timms_config(label_names={"0": "a", "7": "b"})[1]
    # Without model_args the size and channels are those of the pictures.
    stated = {"input_size": [2, 64, 64], "fixed_input_size": True}
    config, _ = timms_config(architecture="nat_isotropic_small", model_args={},
                             pretrained_cfg=stated)  # fmt: skip
    assert (config.img_size, config.in_chans, config.num_classes) == (64, 2, 3)
    wide = {"input_size": [3, 96, 64]}  # any size goes into the others
    config, facts = timms_config(architecture="nat_mini", model_args={}, pretrained_cfg=wide)
    assert config == natcupy.zoo.model_config("nat_mini", num_classes=3)
    assert facts["input_size"] == (3, 96, 64)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"auto_map": {}}, "auto_map"),
        ({"model_args": {"family": "nat"}}, "family"),
        ({"model_args": {"drop_rate": 0.5}}, "drop_rate"),
        ({"model_args": [1]}, "model_args must be an object"),
        ({"model_args": {"embed_dim": 8}}, "depths"),
        ({"pretrained_cfg": {"url": "http://x"}}, "url"),
        ({"pretrained_cfg": {"input_size": [3, "a", 4]}}, "input_size"),
        ({"pretrained_cfg": {"input_size": 3}}, "input_size"),
        ({"label_names": ["a"]}, "label_names must be a list of 3"),
        ({"architecture": "resnet50"}, "architecture 'resnet50'"),
        ({"architecture": ["nat_mini"]}, "architecture"),
        ({"model_args": {"embed_dim": 8, "depths": [2], "num_heads": [2], "img_size": [32, 48]}},
         "square"),
        ({"model_args": {"embed_dim": 8192, "depths": [256], "num_heads": [2]}}, "at most"),
    ],
)  # fmt: skip
def test_timms_config_holds_a_model_and_nothing_more(changes, word):
    with pytest.raises(natcupy.zoo.ConfigError, match=word):
        timms_config(**changes)


# ---------------------------------------------------------------- files of stated numbers


@pytest.mark.parametrize("name", ["natcupy_nat", "nat_mini"])
def test_a_bare_file_is_of_the_numbers_that_are_given(tmp_path, caplog, name):
    model = timm.create_model(name, num_classes=5, **SMALL).eval()
    overlay = file_of(model, tmp_path / "mine.pth")
    read = timm.create_model(name, num_classes=5, **SMALL, **overlay)
    same(read.state_dict(), model.state_dict())
    assert read.training and read.config == model.config
    assert read.source.path == str(tmp_path / "mine.pth") and len(read.source.sha256) == 64
    assert "afresh" not in caplog.text
    other = timm.create_model(
        name, num_classes=2, in_chans=1, **{**SMALL, "kernel_size": 5}, **overlay
    )
    assert other(torch.randn(1, 1, 40, 40)).shape == (1, 2)
    assert "mine.pth, initialised afresh: head.bias, head.weight" in caplog.text
    want = convert.resize_rpb(model.state_dict()["levels.0.blocks.0.attn.rpb"], 5)
    assert torch.equal(other.state_dict()["levels.0.blocks.0.attn.rpb"], want)
    with pytest.raises(natcupy.hub.CheckpointError, match=r"depths \[1, 1\] instead of \[1, 2\]"):
        timm.create_model(name, **{**SMALL, "depths": (1, 2)}, **overlay)
    with pytest.raises(natcupy.hub.CheckpointError, match=r"mlp.fc1.weight is \(48, 16\)"):
        timm.create_model(name, **SMALL, mlp_ratio=2.0, **overlay)
