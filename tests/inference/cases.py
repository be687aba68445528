"""What the tests of evaluate and predict share: a small model, pictures, how tables are read."""

import csv
import dataclasses
import json
from pathlib import Path

import pytest
import torch

from tests.pictures import noise

ROOT = Path(__file__).parents[2]
SETTINGS = {"batch_size": 5, "workers": 0, "part_pictures": 10}
LABELS = ("ant", "bee, honey bee", "cat", "dog", "eel", "fox", "gnu")


def small(labels=LABELS, classes=7):
    """A NAT with invented weights for pictures of 16 x 16, whose answers differ."""
    from natcupy.zoo import build_model
    from tests.hub.small import CONFIGS

    torch.manual_seed(0)
    model = build_model(dataclasses.replace(CONFIGS["nat"], num_classes=classes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
    model.pretrained_cfg |= {"input_size": (3, 16, 16), "crop_pct": 1.0}
    if labels:
        model.pretrained_cfg["label_names"] = list(labels)
    if classes:
        spread(model.eval())
    return model.eval()


@torch.no_grad()
def spread(model):
    """Shift the classifier so that random pictures get different answers."""
    pictures = torch.cat([model.preprocess(noise(seed)) for seed in range(100, 132)])
    pooled = model.forward_head(model.forward_features(pictures), pre_logits=True)
    model.head.weight /= pooled.std(0)
    model.head.bias.copy_(-model.head.weight @ pooled.mean(0))


def lines(path):
    if path.suffix == ".csv":
        with open(path, encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    return pytest.importorskip("pyarrow.parquet").read_table(path).to_pylist()


def free_port():
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
