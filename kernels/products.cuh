// Products of a warp on tensor cores: 16 rows, two of each lane quad, with rows in shared memory.
//
// The prelude gives, beside what common.cuh asks for,
//   SCALAR    F16 (all there is before sm_80), BF16 or F32
//   HEAD_DIM  32 or 64, of keys and values alike
//   TERMS     of F32: 3 multiplies floats as sums of two parts, which is as exact as arithmetic in
//             floats; 1 keeps the 11 bits of tf32
//
// Staged rows are swizzled in chunks of 16 bytes, so that all ways to read them are free of bank
// conflicts: a row per lane quad, and for products over tokens 8 rows of a few chunks.

enum {
    D = HEAD_DIM,
    ROW = D * sizeof(scalar_t),  // bytes of a staged row
    CHUNKS = ROW / 16,           // 16-byte chunks of a row
    PIECES = CHUNKS / 4,         // of which a lane holds every fourth
    FLOATS = sizeof(scalar_t) == 4
};

static_assert(HEAD_DIM == 32 || HEAD_DIM == 64, "rows are 64, 128 or 256 bytes");
static_assert(TERMS == 1 || (TERMS == 3 && FLOATS), "only floats are multiplied in terms");

// ---- instructions ----------------------------------------------------------------------------

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
__device__ __forceinline__ void clear_chunk(unsigned to) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" :: "r"(to), "r"(0));
}

__device__ __forceinline__ void copies_done() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_all;" ::: "memory");
#endif
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

// ---- rows ------------------------------------------------------------------------------------

// Where a chunk of a staged row lies in it: the swizzle depends on the column only. Columns 8 apart
// share it; of two neighbours the chunks 0 to 3 fill different banks.
__device__ __forceinline__ int place(int chunk, int column) {
    const int turn = column / 2 % 4;
    return chunk ^ (ROW == 64 ? turn : column % 2 * 4 + turn);
}

// This lane's chunks of a row in global memory: c, c + 4, ...; or zeros.
__device__ __forceinline__ void read_row(
    const scalar_t* row, int c, bool real, Chunk (&x)[PIECES]) {
#pragma unroll
    for (int n = 0; n < PIECES; ++n) {
        x[n] = {};
        if (real) x[n] = read_global(row + (4 * n + c) * CHUNK);
    }
}

// 16 rows, two of each lane's column, as the left factor of products over HEAD_DIM.
//
// The order of the numbers is permuted, the same way left and right: lane c holds whole chunks, so
// a row is read 16 bytes at a time.
struct Left {
    unsigned a[PIECES][2][4];

    // `flip`, zero or the sign bits, makes every word a value of its own; otherwise ptxas keeps the
    // words where the load put them and copies all four before every product.
    __device__ __forceinline__ void set(
        const Chunk (&first)[PIECES], const Chunk (&second)[PIECES], unsigned flip) {
#pragma unroll
        for (int n = 0; n < PIECES; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                flipped(a[n][i / 2][i % 2 * 2], first[n].word[i], flip);
                flipped(a[n][i / 2][i % 2 * 2 + 1], second[n].word[i], flip);
            }
    }
    // Once: the compiler would repeat a plain one in every step.
    __device__ __forceinline__ void flipped(unsigned& to, unsigned word, unsigned flip) {
        asm volatile("xor.b32 %0, %1, %2;" : "=r"(to) : "r"(word), "r"(flip));
    }
    // Floats are split anew for every step: the parts of all would fill the registers, where ptxas
    // keeps them unless the words seem to change.
    __device__ __forceinline__ void renew(unsigned zero) {
        if (TERMS == 3)
#pragma unroll
            for (int n = 0; n < PIECES; ++n)
#pragma unroll
                for (int i = 0; i < 8; ++i) a[n][i / 4][i % 4] ^= zero;
    }
};

// The product of each of the 16 rows with the row of its own number among 16 others, two of which
// every lane holds chunks of: [first or second row]. Of all products of two rows of 8 the diagonal
// is wanted; of column g lane 4 g + g / 2 has it.
template <class Half>
__device__ __forceinline__ void dots(
    Half, const Left& rows, const Chunk (&other)[2][PIECES], int lane, float (&sum)[2]) {
#pragma unroll
    for (int side = 0; side < 2; ++side) {
        float s[4] = {0, 0, 0, 0};
#pragma unroll
        for (int n = 0; n < PIECES; ++n)
#pragma unroll
            for (int i = 0; i < 2; ++i)
                multiply(Half(), s, rows.a[n][i], other[side][n].word[2 * i],
                         other[side][n].word[2 * i + 1]);
        const float mine = lane & 4 ? s[2 * side + 1] : s[2 * side];
        sum[side] = __shfl_sync(0xFFFFFFFFu, mine, lane / 4 * 4 + lane / 8);
    }
}
__device__ __forceinline__ void dots(
    F32, const Left& rows, const Chunk (&other)[2][PIECES], int, float (&sum)[2]) {
#pragma unroll
    for (int side = 0; side < 2; ++side) {
        sum[side] = 0;
#pragma unroll
        for (int n = 0; n < PIECES; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i)
                sum[side] += __uint_as_float(rows.a[n][i / 2][i % 2 * 2 + side]) *
                             __uint_as_float(other[side][n].word[i]);
        sum[side] = sum_of_quad(sum[side]);
    }
}

// Byte offset of this lane's chunk of a block of 8 columns that starts at `column`: right factors.
__device__ __forceinline__ unsigned row_offset(int column, int lane) {
    column += lane / 4;
    return column * ROW + place(lane % 4, column) * 16;
}

// s += products of 16 rows with the first `blocks` blocks of 8 staged rows, the first at `at`,
// `block_bytes` apart; of floats the small terms are in `rest`.
template <int N>
__device__ __forceinline__ void multiply_rows(
    float (&s)[N][4], float (&rest)[N][4], const Left& rows, unsigned at, unsigned block_bytes,
    int blocks) {
#pragma unroll
    for (int n = 0; n < PIECES; ++n) {
        Chunk c[N];
#pragma unroll
        for (int h = 0; h < N; ++h)
            if (h < blocks) c[h] = read_chunk((at ^ (n % 2 * 64)) + n / 2 * 128 + h * block_bytes);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const Factor a = factor(scalar_t(), rows.a[n][i]);
#pragma unroll
            for (int h = 0; h < N; ++h)
                if (h < blocks)
                    multiply(
                        scalar_t(), s[h], rest[h], a, c[h].word[2 * i], c[h].word[2 * i + 1]);
        }
    }
}

// Scores of 16 rows with the first `blocks` of N blocks of staged rows.
template <int N>
__device__ __forceinline__ void scores(
    float (&s)[N][4], const Left& rows, unsigned at, unsigned block_bytes, int blocks = N) {
    float rest[N][4];
#pragma unroll
    for (int h = 0; h < N; ++h)
#pragma unroll
        for (int e = 0; e < 4; ++e) s[h][e] = rest[h][e] = 0;
    multiply_rows(s, rest, rows, at, block_bytes, blocks);
    if (TERMS == 3)
#pragma unroll
        for (int h = 0; h < N; ++h)
#pragma unroll
            for (int e = 0; e < 4; ++e) s[h][e] += rest[h][e];
}

// The same on top of `start`.
template <int N>
__device__ __forceinline__ void scores(
    float (&s)[N][4], const float (&start)[N][4], const Left& rows, unsigned at,
    unsigned block_bytes) {
    float rest[N][4];
#pragma unroll
    for (int h = 0; h < N; ++h)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            // NOTE: floats start from zero: what tensor cores truncate is a share of the sum.
            s[h][e] = FLOATS ? 0 : start[h][e];
            rest[h][e] = 0;
        }
    multiply_rows(s, rest, rows, at, block_bytes, N);
    if (FLOATS)
#pragma unroll
        for (int h = 0; h < N; ++h)
#pragma unroll
            for (int e = 0; e < 4; ++e)
                s[h][e] = (TERMS == 3 ? s[h][e] + rest[h][e] : s[h][e]) + start[h][e];
}

// The same on top of what `s` holds. Exact floats are added last: see `multiply`.
template <int N>
__device__ __forceinline__ void add_scores(
    float (&s)[N][4], const Left& rows, unsigned at, unsigned block_bytes, int blocks) {
    if (TERMS == 3) {
        float sum[N][4];
        scores(sum, rows, at, block_bytes, blocks);
#pragma unroll
        for (int h = 0; h < N; ++h)
#pragma unroll
            for (int e = 0; e < 4; ++e) s[h][e] += sum[h][e];
    } else {
        multiply_rows(s, s, rows, at, block_bytes, blocks);
    }
}

// ---- products over tokens --------------------------------------------------------------------

// Weights of 16 rows and a step of N blocks of 8 tokens: a lane's are those of two tokens.
template <int N>
struct Weights {
    unsigned word[N][2][FLOATS ? 2 : 1];  // block, row, token; halves are pairs

    __device__ __forceinline__ void clear(int block) {
#pragma unroll
        for (int side = 0; side < 2; ++side)
#pragma unroll
            for (int e = 0; e < (FLOATS ? 2 : 1); ++e) word[block][side][e] = 0;
    }
    __device__ __forceinline__ void set(int block, int side, float first, float second) {
        keep(scalar_t(), word[block][side], first, second);
    }
};

// Byte offsets of what this lane reads of a step's rows for products over tokens. Halves: of two
// blocks, and of one. Floats: of the first and the second token of each block.
struct Across {
    unsigned at[2];

    __device__ __forceinline__ Across(int column, int lane, unsigned block_bytes) {
        if (FLOATS) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const int token = column + lane % 4 * 2 + e;
                // Lanes of one token take the chunks 0, 4, 1, 5, ...: see `store_row`.
                at[e] = token * ROW + place(lane / 8 + lane / 4 % 2 * 4, token) * 16;
            }
        } else {  // lane n names row n % 8 of matrix n / 8
            column += lane % 8;
            at[0] = column * ROW + place(lane / 16, column) * 16 + lane / 8 % 2 * block_bytes;
            at[1] = column * ROW + place(lane / 8, column) * 16;
        }
    }
    __device__ __forceinline__ void operator+=(unsigned bytes) {
        at[0] += bytes;
        at[1] += bytes;
    }
    __device__ __forceinline__ Across operator+(unsigned bytes) const {
        Across moved = *this;
        moved += bytes;
        return moved;
    }
};

// out += weights of the first `blocks` blocks of a step times their staged rows.
template <class Half, int N>
__device__ __forceinline__ void accumulate(
    Half, float (&out)[D / 8][4], const Weights<N>& w, const Across& from, unsigned block_bytes,
    int blocks) {
    if (N >= 2 && blocks >= 2) {
        const unsigned a[4] = {w.word[0][0][0], w.word[0][1][0], w.word[N > 1][0][0],
                               w.word[N > 1][1][0]};
#pragma unroll
        for (int j = 0; j < D / 16; ++j) {
            unsigned b[4];
            read_transposed(b, from.at[0] ^ (j * 32));
            multiply(Half(), out[2 * j], a, b[0], b[1]);
            multiply(Half(), out[2 * j + 1], a, b[2], b[3]);
        }
    }
    if (blocks % 2 == 1) {
        constexpr int LAST = N == 3 ? 2 : 0;
#pragma unroll
        for (int j = 0; j < D / 32; ++j) {
            unsigned b[4];
            read_transposed(b, (from.at[1] ^ (j * 64)) + LAST * block_bytes);
#pragma unroll
            for (int i = 0; i < 4; ++i)
                multiply(Half(), out[4 * j + i], w.word[LAST][0][0], w.word[LAST][1][0], b[i]);
        }
    }
}

// Column n of out[4 j + i] is number i of chunk 8 j + n / 2 + n % 2 * 4.
template <int N>
__device__ __forceinline__ void accumulate(
    F32, float (&out)[D / 8][4], const Weights<N>& w, const Across& from, unsigned block_bytes,
    int blocks) {
    Factor a[N];
#pragma unroll
    for (int n = 0; n < N; ++n)
        a[n] = factor(F32(), {w.word[n][0][0], w.word[n][1][0], w.word[n][0][FLOATS],
                              w.word[n][1][FLOATS]});
#pragma unroll
    for (int j = 0; j < D / 32; ++j) {
        Chunk first[N], second[N];
#pragma unroll
        for (int n = 0; n < N; ++n) {
            if (n >= blocks) break;
            first[n] = read_chunk(from.at[0] + n * block_bytes + j * 128);
            second[n] = read_chunk(from.at[1] + n * block_bytes + j * 128);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            float sum[4] = {0, 0, 0, 0}, rest[4] = {0, 0, 0, 0};
#pragma unroll
            for (int n = 0; n < N; ++n) {
                if (n >= blocks) break;
                multiply(F32(), sum, rest, a[n], first[n].word[i], second[n].word[i]);
            }
#pragma unroll
            for (int e = 0; e < 4; ++e)
                out[4 * j + i][e] += TERMS == 3 ? sum[e] + rest[e] : sum[e];
        }
    }
}

__device__ __forceinline__ void write_global(scalar_t* at, const unsigned (&w)[4]) {
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};"
        :: "l"(at), "r"(w[0]), "r"(w[1]), "r"(w[2]), "r"(w[3]) : "memory");
}
__device__ __forceinline__ void write_global(
    scalar_t* at, unsigned first, unsigned second, bool write) {
    asm volatile("{.reg .pred p; setp.ne.b32 p, %3, 0; @p st.global.v2.b32 [%0], {%1, %2};}"
        :: "l"(at), "r"(first), "r"(second), "r"((int)write) : "memory");
}

// A row of results times `factor`. Of halves, four lanes hold pairs of numbers of every 8: two lanes
// trade pairs of two eights, so that the four write 32 bytes at a time. Of floats, lanes hold their
// chunks.
template <class Half>
__device__ __forceinline__ void store_result(
    Half, scalar_t* row, const float (&x)[D / 8][4], int side, float factor, int c, bool write) {
    const bool odd = c & 1;
    scalar_t* to = row + c % 2 * 8 + c / 2 * 4;
#pragma unroll
    for (int j = 0; j < D / 8; j += 2) {
        const unsigned low =
            pair(Half(), x[j][2 * side] * factor, x[j][2 * side + 1] * factor);
        const unsigned high =
            pair(Half(), x[j + 1][2 * side] * factor, x[j + 1][2 * side + 1] * factor);
        const unsigned got = __shfl_xor_sync(0xFFFFFFFFu, odd ? low : high, 1);
        write_global(to + j * 8, odd ? got : low, odd ? high : got, write);
    }
}
__device__ __forceinline__ void store_result(
    F32, scalar_t* row, const float (&x)[D / 8][4], int side, float factor, int c, bool write) {
#pragma unroll
    for (int n = 0; n < PIECES; ++n) {
        unsigned w[4];
#pragma unroll
        for (int j = 0; j < 4; ++j)
            w[j] = __float_as_uint(x[n / 2 * 4 + j][2 * side + n % 2] * factor);
        if (write) write_global(row + (4 * n + c) * CHUNK, w);
    }
}

// All lanes take part; `write` says which rows there are.
__device__ __forceinline__ void store_row(
    scalar_t* row, const float (&x)[D / 8][4], int side, float factor, int c, bool write) {
    store_result(scalar_t(), row, x, side, factor, c, write);
}
