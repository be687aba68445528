"""The code of the CPU kernels for processors that this host is not: compiled, but not run.

The assembly is read as text: what is called, whether numbers are converted one by one, and what the
loops that make logits consist of.
"""

import re
from itertools import chain

import pytest
import torch

from natcupy.cpu import host, kernels, micro
from natcupy.cpu.classes import LANES
from natcupy.cpu.emit import Machine, Module
from natcupy.neighborhood import Neighborhood

binding = pytest.importorskip("llvmlite.binding", reason="llvmlite compiles the CPU kernels")

AVX2, AVX512, NEON = Machine(16, 32), Machine(32, 64), Machine(32, 16)
TARGETS = {  # triple, processor, what the generator takes it for
    "AVX2": ("x86_64-unknown-linux-gnu", "haswell", AVX2),
    "AVX-512": ("x86_64-unknown-linux-gnu", "skylake-avx512", AVX512),
    "AVX2 on Windows": ("x86_64-pc-windows-msvc", "haswell", AVX2),
    "Cortex": ("aarch64-unknown-linux-gnu", "cortex-a72", NEON),
    "Neoverse": ("aarch64-unknown-linux-gnu", "neoverse-n1", NEON),
    "Apple": ("arm64-apple-macosx11", "apple-m1", NEON),
    "ARM on Windows": ("aarch64-pc-windows-msvc", "generic", NEON),
}
COMMENT = re.compile(r"\s*(?:##|//|\s# |;).*")
FUNCTION = re.compile(r"([a-z]\w*):")
LABEL = re.compile(r"\.?L\w+:")
# Directly, by an address in a register, or by the table of a Mach-O file.
CALL = re.compile(r"(?:bl|callq?) (\w+)$|movabsq \$(\w+), |ldr x\d+, \[x\d+, (\w+)@GOTPAGEOFF\]")
JUMP = re.compile(r"(?:b\.|j)[a-z]+ (\.?L\w+)")
MULTIPLY_ADD = re.compile(r"(?:fmla|fmla\.4s|vfmadd\w+ps) ")
ONE_BY_ONE = re.compile(r"vp(?:ins|ext)rw |vfmadd\w+ss |fmadd |fcvt [sh]\d+, [hs]\d+")
SPILL = re.compile(r"q\d+, .*\[(?:sp|x29)\b|[yz]mm\d+, .*\(%rsp\)|\(%rsp\), %[yz]mm")
FRAME = re.compile(r"movq %rsp, %rbp")  # else rbp is a register like others


class Assembly:
    """The functions of one module as lists of instructions and labels, and what they call."""

    def __init__(self, text, target, processor=None):
        triple, usual, _ = TARGETS[target]
        binding.initialize_all_targets()
        binding.initialize_all_asmprinters()
        self._compiler = binding.Target.from_triple(triple).create_target_machine(
            cpu=processor or usual, opt=2, jit=True
        )
        self._module = binding.parse_assembly(text)
        self._module.verify()
        prefix = "_" if "apple" in triple else ""
        self.functions, lines = {}, []
        for line in self._compiler.emit_assembly(self._module).splitlines():
            line = COMMENT.sub("", line).strip().replace("\t", " ")
            name = FUNCTION.fullmatch(line.removeprefix(prefix))
            if name:
                lines = self.functions[name[1]] = []
            elif LABEL.fullmatch(line) or line[:1].isalpha():
                lines.append(line)
        calls = map(CALL.match, chain(*self.functions.values()))
        self.called = {call[call.lastindex].removeprefix(prefix) for call in calls if call}

    def code_size(self):
        """Bytes of machine code in the object file."""
        code = binding.ObjectFileRef.from_data(self._compiler.emit_object(self._module))
        return sum(section.size() for section in code.sections() if section.is_text())

    def inner_loops(self, name):
        """The instructions of each loop of a function that multiplies and adds without a branch."""
        lines, start, loops = self.functions[name], 0, []
        for place, line in enumerate(lines):
            jump = JUMP.match(line)
            if LABEL.fullmatch(line):
                start = place
            elif jump and lines[start] == f"{jump[1]}:":
                loops.append(lines[start + 1 : place])
        return [loop for loop in loops if any(map(MULTIPLY_ADD.match, loop))]


def compiled(monkeypatch, target, dtype, processor=None):
    """What is common to a small problem's kernels, its forward and its backward pass."""
    monkeypatch.setattr(host, "machine", lambda: TARGETS[target][2])
    kernels.kernel.cache_clear()
    hood = Neighborhood((3, 3), (1, 1), (1, 1), (False, False))
    forward, backward = (
        kernels.kernel((20, 20), hood, 16, 16, 0, dtype, back, 1).spec for back in (False, True)
    )
    kernels.kernel.cache_clear()
    parts = forward.common, forward, backward
    return [Assembly(host.module_text(part), target, processor) for part in parts]


@pytest.mark.parametrize(
    ("target", "dtype"),
    [
        ("AVX-512", torch.float16),
        ("AVX2 on Windows", torch.float16),
        ("Neoverse", torch.bfloat16),
        ("Apple", torch.float16),
        ("ARM on Windows", torch.float16),
    ],
)
def test_whole_kernels_call_only_themselves_and_convert_vectors(monkeypatch, target, dtype):
    modules = compiled(monkeypatch, target, dtype)
    defined = set().union(*(module.functions for module in modules))
    called = set().union(*(module.called for module in modules))
    assert {"logits3", "softmax", "wrap_ends", "logit_gradients"} <= called <= defined
    assert modules[1].code_size() > 1000
    for module in modules:
        for name, lines in module.functions.items():
            assert not [line for line in lines if ONE_BY_ONE.match(line)], name


def test_missing_instructions_show(monkeypatch):
    """Without FMA and F16C libraries are called, one number at a time."""
    common, *_ = compiled(monkeypatch, "AVX2", torch.float16, processor="sandybridge")
    assert {"fmaf", "__extendhfsf2"} <= common.called
    assert any(map(ONE_BY_ONE.match, common.functions["across_half_16"]))


@pytest.mark.parametrize("target", ["AVX2", "AVX-512", "Cortex", "Neoverse", "Apple"])
@pytest.mark.parametrize(
    ("shape", "kernel_size"), [((28, 28), (7, 7)), ((512,), (63,))], ids=["map", "line"]
)
def test_sums_of_logits_stay_in_registers(monkeypatch, target, shape, kernel_size):
    machine = TARGETS[target][2]
    monkeypatch.setattr(host, "machine", lambda: machine)
    kernels.kernel.cache_clear()
    ones = (1,) * len(shape)
    hood = Neighborhood(kernel_size, ones, ones, (False,) * len(shape))
    common = kernels.kernel(shape, hood, 32, 32, 0, torch.float32, False, 1).spec.common
    kernels.kernel.cache_clear()
    module = Module("float", shared=True)
    together = machine.vectors_in(LANES, "float")
    sizes = {r: common.shared if r > 1 else common.singles for r in range(1, common.sides + 1)}
    sizes |= {2: common.beside} if common.beside else {}
    for rows, taps in sizes.items():
        micro.logits(module, rows, taps, together)
    assembly = Assembly(module.text(8 * machine.register_bytes), target)
    for rows, taps in sizes.items():
        loops = assembly.inner_loops(f"logits{rows}")
        sums = [sum(1 for line in loop if MULTIPLY_ADD.match(line)) for loop in loops]
        # one loop by taps, and those by columns
        columns = [
            min(micro.MOST_COLUMNS, size - at)
            for size in taps
            for at in range(0, size, micro.MOST_COLUMNS)
        ]
        vectors = [len(micro.registers_of(rows, size, together)) for size in taps]
        vectors += [-(-rows // together) * size for size in columns]
        each = machine.registers_of(LANES, "float")
        assert sorted(sums) == sorted(each * count for count in vectors)
        assert not [line for line in chain(*loops) if SPILL.search(line)]
        assert not any(map(FRAME.match, assembly.functions[f"logits{rows}"]))


def test_an_llvmlite_that_is_too_old_is_told(monkeypatch):
    """The one that numba 0.61 asks for reads LLVM's language as it was, without `ptr`."""
    monkeypatch.setattr(binding, "llvm_version_info", (15, 0, 7))
    assert re.search(r"llvmlite 0\.45 or newer.*pip install -U llvmlite", host._find_missing())
