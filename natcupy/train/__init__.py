"""Training: a model, pictures and a `TrainConfig` come in; a finetuned model's folder goes out.

    from natcupy.train import TrainConfig, finetune
    result = finetune(model, split.train, split.val, TrainConfig(output="runs/flowers", epochs=10))

The rooms: `config` and `recipes` hold the numbers, `task` says what a model is trained for
(`classification` is the first), `engine` is the loop on accelerate, with `machine`, `optimizer`,
`loaders`, `augment`, `timm_parts` and `randomness` as its parts; `loading` fits a model to the
data, `checkpoint` and `run` write to disk, `plots` draws, `finetuning` puts it together. Needs the
extra "train".
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_WHERE = {
    "RECIPES": "recipes",
    "Classification": "classification",
    "Result": "finetuning",
    "Task": "task",
    "TrainConfig": "config",
    "TrainError": "config",
    "finetune": "finetuning",
    "load_model": "loading",
    "train": "engine",
}
__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(import_module(f"natcupy.train.{_WHERE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
