"""natcupy in timm itself: names, tags, features, Hub repositories, transforms, layer decay."""

import json

import pytest
import torch
from ecosystem import library
from small import CONFIGS, invented, same

import natcupy
from natcupy.hub import convert
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
