"""AdamW with its groups, the rate of every step, and the moving average of the weights.

In: a model and a `TrainConfig`. Out: a torch optimizer whose groups differ in rate (layer decay)
and weight decay, a torch schedule over steps, `Average`.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import get_ema_multi_avg_fn

from natcupy.train.config import TrainConfig, TrainError

WITH_PREVIOUS = 99999  # in timm's patterns: belongs to the layer before, as a downsampler does


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over the parameters that require gradients, with timm's rules for groups.

    1-D tensors, biases and what the model's `no_weight_decay` names are not decayed. With
    `layer_decay` d the last layer has the full rate and each layer before it d times the next one's
    (BEiT, arXiv 2106.08254, appendix; the layers are those of the model's `group_matcher`).
    """
    exempt: set[str] = set()
    if not config.decay_bias_tables and hasattr(model, "no_weight_decay"):
        exempt = set(model.no_weight_decay())
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not named:
        raise TrainError("a model must have parameters that require gradients, got none to train.")
    scales = rate_scales([name for name, _ in named], model, config.layer_decay)
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in named:
        plain = parameter.ndim < 2 or name.endswith(".bias") or name in exempt
        decay = 0.0 if plain else config.weight_decay
        group = groups.setdefault(
            (scales[name], decay),
            {"params": [], "lr": config.lr * scales[name], "weight_decay": decay},
        )
        group["params"].append(parameter)
    return torch.optim.AdamW(
        list(groups.values()), lr=config.lr, betas=config.betas, eps=config.eps
    )


def rate_scales(names: list[str], model: nn.Module, decay: float) -> dict[str, float]:
    """The factor on the rate of every parameter."""
    if decay == 1.0 or not hasattr(model, "group_matcher"):
        return dict.fromkeys(names, 1.0)
    keys = {name: _layer(name, model.group_matcher(coarse=False)) for name in names}
    order, number = {}, -1
    for key in sorted(set(keys.values())):
        number += key[-1] != WITH_PREVIOUS or not order
        order[key] = number
    return {name: decay ** (number - order[key]) for name, key in keys.items()}


def _layer(name: str, matcher: Mapping[str, Any]) -> tuple[float, ...]:
    """Where a parameter stands in the order of layers, as timm orders its groups."""
    for place, patterns in enumerate(matcher.values()):
        if isinstance(patterns, str):
            patterns = [(patterns, None)]
        for pattern, suffix in patterns:
            if match := re.match(pattern, name):
                numbers = [float(group) for group in match.groups() if group is not None]
                return (float(place), *numbers, *map(float, suffix or ()))
    return (math.inf,)


def make_schedule(
    optimizer: torch.optim.Optimizer, config: TrainConfig, steps_per_epoch: int
) -> LambdaLR:
    """Every group's rate as a factor, by the number of steps done."""
    return LambdaLR(optimizer, lambda step: rate(step, config, steps_per_epoch) / config.lr)


def rate(step: int, config: TrainConfig, steps_per_epoch: int) -> float:
    """The rate of step `step`, counted from 0: warm-up, fall, cool-down.

    The fall is that of the whole run without cool-down, which the warm-up covers the start of, as
    in timm.
    """
    rise = round(config.warmup * steps_per_epoch)
    last = config.epochs * steps_per_epoch
    if step < rise:
        return config.warmup_lr + (config.lr - config.warmup_lr) * step / rise
    if config.schedule == "constant":
        return config.lr
    done = min(step / last, 1.0)
    left = 1 - done if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return config.min_lr + (config.lr - config.min_lr) * left


class Average:
    """An exponential moving average of the parameters that train, kept beside the model.

    Args:
        model: as it is trained, sharded or not: the average is held the same way.
        decay: of the average, per step; early on less, (1 + t) / (10 + t), so that the first
            weights are soon forgotten.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._decay = decay
        self._live = [p for p in model.parameters() if p.requires_grad]
        self.names = [name for name, p in model.named_parameters() if p.requires_grad]
        self.values: list[Tensor] = [p.detach().clone() for p in self._live]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after step `step`, counted from 1."""
        decay = min(self._decay, (1 + step) / (10 + step))
        get_ema_multi_avg_fn(decay)(self.values, [p.detach() for p in self._live], step)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """The model has the average for weights inside."""
        kept = [p.detach().clone() for p in self._live]
        self._set(self.values)
        try:
            yield
        finally:
            self._set(kept)

    @torch.no_grad()
    def _set(self, values: list[Tensor]) -> None:
        for parameter, value in zip(self._live, values, strict=True):
            parameter.copy_(value)
