"""natcupy in transformers itself: Auto classes, pipeline, pictures, training, and the way back."""

import copy
import importlib.metadata
import json
import sys
import types

import pytest
import torch
from ecosystem import library
from small import CONFIGS, invented, same

import natcupy
from natcupy.hub import Corrupt, convert
from natcupy.hub.tensors import read_tensors, write_tensors

transformers = library("transformers")
import natcupy.transformers as ours  # noqa: E402  (after the library that it needs)

ALICE = "hf_alice"
CLASSIFIERS = [name for name in CONFIGS if name != "backbone"]
AutoModel, AutoBackbone = transformers.AutoModel, transformers.AutoBackbone
AutoClassifier = transformers.AutoModelForImageClassification


@pytest.fixture(autouse=True)
def no_remote_code(monkeypatch):
    """Nothing asks for code from a repository."""
    from transformers import dynamic_module_utils

    def refused(*_, **__):
        pytest.fail("transformers asked for remote code")

    monkeypatch.setattr(dynamic_module_utils, "get_cached_module_file", refused)


def picture(config, count=2):
    size = config.img_size or 40
    return torch.randn(count, config.in_chans, size, size,
                       generator=torch.Generator().manual_seed(0))  # fmt: skip


def pushed(name, limit=10**9, **cfg):
    model = invented(name)
    size = model.config.img_size or 40
    model.pretrained_cfg |= {"input_size": (model.config.in_chans, size, size), **cfg}
    model.push_to_hub("me/mine", token=ALICE, max_shard_bytes=limit)
    return model


# ---------------------------------------------------------------- one repository, three libraries


@pytest.mark.parametrize("name", CLASSIFIERS)
@pytest.mark.parametrize("limit", [10**9, 8000])
def test_a_repository_gives_equal_logits(hub, tmp_path, name, limit):
    model = pushed(name, limit)
    cache = {"cache_dir": tmp_path / "c"}
    theirs = AutoClassifier.from_pretrained("me/mine", **cache).eval()
    same(theirs.state_dict(), model.state_dict())
    x = picture(model.config)
    with torch.no_grad():
        assert torch.equal(theirs(x).logits, model(x))
        bare = AutoModel.from_pretrained("me/mine", **cache).eval()
        assert torch.equal(bare(x).last_hidden_state, model.forward_features(x))
        pooled = model.forward_head(model.forward_features(x), pre_logits=True)
        assert torch.equal(bare(x).pooler_output, pooled)
    assert theirs.config.num_labels == model.num_classes


def test_config_and_weights_are_of_one_commit(hub, tmp_path):
    """Somebody pushes other weights while the config is on its way."""
    model = pushed("nat")
    files = hub.tree("me/mine")
    other = invented("nat", seed=9).save_pretrained(tmp_path / "other")
    moved = {**files, "model.safetensors": (other / "model.safetensors").read_bytes()}
    for load in (AutoClassifier.from_pretrained, ours.NatForImageClassification.from_pretrained):
        hub.commit("me/mine", files)
        hub.fault(r"/config\.json", times=1, call=lambda: hub.commit("me/mine", moved))
        theirs = load("me/mine", cache_dir=tmp_path / load.__qualname__)
        same(theirs.state_dict(), model.state_dict())
        assert theirs.name_or_path == theirs.config.name_or_path == "me/mine"


@pytest.mark.parametrize("name", ["nat", "isotropic"])
def test_a_push_of_theirs_serves_all_three(hub, tmp_path, name):
    model = pushed(name)
    theirs = AutoClassifier.from_pretrained("me/mine", cache_dir=tmp_path / "c").eval()
    theirs.push_to_hub("me/theirs", token=ALICE)
    back = natcupy.from_pretrained("me/theirs", cache_dir=tmp_path / "d")
    same(back.state_dict(), model.state_dict())
    assert back.config == model.config
    again = AutoClassifier.from_pretrained("me/theirs", cache_dir=tmp_path / "d").eval()
    timm = library("timm")
    importlib.import_module("natcupy.timm")
    third = timm.create_model("hf-hub:me/theirs", pretrained=True, cache_dir=tmp_path / "d").eval()
    x = picture(model.config)
    with torch.no_grad():
        assert torch.equal(again(x).logits, model(x)) and torch.equal(third(x), model(x))


def test_names_of_natcupy_are_known_to_the_classes():
    """From natcupy's own table, without any request."""
    theirs = ours.DinatForImageClassification.from_pretrained("nat-digits", dtype=torch.float32)
    same(theirs.state_dict(), natcupy.from_pretrained("nat-digits").state_dict())


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_there_and_back(hub, tmp_path, name):
    """What transformers saves, natcupy and transformers load, after a changed head too."""
    model = pushed(name, label_names=[f"thing {i}" for i in range(CONFIGS[name].num_classes)])
    cache = {"cache_dir": tmp_path / "c"}
    theirs = AutoClassifier.from_pretrained("me/mine", **cache).eval()
    assert theirs.config.id2label[1] == "thing 1"
    theirs.save_pretrained(tmp_path / "saved")
    back = natcupy.from_pretrained(tmp_path / "saved")
    same(back.state_dict(), model.state_dict())
    assert back.config == model.config
    assert back.pretrained_cfg["label_names"] == model.pretrained_cfg["label_names"]
    assert back.pretrained_cfg["input_size"] == model.pretrained_cfg["input_size"]
    other = AutoClassifier.from_pretrained(
        "me/mine", num_labels=7, ignore_mismatched_sizes=True, **cache
    )
    other.save_pretrained(tmp_path / "other")
    back = natcupy.from_pretrained(tmp_path / "other").eval()
    x = picture(model.config)
    with torch.no_grad():
        assert torch.equal(back(x), other.eval()(x).logits) and back(x).shape == (2, 7)
    again = AutoClassifier.from_pretrained(tmp_path / "other").eval()
    same(again.state_dict(), other.state_dict())


def test_a_backbone(hub, tmp_path):
    model = pushed("backbone")
    cache = {"cache_dir": tmp_path / "c"}
    theirs = AutoBackbone.from_pretrained("me/mine", **cache).eval()
    x = torch.randn(2, 3, 32, 48)
    with torch.no_grad():
        got, want = theirs(x).feature_maps, model(x)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert theirs.channels == [8, 16] and theirs.out_features == ["stage1", "stage2"]
    theirs.save_pretrained(tmp_path / "saved")
    back = natcupy.from_pretrained(tmp_path / "saved")
    same(back.state_dict(), model.state_dict())
    assert back.config == model.config


@pytest.mark.parametrize("name", ["dinat", "isotropic"])
def test_a_backbone_out_of_a_classifier(hub, tmp_path, name):
    model = pushed(name)
    net = AutoBackbone.from_pretrained(
        "me/mine", out_features=["stage2"], cache_dir=tmp_path / "c"
    ).eval()
    x = picture(model.config)
    with torch.no_grad():
        raw = model.forward_intermediates(x, [1], intermediates_only=True)[0]
        want = torch.nn.functional.layer_norm(raw.movedim(1, -1), raw.shape[1:2]).movedim(-1, 1)
        got = net(x, output_hidden_states=True)
    torch.testing.assert_close(got.feature_maps[0], want)
    assert torch.equal(got.hidden_states[2], raw)  # the stem's is the first
    with pytest.raises(ValueError, match="stem"):
        AutoBackbone.from_pretrained("me/mine", out_features=["stem"], cache_dir=tmp_path / "c")


# ---------------------------------------------------------------- the released layout


def released(tmp_path, name, prefix=None):
    """Files as the released repositories hold them."""
    model = invented(name)
    config = model.config
    word = "dinat" if config.dilations else "nat"
    values = {
        "model_type": word, "architectures": [f"{word.title()}ForImageClassification"],
        "layer_scale_init_value": config.layer_scale or 0.0, "num_channels": config.in_chans,
        "id2label": {str(i): f"thing {i}" for i in range(model.num_classes)},
        "label2id": {f"thing {i}": i for i in range(model.num_classes)},
        **{k: v for k, v in config.to_dict().items() if k in (
            "embed_dim", "depths", "num_heads", "kernel_size", "mlp_ratio", "drop_path_rate")},
    }  # fmt: skip
    if config.dilations:
        values["dilations"] = config.dilations
    path = tmp_path / "pytorch_model.bin"
    torch.save(convert.to_transformers(model.state_dict(), f"{word}."), path)
    recipe = {"size": 40, "resample": 3, "image_processor_type": "ViTImageProcessor",
              "do_resize": True, "do_normalize": True}  # fmt: skip
    return model, {
        "config.json": json.dumps(values).encode(), path.name: path.read_bytes(),
        "preprocessor_config.json": json.dumps(recipe).encode(),
    }  # fmt: skip


@pytest.mark.parametrize("name", ["nat", "dinat"])
def test_released_repositories_run_again(hub, tmp_path, name):
    model, files = released(tmp_path, name)
    hub.commit("lab/tuned", files)
    cache = {"cache_dir": tmp_path / "c"}
    theirs = AutoClassifier.from_pretrained("lab/tuned", **cache).eval()
    x = picture(model.config)
    with torch.no_grad():
        assert torch.equal(theirs(x).logits, model(x))
    assert theirs.config.id2label[1] == "thing 1"
    assert transformers.AutoConfig.from_pretrained("lab/tuned", **cache).model_type in (
        "nat", "dinat")  # fmt: skip
    if model.config.in_chans == 3:
        from PIL import Image

        pipe = transformers.pipeline("image-classification", model="lab/tuned", model_kwargs=cache)
        answers = pipe(Image.new("RGB", (50, 70), (200, 30, 90)), top_k=9)
        assert {answer["label"] for answer in answers} == set(theirs.config.id2label.values())
    theirs.save_pretrained(tmp_path / "out")
    same(natcupy.from_pretrained(tmp_path / "out").state_dict(), model.state_dict())
    net = AutoBackbone.from_pretrained("lab/tuned", out_features=["stage1"], **cache).eval()
    with torch.no_grad():
        assert net(x).feature_maps[0].shape[1] == model.config.embed_dim


def test_their_own_config_class_is_served(hub, tmp_path):
    """Code that builds transformers' DinatConfig gets a model that runs."""
    model = invented("dinat")
    config = transformers.DinatConfig(
        embed_dim=8, depths=[2, 2, 1], num_heads=[2, 2, 4], kernel_size=3, mlp_ratio=2.0,
        dilations=[[1, 2], [1, 3], [1]], layer_scale_init_value=0.5, num_channels=1, num_labels=4,
    )  # fmt: skip
    theirs = AutoClassifier.from_config(config).eval()
    theirs.load_state_dict(model.state_dict())
    x = picture(model.config)
    with torch.no_grad():
        assert torch.equal(theirs(x).logits, model(x))
    config.set_output_features_output_indices(out_features=["stage1", "stage3"], out_indices=None)
    assert [m.shape[1] for m in AutoBackbone.from_config(config)(x).feature_maps] == [8, 32]


# ---------------------------------------------------------------- pictures


@pytest.mark.parametrize("mode", ["center", "squash"])
def test_pictures_are_prepared_alike(hub, tmp_path, mode):
    np = pytest.importorskip("numpy")
    from PIL import Image

    model = pushed("nat", crop_mode=mode, crop_pct=0.9, interpolation="bilinear",
                   mean=(0.4, 0.5, 0.6), input_size=(3, 48, 32))  # fmt: skip
    processor = transformers.AutoImageProcessor.from_pretrained("me/mine", cache_dir=tmp_path / "c")
    pixels = np.random.default_rng(0).integers(0, 256, (61, 83, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    got = processor(image, return_tensors="pt")["pixel_values"]
    assert torch.equal(got, model.preprocess(image))
    pair = processor([image, pixels], return_tensors="pt")["pixel_values"]
    assert torch.equal(pair, torch.cat([got, got]))
    processor.save_pretrained(tmp_path / "p")
    again = transformers.AutoImageProcessor.from_pretrained(tmp_path / "p")
    assert torch.equal(again(image, return_tensors="pt")["pixel_values"], got)


def test_the_pipeline(hub, tmp_path):
    from PIL import Image

    model = pushed("nat", label_names=list("abcde"))
    pipe = transformers.pipeline("image-classification", model="me/mine",
                                 model_kwargs={"cache_dir": tmp_path / "c"})  # fmt: skip
    image = Image.new("RGB", (50, 70), (200, 30, 90))
    answers = pipe(image, top_k=5)
    with torch.no_grad():
        chances = model(model.preprocess(image)).softmax(-1)[0]
    got = {answer["label"]: answer["score"] for answer in answers}
    assert got.keys() == set("abcde")
    for label, chance in zip("abcde", chances.tolist(), strict=True):
        assert got[label] == pytest.approx(chance, abs=1e-6)


# ---------------------------------------------------------------- training and the model itself


def test_training_a_step(hub, tmp_path):
    pushed("dinat")
    net = AutoClassifier.from_pretrained("me/mine", cache_dir=tmp_path / "c").train()
    net.gradient_checkpointing_enable()
    x, labels = picture(CONFIGS["dinat"]), torch.tensor([0, 3])
    out = net(x, labels=labels)
    want = torch.nn.functional.cross_entropy(out.logits, labels)
    assert torch.allclose(out.loss, want)
    out.loss.backward()
    assert all(p.grad is not None for p in net.parameters())
    loss, logits = net(x, labels=labels, return_dict=False)[:2]
    assert logits.shape == (2, 4) and loss.ndim == 0


def test_a_replaced_head_and_copies_are_used(hub, tmp_path):
    pushed("nat")
    net = AutoClassifier.from_pretrained("me/mine", cache_dir=tmp_path / "c").eval()
    twin = copy.deepcopy(net)
    net.head = torch.nn.Linear(16, 2)
    x = picture(CONFIGS["nat"])
    assert net(x).logits.shape == (2, 2) and twin(x).logits.shape == (2, 5)
    with torch.no_grad():
        before = twin(x).logits
        twin.head.bias.add_(1)
        assert torch.allclose(twin(x).logits, before + 1)
    half = net.to(torch.bfloat16)
    assert half(x.bfloat16()).logits.dtype == torch.bfloat16


def test_fresh_models(tmp_path):
    config = ours.NatConfig(embed_dim=8, depths=[1, 1], num_heads=[1, 2], kernel_size=3,
                            num_labels=3, layer_scale_init_value=0.25)  # fmt: skip
    net = AutoClassifier.from_config(config)
    state = net.state_dict()
    assert torch.all(state["levels.0.blocks.0.gamma1"] == 0.25)
    assert 0.01 < state["levels.0.blocks.0.attn.rpb"].std() < 0.03
    assert torch.all(state["norm.weight"] == 1) and torch.all(state["head.bias"] == 0)
    net.save_pretrained(tmp_path / "x")
    same(natcupy.from_pretrained(tmp_path / "x").state_dict(), state)


def test_what_the_weights_lack_is_made_and_the_rest_kept(tmp_path):
    """Also where one module has some of its tensors."""
    model = invented("dinat")
    folder = model.save_pretrained(tmp_path / "x")
    path = folder / "model.safetensors"
    tensors = dict(read_tensors(path).tensors)
    lost = tensors.pop("levels.0.blocks.0.gamma1")
    path.unlink()
    write_tensors(tensors, path)
    state = AutoClassifier.from_pretrained(folder).state_dict()
    assert torch.equal(state.pop("levels.0.blocks.0.gamma1"), torch.full_like(lost, 0.5))
    same(state, tensors)


def test_dtype_and_missing_pixels(hub, tmp_path):
    pushed("nat")
    net = AutoClassifier.from_pretrained("me/mine", dtype=torch.float16, cache_dir=tmp_path / "c")
    assert net.dtype == torch.float16
    with pytest.raises(ValueError, match="pixel_values"):
        net()


def test_damage_is_noticed(hub, tmp_path):
    """The client alone would accept it: the size is right."""
    pushed("nat")
    hub.fault(r"/blobs/", times=100, flip=True)
    with pytest.raises(Corrupt):
        AutoClassifier.from_pretrained("me/mine", cache_dir=tmp_path / "c")


def test_weights_that_do_not_fit_are_told(hub, tmp_path):
    folder = invented("nat").save_pretrained(tmp_path / "x")
    path = folder / "model.safetensors"
    tensors = dict(read_tensors(path).tensors)
    tensors["head.weight"] = torch.zeros(9, 16)
    path.unlink()
    write_tensors(tensors, path)
    with pytest.raises((RuntimeError, ValueError), match=r"head\.weight|mismatch"):
        AutoClassifier.from_pretrained(folder)


def test_what_a_card_shows_runs(hub):
    model = pushed("nat")
    blocks = hub.tree("me/mine")["README.md"].decode().split("```python\n")[1:]
    code = next(b.split("```")[0] for b in blocks if b.startswith("import natcupy.transformers"))
    scope = {}
    exec(code, scope)
    same(scope["model"].state_dict(), model.state_dict())
    assert isinstance(scope["processor"], ours.NatcupyImageProcessor)


def test_nothing_of_the_old_operators_is_needed():
    assert "natten" not in sys.modules


@pytest.mark.parametrize("there", [None, types.ModuleType("transformers"), transformers])
def test_without_transformers_one_sentence_says_so(monkeypatch, there):
    """Absent, so old that the names are missing, and too old by its number alone."""
    monkeypatch.setattr(transformers, "__version__", "5.18.0")
    for name in [n for n in sys.modules if n.startswith("natcupy.transformers")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "transformers", there)
    for installed in ([], ["transformers", "torchvision"]):
        found = [types.SimpleNamespace(name=name) for name in installed]
        monkeypatch.setattr(importlib.metadata, "distributions", lambda found=found: found)
        wanted = r"transformers >= 5\.19.*pip install 'natcupy\[transf"
        with pytest.raises(ImportError, match=wanted) as told:
            importlib.import_module("natcupy.transformers")
        assert ("torchvision may be the reason" in str(told.value)) == bool(installed)
        assert ("5.18.0 is installed" in str(told.value)) == (there is transformers)
