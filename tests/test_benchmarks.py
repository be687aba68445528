"""The benchmarks' commands, on their smallest cases: what they measure is not judged here."""

import json
import statistics
import sys
from types import SimpleNamespace

import pytest
import torch

from benchmarks import harness, op, start, timing
from benchmarks import record as bench_record
from benchmarks.roofline import Roofline

SMALL = "NAT-Tiny level 4: 1x7x7"


@pytest.fixture
def record(tmp_path):
    """Runs a command with a record of its own, which is returned."""
    threads = torch.get_num_threads()

    def run(command, *arguments):
        path = tmp_path / "record.json"
        command.main([*arguments, "--case", SMALL, "--out", str(path)])
        assert path.with_suffix(".md").read_text().count(SMALL) > 0
        return json.loads(path.read_text())

    yield run
    torch.set_num_threads(threads)


def test_attention_beside_another_way(record):
    quick = ("--device", "cpu", "--threads", "1", "--batch", "1", "--seconds", "0.001")
    made = record(op, *quick, "--way", "natcupy cpu,SDPA, masked", "--no-plot")
    ways = {(row["pass"], row["way"]): row for row in made["rows"]}
    for direction in ("forward", "forward + backward"):
        for way in ("natcupy cpu", "SDPA, masked", "natcupy cpu, bfloat16", "matrix product"):
            row = ways[direction, way]
            assert row["why_not"] is None and row["ms"] > 0 and row["timing"]["calls"] >= 5
        assert ways[direction, "natcupy cpu"]["error"] < 1e-5
        assert ways[direction, "natcupy cpu"]["ratio"] == 1


def test_full_caches_are_those_of_a_call_before(record, monkeypatch):
    monkeypatch.setattr(timing, "_caches", timing.caches())  # put back after the test
    quick = ("--device", "cpu", "--threads", "1", "--batch", "1", "--seconds", "0.001")
    quick += ("--way", "natcupy cpu", "--forward-only", "--no-plot")
    assert record(op, *quick)["caches"] == "empty"
    with pytest.raises(ValueError, match="was made with empty caches, this run has full ones"):
        record(op, *quick, "--full-caches", "--append")
    assert record(op, *quick, "--full-caches")["caches"] == "full"
    calls = []
    timing._cpu_time(lambda: calls.append(1), torch.empty(8, dtype=torch.int8), 0)
    assert len(calls) == 2
    with pytest.raises(ValueError, match="--full-caches is for a CPU"):
        harness.settings(harness.parser("op", "").parse_args(["--device", "cuda", "--full-caches"]))


def test_a_record_is_named_after_what_was_measured():
    made = bench_record.new("op", torch.device("cpu"))
    made["environment"] |= {"device": "AMD EPYC", "instructions": "AVX2", "threads": 2}
    made["date"] = "2026-11-27"
    assert bench_record.path_of(made).name == "op-amd-epyc-avx2-2-threads-2026-11-27.json"
    made["caches"] = "full"
    assert bench_record.path_of(made).name.endswith("2-threads-full-caches-2026-11-27.json")


@pytest.mark.skipif(sys.platform == "win32", reason="its processes have no PATH")
def test_first_calls(record):
    made = record(start, "--pairs", "1")
    assert [row["pass"] for row in made["rows"]] == ["forward", "backward"]
    for row in made["rows"]:
        assert all(set(row[kind]) == {"wall", "cpu"} for kind in ("compiled_ms", "cached_ms"))


class Gpu:
    """A GPU and its host on one clock: what is queued takes `host` ms there, then its time here."""

    def __init__(self):
        self.now = self.free = 0.0
        self.Event = self._event

    def queue(self, host: float, device: float):
        self.now += host
        self.free = max(self.free, self.now) + device

    def _event(self, enable_timing):
        assert enable_timing
        event = SimpleNamespace()

        def record():
            self.queue(0.001, 0.0)
            event.at = self.free

        event.record, event.elapsed_time = record, lambda end: end.at - event.at
        return event

    def synchronize(self, device=None):
        self.now = max(self.now, self.free)

    def get_device_properties(self, device):
        return SimpleNamespace(L2_cache_size=1 << 20)


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize(("host", "device"), [(0.4, 0.01), (0.4, 0.3), (0.01, 2.0)])
def test_a_gpu_that_waits_for_its_host(monkeypatch, host, device, alone):
    """A call queues its work in eight launches; alone, none of their host's time is measured."""
    gpu = Gpu()
    flush = SimpleNamespace(zero_=lambda: gpu.queue(0.005, 0.03))
    pretended = SimpleNamespace(cuda=gpu, empty=lambda *_, **__: flush, int8=torch.int8)
    monkeypatch.setattr(timing, "torch", pretended)
    clock = SimpleNamespace(perf_counter=lambda: gpu.now / 1e3)
    monkeypatch.setattr(timing, "time", clock)

    def run():
        for _ in range(8):
            gpu.queue(host / 8, device / 8)

    times, hosts = timing._gpu_times(run, None, 0.05, alone)
    assert len(times) >= timing.LEAST
    assert statistics.median(hosts) == pytest.approx(host, abs=0.01)
    waits = 0.0 if alone or host < device else host - device
    assert statistics.median(times) == pytest.approx(device + waits, abs=0.06)
    if alone:
        assert max(times) == pytest.approx(device, abs=0.002)


def test_a_gpus_ways_are_compared_with_natcupys_own(monkeypatch):
    clock = {"natcupy cuda": 2.0, "slow": 5.0}
    monkeypatch.setattr(
        harness,
        "measure",
        lambda run, *_, alone: timing.Timing(*[clock[run()]] * 5, 3, 0) if alone else None,
    )
    common = {"case": "c", "exact": True, "step": "forward", "dtype": torch.float16, "flops": 1}
    common |= {"roofline": Roofline(1.0, 1.0, "float16"), "moved": None}
    asked = [common | {"way": way, "run": lambda way=way: way} for way in clock]
    asked.append(common | {"way": "absent", "why_not": "it is not installed"})
    made = harness.together(asked, torch.device("cuda"), 0.1, alone=True)
    assert [row["ratio"] for row in made] == [1.0, 2.5, None]
