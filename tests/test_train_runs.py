"""Whole runs: finetuned, interrupted, continued, shared between processes, and refused."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import natcupy
from natcupy.data import find
from natcupy.train import TrainConfig, finetune
from natcupy.zoo import ModelConfig, build_model

pytest.importorskip("accelerate", reason="training needs accelerate: pip install 'natcupy[train]'")

ROOT = Path(__file__).parent.parent
TINY = ModelConfig(
    family="nat", embed_dim=8, depths=(1, 1), num_heads=(1, 2), kernel_size=3, num_classes=3,
    mlp_ratio=2.0,
)  # fmt: skip
FACTS = {"input_size": (3, 16, 16), "crop_pct": 1.0}


def tiny():
    torch.manual_seed(0)
    return build_model(TINY, FACTS)


def config(output, **changes):
    usual = {"epochs": 2, "batch_size": 6, "lr": 5e-3, "workers": 0, "layer_decay": 1.0}
    return TrainConfig(**{"output": output, **usual, **changes})


@pytest.fixture(scope="module")
def stripes(tmp_path_factory):
    """Three classes of pictures that differ in the direction of their stripes."""
    root, draw = tmp_path_factory.mktemp("stripes"), np.random.default_rng(0)
    y, x = np.mgrid[:20, :20]
    for name, wave in (("across", y), ("down", x), ("slanted", x + y)):
        (root / name).mkdir()
        for index in range(16):
            values = (
                128 + 90 * np.sin(wave * 1.2 + draw.uniform(0, 6.3)) + draw.normal(0, 20, x.shape)
            )
            picture = Image.fromarray(values.clip(0, 255).astype(np.uint8))
            picture.save(root / name / f"{index:02}.png")
    return root


@pytest.fixture(scope="module")
def done(stripes, tmp_path_factory):
    """One finished run."""
    output = tmp_path_factory.mktemp("done") / "run"
    return finetune(tiny(), stripes, None, config(output, **LONG))


LONG = {"epochs": 3, "checkpoint_steps": 3, "ema_decay": 0.9, "accumulate": 2, "drop_path": 0.1,
        "batch_size": 4}  # fmt: skip


def weights(folder):
    return load_file(folder / "model" / "model.safetensors")


def same(one, other):
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def settled(path):
    """The rows of a log without what depends on the clock."""
    with open(path) as file:
        rows = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if k not in ("seconds", "items_per_s", "peak_bytes")}
            for row in rows]  # fmt: skip


# ---------------------------------------------------------------- a run


def test_a_run_leaves_everything(done, stripes):
    """Folder, logs, plots, card; the model loads and knows names and pictures."""
    rows = settled(done.folder / "log.csv")
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert json.loads((done.folder / "log.json").read_text())["epochs"] == done.history
    for name in ("curves.png", "confusion.png"):
        with Image.open(done.folder / name) as picture:
            assert picture.format == "PNG" and picture.width > 300
    model = natcupy.from_pretrained(done.folder / "model")
    assert model.pretrained_cfg["label_names"] == ["across", "down", "slanted"]
    assert model.pretrained_cfg["input_size"] == (3, 16, 16)
    same(dict(model.state_dict()), dict(done.model.state_dict()))
    picture = stripes / "down" / "00.png"
    assert torch.equal(model(model.preprocess(picture)), done.model(model.preprocess(picture)))
    card = (done.folder / "model" / "README.md").read_text()
    told = ("## Training", "42 to train on, 6 held out", "AdamW, learning rate 0.005", "accuracy")
    for words in (*told, f"natcupy {natcupy.__version__}", "3 classes"):
        assert words in card, words
    assert done.peak_bytes > 1e7 and done.seconds > 0


def test_scores_are_those_of_the_kept_model(done, stripes):
    """The accuracy reported is that of the saved model on the held-out pictures, counted anew."""
    val = find(stripes).val
    model = natcupy.from_pretrained(done.folder / "model")
    counts = np.zeros((3, 3), dtype=int)
    with torch.no_grad():
        for index in range(len(val)):
            answer = model(model.preprocess(val.open(index))).argmax().item()
            counts[val.label(index), answer] += 1
    assert np.array_equal(done.confusion, counts)
    assert done.scores["val_accuracy"] == counts.trace() / counts.sum()
    assert done.scores["val_accuracy"] == max(row["val_accuracy"] for row in done.history)


def test_it_learns(stripes, tmp_path):
    """Fresh weights learn the direction of stripes."""
    result = finetune(
        tiny(), stripes, None,
        config(tmp_path / "run", epochs=15, flip=0.0, crop_scale=(0.7, 1), lr=1e-2),
    )  # fmt: skip
    assert result.scores["val_accuracy"] == 1.0
    assert result.history[-1]["train_loss"] < result.history[0]["train_loss"] - 0.3


def test_what_the_caller_has_stays(stripes, tmp_path):
    """No generator of the caller's is touched; last weights without held-out pictures."""
    model, train = tiny(), find(stripes, val_fraction=0).train
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    result = finetune(model, train, None, config(tmp_path / "run", epochs=1))
    assert torch.equal(torch.rand(3), expected)
    assert result.scores == {} and result.confusion is None and result.epoch == 1
    assert "val_loss" not in result.history[0]


def test_memory_switches_do_not_change_the_result(stripes, tmp_path):
    plain = finetune(tiny(), stripes, None, config(tmp_path / "a", epochs=1))
    other = finetune(
        tiny(), stripes, None,
        config(tmp_path / "b", epochs=1, grad_checkpointing=True, channels_last=False, workers=2),
    )  # fmt: skip
    for name, tensor in plain.model.state_dict().items():
        torch.testing.assert_close(other.model.state_dict()[name], tensor, rtol=1e-3, atol=1e-5)


def test_half_precision(stripes, tmp_path):
    result = finetune(
        tiny(), stripes, None, config(tmp_path / "run", epochs=1, mixed_precision="bf16")
    )
    assert next(result.model.parameters()).dtype == torch.float32
    assert np.isfinite(result.history[0]["train_loss"])


# ---------------------------------------------------------------- interrupted and continued

CHILD = """
import sys, torch
torch.set_num_threads(1)
sys.path.insert(0, {tests!r})
from test_train_runs import LONG, config, tiny
from natcupy.train import finetune
if __name__ == "__main__":
    finetune(tiny(), sys.argv[1], None, config(sys.argv[2], resume=True, **LONG))
"""


def child(stripes, output, **environment):
    return subprocess.Popen(
        [sys.executable, "-c", CHILD.format(tests=str(ROOT / "tests")), str(stripes), str(output)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


class StoppedError(Exception):
    pass


@pytest.fixture
def stop_at(monkeypatch):
    """Make a run stop with an exception after so many steps."""
    from natcupy.train import engine

    step = engine._Engine._step

    def arm(count):
        left = [count]

        def counted(self, batches):
            if not left[0]:
                raise StoppedError
            left[0] -= 1
            return step(self, batches)

        monkeypatch.setattr(engine._Engine, "_step", counted)

    yield arm


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_continued_anywhere(stripes, tmp_path, stop_at, one_thread):
    """Stopped before the first step, within an epoch, between two: the same bits in the end."""
    expected = finetune(tiny(), stripes, None, config(tmp_path / "whole", **LONG))
    output = tmp_path / "run"
    for steps in (0, 2, 5, 4):
        stop_at(steps)
        with pytest.raises(StoppedError):
            finetune(tiny(), stripes, None, config(output, resume=True, **LONG))
    stop_at(10**9)
    result = finetune(tiny(), stripes, None, config(output, resume=True, **LONG))
    same(weights(output), weights(tmp_path / "whole"))
    assert settled(output / "log.csv") == settled(tmp_path / "whole" / "log.csv")
    assert result.scores == expected.scores
    again = finetune(tiny(), stripes, None, config(output, resume=True, **LONG))
    assert again.scores == result.scores  # nothing left to do
