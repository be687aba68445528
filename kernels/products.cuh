// Products of a warp on tensor cores: 16 rows, two of each lane quad, with rows in shared memory.
//
// The prelude gives, beside what instructions.cuh asks for,
//   HEAD_DIM  32 or 64, of keys and values alike
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

// ---- rows ------------------------------------------------------------------------------------

// Where a chunk of a staged row lies in it: the swizzle depends on the column only. Columns 8 apart
// share it; of two neighbours the chunks 0 to 3 fill different banks.
__device__ __forceinline__ int place(int chunk, int column) {
    const int turn = column / 2 % 4;
    return chunk ^ (ROW == 64 ? turn : column % 2 * 4 + turn);
}

// This lane's chunks of a row in global memory, of which the first is at `chunk`; or zeros.
__device__ __forceinline__ void read_row(
    const scalar_t* chunk, bool real, Chunk (&x)[PIECES]) {
#pragma unroll
    for (int n = 0; n < PIECES; ++n) {
        x[n] = {};
        if (real) x[n] = read_global(chunk + 4 * n * CHUNK);
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

// sum += weights of the first `blocks` blocks, as products see them: rounded. Every column is the sum
// of a whole row. Floats are not rounded, and not summed here.
__device__ __forceinline__ unsigned ones(F16) { return 0x3C003C00u; }
__device__ __forceinline__ unsigned ones(BF16) { return 0x3F803F80u; }
template <class Half, int N>
__device__ __forceinline__ void add_up(Half, float (&sum)[4], const Weights<N>& w, int blocks) {
    const unsigned one = ones(Half());
    if (N >= 2 && blocks >= 2) {
        const unsigned a[4] = {w.word[0][0][0], w.word[0][1][0], w.word[N > 1][0][0],
                               w.word[N > 1][1][0]};
        multiply(Half(), sum, a, one, one);
    }
    if (blocks % 2 == 1) {
        constexpr int LAST = N == 3 ? 2 : 0;
        multiply(Half(), sum, w.word[LAST][0][0], w.word[LAST][1][0], one);
    }
}
template <int N>
__device__ __forceinline__ void add_up(F32, float (&)[4], const Weights<N>&, int) {}

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

// The first number of a row that lane `c` of four reads, and that it writes.
__device__ __forceinline__ int loaded(int c) { return c * CHUNK; }
__device__ __forceinline__ int stored(int c) { return FLOATS ? c * CHUNK : c % 2 * 8 + c / 2 * 4; }

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
    Half, scalar_t* to, const float (&x)[D / 8][4], int side, float factor, int c, bool write) {
    const bool odd = c & 1;
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
    F32, scalar_t* to, const float (&x)[D / 8][4], int side, float factor, int, bool write) {
#pragma unroll
    for (int n = 0; n < PIECES; ++n) {
        unsigned w[4];
#pragma unroll
        for (int j = 0; j < 4; ++j)
            w[j] = __float_as_uint(x[n / 2 * 4 + j][2 * side + n % 2] * factor);
        if (write) write_global(to + 4 * n * CHUNK, w);
    }
}

// All lanes take part, `to` is where each one's `stored` number of the row is; `write` says which rows
// there are.
__device__ __forceinline__ void store_row(
    scalar_t* to, const float (&x)[D / 8][4], int side, float factor, int c, bool write) {
    store_result(scalar_t(), to, x, side, factor, c, write);
}
