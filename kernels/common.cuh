// Numbers and memory: what every kernel uses to read, compute and write.
//
// The prelude gives
//   SCALAR  F16, BF16, F32 or F64: how tensors are stored. Arithmetic is float, or double for F64.
//   ACCESS  bytes of one global access: 16, 8, 4 or 2, the widest that every pointer, stride and
//           row length allows. Shared memory is always read 16 bytes at a time.
//   LANES   threads that share one row of head_dim numbers: a power of two, at most 32.
// No toolkit header is needed: halves are raw 16-bit words.

struct F16 { unsigned short bits; };
struct BF16 { unsigned short bits; };
typedef float F32;
typedef double F64;
typedef SCALAR scalar_t;

template <class T> struct Accumulate { typedef float type; };
template <> struct Accumulate<double> { typedef double type; };
typedef Accumulate<scalar_t>::type acc_t;

struct alignas(16) Chunk { unsigned word[4]; };  // 16 bytes of a row, as stored

struct View {  // a tensor [batch, *spatial, heads, dim]; strides in numbers, the last one is 1
    void* data;
    long long batch;
    long long head;
    long long axis[3];
};

enum {
    MAX_THREADS = 256,
    CHUNK = 16 / sizeof(scalar_t),   // numbers in a chunk
    PIECE = ACCESS / sizeof(scalar_t)  // numbers in one global access
};

static_assert(ACCESS >= sizeof(scalar_t) && 16 % ACCESS == 0, "an access moves whole numbers");
static_assert(LANES >= 1 && LANES <= 32 && (LANES & (LANES - 1)) == 0, "lanes divide a warp");

// ---- conversions ---------------------------------------------------------------------------

__device__ __forceinline__ float widen(F16 x) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(x.bits));
    return f;
}
__device__ __forceinline__ float widen(BF16 x) { return __uint_as_float((unsigned)x.bits << 16); }
__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }

__device__ __forceinline__ void narrow(float x, F16& to) {
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to.bits) : "f"(x));
}
__device__ __forceinline__ void narrow(float x, BF16& to) {
    // Round to nearest even in integers: the conversion instruction starts at sm_80.
    const unsigned u = __float_as_uint(x);
    to.bits = x != x ? 0x7FFF : (unsigned short)((u + 0x7FFFu + ((u >> 16) & 1u)) >> 16);
}
__device__ __forceinline__ void narrow(float x, float& to) { to = x; }
__device__ __forceinline__ void narrow(double x, double& to) { to = x; }

__device__ __forceinline__ void unpack(F16, const Chunk& c, float (&x)[8]) {
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = widen(F16{(unsigned short)(c.word[i / 2] >> (i % 2 * 16))});
}
__device__ __forceinline__ void unpack(BF16, const Chunk& c, float (&x)[8]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        x[2 * i] = __uint_as_float(c.word[i] << 16);
        x[2 * i + 1] = __uint_as_float(c.word[i] & 0xFFFF0000u);
    }
}
__device__ __forceinline__ void unpack(float, const Chunk& c, float (&x)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = __uint_as_float(c.word[i]);
}
__device__ __forceinline__ void unpack(double, const Chunk& c, double (&x)[2]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) x[i] = __hiloint2double(c.word[2 * i + 1], c.word[2 * i]);
}
__device__ __forceinline__ void widen(const Chunk& c, acc_t (&x)[CHUNK]) {
    unpack(scalar_t(), c, x);
}

__device__ __forceinline__ void pack(F16, const float (&x)[8], Chunk& c) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        F16 a, b;
        narrow(x[2 * i], a);
        narrow(x[2 * i + 1], b);
        c.word[i] = a.bits | (unsigned)b.bits << 16;
    }
}
__device__ __forceinline__ void pack(BF16, const float (&x)[8], Chunk& c) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        BF16 a, b;
        narrow(x[2 * i], a);
        narrow(x[2 * i + 1], b);
        c.word[i] = a.bits | (unsigned)b.bits << 16;
    }
}
__device__ __forceinline__ void pack(float, const float (&x)[4], Chunk& c) {
#pragma unroll
    for (int i = 0; i < 4; ++i) c.word[i] = __float_as_uint(x[i]);
}
__device__ __forceinline__ void pack(double, const double (&x)[2], Chunk& c) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        c.word[2 * i] = __double2loint(x[i]);
        c.word[2 * i + 1] = __double2hiint(x[i]);
    }
}

// ---- exponentials, in base two: 2^x and log2(x) --------------------------------------------

#define LOG2_E 1.4426950408889634
#define LN_2 0.6931471805599453

__device__ __forceinline__ float exp_2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ double exp_2(double x) { return exp2(x); }

__device__ __forceinline__ float log_2(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ double log_2(double x) { return log2(x); }

__device__ __forceinline__ acc_t minus_infinity() { return -(acc_t)__int_as_float(0x7F800000); }

// ---- global memory -------------------------------------------------------------------------
// Inputs are never written while a kernel runs, so they may be read through the read-only path.

__device__ __forceinline__ Chunk load_chunk(const void* at, int pieces) {
    // The first `pieces` accesses of 16 bytes at `at`; the rest of the chunk is zero.
    Chunk c = {{0u, 0u, 0u, 0u}};
    const char* from = (const char*)at;
    if constexpr (ACCESS == 16) {
        if (pieces > 0)
            asm("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
                : "=r"(c.word[0]), "=r"(c.word[1]), "=r"(c.word[2]), "=r"(c.word[3]) : "l"(from));
    } else if constexpr (ACCESS == 8) {
#pragma unroll
        for (int i = 0; i < 2; ++i)
            if (i < pieces)
                asm("ld.global.nc.v2.u32 {%0, %1}, [%2];"
                    : "=r"(c.word[2 * i]), "=r"(c.word[2 * i + 1]) : "l"(from + 8 * i));
    } else if constexpr (ACCESS == 4) {
#pragma unroll
        for (int i = 0; i < 4; ++i)
            if (i < pieces) asm("ld.global.nc.u32 %0, [%1];" : "=r"(c.word[i]) : "l"(from + 4 * i));
    } else {
#pragma unroll
        for (int i = 0; i < 8; ++i)
            if (i < pieces) {
                unsigned short h;
                asm("ld.global.nc.u16 %0, [%1];" : "=h"(h) : "l"(from + 2 * i));
                c.word[i / 2] |= (unsigned)h << (i % 2 * 16);
            }
    }
    return c;
}

__device__ __forceinline__ void store_chunk(void* at, int pieces, const Chunk& c) {
    char* to = (char*)at;
    if constexpr (ACCESS == 16) {
        if (pieces > 0) *(Chunk*)to = c;
    } else if constexpr (ACCESS == 8) {
#pragma unroll
        for (int i = 0; i < 2; ++i)
            if (i < pieces) {
                const unsigned long long both =
                    (unsigned long long)c.word[2 * i + 1] << 32 | c.word[2 * i];
                ((unsigned long long*)to)[i] = both;
            }
    } else if constexpr (ACCESS == 4) {
#pragma unroll
        for (int i = 0; i < 4; ++i)
            if (i < pieces) ((unsigned*)to)[i] = c.word[i];
    } else {
#pragma unroll
        for (int i = 0; i < 8; ++i)
            if (i < pieces)
                ((unsigned short*)to)[i] = (unsigned short)(c.word[i / 2] >> (i % 2 * 16));
    }
}

// ---- a row of head_dim numbers, shared by LANES threads ------------------------------------
// Lane `lane` holds chunks lane, lane + LANES, ...: neighbours touch neighbouring chunks. Numbers
// past `dim` read as zero and are not written.

__device__ __forceinline__ int pieces_left(int chunk, int dim) {
    return (dim - chunk * CHUNK) / (int)PIECE;  // dim is a multiple of PIECE
}

template <int CHUNKS>
__device__ __forceinline__ void load_share(
    const scalar_t* row, int dim, int lane, Chunk (&c)[CHUNKS]) {
#pragma unroll
    for (int i = 0; i < CHUNKS; ++i) {
        const int at = lane + LANES * i;
        c[i] = load_chunk(row + at * CHUNK, pieces_left(at, dim));
    }
}

template <int CHUNKS>
__device__ __forceinline__ void load_numbers(
    const scalar_t* row, int dim, int lane, acc_t (&x)[CHUNKS][CHUNK]) {
    Chunk c[CHUNKS];
    load_share(row, dim, lane, c);
#pragma unroll
    for (int i = 0; i < CHUNKS; ++i) widen(c[i], x[i]);
}

template <int CHUNKS>
__device__ __forceinline__ void store_numbers(
    scalar_t* row, int dim, int lane, const acc_t (&x)[CHUNKS][CHUNK]) {
#pragma unroll
    for (int i = 0; i < CHUNKS; ++i) {
        const int at = lane + LANES * i;
        Chunk c;
        pack(scalar_t(), x[i], c);
        store_chunk(row + at * CHUNK, pieces_left(at, dim), c);
    }
}

template <int CHUNKS>
__device__ __forceinline__ void set_zero(acc_t (&x)[CHUNKS][CHUNK]) {
#pragma unroll
    for (int i = 0; i < CHUNKS; ++i)
#pragma unroll
        for (int j = 0; j < CHUNK; ++j) x[i][j] = 0;
}

// This lane's part of the dot product of `x` with a stored row.
template <int CHUNKS>
__device__ __forceinline__ acc_t partial_dot(
    const acc_t (&x)[CHUNKS][CHUNK], const Chunk (&row)[CHUNKS]) {
    acc_t sum = 0;
#pragma unroll
    for (int i = 0; i < CHUNKS; ++i) {
        acc_t y[CHUNK];
        widen(row[i], y);
#pragma unroll
        for (int j = 0; j < CHUNK; ++j) sum += x[i][j] * y[j];
    }
    return sum;
}

// x += weight * row
template <int CHUNKS>
__device__ __forceinline__ void add_scaled(
    acc_t (&x)[CHUNKS][CHUNK], acc_t weight, const Chunk (&row)[CHUNKS]) {
#pragma unroll
    for (int i = 0; i < CHUNKS; ++i) {
        acc_t y[CHUNK];
        widen(row[i], y);
#pragma unroll
        for (int j = 0; j < CHUNK; ++j) x[i][j] += weight * y[j];
    }
}

template <int CHUNKS>
__device__ __forceinline__ void scale_by(acc_t (&x)[CHUNKS][CHUNK], acc_t factor) {
#pragma unroll
    for (int i = 0; i < CHUNKS; ++i)
#pragma unroll
        for (int j = 0; j < CHUNK; ++j) x[i][j] *= factor;
}

// ---- warps ---------------------------------------------------------------------------------
// Warps walk in step: every thread of a warp takes every turn of every loop, so all 32 meet here.

// The sum over the LANES threads of a row, the same bits in each.
__device__ __forceinline__ acc_t sum_over_lanes(acc_t x) {
#pragma unroll
    for (int step = LANES / 2; step > 0; step /= 2) x += __shfl_xor_sync(0xFFFFFFFFu, x, step);
    return x;
}

__device__ __forceinline__ int max_over_warp(int x) {
#pragma unroll
    for (int step = 16; step >= LANES; step /= 2) {
        const int other = __shfl_xor_sync(0xFFFFFFFFu, x, step);
        x = other > x ? other : x;
    }
    return x;
}
