"""Each check of the interpreter on a small CUDA kernel: the mistake is found, its correction is
not.
"""

import numpy as np
import pytest
from ptxsim import Checks, PtxFaultError, PtxParseError
from ptxsim.harness import compile_cuda, run, why_no_nvrtc

pytestmark = pytest.mark.skipif(bool(why_no_nvrtc()), reason=why_no_nvrtc())

F32, I32 = np.float32, np.int32
X = np.random.default_rng(5).standard_normal(256).astype(F32)


def kernel(body, params="const float* __restrict__ x, float* y, int n", before=""):
    return f"""
extern "C" {{ {before} }}
extern "C" __global__ void k({params}) {{
  const int t = threadIdx.x, i = blockIdx.x * blockDim.x + t;
  {body}
}}
"""


def go(body, *, grid=2, block=64, n=128, x=X, y=None, before="", shared=0, seed=None, checks=None,
       mode="out"):  # fmt: skip
    """Run `k(x, y, n)`; returns (y, machine)."""
    y = np.zeros(n, F32) if y is None else y
    ptx = compile_cuda(kernel(body, before=before))
    arrays = {"x": (x, "in"), "y": (y, mode)}
    got, machine = run(
        ptx, (grid, 1, 1), (block, 1, 1), arrays, [I32(n)], shared, "k", checks, seed
    )
    return got["y"], machine


def line_of(body, words):
    """The source line on which `words` stand."""
    lines = kernel(body).splitlines()
    return f"sample.cu:{next(k for k, line in enumerate(lines, 1) if words in line)}"


def test_out_of_bounds_is_told_with_place_and_thread():
    body = "int j = i + 1;\n  if (i < n) y[i] = x[i];\n  if (j == n) y[j] = 1.f;"
    _, machine = go(body)
    (issue,) = machine.issues
    assert issue.kind == "out-of-bounds" and "y+512 of 512" in issue.message
    assert issue.source == line_of(body, "y[j]")
    assert (issue.block, issue.thread) == ((1, 0, 0), (63, 0, 0))
    got, machine = go("if (i < n) y[i] = x[i];")
    assert not machine.issues.kinds()
    np.testing.assert_array_equal(got, X[:128])


def test_reads_out_of_bounds_give_no_neighbours():
    got, machine = go("y[i] = x[i + 200];")
    assert machine.issues.kinds() == {"out-of-bounds"}
    np.testing.assert_array_equal(got[:56], X[200:])
    assert np.isnan(got[56:]).all()


@pytest.mark.parametrize("place", ["x", "buffer"])
def test_misaligned(place):
    extra = "__shared__ __align__(16) float buffer[256]; buffer[t] = x[i]; __syncthreads();"
    body = f"{extra} float2 v = *(const float2*)({place} + t + n % 3); y[i] = v.x + v.y;"
    with pytest.raises(PtxFaultError, match="misaligned"):
        go(body)
    aligned = body.replace("t + n % 3", "(t & 30)")
    _, machine = go(aligned)
    assert not machine.issues.kinds()


@pytest.mark.parametrize(
    ("body", "clean"),
    [
        ("__shared__ float s[64]; if (t < 63) s[t] = x[i]; __syncthreads(); y[i] = s[63 - t];",
         "__shared__ float s[64]; s[t] = x[i]; __syncthreads(); y[i] = s[63 - t];"),
        ("float a[8]; a[n & 7] = x[i]; y[i] = a[(t + n) & 7];",
         "float a[8]; for (int j = 0; j < 8; ++j) a[(j + t) & 7] = x[i]; y[i] = a[(t + n) & 7];"),
        ("y[i] += x[i];", "y[i] = 0; y[i] += x[i];"),
        ("atomicAdd(y + i, x[i]);", "y[i] = 0; __syncthreads(); atomicAdd(y + i, x[i]);"),
    ],
    ids=["shared", "local", "global output", "atomic on output"],
)  # fmt: skip
def test_uninitialised(body, clean):
    _, machine = go(body)
    assert machine.issues.kinds() == {"uninitialised"}
    _, machine = go(body, checks=Checks(uninitialised=False))
    assert not machine.issues.kinds()
    _, machine = go(clean)
    assert not list(map(str, machine.issues))


def test_half_written_words_are_seen():
    body = (
        "__shared__ unsigned s[64]; ((unsigned short*)s)[2 * t] = t; __syncthreads();"
        "y[i] = s[t ^ 1];"
    )
    _, machine = go(body)
    assert machine.issues.kinds() == {"uninitialised"}


def test_data_that_looks_like_the_poison_is_no_false_alarm():
    poison = np.full(256, 0x7FDE7FDE, np.uint32).view(F32)
    body = "__shared__ float s[64]; s[t] = x[i]; __syncthreads(); y[i] = s[63 - t];"
    got, machine = go(body, x=poison)
    assert not machine.issues.kinds()
    assert (got.view(np.uint32) == 0x7FDE7FDE).all()


def test_inputs_may_not_be_written():
    _, machine = go("((float*)x)[i] = 0.f; y[i] = 1.f;")
    assert machine.issues.kinds() == {"read-only"}


def test_read_only_path():
    body = "float v = __ldg(y + (i ^ 1)); __syncthreads(); y[i] = v + 1.f;"
    _, machine = go(body, mode="inout")
    assert machine.issues.kinds() == {"non-coherent"}


SHARED_RACES = [
    ("s[t] = x[i]; y[i] = s[t ^ 32];", "s[t] = x[i]; __syncthreads(); y[i] = s[t ^ 32];"),
    ("s[t] = x[i]; __syncthreads(); float v = s[t ^ 32]; s[t] = v; y[i] = v;",
     "s[t] = x[i]; __syncthreads(); float v = s[t ^ 32]; __syncthreads(); s[t] = v; y[i] = v;"),
    ("s[t & 31] = t; __syncthreads(); y[i] = s[t & 31];",
     "if (t < 32) s[t] = t; __syncthreads(); y[i] = s[t & 31];"),
    ("s[t >> 1] = t; __syncthreads(); y[i] = s[t >> 1];",
     "if (t & 1) s[t >> 1] = t; __syncthreads(); y[i] = s[t >> 1];"),
]  # fmt: skip


@pytest.mark.parametrize("seed", [None, 1, 7])
@pytest.mark.parametrize(("body", "clean"), SHARED_RACES, ids=["raw", "war", "waw", "one warp"])
def test_shared_races(body, clean, seed):
    declare = "__shared__ volatile float s[64];\n  "
    quick = Checks(uninitialised=False)
    _, machine = go(declare + body, seed=seed, checks=quick)
    assert machine.issues.kinds() == {"race"}
    _, machine = go(declare + clean, seed=seed)
    assert not list(map(str, machine.issues))


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize(("body", "clean"), SHARED_RACES, ids=["raw", "war", "waw", "one warp"])
def test_shared_races_by_vector_clocks(body, clean, seed):
    """A named barrier makes the other detector take over; it must find the same."""
    declare = '__shared__ volatile float s[64]; asm volatile("bar.sync 2, 64;" ::: "memory");\n'
    quick = Checks(uninitialised=False)
    _, machine = go(declare + body, seed=seed, checks=quick)
    assert machine.issues.kinds() == {"race"}
    named = clean.replace("__syncthreads()", 'asm volatile("bar.sync 1, 64;" ::: "memory")')
    _, machine = go(declare + named, seed=seed)
    assert not list(map(str, machine.issues))


def test_race_names_both_places():
    body = "__shared__ volatile float s[64];\n  s[t] = x[i];\n  y[i] = s[t ^ 32];"
    _, machine = go(body, checks=Checks(uninitialised=False))
    issue = next(iter(machine.issues))
    assert issue.source == line_of(body, "s[t] = x[i]")
    assert f"({line_of(body, 's[t ^ 32]')}" in issue.message


GLOBAL_RACES = [
    ("y[i >> 1] = x[i];", "if (i & 1) y[i >> 1] = x[i];"),
    ("y[t] = x[i];", "if (blockIdx.x == 0) y[t] = x[i];"),
    ("y[i] = x[i]; y[i ^ 32] = x[i];", "y[i] = x[i]; __syncthreads(); y[i ^ 32] = x[i];"),
    ("float v = y[i ^ 64]; if (n) y[i] = v;", "float v = y[i ^ 32]; __syncthreads(); y[i] = v;"),
    ("y[i] = x[i]; float v = y[i ^ 64]; if (v == 3.f) y[i] = v;",
     "y[i] = x[i]; __syncthreads(); float v = y[i ^ 32]; __syncthreads(); if (v == 3.f) y[i] = v;"),
]  # fmt: skip


@pytest.mark.parametrize("seed", [None, 2])
@pytest.mark.parametrize(
    ("body", "clean"),
    GLOBAL_RACES,
    ids=["two threads", "two blocks", "two warps", "overwritten", "read"],
)
def test_global_races(body, clean, seed):
    _, machine = go(body, seed=seed, mode="inout")
    assert machine.issues.kinds() == {"race"}
    _, machine = go(clean, seed=seed, mode="inout")
    assert not list(map(str, machine.issues))


def test_races_across_batches_of_blocks():
    _, machine = go("y[t] = x[i];", grid=4, block=64, checks=Checks())
    assert machine.issues.kinds() == {"race"}
    _, machine = go("y[t] = x[i];", grid=4, block=64, checks=Checks(races=False))
    assert not machine.issues.kinds()


def test_last_block_pattern_is_left_to_the_fence():
    body = """
  __shared__ int last;
  y[i] = x[i];
  __threadfence();
  __syncthreads();
  if (t == 0) last = atomicAdd((int*)(y + n - 1), 1) == gridDim.x - 1;
  __syncthreads();
  if (last && t == 0) { volatile float* v = y; y[n - 2] = v[0] + v[64]; }"""
    got, machine = go(body, y=np.zeros(132, F32), n=132, mode="inout")
    assert not list(map(str, machine.issues))
    assert got[130] == X[0] + X[64]


def test_divergent_barrier_and_shuffle():
    with pytest.raises(PtxFaultError, match="16 threads of a warp"):
        go("__shared__ float s[64]; if (t & 16) s[t] = x[i]; if ((t & 31) < 16) __syncthreads();")
    with pytest.raises(PtxFaultError, match="divergent"):
        go("if (t & 1) y[i] = __shfl_xor_sync(0xffffffffu, x[i], 1);")
    _, machine = go("y[i] = __shfl_xor_sync(0xffffffffu, x[i], 1);")
    assert not machine.issues.kinds()


def test_deadlock_names_the_place():
    body = 'if (t < 32) asm volatile("bar.sync 1, 64;" ::: "memory");'
    with pytest.raises(PtxFaultError, match=r"deadlock: 64 threads at PTX line \d+ \(bar.sync"):
        go(body)


def test_syncwarp_and_divergent_loops():
    body = """
  float v = 0.f;
  for (int j = 0; j <= (t & 7); ++j) v += x[j];
  __syncwarp();
  y[i] = v + __shfl_sync(0xffffffffu, v, 7);"""
    got, machine = go(body)
    assert not machine.issues.kinds()
    sums = np.array([sum(X[: (t & 7) + 1], F32(0)) for t in range(128)], F32)
    np.testing.assert_allclose(got, sums + sums[7], rtol=1e-6)


def test_counted_votes_of_a_block():
    got, _ = go("y[i] = __syncthreads_count(x[i] > 0) + 1000 * __syncthreads_or(x[i] > 2.f);")
    for b in range(2):
        part = X[64 * b : 64 * b + 64]
        assert (got[64 * b : 64 * b + 64] == (part > 0).sum() + 1000 * (part > 2).any()).all()


def test_assertion_and_trap_end_the_launch():
    with pytest.raises(PtxFaultError, match="trap"):
        go("if (i == 70) __trap(); y[i] = 0.f;")


def test_printf_is_silent_and_a_failed_assertion_stops():
    printf = "__device__ int printf(const char*, ...);"
    got, machine = go('printf("%d\\n", i); y[i] = x[i];', before=printf)
    assert not machine.issues.kinds()
    np.testing.assert_array_equal(got, X[:128])
    fails = "__device__ void __assertfail(const char*, const char*, unsigned, const char*, size_t);"
    with pytest.raises(PtxFaultError, match="__assertfail"):
        go('y[i] = x[i]; if (i == 3) __assertfail("i", "f", 1, "k", 1);', before=fails)


def test_recursion_is_refused():
    source = """
static __device__ __noinline__ int f(int n) { return n < 2 ? n : f(n - 1) * f(n - 2) + 1; }
extern "C" __global__ void k(int* y) { y[threadIdx.x] = f(threadIdx.x); }"""
    with pytest.raises(PtxParseError, match="recursion"):
        run(compile_cuda(source), (1, 1, 1), (32, 1, 1), {"y": (np.zeros(32, I32), "out")})


def test_launch_bounds_are_honoured():
    source = kernel("y[i] = x[i];").replace("void k(", "void __launch_bounds__(32) k(")
    arrays = {"x": (X, "in"), "y": (np.zeros(64, F32), "out")}
    with pytest.raises(PtxFaultError, match="at most 32 threads"):
        run(compile_cuda(source), (1, 1, 1), (64, 1, 1), arrays, [I32(64)])


# -- language -------------------------------------------------------------------------------------

LANGUAGE = """
struct Inner { long long stride[3]; short tag; };
struct Params { float* y; const int* x; int n; Inner inner; float scale; unsigned char flags[5]; };
__constant__ int table[4] = {1, -2, 3, -4};
__device__ float bias[3] = {0.5f, 1.5f, 2.5f};
__device__ int calls;
static __device__ __noinline__ int power(int base, int exponent) {
  int r = 1;
  for (int j = 0; j < exponent; ++j) { if (r > 1000) return -r; r *= base; }
  return r;
}
static __device__ __noinline__ float twice(float v, int e) { return v * power(2, e); }
template <bool GRID> static __device__ void body(const Params& p) {
  extern __shared__ int dynamic[];
  __shared__ int fixed[33];
  const int t = threadIdx.x + blockDim.x * threadIdx.y, i = blockIdx.y * 64 + t;
  fixed[t & 31] = 0;
  __syncthreads();
  dynamic[t] = p.x[i] + (int)p.inner.stride[i % 3] + p.inner.tag;
  __syncthreads();
  int sorted[4];
  for (int j = 0; j < 4; ++j) sorted[j] = dynamic[(t + j) & 63];
  for (int a = 0; a < 3; ++a)
    for (int b = 0; b < 3 - a; ++b)
      if (sorted[b] > sorted[b + 1]) {
        int s = sorted[b];
        sorted[b] = sorted[b + 1];
        sorted[b + 1] = s;
      }
  float v = sorted[i & 3] * p.scale + table[i & 3] + bias[i % 3] + p.flags[i % 5];
  p.y[i] = twice(v, power(3, i & 1)) + power(t, 4);
  atomicAdd(&calls, 1);
}
extern "C" __global__ void first(const __grid_constant__ Params p) { body<true>(p); }
extern "C" __global__ void second(const Params p) { body<false>(p); }
"""


def language_reference(x):
    out = []
    table, bias, strides, flags = (
        [1, -2, 3, -4],
        [0.5, 1.5, 2.5],
        [7, -8, 1 << 33],
        [1, 2, 3, 4, 250],
    )

    def power(base, exponent):
        r = 1
        for _ in range(exponent):
            if r > 1000:
                return -r
            r *= base
        return r

    for i in range(128):
        t, block = i % 64, i // 64
        shared = [
            (int(x[64 * block + u]) + strides[(64 * block + u) % 3] - 9 + 2**31) % 2**32 - 2**31
            for u in range(64)
        ]
        v = sorted(shared[(t + j) & 63] for j in range(4))[i & 3] * 0.25
        v += table[i & 3] + bias[i % 3] + flags[i % 5]
        out.append(v * power(2, power(3, i & 1)) + power(t, 4))
    return np.array(out)


@pytest.mark.parametrize("arch", ["75", "80", "90a", "120a"])
@pytest.mark.parametrize("entry", ["first", "second"])
def test_structs_calls_tables_and_local_arrays(entry, arch):
    import struct

    from ptxsim import Machine, Memory, load

    x = np.random.default_rng(1).integers(-500, 500, 128).astype(I32)
    y = np.zeros(128, F32)
    memory = Memory()
    ay, ax = memory.alloc(y, "y", "out"), memory.alloc(x, "x", "in")
    args = struct.pack("<QQi4x3qh6xf5B7x", ay, ax, 128, 7, -8, 1 << 33, -9, 0.25, 1, 2, 3, 4, 250)
    program = load(compile_cuda(LANGUAGE, arch), entry)
    machine = Machine(program, memory, (16, 4, 1), 256)
    machine.run((1, 2, 1), args)
    assert not list(map(str, machine.issues))
    np.testing.assert_allclose(memory.read(ay, y), language_reference(x), rtol=1e-5)
    assert machine.counters.total > 0
    with pytest.raises(PtxFaultError, match="bytes of parameters, got 3"):
        Machine(program, memory, (16, 4, 1), 256).run((1, 2, 1), b"abc")


def test_variables_start_anew_with_each_launch():
    before = "__device__ float total;"
    body = "if (i == 0) { total += 1.f; y[0] = total; }"
    for _ in range(2):
        got, _ = go(body, before=before, mode="inout")
        assert got[0] == 1.0


def test_shared_out_of_bounds():
    for there in ("s[t + 1]", "s[t - 1]"):
        body = f"extern __shared__ float s[]; s[t] = x[i]; __syncthreads(); y[i] = {there};"
        _, machine = go(body, shared=256)
        assert machine.issues.kinds() == {"out-of-bounds"}
    _, machine = go("extern __shared__ float s[]; s[t + 1] = x[i]; y[i] = 1.f;", shared=256)
    assert machine.issues.kinds() == {"out-of-bounds"}


def test_wide_launch_shapes():
    body = "int b = blockIdx.x; if (t == 0) y[b] = x[b & 7] + b;"
    got, machine = go(body, grid=300, block=33, n=300)
    assert not machine.issues.kinds()
    np.testing.assert_array_equal(got, X[np.arange(300) & 7] + np.arange(300, dtype=F32))


def test_traffic_counts():
    body = "__shared__ float s[2048]; s[t * {0}] = x[i]; __syncthreads(); y[i] = s[t * {0}];"
    for pitch, ways in ((1, 1), (2, 2), (32, 32)):
        _, machine = go(body.format(pitch), checks=Checks(traffic=True))
        traffic = machine.counters.traffic
        assert traffic["shared read wavefronts"] == ways * traffic["shared read ideal"]
        assert traffic["global read sectors"] == 2 * 64 * 4 // 32
        assert traffic["global write bytes"] == 2 * 64 * 4
