// Tensor cores for small 2-D windows: fragments, asynchronous copies and the walk of a block.
//
// The prelude gives
//   SCALAR         F16 or BF16 (before sm_80 only F16)
//   HEAD_DIM       32 or 64, of keys and values alike
//   KERNEL_HEIGHT, KERNEL_WIDTH  1 to 9
//   DENSE          1 where every dilation group is exactly one window: KERNEL_WIDTH <= 8, one tile
//
// One fragment is 2 rows x 8 columns of tokens: lane 4 g + c of a warp holds column g of both rows,
// and of their neighbours the columns 2 c and 2 c + 1 of two blocks of 8. Of a row of the halo
// those two blocks are 16 consecutive columns; in a dense group, which fits one block of 8, they
// are two rows. One such step feeds one k16 product.
//
// Staged rows are swizzled in chunks of 16 bytes, so that both ways to read them are free of bank
// conflicts: `read_chunk` (a row per lane quad) and `read_transposed` (one chunk of 8 rows).
//
// A fragment mixes 16 rows in one product: a NaN or infinity in a staged row can reach every query
// of the fragments that load it, also those whose window it is not in.

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
};

enum {
    D = HEAD_DIM,
    KH = KERNEL_HEIGHT,
    KW = KERNEL_WIDTH,
    ROW = 2 * D,          // bytes of a staged row
    CHUNKS = D / 8,       // 16-byte chunks of a row
    BANDS = D / 32,       // a lane holds one chunk of every 32 numbers
    COLUMNS = DENSE ? 8 : 16,           // columns of one step
    BIAS_PITCH = (2 * KW + 3) / 4 * 4,  // numbers of a bias row: 2 KW - 1, then minus infinity
    BIAS_ROWS = 2 * KH,                 // one before the first is read for rows past the map
    BIASES = BIAS_ROWS * BIAS_PITCH,
    NO_BIAS = BIAS_PITCH - 1            // the column of pairs that do not see each other
};

static_assert(HEAD_DIM == 32 || HEAD_DIM == 64, "rows are one or two bands of 32 numbers");
static_assert(KH >= 1 && KW >= 1 && KH <= 9 && KW <= 9, "8 windows span at most 16 columns");
static_assert(!DENSE || KW <= 8, "a dense group is one block of 8 columns");

// ---- instructions ----------------------------------------------------------------------------

__device__ __forceinline__ unsigned shared_address(const void* p) {
    return (unsigned)__cvta_generic_to_shared(p);
}

// 16 bytes to shared memory, or zeros; there after `copies_done`.
__device__ __forceinline__ void copy_chunk(unsigned to, const void* from, bool real) {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
        :: "r"(to), "l"(from), "r"(real ? 16 : 0));
#else
    unsigned x = 0, y = 0, z = 0, w = 0;
    if (real)
        asm("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
            : "=r"(x), "=r"(y), "=r"(z), "=r"(w) : "l"(from));
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};"
        :: "r"(to), "r"(x), "r"(y), "r"(z), "r"(w));
#endif
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

__device__ __forceinline__ float read_float(unsigned at) {
    float x;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(x) : "r"(at));
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

#define MMA(shape_and_types, a_list, b_list) \
    asm volatile("mma.sync.aligned." shape_and_types " {%0, %1, %2, %3}, " a_list ", " b_list \
        ", {%0, %1, %2, %3};"

// c += A B: A is 16 x 16, B 16 x 8.
__device__ __forceinline__ void multiply(
    F16, float (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3,
    unsigned b0, unsigned b1) {
#if __CUDA_ARCH__ >= 800
    MMA("m16n8k16.row.col.f32.f16.f16.f32", "{%4, %5, %6, %7}", "{%8, %9}")
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#else
    MMA("m16n8k8.row.col.f32.f16.f16.f32", "{%4, %5}", "{%6}")
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(b0));
    MMA("m16n8k8.row.col.f32.f16.f16.f32", "{%4, %5}", "{%6}")
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a2), "r"(a3), "r"(b1));
#endif
}

__device__ __forceinline__ void multiply(
    BF16, float (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3,
    unsigned b0, unsigned b1) {
    MMA("m16n8k16.row.col.f32.bf16.bf16.f32", "{%4, %5, %6, %7}", "{%8, %9}")
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
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

__device__ __forceinline__ float sum_of_quad(float x) {
    x += __shfl_xor_sync(0xFFFFFFFFu, x, 1);
    return x + __shfl_xor_sync(0xFFFFFFFFu, x, 2);
}
__device__ __forceinline__ float max_of_quad(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xFFFFFFFFu, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xFFFFFFFFu, x, 2));
}

// ---- fragments -------------------------------------------------------------------------------

// 16 rows, two of each lane's column, as the left factor of products over HEAD_DIM.
//
// The order of the numbers within a band of 32 is permuted, the same way left and right: lane c
// holds numbers 8 c to 8 c + 7, so a row is read 16 bytes at a time.
struct Left {
    unsigned a[BANDS][2][4];

    // `zero` makes every word a value of its own; otherwise ptxas keeps the words where the load
    // put them and copies all four before every product.
    __device__ __forceinline__ void set(
        const Chunk (&first)[BANDS], const Chunk (&second)[BANDS], unsigned zero) {
#pragma unroll
        for (int n = 0; n < BANDS; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                a[n][i / 2][i % 2 * 2] = first[n].word[i] ^ zero;
                a[n][i / 2][i % 2 * 2 + 1] = second[n].word[i] ^ zero;
            }
    }
};

// Where a chunk of a staged row lies in it: the swizzle depends on the column only. Columns 8 apart
// share it; of two neighbours the chunks 0 to 3 fill different banks.
__device__ __forceinline__ int place(int chunk, int column) {
    const int turn = column / 2 % 4;
    return chunk ^ (D == 32 ? turn : column % 2 * 4 + turn);
}

// Byte offset of this lane's chunk of a block of 8 columns that starts at `column`: right factors.
__device__ __forceinline__ unsigned row_offset(int column, int lane) {
    column += lane / 4;
    return column * ROW + place(lane % 4, column) * 16;
}

// Byte offset of this lane's row for `read_transposed`: lanes 8 to 15 and 24 to 31 take the second
// block of the step, `second` bytes further; lanes from 16 on the next chunk.
__device__ __forceinline__ unsigned transposed_offset(int column, int lane, unsigned second) {
    column += lane % 8;
    return column * ROW + place(lane / 16, column) * 16 + (lane / 8 % 2 ? second : 0);
}

// Scores of 16 rows with the 8 staged rows at `at`.
__device__ __forceinline__ void scores(float (&s)[4], const Left& rows, unsigned at) {
    s[0] = s[1] = s[2] = s[3] = 0;
#pragma unroll
    for (int n = 0; n < BANDS; ++n) {
        const Chunk c = read_chunk(at ^ (n * 64));
        const auto& a = rows.a[n];
        multiply(scalar_t(), s, a[0][0], a[0][1], a[0][2], a[0][3], c.word[0], c.word[1]);
        multiply(scalar_t(), s, a[1][0], a[1][1], a[1][2], a[1][3], c.word[2], c.word[3]);
    }
}

// out += weights of a step times its staged rows. With `half`, only the first block of the step is
// there; the second is taken as zeros, whatever lies at its place.
__device__ __forceinline__ void accumulate(
    float (&out)[D / 8][4], const unsigned (&w)[2][2], unsigned at, bool half) {
#pragma unroll
    for (int j = 0; j < D / 16; ++j) {
        unsigned b[4];
        read_transposed(b, at ^ (j * 32));
        multiply(scalar_t(), out[2 * j], w[0][0], w[0][1], w[1][0], w[1][1], b[0],
                 half ? 0u : b[1]);
        multiply(scalar_t(), out[2 * j + 1], w[0][0], w[0][1], w[1][0], w[1][1], b[2],
                 half ? 0u : b[3]);
    }
}

// A row of results: four lanes hold pairs of numbers of every 8; they trade them, so that each
// stores whole chunks. All lanes take part; `write` says which rows there are.
__device__ __forceinline__ void store_row(
    scalar_t* row, const float (&x)[D / 8][4], int side, float factor, int c, bool write) {
#pragma unroll
    for (int n = 0; n < BANDS; ++n) {
        unsigned w[4];
#pragma unroll
        for (int j = 0; j < 4; ++j)
            w[j] = pair(scalar_t(), x[4 * n + j][2 * side] * factor,
                        x[4 * n + j][2 * side + 1] * factor);
        // Transpose 4 x 4: first pairs of lanes, then pairs of pairs.
#pragma unroll
        for (int step = 1; step <= 2; ++step) {
            const bool odd = c & step;
#pragma unroll
            for (int k = 0; k < 2; ++k) {
                const int low = step == 1 ? 2 * k : k, high = low + step;
                const unsigned got =
                    __shfl_xor_sync(0xFFFFFFFFu, odd ? w[low] : w[high], step);
                if (odd) w[low] = got; else w[high] = got;
            }
        }
        if (write)
            asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};"
                :: "l"(row + n * 32 + c * 8), "r"(w[0]), "r"(w[1]), "r"(w[2]), "r"(w[3])
                : "memory");
    }
}

// ---- the walk --------------------------------------------------------------------------------

struct SmallItem {  // a tile of one dilation group of one image
    long long batch;
    int group[2], extent[2], begin[2];  // extent of the group; tokens in group coordinates

    // False for the tiles that shorter dilation groups lack.
    __device__ __forceinline__ bool set(const SmallGeometry& g, unsigned number) {
        group[1] = number % g.dilation[1];
        number /= g.dilation[1];
        begin[1] = number % g.tiles[1] * g.blocks * 8;
        number /= g.tiles[1];
        group[0] = number % g.dilation[0];
        number /= g.dilation[0];
        begin[0] = number % g.tiles[0] * g.rows;
        batch = number / g.tiles[0];
#pragma unroll
        for (int a = 0; a < 2; ++a)
            extent[a] = (g.length[a] - group[a] + g.dilation[a] - 1) / g.dilation[a];
        return begin[0] < extent[0] && begin[1] < extent[1];
    }

    // The number of a token within its image.
    __device__ __forceinline__ long long token(const SmallGeometry& g, int row, int column) const {
        return (long long)(group[0] + row * g.dilation[0]) * g.length[1] +
               group[1] + column * g.dilation[1];
    }
};

struct Grid {  // the rows of one head of one image, addressed by row and column of a group
    scalar_t* first;
    long long down, right;

    __device__ __forceinline__ Grid(
        const View& v, const SmallGeometry& g, const SmallItem& item, int head) {
        first = (scalar_t*)v.data + item.batch * v.batch + head * v.head +
                item.group[0] * v.axis[0] + item.group[1] * v.axis[1];
        down = g.dilation[0] * v.axis[0];
        right = g.dilation[1] * v.axis[1];
    }
    __device__ __forceinline__ scalar_t* at(int row, int column) const {
        return first + row * down + column * right;
    }
};

__device__ __forceinline__ Interval window(int position, int length, int kernel_size) {
    return window(position, length, kernel_size, 1, false);
}
__device__ __forceinline__ Interval inverse_window(int position, int length, int kernel_size) {
    return inverse_window(position, length, kernel_size, 1, false);
}

struct Role {  // what a warp does
    int lane, warp, warps, head, split, column;  // head and column within the block's

    __device__ __forceinline__ Role(const SmallGeometry& g) {
        lane = threadIdx.x % 32;
        warp = threadIdx.x / 32;
        warps = blockDim.x / 32;
        column = warp % g.blocks * 8;
        split = warp / g.blocks % g.splits;
        head = warp / g.blocks / g.splits;
    }
};

// Bytes between staged tensors of a head, and between heads.
__device__ __forceinline__ unsigned tensor_bytes(const SmallGeometry& g) {
    return g.staged * g.pitch * ROW;
}

// Copies a box of `rows` rows from (`row`, `column`) on, of two tensors and all heads of the block,
// to shared memory: [head][tensor][row][pitch]. Columns past the group become zeros. Head h of the
// grid takes head (h * times + plus) / sharing of the tensors.
__device__ __forceinline__ void stage(
    const SmallGeometry& g, const SmallItem& item, const Role& role, unsigned to, int first_head,
    const View& a, const View& b, int times, int plus, int sharing, int row, int column,
    int rows) {
    const int each = g.heads_here * rows;
    for (int n = role.warp; n < 2 * each; n += role.warps) {
        const int which = n >= each, rest = n - which * each, here = rest / rows;
        const int down = rest - here * rows, head = first_head + here;
        const Grid from(which ? b : a, g, item, (head * times + plus) / sharing);
        const unsigned line =
            to + (2 * here + which) * tensor_bytes(g) + down * g.pitch * ROW;
        const scalar_t* source = from.at(row + down, column);
        for (int x = role.lane; x < g.pitch * CHUNKS; x += 32) {
            const int chunk = x % CHUNKS, at = x / CHUNKS;
            const bool real = column + at < item.extent[1];
            copy_chunk(line + at * ROW + place(chunk, at) * 16,
                       source + (real ? at * from.right : 0) + chunk * 8, real);
        }
    }
}

// The bias tables of the block's heads, times log2 e: [head][BIAS_ROWS][BIAS_PITCH], rows from
// distance -KH on, which is read but never used. Heads of the table as in `stage`.
__device__ __forceinline__ void stage_biases(
    const SmallGeometry& g, float* to, const float* rpb, int first_head, int times, int plus) {
    for (int n = threadIdx.x; n < g.heads_here * BIASES; n += blockDim.x) {
        const int column = n % BIAS_PITCH, row = n / BIAS_PITCH % BIAS_ROWS - 1;
        const int head = (first_head + n / BIASES) * times + plus;
        const int at = (head * (2 * KH - 1) + row) * (2 * KW - 1) + column;
        const bool real = column < 2 * KW - 1;
        to[n] = !real ? minus_infinity()
                : RPB && row >= 0 ? rpb[at] * (float)LOG2_E : 0.0f;
    }
}

// First staged column: `begin`, moved left so that the staged columns end inside the group.
__device__ __forceinline__ int first_staged(const SmallGeometry& g, int begin, int extent) {
    return most(0, least(begin, extent - g.pitch));
}
