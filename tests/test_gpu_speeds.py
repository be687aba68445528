"""The speed mode of the GPU script without a GPU: its commands, and what comes of them."""

import importlib
import importlib.util
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from test_tuning import Driver, FakeClock, new_process

from benchmarks import counters, gpu, model, peers, record, tiles
from benchmarks.cases import ModelCase
from benchmarks.roofline import Roofline
from natcupy.arguments import neighborhood
from natcupy.cuda import jit
from natcupy.zoo import ModelConfig, build_model

CPU = torch.device("cpu")


def test_every_stage_is_a_command_that_its_module_takes(tmp_path, monkeypatch):
    """Parsed by the module's own parser; the run ends where there is no GPU."""
    stages = gpu.speed_stages(tmp_path / "speeds-gpu-x-2026-01-02.json")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for stage in stages:
        ((_, dash, module, *arguments),) = stage.commands
        assert dash == "-m" and arguments[-1].endswith("-gpu-x-2026-01-02.json")
        run = importlib.import_module(module).main
        if module.endswith(("counters", "tiles")):
            assert run(arguments) == 2
        else:
            with pytest.raises(ValueError, match="cuda"):
                run(arguments)
    assert len({stage.commands[0][-1] for stage in stages}) == len(stages)
    assert not list(tmp_path.iterdir())


def test_the_mode_runs_its_stages(tmp_path, monkeypatch):
    environment = {"device": "GPU X", "device_type": "cuda", "driver": "1", "threads": 1}
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(record, "environment", lambda device: environment | {"versions": {}})
    monkeypatch.setattr(gpu, "speed_stages", lambda path: gpu.speed_stages_of_a_test)
    stage = gpu.Stage("empty", ((gpu.sys.executable, "-c", "print('here')"),), 20)
    monkeypatch.setattr(gpu, "speed_stages_of_a_test", [stage], raising=False)
    assert gpu.main(["--speeds", "--out", str(tmp_path), "--seconds", "90"]) == 0
    (path,) = tmp_path.glob("speeds-*.json")
    made = json.loads(path.read_text())
    assert made["kind"] == "speeds" and made["stages"][0]["outcome"] == "ran"
    assert "here" in path.with_suffix(".log").read_text()


# ------------------------------------------------------------------------------------------------
# counters

WAIT = "smsp__average_warps_issue_stalled_wait_per_issue_active.ratio"
TABLE = f"""\
==PROF== Connected to process 7
"ID","Process ID","Kernel Name","dram__bytes.sum","gpu__time_duration.sum","{WAIT}"
"","","","Mbyte","usecond","inst"
"0","7","na2d_small_fwd","205.5","118.75","1.50"
"1","7","na2d_small_bwd","411.1","1,466.2","0.75"
"""


def test_the_profilers_table_is_read():
    first, second = counters.parse(TABLE)
    assert first == {
        "kernel": "na2d_small_fwd",
        "dram__bytes.sum": "205.5 Mbyte",
        "gpu__time_duration.sum": "118.75 usecond",
        "waits for wait": "1.50 inst",
    }
    assert second["gpu__time_duration.sum"] == "1,466.2 usecond"
    assert list(counters.parse("==ERROR== no permission")) == []


# ------------------------------------------------------------------------------------------------
# tiles


@pytest.mark.skipif(importlib.util.find_spec("cupy") is None, reason="CuPy is not installed")
def test_every_choice_of_every_side_is_timed(monkeypatch, tmp_path):
    """With a clock that counts: a microsecond more each time."""
    new_process()
    with jit.use_launcher(Driver(FakeClock(lambda number: 1e-6 * (number + 1)))):
        found = tiles.rows((14, 2, 1, 32, 7, 2), CPU)
        dense = tiles.rows((7, 2, 1, 32, 7, 2), CPU)
    new_process()
    sides = {row["case"].split(", ")[1]: row["us"] for row in found}
    assert list(sides) == ["forward", "both", "queries", "keys"]
    assert found[0]["case"] == "14x14 h2 d1 dim32 k7 b2, forward"
    *joint, last = sides["both"]
    assert last == "apart" and joint and all(name.startswith("joint/") for name in joint)
    assert list(sides["forward"])[-1].startswith("portable/")
    times = [time for us in sides.values() for time in us.values()]
    assert sorted(times) == [float(n + 1) for n in range(len(times))]
    assert [row["case"].split(", ")[1] for row in dense] == ["forward"]  # one kernel, one way


# ------------------------------------------------------------------------------------------------
# compiled models


@pytest.mark.parametrize("broken", [False, True])
def test_compiled_models_are_rows_of_their_own(broken, monkeypatch):
    class Compiled(torch.nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, x):
            if broken:
                raise RuntimeError("no compiler here")
            return self.net(x)

    sizes = {"embed_dim": 8, "depths": (1,), "num_heads": (1,), "kernel_size": 3}
    net = build_model(ModelConfig(family="nat", num_classes=5, **sizes))
    monkeypatch.setattr(model.torch, "compile", Compiled)
    rows = model.rows(
        ModelCase("tiny", 32), net, 2, model.pick_ways("natcupy torch"), "timm is not here", CPU,
        torch.float32, Roofline(1.0, 1.0, "float32"), seconds=0.0, compiled=True,
    )  # fmt: skip
    made = [row for row in rows if row["way"] == "natcupy, compiled"]
    assert {row["pass"] for row in made} == {"inference", "training step"}
    for row in made:
        assert row["why_not"] == ("RuntimeError: no compiler here" if broken else None)
        assert (row["ms"] is None) == broken
    if not broken:
        assert made[0]["error"] < 1e-5


# ------------------------------------------------------------------------------------------------
# NATTEN as it is since 0.20: no bias, and backends by name


def test_natten_without_a_bias_is_asked_for_its_backend(monkeypatch):
    asked = {}

    def na2d(query, key, value, **more):
        assert query.is_contiguous() and key.is_contiguous() and value.is_contiguous()
        asked.update(more)
        return value

    monkeypatch.setattr(peers, "_natten_missing", lambda: None)
    monkeypatch.setattr(peers, "_has_halves", lambda rank: False)
    monkeypatch.setitem(sys.modules, "natten", SimpleNamespace(na2d=na2d))
    hood, qkv = neighborhood(2, 3, 1, 2, False), torch.zeros(1, 8, 8, 3, 2, 4)
    ways = {way.name: way for way in peers.WAYS}
    way = ways["NATTEN hopper-fna, no bias"]
    way.attend(*qkv.unbind(3), hood, 0.5, torch.zeros(2, 5, 5))
    assert asked["backend"] == "hopper-fna" and asked["dilation"] == (2, 2)
    assert not way.exact and "rpb" not in asked
    asked.clear()
    ways["NATTEN"].attend(*qkv.unbind(3), hood, 0.5, None)
    assert "backend" not in asked and asked["kernel_size"] == (3, 3)
