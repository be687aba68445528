"""backend="cpu" with narrower vectors than the processor has, as ATEN_CPU_CAPABILITY asks for them.

Where the suite runs on AVX-512, so do the tests here, in processes of their own, with AVX2.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from natcupy.cpu import host

HERE = Path(__file__).parent
FOUND = "from natcupy.cpu import host; print(host.machine().register_bytes, host._target()[1])"
TESTS = (
    "test_cpu.py::test_everything_equals_the_oracle",
    "test_cpu.py::test_dtypes_equal_the_oracle",
    "test_cpu_memory.py::test_random_problems",
)

pytestmark = pytest.mark.skipif(
    host.missing is not None or host.machine().register_bytes < 64,
    reason="needs AVX-512, to go without",
)


def run(*arguments, asked):
    return subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | {"ATEN_CPU_CAPABILITY": asked, "PYTHONPATH": str(HERE.parent)},
        capture_output=True,
        text=True,
        timeout=600,
        cwd=HERE,
    )


@pytest.mark.parametrize(("asked", "register_bytes"), [("avx2", 32), ("default", 32)])
def test_vectors_are_at_most_as_wide_as_those_of_torch(asked, register_bytes):
    found, features = run("-c", FOUND, asked=asked).stdout.split()
    assert int(found) == register_bytes
    wide = [x for x in features.split(",") if x.startswith(("+avx512", "+avx10"))]
    assert "+avx2" in features.split(",") and not wide
    assert torch.backends.cpu.get_cpu_capability() == "AVX512"  # of this process


def test_the_oracle_agrees_with_avx2():
    done = run("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *TESTS, asked="avx2")
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout
