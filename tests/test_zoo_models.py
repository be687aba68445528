"""What models do: features, classifier, backbones, training, on a small size of each family."""

import copy
import re

import pytest
import torch
from small_models import HIERARCHICAL, each_family, pictures, small
from tolerances import MODEL, close
from torch import nn

from natcupy.modules import NeighborhoodAttention2D
from natcupy.zoo import base as zoo_base
from natcupy.zoo import build_model, num_parameters
from natcupy.zoo.isotropic import DenseAttention
from natcupy.zoo.layers import Block, DropPath, PatchMerging

# -- forward ------------------------------------------------------------------------------------


@each_family
def test_forward_is_head_after_features(family):
    model, x = small(family), pictures()
    features = model.forward_features(x)
    side = 4 if family in ("isotropic", "vitrpb") else 2
    assert features.shape == (2, side, side, model.num_features)
    pooled = model.forward_head(features, pre_logits=True)
    close(pooled, features.mean((1, 2)), torch.float32)
    assert torch.equal(model(x), model.forward_head(features))
    assert torch.equal(model(x), model.head(pooled))
    assert model(x).shape == (2, 5)
    assert model.num_features == model.head_hidden_size == model.config.dims[-1]


@pytest.mark.parametrize("family", HIERARCHICAL)
@pytest.mark.parametrize("size", [(1, 1), (3, 70), (65, 32), (37, 101)])
def test_any_picture_size(family, size):
    model = small(family)
    maps = model.forward_intermediates(pictures(1, 3, *size), intermediates_only=True)
    for reduction, one in zip((4, 8, 16, 32), maps, strict=True):
        assert one.shape[2:] == tuple(-(-side // reduction) for side in size)
    assert model(pictures(1, 3, *size)).shape == (1, 5)


@each_family
def test_empty_batch_keeps_its_gradient_history(family):
    model = small(family)
    out = model(torch.empty(0, 3, 64, 64))
    assert out.shape == (0, 5)
    out.sum().backward()
    grads = [p.grad for p in model.patch_embed.parameters()]
    assert all(grad is not None and not grad.any() for grad in grads)


@each_family
def test_memory_layout_of_the_pictures_does_not_matter(family):
    model, x = small(family), pictures()
    expected = model(x)
    assert torch.equal(model(x.contiguous(memory_format=torch.channels_last)), expected)
    assert torch.equal(model(x.repeat_interleave(2, -1)[..., ::2]), expected)


@each_family
def test_maps_stay_contiguous_channels_last(family):
    """No block makes a later one copy its input."""
    model, seen = small(family), []
    for name, module in model.named_modules():
        cropped = name.endswith("attn.proj")  # after padding, what it gets is a view of a part
        if isinstance(module, Block | nn.LayerNorm | nn.Linear) and not cropped:
            module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(pictures())
    assert len(seen) > 20
    assert all(x.is_contiguous() for x in seen)


@each_family
def test_autocast_and_half(family):
    model, x = small(family), pictures()
    expected = model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = model(x)
    half = model.bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    for out in (mixed, half):
        assert (out.float() - expected).abs().max() < 0.1 * expected.abs().max()


@each_family
def test_wrong_pictures(family):
    model = small(family)
    with pytest.raises(ValueError, match=r"takes pictures \[batch, 3, .* got shape \(3, 64, 64\)"):
        model(pictures(3, 64, 64))
    with pytest.raises(ValueError, match=r"got shape \(1, 4, 64, 64\)"):
        model(pictures(1, 4, 64, 64))
    with pytest.raises(TypeError, match=r"floating-point pictures, got torch\.uint8"):
        model(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))


@each_family
def test_the_stem_alone(family):
    model, x = small(family), pictures()
    assert torch.equal(model.forward_stem(x), model.patch_embed(x))
    with pytest.raises(ValueError, match="takes pictures"):
        model.forward_stem(x[:, :1])
    with pytest.raises(TypeError, match="must be of the pictures' dtype"):
        model.forward_stem(x.double())


@each_family
def test_pictures_of_another_dtype(family):
    model, x = small(family), pictures()
    words = (
        "its weights are torch.{} and the pictures torch.{}; use x.to(torch.{}), "
        "model.to(torch.{}) or torch.autocast."
    )
    for own, given in (("float32", "float16"), ("bfloat16", "float64")):
        model.to(getattr(torch, own))
        with pytest.raises(TypeError, match="must be of the pictures' dtype") as caught:
            model(x.to(getattr(torch, given)))
        assert words.format(own, given, own, given) in str(caught.value)
        assert isinstance(caught.value.__cause__, RuntimeError)


def test_a_dtype_that_is_changed_on_the_way_is_nobodys_fault():
    """Hooks, wrappers that shard, and autocast cast between the model's entry and its stem."""
    model, x = small("nat"), pictures()
    model.patch_embed.register_forward_pre_hook(lambda _, given: (given[0].float(),))
    assert torch.equal(model(x.double()), model(x))
    plain = small("nat")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert plain(x.half()).shape == (2, 5)


def test_other_failures_of_the_stem_stay_as_they_are():
    model = small("nat")

    def fail(*_):
        raise RuntimeError("of another kind")

    model.patch_embed.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="of another kind"):
        model(pictures())


@pytest.mark.parametrize("family", ["isotropic", "vitrpb"])
def test_single_level_models_have_one_size(family):
    with pytest.raises(ValueError, match=r"takes 64 x 64 pictures only, got 64 x 80; .*img_size"):
        small(family)(pictures(1, 3, 64, 80))
    larger = small(family, img_size=96)
    assert larger(pictures(1, 3, 96, 96)).shape == (1, 5)
    assert larger.pretrained_cfg["input_size"] == (3, 96, 96)
    assert num_parameters(larger.config) == sum(p.numel() for p in larger.parameters())


# -- classifier ---------------------------------------------------------------------------------


@each_family
def test_reset_classifier(family):
    model, x = small(family), pictures()
    pooled = model.forward_head(model.forward_features(x), pre_logits=True)
    model.pretrained_cfg["label_names"] = list("abcde")
    model.reset_classifier(7)
    assert model(x).shape == (2, 7)
    assert model.get_classifier() is model.head
    assert model.num_classes == model.config.num_classes == 7
    assert model.pretrained_cfg["num_classes"] == 7
    assert "label_names" not in model.pretrained_cfg
    assert num_parameters(model.config) == sum(p.numel() for p in model.parameters())
    model.reset_classifier(0)
    assert torch.equal(model(x), pooled)
    assert isinstance(model.get_classifier(), nn.Identity)
    model.reset_classifier(0, global_pool="")
    assert torch.equal(model(x), model.forward_features(x))


def test_reset_classifier_follows_dtype_and_checks_first():
    model = small("nat").double()
    head = model.head
    for wrong in (-1, 2.5, True):
        with pytest.raises(ValueError, match="num_classes"):
            model.reset_classifier(wrong)
    with pytest.raises(ValueError, match="global_pool must be 'avg' or '', got 'max'"):
        model.reset_classifier(3, "max")
    assert model.head is head
    assert model.num_classes == 5
    model.reset_classifier(3)
    assert model.head.weight.dtype == torch.float64


def test_create_without_pooling():
    model = small("nat", num_classes=0, global_pool="")
    assert model(pictures()).shape == (2, 2, 2, 256)
    assert small("nat", num_classes=0)(pictures()).shape == (2, 256)


# -- training -----------------------------------------------------------------------------------


def gradients(model, x, checkpointing):
    model = copy.deepcopy(model).train()
    model.set_grad_checkpointing(checkpointing)
    torch.manual_seed(3)
    model(x).square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters()}


@each_family
def test_checkpointing_changes_no_gradient(family):
    model = small(family, drop_path_rate=0.4)
    plain, saved = (gradients(model, pictures(), flag) for flag in (False, True))
    assert plain.keys() == saved.keys()
    for name in plain:
        close(saved[name], plain[name], torch.float32, name, backward=True)


@each_family
def test_checkpointing_keeps_fewer_activations(family):
    model = small(family)

    def stored(flag):
        total = 0

        def pack(tensor):
            nonlocal total
            total += tensor.numel()
            return tensor

        model.set_grad_checkpointing(flag)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(pictures())
        return total

    assert stored(True) < stored(False) / 2


@each_family
def test_no_weight_decay_names_the_bias_tables(family):
    model = small(family)
    names = model.no_weight_decay()
    assert names <= {name for name, _ in model.named_parameters()}
    assert len(names) == sum(model.config.depths)
    assert all(name.endswith("attn.rpb") for name in names)


@each_family
@pytest.mark.parametrize("coarse", [False, True])
def test_group_matcher_orders_layers_from_input_to_output(family, coarse):
    model = small(family)
    matcher = model.group_matcher(coarse)
    rules = matcher["blocks"]
    rules = [(rules, None)] if isinstance(rules, str) else rules

    def group(name):
        if re.match(matcher["stem"], name):
            return (-1,)
        for pattern, suffix in rules:
            found = re.match(pattern, name)
            if found:
                return (*map(int, found.groups()), *(suffix or ()))
        return (float("inf"),)

    groups = {}
    for name, _ in model.named_parameters():
        groups.setdefault(group(name), []).append(name)
    single = family in ("isotropic", "vitrpb")
    blocks = sum(model.config.depths)
    if coarse:
        assert len(groups) == 2 + model.config.num_stages
    else:
        assert len(groups) == 3 + blocks + (0 if single else 3)
    running = [n for g in sorted(groups) for n in groups[g]]
    stage_of = [int(n.split(".")[1]) for n in running if n.startswith(model.stages_name)]
    assert stage_of == sorted(stage_of)
    for names in groups.values():
        assert not (
            any("downsample" in n for n in names) and any("blocks" in n for n in names)
        ) or (coarse)


def test_drop_path():
    x = torch.ones(4000, 3, 2)
    drop = DropPath(0.25)
    assert drop.eval()(x) is x
    torch.manual_seed(0)
    y = drop.train()(x)
    samples = y.flatten(1)
    assert (samples == samples[:, :1]).all()
    kept = samples[:, 0] != 0
    assert torch.equal(samples[kept], torch.full((int(kept.sum()), 6), 1 / 0.75))
    assert 0.70 < kept.float().mean() < 0.80
    assert DropPath(0.0).train()(x) is x


@each_family
@pytest.mark.parametrize("layer_scale", [None, 0.5])
def test_a_model_without_memory_is_filled_by_its_modules(family, layer_scale):
    """As sharded training begins: made on `meta`, given memory, each module asked to reset."""
    with torch.device("meta"):
        empty = small(family, layer_scale=layer_scale)
    filled = empty.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*filled.parameters(), *filled.buffers()):
            tensor.fill_(77)
    for module in filled.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    drawn = dict(small(family, layer_scale=layer_scale).named_parameters())
    for name, p in filled.named_parameters():
        assert not (p == 77).any(), name
        if "gamma" in name:
            assert torch.equal(p, drawn[name])
    for (name, x), (_, y) in zip(
        filled.named_buffers(), small(family).named_buffers(), strict=True
    ):
        assert torch.equal(x, y), name


@each_family
def test_initialisation(family):
    model = small(family, embed_dim=64 if family in HIERARCHICAL else 128)
    for name, p in model.named_parameters():
        if name.endswith("rpb") or (p.dim() == 2 and p.numel() > 4000):
            assert 0.01 < p.std() < 0.03, name
        if p.dim() == 2 or name.endswith("rpb"):
            assert p.abs().max() < 0.2, name
        if name.endswith("bias") and "patch_embed.proj" not in name:
            assert not p.any(), name
        if p.dim() == 1 and "norm" in name and name.endswith("weight"):
            assert (p == 1).all(), name
        if "gamma" in name:
            assert (p == 0.5).all(), name


# -- parts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(4, 6), (5, 6), (4, 7), (1, 1)])
def test_patch_merging_against_loops(size):
    merge = PatchMerging(3).double()
    x = torch.randn(2, *size, 3, dtype=torch.float64)
    height, width = (-(-side // 2) for side in size)
    joined = torch.zeros(2, height, width, 12, dtype=torch.float64)
    for place, (down, right) in enumerate([(0, 0), (1, 0), (0, 1), (1, 1)]):
        for row in range(height):
            for column in range(width):
                source = (2 * row + down, 2 * column + right)
                if source[0] < size[0] and source[1] < size[1]:
                    values = x[:, source[0], source[1]]
                    joined[:, row, column, 3 * place : 3 * place + 3] = values
    close(merge(x), merge.reduction(merge.norm(joined)), torch.float64)


@pytest.mark.parametrize("side", [1, 4, 7])
def test_dense_attention_is_neighborhood_attention_with_a_window_as_large_as_the_map(side):
    torch.manual_seed(0)
    dense = DenseAttention(24, 3, side).double()
    nn.init.normal_(dense.rpb)
    window = NeighborhoodAttention2D(24, 3, side, rel_pos_bias=True).double()
    state = dense.state_dict()
    state.pop("relative_position_index")
    window.load_state_dict(state, strict=True)
    x = torch.randn(2, side, side, 24, dtype=torch.float64)
    close(dense(x), window(x), torch.float64)


def test_dense_attention_refuses_an_index_outside_its_table():
    attention = DenseAttention(8, 2, 4)
    state = attention.state_dict()
    for wrong in (-1, 49):
        bad = state["relative_position_index"].clone()
        bad[3, 5] = wrong
        with pytest.raises(
            ValueError, match=r"relative_position_index must hold integers in 0..48"
        ):
            attention.load_state_dict({**state, "relative_position_index": bad})
    attention.load_state_dict(state, strict=True)


# -- the whole object -----------------------------------------------------------------------------


@each_family
def test_models_copy_and_reload_exactly(family):
    model, x = small(family), pictures()
    again = build_model(model.config, model.pretrained_cfg)
    assert again.name == model.name
    assert again.pretrained_cfg == model.pretrained_cfg == model.default_cfg
    again.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(again.eval()(x), model(x))
    assert torch.equal(copy.deepcopy(model)(x), model(x))


def test_build_model_without_facts():
    model = build_model(small("nat").config)
    assert model.name == model.pretrained_cfg["architecture"] == "nat"
    assert model.pretrained_cfg["input_size"] == (3, 224, 224)


@each_family
def test_float64_agrees_with_float32(family):
    model, x = small(family), pictures()
    single = model(x)
    close(single, model.double()(x.double()), torch.float32)
    assert (single - model(x.double())).abs().max() <= MODEL[torch.float32]


def test_saving_goes_through_the_hub(monkeypatch):
    calls = []

    class Hub:
        @staticmethod
        def save_pretrained(model, folder, **kwargs):
            calls.append(("save", model, folder, kwargs))

        @staticmethod
        def push_to_hub(model, repo_id, **kwargs):
            calls.append(("push", model, repo_id, kwargs))

    monkeypatch.setattr(zoo_base, "_hub", lambda: Hub)
    model = small("nat")
    model.save_pretrained("here", dtype="float16")
    model.push_to_hub("me/it", private=True)
    assert calls == [
        ("save", model, "here", {"dtype": "float16"}),
        ("push", model, "me/it", {"private": True}),
    ]
