"""Finetuning, examined: accuracy on real pictures, kills, processes; on a GPU also speed.

In: which parts to run. Out: `benchmarks/results/train-DEVICE-DATE.json`, its parts replaced one by
one, so that they can be run at different times of a day.

    python -m benchmarks.train digits kills processes
    python -m benchmarks.train amp throughput        # need a CUDA GPU

digits: scikit-learn's scans (1797, of which `natcupy.digits` holds out a stratified fifth that the
bundled model never saw): the bundled model finetuned to two labels it does not know, and a smaller
model trained from fresh weights on the ten digits. kills: a run killed by SIGKILL at random moments
against one left alone. processes: two processes against one, 20 steps. amp: one finetuning under
bfloat16 with the CUDA kernels and with backend "torch". throughput: NAT-Tiny beside timm's
Swin-Tiny, ImageNet shapes, synthetic pictures, forward, backward and AdamW.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks import record
from natcupy import backends
from natcupy.digits.datasets import HELD_OUT_PART, SPLIT_SEED
from natcupy.train import Result, TrainConfig, finetune
from natcupy.train.run import peak_memory
from natcupy.zoo import ImageModel, ModelConfig, build_model

ROOT = Path(__file__).parent.parent
SCRATCH = ModelConfig(
    family="nat", embed_dim=16, depths=(2, 2), num_heads=(1, 2), kernel_size=3,
    mlp_ratio=2.0, num_classes=10, in_chans=1,
)  # fmt: skip
PICTURES = {"input_size": (1, 32, 32), "crop_pct": 1.0, "crop_mode": "ink", "mean": (0.2,),
            "std": (0.35,), "interpolation": "bilinear"}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train", description=__doc__)
    parser.add_argument("parts", nargs="+", choices=PARTS, metavar="PART")
    parser.add_argument("--out", type=Path, help="default: in benchmarks/results")
    parser.add_argument("--epochs", type=int, nargs=2, default=(4, 12), metavar=("TUNE", "SCRATCH"))
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    made = record.new("train", device)
    path = arguments.out or record.path_of(made)
    with contextlib.suppress(OSError):
        made["parts"] = json.loads(path.read_text())["parts"]
    for name in arguments.parts:
        with tempfile.TemporaryDirectory() as place:
            begun = time.perf_counter()
            part = PARTS[name](arguments, Path(place))
        part["seconds"] = time.perf_counter() - begun
        made.setdefault("parts", {})[name] = part
        record.write(path, made)
        print(name, part, flush=True)


# ---------------------------------------------------------------- accuracy


def digits(arguments: argparse.Namespace, place: Path) -> dict[str, Any]:
    """Held-out accuracy of a finetuned and of a fresh model."""
    tune, scratch = arguments.epochs
    parity = draw(place / "parity", lambda digit: ("even", "odd")[digit % 2])
    config = TrainConfig(
        place / "tuned", epochs=tune, batch_size=32, lr=1e-3, seed=arguments.seed, workers=0
    )
    tuned = finetune("nat-digits", parity, parity, config)
    ten = draw(place / "ten", str)
    fresh = TrainConfig(
        place / "fresh", epochs=scratch, batch_size=32, lr=3e-3, layer_decay=1.0, ema_decay=0.99,
        seed=arguments.seed, workers=0,
    )  # fmt: skip
    torch.manual_seed(arguments.seed)
    model = build_model(SCRATCH, PICTURES)
    return {
        "parity_from_nat_digits": told(tuned, config),
        "ten_digits_from_scratch": told(finetune(model, ten, ten, fresh), fresh),
    }


def draw(folder: Path, name: Callable[[int], str]) -> Path:
    """scikit-learn's digits as PNG files, a folder per label, in `train` and `val`."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    train, val = train_test_split(
        np.arange(len(data.target)), test_size=HELD_OUT_PART, random_state=SPLIT_SEED,
        stratify=data.target,
    )  # fmt: skip
    for part, indices in (("train", train), ("val", val)):
        for index in indices:
            home = folder / part / name(int(data.target[index]))
            home.mkdir(parents=True, exist_ok=True)
            pixels = (data.images[index] * (255 / 16)).astype(np.uint8)
            Image.fromarray(pixels).save(home / f"{index:04}.png")
    return folder


def told(result: Result, config: TrainConfig) -> dict[str, Any]:
    """A finished run in numbers."""
    return {
        "scores": result.scores,
        "held_out": int(result.confusion.sum()),
        "confusion": result.confusion.tolist(),
        "epoch": result.epoch,
        "config": config.binding() | {"output": ""},
        "history": result.history,
        "peak_bytes": result.peak_bytes,
    }


# ---------------------------------------------------------------- kills and processes


def kills(arguments: argparse.Namespace, place: Path) -> dict[str, Any]:
    """A run killed at random moments and continued, against one left alone: differing bits."""
    runs = _helpers()
    draws = random.Random(arguments.seed)
    data = runs.draw_stripes(place / "stripes")
    settings = {**runs.LONG, "epochs": 10, "checkpoint_steps": 1, "resume": True}
    moments = [draws.uniform(0.0, 12.0) for _ in range(arguments.kills)]
    results = runs.in_children(
        *([runs.a_run(data, place / "run", settings, after=after)] for after in moments),
        [runs.a_run(data, place / "run", settings)],
        [runs.a_run(data, place / "whole", settings)],
    )
    codes = [group[0][0] for group in results]
    if any(codes[-2:]):
        raise RuntimeError(f"a run failed: {results[-2:]}")
    one, two = (runs.weights(place / name) for name in ("run", "whole"))
    differ = [name for name in two if not torch.equal(one[name], two[name])]
    logs = [runs.settled(place / name / "log.csv") for name in ("run", "whole")]
    return {
        "killed": sum(code < 0 for code in codes[:-2]),
        "moments_s": moments,
        "tensors": len(two),
        "tensors_that_differ": len(differ),
        "logs_equal": logs[0] == logs[1],
    }


def processes(arguments: argparse.Namespace, place: Path) -> dict[str, Any]:
    """20 steps of two processes (gloo) with half the batch, against one: largest differences."""
    runs = _helpers()
    data = runs.draw_stripes(place / "stripes")
    settings = {"epochs": 4, "ema_decay": 0.9}
    results = runs.in_children(
        runs.together(1, data, place / "1", {**settings, "batch_size": 8}),
        runs.together(2, data, place / "2", {**settings, "batch_size": 4}),
    )
    if any(code for group in results for code, _ in group):
        raise RuntimeError(f"a run failed: {results}")
    one, two = (runs.weights(place / name) for name in "12")
    rows = [list(csv.DictReader((place / name / "log.csv").open())) for name in "12"]
    losses = [
        abs(float(a["train_loss"]) - float(b["train_loss"])) for a, b in zip(*rows, strict=True)
    ]
    return {
        "steps": int(rows[0][-1]["step"]),
        "largest_difference_of_weights": max((one[n] - two[n]).abs().max().item() for n in one),
        "largest_difference_of_losses": max(losses),
    }


def _helpers() -> Any:
    """The tests' small runs."""
    sys.path.insert(0, str(ROOT / "tests"))
    import runs

    return runs


# ---------------------------------------------------------------- on a GPU


def amp(arguments: argparse.Namespace, place: Path) -> dict[str, Any]:
    """The same finetuning under bfloat16 with the CUDA kernels and with backend "torch"."""
    need_gpu()
    data, found = draw(place / "ten", str), {}
    for backend in ("cuda", "torch"):
        torch.manual_seed(arguments.seed)
        model = build_model(SCRATCH, PICTURES)
        config = TrainConfig(
            place / backend, epochs=arguments.epochs[1], batch_size=128, lr=3e-3, layer_decay=1.0,
            mixed_precision="bf16", seed=arguments.seed, workers=8,
        )  # fmt: skip
        with only(backend):
            found[backend] = told(finetune(model, data, data, config), config)
    return found


@contextlib.contextmanager
def only(backend: str) -> Iterator[None]:
    """Inside, every call that leaves the choice open gets this backend."""
    choose = backends.choose
    backends.choose = lambda name, *call: choose(name or backend, *call)
    try:
        yield
    finally:
        backends.choose = choose


def throughput(arguments: argparse.Namespace, place: Path) -> dict[str, Any]:
    """Pictures per second and memory of training steps: NAT-Tiny, and Swin-Tiny where timm is."""
    need_gpu()
    import natcupy

    models: dict[str, Callable[[], torch.nn.Module]] = {
        "nat-tiny": lambda: natcupy.create_model("nat-tiny")
    }
    with contextlib.suppress(ImportError):
        import timm

        models["swin-tiny (timm)"] = lambda: timm.create_model(
            "swin_tiny_patch4_window7_224", drop_path_rate=0.2
        )
    found: dict[str, Any] = {"timm": "swin-tiny (timm)" in models}
    for name, make in models.items():
        for batch in (32, 128):
            with out_of_memory(found, f"{name}, batch {batch}"):
                found[f"{name}, batch {batch}"] = steps(make().cuda().train(), batch)
    return found


def steps(model: torch.nn.Module | ImageModel, batch: int, count: int = 30) -> dict[str, float]:
    """Rates of whole steps under bfloat16, after ten to warm up."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    x = torch.randn(batch, 3, 224, 224, device="cuda")
    labels = torch.randint(1000, (batch,), device="cuda")
    torch.cuda.reset_peak_memory_stats()
    for step in range(10 + count):
        if step == 10:
            torch.cuda.synchronize()
            begun = time.perf_counter()
        with torch.autocast("cuda", torch.bfloat16):
            loss = torch.nn.functional.cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - begun
    return {
        "pictures_per_s": count * batch / seconds,
        "peak_bytes": peak_memory(torch.device("cuda")),
    }


@contextlib.contextmanager
def out_of_memory(found: dict[str, Any], name: str) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        found[name] = {"why_not": "out of memory"}
    torch.cuda.empty_cache()


def need_gpu() -> None:
    if not torch.cuda.is_available():
        raise SystemExit("this part needs a CUDA GPU, and torch finds none.")


PARTS: dict[str, Callable[[argparse.Namespace, Path], dict[str, Any]]] = {
    "digits": digits,
    "kills": kills,
    "processes": processes,
    "amp": amp,
    "throughput": throughput,
}

if __name__ == "__main__":
    main()
