// Tensor cores for any window: tiles of tokens that own the results, and the walk of each warp over
// what its tokens see.
//
// The prelude gives, beside what tile.cuh and products.cuh ask for,
//   WARPS     of a block, 4 or 8; each owns 16 consecutive tokens of the tile, two in each lane quad
//   QK_PARTS  parts of HEAD_DIM numbers of a row of queries and keys: longer rows are multiplied part
//   V_PARTS   by part; the same of values. Numbers past a row's own dim are staged as zeros
//
// What the tile sees, its halo, is cut into blocks of 8 columns of one line along the last axis, line
// by line. 8 consecutive blocks are staged at a time, the next 8 while these are multiplied. A warp
// skips pairs of blocks that none of its tokens sees, and masks those that not all of them see.
// Windows are boxes, so both questions, and every mask, are comparisons per axis.

static_assert(WARPS == 4 || WARPS == 8, "each warp stages whole blocks");

enum {
    LAST = RANK - 1,
    TURNS = 8,                 // blocks staged at a time
    TOKENS = 8 * TURNS,
    PART_BYTES = TOKENS * ROW  // of one part of what is staged
};

// ---- the walk --------------------------------------------------------------------------------

// A lane knows where block n % 8 of the 8 at hand begins, n its number, relative to the halo.
struct Walk {
    int at[RANK], extent[RANK], pitch, step[RANK];

    __device__ __forceinline__ void begin(const int (&extents)[RANK]) {
#pragma unroll
        for (int a = 0; a < RANK; ++a) extent[a] = extents[a];
        pitch = (extent[LAST] + 7) / 8 * 8;
        split(TURNS, step);
        split(threadIdx.x % TURNS, at);
    }
    // How far `blocks` blocks lead from the first.
    __device__ __forceinline__ void split(int blocks, int (&to)[RANK]) const {
        if (RANK == 1) {
            to[LAST] = blocks * 8;
            return;
        }
        const int lines = blocks / (pitch / 8);
        to[LAST] = (blocks - lines * (pitch / 8)) * 8;
        to[0] = RANK == 3 ? lines / extent[RANK / 2] : lines;
        if (RANK == 3) to[RANK / 2] = lines - to[0] * extent[RANK / 2];
    }
    __device__ __forceinline__ void advance() {
        bool carry = false;
#pragma unroll
        for (int a = LAST; a >= 0; --a) {
            at[a] += step[a] + carry;
            if (a > 0) {
                const int length = a == LAST ? pitch : extent[a];
                carry = at[a] >= length;
                if (carry) at[a] -= length;
            }
        }
    }
    // Of 8 blocks each.
    __device__ __forceinline__ int turns() const {
        int blocks = pitch / 8;
#pragma unroll
        for (int a = 0; a < LAST; ++a) blocks *= extent[a];
        return (blocks + TURNS - 1) / TURNS;
    }
};

// Where a block begins, known to the whole warp.
__device__ __forceinline__ void block_at(const int (&at)[RANK], int block, int (&to)[RANK]) {
#pragma unroll
    for (int a = 0; a < RANK; ++a) to[a] = __shfl_sync(0xFFFFFFFFu, at[a], block);
}

__device__ __forceinline__ void copy_float(unsigned to, const void* from, bool real) {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;"
        :: "r"(to), "l"(from), "r"(real ? 4 : 0));
#else
    const float x = real ? *(const float*)from : 0.0f;
    asm volatile("st.shared.f32 [%0], %1;" :: "r"(to), "f"(x));
#endif
}

// The rows of one tensor from the first token of a halo on. The plan sees to it that 32 bits hold the
// bytes from one corner of a halo to the other.
struct Source {
    const char* base;
    unsigned step[RANK];
    int dim;

    __device__ __forceinline__ Source(const Rows& rows, const int (&first)[RANK], int numbers) {
        base = (const char*)rows.at(first);
#pragma unroll
        for (int a = 0; a < RANK; ++a) step[a] = (unsigned)rows.step[a] * (unsigned)sizeof(scalar_t);
        dim = numbers;
    }
    template <int PARTS>
    __device__ __forceinline__ void copy(
        const Walk& walk, const int (&at)[RANK], int block, unsigned to) const {
        const int lane = threadIdx.x % 32, chunk = lane % CHUNKS;
#pragma unroll
        for (int turn = 0; turn < CHUNKS / 4; ++turn) {
            const int row = (lane + 32 * turn) / CHUNKS;
            unsigned bytes = chunk * 16;
            bool real = true;
#pragma unroll
            for (int a = 0; a < RANK; ++a) {
                const int token = at[a] + (a == LAST ? row : 0);
                bytes += token * step[a];
                real &= token < walk.extent[a];
            }
            const unsigned target = to + (block * 8 + row) * ROW + place(chunk, row) * 16;
#pragma unroll
            for (int part = 0; part < PARTS; ++part)
                copy_chunk(target + part * PART_BYTES, base + bytes + part * ROW, true,
                           real && part * D + chunk * CHUNK < dim);
        }
    }
};

// The 8 blocks that `walk` is at: queries or keys first, then values or
// gradients of outputs.
__device__ __forceinline__ void stage(
    const Walk& walk, const Source& a, const Source& b, unsigned to) {
#pragma unroll
    for (int n = 0; n < TURNS; n += WARPS) {
        const int block = n + threadIdx.x / 32;
        int at[RANK];
        block_at(walk.at, block, at);
        a.copy<QK_PARTS>(walk, at, block, to);
        b.copy<V_PARTS>(walk, at, block, to + QK_PARTS * PART_BYTES);
    }
}

// ---- what tokens see -------------------------------------------------------------------------

struct Bounds { int any_begin, any_end, all_begin, all_end; };
struct Span { int begin; unsigned extent; };

// What the 16 tokens of a warp see, relative to the halo, per axis: in shared memory the boxes that
// any and all of them see, and the spans of each but those along the last axis, which lanes hold of
// their own two tokens.
struct Shared { Bounds bounds[RANK]; Span spans[16][RANK == 1 ? 1 : LAST]; };
struct Sight {
    Shared* shared;  // of this warp
    Span last[2];

    // Of two intervals per axis; tokens that are not there see nothing.
    __device__ __forceinline__ void set(const Interval (&seen)[2][RANK], const bool (&there)[2]) {
        const int lane = threadIdx.x % 32;
        __syncwarp();
#pragma unroll
        for (int a = 0; a < RANK; ++a) {
            Bounds b = {0x7FFFFFFF, 0, 0, 0x7FFFFFFF};
#pragma unroll
            for (int side = 0; side < 2; ++side) {
                const int begin = seen[side][a].begin, end = seen[side][a].end;
                const Span span = {begin, there[side] ? end - begin : 0u};
                if (a == LAST)
                    last[side] = span;
                else if (lane % 4 == 0)
                    shared->spans[side * 8 + lane / 4][a] = span;
                if (there[side])
                    b = {least(b.any_begin, begin), most(b.any_end, end),
                         most(b.all_begin, begin), least(b.all_end, end)};
            }
#pragma unroll
            for (int step = 4; step < 32; step *= 2) {
                b.any_begin = least(b.any_begin, __shfl_xor_sync(0xFFFFFFFFu, b.any_begin, step));
                b.any_end = most(b.any_end, __shfl_xor_sync(0xFFFFFFFFu, b.any_end, step));
                b.all_begin = most(b.all_begin, __shfl_xor_sync(0xFFFFFFFFu, b.all_begin, step));
                b.all_end = least(b.all_end, __shfl_xor_sync(0xFFFFFFFFu, b.all_end, step));
            }
            if (lane == 0) shared->bounds[a] = b;
        }
        __syncwarp();
    }
    // Of a line of tokens that all see, as additional keys are.
    __device__ __forceinline__ void set_line(int length, const bool (&there)[2]) {
        Interval seen[2][RANK];
#pragma unroll
        for (int side = 0; side < 2; ++side)
#pragma unroll
            for (int a = 0; a < RANK; ++a) seen[side][a] = {0, a == LAST ? length : 1};
        set(seen, there);
    }
    // Of 8 blocks, as bits: those that any token sees, and those that all tokens see.
    __device__ __forceinline__ void look(const int (&at)[RANK], unsigned& any, unsigned& all) const {
        bool some = true, every = true;
#pragma unroll
        for (int a = 0; a < RANK; ++a) {
            const Bounds b = shared->bounds[a];
            const int end = at[a] + (a == LAST ? 8 : 1);
            some &= at[a] < b.any_end && end > b.any_begin;
            every &= at[a] >= b.all_begin && end <= b.all_end;
        }
        any = __ballot_sync(0xFFFFFFFFu, some);
        all = __ballot_sync(0xFFFFFFFFu, every);
    }
};

// What the lane's two tokens see of its two columns of a block.
struct Mask {
    unsigned first[2], extent[2];

    __device__ __forceinline__ Mask(const Sight& sight, const int (&at)[RANK]) {
#pragma unroll
        for (int side = 0; side < 2; ++side) {
            bool near = true;
#pragma unroll
            for (int a = 0; a < LAST; ++a) {
                const Span span = sight.shared->spans[side * 8 + threadIdx.x % 32 / 4][a];
                near &= (unsigned)(at[a] - span.begin) < span.extent;
            }
            first[side] = at[LAST] + threadIdx.x % 4 * 2 - sight.last[side].begin;
            extent[side] = near ? sight.last[side].extent : 0;
        }
    }
    __device__ __forceinline__ bool sees(int side, int e) const {
        return first[side] + e < extent[side];
    }
};

// ---- biases ----------------------------------------------------------------------------------

// Of pairs of the lane's two tokens with tokens of the halo. FORWARDS: the own tokens are queries.
template <bool FORWARDS>
struct Biases {
    const float* table;  // of the head
    int base[2], step[RANK];

    __device__ __forceinline__ Biases(
        const Geometry& g, const Box& halo, const int (&position)[2][RANK]) {
        base[0] = base[1] = 0;
#pragma unroll
        for (int a = 0; a < RANK; ++a) {
#pragma unroll
            for (int side = 0; side < 2; ++side)
                base[side] = base[side] * (2 * g.kernel_size[a] - 1) +
                             (FORWARDS ? rpb_index(halo.begin[a], position[side][a], g.kernel_size[a])
                                       : rpb_index(position[side][a], halo.begin[a], g.kernel_size[a]));
            step[a] = FORWARDS ? 1 : -1;
#pragma unroll
            for (int b = 0; b < a; ++b) step[b] *= 2 * g.kernel_size[a] - 1;
        }
    }
    // In base two, of element `e` of a block; zero where the pair does not see each other.
    __device__ __forceinline__ float at(const int (&block)[RANK], int side, int e, bool sees) const {
        int n = base[side] + step[LAST] * (threadIdx.x % 4 * 2 + e);
#pragma unroll
        for (int a = 0; a < RANK; ++a) n += block[a] * step[a];
        return sees ? table[n] * (float)LOG2_E : 0.0f;
    }
};

// ---- rows that a lane owns -------------------------------------------------------------------

// Where the tokens of a warp are.
struct Own {
    int position[2][RANK];
    bool there[2];

    template <bool INVERSE>
    __device__ __forceinline__ void set(const Geometry& g, const Item& item, Sight& sight) {
        Interval seen[2][RANK];
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int side = 0; side < 2; ++side) {
            const int slot = threadIdx.x / 32 * 16 + side * 8 + lane / 4;
            there[side] = own_token<INVERSE>(g, item, slot, position[side], seen[side]);
            there[side] &= slot < slots(g);
#pragma unroll
            for (int a = 0; a < RANK; ++a) {
                seen[side][a].begin -= item.halo.begin[a];
                seen[side][a].end -= item.halo.begin[a];
            }
        }
        sight.set(seen, there);
    }
    static __device__ __forceinline__ int slots(const Geometry& g) {
        int count = 1;
#pragma unroll
        for (int a = 0; a < RANK; ++a) count *= g.tile[a];
        return count;
    }
    // The number among those of all heads, [batch, heads, *spatial], of a token that is there.
    __device__ __forceinline__ long long number(
        const Geometry& g, const Item& item, int heads, int head, int side) const {
        return (item.batch * heads + head) * tokens_per_image(g) +
               token_number(g, item, position[side]);
    }
};

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

template <int PARTS>
__device__ __forceinline__ void read_own(
    const Rows& rows, const Own& own, int dim, unsigned flip, Left (&x)[PARTS]) {
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
        Chunk chunks[2][PIECES];
#pragma unroll
        for (int side = 0; side < 2; ++side)
            read_part(rows.at(own.position[side]), part, dim, own.there[side], chunks[side]);
        x[part].set(chunks[0], chunks[1], flip);
    }
}

// Results of the lane's rows, in parts, times `factor` of each.
template <int PARTS>
__device__ __forceinline__ void write_own(
    const Rows& rows, const Own& own, int dim, const float (&x)[PARTS][D / 8][4],
    const float (&factor)[2]) {
    const int c = threadIdx.x % 4;
    const bool odd = c & 1;
#pragma unroll
    for (int side = 0; side < 2; ++side) {
        scalar_t* to = rows.at(own.position[side]) + stored(c);
#pragma unroll
        for (int part = 0; part < PARTS; ++part)
#pragma unroll
            for (int j = 0; j < D / 8; j += 2) {  // two lanes trade pairs, as in `store_row`
                const unsigned low = pair(scalar_t(), x[part][j][2 * side] * factor[side],
                                          x[part][j][2 * side + 1] * factor[side]);
                const unsigned high = pair(scalar_t(), x[part][j + 1][2 * side] * factor[side],
                                           x[part][j + 1][2 * side + 1] * factor[side]);
                const unsigned got = __shfl_xor_sync(0xFFFFFFFFu, odd ? low : high, 1);
                write_global(to + part * D + j * 8, odd ? got : low, odd ? high : got,
                             own.there[side] && part * D + j * 8 + stored(c) < dim);
            }
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

// s += products of the own rows with 16 staged rows, the first of which is at `at`.
template <int PARTS>
__device__ __forceinline__ void add_products(
    float (&s)[2][4], const Left (&own)[PARTS], unsigned at) {
#pragma unroll
    for (int part = 0; part < PARTS; ++part)
        multiply_rows(s, s, own[part], at + part * PART_BYTES, 8 * ROW, 2);
}

// out += weights times 16 staged rows.
template <int PARTS>
__device__ __forceinline__ void add_weighted(
    float (&out)[PARTS][D / 8][4], const Weights<2>& weights, const Across& from) {
#pragma unroll
    for (int part = 0; part < PARTS; ++part)
        accumulate(scalar_t(), out[part], weights, from + part * PART_BYTES, 8 * ROW, 2);
}
