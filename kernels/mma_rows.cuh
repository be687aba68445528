// Rows of a warp's 16 tokens, read, multiplied and written part by part: see mma.cuh.

// ---- rows that a lane owns -------------------------------------------------------------------

// This lane's chunks of a part of a row of `dim` numbers; zeros past its end, or where there is none.
__device__ __forceinline__ void read_part(
    const scalar_t* row, int part, int dim, bool there, Chunk (&x)[PIECES]) {
#pragma unroll
    for (int n = 0; n < PIECES; ++n) {
        const int at = part * D + (4 * n + threadIdx.x % 4) * CHUNK;
        x[n] = {};
        if (there && at < dim) x[n] = read_global(row + at);
    }
}

// The row of one of the lane's tokens.
__device__ __forceinline__ scalar_t* own_row(const Rows& rows, const Sight& sight, int side) {
    int position[RANK];
    sight.find(side, position);
    return rows.at(position);
}

// Number n of the chunks that a lane holds of one of its rows.
__device__ __forceinline__ Chunk chunk_of(const Left& rows, int n, int side) {
    Chunk chunk;
#pragma unroll
    for (int i = 0; i < 4; ++i) chunk.word[i] = rows.a[n][i / 2][i % 2 * 2 + side];
    return chunk;
}

template <int PARTS>
__device__ __forceinline__ void read_own(
    const Rows& rows, const Sight& sight, int dim, unsigned flip, Left (&x)[PARTS]) {
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
        Chunk chunks[2][PIECES];
#pragma unroll
        for (int side = 0; side < 2; ++side)
            read_part(own_row(rows, sight, side), part, dim, sight.there(side), chunks[side]);
        x[part].set(chunks[0], chunks[1], flip);
    }
}

// A part of a row of results times `factor`, as `store_row` writes it, the first `numbers` of it.
template <class Half>
__device__ __forceinline__ void write_part(
    Half, scalar_t* to, const float (&x)[D / 8][4], int side, float factor, int numbers) {
    const int c = threadIdx.x % 4;
    const bool odd = c & 1;
#pragma unroll
    for (int j = 0; j < D / 8; j += 2) {  // two lanes trade pairs
        const unsigned low = pair(Half(), x[j][2 * side] * factor, x[j][2 * side + 1] * factor);
        const unsigned high =
            pair(Half(), x[j + 1][2 * side] * factor, x[j + 1][2 * side + 1] * factor);
        const unsigned got = __shfl_xor_sync(0xFFFFFFFFu, odd ? low : high, 1);
        write_global(to + j * 8 + stored(c), odd ? got : low, odd ? high : got,
                     j * 8 + stored(c) < numbers);
    }
}
__device__ __forceinline__ void write_part(
    F32, scalar_t* to, const float (&x)[D / 8][4], int side, float factor, int numbers) {
    const int c = threadIdx.x % 4;
#pragma unroll
    for (int n = 0; n < PIECES; ++n) {
        unsigned w[4];
#pragma unroll
        for (int j = 0; j < 4; ++j)
            w[j] = __float_as_uint(x[n / 2 * 4 + j][2 * side + n % 2] * factor);
        if ((4 * n + c) * CHUNK < numbers) write_global(to + (4 * n + c) * CHUNK, w);
    }
}

// Results of the lane's rows, in parts, times `factor` of each.
template <int PARTS>
__device__ __forceinline__ void write_own(
    const Rows& rows, const Sight& sight, int dim, const float (&x)[PARTS][D / 8][4],
    const float (&factor)[2]) {
#pragma unroll
    for (int side = 0; side < 2; ++side) {
        scalar_t* to = own_row(rows, sight, side);
#pragma unroll
        for (int part = 0; part < PARTS; ++part)
            write_part(scalar_t(), to + part * D, x[part], side, factor[side],
                       sight.there(side) ? dim - part * D : 0);
    }
}

template <int PARTS>
__device__ __forceinline__ void clear(float (&x)[PARTS][D / 8][4]) {
#pragma unroll
    for (int part = 0; part < PARTS; ++part)
#pragma unroll
        for (int j = 0; j < D / 8; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e) x[part][j][e] = 0;
}

// ---- products of a pair of blocks ------------------------------------------------------------

// s += products of the own rows with 16 staged rows, the first of which is at `at`. Exact floats are
// added last: see `multiply`. `zero` is 0, which the compiler must not know.
template <int PARTS>
__device__ __forceinline__ void add_products(
    float (&s)[2][4], Left (&own)[PARTS], unsigned at, unsigned zero) {
    float sum[2][4] = {}, rest[2][4] = {};
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
        const unsigned rows = at + part * PART_BYTES;
        if (FLOATS)
            multiply_rows(sum, rest, own[part], rows, 8 * ROW, 2);
        else
            multiply_rows(s, s, own[part], rows, 8 * ROW, 2);
        own[part].renew(zero);
    }
    if (FLOATS)
#pragma unroll
        for (int h = 0; h < 2; ++h)
#pragma unroll
            for (int e = 0; e < 4; ++e) s[h][e] += sum[h][e] + rest[h][e];
}

// Weights of the lane's two rows and a pair of blocks.
__device__ __forceinline__ Weights<2> weights_of(const float (&x)[2][4]) {
    Weights<2> weights;
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
        for (int side = 0; side < 2; ++side)
            weights.set(h, side, x[h][2 * side], x[h][2 * side + 1]);
    return weights;
}

// out += weights times 16 staged rows.
template <int PARTS>
__device__ __forceinline__ void add_weighted(
    float (&out)[PARTS][D / 8][4], const Weights<2>& weights, const Across& from) {
#pragma unroll
    for (int part = 0; part < PARTS; ++part)
        accumulate(scalar_t(), out[part], weights, from + part * PART_BYTES, 8 * ROW, 2);
}
