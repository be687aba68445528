"""Finetuning of segmentation and detection models, from data to a model's folder.

In: a model or its name, `LabelledMaps` or `CocoPictures`, a `TrainConfig`. Out: a `DenseResult`; in
the folder of the run `model`, `log.csv`, `log.json` and `curves.png`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from natcupy.data.coco import CocoPictures
from natcupy.data.dense_augment import DetectionViews, SegmentationViews
from natcupy.data.label_maps import LabelledMaps
from natcupy.data.source import DataError
from natcupy.hub import dense as hub_dense
from natcupy.hub import from_pretrained
from natcupy.train import loading, plots, randomness, rows
from natcupy.train.config import TrainConfig, TrainError
from natcupy.train.detection import Detection
from natcupy.train.engine import Trained, train
from natcupy.train.finetuning import CURVES_PNG, _check_before, _statements, is_first, told_of
from natcupy.train.segmentation import Segmentation
from natcupy.zoo.config import ConfigError
from natcupy.zoo.dense import DenseModel, build_dense_model, create_dense_model
from natcupy.zoo.dense.upernet import IGNORE_INDEX
from natcupy.zoo.layers import Block, drop_path_rates

if TYPE_CHECKING:
    from natcupy.hub import Pushed

TASKS = {"segmentation": Segmentation, "detection": Detection}
_NO_MEANING = ("mixup", "cutmix", "auto_augment", "random_erasing")


@dataclass
class DenseResult:
    """What finetuning leaves.

    Attributes:
        model: on the CPU, in eval mode, with the weights that were kept.
        folder: of the run; the model's is `folder / "model"`.
        scores: of these weights on the held-out pictures, as fractions: `val_miou`, or
            `val_box_ap`, `val_mask_ap` and COCO's others; empty without held-out pictures.
        history: a row per epoch.
        epoch: whose weights were kept, counted from 1.
        peak_bytes, seconds: memory and time.
        pushed: where the model went on the Hub.
        main: whether this process wrote.
    """

    model: DenseModel
    folder: Path
    scores: dict[str, float]
    history: list[dict[str, Any]]
    epoch: int
    peak_bytes: int
    seconds: float
    pushed: Pushed | None = None
    main: bool = True


def load_dense(
    name: str, config: TrainConfig, *, pretrained: bool = True, backbone: str | None = None,
    **wishes: Any,
) -> DenseModel:  # fmt: skip
    """A segmentation or detection model to finetune, by name.

    Args:
        name: as `natcupy.from_pretrained` takes it; with `backbone` or without `pretrained`, a name
            of the zoo.
        config: for the seed of what is not in the weights.
        pretrained: False for fresh weights.
        backbone: a classifier (as `natcupy.from_pretrained` takes it) whose weights the backbone of
            an otherwise fresh model starts from, as the papers' models did.
        **wishes: overrides of the model.

    Raises TrainError for a model of another kind.
    """
    with randomness.drawn_from(config.seed, 4):
        if backbone is None and pretrained:
            model = from_pretrained(name, **wishes)
        else:
            model = create_dense_model(name, **wishes)
            model.pretrained_cfg.pop("label_names", None)  # its rows have learned no names
    if not isinstance(model, DenseModel):
        raise TrainError(
            f"this task trains a segmentation or detection model, got {name!r}, a classifier. "
            "`natcupy models` lists them."
        )
    if backbone is not None:
        classifier = from_pretrained(backbone)
        model.load_classifier(classifier.state_dict(), classifier.config)
        model.source = classifier.source
    return model


def prepare(model: nn.Module, classes: tuple[str, ...], config: TrainConfig) -> DenseModel:
    """The model with the classes, picture size and stochastic depth of the run.

    The model itself, or, where its classifiers cannot be kept, a copy with others: they have the
    rows of the classes that the model knows by name, and fresh ones.

    Raises ConfigError for a setting that means nothing here.
    """
    for field in _NO_MEANING:
        if getattr(config, field):
            raise ConfigError(
                f"{field} belongs to classification, got {getattr(config, field)!r}. Leave it out."
            )
    if not isinstance(model, DenseModel):
        raise TrainError(f"this task trains a dense model of the zoo, got {type(model).__name__}.")
    loading.check_dtype(model, config)
    model = _with_classes(model, classes, config)
    if config.image_size is not None:
        recipe = model.recipe
        long_side = max(round(recipe.long_side * config.image_size / recipe.short_side), 1)
        sides = {"long_side": long_side, "short_side": config.image_size}
        model.pretrained_cfg |= sides
    if config.drop_path is not None:
        inner = model.config.backbone.replace(drop_path_rate=config.drop_path)
        model.config = model.config.replace(backbone=inner)
        model.backbone.config = inner
        blocks = [module for module in model.backbone.modules() if isinstance(module, Block)]
        for block, rate in zip(blocks, drop_path_rates(inner), strict=True):
            block.drop_path.rate = rate
    return model


def _with_classes(model: DenseModel, classes: tuple[str, ...], config: TrainConfig) -> DenseModel:
    named = model.pretrained_cfg.get("label_names")
    fits = model.num_classes == len(classes)
    if config.head == "keep" and not fits:
        raise ConfigError(
            f"heads that are kept must have a row per class, got {model.num_classes} for "
            f"{len(classes)} classes. Set head to 'auto'."
        )
    same = fits and named is not None and tuple(named) == classes
    if config.head != "keep" and (config.head == "fresh" or not same):
        facts = {k: v for k, v in model.pretrained_cfg.items() if k not in ("tag", "label_names")}
        places = loading.known_rows(model, classes, config) if named is not None else {}
        with randomness.drawn_from(config.seed, 3):
            made = build_dense_model(
                model.config.replace(num_classes=len(classes)),
                {**facts, "num_classes": len(classes)},
            )
        _take_over(made, model, places)
        model = made
    model.pretrained_cfg["label_names"] = classes
    return model


def _take_over(made: DenseModel, model: DenseModel, places: rows.Places) -> None:
    """Give a new model what another has: weights, and how to train them; of classifiers, rows."""
    old = dict(model.named_parameters())
    whole = model.state_dict()
    heads = {name: whole.pop(name) for name in [*whole] if hub_dense.CLASSIFIERS.fullmatch(name)}
    made.load_state_dict(whole, strict=False)
    of_heads = {name: tensor for name, tensor in made.state_dict().items() if name in heads}
    rows.take_over(of_heads, heads, places, made.num_classes, model.num_classes)
    for name, parameter in made.named_parameters():
        if name in whole:
            parameter.requires_grad_(old[name].requires_grad)
    recomputes = any(getattr(m, "grad_checkpointing", False) for m in model.modules())
    made.set_grad_checkpointing(recomputes)
    made.source = getattr(model, "source", None)


def finetune_dense(
    model: nn.Module,
    train_data: LabelledMaps | CocoPictures,
    val_data: LabelledMaps | CocoPictures | None,
    config: TrainConfig,
    *,
    views: SegmentationViews | DetectionViews | None = None,
    data_name: str | None = None,
    push: str | None = None,
    private: bool | None = None,
    license: str | None = None,
    token: str | bool | None = None,
    command: dict[str, Any] | None = None,
) -> DenseResult:
    """Train a segmentation model on maps, or a detection model on objects; or continue to.

    Args:
        model: a `DenseModel` of the zoo. It is trained in place where its classifiers fit the
            data's classes; else a copy is, with others (`prepare`).
        train_data, val_data: with the same classes; `val_data` None for no examination.
        config: how, and where to; `image_size` is the shorter side.
        views: how pictures are varied; None: as in the papers' recipes, scaled to the model's size.
        data_name: of the data, for the card.
        push, private, license, token, command: as in `natcupy.train.finetune`.

    Raises:
        DataError: data and model do not belong together, or a picture cannot be read.
        ConfigError, TrainError, ValueError, HubError: as in `natcupy.train.finetune`.
    """
    _check_data(model, train_data, val_data)
    bare = prepare(model, tuple(train_data.classes), config)
    name = data_name or "own pictures"
    statements = _statements(name, license)
    if is_first():
        _check_before(bare, False, push, private, token, statements)
    task = TASKS[bare.config.task](bare.recipe, train_data, val_data, config, statements, views)
    facts = {"model": bare.config.to_dict(), "name": bare.name, "views": task.described()}
    return _finished(
        train(bare, task, config, facts, command), task, config, bare, name, push, private, token
    )


def _regular(model: DenseModel, config: TrainConfig) -> str:
    """In plain words, for the card."""
    text = f"stochastic depth {model.config.backbone.drop_path_rate:g}"
    text += f", clipping at {config.clip_grad:g}" if config.clip_grad else ""
    return text + (f", weight average {config.ema_decay:g}" if config.ema_decay else "")


def _check_data(model: nn.Module, train_data: Any, val_data: Any) -> None:
    kind = getattr(getattr(model, "config", None), "task", None)
    wanted = {"segmentation": LabelledMaps, "detection": CocoPictures}.get(kind)
    if wanted is None or not isinstance(train_data, wanted):
        raise DataError(
            f"a segmentation model is trained on LabelledMaps, a detection model on CocoPictures, "
            f"got {type(train_data).__name__} for {type(model).__name__}."
        )
    if kind == "segmentation" and len(train_data.classes) < 2:
        raise DataError(
            f"segmentation needs at least two classes, got {len(train_data.classes)}: "
            f"{', '.join(train_data.classes)}. In a map {IGNORE_INDEX} means no class: save the "
            "ground as 0 and the foreground as 1."
        )
    if val_data is not None and tuple(val_data.classes) != tuple(train_data.classes):
        raise DataError(
            f"held-out pictures must have the classes of the others, got {val_data.classes} and "
            f"{train_data.classes}. Name them in the same order."
        )
    if isinstance(train_data, CocoPictures) and not sum(train_data.counts()):
        raise DataError("the training pictures must have at least one object, got none in any.")


def _finished(
    trained: Trained,
    task: Segmentation | Detection,
    config: TrainConfig,
    bare: DenseModel,
    data_name: str,
    push: str | None,
    private: bool | None,
    token: str | bool | None,
) -> DenseResult:
    """Write the model's folder and the curves, push, and report."""
    kept = trained.model
    kept.source = getattr(bare, "source", None)
    result = DenseResult(
        model=kept,
        folder=trained.folder,
        scores=trained.scores,
        history=trained.history,
        epoch=trained.epoch,
        peak_bytes=trained.peak_bytes,
        seconds=trained.seconds,
        main=trained.main,
    )
    if not trained.main:
        return result
    told = told_of(trained, task, config, data_name, kept.source)
    told["regularisation"] = _regular(kept, config)
    plots.curves(trained.history, task.shown, trained.folder / CURVES_PNG)
    task.finish(kept, trained.folder, trained.scores, trained.found, told)
    if push:
        from natcupy.hub import push_to_hub

        result.pushed = push_to_hub(
            kept, push, private=private, token=token, training=told, **task.stated(trained.scores)
        )
    return result
