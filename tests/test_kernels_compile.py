"""Every portable kernel compiles for every architecture without a warning, within the table.

`python tests/test_kernels_compile.py [kernel ...]` measures all of them, or those named, and writes
the table: registers, stack, spill stores and spill loads (bytes) per specialization and
architecture, as ptxas reports them. Do that after a kernel has changed, and read the difference.
"""

import importlib.util
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import pytest
from kernel_cases import CASES
from test_plan import problem

from natcupy.cuda import jit, plan, run

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("cupy") is None, reason="NVRTC comes with CuPy, which is not installed"
)

ARCHS = ("75", "80", "86", "89", "90a", "100a", "120a")
TABLE = Path(__file__).with_name("kernel_resources.json")

# What the models of the zoo and the embedded one run: (head_dim, window side).
ZOO = ((32, 7), (32, 11), (16, 3))


def zoo_specs(models=ZOO, dtypes=("F16", "BF16", "F32")):
    """Specializations of the models, with and without bias."""
    found = {}
    for (dim, k), dtype, rpb in product(models, dtypes, (False, True)):
        p = problem((56, 56), (k, k), (1, 1), (1, 1), (False, False), head_dim=dim, value_dim=dim,
                    dtype=dtype, rpb=rpb)  # fmt: skip
        found |= dict.fromkeys(specs_of(p))
    return tuple(found)


def case_specs():
    """Specializations of the test table that no model runs."""
    found = {}
    for case in CASES:
        hood = case.hood
        width = {"offset": 2, "packed": 16}.get(case.layout, 16)
        p = problem(
            case.shape, hood.kernel_size, hood.stride, hood.dilation, hood.is_causal,
            dtype=run.DTYPES[case.dtype], batch=case.batch, heads=case.heads,
            kv_heads=case.kv_heads, head_dim=case.head_dim, value_dim=case.value_dim,
            extras=case.extras, rpb=case.rpb,
            alignment=max(width, case.dtype.itemsize) if width < 16 else 16,
        )  # fmt: skip
        found |= dict.fromkeys(specs_of(p))
    return tuple(spec for spec in found if spec not in set(zoo_specs()))


def specs_of(p):
    """Portable kernels only; the small-window ones have a test of their own."""
    with plan.use_family("portable"):
        plans = (
            plan.forward(p),
            plan.backward(p, True, p.rpb, True),
            plan.backward(p, True, False, 0),
        )
    return [recipe.spec for made in plans for recipe in made.recipes]


def measure(job):
    """((spec, arch), usage, warnings)."""
    spec, arch = job
    compiled = jit.compile_spec(spec, arch)
    usage = jit.resource_usage(compiled.log)[spec.entry]
    row = [usage.registers, usage.stack, usage.spill_stores, usage.spill_loads]
    return job, row, compiled.warnings


def measure_all(jobs):
    jit.toolkit()  # loaded once, before the threads
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # NVRTC works outside the interpreter's lock
        return list(pool.map(measure, jobs))


@pytest.fixture(scope="module")
def measured():
    """NAT's own on every architecture; of the others on one each, in turn, all that models run and
    every second that only the table of cases has."""
    everywhere = zoo_specs(ZOO[:1], ("BF16",))
    others = [s for s in zoo_specs() if s not in set(everywhere)] + [*case_specs()[::2]]
    jobs = [(spec, arch) for spec in everywhere for arch in ARCHS]
    jobs += [(spec, ARCHS[i % len(ARCHS)]) for i, spec in enumerate(others)]
    return measure_all(jobs)


def test_no_warning(measured):
    noisy = {f"{spec} sm_{arch}": w for (spec, arch), _, w in measured if w}
    assert not noisy


def test_models_do_not_spill(measured):
    models = set(zoo_specs())
    spilling = [
        (str(spec), arch, row)
        for (spec, arch), row, _ in measured
        if spec in models and any(row[1:])
    ]
    assert not spilling


def test_resources_are_those_of_the_table(measured):
    """Exact for the compiler that made the table; another may allot registers otherwise."""
    table = json.loads(TABLE.read_text())
    missing = [str(spec) for (spec, _), _, _ in measured if str(spec) not in table["kernels"]]
    assert not missing, f"run python tests/{Path(__file__).name} and commit {TABLE.name}"
    version = ".".join(map(str, jit.toolkit().version))
    if version != table["nvrtc"]:
        pytest.skip(f"the table was made by NVRTC {table['nvrtc']}, this is {version}")
    changed = {
        f"{spec} sm_{arch}": (table["kernels"][str(spec)][arch], row)
        for (spec, arch), row, _ in measured
        if table["kernels"][str(spec)][arch] != row
    }
    assert not changed, f"run python tests/{Path(__file__).name} and commit {TABLE.name}"


def test_table_has_nothing_else():
    table = json.loads(TABLE.read_text())["kernels"]
    assert set(table) == {str(spec) for spec in (*zoo_specs(), *case_specs())}
    assert all(tuple(row) == ARCHS for row in table.values())


def write_table(kernels):
    specs = (*zoo_specs(), *case_specs())
    known = json.loads(TABLE.read_text())["kernels"] if kernels else {}
    again = [spec for spec in specs if spec.entry in kernels or str(spec) not in known]
    rows = {str(spec): known.get(str(spec), {}) for spec in sorted(specs, key=str)}
    for (spec, arch), row, _ in measure_all(list(product(again, ARCHS))):
        rows[str(spec)][arch] = row
    version = ".".join(map(str, jit.toolkit().version))
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items())
    columns = '["registers", "stack", "spill stores", "spill loads"]'
    TABLE.write_text(
        f'{{"nvrtc": "{version}", "columns": {columns}, "kernels": {{\n{lines}\n}}}}\n'
    )
    print(
        f"{TABLE}: {len(again)} of {len(specs)} specializations on {len(ARCHS)} architectures",
        file=sys.stderr,
    )


if __name__ == "__main__":
    write_table(sys.argv[1:])
