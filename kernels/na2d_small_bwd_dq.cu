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
#include "products.cuh"
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

// What a warp holds of the bias gradient: for every row of the table that a pair of rows meets this
// lane's numbers, in registers if the loop over rows is straight code, else in shared memory.
struct Sums {
    enum { ROWS = KH + 1, HELD = UNROLLED == 1 ? 0 : ROWS, STRAIGHT = HELD ? HELD : 1 };
    float held[HELD + 1][OWN];
    unsigned lane_at;  // [row][pair of numbers][lane]
    int distance;      // from the first query row to its window
    int column[OWN];   // this lane's columns of the table

    __device__ __forceinline__ unsigned at(int row, int x) const {
        return lane_at + (row * OWN + x) * 128;
    }
    __device__ __forceinline__ void read(int row, float (&sum)[OWN]) const {
#pragma unroll
        for (int x = 0; x < OWN; x += 2) {
            if (HELD) {
                sum[x] = held[row * !!HELD][x];
                sum[x + 1] = held[row * !!HELD][x + 1];
            } else {
                asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];"
                    : "=f"(sum[x]), "=f"(sum[x + 1]) : "r"(at(row, x)));
            }
        }
    }
    __device__ __forceinline__ void write(int row, const float (&sum)[OWN]) {
#pragma unroll
        for (int x = 0; x < OWN; x += 2) {
            if (HELD) {
                held[row * !!HELD][x] = sum[x];
                held[row * !!HELD][x + 1] = sum[x + 1];
            } else {
                asm volatile("st.shared.v2.f32 [%0], {%1, %2};"
                    :: "r"(at(row, x)), "f"(sum[x]), "f"(sum[x + 1]));
            }
        }
    }
    __device__ __forceinline__ void add(int row, const float (&y)[OWN]) {
        float sum[OWN];
        read(row, sum);
#pragma unroll
        for (int x = 0; x < OWN; ++x) sum[x] += y[x];
        write(row, sum);
    }
    __device__ __forceinline__ void clear() {
        const float zero[OWN] = {};
#pragma unroll
        for (int row = 0; row < ROWS; ++row) write(row, zero);
    }
};

// d_query of a pair of rows into `out`, its dS into `sums`.
__device__ __forceinline__ void attend(
    const SmallGeometry& g, Left& query, Left& d_out, unsigned keys, unsigned values,
    Across across, const unsigned (&biases)[OWN], float scale, const float (&lse)[2],
    const float (&delta)[2], bool staggered, float (&out)[D / 8][4], Sums& sums) {
    const unsigned line = g.pitch * ROW;
#pragma unroll
    for (int j = 0; j < D / 8; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) out[j][e] = 0;
    float bias[OWN];  // of the second query's next row: the first query's row before it
#pragma unroll
    for (int x = 0; x < OWN; ++x) bias[x] = read_float(biases[x]);
    float before[OWN] = {};  // the first query's dS of the row before, which has the same bias
#pragma unroll UNROLLED
    for (int i = 0; i < SEEN; i += EACH) {
        if (i == KH && !staggered) break;
        const int blocks = step_blocks(i, SEEN);
        float t[STEP][4], d[STEP][4];
        scores(t, query, keys, blocks < STEP ? 0 : block_bytes(g));
        scores(d, d_out, values, blocks < STEP ? 0 : block_bytes(g));
        query.renew(g.zero);
        d_out.renew(g.zero);
        Weights<STEP> ds;
        float both[OWN];  // dS that share biases
#pragma unroll
        for (int h = 0; h < STEP; ++h) {
            const int row = PAIRED ? i + h : i, x = PAIRED ? 0 : 2 * h;
            ds.clear(h);
            if (row >= SEEN) continue;
            float next[2] = {0, 0};
            if (row < KH)
#pragma unroll
                for (int e = 0; e < 2; ++e)
                    next[e] = read_float(biases[x + e] + (row + 1) * (BIAS_PITCH * 4));
#pragma unroll
            for (int e = 0; e < 2; ++e) both[x + e] = before[x + e];
            if (row > 0 || !staggered) {
                float y[2];
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const float weight = exp_2(t[h][2 + e] * scale + bias[x + e] - lse[1]);
                    y[e] = weight * (d[h][2 + e] - delta[1]);
                    both[x + e] += y[e];
                }
                ds.set(h, 1, y[0], y[1]);
            }
#pragma unroll
            for (int e = 0; e < 2; ++e) before[x + e] = 0;
            if (row < KH) {
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const float weight = exp_2(t[h][e] * scale + next[e] - lse[0]);
                    before[x + e] = weight * (d[h][e] - delta[0]);
                }
                ds.set(h, 0, before[x], before[x + 1]);
            }
#pragma unroll
            for (int e = 0; e < 2; ++e) bias[x + e] = next[e];
            if (RPB_GRAD && (PAIRED || h == STEP - 1)) sums.add(row, both);
        }
        accumulate(scalar_t(), out, ds, across, block_bytes(g), blocks);
        keys += EACH * line;
        values += EACH * line;
        across += EACH * line;
    }
    if (RPB_GRAD && !staggered) sums.add(KH, before);
}

// Registers to the warp's table, lanes of one column in order.
__device__ __forceinline__ void flush(Sums& sums, float* table, int lane) {
#pragma unroll 1
    for (int turn = 0; turn < 8; ++turn) {
        if (lane / 4 == turn)
#pragma unroll Sums::STRAIGHT
            for (int row = 0; row < Sums::ROWS; ++row) {
                float sum[OWN];
                sums.read(row, sum);
#pragma unroll
                for (int x = 0; x < OWN; ++x)
                    if (sums.column[x] != NO_BIAS)
                        table[(sums.distance + KH - 1 + row) * BIAS_PITCH + sums.column[x]] += sum[x];
            }
        __syncwarp();
    }
    sums.clear();
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
    stage_biases(g, tables, p.rpb, first_head, 1, 0, (float)LOG2_E);
    if (RPB_GRAD)
        for (int n = role.lane; n < BIASES; n += 32) own[n] = 0;
    const float scale = (float)p.scale * (float)LOG2_E;
    const int c = role.lane % 4;
    Sums sums;
    sums.lane_at = shared_address(tables + (g.heads_here + role.warps) * BIASES) +
                   role.warp * (Sums::ROWS * OWN * 128) + role.lane * 8;
    if (RPB_GRAD) sums.clear();
    sums.distance = 0;
#pragma unroll
    for (int x = 0; x < OWN; ++x) sums.column[x] = NO_BIAS;

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
        int bias_column[OWN];
#pragma unroll
        for (int x = 0; x < OWN; ++x) {
            const int key = begin + own_column(x, c);
            const bool sees = key >= seen.begin && key < seen.end;
            bias_column[x] = sees ? rpb_index(key, near, KW) : (int)NO_BIAS;
        }
        const unsigned table = shared_address(tables) + role.head * BIASES * 4;
        const unsigned offset = staged + 2 * role.head * tensor_bytes(g);
        const unsigned keys = offset + row_offset(begin - left, role.lane);
        const Across across = Across(begin - left, role.lane, block_bytes(g)) + offset;
        const long long image = (item.batch * g.heads + head) * g.length[0] * g.length[1];
        copies_done();
        __syncthreads();
        if (!active) continue;

#pragma unroll 1
        for (int row = row0 + 2 * role.split; row <= last; row += 2 * g.splits) {
            const int from = window(row, height, KH).begin;
            const bool two = row + 1 < height;
            const Grid queries(p.query, g, item, head), outs(p.out, g, item, head);
            const Grid d_outs(p.d_out, g, item, head), d_queries(p.d_query, g, item, head);
            Chunk q[2][PIECES], d[2][PIECES], o[PIECES];
            float lse[2], delta[2];
#pragma unroll
            for (int side = 0; side < 2; ++side) {
                const bool there = side == 0 || two;
                read_row(queries.at(row + side, near), c, there, q[side]);
                read_row(d_outs.at(row + side, near), c, there, d[side]);
                read_row(outs.at(row + side, near), c, there, o);
                delta[side] = 0;
#pragma unroll
                for (int n = 0; n < PIECES; ++n) {
                    float x[CHUNK], y[CHUNK];
                    widen(d[side][n], x);
                    widen(o[n], y);
#pragma unroll
                    for (int e = 0; e < CHUNK; ++e) delta[side] += x[e] * y[e];
                }
                delta[side] = sum_of_quad(delta[side]);
                const long long token = image + item.token(g, row + side, near);
                const bool real = column < width && there;
                if (p.d_lse && real) delta[side] -= p.d_lse[token];
                if (real && c == 0) p.delta[token] = delta[side];
                // Rows that are not there weigh nothing.
                lse[side] = real ? p.lse[token] * (float)LOG2_E : -minus_infinity();
            }
            const int distance = from - row;
            if (RPB_GRAD) {
                bool other = distance != sums.distance;
#pragma unroll
                for (int x = 0; x < OWN; ++x) other |= bias_column[x] != sums.column[x];
                if (__any_sync(0xFFFFFFFFu, other)) flush(sums, own, role.lane);
                sums.distance = distance;
#pragma unroll
                for (int x = 0; x < OWN; ++x) sums.column[x] = bias_column[x];
            }
            unsigned biases[OWN];
#pragma unroll
            for (int x = 0; x < OWN; ++x)
                biases[x] = table + (bias_column[x] + (distance + KH - 1) * BIAS_PITCH) * 4;
            Left query, d_out;
            query.set(q[0], q[1], g.zero);
            d_out.set(d[0], d[1], g.zero);
            const unsigned skip = (from - top) * line;
            float out[D / 8][4];
            const bool staggered = !DENSE && two && window(row + 1, height, KH).begin != from;
            attend(g, query, d_out, keys + skip, keys + tensor_bytes(g) + skip, across + skip,
                   biases, scale, lse, delta, staggered, out, sums);
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
