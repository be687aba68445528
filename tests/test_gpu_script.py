"""The one GPU script without a GPU: its stages, its budget, its record, and what records mean."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import freshness, gpu, harness, op, record, sanitizer
from benchmarks.model import _try, attending
from benchmarks.roofline import Roofline
from benchmarks.stages import Stage, run_stages
from benchmarks.ways import Way, anything
from natcupy.zoo import ModelConfig, build_model

ROOT = Path(__file__).parent.parent


def python(text):
    return (sys.executable, "-c", text)


def run(stages, budget, tmp_path, **more):
    said = []
    log = tmp_path / "log"
    return run_stages(stages, budget, tmp_path, log, said.append, **more), said, log


def test_a_stage_that_fails_or_hangs_takes_nothing_along(tmp_path):
    hang = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'while True: pass'])"
    stages = [
        Stage("crash", (python("import os; os.kill(os.getpid(), 9)"),), 20, 0),
        Stage("missing", (("/no/such/program",),), 20, 0),
        Stage("hang", (python(hang),), 1.0, 0),
        Stage("two", (python("print('one')"), python("import sys; sys.exit(3)")), 20, 0),
        Stage("last", (python("import os; print('seen', os.environ['SEEN'])"),), 20, 0,
              {"SEEN": "it"}),
    ]  # fmt: skip
    found, said, log = run(stages, 60, tmp_path)
    assert [made["outcome"] for made in found] == ["failed", "failed", "cut", "failed", "ran"]
    assert found[0]["status"] == [-9] and found[3]["status"] == [0, 3]
    assert found[2]["seconds"] < 20 and "/no/such/program" in found[1]["why"]
    text = log.read_text()
    assert "seen it" in text and "===== hang" in text and len(said) >= 8


def test_what_the_budget_has_no_room_for_is_dropped_and_named(tmp_path):
    now = iter((0, 0, 0, 90, 90, 95))
    stages = [Stage(name, (python(""),), 50, 30) for name in ("first", "second", "third")]
    found, said, _ = run(stages, 100, tmp_path, clock=lambda: next(now))
    assert [made["outcome"] for made in found] == ["ran", "dropped", "dropped"]
    assert "10 s were left" in found[1]["why"] and any("dropped" in line for line in said)


def test_the_dry_run_makes_a_record(tmp_path):
    """Every kind of stage, as processes, on the interpreter; the record is none of a GPU."""
    pytest.importorskip("cupy", reason="NVRTC comes with CuPy, which is not installed")
    assert gpu.main(["--interpreter", "--out", str(tmp_path), "--seconds", "1200"]) == 0
    (path,) = tmp_path.glob("dry-*.json")
    made = json.loads(path.read_text())
    assert made["kind"] == "dry" and made["kernels"] == record.kernel_hashes()
    assert [s["outcome"] for s in made["stages"]] == ["ran"] * 3
    assert [t["outcome"] for t in made["tests"]] == ["passed"]
    assert made["results"]["na_fwd.cu"]["passed"] == 1
    assert made["questions"]["host_microseconds"]["empty kernel"] > 0
    assert len(made["questions"]["load_milliseconds"]) == 2
    assert "No problems." in path.with_suffix(".md").read_text()
    assert path.with_suffix(".log").exists() and list(tmp_path.glob("op-*.json"))
    assert len(list(tmp_path.iterdir())) <= 8
    assert record.read_all("gpu", tmp_path) == []


def test_without_a_gpu_it_says_so(tmp_path, capsys):
    if gpu.torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert gpu.main(["--out", str(tmp_path)]) == 2
    assert "no CUDA GPU" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_the_stages_of_a_gpu_have_every_gpu_test(tmp_path):
    """Files with tests for a GPU are in some stage; what a stage selects by name exists."""
    stages = gpu.plan_stages(gpu.torch.device("cuda"), {}, tmp_path, tmp_path / "gpu-x.json")
    assert sum(stage.most for stage in stages) > gpu.SECONDS > 300
    commands = [stage.commands[0] for stage in stages if "pytest" in stage.commands[0]]
    files = {part for command in commands for part in command if part.startswith("tests/")}
    marked = re.compile(r"mark\.gpu|^from rigs import", re.MULTILINE)
    have = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "tests").rglob("test_*.py")
        if marked.search(path.read_text()) and path.name != Path(__file__).name
    }
    assert have <= files and all((ROOT / name).exists() for name in files)
    selections = [c[c.index("-k") + 1] for c in commands if "-k" in c]
    names = re.findall(r"^def (test_\w+)", (ROOT / gpu.NUMBERS).read_text(), re.MULTILINE)
    words = {word for text in selections for word in re.findall(r"\w+", text)} - {
        "not",
        "or",
        "and",
    }
    assert all(any(word in name for name in names) for word in words), words
    # what one stage leaves out, another takes
    assert f"not ({gpu.SLOW} or {gpu.LARGE})" in selections and "random" in gpu.SLOW
    assert {"random", gpu.LARGE, f"({gpu.SLOW}) and not random"} <= set(selections)


def test_a_second_run_adds_to_a_record():
    """Stages and tests by name, the later one's; kernels are counted anew."""

    def run(seconds, stages, tests):
        return {
            "kernels": {"na_fwd.cu": "1"}, "seconds": seconds, "questions": {"failed": "none"},
            "stages": [{"stage": name, "outcome": outcome} for name, outcome in stages],
            "tests": [{"test": n, "outcome": o, "kernels": ["na_fwd"]} for n, o in tests],
        }  # fmt: skip

    before = run(10.0, [("numbers", "cut"), ("torch", "ran")], [("a", "passed"), ("b", "failed")])
    before["questions"] = {"answer": 42}
    made = run(5.0, [("numbers", "ran"), ("torch", "dropped")], [("b", "passed"), ("c", "passed")])
    joined = gpu.appended(before, made)
    assert [s["outcome"] for s in joined["stages"]] == ["ran", "ran"]
    assert [t["outcome"] for t in joined["tests"]] == ["passed"] * 3
    assert joined["results"]["na_fwd.cu"] == {"passed": 3, "failed": []}
    assert joined["seconds"] == 15.0 and joined["questions"] == {"answer": 42}
    assert not gpu.problems(joined)


def test_a_record_of_other_kernels_is_not_added_to(tmp_path, capsys):
    arguments = ["--interpreter", "--out", str(tmp_path), "--only", "none of them"]
    assert gpu.main(arguments) == 0
    (path,) = tmp_path.glob("*.json")
    made = json.loads(path.read_text())
    for what in ({"kernels": {}}, {"plans": "of another day"}):
        path.write_text(json.dumps(made | what))
        assert gpu.main([*arguments, "--append"]) == 2
        assert "other kernels" in capsys.readouterr().err


def test_results_that_are_not_finite_are_a_row_that_says_so():
    """One way gone wrong must not cost the record of all others."""
    case = op.pick(op.OP_CASES, "NAT-Tiny level 4")[0]
    bad = Way("bad", True, lambda query, *rest: query * float("nan"), anything)
    cpu, roofline = torch.device("cpu"), Roofline(1.0, 1.0, "float32")
    rows = op.rows(case, [bad], cpu, torch.float32, roofline, forward_only=True, seconds=0.0)
    (row,) = (row for row in rows if row["way"] == "bad")
    assert row["why_not"] == "its results are not finite" and row["error"] is row["ms"] is None
    assert json.dumps(row, allow_nan=False)


@pytest.mark.parametrize("exact", [True, False])
def test_whatever_another_library_raises_is_a_row_that_says_so(exact):
    class Odd(Exception):  # noqa: N818 (as libraries have them)
        pass

    def fail(*call):
        raise Odd("no such kernel\nand a page about it")

    case, cpu = op.pick(op.OP_CASES, "NAT-Tiny level 4")[0], torch.device("cpu")
    ways = [Way("odd", exact, fail, anything), *op.pick_ways("natcupy torch")]
    rows = op.rows(case, ways, cpu, torch.float32, Roofline(1.0, 1.0, "float32"), seconds=0.0)
    assert {row["pass"] for row in rows if row["way"] == "odd"} == set(op.PASSES.values())
    for row in rows:
        odd = row["way"] == "odd"
        assert row["why_not"] == ("Odd: no such kernel" if odd else None)
        assert (row["ms"] is None) == odd
    sizes = {"embed_dim": 8, "depths": (1,), "num_heads": (1,), "kernel_size": 3}
    model = build_model(ModelConfig(family="nat", num_classes=5, **sizes))
    with attending(model, ways[0]):
        why_not, _ = _try(ways[0], model, torch.zeros(1, 3, 32, 32), False, None)
    assert why_not == "Odd: no such kernel"


def test_the_gpu_asked_for_is_the_one_that_is_timed(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    current = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    parse = harness.parser("op", "").parse_args
    for name in ("cuda:1", "cuda"):
        assert harness.settings(parse(["--device", name])) == (torch.device(name), torch.bfloat16)
    assert current == [torch.device("cuda:1")]
    with pytest.raises(ValueError, match="cuda:2 needs a GPU that is there, torch finds 2"):
        harness.settings(parse(["--device", "cuda:2"]))


# ------------------------------------------------------------------------------------------------
# the sanitizer's mode

LOG = """\
========= COMPUTE-SANITIZER
========= Invalid __global__ read of size 16 bytes
=========     at na_bwd_dq(Params)+0x1230
=========     by thread (3,0,0) in block (1,0,0)
=========     Address 0x7f0 is out of bounds
=========
========= Invalid __global__ read of size 4 bytes
=========     at 0x90 in na_bwd_dq
=========
========= Uninitialized __global__ memory read of size 4 bytes
=========     at void at::native::vectorized_elementwise_kernel<4, float>(int)+0x350
=========
========= ERROR SUMMARY: 3 errors
"""


def test_findings_are_counted_by_kernel():
    found = sanitizer.findings(LOG)
    assert found["kernels"] == {"na_bwd_dq": 2} and found["others"] == 1
    assert "Invalid __global__ read of size 16" in found["first"]["na_bwd_dq"]
    assert found["summary"] == ["ERROR SUMMARY: 3 errors"]
    assert sanitizer.findings("")["summary"] == []


def test_the_sanitizer_mode_runs_the_tool(tmp_path, monkeypatch):
    """With a program in the tool's place that writes its log, through the whole script."""
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(
        "#!/bin/sh\nwhile [ $# -gt 0 ]; do [ $1 = --log-file ] && log=$2; shift; done\n"
        f"cat > $log <<'END'\n{LOG}END\nexit 86\n"
    )
    tool.chmod(0o755)
    monkeypatch.setattr(sanitizer, "find", lambda: str(tool))
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(record, "environment", lambda device: _environment())
    assert gpu.main(["--sanitizer", "--out", str(tmp_path / "out"), "--seconds", "90"]) == 1
    (path,) = (tmp_path / "out").glob("sanitizer-*.json")
    made = json.loads(path.read_text())
    assert set(made["sanitizers"]) == set(sanitizer.TOOLS)
    assert "memcheck: 2 reports in na_bwd_dq" in gpu.problems(made)


# ------------------------------------------------------------------------------------------------
# what is fresh


def _environment():
    return {"device": "GPU X", "device_type": "cuda", "driver": "1", "threads": 1, "versions": {}}


def _record(hashes, **results):
    given = {name: {"passed": 3, "failed": []} for name in hashes} | results
    made = {"kind": "gpu", "date": "2026-01-02", "environment": _environment()}
    return made | {"kernels": hashes, "results": given, "plans": record.plans_hash()}


def test_a_kernel_is_fresh_when_its_own_source_ran():
    hashes = {"a.cu": "1", "b.cu": "2", "c.cu": "3", "d.cu": "4"}
    old = _record(hashes | {"b.cu": "old"}, **{"c.cu": {"passed": 9, "failed": ["test_x"]}})
    old["results"]["d.cu"] = {"passed": 0, "failed": []}
    states = freshness.of_kernels(hashes, [old])
    assert [fresh for fresh, _ in states.values()] == [True, False, False, False]
    assert "3 tests, GPU X on 2026-01-02" in states["a.cu"][1]
    assert "changed since GPU X" in states["b.cu"][1] and "test_x" in states["c.cu"][1]
    assert "no record" in states["d.cu"][1]
    assert "no record" in freshness.of_kernels(hashes, [])["a.cu"][1]
    old["plans"] = "other"
    assert "has changed since" in freshness.of_kernels(hashes, [old])["a.cu"][1]


def test_freshness_never_fails_an_ordinary_change(tmp_path, capsys):
    assert freshness.main(["--results", str(tmp_path)]) == 0
    assert freshness.main(["--results", str(tmp_path), "--strict"]) == 1
    assert capsys.readouterr().out.count("na_fwd.cu") == 2


def test_resource_tables_know_every_kernel(tmp_path):
    hashes = record.kernel_hashes()
    states = freshness.of_tables(hashes, freshness.TABLES)
    assert states and all(fresh for fresh, _ in states.values())
    more = freshness.of_tables(hashes | {"fresh_kernel.cu": "x"}, freshness.TABLES)
    assert not more["resource tables"][0] and "fresh_kernel" in more["resource tables"][1]
    (tmp_path / "old_resources.json").write_text(
        json.dumps({"nvrtc": "13.0", "kernels": {"gone(A=1)": {}}})
    )
    assert not freshness.of_tables(hashes, tmp_path)["old_resources.json"][0]
