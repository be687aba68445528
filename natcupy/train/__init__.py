"""Training: a model, pictures and a `TrainConfig` come in; a finetuned model's folder goes out.

    from natcupy.train import TrainConfig, finetune
    result = finetune(model, split.train, split.val, TrainConfig(output="runs/flowers", epochs=10))

The rooms: `config` and `recipes` hold the numbers, `task` says what a model is trained for
(`classification` is the first), `engine` is the loop on accelerate, with `machine`, `optimizer`,
`loaders`, `augment`, `timm_parts` and `randomness` as its parts; `loading` fits a model to the
data and `rows` its classifier to the classes, `checkpoint` and `run` write to disk, `plots` draws,
`finetuning` puts it together. Needs the extra "train".
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from natcupy.train.classification import Classification
    from natcupy.train.config import TrainConfig, TrainError
    from natcupy.train.engine import train
    from natcupy.train.finetuning import Result, finetune
    from natcupy.train.loading import load_model
    from natcupy.train.recipes import RECIPES
    from natcupy.train.task import Task

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
__all__ = [
    "RECIPES",
    "Classification",
    "Result",
    "Task",
    "TrainConfig",
    "TrainError",
    "finetune",
    "load_model",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(import_module(f"natcupy.train.{_WHERE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
