// Backward for small 2-D windows on tensor cores, queries at rest: delta, d_query and, with
// RPB_GRAD, each block's own sums of dS per bias. What na_bwd_dq computes, with the fragments and
// the walk of na2d_small_fwd.
//
// In the fragment of a pair of rows each number of a lane stands for one fixed bias as long as the
// distances from the queries to their windows do not change: so dS adds up in registers, over rows
// and tiles, and goes to the warp's own table when those distances change. Lanes that share a bias
// add in a fixed order, and a block adds its warps' tables in order: the same bits every time, no
// atomics. A block takes several tiles, at best always at the same place of a map;
// reduce_partials adds the blocks' tables in order.

#include "common.cuh"
#include "neighborhood.cuh"
#include "small.cuh"

struct Params {
    SmallGeometry geometry;
    int items;       // tiles of all dilation groups of all images
    double scale;
    View query;
    View key;
    View value;
    View out;
    View d_out;
    View d_query;
    acc_t* rpb;      // [heads, 2 * kernel_size - 1 per axis]
    acc_t* lse;      // [batch, heads, *spatial]
    acc_t* d_lse;    // like lse, or null
    acc_t* delta;    // like lse
    acc_t* partial;  // [blocks per head, heads, 2 * kernel_size - 1 per axis]
};

struct Sums {  // what a warp holds of the bias gradient
    float bias[KH + 1][DENSE ? 2 : 4];
    int distance;   // from the first query row to its window
    int column[4];  // this lane's columns of the table
};

// d_query of a pair of rows into `out`, its dS into `sums`.
template <int STAGGER>
__device__ __forceinline__ void attend(
    const SmallGeometry& g, const Left& query, const Left& d_out, unsigned keys, unsigned values,
    unsigned across, unsigned last_across, const unsigned (&biases)[4], float scale,
    const float (&lse)[2], const float (&delta)[2], float (&out)[D / 8][4], Sums& sums) {
    constexpr int ROWS = KH + STAGGER, STEPS = DENSE ? (KH + 1) / 2 : ROWS;
    const unsigned line = g.pitch * ROW;
#pragma unroll
    for (int j = 0; j < D / 8; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) out[j][e] = 0;
    float bias[4];  // of the second query's next row: the first query's row before it
#pragma unroll
    for (int x = 0; x < 4; ++x) bias[x] = STAGGER ? 0 : read_float(biases[x]);
#pragma unroll
    for (int i = 0; i < STEPS; ++i) {
        unsigned ds[2][2];
        bool half = false;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int row = DENSE ? 2 * i + h : i;
            ds[h][0] = ds[h][1] = 0;
            half = row >= ROWS;
            if (row >= ROWS) continue;
            float t[4], d[4];
            scores(t, query, keys + (DENSE ? h * line : h * 8 * ROW));
            scores(d, d_out, values + (DENSE ? h * line : h * 8 * ROW));
            float next[2];
#pragma unroll
            for (int e = 0; e < 2; ++e)
                next[e] = row < KH ? read_float(biases[DENSE ? e : 2 * h + e] +
                                                (row + 1) * (BIAS_PITCH * 4)) : 0.0f;
#pragma unroll
            for (int side = 0; side < 2; ++side)
                if (side == 0 ? row < KH : row >= STAGGER) {
                    float x[2];
#pragma unroll
                    for (int e = 0; e < 2; ++e) {
                        const int at = DENSE ? e : 2 * h + e;
                        const float b = side == 0 ? next[e] : bias[at];
                        const float weight = exp_2(t[2 * side + e] * scale + b - lse[side]);
                        x[e] = weight * (d[2 * side + e] - delta[side]);
                        if (RPB_GRAD) sums.bias[side == 0 ? row + 1 : row][at] += x[e];
                    }
                    ds[h][side] = pair(scalar_t(), x[0], x[1]);
                }
#pragma unroll
            for (int e = 0; e < 2; ++e) bias[DENSE ? e : 2 * h + e] = next[e];
        }
        accumulate(out, ds, half ? last_across : across, half);
        keys += DENSE ? 2 * line : line;
        values += DENSE ? 2 * line : line;
        across += DENSE ? 2 * line : line;
        last_across += 2 * line;
    }
}

// Registers to the warp's table, lanes of one column in order.
__device__ __forceinline__ void flush(Sums& sums, float* table, int lane) {
#pragma unroll 1
    for (int turn = 0; turn < 8; ++turn) {
        if (lane / 4 == turn)
#pragma unroll
            for (int j = 0; j <= KH; ++j)
#pragma unroll
                for (int x = 0; x < (DENSE ? 2 : 4); ++x)
                    if (sums.column[x] != NO_BIAS)
                        table[(sums.distance + KH - 1 + j) * BIAS_PITCH + sums.column[x]] +=
                            sums.bias[j][x];
        __syncwarp();
    }
#pragma unroll
    for (int j = 0; j <= KH; ++j)
#pragma unroll
        for (int x = 0; x < (DENSE ? 2 : 4); ++x) sums.bias[j][x] = 0;
}

extern "C" __global__ void __launch_bounds__(256, 1)
na2d_small_bwd_dq(const __grid_constant__ Params p) {
    extern __shared__ __align__(128) unsigned char shared[];
    const SmallGeometry& g = p.geometry;
    const Role role(g);
    const int teams = g.heads / g.heads_here;
    const int first_head = blockIdx.x % teams * g.heads_here, head = first_head + role.head;
    const unsigned staged = shared_address(shared), line = g.pitch * ROW;
    float* tables = (float*)(shared + 2 * g.heads_here * tensor_bytes(g));
    float* own = tables + (g.heads_here + role.warp) * BIASES;
    stage_biases(g, tables, p.rpb, first_head, 1, 0);
    if (RPB_GRAD)
        for (int n = role.lane; n < BIASES; n += 32) own[n] = 0;
    const float scale = (float)p.scale * (float)LOG2_E;
    const int c = role.lane % 4;
    Sums sums;
#pragma unroll
    for (int j = 0; j <= KH; ++j)
#pragma unroll
        for (int x = 0; x < (DENSE ? 2 : 4); ++x) sums.bias[j][x] = 0;
    sums.distance = 0;
#pragma unroll
    for (int x = 0; x < 4; ++x) sums.column[x] = NO_BIAS;

    for (int n = blockIdx.x / teams; n < p.items; n += gridDim.x / teams) {
        SmallItem item;
        if (!item.set(g, n)) continue;
        const int row0 = item.begin[0], height = item.extent[0], width = item.extent[1];
        const int last = least(row0 + g.rows, height) - 1;
        const int top = window(row0, height, KH).begin;
        const int left = first_staged(g, window(item.begin[1], width, KW).begin, width);
        __syncthreads();  // the keys and values before these have been read
        stage(g, item, role, staged, first_head, p.key, p.value, 1, 0, g.queries_per_kv, top, left,
              window(last, height, KH).end - top);

        // This warp's columns, as in the forward kernel.
        const int column0 = item.begin[1] + role.column;
        const bool active = column0 < width;
        const int column = column0 + role.lane / 4, near = least(column, width - 1);
        const int begin =
            least(window(active ? column0 : 0, width, KW).begin, left + g.pitch - COLUMNS);
        const Interval seen = window(near, width, KW);
        int bias_column[4];
#pragma unroll
        for (int x = 0; x < 4; ++x) {
            const int key = begin + x / 2 * 8 + c * 2 + x % 2;
            const bool sees = key >= seen.begin && key < seen.end;
            bias_column[x] = sees ? rpb_index(key, near, KW) : (int)NO_BIAS;
        }
        const unsigned table = shared_address(tables) + role.head * BIASES * 4;
        const unsigned offset = staged + 2 * role.head * tensor_bytes(g);
        const unsigned keys = offset + row_offset(begin - left, role.lane);
        const unsigned across =
            offset + transposed_offset(begin - left, role.lane, DENSE ? line : 8 * ROW);
        const unsigned last_across = offset + transposed_offset(begin - left, role.lane, 0);
        const Grid queries(p.query, g, item, head), outs(p.out, g, item, head);
        const Grid d_outs(p.d_out, g, item, head), d_queries(p.d_query, g, item, head);
        const long long image = (item.batch * g.heads + head) * g.length[0] * g.length[1];
        copies_done();
        __syncthreads();
        if (!active) continue;

#pragma unroll 1
        for (int row = row0 + 2 * role.split; row <= last; row += 2 * g.splits) {
            const int from = window(row, height, KH).begin;
            const bool two = row + 1 < height;
            Chunk q[2][BANDS], d[2][BANDS];
            float lse[2], delta[2];
#pragma unroll
            for (int side = 0; side < 2; ++side) {
                const int down = two ? row + side : row;
                delta[side] = 0;
#pragma unroll
                for (int b = 0; b < BANDS; ++b) {
                    const int skip = b * 32 + c * 8;
                    q[side][b] = read_global(queries.at(down, near) + skip);
                    d[side][b] = read_global(d_outs.at(down, near) + skip);
                    float x[8], y[8];
                    widen(d[side][b], x);
                    widen(read_global(outs.at(down, near) + skip), y);
#pragma unroll
                    for (int e = 0; e < 8; ++e) delta[side] += x[e] * y[e];
                }
                delta[side] = sum_of_quad(delta[side]);
                const long long token = image + item.token(g, down, near);
                const bool real = column < width && (side == 0 || two);
                if (p.d_lse) delta[side] -= p.d_lse[token];
                if (real && c == 0) p.delta[token] = delta[side];
                // Rows that are not there weigh nothing.
                lse[side] = real ? p.lse[token] * (float)LOG2_E : -minus_infinity();
            }
            const int distance = from - row;
            if (RPB_GRAD) {
                bool other = distance != sums.distance;
#pragma unroll
                for (int x = 0; x < (DENSE ? 2 : 4); ++x) other |= bias_column[x] != sums.column[x];
                if (__any_sync(0xFFFFFFFFu, other)) flush(sums, own, role.lane);
                sums.distance = distance;
#pragma unroll
                for (int x = 0; x < 4; ++x) sums.column[x] = bias_column[x];
            }
            unsigned biases[4];
#pragma unroll
            for (int x = 0; x < 4; ++x)
                biases[x] = table + (bias_column[x] + (distance + KH - 1) * BIAS_PITCH) * 4;
            Left query, d_out;
            query.set(q[0], q[1], g.zero);
            d_out.set(d[0], d[1], g.zero);
            const unsigned skip = (from - top) * line;
            float out[D / 8][4];
            if (!DENSE && two && window(row + 1, height, KH).begin != from)
                attend<1>(g, query, d_out, keys + skip, keys + tensor_bytes(g) + skip,
                          across + skip, 0, biases, scale, lse, delta, out, sums);
            else
                attend<0>(g, query, d_out, keys + skip, keys + tensor_bytes(g) + skip,
                          across + skip, last_across + skip, biases, scale, lse, delta, out, sums);
#pragma unroll
            for (int side = 0; side < 2; ++side)
                store_row(d_queries.at(row + side, near), out, side, (float)p.scale, c,
                          column < width && (side == 0 || two));
        }
    }

    if (RPB_GRAD) {  // the warps of each head, in order
        flush(sums, own, role.lane);
        __syncthreads();
        constexpr int PER_HEAD = (2 * KH - 1) * (2 * KW - 1);
        const int warps = g.blocks * g.splits;
        float* to = p.partial + ((long long)(blockIdx.x / teams) * g.heads + first_head) * PER_HEAD;
        for (int n = threadIdx.x; n < g.heads_here * PER_HEAD; n += blockDim.x) {
            const int here = n / PER_HEAD, bias = n % PER_HEAD;
            const int at = (bias / (2 * KW - 1) + 1) * BIAS_PITCH + bias % (2 * KW - 1);
            float sum = 0;
            for (int w = 0; w < warps; ++w)
                sum += tables[(g.heads_here + here * warps + w) * BIASES + at];
            to[n] = sum;
        }
    }
}
