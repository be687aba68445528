"""What transformers, PEFT and torch do with a model: adapters, stages, checkpoints, replicas."""

import json

import pytest
import torch
from ecosystem import library
from small import CONFIGS, folder_of, invented, picture, same

import natcupy
from natcupy.train.machine import own_state

transformers = library("transformers")
import natcupy.transformers as ours  # noqa: E402  (after the library that it needs)

AutoClassifier = transformers.AutoModelForImageClassification
LOADERS = [AutoClassifier.from_pretrained, ours.NatForImageClassification.from_pretrained]
EACH_LOADER = pytest.mark.parametrize("load", LOADERS, ids=["auto", "class"])


def config_of(**words):
    sizes = {"embed_dim": 8, "depths": [1, 1, 1], "num_heads": [1, 2, 2], "kernel_size": 3}
    return ours.NatConfig(**{**sizes, **words})


def pictures():
    return picture(CONFIGS["nat"])


def logits(net):
    with torch.no_grad():
        return net.eval()(pictures()).logits


# ---------------------------------------------------------------- adapters


def tuned(base, place):
    """A PEFT adapter in a folder, with a head of its own, and the tuned model's logits."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(3)
    config = peft.LoraConfig(
        target_modules=["qkv"], modules_to_save=["head"], init_lora_weights=False
    )
    net = peft.get_peft_model(AutoClassifier.from_pretrained(base), config)
    with torch.no_grad():
        net.base_model.model.natcupy.head.weight.add_(1)
    net.save_pretrained(place)
    return logits(net)


@EACH_LOADER
def test_an_adapters_folder_gives_the_tuned_model(tmp_path, load):
    base = str(invented("nat").save_pretrained(tmp_path / "base"))
    want = tuned(base, tmp_path / "lora")
    net = load(tmp_path / "lora")
    assert torch.equal(logits(net), want)
    assert not torch.allclose(logits(AutoClassifier.from_pretrained(base)), want)
    assert net.name_or_path == base and list(net.peft_config) == ["default"]
    half, told = load(
        str(tmp_path / "lora"), dtype=torch.float16, adapter_name="mine", output_loading_info=True
    )
    assert list(half.peft_config) == ["mine"] and not told["missing_keys"]
    assert {p.dtype for n, p in half.named_parameters() if "lora_" in n} == {torch.float16}


@EACH_LOADER
def test_a_model_with_an_adapter_beside_it(tmp_path, load):
    """The folder of a whole model is the adapter's base, whatever the adapter calls it."""
    base = invented("nat").save_pretrained(tmp_path / "base")
    want = tuned(str(base), tmp_path / "lora")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (base / name).write_bytes((tmp_path / "lora" / name).read_bytes())
    values = json.loads((base / "adapter_config.json").read_text())
    values["base_model_name_or_path"] = "nobody/nowhere"
    (base / "adapter_config.json").write_text(json.dumps(values))
    assert torch.equal(logits(load(str(base))), want)


@EACH_LOADER
def test_an_adapter_on_the_hub(hub, tmp_path, load):
    hub.commit("me/base", folder_of(invented("nat"), tmp_path / "base"))
    want = tuned("me/base", tmp_path / "lora")
    files = {path.name: path.read_bytes() for path in (tmp_path / "lora").iterdir()}
    first = hub.commit("me/lora", files)
    hub.commit("me/lora", {"README.md": b"no adapter any more"})
    names = [("me/lora", {"revision": first})]
    if load is LOADERS[1]:
        names.append((f"me/lora@{first}", {}))
    for name, place in names:
        how = {"cache_dir": tmp_path / "c", "adapter_kwargs": place}
        assert torch.equal(logits(load(name, **how)), want)


def test_short_names_are_no_adapters(no_sockets):
    net = ours.DinatForImageClassification.from_pretrained("nat-digits", dtype=torch.float32)
    same(net.state_dict(), natcupy.from_pretrained("nat-digits").state_dict())
    assert not no_sockets


# ---------------------------------------------------------------- stages


@pytest.mark.parametrize(
    ("indices", "names"),
    [([-1], ["stage3"]), ([-2, -1], ["stage2", "stage3"]), ([1, -1], ["stage1", "stage3"])],
    ids=str,
)
def test_stages_counted_from_the_end(tmp_path, indices, names):
    config = config_of(out_indices=indices)
    net = ours.NatBackbone(config).eval()
    assert net.out_features == names
    x = pictures()
    with torch.no_grad():
        maps = net(x).feature_maps
        assert [m.shape[1] for m in maps] == net.channels
        same_stages = ours.NatBackbone(config_of(out_features=names)).eval()
        same_stages.load_state_dict(net.state_dict())
        assert all(map(torch.equal, maps, same_stages(x).feature_maps))
        net.save_pretrained(tmp_path / "net")
        back = natcupy.from_pretrained(tmp_path / "net")
        assert all(map(torch.equal, maps, back(x)))
        again = ours.NatBackbone.from_pretrained(tmp_path / "net")
        assert all(map(torch.equal, maps, again(x).feature_maps)) and again.out_features == names
    with pytest.raises(ValueError, match="stem"):
        ours.NatBackbone(config_of(out_indices=[-4]))


def test_hidden_states_are_of_the_same_pass():
    """In training, blocks are dropped by chance: another pass would have other maps."""
    torch.manual_seed(0)
    config = config_of(depths=[2, 2, 2], drop_path_rate=0.9, out_indices=[1, 3])
    net = ours.NatBackbone(config).train()
    stems = []
    net.patch_embed.register_forward_hook(lambda module, inputs, out: stems.append(out))
    x = pictures()
    out = net(x, output_hidden_states=True)
    assert len(stems) == 1 and len(out.hidden_states) == len(config.stage_names)
    assert torch.equal(out.hidden_states[0], stems[0].movedim(-1, 1))
    for norm, index, features in zip((net.norm0, net.norm2), (1, 3), out.feature_maps, strict=True):
        state = out.hidden_states[index]
        assert torch.equal(norm(state.movedim(1, -1)).movedim(-1, 1), features)
    net.eval()
    with torch.no_grad():
        maps = net(x, output_hidden_states=True).feature_maps
        assert all(map(torch.equal, maps, net(x).feature_maps))


@pytest.mark.parametrize("name", ["nat", "dinat_s", "isotropic", "vitrpb"])
def test_hidden_states_begin_with_the_stem(tmp_path, name):
    model = invented(name)
    net = AutoClassifier.from_pretrained(model.save_pretrained(tmp_path / "x")).eval()
    x = picture(CONFIGS[name])
    with torch.no_grad():
        out = net(x, output_hidden_states=True)
        stem = model.patch_embed(x).movedim(-1, 1)
        stages = model.forward_intermediates(x, intermediates_only=True)
        assert torch.equal(out.logits, model(x))
    assert all(map(torch.equal, out.hidden_states, [stem, *stages]))
    assert len(out.hidden_states) == len(stages) + 1
    with pytest.raises(ValueError, match="takes pictures"):
        net(x[:, :1], output_hidden_states=True)


# ---------------------------------------------------------------- training


def enabled(net):
    """Which blocks are recomputed, and what transformers believes."""
    name = "is_activation_checkpointing"
    believed = getattr(net, name) if hasattr(net, name) else net.is_gradient_checkpointing
    return [block.grad_checkpointing for block in net._blocks()], believed


@pytest.mark.parametrize("word", ["activation_checkpointing", "gradient_checkpointing"])
def test_checkpointing_under_both_names(word):
    net = AutoClassifier.from_config(config_of()).train()
    assert enabled(net) == ([False] * 3, False)
    getattr(net, f"{word}_enable")()
    assert enabled(net) == ([True] * 3, True)
    getattr(net, f"{word}_disable")()
    assert enabled(net) == ([False] * 3, False)
    getattr(net, f"{word}_enable")(every_n_layers=2, offload=False)
    assert enabled(net) == ([True, False, True], True)
    getattr(net, f"{word}_enable")({"use_reentrant": False})
    assert enabled(net) == ([True] * 3, True)
    net(pictures(), labels=torch.tensor([0, 1])).loss.backward()
    assert all(p.grad is not None for p in net.parameters())


@pytest.mark.parametrize(
    ("how", "rule"),
    [
        ({"offload": True}, "offload must be False"),
        ({"every_n_layers": 0}, "every_n_layers must be an int from 1"),
        ({"activation_checkpointing_kwargs": {"use_reentrant": True}}, "use_reentrant=True"),
        ({"activation_checkpointing_kwargs": {"debug": True}}, "debug=True"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_other_ways_of_checkpointing_are_refused(how, rule):
    net = AutoClassifier.from_config(config_of())
    with pytest.raises(ValueError, match=rule):
        net.activation_checkpointing_enable(**how)
    assert enabled(net) == ([False] * 3, False)


def test_checkpointing_by_the_config():
    config = config_of()
    config.gradient_checkpointing = True
    assert enabled(AutoClassifier.from_config(config)) == ([True] * 3, True)


def test_the_trainer_checkpoints(tmp_path):
    pytest.importorskip("accelerate")
    net = AutoClassifier.from_config(config_of(num_labels=2))
    data = [{"pixel_values": x, "labels": torch.tensor(0)} for x in pictures()]
    with own_state():  # or accelerate's stays for the tests that follow
        args = transformers.TrainingArguments(
            tmp_path, max_steps=1, gradient_checkpointing=True, report_to=[], save_strategy="no",
            use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        transformers.Trainer(net, args, train_dataset=data).train()
    assert enabled(net) == ([True] * 3, True)


@pytest.mark.parametrize("kind", [ours.NatForImageClassification, ours.NatBackbone])
def test_replicas_run_their_own_modules(kind):
    """As nn.DataParallel makes them, on the CPU."""
    net = kind(config_of())
    replica = net._replicate_for_data_parallel()
    assert replica.natcupy._modules is replica._modules
    assert net.natcupy._modules is net._modules
    assert replica._modules is not net._modules
    replica._modules["patch_embed"] = torch.nn.Identity()
    assert replica.natcupy.patch_embed is replica.patch_embed
    assert net.natcupy.patch_embed is net.patch_embed is not replica.patch_embed


# ---------------------------------------------------------------- reports


@EACH_LOADER
def test_load_reports_name_the_weights(tmp_path, caplog, monkeypatch, load):
    folder = str(invented("nat").save_pretrained(tmp_path / "base"))
    monkeypatch.setattr(transformers.logging.get_logger("transformers"), "propagate", True)
    net = load(folder, num_labels=9, ignore_mismatched_sizes=True)
    assert net.num_labels == 9
    report = next(text for text in caplog.messages if "LOAD REPORT" in text)
    assert f"from: {folder}\n" in report
