"""The kernels compile with CUDA 12's compiler too, without a warning; what they need is in a table.

CuPy holds one NVRTC per process, so CUDA 12's is called alone. In CI every specialization that the
models and tests use is compiled for one architecture, in turn, and of those every eighth, as well
as NAT's own; `python tests/test_cuda12.py` compiles all of them and writes the table (registers,
stack, spill stores and loads); with `--all`, every one for every architecture, and writes nothing.
"""

import importlib.util
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import nvrtc_alone
import pytest
import test_kernels_compile as portable
import test_mma_compile as mma
import test_small_compile as small

from natcupy.cuda import jit
from natcupy.cuda.nvrtc import compiler_options

FOUND = nvrtc_alone.find(12)
pytestmark = [
    pytest.mark.skipif(FOUND is None, reason="nvidia-cuda-nvrtc-cu12 is not installed"),
    pytest.mark.skipif(
        importlib.util.find_spec("cupy") is None,
        reason="CuPy, whose NVRTC is compared with, is not",
    ),
]
TABLE = Path(__file__).with_name("cuda12_resources.json")


def everything():
    """(spec, every architecture it is for)."""
    pairs = {spec: portable.ARCHS for spec in (*portable.zoo_specs(), *portable.case_specs())}
    for spec, arch in (*small.jobs(), *mma.jobs()):
        pairs[spec] = (*pairs.get(spec, ()), arch)
    return pairs


def in_turn():
    """Each specialization on one of its architectures."""
    return [(s, archs[i % len(archs)]) for i, (s, archs) in enumerate(everything().items())]


def sample():
    """What CI compiles."""
    nats_own = {*portable.zoo_specs(portable.ZOO[:1], ("BF16",))}
    return [job for i, job in enumerate(in_turn()) if i % 8 == 0 or job[0] in nats_own]


def measure_all(jobs):
    """{"spec sm_arch": (resources, warnings)}."""
    compiler = nvrtc_alone.Nvrtc(FOUND)

    def measure(job):
        spec, arch = job
        compiled = compiler.compile(jit.source_text(spec), spec.source, compiler_options(arch))
        usage = jit.resource_usage(compiled.log)[spec.entry]
        row = [usage.registers, usage.stack, usage.spill_stores, usage.spill_loads]
        return f"{spec} sm_{arch}", (row, compiled.warnings)

    measure(jobs[0])  # its first compile wants to be alone
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(pool.map(measure, jobs))


@pytest.fixture(scope="module")
def measured():
    return measure_all(sample())


def test_it_is_cuda_12_and_knows_the_architectures():
    compiler = nvrtc_alone.Nvrtc(FOUND)
    assert compiler.version[0] == 12
    assert {int(arch.rstrip("a")) for arch in portable.ARCHS} <= set(compiler.archs)
    assert jit.toolkit().version[0] != 12 or compiler.version == jit.toolkit().version


def test_a_refused_text_says_why():
    with pytest.raises(RuntimeError, match="identifier"):
        nvrtc_alone.Nvrtc(FOUND).compile("int f() { return x; }", "x.cu", compiler_options("80"))


def test_no_warning(measured):
    assert not {name: warnings for name, (_, warnings) in measured.items() if warnings}


def test_models_do_not_spill(measured):
    models = {str(spec) for spec in portable.zoo_specs()}
    spilling = {
        n: r for n, (r, _) in measured.items() if n.split(" sm_")[0] in models and any(r[1:])
    }
    assert not spilling


def test_no_spill_in_the_table():
    table = json.loads(TABLE.read_text())["kernels"]
    ours = {name: row for name, row in table.items() if not name.startswith("na_mma")}
    assert not {name: row for name, row in ours.items() if small.spills(name, row)}
    rest = {name: row for name, row in table.items() if name not in ours}
    assert not {name: row for name, row in rest.items() if max(row[1:]) > mma.ASIDE}


def test_resources_are_those_of_the_table(measured):
    """Exact for the compiler that made the table; a row it lacks is for freshness to tell."""
    table = json.loads(TABLE.read_text())
    version = ".".join(map(str, nvrtc_alone.Nvrtc(FOUND).version))
    if version != table["nvrtc"]:
        pytest.skip(f"the table was made by NVRTC {table['nvrtc']}, this is {version}")
    known = table["kernels"]
    changed = {n: (known[n], r) for n, (r, _) in measured.items() if n in known and known[n] != r}
    assert not changed, f"run python tests/{Path(__file__).name} and commit {TABLE.name}"
    assert any(name in known for name in measured)


def main(arguments):
    jobs = list(product_of_all()) if "--all" in arguments else in_turn()
    found = measure_all(jobs)
    noisy = {name: warnings for name, (_, warnings) in found.items() if warnings}
    print(f"{len(found)} compiled, {len(noisy)} with warnings", file=sys.stderr)
    for name, warnings in noisy.items():
        print(name, *warnings, sep="\n  ", file=sys.stderr)
    if "--all" in arguments:
        return 1 if noisy else 0
    lines = ",\n".join(f"  {json.dumps(n)}: {json.dumps(found[n][0])}" for n in sorted(found))
    version = ".".join(map(str, nvrtc_alone.Nvrtc(FOUND).version))
    columns = '["registers", "stack", "spill stores", "spill loads"]'
    TABLE.write_text(
        f'{{"nvrtc": "{version}", "columns": {columns}, "kernels": {{\n{lines}\n}}}}\n'
    )
    return 0


def product_of_all():
    for spec, archs in everything().items():
        yield from product([spec], archs)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
