"""Parts of training: config, recipes, rates and groups, augmentation, states."""

import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from natcupy.cli import finetune_arguments
from natcupy.cli.parser import build_parser
from natcupy.data import Pictures, find
from natcupy.train import RECIPES, TrainConfig, TrainError, checkpoint, randomness
from natcupy.train import augment as augmenting
from natcupy.train.config import FREE
from natcupy.train.engine import _Engine
from natcupy.train.loading import prepare
from natcupy.train.optimizer import Average, make_optimizer, make_schedule, rate
from natcupy.train.task import Task
from natcupy.zoo import ModelConfig, build_model
from natcupy.zoo.config import ConfigError
from natcupy.zoo.preprocess import Preprocess

SMALL = ModelConfig(
    family="nat", embed_dim=8, depths=(1, 2), num_heads=(1, 2), kernel_size=3, num_classes=5
)


def config(**changes):
    return TrainConfig(**{"output": "somewhere", **changes})


# ---------------------------------------------------------------- config and recipes


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epochs", 0), ("epochs", 2.0), ("batch_size", True), ("lr", math.nan), ("lr", -1),
        ("schedule", "step"), ("betas", (0.9, 1.0)), ("betas", (0.999, 0.9)), ("flip", 1.5),
        ("crop_scale", (0.5,)), ("mixed_precision", "fp8"), ("layer_decay", 0), ("output", ""),
        ("auto_augment", "os.system"), ("seed", -1), ("resume", 1), ("image_size", 0),
        ("drop_path", 1.0), ("ema_decay", 1.0), ("progress", "yes"), ("head", "new"),
    ],
)  # fmt: skip
def test_every_field_is_checked(field, value):
    with pytest.raises(ConfigError, match=f"{field} must .*got"):
        config(**{field: value})


def test_fields_are_checked_together():
    with pytest.raises(ConfigError, match="warmup_epochs must be fewer"):
        config(epochs=2, warmup_epochs=2)
    with pytest.raises(ConfigError, match="min_lr must not be above"):
        config(lr=1e-4, min_lr=1e-3)
    with pytest.raises(ConfigError, match="batch_size must be even"):
        config(batch_size=3, mixup=0.2)
    with pytest.raises(ConfigError, match="did you mean 'epochs'"):
        TrainConfig.of(output="x", epoch=3)
    with pytest.raises(ConfigError, match="no recipe 'nat-in1'; did you mean 'nat-in1k'"):
        TrainConfig.of("nat-in1", output="x")


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_valid(name):
    made = TrainConfig.of(name, output="x", epochs=301)
    assert made.recipe == name and made.epochs == 301
    assert RECIPES[name].source


def test_recipe_of_the_papers():
    """The numbers of NAT's published script, in its own units."""
    made = TrainConfig.of("nat-in1k", output="x")
    assert (made.epochs, made.cooldown_epochs, made.warmup_epochs) == (300, 10, 20)
    assert (made.lr, made.min_lr, made.warmup_lr, made.weight_decay) == (1e-3, 5e-6, 1e-6, 0.05)
    assert (made.mixup, made.cutmix, made.random_erasing, made.clip_grad) == (0.8, 1.0, 0.25, 5.0)
    tuned = TrainConfig.of("dinat-22k-to-1k-384", output="x")
    assert (tuned.epochs, tuned.lr, tuned.weight_decay, tuned.image_size) == (30, 5e-5, 1e-10, 384)
    assert not (tuned.mixup or tuned.cutmix or tuned.warmup or tuned.cooldown_epochs)


def test_every_field_has_a_flag():
    fields = {field.name for field in dataclasses.fields(TrainConfig)}
    flags = {*finetune_arguments.FIELDS, *finetune_arguments.SPANS, "output", "resume", "recipe"}
    assert flags == fields
    assert tuple(RECIPES) == finetune_arguments.RECIPES
    words = ["finetune", "D", "--model", "nat-tiny", "--output", "o", "--no-fsdp", "--lr", "1e-3"]
    made = finetune_arguments.given(build_parser().parse_args([*words, "--crop-scale", "0.1", "1"]))
    assert made == {"output": "o", "resume": False, "fsdp": False, "lr": 1e-3,
                    "crop_scale": [0.1, 1.0]}  # fmt: skip
    TrainConfig.of(**made)
    assert set(FREE) <= fields


# ---------------------------------------------------------------- rates and groups


def test_rate():
    made = config(epochs=10, warmup_epochs=2, lr=1.0, min_lr=0.1, warmup_lr=0.2, cooldown_epochs=3)
    assert [rate(step, made, 10) for step in (0, 10)] == [0.2, pytest.approx(0.6)]
    assert rate(20, made, 10) == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi * 0.2)))
    assert rate(50, made, 10) == pytest.approx(0.55)
    assert rate(100, made, 10) == rate(129, made, 10) == pytest.approx(0.1)
    line = dataclasses.replace(made, schedule="linear")
    assert rate(75, line, 10) == pytest.approx(0.1 + 0.9 * 0.25)
    assert rate(75, dataclasses.replace(made, schedule="constant"), 10) == 1.0


def test_groups():
    """1-D tensors and bias tables are not decayed; deeper layers have larger rates."""
    model = build_model(SMALL)
    made = make_optimizer(model, config(lr=1.0, layer_decay=0.5, weight_decay=0.1))
    of = {id(p): group for group in made.param_groups for p in group["params"]}
    named = dict(model.named_parameters())
    assert len(of) == len(named)
    for name, parameter in named.items():
        decayed = parameter.ndim > 1 and not name.endswith(".rpb")
        assert of[id(parameter)]["weight_decay"] == (0.1 if decayed else 0.0), name
    lr = {name: of[id(p)]["lr"] for name, p in named.items()}
    ordered = [
        "patch_embed.proj.0.weight", "levels.0.blocks.0.mlp.fc1.weight",
        "levels.0.downsample.reduction.weight", "levels.1.blocks.0.attn.qkv.weight",
        "levels.1.blocks.1.attn.rpb", "norm.weight", "head.weight",
    ]  # fmt: skip
    assert [lr[name] for name in ordered] == [0.5**n for n in (4, 3, 3, 2, 1, 1, 0)]
    decayed = make_optimizer(model, config(decay_bias_tables=True, layer_decay=1.0))
    assert len(decayed.param_groups) == 2
    tables = {id(p) for name, p in named.items() if name.endswith(".rpb")}
    assert all(
        g["weight_decay"] for g in decayed.param_groups if tables & set(map(id, g["params"]))
    )


def test_schedule_scales_every_group():
    model = build_model(SMALL)
    made = config(lr=0.1, layer_decay=0.5, warmup_epochs=0, epochs=2)
    optimizer = make_optimizer(model, made)
    schedule = make_schedule(optimizer, made, 4)
    before = [group["lr"] for group in optimizer.param_groups]
    for _ in range(4):
        optimizer.step()
        schedule.step()
    factor = rate(4, made, 4) / 0.1
    after = [group["lr"] for group in optimizer.param_groups]
    assert after == pytest.approx([value * factor for value in before])


def test_average():
    """The average follows its formula, and lends itself to the model for a while."""
    layer = torch.nn.Linear(1, 1, bias=False)
    layer.weight.data.fill_(1.0)
    average = Average(layer, 0.9)
    expected = 1.0
    for step in range(1, 31):
        layer.weight.data.fill_(float(step))
        average.update(step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
    assert average.values[0].item() == pytest.approx(expected, rel=1e-6)
    with average.in_place():
        assert layer.weight.item() == average.values[0].item()
    assert layer.weight.item() == 30.0


# ---------------------------------------------------------------- sums and the best epoch


def test_sums_are_kept_without_a_wait_for_the_gpu():
    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            where = [x.device.type for x in tree_leaves((args, out)) if isinstance(x, torch.Tensor)]
            copies.extend([func] if len(set(where)) > 1 else [])
            return out

    copies, engine = [], SimpleNamespace(sums={})
    with FakeTensorMode(), Copies():
        loss = torch.zeros((), device="cuda", dtype=torch.bfloat16)
        for _ in range(2):
            _Engine._add(engine, "loss", loss, 3)
    assert engine.sums["loss"].device.type == "cuda" and not copies


@pytest.mark.parametrize(
    ("row", "best", "wanted"),
    [
        ((0.5, 1.0, 1.0), None, True), ((0.6, 9.0, 9.0), (0.5, 1.0, 1.0), True),
        ((0.4, 0.1, 0.1), (0.5, 1.0, 1.0), False), ((0.5, 0.9, 2.0), (0.5, 1.0, 1.0), True),
        ((0.5, 1.1, 0.1), (0.5, 1.0, 1.0), False), ((0.5, 1.0, 0.1), (0.5, 1.0, 1.0), False),
        ((0.5, None, 0.9), (0.5, None, 1.0), True), ((0.5, None, 1.0), (0.5, None, 1.0), False),
        ((None, None, 0.1), (0.5, 1.0, 1.0), False), ((None, None, 0.1), None, False),
    ],
)  # fmt: skip
def test_the_better_epoch(row, best, wanted):
    """By the metric, then the held-out loss, or that in training where there is no other."""

    def told(values):
        pairs = zip(("val_miou", "val_loss", "train_loss"), values, strict=True)
        return {name: value for name, value in pairs if value is not None}

    task = SimpleNamespace(metric="val_miou")
    assert Task.is_better(task, told(row), best and told(best)) is wanted


# ---------------------------------------------------------------- augmentation


def test_random_boxes_lie_inside():
    torch.manual_seed(0)
    for size in ((40, 30), (1, 1), (300, 2), (2, 300)):
        for _ in range(50):
            left, top, right, bottom = augmenting.random_box(size, (0.08, 1.0), (0.75, 4 / 3))
            assert 0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]
    areas = [np.prod(np.diff(np.reshape(augmenting.random_box((400, 400), (0.2, 0.3), (1, 1)),
             (2, 2)), axis=0)) / 160_000 for _ in range(20)]  # fmt: skip
    assert 0.19 < min(areas) and max(areas) < 0.31 and np.std(areas) > 0.01


def test_augmented_pictures():
    gradient = np.linspace(0, 255, 40)[None, :, None] * np.ones((30, 1, 3))
    picture = Image.fromarray(gradient.astype(np.uint8))
    recipe = Preprocess((3, 16, 24), crop_pct=1.0)
    plain = augmenting.Augment(
        recipe, config(crop_scale=(1, 1), crop_ratio=(4 / 3, 4 / 3), flip=0.0, color_jitter=0.0)
    )
    mirrored = augmenting.Augment(
        recipe, config(crop_scale=(1, 1), crop_ratio=(4 / 3, 4 / 3), flip=1.0, color_jitter=0.0)
    )
    assert torch.equal(
        plain(picture), recipe(picture.resize((24, 16), Image.Resampling.BICUBIC))[0]
    )
    assert torch.equal(mirrored(picture), plain(picture).flip(-1))
    varied = augmenting.Augment(recipe, config(affine=0.1, color_jitter=0.4))
    with randomness.drawn_from(1):
        one = varied(picture)
    with randomness.drawn_from(1):
        same = varied(picture)
    with randomness.drawn_from(2):
        other = varied(picture)
    assert torch.equal(one, same) and not torch.equal(one, other) and one.shape == (3, 16, 24)


def test_a_fourth_channel_is_transparency_as_in_use():
    """Band by band and unjittered: what is seen in training is what is seen afterwards."""
    picture = Image.new("RGBA", (40, 30), (200, 40, 10, 0))
    picture.paste((20, 90, 250, 255), (8, 5, 25, 20))
    recipe = Preprocess((4, 30, 40), crop_pct=1.0, mean=(0.5,) * 4, std=(0.5,) * 4)
    still = {"crop_scale": (1, 1), "crop_ratio": (4 / 3, 4 / 3), "flip": 0.0}
    made = augmenting.Augment(recipe, config(color_jitter=0.0, **still))
    for each in (picture, picture.convert("RGB"), picture.convert("L"), picture.convert("P")):
        assert torch.equal(made(each), recipe(each)[0])
    torch.manual_seed(0)
    varied = augmenting.Augment(recipe, config(color_jitter=0.4, **still))(picture)
    assert torch.equal(varied[3], recipe(picture)[0, 3])
    assert not torch.allclose(varied[:3], recipe(picture)[0, :3])
    for channels in (2, 5):
        numbers = (0.5,) * channels
        with pytest.raises(ConfigError, match=rf"1, 3 or 4 channels.*got {channels}"):
            augmenting.Augment(Preprocess((channels, 9, 9), mean=numbers, std=numbers), config())


def test_drawings_are_not_mirrored_or_cropped():
    ink = Preprocess((1, 32, 32), crop_mode="ink", mean=(0.2,), std=(0.35,), crop_pct=1.0)
    made = augmenting.Augment(ink, config(color_jitter=0.0))
    assert (made.flip, made.affine) == (0.0, 0.05)
    still = augmenting.Augment(ink, config(color_jitter=0.0, affine=0.0))
    drawing = Image.new("L", (60, 50))
    drawing.paste(255, (20, 10, 30, 40))
    assert torch.equal(still(drawing), ink(drawing)[0])
    with pytest.raises(ConfigError, match="auto_augment varies pictures of three channels"):
        augmenting.Augment(ink, config(auto_augment="rand-m9"))


def test_colour_stays_in_range_and_grey_stays_grey():
    torch.manual_seed(0)
    x = torch.rand(3, 8, 8)
    grey = torch.rand(1, 8, 8).expand(3, 8, 8)
    for _ in range(10):
        made = augmenting.jittered(x, 0.8)
        assert 0 <= made.min() and made.max() <= 1
        made = augmenting.jittered(grey, 0.8)
        assert torch.allclose(made[0], made[1], atol=1e-6)
    assert torch.equal(augmenting.jittered(x, 0.0).round(decimals=5), x.round(decimals=5))


# ---------------------------------------------------------------- models made ready


def test_prepare():
    made = build_model(SMALL)
    head = made.head.weight.clone()
    assert prepare(made, list("abcde"), config()) is made  # its rows had no names: made anew
    assert made.pretrained_cfg["label_names"] == list("abcde")
    first = made.head.weight.clone()
    assert not torch.equal(head, first)
    prepare(made, list("abcde"), config(drop_path=0.5, image_size=384))
    assert torch.equal(made.head.weight, first)
    assert made.levels[1].blocks[1].drop_path.rate == 0.5 == made.config.drop_path_rate
    assert made.pretrained_cfg["input_size"] == (3, 384, 384)
    assert made.pretrained_cfg["crop_pct"] == 1.0
    prepare(made, list("abcde"), config(head="fresh", seed=1))
    assert not torch.equal(made.head.weight, first)
    prepare(made, list("xy"), config())
    assert made.num_classes == 2
    with pytest.raises(ConfigError, match="a row per class, got 2 for 3"):
        prepare(made, list("xyz"), config(head="keep"))
    backbone = build_model(SMALL.replace(out_indices=(0, 1)))
    with pytest.raises(TrainError, match="gives feature maps"):
        prepare(backbone, list("xy"), config())
    fixed = ModelConfig(
        family="isotropic", embed_dim=8, depths=(1,), num_heads=(1,), kernel_size=3, img_size=32
    )
    with pytest.raises(ConfigError, match="image_size must be 32"):
        prepare(build_model(fixed), list("xy"), config(image_size=64))


def test_known_classes_keep_their_rows(caplog):
    """By name, in whatever order, spelled as a folder may be; where one row alone is meant."""

    def prepared(labels, classes, **how):
        made = build_model(SMALL.replace(num_classes=len(labels)), {"label_names": labels})
        torch.nn.init.normal_(made.head.bias)
        made.source = "somewhere"
        had = {label: made.head.weight[row].clone() for row, label in enumerate(labels)}
        biases = dict(zip(labels, made.head.bias.tolist(), strict=True))
        caplog.clear()
        prepare(made, classes, config(**how))
        assert made.pretrained_cfg["label_names"] == classes
        rows, kept = zip(made.head.weight, made.head.bias.tolist(), strict=True), []
        for row, bias in rows:
            kept += [label for label in labels if torch.equal(row, had[label])] or [None]
            assert kept[-1] is None or biases[kept[-1]] == bias
        return kept, caplog.text

    labels = ["ant", "Bee-eater", "cat, house cat", "crane", "crane"]
    kept, told = prepared(labels[:4], ["crane", "ant"])
    assert kept == ["crane", "ant"] and "keeps its rows of 2 classes by name (crane, ant)." in told
    kept, told = prepared(labels, ["bee_eater", "house cat", "crane", "dog"])
    assert kept == ["Bee-eater", "cat, house cat", None, None]
    assert "2 classes by name (bee_eater, house cat) and begins anew for 2: crane, dog." in told
    kept, told = prepared(labels, ["cat", "house cat", "ANT"])  # two claim one row
    assert kept == [None, None, "ant"]
    kept, told = prepared(labels, ["dog", "elk"])
    assert kept == [None, None] and "begins anew: the data's classes (dog, elk) are not the" in told
    assert prepared(labels, ["ant", "dog"], head="fresh") == ([None, None], "")


def test_a_head_of_ones_own_is_replaced():
    made = build_model(SMALL, {"label_names": list("abcde")})
    made.head = torch.nn.Sequential(made.head)
    prepare(made, ["a", "b"], config())
    assert made.head.weight.shape[0] == 2


# ---------------------------------------------------------------- states


def test_optimizer_state_comes_back():
    torch.manual_seed(0)
    model, other = build_model(SMALL), build_model(SMALL)
    other.load_state_dict(model.state_dict())
    made = config(layer_decay=0.7)
    one, two = make_optimizer(model, made), make_optimizer(other, made)
    x = torch.rand(2, 3, 32, 32)

    def step(model, optimizer):
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    step(model, one), step(model, one)
    state = checkpoint.whole(checkpoint.optimizer_tensors(model, one), True)
    assert set(state) == {f"{name}.{key}" for name, _ in model.named_parameters()
                          for key in ("exp_avg", "exp_avg_sq", "step")}  # fmt: skip
    checkpoint.load_weights(other, checkpoint.whole(model.state_dict().items(), True), "here")
    checkpoint.load_optimizer(other, two, state)
    step(model, one), step(other, two)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name
    with pytest.raises(TrainError, match=r"here must hold the tensors.*head\.bias"):
        lacking = {k: v for k, v in model.state_dict().items() if k != "head.bias"}
        checkpoint.load_weights(other, lacking, "here")


def test_drawings_on_a_transparent_ground(tmp_path):
    """In training they are what they are otherwise, though all their colours are one."""
    ink = Preprocess((1, 32, 32), crop_mode="ink", mean=(0.2,), std=(0.35,), crop_pct=1.0)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        drawing = Image.new("RGBA", (60, 50))
        drawing.paste((0, 0, 0, 255), (20, 10, 30, 40))
        drawing.save(tmp_path / name / "x.png")
    source = find(tmp_path, val_fraction=0.0).train
    still = augmenting.Augment(ink, config(color_jitter=0.0, affine=0.0))
    assert torch.equal(Pictures(source, still)[0][0], Pictures(source, ink)[0][0])
