"""The benchmarks' commands, on their smallest cases: what they measure is not judged here."""

import json
import sys

import pytest
import torch

from benchmarks import op, start

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


@pytest.mark.skipif(sys.platform == "win32", reason="its processes have no PATH")
def test_first_calls(record):
    made = record(start, "--pairs", "1")
    assert [row["pass"] for row in made["rows"]] == ["forward", "backward"]
    for row in made["rows"]:
        assert all(set(row[kind]) == {"wall", "cpu"} for kind in ("compiled_ms", "cached_ms"))
