"""nat-digits from nothing: draw the pictures, train the model, examine it, write it down.

In: a `Recipe`. Out: a trained model, its accuracy on every held-out set, and a folder that
`natcupy.from_pretrained` reads: config.json, model.safetensors (float16), README.md. A seed decides
everything: the pictures, the first weights, the order. On one machine with one set of versions and
threads the result repeats bit for bit; elsewhere, up to rounding.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from natcupy.digits.card import card
from natcupy.digits.datasets import SIDE, Pictures, examinations, training_pictures
from natcupy.hub import save_pretrained
from natcupy.zoo import ImageModel, ModelConfig, build_model

MEAN, STD = 0.2, 0.35

CONFIG = ModelConfig(
    family="nat",
    embed_dim=32,
    depths=(2, 2),
    num_heads=(2, 4),
    kernel_size=3,
    dilations=((1, 2), (1, 1)),
    mlp_ratio=2.0,
    num_classes=10,
    in_chans=1,
)
PRETRAINED_CFG = {
    "architecture": "nat_digits",
    "tag": "drawn",
    "license": "mit",
    "input_size": (1, SIDE, SIDE),
    "crop_pct": 1.0,
    "crop_mode": "ink",
    "interpolation": "bilinear",
    "mean": (MEAN,),
    "std": (STD,),
    "label_names": [str(digit) for digit in range(10)],
}


@dataclass(frozen=True)
class Recipe:
    """How the shipped weights were made.

    Attributes:
        pictures: drawn pictures; scikit-learn's training scans come on top.
        epochs, batch_size: passes over them, pictures per step.
        learning_rate, weight_decay: of AdamW; 200 steps of warm-up, then half a cosine to 0.
        smoothing: share of the target spread over all classes.
        seed: decides pictures, first weights and order.
    """

    pictures: int = 36_000
    epochs: int = 14
    batch_size: int = 256
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    smoothing: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("pictures", "epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, got {self.seed}.")


Report = Callable[[int, int, float], None]  # step, steps, loss


def train(recipe: Recipe, pictures: Pictures, report: Report | None = None) -> ImageModel:
    """A new model trained on `pictures`, rounded to what float16 weights can hold, in eval mode."""
    batch = min(recipe.batch_size, len(pictures))
    per_epoch = len(pictures) // batch
    steps = recipe.epochs * per_epoch
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = build_model(CONFIG, PRETRAINED_CFG).train()
        optimizer = _optimizer(model, recipe)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
        for step in range(steps):
            if step % per_epoch == 0:
                order = torch.randperm(len(pictures))
            chosen = order[step % per_epoch * batch :][:batch]
            logits = model(_normalised(_varied(_unit(pictures.images[chosen]))))
            loss = F.cross_entropy(
                logits, pictures.labels[chosen], label_smoothing=recipe.smoothing
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if report is not None:
                report(step + 1, steps, loss.item())
    return model.half().float().eval()


def examine(model: ImageModel, sets: Mapping[str, Pictures]) -> dict[str, float]:
    """The share of right answers on each set."""
    return {name: _accuracy(model, pictures) for name, pictures in sets.items()}


def write(
    model: ImageModel,
    folder: str | Path,
    recipe: Recipe,
    scores: dict[str, float],
    sizes: dict[str, int],
) -> Path:
    """config.json, model.safetensors and the card, into `folder`."""
    path = save_pretrained(model.half(), folder)
    model.float()
    digest = hashlib.sha256((path / "model.safetensors").read_bytes()).hexdigest()
    text = card(model.config, recipe, SIDE, scores, sizes, digest)
    (path / "README.md").write_text(text, encoding="utf-8")
    return path


def _optimizer(model: ImageModel, recipe: Recipe) -> torch.optim.Optimizer:
    spared = model.no_weight_decay()
    decayed, free = [], []
    for name, parameter in model.named_parameters():
        (free if parameter.dim() < 2 or name in spared else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": recipe.weight_decay},
        {"params": free, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate)


def _rate(step: int, steps: int) -> float:
    warm_up = min((step + 1) / 200, 1.0)
    return warm_up * 0.5 * (1 + math.cos(math.pi * step / steps))


def _unit(images: Tensor) -> Tensor:
    """Bytes `[N, H, W]` to floats `[N, 1, H, W]` in 0..1."""
    return images[:, None].float() / 255


def _normalised(x: Tensor) -> Tensor:
    return (x - MEAN) / STD


def _varied(x: Tensor) -> Tensor:
    """Each picture a little turned, slanted, stretched, moved; some batches bolder or lighter."""
    count = len(x)
    turn, slant = 0.06 * torch.randn(2, count)
    across, down = 1 + 0.05 * torch.randn(2, count)
    right, below = 0.05 * torch.randn(2, count)
    maps = torch.stack(
        [
            torch.stack([across * turn.cos(), slant - turn.sin(), right], dim=1),
            torch.stack([turn.sin(), down * turn.cos(), below], dim=1),
        ],
        dim=1,
    )
    grid = F.affine_grid(maps, list(x.shape), align_corners=False)
    x = F.grid_sample(x, grid, align_corners=False)
    kind = torch.rand(()).item()
    if kind < 0.15:
        x = F.max_pool2d(x, 3, 1, 1)
    elif kind < 0.3:
        x = -F.max_pool2d(-F.avg_pool2d(x, 3, 1, 1), 3, 1, 1)
    return (x * (1 + 0.1 * torch.randn(count, 1, 1, 1))).clamp(0, 1)


@torch.no_grad()
def _accuracy(model: ImageModel, pictures: Pictures) -> float:
    answers = [model(_normalised(_unit(part))).argmax(-1) for part in pictures.images.split(512)]
    return (torch.cat(answers) == pictures.labels).float().mean().item()


def make(recipe: Recipe, folder: str | Path, report: Report | None = None) -> dict[str, float]:
    """Everything in one go: pictures, training, examination, folder. Out: the accuracies."""
    model = train(recipe, training_pictures(recipe.pictures, recipe.seed), report)
    held_out = examinations()
    scores = examine(model, held_out)
    write(model, folder, recipe, scores, {name: len(each) for name, each in held_out.items()})
    return scores
