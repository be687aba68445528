"""Small finetuning runs for tests: pictures, a model, settings, processes, what to compare."""

import csv
import errno
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from natcupy.train import TrainConfig, run
from natcupy.zoo import ModelConfig, build_model

ROOT = Path(__file__).parent.parent
TINY = ModelConfig(
    family="nat", embed_dim=8, depths=(1, 1), num_heads=(1, 2), kernel_size=3, num_classes=3,
    mlp_ratio=2.0,
)  # fmt: skip
FACTS = {"input_size": (3, 16, 16), "crop_pct": 1.0}


def tiny():
    torch.manual_seed(0)
    return build_model(TINY, FACTS)


def config(output, **changes):
    usual = {"epochs": 2, "batch_size": 6, "lr": 5e-3, "workers": 0, "layer_decay": 1.0}
    return TrainConfig(**{"output": output, **usual, **changes})


def draw_stripes(root):
    """Three classes of pictures that differ in the direction of their stripes."""
    draw = np.random.default_rng(0)
    y, x = np.mgrid[:20, :20]
    for name, wave in (("across", y), ("down", x), ("slanted", x + y)):
        (root / name).mkdir(parents=True)
        for index in range(16):
            noise = draw.normal(0, 20, x.shape)
            values = 128 + 90 * np.sin(wave * 1.2 + draw.uniform(0, 6.3)) + noise
            picture = Image.fromarray(values.clip(0, 255).astype(np.uint8))
            picture.save(root / name / f"{index:02}.png")
    return root


LONG = {"epochs": 3, "checkpoint_steps": 3, "ema_decay": 0.9, "accumulate": 2, "drop_path": 0.1,
        "batch_size": 4}  # fmt: skip


def locks_of(system, put):
    """Let runs lock as on "unix" or "windows"; `put(object, name, value)` changes what is there."""
    if system == "unix":
        return
    import fcntl

    def locking(file, mode, count):
        try:
            place = os.lseek(file, 0, os.SEEK_CUR)
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, count, place)
        except BlockingIOError:
            raise PermissionError(errno.EACCES, "Permission denied") from None

    put(run, "fcntl", None)
    put(run, "msvcrt", SimpleNamespace(LK_NBLCK=2, locking=locking))


def weights(folder):
    return load_file(folder / "model" / "model.safetensors")


def same(one, other):
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def settled(path):
    """The rows of a log without what depends on the clock."""
    with open(path) as file:
        rows = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if k not in ("seconds", "items_per_s", "peak_bytes")}
            for row in rows]  # fmt: skip


def step_of(state):
    """The step of a checkpoint; -1 where there is none."""
    try:
        return json.loads(state.read_text())["step"]
    except (OSError, ValueError):
        return -1


# One process imports once, then forks a child for each run of each group, one group after another.
# A run may be killed without warning, at a step of its checkpoint or after some time.
NURSERY = """
import json, math, os, signal, sys, tempfile, time, traceback
import torch
torch.set_num_threads(1)
sys.path.insert(0, {tests!r})
from pathlib import Path
import accelerate, matplotlib.figure, torch.distributed.fsdp
import natcupy.hub.push, natcupy.hub.saving, natcupy.train.finetuning
from runs import config, step_of, tiny

def begin(run, words):
    child = os.fork()
    if child:
        return child
    os.dup2(os.open(words, os.O_WRONLY | os.O_CREAT, 0o600), 1)
    os.dup2(1, 2)
    status = 1
    try:
        os.environ.update(run["environment"])
        if run["sharded"]:
            import sharding
            sharding.on_gloo(int(os.environ["WORLD_SIZE"]))
        settings = config(run["output"], **run["changes"])
        natcupy.train.finetuning.finetune(tiny(), run["data"], None, settings)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)

def tend(run, child):
    state = Path(run["output"]) / "checkpoint" / "state.json"
    begun = time.monotonic()
    while run["kill"] is not None or run["after"] is not None:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status
        reached = run["kill"] is not None and step_of(state) >= run["kill"]
        if reached or time.monotonic() - begun > (run["after"] or math.inf):
            os.kill(child, signal.SIGKILL)
            break
        time.sleep(0.003)
    return os.waitpid(child, 0)[1]

results = []
with tempfile.TemporaryDirectory() as place:
    for number, group in enumerate(json.loads(sys.argv[1])):
        files = [f"{{place}}/{{number}}-{{n}}" for n in range(len(group))]
        children = [begin(run, words) for run, words in zip(group, files)]
        ended = [tend(run, child) for run, child in zip(group, children)]
        texts = [Path(file).read_text() for file in files]
        codes = [os.waitstatus_to_exitcode(status) for status in ended]
        results.append(list(zip(codes, texts)))
print(json.dumps(results))
"""


def a_run(data, output, changes, kill=None, after=None, sharded=False, **environment):
    """One run, for `in_children`; killed at step `kill` of its checkpoint, or after seconds."""
    return {"data": str(data), "output": str(output), "changes": changes, "kill": kill,
            "after": after, "sharded": sharded, "environment": environment}  # fmt: skip


def together(processes, data, output, changes, **more):
    """The same run in several processes that train together."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    return [
        a_run(data, output, changes, MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RANK=str(rank),
              LOCAL_RANK=str(rank), WORLD_SIZE=str(processes), **more)
        for rank in range(processes)
    ]  # fmt: skip


def in_children(*groups):
    """Groups of runs, those of a group at the same time: of each its exit status and its words."""
    done = subprocess.run(
        [sys.executable, "-c", NURSERY.format(tests=str(ROOT / "tests")), json.dumps(groups)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
