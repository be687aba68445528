"""Every number of a training run, in one plain record, checked before anything is touched.

In: keyword arguments, perhaps over a named recipe. Out: a frozen `TrainConfig`, or a `ConfigError`
that states the rule, the value and the remedy.
"""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

from natcupy.train.recipes import recipe_fields
from natcupy.zoo.config import ConfigError

PRECISIONS = ("no", "fp16", "bf16")
SCHEDULES = ("cosine", "linear", "constant")
# What may differ between a run and its continuation: nothing that the numbers depend on.
FREE = ("output", "resume", "workers", "progress")
# What the checkpoint rules on: `epochs` may grow, the others change but for the items of a step.
RESTORED = ("epochs", "batch_size", "accumulate")


class TrainError(RuntimeError):
    """A run that cannot start or go on: why, and what to do. What was saved stays."""


def _whole(low: int, high: int) -> Callable[[Any], str]:
    def check(value: Any) -> str:
        fits = isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
        return "" if fits else f"must be a whole number in {low}..{high:,}"

    return check


def _number(low: float, high: float) -> Callable[[Any], str]:
    def check(value: Any) -> str:
        fits = isinstance(value, int | float) and not isinstance(value, bool)
        fine = fits and math.isfinite(value) and low <= value <= high
        return "" if fine else f"must be a number in {low:g}..{high:g}"

    return check


def _one_of(*known: str) -> Callable[[Any], str]:
    return lambda value: "" if value in known else f"must be one of {', '.join(map(repr, known))}"


def _maybe(check: Callable[[Any], str]) -> Callable[[Any], str]:
    return lambda value: "" if value is None else check(value) and f"{check(value)}, or None"


def _switch(value: Any) -> str:
    return "" if isinstance(value, bool) else "must be True or False"


def _span(low: float, high: float) -> Callable[[Any], str]:
    def check(value: Any) -> str:
        fits = isinstance(value, list | tuple) and len(value) == 2
        fine = fits and not any(map(_number(low, high), value)) and value[0] <= value[1]
        return "" if fine else f"must be two ascending numbers in {low:g}..{high:g}"

    return check


def _path(value: Any) -> str:
    fine = isinstance(value, str | os.PathLike) and os.fspath(value).strip()
    return "" if fine else "must be a folder's path"


def _policy(value: Any) -> str:
    fine = isinstance(value, str) and (not value or value.startswith(("rand-", "augmix-", "3a")))
    return "" if fine else "must be a policy of timm such as 'rand-m9-mstd0.5-inc1', or ''"


def _of(check: Callable[[Any], str], default: Any) -> Any:
    return field(default=default, metadata={"check": check})


@dataclass(frozen=True)
class TrainConfig:
    """How to train.

    Attributes:
        output: folder of the run: checkpoint, logs, plots and, at the end, `model`.
        recipe: the name of the recipe these numbers come from, for the log and the card; the
            numbers are set by `TrainConfig.of(recipe, ...)`.
        epochs: passes over the training pictures, warm-up included, cool-down not. With `resume`, a
            finished run may have more than it had: it goes on at the rates that a run of so many
            has there, which a cosine or linear schedule makes rise once.
        batch_size: pictures per process and forward pass. One step of the optimizer sees
            `batch_size * accumulate * processes` of them.
        accumulate: forward passes per step.
        lr, min_lr: of AdamW at its height and at the end, for one step however many pictures.
        schedule: how it falls, per step: "cosine" (half a wave), "linear" or "constant".
        warmup_epochs, warmup_lr: linear rise from this rate at the start; None: for a twentieth of
            the epochs.
        cooldown_epochs: epochs at `min_lr` after the others.
        weight_decay: of weights; biases, norms and other 1-D tensors are exempt.
        decay_bias_tables: decay the relative positional bias tables too.
        betas, eps: of AdamW.
        clip_grad: largest norm of the gradient; 0 does not clip.
        layer_decay: factor on the rate from each layer to the one before it; 1 for none.
        ema_decay: of the moving average of the weights, which is then what is examined and kept;
            0 keeps none.
        drop_path: stochastic depth of the last block; None leaves the model's own.
        label_smoothing: share of the target that is spread over all classes.
        mixup, cutmix: their alphas, 0 for none; `mix_prob` of a batch being mixed, `mix_switch` of
            CutMix rather than Mixup where both are on.
        auto_augment: a policy of timm, such as "rand-m9-mstd0.5-inc1"; colour jitter is then off.
        random_erasing: probability of erasing a rectangle.
        crop_scale, crop_ratio: area (share of the picture) and width / height of random crops.
        flip: probability of mirroring left and right; None means 0.5, but 0 for drawings (crop mode
            "ink"), which mean something else when mirrored.
        color_jitter: largest relative change of brightness, contrast and saturation.
        affine: size of small random turns, shears, scalings and shifts; None means 0.05 for
            drawings and 0 otherwise.
        interpolation: of random crops: "", the model's own; "random", bilinear or bicubic.
        mixed_precision: "no", "fp16" (GPUs) or "bf16".
        fsdp: shard parameters, gradients and optimizer over the processes (GPUs).
        grad_checkpointing: recompute activations in the backward pass: less memory, more time.
        channels_last: keep convolutions' weights in channels-last memory; not while sharded.
        head: "auto" keeps the classifier if its label names are those of the data, else makes
            another one, which has the rows of those classes that exactly one label name is of;
            "keep" insists on keeping it as it is, "fresh" on fresh rows alone.
        image_size: side of the pictures, in pixels; None for the model's own.
        keep: the weights of the "best" epoch on the held-out pictures, or of the "last" one. Best
            is the highest accuracy, mean IoU or box AP; of equals the lowest loss on the held-out
            pictures, or in training for tasks that measure no other; then the first.
        eval_every: epochs between examinations; the last epoch always has one.
        checkpoint_steps: steps between checkpoints within an epoch; 0: at the ends of epochs.
        seed: decides first weights of new heads, order, augmentation and dropped paths.
        workers: processes that read pictures, per process that trains; 0 for none; None: one for
            each processor that it may use, up to 8, beside a GPU; on a CPU only for processors that
            torch's threads leave free, so none where these take all.
        resume: continue the run in `output`, or start it where there is none. On another number of
            processes, change `batch_size` or `accumulate` so that a step sees as many pictures.
        progress: show a bar; None: where the output is a terminal.
    """

    output: str | os.PathLike[str] = field(metadata={"check": _path})
    recipe: str = _of(lambda v: "" if isinstance(v, str) else "must be a recipe's name", "")
    epochs: int = _of(_whole(1, 100_000), 20)
    batch_size: int = _of(_whole(1, 65_536), 32)
    accumulate: int = _of(_whole(1, 4096), 1)
    lr: float = _of(_number(1e-12, 10), 5e-4)
    min_lr: float = _of(_number(0, 10), 1e-6)
    schedule: str = _of(_one_of(*SCHEDULES), "cosine")
    warmup_epochs: float | None = _of(_maybe(_number(0, 100_000)), None)
    warmup_lr: float = _of(_number(0, 10), 1e-6)
    cooldown_epochs: int = _of(_whole(0, 100_000), 0)
    weight_decay: float = _of(_number(0, 10), 0.05)
    decay_bias_tables: bool = _of(_switch, False)
    betas: tuple[float, float] = _of(_span(0, 0.9999999), (0.9, 0.999))
    eps: float = _of(_number(1e-16, 1), 1e-8)
    clip_grad: float = _of(_number(0, 1e6), 5.0)
    layer_decay: float = _of(_number(0.01, 1), 0.8)
    ema_decay: float = _of(_number(0, 0.9999999), 0.0)
    drop_path: float | None = _of(_maybe(_number(0, 0.999)), None)
    label_smoothing: float = _of(_number(0, 0.999), 0.1)
    mixup: float = _of(_number(0, 100), 0.0)
    cutmix: float = _of(_number(0, 100), 0.0)
    mix_prob: float = _of(_number(0, 1), 1.0)
    mix_switch: float = _of(_number(0, 1), 0.5)
    auto_augment: str = _of(_policy, "")
    random_erasing: float = _of(_number(0, 1), 0.0)
    crop_scale: tuple[float, float] = _of(_span(0.001, 1), (0.35, 1.0))
    crop_ratio: tuple[float, float] = _of(_span(0.05, 20), (3 / 4, 4 / 3))
    flip: float | None = _of(_maybe(_number(0, 1)), None)
    color_jitter: float = _of(_number(0, 1), 0.1)
    affine: float | None = _of(_maybe(_number(0, 1)), None)
    interpolation: str = _of(_one_of("", "random"), "")
    mixed_precision: str = _of(_one_of(*PRECISIONS), "no")
    fsdp: bool = _of(_switch, False)
    grad_checkpointing: bool = _of(_switch, False)
    channels_last: bool = _of(_switch, True)
    head: str = _of(_one_of("auto", "keep", "fresh"), "auto")
    image_size: int | None = _of(_maybe(_whole(1, 8192)), None)
    keep: str = _of(_one_of("best", "last"), "best")
    eval_every: int = _of(_whole(1, 100_000), 1)
    checkpoint_steps: int = _of(_whole(0, 10**9), 0)
    seed: int = _of(_whole(0, 2**32 - 1), 0)
    workers: int | None = _of(_maybe(_whole(0, 1024)), None)
    resume: bool = _of(_switch, False)
    progress: bool | None = _of(_maybe(_switch), None)

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            rule = each.metadata["check"](value)
            if rule:
                raise ConfigError(f"{each.name} {rule}, got {value!r}.")
            if isinstance(value, list):
                object.__setattr__(self, each.name, tuple(value))
        object.__setattr__(self, "output", os.fspath(self.output))
        self._check_together()

    def _check_together(self) -> None:
        if self.warmup >= self.epochs:
            raise ConfigError(
                f"warmup_epochs must be fewer than epochs, got {self.warmup:g} of "
                f"{self.epochs}. Train longer or warm up shorter."
            )
        for name in ("min_lr", "warmup_lr"):
            if getattr(self, name) > self.lr:
                raise ConfigError(
                    f"{name} must not be above lr, got {getattr(self, name):g} and lr {self.lr:g}. "
                    f"Lower {name}."
                )
        if (self.mixup or self.cutmix) and self.batch_size % 2:
            raise ConfigError(
                f"batch_size must be even to mix pictures in pairs, got {self.batch_size}. "
                "Change it, or set mixup and cutmix to 0."
            )

    @property
    def warmup(self) -> float:
        """Epochs of warm-up."""
        return self.epochs / 20 if self.warmup_epochs is None else self.warmup_epochs

    @classmethod
    def of(cls, recipe: str = "", /, **changes: Any) -> TrainConfig:
        """The numbers of a named recipe, with some changed; unknown names are errors."""
        known = [each.name for each in fields(cls)]
        for name in changes:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}."
                raise ConfigError(f"a TrainConfig has no field {name!r}; {hint}")
        base = {"recipe": recipe, **recipe_fields(recipe)} if recipe else {}
        return cls(**{**base, **changes})

    def binding(self) -> dict[str, Any]:
        """The fields that a continuation must share, as JSON values."""
        return {
            each.name: list(value) if isinstance(value, tuple) else value
            for each in fields(self)
            if each.name not in FREE
            for value in (getattr(self, each.name),)
        }
