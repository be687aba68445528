"""Trains a very small UPerNet and Mask R-CNN on made scenes, and measures them on others.

In: nothing; `--task`, `--epochs`, `--seed`, `--threads` are optional. Out: one JSON line per task
with the numbers of the run, also appended to `--record`; the run's folder under `--runs`; with
`--pictures FOLDER` what the model makes of held-out scenes.

    python -m benchmarks.dense_shapes --task segmentation --threads 2

The scenes are written to disk, as a folder of masks or a COCO file, and trained on by
`natcupy.train`, as anybody's data. Training scenes have seeds from 0 on, held-out ones from
1,000,000 on: they never meet.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from natcupy.cli.painting import paint_detections, paint_segmentation
from natcupy.data.coco import CocoPictures
from natcupy.data.coco_ap import encode_mask
from natcupy.data.dense_augment import DetectionViews, SegmentationViews
from natcupy.data.label_maps import find_maps
from natcupy.train import TrainConfig
from natcupy.train.dense_finetuning import finetune_dense
from natcupy.train.run import environment
from natcupy.zoo.dense import create_dense_model, shapes
from natcupy.zoo.dense.rpn import ProposalRules

HELD_OUT = 1_000_000
SIDE = 96
BACKBONE = {
    "embed_dim": 32,
    "depths": (1, 1, 2, 1),
    "num_heads": (1, 2, 4, 8),
    "kernel_size": 5,
    "mlp_ratio": 2.0,
    "drop_path_rate": 0.0,
}
SCENES = {"segmentation": 3200, "detection": 800}
EPOCHS = {"segmentation": 4, "detection": 3}
RATES = {"segmentation": 2e-3, "detection": 1.5e-3}
BATCH = {"segmentation": 8, "detection": 4}


def write_maps(folder: Path, seeds: range) -> None:
    """Scenes as `folder/images` and `folder/masks`, and `classes.txt`; once."""
    if (folder / "classes.txt").is_file():
        return
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        scene = shapes.make_scene(seed, SIDE, SIDE)
        Image.fromarray(scene.pixels.numpy()).save(folder / f"images/{seed}.png")
        labels = Image.fromarray(scene.labels.numpy().astype(np.uint8))
        labels.save(folder / f"masks/{seed}.png")
    (folder / "classes.txt").write_text("\n".join(shapes.SEGMENT_NAMES) + "\n")


def write_coco(folder: Path, seeds: range) -> Path:
    """Scenes as `folder/images` and `folder/objects.json`; the path of the latter; once."""
    path = folder / "objects.json"
    if path.is_file():
        return path
    (folder / "images").mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for seed in seeds:
        scene = shapes.make_scene(seed, SIDE, SIDE)
        name = f"{seed}.png"
        Image.fromarray(scene.pixels.numpy()).save(folder / "images" / name)
        images.append({"id": seed, "file_name": name, "height": SIDE, "width": SIDE})
        objects = scene.objects
        for box, label, mask in zip(objects.boxes, objects.labels, objects.masks, strict=True):
            x1, y1, x2, y2 = box.tolist()
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": seed,
                    "category_id": int(label) + 1,
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": int(mask.sum()),
                    "iscrowd": 0,
                    "segmentation": encode_mask(mask),
                }
            )
    categories = [{"id": number, "name": name} for number, name in enumerate(shapes.NAMES, 1)]
    path.write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": categories})
    )
    return path


def data(task: str, folder: Path, train: int, held_out: int):
    """The training and held-out scenes on disk."""
    parts = {"train": range(train), "val": range(HELD_OUT, HELD_OUT + held_out)}
    if task == "detection":
        return tuple(CocoPictures(write_coco(folder / part, r)) for part, r in parts.items())
    for part, seeds in parts.items():
        write_maps(folder / part, seeds)
    found = find_maps(folder)
    return found["train"], found["val"]


def small_model(task: str, name: str | None = None):
    """A narrow model of the task that takes the scenes at their own size."""
    if task == "segmentation":
        model = create_dense_model(
            name or "upernet_nat_mini", num_classes=4, channels=48, aux_channels=24, **BACKBONE
        )
        model.pretrained_cfg["label_names"] = shapes.SEGMENT_NAMES
    else:
        model = create_dense_model(
            name or "mask_rcnn_nat_mini", num_classes=3, channels=48, fc_channels=128, **BACKBONE
        )
        model.train_proposals = ProposalRules(per_level=200, most=100)
        model.pretrained_cfg["label_names"] = shapes.NAMES
    model.pretrained_cfg |= {"long_side": SIDE, "short_side": SIDE}
    return model


VIEWS = {
    "segmentation": SegmentationViews(SIDE, SIDE, (0.9, 1.1), (SIDE, SIDE), photometric=False),
    "detection": DetectionViews((SIDE,), SIDE, cut_short_sides=()),
}


def run(task: str, given: argparse.Namespace, output: Path, place: Path):
    """Train and measure one task; returns the model and the record of the run."""
    train, val = data(task, place, given.scenes or SCENES[task], given.held_out)
    torch.manual_seed(given.seed)
    model = small_model(task, given.model)
    config = TrainConfig(
        output=output,
        epochs=given.epochs or EPOCHS[task],
        batch_size=BATCH[task],
        lr=RATES[task],
        min_lr=0.0,
        layer_decay=1.0,
        keep="last",
        eval_every=given.epochs or EPOCHS[task],
        seed=given.seed,
        workers=0,
        head="keep",
        checkpoint_steps=50,
        resume=True,
    )
    result = finetune_dense(model, train, val, config, views=VIEWS[task], data_name="made scenes")
    return result.model, {
        "task": task,
        "model": model.name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "scenes": len(train),
        "side": SIDE,
        "epochs": config.epochs,
        "batch": BATCH[task],
        "seed": given.seed,
        "threads": torch.get_num_threads(),
        "seconds": round(result.seconds, 1),
        "held_out": given.held_out,
        **{name: round(value, 4) for name, value in result.scores.items()},
        "environment": environment(),
    }


def picture(model, seed: int) -> Image.Image:
    """What a model makes of a held-out scene."""
    pixels = shapes.make_scene(seed, SIDE, SIDE).pixels.numpy()
    result = model.predict(pixels)
    if model.config.task == "segmentation":
        return paint_segmentation(pixels, result)
    return paint_detections(pixels, result.above(0.5))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--task", choices=[*SCENES, "all"], default="all")
    parser.add_argument("--model", help="another model's name, as cascade_mask_rcnn_nat_mini")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--scenes", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--held-out", type=int, default=100)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--runs", type=Path, help="keep the runs here, and continue what is there")
    parser.add_argument("--record", type=Path, help="JSON lines file to append to")
    parser.add_argument("--pictures", type=Path, help="folder for pictures of results")
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    for task in SCENES if given.task == "all" else [given.task]:
        with tempfile.TemporaryDirectory() as place:
            root = (given.runs or Path(place)) / task
            model, record = run(task, given, root / "run", root / "data")
        line = json.dumps(record)
        print(line)
        if given.record:
            with given.record.open("a") as file:
                file.write(line + "\n")
        if given.pictures:
            given.pictures.mkdir(parents=True, exist_ok=True)
            for number in range(4):
                drawn = picture(model, HELD_OUT + number)
                drawn.save(given.pictures / f"shapes-{task}-{number}.png")


if __name__ == "__main__":
    main()
