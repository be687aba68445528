"""Trains a very small UPerNet and Mask R-CNN on made scenes, and measures them on others.

In: nothing; `--task`, `--steps`, `--seed`, `--threads` are optional. Out: one JSON line per task
with the numbers of the run, also appended to `--record`; with `--pictures FOLDER` a sheet of
results.

    python benchmarks/dense_shapes.py --task segmentation --threads 2

Training scenes have seeds from 0 on, held-out ones from 1,000,000 on: they never meet.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch

from natcupy.zoo.dense import create_dense_model, shapes
from natcupy.zoo.dense.images import Frame
from natcupy.zoo.dense.metrics import average_precision, confusion, mean_iou
from natcupy.zoo.dense.rpn import ProposalRules

HELD_OUT = 1_000_000
SIDE = 128
BACKBONE = {
    "embed_dim": 32,
    "depths": (1, 1, 2, 1),
    "num_heads": (1, 2, 4, 8),
    "kernel_size": 5,
    "mlp_ratio": 2.0,
    "drop_path_rate": 0.0,
}
STEPS = {"segmentation": 250, "detection": 700}
BATCH = 8
RATE = 1e-3


def segmenter():
    """UPerNet with four classes and narrow heads."""
    return create_dense_model(
        "upernet_nat_mini", num_classes=4, channels=32, aux_channels=16, **BACKBONE
    )


def detector(name="mask_rcnn_nat_mini"):
    """Mask R-CNN with three classes and narrow heads."""
    model = create_dense_model(name, num_classes=3, channels=48, fc_channels=128, **BACKBONE)
    model.train_proposals = ProposalRules(per_level=300, most=300)
    return model


def batch(seeds, recipe):
    """Scenes as a model's input `[B, 3, H, W]`, and the scenes."""
    scenes = [shapes.make_scene(seed, SIDE, SIDE) for seed in seeds]
    return torch.cat([recipe.normalise(scene.pixels) for scene in scenes]), scenes


def losses(model, x, scenes, generator):
    """The losses of either task."""
    if model.config.task == "segmentation":
        return model.losses(x, torch.stack([scene.labels for scene in scenes]))
    frames = [Frame((SIDE, SIDE), (SIDE, SIDE))] * len(scenes)
    return model.losses(x, frames, [scene.objects for scene in scenes], generator)


def train(model, steps, seed, report=None):
    """AdamW with warm-up and a cosine, weight decay as in the papers. Returns the losses."""
    fixed = model.no_weight_decay()
    named = list(model.named_parameters())
    groups = [
        {"params": [p for n, p in named if n not in fixed], "weight_decay": 0.05},
        {"params": [p for n, p in named if n in fixed], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=RATE)
    warm = max(steps // 20, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * step / steps)),
    )
    generator = torch.Generator().manual_seed(seed)
    history = []
    model.train()
    for step in range(steps):
        first = (seed * steps + step) * BATCH
        x, scenes = batch(range(first, first + BATCH), model.recipe)
        total = losses(model, x, scenes, generator)
        loss = sum(total.values())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        schedule.step()
        history.append(loss.item())
        if report is not None and (step % 25 == 24 or step == 0):
            report(step + 1, {name: round(value.item(), 3) for name, value in total.items()})
    return history


@torch.no_grad()
def evaluate(model, count):
    """The task's measures on `count` held-out scenes, by the models' own way to results."""
    model.eval()
    scenes = [shapes.make_scene(HELD_OUT + index, SIDE, SIDE) for index in range(count)]
    results = [model.predict(scene.pixels) for scene in scenes]
    if model.config.task == "segmentation":
        matrix = sum(
            confusion(result.labels, scene.labels, 4)
            for result, scene in zip(results, scenes, strict=True)
        )
        mean, per_class = mean_iou(matrix)
        return {
            "miou": mean,
            "iou": dict(zip(shapes.SEGMENT_NAMES, per_class.tolist(), strict=True)),
        }
    truth = [scene.objects for scene in scenes]
    return {
        "box_ap50": average_precision(results, truth, (0.5,)),
        "box_ap": average_precision(results, truth),
        "mask_ap50": average_precision(results, truth, (0.5,), masks=True),
        "mask_ap": average_precision(results, truth, masks=True),
    }


def small_pictures(model):
    """The scenes' own size, not the papers', at test time."""
    model.pretrained_cfg |= {"long_side": SIDE, "short_side": SIDE}
    names = shapes.SEGMENT_NAMES if model.config.task == "segmentation" else shapes.NAMES
    model.pretrained_cfg["label_names"] = names
    return model


def run(task, steps, seed, held_out, quiet=False, name=None):
    """Train and measure one task; returns the model and the record of the run."""
    torch.manual_seed(seed)
    model = segmenter() if task == "segmentation" else detector(*([name] if name else []))
    model = small_pictures(model)
    start = time.perf_counter()
    report = None if quiet else lambda *line: print(*line, flush=True)
    history = train(model, steps, seed, report)
    trained = time.perf_counter()
    record = {
        "task": task,
        "model": model.name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": steps,
        "batch": BATCH,
        "seed": seed,
        "threads": torch.get_num_threads(),
        "first_loss": round(history[0], 4),
        "last_loss": round(sum(history[-20:]) / len(history[-20:]), 4),
        "train_seconds": round(trained - start, 1),
        "held_out": held_out,
        **evaluate(model, held_out),
    }
    return model, record | {"test_seconds": round(time.perf_counter() - trained, 1)}


def sheet(model, path, count=8):
    """Held-out scenes above, what the model makes of them below."""
    from PIL import Image

    from natcupy.zoo.dense.names import palette

    colours = torch.tensor(palette(4), dtype=torch.float32)
    top, bottom = [], []
    for index in range(count):
        scene = shapes.make_scene(HELD_OUT + index, SIDE, SIDE)
        result = model.predict(scene.pixels)
        picture = scene.pixels.float()
        if model.config.task == "segmentation":
            painted = torch.where(
                result.labels[..., None] > 0, 0.4 * picture + 0.6 * colours[result.labels], picture
            )
        else:
            painted = picture.clone()
            sure = result.above(0.5)
            for number in range(len(sure)):
                colour = colours[sure.labels[number] + 1]
                mask = sure.mask(number)
                painted[mask] = 0.4 * painted[mask] + 0.6 * colour
                x1, y1, x2, y2 = sure.boxes[number].round().long().clamp(0, SIDE - 1).tolist()
                painted[y1 : y2 + 1, [x1, x2]] = colour
                painted[[y1, y2], x1 : x2 + 1] = colour
        top.append(picture)
        bottom.append(painted)
    rows = [torch.cat(row, dim=1) for row in (top, bottom)]
    Image.fromarray(torch.cat(rows).round().byte().numpy()).save(path)


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--task", choices=[*STEPS, "all"], default="all")
    parser.add_argument("--model", help="another detector's name, as cascade_mask_rcnn_nat_mini")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--held-out", type=int, default=100)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--record", type=Path, help="JSON lines file to append to")
    parser.add_argument("--pictures", type=Path, help="folder for the sheets of results")
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    for task in STEPS if given.task == "all" else [given.task]:
        steps = given.steps or STEPS[task]
        model, record = run(task, steps, given.seed, given.held_out, name=given.model)
        line = json.dumps(record)
        print(line)
        if given.record:
            with given.record.open("a") as file:
                file.write(line + "\n")
        if given.pictures:
            given.pictures.mkdir(parents=True, exist_ok=True)
            sheet(model, given.pictures / f"shapes_{task}.png")


if __name__ == "__main__":
    main()
