"""Damaged and hostile files, drawn by a seed, and processes that are killed while they save.

In: counts and seeds. Out: what became of them, counted; anything but a clean answer raises. The
tests use these in small numbers, `benchmarks/hub_faults.py` in large ones.
"""

import collections
import io
import json
import os
import pickle
import random
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from small import CONFIGS, invented, same

from natcupy import hub
from natcupy.hub.config import config_text, parse_config
from natcupy.hub.errors import HubError
from natcupy.hub.pickles import read_pickle
from natcupy.hub.tensors import decode_tensors
from natcupy.zoo import ConfigError, build_model

ROOT = Path(__file__).parents[2]
STATE = {"norm.weight": torch.arange(4.0), "head.weight": torch.ones(2, 4).half()}
FORMS = ("zip", "nested", "legacy", "raw", "protocol4")
GADGETS = 15


# ---------------------------------------------------------------- safetensors


def mutated_tensors(count, seed):
    """Random damage either leaves a valid file or raises HubError; returns the refusals."""
    chance = random.Random(seed)
    good = save({"a.weight": torch.ones(3, 2), "b": torch.arange(5), "c": torch.ones(2).half()})
    header = int.from_bytes(good[:8], "little")
    refusals = 0
    for _ in range(count):
        data = bytearray(good)
        for _ in range(chance.randint(1, 4)):
            at = chance.randrange(0, 8 + header)
            action = chance.random()
            if action < 0.5:
                data[at] = chance.randrange(256)
            elif action < 0.75:
                del data[at : at + chance.randint(1, 5)]
            else:
                data[at:at] = chance.choice([b"0", b'"', b",", b"[", b"}", b"9" * 20, b"\\u0000"])
        try:
            decode_tensors(bytes(data), "x")
        except HubError:
            refusals += 1
    return refusals


# ---------------------------------------------------------------- config.json


def mutated_configs(count, seed, originals):
    """A config or ConfigError, never anything else; returns the refusals."""
    chance = random.Random(seed)
    originals = [json.dumps(values).encode() for values in originals]
    swaps = [b"-1", b"1e999", b"NaN", b"null", b"[]", b"{}", b'"x"', b"10" * 30, b"true", b"0"]
    refusals = 0
    for _ in range(count):
        data = bytearray(chance.choice(originals))
        for _ in range(chance.randint(1, 3)):
            at = chance.randrange(len(data))
            if chance.random() < 0.5:
                data[at : at + chance.randint(0, 6)] = chance.choice(swaps)
            else:
                data[at] = chance.randrange(256)
        try:
            parse_config(bytes(data))
        except ConfigError:
            refusals += 1
    return refusals


def own_config(name="nat"):
    return json.loads(config_text(CONFIGS[name], {}, "0.1.0"))


# ---------------------------------------------------------------- pickles


def with_program(path, program, like=None):
    """A checkpoint whose pickle is replaced by the given bytes."""
    buffer = io.BytesIO()
    torch.save(like if like is not None else STATE, buffer)
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(path, "w") as new:
        for item in old.infolist():
            data = program if item.filename.endswith("data.pkl") else old.read(item)
            new.writestr(item.filename, data)
    return path


def mutated_pickles(count, seed, folder):
    """Random damage to the pickle program: tensors of the right kind, or HubError."""
    chance = random.Random(seed)
    buffer = io.BytesIO()
    torch.save(STATE, buffer)
    with zipfile.ZipFile(buffer) as archive:
        program = archive.read("archive/data.pkl")
    refusals = 0
    for _ in range(count):
        data = bytearray(program)
        for _ in range(chance.randint(1, 3)):
            at = chance.randrange(len(data))
            action = chance.random()
            if action < 0.6:
                data[at] = chance.randrange(256)
            elif action < 0.8:
                del data[at : at + chance.randint(1, 4)]
            else:
                data[at:at] = bytes(chance.randrange(256) for _ in range(3))
        path = with_program(folder / "x.pth", bytes(data))
        try:
            read = read_pickle(path)
        except HubError:
            refusals += 1
        else:
            assert all(type(t) is torch.Tensor for t in read.tensors.values())
    return refusals


class Runs:
    """Pickles into a call."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def gadgets(canary):
    import builtins
    import importlib
    import os
    import pathlib
    import runpy
    import shutil
    import subprocess

    command = f"touch {canary}"
    code = f"open({str(canary)!r}, 'w').close()"
    yield from (
        Runs(os.system, command),
        Runs(subprocess.call, ["touch", str(canary)]),
        Runs(subprocess.Popen, ["touch", str(canary)]),
        Runs(builtins.eval, code),
        Runs(builtins.exec, code),
        Runs(builtins.open, str(canary), "w"),
        Runs(builtins.getattr, "x", "upper"),
        Runs(builtins.__import__, "antigravity"),
        Runs(importlib.import_module, "antigravity"),
        Runs(runpy.run_path, str(canary)),
        Runs(shutil.copy, __file__, str(canary)),
        Runs(pathlib.Path.touch, pathlib.Path(canary)),
        Runs(torch.load, str(canary)),
        Runs(np.save, str(canary), np.ones(1)),
        Runs(collections.namedtuple, "x", "y"),
    )


def gadget_file(path, number, form, canary):
    """A checkpoint that would run something if it were unpickled."""
    gadget = list(gadgets(canary))[number]
    if form == "raw":
        path.write_bytes(pickle.dumps(gadget))
    elif form == "protocol4":
        with_program(path, pickle.dumps(gadget, protocol=4))
    elif form == "nested":
        torch.save({"state_dict": {**STATE, "norm.bias": gadget}}, path)
    else:
        torch.save(gadget, path, _use_new_zipfile_serialization=form == "zip")
    return path


# ---------------------------------------------------------------- killed while saving

# One process imports once, then forks a child for each kill: before its n-th call, or (negative
# numbers) when a file has grown to so many bytes.
KILLED = """
import os, resource, signal, sys, torch
from natcupy import hub
torch.set_num_threads(1)
folder, replacement = sys.argv[1:3]
model = hub.from_pretrained(replacement)

def counted(real):
    def run(*args):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args)
    return run

for number, when in enumerate(map(int, sys.argv[3:])):
    child = os.fork()
    if not child:
        if when < 0:
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (-when, -when))
        left = when if when >= 0 else 10**9
        for name in ("replace", "fsync", "open"):
            setattr(os, name, counted(getattr(os, name)))
        hub.files.Path.unlink = counted(hub.files.Path.unlink)
        model.save_pretrained(f"{folder}/{number}", overwrite_card=True)
        os._exit(0)
    print(os.WIFSIGNALED(os.waitpid(child, 0)[1]))
"""


def kill_while_saving(folder, moments):
    """Kill a save at each moment; returns for each `(was killed, holds the new model)`.

    The folder always loads, as one model or the other, and a later save repairs it. The two models
    have the same shapes but other weights and other dilations, so that a mixture of one's weights
    with the other's config would load without complaint.
    """
    old, new = invented("dinat", 1), invented("dinat", 2)
    new = build_model(new.config.replace(dilations=((3, 1), (2, 1), (1,))))
    hub.save_pretrained(new, folder / "new")
    for number in range(len(moments)):
        hub.save_pretrained(old, folder / str(number))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", KILLED, folder, folder / "new", *map(str, moments)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    killed = [line == "True" for line in done.stdout.split()]
    assert len(killed) == len(moments), done.stderr
    outcomes = []
    for number, dead in enumerate(killed):
        place = folder / str(number)
        loaded = hub.from_pretrained(place)
        which = old if loaded.config == old.config else new
        assert loaded.config == which.config
        same(loaded.state_dict(), which.state_dict())
        assert dead or which is new
        hub.save_pretrained(old, place)
        same(hub.from_pretrained(place).state_dict(), old.state_dict())
        outcomes.append((dead, which is new))
    return outcomes
