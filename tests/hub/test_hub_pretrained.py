"""Loading and saving whole models from disk: every layout, every wish, every difference named."""

import json
import os

import pytest
import torch
from small import CONFIGS, invented, picture, same
from torch import nn

import natcupy
from natcupy import hub
from natcupy.hub import convert, converting, pretrained
from natcupy.hub.errors import CheckpointError, Corrupt, NotFound, UnsafePickle
from natcupy.hub.tensors import read_tensors, write_tensors
from natcupy.zoo import ConfigError, build_model, create_model, model_config


@pytest.fixture(autouse=True)
def offline(no_sockets):
    """Nothing in this file needs a network."""
    yield
    assert no_sockets == []


def saved(tmp_path, name="nat", seed=0):
    model = invented(name, seed)
    return model, hub.save_pretrained(model, tmp_path / name)


def edit(folder, **changes):
    path = folder / "config.json"
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps(values))


def rewrite(folder, change):
    """Change the weights file's tensors in place."""
    path = folder / "model.safetensors"
    tensors = dict(read_tensors(path).tensors)
    change(tensors)
    path.unlink()
    write_tensors(tensors, path)


# ---------------------------------------------------------------- round trips


@pytest.mark.parametrize("name", CONFIGS)
def test_round_trip(tmp_path, name):
    model, folder = saved(tmp_path, name)
    assert sorted(p.name for p in folder.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    ]
    again = natcupy.from_pretrained(folder)
    same(again.state_dict(), model.state_dict())
    assert again.config == model.config and not again.training
    assert all(p.requires_grad for p in again.parameters())
    x = picture(model.config)
    first, second = model(x), again(x)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert again.source.kind == "folder" and again.source.commit is None
    assert again.source.sha256 == hub.files.sha256_file(folder / "model.safetensors")


def test_metadata_survives(tmp_path):
    config = CONFIGS["nat"]
    cfg = {"label_names": list("abcde"), "license": "cc-by-4.0", "crop_mode": "squash",
           "mean": (0.1, 0.2, 0.3), "input_size": (3, 64, 48), "tag": "mine"}  # fmt: skip
    again = hub.from_pretrained(hub.save_pretrained(build_model(config, cfg), tmp_path / "x"))
    assert {key: again.pretrained_cfg[key] for key in cfg} == cfg


def test_saving_over_the_source(tmp_path):
    model, folder = saved(tmp_path)
    loaded = hub.from_pretrained(folder)
    with torch.no_grad():
        loaded.head.bias += 1
    hub.save_pretrained(loaded, folder)
    again = hub.from_pretrained(folder)
    assert torch.equal(again.head.bias, model.head.bias + 1)
    same(again.state_dict(), loaded.state_dict())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(tmp_path, dtype):
    model = invented("vitrpb").to(dtype)
    folder = hub.save_pretrained(model, tmp_path / "x")
    same(hub.from_pretrained(folder, dtype="auto").state_dict(), model.state_dict())
    default = hub.from_pretrained(folder)
    assert {p.dtype for p in default.parameters()} == {torch.float32}
    assert default.state_dict()["layers.0.attn.relative_position_index"].dtype == torch.int64
    half = hub.from_pretrained(folder, dtype="float16", device="cpu")
    assert half.head.weight.dtype == torch.float16
    for bad in ("int8", torch.int64, "quick", 3):
        with pytest.raises(ValueError, match="dtype"):
            hub.from_pretrained(folder, dtype=bad)


@pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX's")
def test_files_have_the_mode_the_umask_gives(tmp_path):
    before = os.umask(0o027)
    try:
        hub.save_pretrained(invented("nat"), tmp_path / "m")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "m").iterdir()}
    assert set(modes.values()) == {0o640}, modes


def test_an_existing_card_is_kept(tmp_path):
    model, folder = saved(tmp_path)
    (folder / "README.md").write_text("mine")
    hub.save_pretrained(model, folder)
    assert (folder / "README.md").read_text() == "mine"
    hub.save_pretrained(model, folder, overwrite_card=True)
    assert (folder / "README.md").read_text().startswith("---\nlibrary_name")


def test_a_rebuilt_model_is_not_saved(tmp_path):
    model = invented("nat")
    model.head = nn.Linear(16, 9)
    with pytest.raises(CheckpointError, match=r"head\.weight is \(9, 16\), not \(5, 16\)"):
        hub.save_pretrained(model, tmp_path / "x")
    assert not (tmp_path / "x").exists()
    model.reset_classifier(9)
    assert hub.from_pretrained(hub.save_pretrained(model, tmp_path / "x")).num_classes == 9


# ---------------------------------------------------------------- foreign layouts


def transformers_folder(tmp_path, name="dinat", weights="model.safetensors", **changes):
    """A folder as transformers' save_pretrained leaves it."""
    model = invented(name)
    config = model.config
    kind = "Backbone" if config.out_indices is not None else "ForImageClassification"
    word = "dinat" if config.dilations else "nat"
    values = {
        "model_type": word, "architectures": [word.title() + kind], "hidden_size": 512,
        "layer_scale_init_value": config.layer_scale or 0.0, "num_channels": config.in_chans,
        **{k: v for k, v in config.to_dict().items() if k in
           ("embed_dim", "depths", "num_heads", "kernel_size", "mlp_ratio", "drop_path_rate")},
    }  # fmt: skip
    if config.dilations:
        values["dilations"] = config.dilations
    if config.out_indices is not None:
        values["out_features"] = [f"stage{i + 1}" for i in config.out_indices]
    else:
        names = {str(i): f"thing {i}" for i in range(config.num_classes)}
        values |= {"id2label": names, "label2id": {v: int(k) for k, v in names.items()}}
    folder = tmp_path / "theirs"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**values, **changes}))
    state = convert.to_transformers(model.state_dict(), "" if kind == "Backbone" else f"{word}.")
    if weights.endswith(".bin"):
        torch.save(state, folder / weights)
    else:
        write_tensors(state, folder / weights)
    return model, folder


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("name", ["nat", "dinat", "backbone"])
def test_transformers_folders(tmp_path, name, weights):
    model, folder = transformers_folder(tmp_path, name, weights)
    loaded = hub.from_pretrained(folder)
    same(loaded.state_dict(), model.state_dict())
    assert loaded.config.dilations == model.config.dilations
    if name != "backbone":
        assert loaded.pretrained_cfg["label_names"][1] == "thing 1"
    x = picture(model.config)
    assert all(torch.equal(a, b) for a, b in zip(model(x), loaded(x), strict=True))
    again = hub.from_pretrained(hub.save_pretrained(loaded, tmp_path / "ours"))
    same(again.state_dict(), model.state_dict())


def test_their_preprocessor_is_followed(tmp_path):
    _, folder = transformers_folder(tmp_path, "nat")
    recipe = {"size": 48, "resample": 2, "image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(recipe))
    model = hub.from_pretrained(folder)
    assert model.pretrained_cfg["crop_mode"] == "squash"
    assert model.pretrained_cfg["interpolation"] == "bilinear"
    assert model.preprocess(torch.zeros(3, 90, 70)).shape == (1, 3, 48, 48)
    assert model.preprocess(torch.zeros(3, 90, 70)).unique().tolist() == [-2.0]


def test_their_released_numbers_get_our_name(tmp_path):
    values = {"model_type": "nat", "id2label": {"0": "a", "1": "b"}}
    (tmp_path / "config.json").write_text(json.dumps(values))
    model = create_model("nat_mini", num_classes=2)
    write_tensors(convert.to_transformers(model.state_dict()), tmp_path / "model.safetensors")
    loaded = hub.from_pretrained(tmp_path)
    assert loaded.name == "nat_mini" and loaded.pretrained_cfg["crop_pct"] == 0.875


@pytest.mark.parametrize("name", ["nat_mini", "dinat_s_tiny", "vitrpb_small"])
def test_original_files(tmp_path, name):
    model = create_model(name, num_classes=3)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    loaded = hub.from_pretrained(tmp_path / "weights.pth", architecture=name.replace("_", "-"))
    same(loaded.state_dict(), model.state_dict())
    assert loaded.name == name and loaded.source.kind == "file"
    assert loaded.config == model_config(name, num_classes=3)


def test_the_file_name_says_which_one(tmp_path):
    path = tmp_path / "dinat_mini_in1k_224.pth"
    torch.save({"state_dict": create_model("dinat_mini").state_dict()}, path)
    loaded = hub.from_pretrained(str(path))
    assert loaded.config == model_config("dinat_mini")
    assert loaded.source.tag == "dinat_mini.in1k" and loaded.source.license == "mit"
    assert hub.from_pretrained(path, architecture="nat_mini").config.dilations is None
    other = path.rename(tmp_path / "checkpoint.pth")
    with pytest.raises(CheckpointError, match=r"nat-mini, dinat-mini.*architecture="):
        hub.from_pretrained(other)
    how = r"architecture='nat-mini', or `natcupy convert FILE FOLDER --architecture nat-mini`"
    with pytest.raises(CheckpointError, match=how):
        hub.from_pretrained(other)
    with pytest.raises(CheckpointError, match=r"depths .* instead of.* --architecture NAME"):
        hub.from_pretrained(other, architecture="nat_tiny")
    with pytest.raises(CheckpointError, match=r"does not hold the tensors of nat-digits: .*depths"):
        hub.from_pretrained(other, architecture="nat-digits")
    with pytest.raises(ValueError, match=r"list_models\(task=None\).*natcupy models.*'nat_giant'"):
        hub.from_pretrained(other, architecture="nat_giant")


def test_shapes_that_fit_one_model_need_no_name(tmp_path):
    path = tmp_path / "mine.safetensors"
    write_tensors(create_model("dinat_s_tiny", num_classes=2).state_dict(), path)
    assert hub.from_pretrained(path).name == "dinat_s_tiny"
    write_tensors(invented("nat").state_dict(), tmp_path / "unknown.safetensors")
    with pytest.raises(CheckpointError, match=r"no model of the zoo.*config\.json"):
        hub.from_pretrained(tmp_path / "unknown.safetensors")


def test_a_checkpoint_of_the_bundled_model(tmp_path):
    """By its shapes or by name; it prepares pictures alike, and claims no labels or licence."""
    model = hub.from_pretrained("nat-digits")
    torch.save(model.state_dict(), tmp_path / "x.pth")
    done = converting.convert_checkpoint(tmp_path / "x.pth", tmp_path / "out")
    assert done.architecture == "nat_digits" and done.largest_difference == 0
    own = {"label_names", "license", "tag"}
    for found in (
        hub.from_pretrained(tmp_path / "out"),
        hub.from_pretrained(tmp_path / "x.pth", architecture="NAT-digits"),
    ):
        same(found.state_dict(), model.state_dict())
        assert found.config == model.config and not found.pretrained_cfg["tag"]
        assert not {"label_names", "license"} & found.pretrained_cfg.keys()
        kept = {key: value for key, value in found.pretrained_cfg.items() if key not in own}
        assert kept == {k: v for k, v in model.pretrained_cfg.items() if k not in own}
    other = hub.from_pretrained("nat-digits", num_classes=2, in_chans=3)
    torch.save({"model": other.state_dict()}, tmp_path / "y.pth")
    found = hub.from_pretrained(tmp_path / "y.pth")
    assert found.config == other.config and found.pretrained_cfg["input_size"] == (3, 32, 32)


def test_a_detector_gives_its_backbone(tmp_path):
    model = create_model("nat_mini", features_only=True)
    state = {**convert.to_backbone(model.state_dict()), "rpn_head.rpn_cls.bias": torch.ones(3)}
    torch.save({"meta": {"CLASSES": ("a",)}, "state_dict": state}, tmp_path / "mask_rcnn.pth")
    loaded = hub.from_pretrained(tmp_path / "mask_rcnn.pth", architecture="nat_mini")
    assert loaded.config.out_indices == (0, 1, 2, 3)
    same(loaded.state_dict(), model.state_dict())


# ---------------------------------------------------------------- wishes


def test_num_classes_replaces_the_head_and_nothing_else(tmp_path, caplog):
    model, folder = saved(tmp_path)
    edit(folder, label_names=list("abcde"))
    with caplog.at_level("WARNING", "natcupy.hub"):
        loaded = hub.from_pretrained(folder, num_classes=7)
    assert "head.weight" in caplog.text
    assert "of another shape in model.safetensors, initialised afresh: head.bias ((5,) there, " in (
        caplog.text
    )
    assert "not in" not in caplog.text
    assert loaded.head.weight.shape == (7, 16) and loaded.head.weight.abs().max() < 1
    assert loaded.config.num_classes == 7 == loaded.pretrained_cfg["num_classes"]
    assert "label_names" not in loaded.pretrained_cfg
    mine, theirs = loaded.state_dict(), model.state_dict()
    for name in mine.keys() - set(convert.HEAD):
        assert torch.equal(mine[name], theirs[name])
    kept = hub.from_pretrained(folder, num_classes=5)
    same(kept.state_dict(), theirs)
    assert kept.pretrained_cfg["label_names"] == list("abcde")
    headless = hub.from_pretrained(folder, num_classes=0)
    assert isinstance(headless.head, nn.Identity)
    half = hub.from_pretrained(folder, num_classes=7, dtype="float16")
    assert {p.dtype for p in half.parameters()} == {torch.float16}


def test_without_num_classes_another_head_is_an_error(tmp_path):
    _, folder = saved(tmp_path)
    edit(folder, num_classes=6, id2label=None, pretrained_cfg={})
    with pytest.raises(CheckpointError, match=r"head\.bias is \(5,\), not \(6,\)"):
        hub.from_pretrained(folder)


def test_kernel_size_resizes_the_tables(tmp_path):
    model, folder = saved(tmp_path, "dinat")
    loaded = hub.from_pretrained(folder, kernel_size=5)
    mine, theirs = loaded.state_dict(), model.state_dict()
    for name, tensor in theirs.items():
        expected = tensor
        if name.endswith("rpb"):
            expected = nn.functional.interpolate(
                tensor[None], size=(9, 9), mode="bicubic", align_corners=False
            )[0]
        assert torch.equal(mine[name], expected), name
    assert loaded.config.kernel_size == 5 and loaded.config.dilations == model.config.dilations


def test_vitrpb_at_another_size(tmp_path):
    model, folder = saved(tmp_path, "vitrpb")
    loaded = hub.from_pretrained(folder, img_size=64)
    assert loaded.layers[0].attn.rpb.shape == (2, 7, 7)
    assert loaded(torch.randn(1, 3, 64, 64)).shape == (1, 3)
    assert torch.equal(loaded.head.weight, model.head.weight)


def test_in_chans(tmp_path):
    model, folder = saved(tmp_path)
    loaded = hub.from_pretrained(folder, in_chans=1)
    grey = torch.rand(1, 1, 32, 32)
    torch.testing.assert_close(loaded(grey), model(grey.repeat(1, 3, 1, 1)), rtol=1e-3, atol=1e-4)
    assert loaded.preprocess(torch.zeros(1, 9, 9)).shape[1] == 1


def test_a_backbone_out_of_a_classifier(tmp_path):
    model, folder = saved(tmp_path)
    loaded = hub.from_pretrained(folder, features_only=True)
    assert loaded.config.out_indices == (0, 1)
    assert torch.equal(loaded.norm1.weight, torch.ones(16))
    assert [m.shape[1] for m in loaded(picture(model.config))] == [8, 16]
    one = hub.from_pretrained(folder, out_indices=(1,), drop_path_rate=0.2)
    assert one.config.out_indices == (1,) and one.config.drop_path_rate == 0.2
    with pytest.raises(ValueError, match="features_only"):
        hub.from_pretrained(folder, out_indices=(1,), features_only=False)


def test_the_callers_arguments_win(tmp_path):
    _, folder = saved(tmp_path, "dinat")
    loaded = hub.from_pretrained(folder, dilations=((1, 1), (1, 1), (1,)), drop_path_rate=0.1)
    assert loaded.config.dilations == ((1, 1), (1, 1), (1,))
    loaded = hub.from_pretrained(folder, global_pool="")
    assert loaded.global_pool == ""
    with pytest.raises(ConfigError, match="drop_path_rat"):
        hub.from_pretrained(folder, drop_path_rat=0.1)
    with pytest.raises(TypeError, match="family"):
        hub.from_pretrained(folder, family="vitrpb")
    with pytest.raises(ConfigError, match="parameters"):
        hub.from_pretrained(folder, max_parameters=10)


# ---------------------------------------------------------------- differences


def test_every_tensor_dropped_renamed_or_reshaped_is_named(tmp_path):
    model, folder = saved(tmp_path)
    good = (folder / "model.safetensors").read_bytes()
    for name in list(model.state_dict()):
        changes = (
            ("missing", lambda t, n=name: t.pop(n)),
            ("unexpected", lambda t, n=name: t.update({n + "x": t[n]})),
            ("misshapen", lambda t, n=name: t.update({n: torch.cat([t[n], t[n]])})),
        )
        for kind, change in changes:
            (folder / "model.safetensors").write_bytes(good)
            rewrite(folder, change)
            with pytest.raises(CheckpointError) as caught:
                hub.from_pretrained(folder)
            wrong = getattr(caught.value, kind)
            found = [entry[0] if kind == "misshapen" else entry for entry in wrong]
            assert found == [name + "x" if kind == "unexpected" else name]
            assert name in str(caught.value)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
def test_names_from_a_wrapper_are_told(tmp_path, prefix):
    _, folder = saved(tmp_path)
    rewrite(folder, lambda t: [t.update({prefix + name: t.pop(name)}) for name in list(t)])
    with pytest.raises(CheckpointError, match=f"added '{prefix}'.*the model inside"):
        hub.from_pretrained(folder)


def test_whole_numbers_for_weights_are_named(tmp_path):
    _, folder = saved(tmp_path)
    rewrite(folder, lambda t: t.update({"head.weight": t["head.weight"].to(torch.int64)}))
    with pytest.raises(CheckpointError, match=r"head.weight is torch.int64, not torch.float32"):
        hub.from_pretrained(folder)


def test_long_lists_are_cut(tmp_path):
    _, folder = saved(tmp_path)
    rewrite(folder, lambda t: [t.pop(n) for n in list(t) if n.startswith("levels.1.blocks")])
    with pytest.raises(CheckpointError, match=r"26 missing: .* and 16 more"):
        hub.from_pretrained(folder)


def test_nothing_is_allocated_for_shapes_that_do_not_fit(tmp_path, monkeypatch):
    _, folder = saved(tmp_path)
    rewrite(folder, lambda t: t.pop("norm.bias"))
    monkeypatch.setattr(pretrained, "read_tensors", lambda *_: pytest.fail("read too early"))
    with pytest.raises(CheckpointError):
        hub.from_pretrained(folder)


def test_non_finite_weights(tmp_path, caplog):
    _, folder = saved(tmp_path)
    rewrite(folder, lambda t: t["norm.bias"].fill_(float("nan")))
    hub.from_pretrained(folder)
    assert "norm.bias" in caplog.text
    with pytest.raises(CheckpointError, match=r"finite.*norm\.bias"):
        hub.from_pretrained(folder, check_finite=True)


def test_bad_folders_and_files(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(NotFound, match=r"model\.safetensors"):
        hub.from_pretrained(empty)
    with pytest.raises(NotFound, match="no such"):
        hub.from_pretrained(tmp_path / "absent")
    (tmp_path / "weights.onnx").write_bytes(b"x")
    with pytest.raises(Corrupt, match=r"\.safetensors"):
        hub.from_pretrained(tmp_path / "weights.onnx")
    (empty / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(Corrupt, match="weight_map"):
        hub.from_pretrained(empty)
    _, folder = saved(tmp_path)
    (folder / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json"):
        hub.from_pretrained(folder)
    with pytest.raises(ValueError, match="revision"):
        hub.from_pretrained(folder, revision="main")
    with pytest.raises(TypeError, match="path"):
        hub.from_pretrained(7)


def test_a_pickle_in_disguise(tmp_path):
    _, folder = saved(tmp_path)
    (folder / "model.safetensors").unlink()

    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "canary"),))

    torch.save({"a": Evil()}, folder / "model.safetensors")
    with pytest.raises(Corrupt, match="zip"):
        hub.from_pretrained(folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UnsafePickle, match="mkdir"):
        hub.from_pretrained(folder)
    assert not (tmp_path / "canary").exists()


def test_the_path_of_an_index_means_its_shards(tmp_path):
    folder = hub.save_pretrained(invented("nat"), tmp_path / "x", max_shard_bytes=8000)
    (folder / "model.safetensors").write_bytes(
        (hub.save_pretrained(invented("nat", 1), tmp_path / "y") / "model.safetensors").read_bytes()
    )
    model = natcupy.from_pretrained(folder / "model.safetensors.index.json")
    same(model.state_dict(), invented("nat").state_dict())


def test_a_tensor_under_two_names_is_two_tensors(tmp_path):
    model, _ = saved(tmp_path)
    state = model.state_dict()
    first, second = "levels.1.blocks.0.norm1.weight", "levels.1.blocks.1.norm1.weight"
    state[second] = state[first]
    folder = hub.save_pretrained(model, tmp_path / "tied")
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    again = natcupy.from_pretrained(folder)
    with torch.no_grad():
        again.get_parameter(first).add_(1)
    assert torch.equal(again.get_parameter(second), state[second])


def test_a_folder_of_weights_comes_before_a_name_that_is_on_no_repository(tmp_path, monkeypatch):
    """What `natcupy convert FILE upernet-nat-tiny` leaves is meant by that name then."""
    monkeypatch.chdir(tmp_path)
    hub.save_pretrained(invented("nat"), "upernet-nat-tiny")
    same(natcupy.from_pretrained("upernet-nat-tiny").state_dict(), invented("nat").state_dict())
    (tmp_path / "upernet-nat-small").mkdir()
    with pytest.raises(NotFound, match="no Hub repository"):
        natcupy.from_pretrained("upernet-nat-small")
