"""Small kernels for tests: one instruction over arrays, or CUDA source through NVRTC.

In: a line of PTX over registers %a, %b, %c -> %o and input arrays; or CUDA C++ text. Out: the
result array; or PTX bytes. Every instruction is run twice, by all threads and by a random part of
them, and the two must agree, so that masked execution is tested with each opcode.
"""

from __future__ import annotations

import functools
from types import ModuleType

import numpy as np

from . import Checks, Machine, Memory, load

HEAD = ".version 9.0\n.target sm_90a\n.address_size 64\n"
_BLOCK = 128
_SUFFIX = {"u": "u", "i": "s", "f": "f", "c": "b"}


def ptx_type(dtype: np.dtype) -> str:
    """u32 for uint32, s64 for int64, f32 for float32; float16 travels as b16."""
    dtype = np.dtype(dtype)
    if dtype == np.float16:
        return "b16"
    return f"{_SUFFIX[dtype.kind]}{8 * dtype.itemsize}"


def _register_type(name: str) -> str:
    return "b16" if name in ("u8", "s8", "u16", "s16", "b16") else name.replace("s", "b")


def kernel_text(line: str, inputs: list[np.dtype], out: np.dtype, extra: str = "") -> str:
    """PTX of `out[i] = line(a[i], b[i], c[i])` for threads whose `sel[i]` is not zero."""
    names = "abcd"[: len(inputs)]
    types = [ptx_type(d) for d in inputs]
    params = ", ".join(f".param .u64 p_{n}" for n in ["sel", "o", *names])
    declare = "".join(
        f".reg .{_register_type(t)} %{n};\n" for n, t in zip(names, types, strict=True)
    )
    kind = ptx_type(out)
    loads = "".join(
        f"ld.param.u64 %at, [p_{n}];\nmad.wide.u32 %at, %i, {np.dtype(d).itemsize}, %at;\n"
        f"ld.global.{t} %{n}, [%at];\n"
        for n, d, t in zip(names, inputs, types, strict=True)
    )
    return f"""{HEAD}
.visible .entry k({params})
{{
.reg .pred %p<8>; .reg .b16 %h<8>; .reg .b32 %r<16>; .reg .b64 %d<16>; .reg .f32 %f<8>;
.reg .f64 %g<8>; .reg .b32 %i; .reg .b32 %t<4>; .reg .b64 %at; .reg .pred %skip;
{declare}.reg .{_register_type(kind)} %o;
{extra}
mov.u32 %t0, %ctaid.x; mov.u32 %t1, %ntid.x; mov.u32 %t2, %tid.x;
mad.lo.s32 %i, %t0, %t1, %t2;
ld.param.u64 %at, [p_sel]; mad.wide.u32 %at, %i, 4, %at; ld.global.u32 %t3, [%at];
{loads}
setp.eq.u32 %skip, %t3, 0;
@%skip bra DONE;
{line}
DONE:
ld.param.u64 %at, [p_o]; mad.wide.u32 %at, %i, {np.dtype(out).itemsize}, %at;
st.global.{kind} [%at], %o;
ret;
}}
"""


def elementwise(
    line: str, inputs: list[np.ndarray], out: type[np.generic], extra: str = ""
) -> np.ndarray:
    """Run one line of PTX for every element; see the module's docstring."""
    count = len(inputs[0])
    padded = [np.resize(x, -(-count // _BLOCK) * _BLOCK) for x in inputs]
    program = load(kernel_text(line, [x.dtype for x in inputs], np.dtype(out), extra))
    results = []
    for select in (np.ones(len(padded[0])), np.random.default_rng(1).random(len(padded[0])) < 0.6):
        memory, select = Memory(), select.astype(np.uint32)
        result = np.zeros(len(select), out)
        addresses = [
            memory.alloc(select, "sel", "in"),
            memory.alloc(result, "o", "out"),
            *(memory.alloc(x, f"in{k}", "in") for k, x in enumerate(padded)),
        ]
        machine = Machine(program, memory, (_BLOCK, 1, 1))
        machine.run((len(select) // _BLOCK, 1, 1), [np.uint64(a) for a in addresses])
        if machine.issues:
            raise AssertionError([str(i) for i in machine.issues])
        got = memory.read(addresses[1], result)
        results.append(got)
        unsigned = f"u{got.dtype.itemsize}"
        kept = np.where(select != 0, results[0].view(unsigned), 0)
        np.testing.assert_array_equal(got.view(unsigned), kept)
    return results[0][:count]


def run(
    ptx: str | bytes,
    grid: tuple[int, int, int],
    block: tuple[int, int, int],
    arrays: dict[str, tuple[np.ndarray, str]],
    scalars: list[object] | None = None,
    shared: int = 0,
    entry: str | None = None,
    checks: Checks | None = None,
    seed: int | None = None,
) -> tuple[dict[str, np.ndarray], Machine]:
    """Run a kernel whose parameters are the arrays' addresses, then the scalars.

    `arrays` maps a name to (array, mode). Returns the arrays afterwards, and the machine.
    """
    memory = Memory()
    where = {name: memory.alloc(array, name, mode) for name, (array, mode) in arrays.items()}
    machine = Machine(load(ptx, entry), memory, block, shared, checks=checks, seed=seed)
    machine.run(grid, [*(np.uint64(a) for a in where.values()), *(scalars or [])])
    return {n: memory.read(a, arrays[n][0]) for n, a in where.items()}, machine


def warp_kernel(body: str, inputs: int = 1, out: str = "b32", shared: int = 0) -> str:
    """PTX of a kernel for one or more blocks of 32: body turns %a, %b, %c into %o, %q."""
    names = ["a", "b", "c"][:inputs]
    loads = "".join(
        f"ld.param.u64 %at, [p_{n}]; mad.wide.u32 %at, %i, 4, %at; ld.global.b32 %{n}, [%at];\n"
        for n in names
    )
    params = ", ".join(f".param .u64 p_{n}" for n in ["o", "q", *names])
    return f"""{HEAD}
.visible .entry k({params}) {{
.reg .pred %p<8>; .reg .b16 %h<8>; .reg .b32 %r<40>; .reg .b64 %d<16>; .reg .f32 %f<40>;
.reg .b32 %a; .reg .b32 %b; .reg .b32 %c; .reg .{out} %o; .reg .b32 %q; .reg .b32 %i;
.reg .b64 %at; .reg .b32 %l; .reg .b32 %n;
.shared .align 16 .b8 sh[{shared or 16}];
mov.u32 %l, %tid.x; mov.u32 %i, %ctaid.x; mov.u32 %n, %ntid.x; mad.lo.s32 %i, %i, %n, %l;
mov.u32 %o, 0; mov.u32 %q, 0;
{loads}
{body}
ld.param.u64 %at, [p_o]; mad.wide.u32 %at, %i, 4, %at; st.global.b32 [%at], %o;
ld.param.u64 %at, [p_q]; mad.wide.u32 %at, %i, 4, %at; st.global.b32 [%at], %q;
ret; }}
"""


def warp(
    body: str,
    *inputs: np.ndarray,
    threads: int = 32,
    blocks: int = 1,
    shared: int = 0,
    seed: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Run `body` and return (%o, %q); the checks must find nothing."""
    n = threads * blocks
    arrays = {"o": (np.zeros(n, np.uint32), "out"), "q": (np.zeros(n, np.uint32), "out")}
    arrays.update({f"i{k}": (np.resize(x, n), "in") for k, x in enumerate(inputs)})
    text = warp_kernel(body, len(inputs), shared=shared)
    got, machine = run(text, (blocks, 1, 1), (threads, 1, 1), arrays, seed=seed)
    assert not list(map(str, machine.issues))
    return got["o"], got["q"]


@functools.cache
def _nvrtc() -> ModuleType | str:
    """CuPy's low-level NVRTC binding, or why there is none."""
    try:
        import cupy  # noqa: F401  (finds the NVRTC library)
        from cupy_backends.cuda.libs import nvrtc

        nvrtc.getVersion()
        return nvrtc
    except (ImportError, OSError, RuntimeError) as error:
        return f"NVRTC through CuPy is not to be had: {error}"


def why_no_nvrtc() -> str:
    """Empty where CUDA source can be compiled, else the reason (for skipping tests)."""
    found = _nvrtc()
    return found if isinstance(found, str) else ""


@functools.lru_cache(maxsize=256)
def compile_cuda(source: str, arch: str = "80", options: tuple[str, ...] = ()) -> bytes:
    """PTX of a CUDA source without toolkit headers, with line information."""
    nvrtc = _nvrtc()
    if isinstance(nvrtc, str):
        raise RuntimeError(nvrtc)
    program = nvrtc.createProgram(source, "sample.cu", [], [])
    try:
        nvrtc.compileProgram(
            program,
            (f"--gpu-architecture=compute_{arch}", "--std=c++17", "-lineinfo", *options),
        )
        return nvrtc.getPTX(program)
    except Exception as error:
        raise RuntimeError(nvrtc.getProgramLog(program) or str(error)) from error
    finally:
        nvrtc.destroyProgram(program)
