// Backward for small 2-D windows on tensor cores where every dilation group is exactly one window:
// d_query, d_key, d_value and, with RPB_GRAD, each warp's own sums of dS per bias. One launch in place
// of na2d_small_bwd_dq and na2d_small_bwd_dkv: weights and dS are computed once, every row is moved
// once.
//
// A warp takes one head of one group after another. It stages the group's four tensors, forms delta,
// and walks pairs of key rows: a fragment is 2 rows x 8 columns of keys against one row of queries.
// So weights and dS are left factors of d_value and d_key as they are; for d_query blocks of dS are
// transposed. The sums of all queries stay in registers, those of keys for one pair of rows. Nothing
// is shared between warps but the launch: no atomics, the same bits every time; reduce_partials adds
// the warps' tables in order.
//
// Read beside common.cuh's and small.cuh's: DENSE is 1, KERNEL_WIDTH and KERNEL_HEIGHT are at most 8,
// HEAD_DIM is 32, SCALAR is a half.

#include "common.cuh"
#include "instructions.cuh"
#include "neighborhood.cuh"
#include "products.cuh"
#include "small.cuh"

struct Params {
    SmallGeometry geometry;
    int items;       // dilation groups of all images
    int slots;       // warps of the launch per head
    Scale scale;
    View query;
    View key;
    View value;
    View out;
    View d_out;
    View d_query;
    View d_key;
    View d_value;
    acc_t* rpb;      // [heads, 2 * kernel_size - 1 per axis]
    acc_t* lse;      // [batch, heads, *spatial]
    acc_t* d_lse;    // like lse, or null
    acc_t* partial;  // [slots, heads, 2 * kernel_size - 1 per axis]
};

static_assert(PAIRED && !FLOATS && D == 32 && KH <= 8, "sums of a whole group fit a warp's registers");

enum {
    PAIRS = (KH + 1) / 2,     // of rows
    LINE = 8 * ROW,           // bytes of a staged row of the map
    TENSOR = KH * LINE,
    ROW_SUMS = 2 * KH - 1,    // rows of the bias table
    // Bytes of a warp's shared memory: query, d_out, key, value; per row of queries what scores and
    // what their gradients start from, as fragments hold them; the table; sums per lane.
    QUERIES_AT = 0,
    OUTS_AT = TENSOR,
    KEYS_AT = 2 * TENSOR,
    VALUES_AT = 3 * TENSOR,
    STARTS_AT = 4 * TENSOR,
    TABLE_AT = STARTS_AT + KH * 128,
    SUMS_AT = TABLE_AT + BIASES * 4,
    WARP_BYTES = (SUMS_AT + (RPB_GRAD ? ROW_SUMS * 256 : 0) + 127) / 128 * 128
};

// The transpose of 8 x 8 halves, of which every lane holds two neighbours of one row.
__device__ __forceinline__ unsigned transposed(unsigned x) {
    unsigned y;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
    return y;
}

__device__ __forceinline__ void read_quad(unsigned at, float (&x)[4]) {
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
        : "=f"(x[0]), "=f"(x[1]), "=f"(x[2]), "=f"(x[3]) : "r"(at));
}
__device__ __forceinline__ void write_float(unsigned at, float x) {
    asm volatile("st.shared.f32 [%0], %1;" :: "r"(at), "f"(x) : "memory");
}

// Scores of 16 rows with a row of 8 columns, added to `start`.
__device__ __forceinline__ void row_scores(
    float (&s)[4], const float (&start)[4], const Left& rows, unsigned at) {
    float t[1][4], t0[1][4];
#pragma unroll
    for (int e = 0; e < 4; ++e) t0[0][e] = start[e];
    scores(t, t0, rows, at, 0);
#pragma unroll
    for (int e = 0; e < 4; ++e) s[e] = t[0][e];
}

// This lane's chunk of every row of the group to shared memory.
__device__ __forceinline__ void stage_rows(
    unsigned to, const Lines& from, bool real) {
    if (real) {
#pragma unroll
        for (int row = 0; row < KH; ++row)
            copy_chunk(to + row * LINE, from.at(row));
    } else {
#pragma unroll
        for (int row = 0; row < KH; ++row) clear_chunk(to + row * LINE);
    }
}

// Sums of dS of a lane's two columns of the bias table, by row: those that the present pair of key
// rows can meet in registers, all others in the lane's part of shared memory.
struct Sums {
    float held[KH + 1][2];
    unsigned at;

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int d = 0; d <= KH; ++d) held[d][0] = held[d][1] = 0;
    }
    __device__ __forceinline__ void push(int row, const float (&x)[2]) const {
        float y[2];
        asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];"
            : "=f"(y[0]), "=f"(y[1]) : "r"(at + row * 256));
        asm volatile("st.shared.v2.f32 [%0], {%1, %2};"
            :: "r"(at + row * 256), "f"(y[0] + x[0]), "f"(y[1] + x[1]) : "memory");
    }
    // The first two rows are complete; those after them become the first.
    __device__ __forceinline__ void advance(int row) {
        push(row, held[0]);
        if (KH > 1) push(row + 1, held[1]);
#pragma unroll
        for (int d = 0; d <= KH; ++d)
#pragma unroll
            for (int e = 0; e < 2; ++e) held[d][e] = d + 2 <= KH ? held[d + 2 <= KH ? d + 2 : d][e] : 0;
    }
};

// The pair of key rows from `first` on against all queries; of the last of an odd number of rows the
// second is not there, and weighs nothing.
__device__ __forceinline__ void attend(
    unsigned staged, int lane, int first, float scale, unsigned zero,
    const unsigned (&biases)[2], float (&d_query)[PAIRS][D / 8][4], float (&d_key)[D / 8][4],
    float (&d_value)[D / 8][4], Sums& sums) {
    const bool alone = KH % 2 && first == KH - 1;
    const Across across = Across(0, lane, LINE) + staged;
    const unsigned down = first * LINE, rows_at = row_offset(0, lane);
    const unsigned starts = staged + STARTS_AT + lane % 4 * 16;
    // Of one that is not there the row before, and biases from the table's row that hides.
    const unsigned second = alone ? 0 : LINE;
    const unsigned bias[2] = {biases[0] + first * (BIAS_PITCH * 4),
                              biases[1] + first * (BIAS_PITCH * 4)};
    Left key, value;
    {
        Chunk k[2][PIECES], v[2][PIECES];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            const unsigned at = staged + rows_at + down + j * second;
            k[j][0] = read_chunk(at + KEYS_AT);
            v[j][0] = read_chunk(at + VALUES_AT);
        }
        key.set(k[0], k[1], zero);
        value.set(v[0], v[1], zero);
    }
    unsigned keys[2][4];  // right factors of d_query
    const unsigned keys_at = across.at[0] + KEYS_AT + down - (alone && lane & 8 ? LINE : 0);
#pragma unroll
    for (int j = 0; j < 2; ++j) read_transposed(keys[j], keys_at ^ (j * 32));
#pragma unroll
    for (int n = 0; n < D / 8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) d_key[n][e] = d_value[n][e] = 0;
#pragma unroll
    for (int a = 0; a < PAIRS; ++a) {
        const int HS = 2 * a + 1 < KH ? 2 : 1;  // rows of queries
        float t[2][4], d[2][4], t0[2][4], d0[2][4];
#pragma unroll
        for (int h = 0; h < HS; ++h) {
            read_quad(starts + (2 * a + h) * 128, t0[h]);
            read_quad(starts + (2 * a + h) * 128 + 64, d0[h]);
        }
#pragma unroll
        for (int h = 0; h < HS; ++h) {
            const unsigned at = staged + rows_at + (2 * a + h) * LINE;
            row_scores(t[h], t0[h], key, at + QUERIES_AT);
            row_scores(d[h], d0[h], value, at + OUTS_AT);
        }
        Weights<2> weights, ds;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            weights.clear(h);
            ds.clear(h);
            if (h >= HS) continue;
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const int row = j - 2 * a - h + KH - 1;  // of the table, from 2 * first on
                float x[2], y[2];
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const unsigned at = bias[e] + row * (BIAS_PITCH * 4);
                    const float added = read_float(j && alone ? staged + TABLE_AT : at);
                    x[e] = exp_2(t[h][2 * j + e] * scale + added);
                    y[e] = x[e] * d[h][2 * j + e];
                    if (RPB_GRAD) sums.held[row][e] += y[e];
                }
                weights.set(h, j, x[0], x[1]);
                ds.set(h, j, y[0], y[1]);
            }
        }
        accumulate(scalar_t(), d_value, weights, across + (OUTS_AT + 2 * a * LINE), LINE, HS);
        accumulate(scalar_t(), d_key, ds, across + (QUERIES_AT + 2 * a * LINE), LINE, HS);
        unsigned turned[2][2];  // [row of keys][row of queries]
#pragma unroll
        for (int j = 0; j < 2; ++j)
#pragma unroll
            for (int h = 0; h < 2; ++h)
                turned[j][h] = h < HS ? transposed(ds.word[h][j][0]) : 0;
        const unsigned left[4] = {turned[0][0], turned[0][1], turned[1][0], turned[1][1]};
#pragma unroll
        for (int n = 0; n < D / 8; ++n)
            multiply(scalar_t(), d_query[a][n], left, keys[n / 2][n % 2 * 2],
                     keys[n / 2][n % 2 * 2 + 1]);
    }
}

extern "C" __global__ void __launch_bounds__(128, 2)
na2d_small_bwd_dense(const __grid_constant__ Params p) {
    extern __shared__ __align__(128) unsigned char shared[];
    const SmallGeometry& g = p.geometry;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int worker = blockIdx.x * (blockDim.x / 32) + warp;
    const int slot = worker / g.heads, head = worker % g.heads;
    if (slot >= p.slots) return;
    const int column = lane / 4, c = lane % 4, near = least(column, KW - 1);
    const unsigned staged = shared_address(shared) + warp * WARP_BYTES;
    const unsigned rows_at = row_offset(0, lane);
    constexpr int PER_HEAD = (2 * KH - 1) * (2 * KW - 1);

    for (int n = lane; n < BIASES; n += 32) {
        const int row = n / BIAS_PITCH - 1, x = n % BIAS_PITCH;
        const bool real = row >= 0 && x < 2 * KW - 1;
        const float bias =
            RPB && real ? p.rpb[head * PER_HEAD + row * (2 * KW - 1) + x] * (float)LOG2_E : 0.0f;
        write_float(staged + TABLE_AT + n * 4, real ? bias : minus_infinity());
    }
    Sums sums;
    sums.at = staged + SUMS_AT + lane * 8;
    if (RPB_GRAD)
        for (int n = lane; n < ROW_SUMS * 64; n += 32) write_float(staged + SUMS_AT + n * 4, 0);
    unsigned biases[2];  // of this lane's key and two queries, in the row after the first
#pragma unroll
    for (int e = 0; e < 2; ++e) {
        const int query = 2 * c + e;
        const bool sees = column < KW && query < KW;
        const int bias = sees ? rpb_index(column, query, KW) : (int)NO_BIAS;
        biases[e] = staged + TABLE_AT + (BIAS_PITCH + bias) * 4;
    }
    const float scale = p.scale.base_two;

    for (int n = slot; n < p.items; n += p.slots) {
        SmallItem item;
        item.set(g, n);
        __syncwarp();  // what was staged before has been read
        // Lane 4 g + c has chunk c of column g; columns that are not there are the last again.
        const long long numbers = item.number(g, g.heads, head, 0, near);
        float lse[KH];
#pragma unroll
        for (int row = 0; row < KH; ++row) lse[row] = *number_at(p.lse, g, numbers, row);
        const Lines outs(p.out, g, item, head, 0, near, loaded(c));
        Chunk o[2 * PAIRS][PIECES];
#pragma unroll
        for (int row = 0; row < 2 * PAIRS; ++row)
            read_row(outs.at(least(row, KH - 1)), true, o[row]);
        const bool real = column < KW;
        const unsigned to = staged + rows_at;
        stage_rows(to + QUERIES_AT, Lines(p.query, g, item, head, 0, near, loaded(c)), real);
        stage_rows(to + OUTS_AT, Lines(p.d_out, g, item, head, 0, near, loaded(c)), real);
        stage_rows(to + KEYS_AT, Lines(p.key, g, item, head, 0, near, loaded(c)), real);
        stage_rows(to + VALUES_AT, Lines(p.value, g, item, head, 0, near, loaded(c)), real);
        copies_done();
        __syncwarp();
#pragma unroll
        for (int a = 0; a < PAIRS; ++a) {
            Chunk d[2][PIECES], rows[2][PIECES];
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                d[h][0] = read_chunk(staged + OUTS_AT + rows_at + least(2 * a + h, KH - 1) * LINE);
                rows[h][0] = o[2 * a + h][0];
            }
            Left d_out;
            d_out.set(d[0], d[1], g.zero);
            float delta[2];
            dots(scalar_t(), d_out, rows, lane, delta);
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const int row = 2 * a + h;
                if (row >= KH) continue;
                const auto own_number = [&](float* all) { return number_at(all, g, numbers, row); };
                if (p.d_lse) delta[h] -= *own_number(p.d_lse);
                // As in small_queries.cuh: lse is not subtracted from each score.
                const float start = lse[row] * -p.scale.inverse;
                // Lanes c = 0, 1 write the one, lanes 2, 3 the other, for two rows of keys.
                write_float(staged + STARTS_AT + row * 128 + c / 2 * 64 + column / 2 * 16 +
                                c % 2 * 8 + column % 2 * 4,
                            c < 2 ? start : -delta[h]);
            }
        }
        __syncwarp();

        float d_query[PAIRS][D / 8][4];
#pragma unroll
        for (int a = 0; a < PAIRS; ++a)
#pragma unroll
            for (int j = 0; j < D / 8; ++j)
#pragma unroll
                for (int e = 0; e < 4; ++e) d_query[a][j][e] = 0;
        if (RPB_GRAD) sums.clear();
        const Lines d_keys(p.d_key, g, item, head, 0, near, stored(c));
        const Lines d_values(p.d_value, g, item, head, 0, near, stored(c));
        unsigned place = lane;  // addresses are made in every round: there are no registers to spare
#pragma unroll 1
        for (int first = 0; first < KH; first += 2) {
            float d_key[D / 8][4], d_value[D / 8][4];
            anew(place);
            attend(staged, place, first, scale, g.zero, biases, d_query, d_key, d_value, sums);
            if (RPB_GRAD) sums.advance(first);
#pragma unroll
            for (int side = 0; side < 2; ++side) {
                const bool write = real && first + side < KH;
                store_row(d_keys.at(first + side), d_key, side, p.scale.plain, c, write);
                store_row(d_values.at(first + side), d_value, side, 1, c, write);
            }
        }
        if (RPB_GRAD)  // the rows that are left
#pragma unroll
            for (int row = 2 * PAIRS; row < ROW_SUMS; ++row)
                sums.push(row, sums.held[row - 2 * PAIRS]);
        const Lines d_queries(p.d_query, g, item, head, 0, near, stored(c));
#pragma unroll
        for (int row = 0; row < KH; ++row)
            store_row(d_queries.at(row), d_query[row / 2], row % 2, p.scale.plain, c, real);
    }

    if (RPB_GRAD) {  // of each bias the numbers of all pairs, by query
        __syncwarp();
        float* to = p.partial + ((long long)slot * g.heads + head) * PER_HEAD;
        for (int n = lane; n < PER_HEAD; n += 32) {
            const int row = n / (2 * KW - 1), shift = n % (2 * KW - 1) - (KW - 1);
            float sum = 0;
#pragma unroll
            for (int query = 0; query < KW; ++query) {
                const unsigned key = query + shift;
                sum += read_float_if(
                    key < KW, staged + SUMS_AT + row * 256 + key * 32 + query * 4);
            }
            to[n] = sum;
        }
    }
}
