// How a block of threads works through a map: tiles of tokens that own the results, boxes of tokens
// that are staged in shared memory, and the walk of each token over its part of a box.
//
// The prelude gives RANK, the number of spatial axes. All boxes lie inside one dilation group and
// are in its coordinates. A tile is `tile` tokens, one per group of LANES threads; a box is at most
// `stage` tokens. The last row of a staged array is kept zero: threads with no token to look at
// look there, so every warp walks in step and no stray number (NaN included) gets in.

struct Geometry {
    int length[3];       // tokens per axis
    int kernel_size[3];
    int stride[3];
    int dilation[3];
    int causal[3];       // 0 or 1
    int tile[3];         // tokens of a tile per axis
    int tiles[3];        // tiles per axis of the longest dilation group
    int stage[3];        // tokens of a box per axis
    int capacity;        // tokens of the largest box, their product
};

struct Box { int begin[RANK], extent[RANK]; };

struct Item {  // what one block does at a time: a tile of one dilation group of one image
    long long batch;
    int group[RANK];   // first token of the group
    int length[RANK];  // tokens in the group
    Box tile;          // may be empty in a group shorter than the longest
    Box halo;          // all that the tile sees, or on the keys' side all that see it
};

struct Rows {  // the rows of one head inside one dilation group
    scalar_t* base;
    long long step[RANK];

    __device__ __forceinline__ scalar_t* at(const int (&position)[RANK]) const {
        long long offset = 0;
#pragma unroll
        for (int a = 0; a < RANK; ++a) offset += position[a] * step[a];
        return base + offset;
    }
};

// ---- items -----------------------------------------------------------------------------------

__device__ __forceinline__ long long items_per_image(const Geometry& g) {
    long long count = 1;
#pragma unroll
    for (int a = 0; a < RANK; ++a) count *= (long long)g.dilation[a] * g.tiles[a];
    return count;
}

// Neighbouring numbers are neighbouring dilation groups, whose rows lie side by side in memory.
__device__ __forceinline__ void find_item(const Geometry& g, long long number, Item& item) {
    const long long per_image = items_per_image(g);
    item.batch = number / per_image;
    unsigned rest = (unsigned)(number - item.batch * per_image);
#pragma unroll
    for (int a = RANK - 1; a >= 0; --a) {
        item.group[a] = rest % g.dilation[a];
        rest /= g.dilation[a];
    }
#pragma unroll
    for (int a = RANK - 1; a >= 0; --a) {
        item.tile.begin[a] = rest % g.tiles[a] * g.tile[a];
        rest /= g.tiles[a];
        item.length[a] = (g.length[a] - item.group[a] - 1) / g.dilation[a] + 1;
        item.tile.extent[a] = most(0, least(g.tile[a], item.length[a] - item.tile.begin[a]));
    }
}

__device__ __forceinline__ bool is_empty(const Box& box) {
    bool empty = false;
#pragma unroll
    for (int a = 0; a < RANK; ++a) empty |= box.extent[a] <= 0;
    return empty;
}

// What one token sees on one axis: keys, or for the keys' side (INVERSE) the queries that see it.
template <bool INVERSE>
__device__ __forceinline__ Interval sight(const Geometry& g, int a, int length, int position) {
    const int k = g.kernel_size[a], s = g.stride[a];
    const bool causal = g.causal[a];
    return INVERSE ? inverse_window(position, length, k, s, causal)
                   : window(position, length, k, s, causal);
}

// Works out item `number` once for the whole block, in shared memory: in registers it would cost
// every thread some twenty of them. False where the tile is empty, the same for all threads.
template <bool INVERSE>
__device__ __forceinline__ bool begin_item(const Geometry& g, long long number, Item& item) {
    __syncthreads();
    if (threadIdx.x == 0) {
        find_item(g, number, item);
#pragma unroll
        for (int a = 0; a < RANK; ++a) {
            const int first = item.tile.begin[a], last = first + item.tile.extent[a] - 1;
            item.halo.begin[a] = sight<INVERSE>(g, a, item.length[a], first).begin;
            item.halo.extent[a] =
                sight<INVERSE>(g, a, item.length[a], last).end - item.halo.begin[a];
        }
    }
    __syncthreads();
    return !is_empty(item.tile);
}

// The token of this thread's group of lanes and what it sees; false where the tile has none for it,
// which then sees nothing.
template <bool INVERSE>
__device__ __forceinline__ bool own_token(
    const Geometry& g, const Item& item, int slot, int (&position)[RANK], Interval (&seen)[RANK]) {
    const Box& tile = item.tile;
    bool inside = true;
#pragma unroll
    for (int a = RANK - 1; a >= 0; --a) {
        const int offset = a > 0 ? slot % g.tile[a] : slot;
        if (a > 0) slot /= g.tile[a];
        inside &= offset < tile.extent[a];
        position[a] = tile.begin[a] + offset;
    }
#pragma unroll
    for (int a = 0; a < RANK; ++a) {
        seen[a] = sight<INVERSE>(g, a, item.length[a], position[a]);
        if (!inside) seen[a] = {0, 0};
    }
    return inside;
}

__device__ __forceinline__ Rows rows_of(
    const View& v, const Geometry& g, const Item& item, int head) {
    Rows rows;
    long long offset = item.batch * v.batch + head * v.head;
#pragma unroll
    for (int a = 0; a < RANK; ++a) {
        offset += item.group[a] * v.axis[a];
        rows.step[a] = g.dilation[a] * v.axis[a];
    }
    rows.base = (scalar_t*)v.data + offset;
    return rows;
}

// Additional keys and values: one line of tokens without groups.
__device__ __forceinline__ Rows line_of(const View& v, long long batch, int head) {
    Rows rows;
#pragma unroll
    for (int a = 0; a < RANK; ++a) rows.step[a] = a == RANK - 1 ? v.axis[0] : 0;
    rows.base = (scalar_t*)v.data + batch * v.batch + head * v.head;
    return rows;
}

// Number of a token in its image, row-major.
__device__ __forceinline__ long long token_number(
    const Geometry& g, const Item& item, const int (&position)[RANK]) {
    long long number = 0;
#pragma unroll
    for (int a = 0; a < RANK; ++a)
        number = number * g.length[a] + item.group[a] + (long long)position[a] * g.dilation[a];
    return number;
}

__device__ __forceinline__ long long tokens_per_image(const Geometry& g) {
    long long count = 1;
#pragma unroll
    for (int a = 0; a < RANK; ++a) count *= g.length[a];
    return count;
}

// Index of a pair's bias in the table of its head.
__device__ __forceinline__ int pair_bias(
    const Geometry& g, const int (&key)[RANK], const int (&query)[RANK]) {
    int index = 0;
#pragma unroll
    for (int a = 0; a < RANK; ++a)
        index = index * (2 * g.kernel_size[a] - 1) + rpb_index(key[a], query[a], g.kernel_size[a]);
    return index;
}

__device__ __forceinline__ int biases_per_head(const Geometry& g) {
    int count = 1;
#pragma unroll
    for (int a = 0; a < RANK; ++a) count *= 2 * g.kernel_size[a] - 1;
    return count;
}

// ---- boxes -----------------------------------------------------------------------------------

__device__ __forceinline__ int boxes_in(const Geometry& g, const Box& all) {
    int count = 1;
#pragma unroll
    for (int a = 0; a < RANK; ++a) count *= (all.extent[a] + g.stage[a] - 1) / g.stage[a];
    return count;
}

__device__ __forceinline__ Box box_at(const Geometry& g, const Box& all, int number) {
    Box box;
#pragma unroll
    for (int a = RANK - 1; a >= 0; --a) {
        const int count = (all.extent[a] + g.stage[a] - 1) / g.stage[a];
        const int skip = number % count * g.stage[a];
        number /= count;
        box.begin[a] = all.begin[a] + skip;
        box.extent[a] = least(g.stage[a], all.extent[a] - skip);
    }
    return box;
}

__device__ __forceinline__ Box line_box(int begin, int extent) {
    Box box;
#pragma unroll
    for (int a = 0; a < RANK; ++a) {
        box.begin[a] = a == RANK - 1 ? begin : 0;
        box.extent[a] = a == RANK - 1 ? extent : 1;
    }
    return box;
}

__device__ __forceinline__ int rows_in(const Box& box) {
    int count = 1;
#pragma unroll
    for (int a = 0; a < RANK; ++a) count *= box.extent[a];
    return count;
}

__device__ __forceinline__ void position_in(const Box& box, int row, int (&position)[RANK]) {
#pragma unroll
    for (int a = RANK - 1; a >= 0; --a) {
        const int offset = a > 0 ? row % box.extent[a] : row;
        if (a > 0) row /= box.extent[a];
        position[a] = box.begin[a] + offset;
    }
}

// Copies a box of rows of two tensors to shared memory, 16 bytes per thread and turn.
template <int CHUNKS_1, int CHUNKS_2>
__device__ __forceinline__ void stage_rows(
    const Box& box, const Rows& rows_1, int dim_1, Chunk* shared_1, const Rows& rows_2, int dim_2,
    Chunk* shared_2) {
    const int lane = threadIdx.x % LANES, rows = rows_in(box);
#pragma unroll(ACCESS == 16 ? 2 : 1)
    for (int row = threadIdx.x / LANES; row < rows; row += blockDim.x / LANES) {
        int position[RANK];
        position_in(box, row, position);
        Chunk c_1[CHUNKS_1], c_2[CHUNKS_2];
        load_share(rows_1.at(position), dim_1, lane, c_1);
        load_share(rows_2.at(position), dim_2, lane, c_2);
#pragma unroll
        for (int i = 0; i < CHUNKS_1; ++i) shared_1[(row * CHUNKS_1 + i) * LANES + lane] = c_1[i];
#pragma unroll
        for (int i = 0; i < CHUNKS_2; ++i) shared_2[(row * CHUNKS_2 + i) * LANES + lane] = c_2[i];
    }
}

template <int CHUNKS>
__device__ __forceinline__ void clear_row(Chunk* shared, int row) {
    const int chunks = CHUNKS * LANES;
    for (int i = threadIdx.x; i < chunks; i += blockDim.x)
        shared[row * chunks + i] = Chunk{{0u, 0u, 0u, 0u}};
}

template <int CHUNKS>
__device__ __forceinline__ void read_share(
    const Chunk* shared, int row, int lane, Chunk (&c)[CHUNKS]) {
#pragma unroll
    for (int i = 0; i < CHUNKS; ++i) c[i] = shared[(row * CHUNKS + i) * LANES + lane];
}

// ---- the walk --------------------------------------------------------------------------------

// Calls body(first, row, count, turns) for every line along the last axis of the part of `box` that
// this thread sees: `first` is the line's first token, `row` its row in the box, `count` how many
// tokens follow for this thread (0 where it has no such line) and `turns` the largest count in the
// warp. Every thread of a warp gets the same number of calls and the same turns.
template <class Body>
__device__ __forceinline__ void walk(const Box& box, const Interval (&seen)[RANK], Body body) {
    int from[RANK], count[RANK], turns[RANK], at[RANK], lines = 1;
#pragma unroll
    for (int a = 0; a < RANK; ++a) {
        const int begin = most(seen[a].begin, box.begin[a]);
        from[a] = begin - box.begin[a];
        count[a] = most(0, least(seen[a].end, box.begin[a] + box.extent[a]) - begin);
        turns[a] = max_over_warp(count[a]);
        at[a] = 0;
        if (a < RANK - 1) lines *= turns[a];
    }
    for (int line = 0; line < lines; ++line) {
        bool here = true;
        int row = 0, first[RANK];
#pragma unroll
        for (int a = 0; a < RANK; ++a) {
            here &= at[a] < count[a];
            row = row * box.extent[a] + from[a] + at[a];
            first[a] = box.begin[a] + from[a] + at[a];
        }
        body(first, row, here ? count[RANK - 1] : 0, turns[RANK - 1]);
        bool carry = true;
#pragma unroll
        for (int a = RANK - 2; a >= 0; --a) {
            at[a] += carry;
            carry &= at[a] == turns[a];
            if (carry) at[a] = 0;
        }
    }
}
