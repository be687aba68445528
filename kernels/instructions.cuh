// What a warp asks of tensor cores and shared memory, one instruction or a few at a time.
//
// The prelude gives, beside what common.cuh asks for,
//   SCALAR    F16 (all there is before sm_80), BF16 or F32
//   TERMS     of F32: 3 multiplies floats as sums of two parts, which is as exact as arithmetic in
//             floats; 1 keeps the 11 bits of tf32

static_assert(
    TERMS == 1 || (TERMS == 3 && sizeof(scalar_t) == 4), "only floats are multiplied in terms");

// ---- memory ----------------------------------------------------------------------------------

__device__ __forceinline__ unsigned shared_address(const void* p) {
    return (unsigned)__cvta_generic_to_shared(p);
}

// 16 bytes to shared memory; there after `copies_done`.
__device__ __forceinline__ void copy_chunk(unsigned to, const void* from) {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" :: "r"(to), "l"(from));
#else
    unsigned x, y, z, w;
    asm("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(x), "=r"(y), "=r"(z), "=r"(w) : "l"(from));
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};"
        :: "r"(to), "r"(x), "r"(y), "r"(z), "r"(w));
#endif
}
// The same, or zeros, or nothing: `there` says whether anything is written.
__device__ __forceinline__ void copy_chunk(unsigned to, const void* from, bool there, bool real) {
#if __CUDA_ARCH__ >= 800
    asm volatile("{ .reg .pred p; setp.ne.s32 p, %2, 0;\n\t"
        "@p cp.async.cg.shared.global [%0], [%1], 16, %3; }"
        :: "r"(to), "l"(from), "r"((int)there), "r"(real ? 16 : 0));
#else
    if (there && real) copy_chunk(to, from);
    if (there && !real)
        asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" :: "r"(to), "r"(0));
#endif
}
__device__ __forceinline__ void clear_chunk(unsigned to) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" :: "r"(to), "r"(0));
}

__device__ __forceinline__ void copies_done() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// Asks for what will be read: it comes to the second-level cache, and no one waits for it.
__device__ __forceinline__ void ask_for(const void* at) {
    asm volatile("prefetch.global.L2 [%0];" :: "l"(at));
}

__device__ __forceinline__ Chunk read_chunk(unsigned at) {
    Chunk c;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
        : "=r"(c.word[0]), "=r"(c.word[1]), "=r"(c.word[2]), "=r"(c.word[3]) : "r"(at));
    return c;
}

template <int MORE = 0>
__device__ __forceinline__ float read_float(unsigned at) {
    float x;
    asm volatile("ld.shared.f32 %0, [%1 + %2];" : "=f"(x) : "r"(at), "n"(MORE));
    return x;
}

// Hides where a number comes from: sums with it are made where they are used, not ahead of a loop.
__device__ __forceinline__ void anew(unsigned& x) { asm volatile("" : "+r"(x)); }

__device__ __forceinline__ float read_float_if(bool real, unsigned at) {
    float x = 0;
    asm volatile("{ .reg .pred p; setp.ne.s32 p, %1, 0; @p ld.shared.f32 %0, [%2]; }"
        : "+f"(x) : "r"((int)real), "r"(at));
    return x;
}

// Four 8 x 8 blocks, transposed; lane n names row n % 8 of block n / 8.
__device__ __forceinline__ void read_transposed(unsigned (&b)[4], unsigned at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
        : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3]) : "r"(at));
}

__device__ __forceinline__ Chunk read_global(const void* at) {
    Chunk c;
    asm("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(c.word[0]), "=r"(c.word[1]), "=r"(c.word[2]), "=r"(c.word[3]) : "l"(at));
    return c;
}

// ---- products --------------------------------------------------------------------------------

// Sums go in and come out as values of their own: tied, they would be copied where both live on.
#define MMA(shape_and_types, a_list, b_list, ...) \
    asm volatile("mma.sync.aligned." shape_and_types " {%0, %1, %2, %3}, " a_list ", " b_list \
        ", {%4, %5, %6, %7};" \
        : "=f"(c[0]), "=f"(c[1]), "=f"(c[2]), "=f"(c[3]) \
        : "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]), __VA_ARGS__)

// c += A B: A is 16 x 16, B 16 x 8, in halves. A lane's words of A, lowest numbers of k first:
// first row, second row, first row, second row.
__device__ __forceinline__ void multiply(
    F16, float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
#if __CUDA_ARCH__ >= 800
    MMA("m16n8k16.row.col.f32.f16.f16.f32", "{%8, %9, %10, %11}", "{%12, %13}",
        "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
    MMA("m16n8k8.row.col.f32.f16.f16.f32", "{%8, %9}", "{%10}",
        "r"(a[0]), "r"(a[1]), "r"(b0));
    MMA("m16n8k8.row.col.f32.f16.f16.f32", "{%8, %9}", "{%10}",
        "r"(a[2]), "r"(a[3]), "r"(b1));
#endif
}

__device__ __forceinline__ void multiply(
    BF16, float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    MMA("m16n8k16.row.col.f32.bf16.bf16.f32", "{%8, %9, %10, %11}", "{%12, %13}",
        "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// c += A B: A is 16 x 8, B 8 x 8; the words of A are the first and the second row's.
__device__ __forceinline__ void multiply(F16, float (&c)[4], unsigned a0, unsigned a1, unsigned b) {
    MMA("m16n8k8.row.col.f32.f16.f16.f32", "{%8, %9}", "{%10}",
        "r"(a0), "r"(a1), "r"(b));
}
__device__ __forceinline__ void multiply(BF16, float (&c)[4], unsigned a0, unsigned a1, unsigned b) {
    MMA("m16n8k8.row.col.f32.bf16.bf16.f32", "{%8, %9}", "{%10}",
        "r"(a0), "r"(a1), "r"(b));
}

// c += A B: A is 16 x 8, B 8 x 8, of which the product sees 11 bits each.
__device__ __forceinline__ void multiply_tf32(
    float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    MMA("m16n8k8.row.col.f32.tf32.tf32.f32", "{%8, %9, %10, %11}", "{%12, %13}",
        "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// A float as two numbers of 11 bits each: 22 of its 24 bits, rounded. In integers, which takes two
// instructions, the conversion some eight; a NaN that loses its mark there keeps it in the low part.
__device__ __forceinline__ unsigned high_part(unsigned x) {
    if (TERMS == 3) return (x + 0x1000u) & 0xFFFFE000u;
    unsigned high;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(high) : "r"(x));
    return high;
}
__device__ __forceinline__ unsigned low_part(unsigned x, unsigned high) {
    return __float_as_uint(__uint_as_float(x) - __uint_as_float(high));
}

struct Factor {  // this lane's words of A; of floats the parts
    unsigned high[4], low[4];
};

template <class Half>
__device__ __forceinline__ Factor factor(Half, const unsigned (&a)[4]) {
    return {{a[0], a[1], a[2], a[3]}};
}
__device__ __forceinline__ Factor factor(F32, const unsigned (&a)[4]) {
    Factor f;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        f.high[i] = high_part(a[i]);
        f.low[i] = low_part(a[i], f.high[i]);
    }
    return f;
}

// sum + rest += A B, with two words of B.
template <class Half>
__device__ __forceinline__ void multiply(
    Half, float (&sum)[4], float (&)[4], const Factor& a, unsigned b0, unsigned b1) {
    multiply(Half(), sum, a.high, b0, b1);
}

// The same in floats. With three TERMS all but low x low, small ones in `rest`: tensor
// cores truncate where they add, which must not meet the large sum more often than it has to.
__device__ __forceinline__ void multiply(
    F32, float (&sum)[4], float (&rest)[4], const Factor& a, unsigned b0, unsigned b1) {
    const unsigned h0 = high_part(b0), h1 = high_part(b1);
    if (TERMS == 3) {
        multiply_tf32(rest, a.low, h0, h1);
        multiply_tf32(rest, a.high, low_part(b0, h0), low_part(b1, h1));
    }
    multiply_tf32(sum, a.high, h0, h1);
}

// ---- numbers ---------------------------------------------------------------------------------

// Two numbers in one word, the first one low.
__device__ __forceinline__ unsigned pair(F16, float low, float high) {
    unsigned both;
#if __CUDA_ARCH__ >= 800
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
#else
    F16 a, b;
    narrow(low, a);
    narrow(high, b);
    both = a.bits | (unsigned)b.bits << 16;
#endif
    return both;
}
__device__ __forceinline__ unsigned pair(BF16, float low, float high) {
    unsigned both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}

// Two numbers of a lane: in one word, the first one low, or in two.
template <class Half>
__device__ __forceinline__ void keep(Half, unsigned (&word)[1], float first, float second) {
    word[0] = pair(Half(), first, second);
}
__device__ __forceinline__ void keep(F32, unsigned (&word)[2], float first, float second) {
    word[0] = __float_as_uint(first);
    word[1] = __float_as_uint(second);
}

__device__ __forceinline__ float inverse(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float sum_of_quad(float x) {
    x += __shfl_xor_sync(0xFFFFFFFFu, x, 1);
    return x + __shfl_xor_sync(0xFFFFFFFFu, x, 2);
}
__device__ __forceinline__ float max_of_quad(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xFFFFFFFFu, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xFFFFFFFFu, x, 2));
}
