"""What ptxas says of specializations, and the tables of it that tests keep.

In: (spec, architecture) pairs. Out: rows of registers, stack, spill stores and spill loads (bytes),
with warnings; a table on disk, and what has changed since it was written.
"""

import json
import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from natcupy.cuda import jit


def measure(job):
    """("spec sm_arch", row, warnings)."""
    spec, arch = job
    compiled = jit.compile_spec(spec, arch)
    usage = jit.resource_usage(compiled.log)[spec.entry]
    row = [usage.registers, usage.stack, usage.spill_stores, usage.spill_loads]
    return f"{spec} sm_{arch}", row, compiled.warnings


def measure_all(jobs):
    """One row per job, compiled in parallel: NVRTC works outside the interpreter's lock."""
    jit.toolkit()  # loaded once, before the threads
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(measure, jobs))


def check_table(path, jobs, measured, test):
    """A table knows all jobs, and what was measured is what it says.

    Exact for the compiler that made the table; another may allot registers otherwise.
    """
    table = json.loads(path.read_text())
    assert set(table["kernels"]) == {f"{spec} sm_{arch}" for spec, arch in jobs}
    version = ".".join(map(str, jit.toolkit().version))
    if version != table["nvrtc"]:
        pytest.skip(f"the table was made by NVRTC {table['nvrtc']}, this is {version}")
    known = table["kernels"]
    changed = {name: (known[name], row) for name, row, _ in measured if known[name] != row}
    assert not changed, f"run python tests/{test} and commit {path.name}"


def write_table(path, jobs):
    """Measure all jobs and write the table."""
    rows = {name: row for name, row, _ in measure_all(jobs)}
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(rows[name])}" for name in sorted(rows))
    version = ".".join(map(str, jit.toolkit().version))
    columns = '["registers", "stack", "spill stores", "spill loads"]'
    path.write_text(f'{{"nvrtc": "{version}", "columns": {columns}, "kernels": {{\n{lines}\n}}}}\n')
