"""`natcupy doctor`'s self-test of a GPU: right on one, and not silent about a wrong one."""

import json

import pytest
import torch
from rigs import both, param

needs = {"reason": "the command line needs more packages", "exc_type": ImportError}
cli = pytest.importorskip("natcupy.cli", **needs)
doctor = pytest.importorskip("natcupy.cli.doctor", **needs)
runtime = pytest.importorskip("natcupy.cli.runtime", **needs)
selftest = pytest.importorskip("natcupy.cli.selftest", **needs)

simulated = pytest.mark.parametrize("rig", [param("simulated")], indirect=True)


@both
def test_a_right_device_passes(rig, monkeypatch):
    if rig.simulated:
        monkeypatch.setattr(selftest, "CALLS", selftest.CALLS[3:])
    records = selftest.self_test(rig.device, "cuda")
    assert all("failed" not in record and record["error"] <= 1 for record in records), records
    assert all(any("fwd" in name for name in record["kernels"]) for record in records)
    assert all(any("bwd" in name for name in record["kernels"]) for record in records)


@simulated
def test_a_wrong_device_does_not(rig, monkeypatch):
    from natcupy.cuda import run

    call = selftest.Call("tiny", (5,), 3, torch.float32)
    monkeypatch.setattr(selftest, "CALLS", (call,))
    right = run.forward

    def wrong(*args):
        out, lse = right(*args)
        return out.mul_(1.001), lse

    monkeypatch.setattr(run, "forward", wrong)
    monkeypatch.setattr(
        "natcupy.cuda.ops._below_autograd",
        lambda op, *args: (wrong if "fwd" in str(op) else run.backward)(*args),
    )
    (record,) = selftest.self_test(rig.device, "cuda")
    assert record["error"] > 1 and not doctor._passed(record)
    assert "WRONG" in doctor._test_line(record)[1]

    def broken(*args):
        raise RuntimeError("launch failed")

    monkeypatch.setattr(run, "forward", broken)
    monkeypatch.setattr("natcupy.cuda.ops._below_autograd", broken)
    (record,) = selftest.self_test(rig.device, "cuda")
    assert record["failed"] == "launch failed" and not doctor._passed(record)


@pytest.mark.parametrize("before", ["tf32", "none"])
def test_doctor_judges_without_tf32(before, monkeypatch):
    """Some containers allow it by the environment: no reason to call a right kernel wrong."""
    from natcupy.cuda import run

    matmul = torch.backends.cuda.matmul
    if not hasattr(matmul, "fp32_precision"):
        pytest.skip("this torch has the older setting only")
    monkeypatch.setattr(doctor, "_devices", lambda: [])
    monkeypatch.setattr(doctor.jit, "probe", lambda: run._tf32_allowed())
    was = matmul.fp32_precision
    try:
        matmul.fp32_precision = before
        assert doctor.gather()["cuda"] is False and matmul.fp32_precision == before
    finally:
        matmul.fp32_precision = was


@pytest.mark.parametrize("error", [0.5, 3.0])
def test_doctor_shows_every_gpu(error, monkeypatch, capsys):
    """Two GPUs, by fakes: why each has its backend, and a self-test each."""
    record = {
        "call": "na2d", "dtype": "float16", "error": error, "where": "d_key", "seconds": 0.1,
        "kernels": ["na2d_small_fwd"],
    }  # fmt: skip
    gpus = [{"name": f"cuda:{n}", "what": f"GPU {n}"} for n in range(2)]
    monkeypatch.setattr(doctor, "_devices", lambda: gpus)
    absent = {"why_not": "no", "error": None}
    monkeypatch.setattr(
        doctor, "_backend", lambda name, device: {"backend": name, "device": str(device), **absent}
    )
    monkeypatch.setattr(runtime, "chosen_backend", lambda device: "cuda")
    monkeypatch.setattr(
        runtime, "why_not", lambda name, device: "it is too old" if device.index else None
    )
    monkeypatch.setattr(doctor, "self_test", lambda device, backend: [record])
    status = cli.main(["doctor"])
    out = capsys.readouterr().out
    assert "Self-test of cuda:0" in out and "Self-test of cuda:1" not in out
    assert "na2d_small_fwd" in out and ("WRONG in d_key" in out) is (error > 1)
    assert status == (1 if error > 1 else 0)
    cli.main(["doctor", "--json"])
    assert json.loads(capsys.readouterr().out)["self_test"]["cuda:0"] == [record]
