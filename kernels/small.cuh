// Tensor cores for small 2-D windows: the walk of a block over a map, and what it stages.
//
// The prelude gives, beside what products.cuh asks for,
//   KERNEL_HEIGHT, KERNEL_WIDTH  1 to 13
//   DENSE          1 where every dilation group is exactly one window: one tile, no mask
//
// One fragment is 2 rows x 8 columns of tokens: lane 4 g + c of a warp holds column g of both rows,
// and of their neighbours the columns 2 c and 2 c + 1 of every block of 8. A step is as many
// consecutive columns of one row of the halo as the windows of 8 neighbours span: one to three
// blocks. In a dense group that fits one block of 8, a step is two rows.
//
// A fragment mixes 16 rows in one product: a NaN or infinity in a staged row can reach every row of
// the fragments that load it, also those whose window it is not in. The forward kernel computes such
// fragments again, row by row; in gradients it may spread to those rows.

struct Divisor {  // of numbers below 2^31, by multiplying: see `_divisor` in small.py
    int number;
    int times;
    int shift;
};

__device__ __forceinline__ int divide(int n, const Divisor& by) {
    return __umulhi((unsigned)n << 1, (unsigned)by.times) >> by.shift;
}

// Leaves the quotient in `n`.
__device__ __forceinline__ int remainder(int& n, const Divisor& by) {
    const int whole = n;
    n = divide(whole, by);
    return whole - n * by.number;
}

struct SmallGeometry {
    int length[2];    // tokens per axis
    int dilation[2];
    int tiles[2];     // tiles per axis of the longest dilation group
    int rows;         // rows of a tile, an even number
    int blocks;       // blocks of 8 columns of a tile
    int splits;       // warps that share the rows of a block of columns
    int heads_here;   // heads of a block of threads
    int pitch;        // staged columns
    int staged;       // staged rows at most
    int heads;
    int queries_per_kv;  // query heads that share a key and value head
    int zero;         // 0, which the compiler must not know
    Divisor by_teams;  // heads / heads_here
    Divisor by_dilation[2];
    Divisor by_tiles[2];
    Divisor by_blocks;
    Divisor by_splits;
};

struct Scale {  // the scale of the logits, as floats
    float plain;
    float base_two;  // times log2(e)
    float inverse;   // 1 over it
    float never;     // minus infinity over it: what a score starts from that weighs nothing
};

enum {
    KH = KERNEL_HEIGHT,
    KW = KERNEL_WIDTH,
    BLOCKS = (KW + (DENSE ? 7 : 14)) / 8,  // of 8 columns, of one row of a step
    PAIRED = DENSE && BLOCKS == 1,         // a step is two rows
    STEP = PAIRED ? 2 : BLOCKS,            // blocks of a step
    COLUMNS = 8 * BLOCKS,
    OWN = 2 * BLOCKS,                      // columns of a row that a lane holds
    EACH = PAIRED ? 2 : 1,                 // rows of a step
    SEEN = DENSE ? KH : KH + 1,            // rows that a pair of rows sees at most
    UNROLLED = FLOATS || KH > 9 ? 1 : SEEN,  // steps of straight code: it must fit its cache
    BIAS_PITCH = (2 * KW + 3) / 4 * 4,  // numbers of a bias row: 2 KW - 1, then minus infinity
    BIAS_ROWS = 2 * KH,                 // one before the first is read for rows past the map
    BIASES = BIAS_ROWS * BIAS_PITCH,
    NO_BIAS = BIAS_PITCH - 1,           // the column of pairs that do not see each other
    LONG = FLOATS && D == 64,           // rows that leave gradients' kernels few registers
    TURN = 4  // chunks of a row that are asked for at once
};

static_assert(KH >= 1 && KW >= 1 && KH <= 13 && KW <= 13, "8 windows span at most 24 columns");

// Number x of a lane's columns of a row.
__device__ __forceinline__ int own_column(int x, int c) { return x / 2 * 8 + c * 2 + x % 2; }

// Staged columns, and rows at most; a dense group is staged whole.
__device__ __forceinline__ int pitch(const SmallGeometry& g) { return DENSE ? COLUMNS : g.pitch; }
__device__ __forceinline__ int staged_rows(const SmallGeometry& g) {
    return DENSE ? KH : g.staged;
}

// Bytes from a block of a step to the next.
__device__ __forceinline__ unsigned block_bytes(const SmallGeometry& g) {
    return PAIRED ? pitch(g) * ROW : 8 * ROW;
}

// Blocks of the step of rows i, ...: the last of an odd number of rows is alone.
__device__ __forceinline__ int step_blocks(int i, int rows) {
    return PAIRED && i + 1 == rows ? 1 : STEP;
}

// The same where gradients are summed. Of long rows a number the compiler does not know: it cuts the
// code of a step into pieces, of which ptxas would otherwise mix more products than registers hold.
__device__ __forceinline__ int step_blocks(const SmallGeometry& g, int i, int rows) {
    return step_blocks(i, rows) + (LONG ? g.zero : 0);
}

// ---- the walk --------------------------------------------------------------------------------

// The number of this block, counted from the last one: what the launch before this one touched last
// comes first, while it is still in the second-level cache. Blocks start in about their order.
__device__ __forceinline__ int block_from_the_end() { return gridDim.x - 1 - blockIdx.x; }

struct SmallItem {  // a tile of one dilation group of one image
    unsigned batch;
    int group[2], extent[2], begin[2];  // extent of the group; tokens in group coordinates

    // False for the tiles that shorter dilation groups lack.
    __device__ __forceinline__ bool set(const SmallGeometry& g, int number) {
        group[1] = remainder(number, g.by_dilation[1]);
        begin[1] = DENSE ? 0 : remainder(number, g.by_tiles[1]) * g.blocks * 8;
        group[0] = remainder(number, g.by_dilation[0]);
        begin[0] = DENSE ? 0 : remainder(number, g.by_tiles[0]) * g.rows;
        batch = number;
        extent[0] = DENSE ? KH : extent_of(g, 0);
        extent[1] = DENSE ? KW : extent_of(g, 1);
        return begin[0] < extent[0] && begin[1] < extent[1];
    }
    __device__ __forceinline__ int extent_of(const SmallGeometry& g, int a) const {
        return divide(g.length[a] - group[a] + g.dilation[a] - 1, g.by_dilation[a]);
    }

    // Place on the map of a token of the group.
    __device__ __forceinline__ unsigned row(const SmallGeometry& g, int row) const {
        return group[0] + row * g.dilation[0];
    }
    __device__ __forceinline__ unsigned column(const SmallGeometry& g, int column) const {
        return group[1] + column * g.dilation[1];
    }
    // Bytes to a token's number among those of all heads, [batch, heads, *spatial].
    __device__ __forceinline__ long long number(
        const SmallGeometry& g, int heads, int head, int y, int x) const {
        const long long rows = (long long)(batch * heads + head) * g.length[0] + row(g, y);
        return (rows * g.length[1] + column(g, x)) * 4;
    }
    // The row of a token and head.
    __device__ __forceinline__ scalar_t* at(
        const View& v, const SmallGeometry& g, int head, int y, int x) const {
        return (scalar_t*)v.data + v.batch * batch + v.head * (unsigned)head +
               v.axis[0] * row(g, y) + v.axis[1] * column(g, x);
    }
};

// What a lane reads or writes of some rows of one column, from a first row on. The plan sees to it that
// 32 bits hold the bytes from one corner of what is staged for a tile to the other.
struct Lines {
    char* first;
    unsigned down;

    __device__ __forceinline__ Lines(const View& v, const SmallGeometry& g, const SmallItem& item,
                                     int head, int row, int column, int inside) {
        first = (char*)(item.at(v, g, head, row, column) + inside);
        down = g.dilation[0] * (unsigned)v.axis[0] * (unsigned)sizeof(scalar_t);
    }
    __device__ __forceinline__ scalar_t* at(int rows, unsigned aside = 0) const {
        return (scalar_t*)(first + (rows * down + aside));
    }
};

// The number of the token `rows` rows below the one whose own is `first` bytes from the start.
__device__ __forceinline__ float* number_at(
    float* all, const SmallGeometry& g, long long first, int rows) {
    return (float*)((char*)all + first + rows * (unsigned)(g.dilation[0] * g.length[1] * 4));
}

__device__ __forceinline__ Interval window(int position, int length, int kernel_size) {
    return window(position, length, kernel_size, 1, false);
}
__device__ __forceinline__ Interval inverse_window(int position, int length, int kernel_size) {
    return inverse_window(position, length, kernel_size, 1, false);
}

struct Role {  // what a warp does
    int lane, warp, warps, head, split, column;  // head and column within the block's

    __device__ __forceinline__ Role(const SmallGeometry& g, unsigned thread = threadIdx.x) {
        lane = thread % 32;
        warp = __shfl_sync(0xFFFFFFFFu, thread / 32, 0);  // so that it is known to be the warp's
        warps = blockDim.x / 32;
        int rest = warp;
        column = PAIRED ? 0 : remainder(rest, g.by_blocks) * 8;
        split = remainder(rest, g.by_splits);
        head = rest;
    }
};

// Bytes between staged tensors of a head, and between heads.
__device__ __forceinline__ unsigned tensor_bytes(const SmallGeometry& g) {
    return staged_rows(g) * pitch(g) * ROW;
}

// Copies a box of `rows` rows from (`row`, `column`) on, of two tensors and all heads of the block,
// to shared memory: [head][tensor][row][pitch]. Columns past the group become zeros. Head h of the
// grid takes head (h * times + plus) / sharing of the tensors.
__device__ __forceinline__ void stage(
    const SmallGeometry& g, const SmallItem& item, const Role& role, unsigned to, int first_head,
    const View& a, const View& b, int times, int plus, int sharing, int row, int column,
    int rows) {
    constexpr int STRIDE = 32 / CHUNKS;  // columns from a chunk of a lane to its next
    const int chunk = role.lane % CHUNKS, at = role.lane / CHUNKS;
    const int real = least(pitch(g), item.extent[1] - column);
    const char* first[2];
    unsigned down[2], right[2];  // bytes, as in `Lines`
    unsigned tall = role.warps * g.dilation[0], wide = STRIDE * g.dilation[1];
    anew(tall);  // or what follows from them fills registers all through a loop over tiles
    anew(wide);
#pragma unroll
    for (int which = 0; which < 2; ++which) {
        const View& v = which ? b : a;
        first[which] = (const char*)(item.at(v, g, 0, row + role.warp, column + at) + chunk * CHUNK);
        down[which] = (unsigned)v.axis[0] * (unsigned)sizeof(scalar_t) * tall;
        right[which] = (unsigned)v.axis[1] * (unsigned)sizeof(scalar_t) * wide;
    }
#pragma unroll 1
    for (int here = 0; here < g.heads_here; ++here) {
        unsigned head = (first_head + here) * times + plus;
        if (sharing > 1) head /= sharing;
        const char* line_a = first[0] + head * a.head * (int)sizeof(scalar_t);
        const char* line_b = first[1] + head * b.head * (int)sizeof(scalar_t);
        unsigned target = to + 2 * here * tensor_bytes(g) + (role.warp * pitch(g) + at) * ROW;
#pragma unroll 1
        for (int y = role.warp; y < rows; y += role.warps) {
            const char *next_a = line_a, *next_b = line_b;
            unsigned put = target;
#pragma unroll 1
            for (int x = at; x < pitch(g) + at; x += TURN * STRIDE) {  // as often for every lane
#pragma unroll
                for (int i = 0; i < TURN; ++i) {
                    const int here_x = x + i * STRIDE, turned = place(chunk, at + i * STRIDE);
                    const bool there = here_x < pitch(g), copied = here_x < real;
                    const unsigned to_a = put + i * STRIDE * ROW + turned * 16;
                    copy_chunk(to_a, next_a, there, copied);
                    copy_chunk(to_a + tensor_bytes(g), next_b, there, copied);
                    next_a += right[0];
                    next_b += right[1];
                }
                put += TURN * STRIDE * ROW;
            }
            line_a += down[0];
            line_b += down[1];
            target += role.warps * pitch(g) * ROW;
        }
    }
}

// The bias tables of the block's heads, times `factor`: [head][BIAS_ROWS][BIAS_PITCH], rows from
// distance -KH on, which is read but never used. Heads of the table as in `stage`.
__device__ __forceinline__ void stage_biases(
    const SmallGeometry& g, float* to, const float* rpb, int first_head, int times, int plus,
    float factor) {
    constexpr int PER_HEAD = (2 * KH - 1) * (2 * KW - 1);
#pragma unroll 1
    for (int n = threadIdx.x; n < BIASES; n += blockDim.x) {
        const int column = n % BIAS_PITCH, row = n / BIAS_PITCH - 1;
        const bool real = column < 2 * KW - 1, read = RPB && real && row >= 0;
        const float* from =
            rpb + (first_head * times + plus) * PER_HEAD + row * (2 * KW - 1) + column;
#pragma unroll 1
        for (int here = 0; here < g.heads_here; ++here) {
            to[here * BIASES + n] = read ? *from * factor : real ? 0.0f : minus_infinity();
            from += times * PER_HEAD;
        }
    }
}

// First staged column: `begin`, moved left so that the staged columns end inside the group.
__device__ __forceinline__ int first_staged(const SmallGeometry& g, int begin, int extent) {
    return most(0, least(begin, extent - pitch(g)));
}
