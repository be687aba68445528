// Tensor cores for any window: tiles of tokens that own the results, and the walk of each warp over
// what its tokens see.
//
// The prelude gives, beside what tile.cuh and products.cuh ask for,
//   WARPS     of a block, 4 or 8; each owns 16 tokens of the tile, two in each lane quad: a box of
//             `stage` tokens per axis. Tiles and these boxes are powers of two per axis
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
    TURN_BLOCKS = 8,  // staged at a time
    TURN_TOKENS = 8 * TURN_BLOCKS,
    PART_BYTES = TURN_TOKENS * ROW  // of one part of what is staged
};

// ---- the walk --------------------------------------------------------------------------------

// A lane knows where block n % 8 of the 8 at hand begins, n its number, relative to the halo.
struct Walk {
    int at[RANK], extent[RANK], pitch, step[RANK];

    __device__ __forceinline__ void begin(const int (&extents)[RANK]) {
#pragma unroll
        for (int a = 0; a < RANK; ++a) extent[a] = extents[a];
        pitch = (extent[LAST] + 7) / 8 * 8;
        split(TURN_BLOCKS, step);
        split(threadIdx.x % TURN_BLOCKS, at);
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
    // Where block `block` of the 8 begins.
    __device__ __forceinline__ void find(int block, int (&to)[RANK]) const {
#pragma unroll
        for (int a = 0; a < RANK; ++a) to[a] = __shfl_sync(0xFFFFFFFFu, at[a], block);
    }
    // Of 8 blocks each.
    __device__ __forceinline__ int turns() const {
        int blocks = pitch / 8;
#pragma unroll
        for (int a = 0; a < LAST; ++a) blocks *= extent[a];
        return (blocks + TURN_BLOCKS - 1) / TURN_BLOCKS;
    }
};

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
            if (!real) bytes = 0;  // an address as good as any, but whole
            const unsigned target = to + (block * 8 + row) * ROW + place(chunk, row) * 16;
#pragma unroll
            for (int part = 0; part < PARTS; ++part)
                copy_chunk(target + part * PART_BYTES, base + bytes + part * ROW, true,
                           real && part * D + chunk * CHUNK < dim);
        }
    }
};

// The 8 blocks that `walk` is at: queries or keys first, then values or gradients of outputs.
__device__ __forceinline__ void stage(
    const Walk& walk, const Source& a, const Source& b, unsigned to) {
#pragma unroll
    for (int n = 0; n < TURN_BLOCKS; n += WARPS) {
        const int block = n + threadIdx.x / 32;
        int at[RANK];
        walk.find(block, at);
        a.copy<QK_PARTS>(walk, at, block, to);
        b.copy<V_PARTS>(walk, at, block, to + QK_PARTS * PART_BYTES);
    }
}

// Keys and values that a tile of queries sees, turn by turn, and after them the additional ones.
struct KeyTurns {
    Walk walk;
    Source keys, values;
    int window, all;  // turns

    template <class Params>
    __device__ __forceinline__ KeyTurns(const Params& p, const Item& item, int kv_head)
        : keys(rows_of(p.key, p.geometry, item, kv_head), item.halo.begin, p.head_dim),
          values(rows_of(p.value, p.geometry, item, kv_head), item.halo.begin, p.value_dim) {
        walk.begin(item.halo.extent);
        window = walk.turns();
        all = window + (p.extras + TURN_TOKENS - 1) / TURN_TOKENS;
    }
    // Stages the turn after `now`, if there is one.
    template <class Params>
    __device__ __forceinline__ void stage_next(
        const Params& p, const Item& item, int kv_head, int now, unsigned to) {
        if (now + 1 == all) return;
        if (now + 1 == window) {
            const Box line = line_box(0, p.extras);
            walk.begin(line.extent);
            keys = Source(line_of(p.extra_key, item.batch, kv_head), line.begin, p.head_dim);
            values = Source(line_of(p.extra_value, item.batch, kv_head), line.begin, p.value_dim);
        } else {
            walk.advance();
        }
        stage(walk, keys, values, to);
    }
};

// ---- what tokens see -------------------------------------------------------------------------

// The number of a token among those of all heads, [batch, heads, *spatial].
__device__ __forceinline__ long long number_of(
    const Geometry& g, const Item& item, int heads, int head, const int (&position)[RANK]) {
    return (item.batch * heads + head) * tokens_per_image(g) + token_number(g, item, position);
}

struct alignas(8) Span { int begin; unsigned extent; };
struct alignas(RANK == 3 ? 16 : 8) Spans { Span axis[RANK == 3 ? 2 : 1]; };  // but the last axis
struct Owned { Spans spans[16]; int position[16][RANK]; };  // of a warp's tokens, in shared memory

// Token `slot` of a tile, box after box, and what it sees; false where there is none.
template <bool INVERSE>
__device__ __forceinline__ bool token_of(
    const Geometry& g, const Item& item, int slot, int (&position)[RANK], Interval (&seen)[RANK]) {
    int inside = slot % 16, box = slot / 16;
    bool there = true;
#pragma unroll
    for (int a = LAST; a >= 0; --a) {
        const int bits = 31 - __clz(g.stage[a]), boxes = 31 - __clz(g.tile[a]) - bits;
        const int offset = (box & (1 << boxes) - 1) << bits | (inside & (1 << bits) - 1);
        inside >>= bits;
        box >>= boxes;
        there &= offset < item.tile.extent[a];
        position[a] = item.tile.begin[a] + offset;
        seen[a] = sight<INVERSE>(g, a, item.length[a], position[a]);
    }
    return there;
}

// A warp's tokens, and what they see relative to the halo.
struct Sight {
    Owned* owned;
    unsigned full;  // the tokens that are there, as bits
    Span last[2];   // of the lane's own two tokens along the last axis
    int any_begin, any_end, all_begin, all_end;  // along the last axis, what any and all of them see

    template <bool INVERSE>
    __device__ __forceinline__ void begin(const Geometry& g, const Item& item, Owned* of_warp) {
        const int lane = threadIdx.x % 32, slot = threadIdx.x / 32 * 16 + lane % 16;
        int position[RANK];
        Interval seen[RANK];
        const bool there = token_of<INVERSE>(g, item, slot, position, seen);
        owned = of_warp;
#pragma unroll
        for (int a = 0; a < RANK; ++a) {
            seen[a].begin -= item.halo.begin[a];
            seen[a].end -= item.halo.begin[a];
            if (lane < 16) owned->position[lane][a] = position[a];
        }
        set(seen, there);
    }
    // Of the lane's own two tokens.
    __device__ __forceinline__ bool there(int side) const {
        return full >> (side * 8 + threadIdx.x % 32 / 4) & 1;
    }
    __device__ __forceinline__ void find(int side, int (&position)[RANK]) const {
#pragma unroll
        for (int a = 0; a < RANK; ++a)
            position[a] = owned->position[side * 8 + threadIdx.x % 32 / 4][a];
    }
    __device__ __forceinline__ long long number(
        const Geometry& g, const Item& item, int heads, int head, int side) const {
        int position[RANK];
        find(side, position);
        return number_of(g, item, heads, head, position);
    }

    // Of lanes n and n + 16: what token n sees; one that is not there sees nothing.
    __device__ __forceinline__ void set(const Interval (&seen)[RANK], bool there) {
        const int lane = threadIdx.x % 32;
        Span spans[RANK];
#pragma unroll
        for (int a = 0; a < RANK; ++a)
            spans[a] = {seen[a].begin,
                        there ? (unsigned)most(0, seen[a].end - seen[a].begin) : 0u};
        __syncwarp();
#pragma unroll
        for (int a = 0; a < LAST; ++a)
            if (lane < 16) owned->spans[lane].axis[a] = spans[a];
        any_begin = there ? seen[LAST].begin : 0x7FFFFFFF;
        any_end = there ? seen[LAST].end : 0;
        all_begin = there ? seen[LAST].begin : 0;
        all_end = there ? seen[LAST].end : 0x7FFFFFFF;
#pragma unroll
        for (int step = 1; step < 16; step *= 2) {
            any_begin = least(any_begin, __shfl_xor_sync(0xFFFFFFFFu, any_begin, step));
            any_end = most(any_end, __shfl_xor_sync(0xFFFFFFFFu, any_end, step));
            all_begin = most(all_begin, __shfl_xor_sync(0xFFFFFFFFu, all_begin, step));
            all_end = least(all_end, __shfl_xor_sync(0xFFFFFFFFu, all_end, step));
        }
        full = __ballot_sync(0xFFFFFFFFu, there) & 0xFFFF;
#pragma unroll
        for (int side = 0; side < 2; ++side) {
            const int token = side * 8 + lane / 4;
            last[side].begin = __shfl_sync(0xFFFFFFFFu, spans[LAST].begin, token);
            last[side].extent = __shfl_sync(0xFFFFFFFFu, spans[LAST].extent, token);
        }
        __syncwarp();
    }
    // Of a line of tokens that all see, as additional keys are.
    __device__ __forceinline__ void set_line(int length) {
        Interval seen[RANK];
#pragma unroll
        for (int a = 0; a < RANK; ++a) seen[a] = {0, a == LAST ? length : 1};
        set(seen, full >> threadIdx.x % 16 & 1);
    }
};

// What is seen of the 8 blocks of a turn. Lane n knows of block n % 8 which tokens see its line.
struct Turn {
    int column;                // where the lane's block begins
    unsigned tokens, any, all; // as bits; blocks that any token sees, and that all tokens see

    __device__ __forceinline__ Turn(const Sight& sight, const int (&at)[RANK]) {
        column = at[LAST];
        tokens = sight.full;
        if (RANK > 1) {  // each quarter of the lanes asks for four tokens
            const int first = threadIdx.x % 32 / 8 * 4;
            tokens = 0;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const Spans spans = sight.owned->spans[first + i];
                bool near = true;
#pragma unroll
                for (int a = 0; a < LAST; ++a)
                    near &= (unsigned)(at[a] - spans.axis[a].begin) < spans.axis[a].extent;
                if (near) tokens |= 1 << i;
            }
            tokens <<= first;
            tokens |= __shfl_xor_sync(0xFFFFFFFFu, tokens, 8);
            tokens |= __shfl_xor_sync(0xFFFFFFFFu, tokens, 16);
        }
        any = __ballot_sync(0xFFFFFFFFu, tokens != 0 && column < sight.any_end &&
                                             column + 8 > sight.any_begin);
        all = __ballot_sync(0xFFFFFFFFu, tokens == sight.full && column >= sight.all_begin &&
                                             column + 8 <= sight.all_end);
    }
    __device__ __forceinline__ bool skips(int pair) const { return (any >> 2 * pair & 3) == 0; }
    __device__ __forceinline__ bool masks(int pair) const { return (all >> 2 * pair & 3) != 3; }
};

// What the lane's two tokens see of its two columns of a block.
struct Mask {
    unsigned first[2], extent[2];

    __device__ __forceinline__ Mask(const Sight& sight, const Turn& turn, int block) {
        const unsigned tokens = __shfl_sync(0xFFFFFFFFu, turn.tokens, block);
        const int column =
            __shfl_sync(0xFFFFFFFFu, turn.column, block) + (int)(threadIdx.x % 4) * 2;
#pragma unroll
        for (int side = 0; side < 2; ++side) {
            first[side] = column - sight.last[side].begin;
            extent[side] = tokens & 1 << (side * 8 + threadIdx.x % 32 / 4) ? sight.last[side].extent
                                                                           : 0;
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
    int base[2];         // of the lane's tokens with its own columns of the halo's first block

    __device__ __forceinline__ Biases(
        const Geometry& g, const Box& halo, const Sight& sight, const float* rpb, int head) {
        of_head(g, rpb, head);
#pragma unroll
        for (int side = 0; side < 2; ++side) {
            int n = 0, position[RANK];
            sight.find(side, position);
#pragma unroll
            for (int a = 0; a < RANK; ++a) {
                const int own = position[a], other = halo.begin[a], k = g.kernel_size[a];
                n = n * (2 * k - 1) +
                    (FORWARDS ? rpb_index(other, own, k) : rpb_index(own, other, k));
            }
            base[side] = n + STEP * (int)(threadIdx.x % 4) * 2;
        }
    }
    __device__ __forceinline__ void of_head(const Geometry& g, const float* rpb, int head) {
        table = RPB ? rpb + (long long)head * biases_per_head(g) : nullptr;
    }
    // From the halo's first block to the one at `at`.
    static __device__ __forceinline__ int offset(const Geometry& g, const int (&at)[RANK]) {
        int n = 0;
#pragma unroll
        for (int a = 0; a < RANK; ++a) n = n * (2 * g.kernel_size[a] - 1) + at[a];
        return STEP * n;
    }
    // In base two; zero where the pair does not see each other. `offset` is the block's.
    __device__ __forceinline__ float at(int offset, int side, int e, bool sees) const {
        return sees ? table[base[side] + offset + STEP * e] * (float)LOG2_E : 0.0f;
    }
    enum { STEP = FORWARDS ? 1 : -1 };
};
