// Backward for small 2-D windows on tensor cores, keys at rest: d_key and d_value. What na_bwd_dkv
// computes, with the fragments of na2d_small_fwd turned round: rows of a fragment are keys, a step
// is some of the queries that see them, which the inverse windows name.
//
// A block stages queries and output gradients of all queries that see its tile of keys, with their
// log-sum-exp and delta. With grouped heads it walks all query heads of its keys' head, one after
// the other, into the same registers. No atomics, the same bits every time.

#include "common.cuh"
#include "neighborhood.cuh"
#include "products.cuh"
#include "small.cuh"

struct Params {
    SmallGeometry geometry;  // its heads are those of keys and values
    double scale;
    View query;
    View key;
    View value;
    View d_out;
    View d_key;
    View d_value;
    acc_t* rpb;    // [query heads, 2 * kernel_size - 1 per axis]
    acc_t* lse;    // [batch, query heads, *spatial]
    acc_t* delta;  // like lse
};

// Numbers of two queries.
__device__ __forceinline__ void read_pair(unsigned at, float& x, float& y) {
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x), "=f"(y) : "r"(at));
}

// Columns of queries from `begin` on that a lane meets, and of the bias table what they share with
// the lane's column of keys.
struct Seen {
    int first;
    unsigned biases[OWN];

    __device__ __forceinline__ Seen(const SmallGeometry& g, int left, int begin, int key, int width,
                                    int c, unsigned table) {
        first = least(begin, left + g.pitch + g.pitch % 2 - COLUMNS);  // all of them staged
#pragma unroll
        for (int x = 0; x < OWN; ++x) {
            const int query = first + own_column(x, c);
            const Interval seen = window(query, width, KW);
            const bool sees = query >= begin && query < width && key >= seen.begin &&
                              key < seen.end;
            biases[x] = table + 4 * (sees ? rpb_index(key, query, KW) : (int)NO_BIAS);
        }
    }
};

// At most 8 warps; of short rows of halves a multiprocessor's registers hold 12.
extern "C" __global__ void __launch_bounds__(D == 32 && !FLOATS && KW <= 9 ? 384 : 256, 1)
na2d_small_bwd_dkv(const __grid_constant__ Params p) {
    extern __shared__ __align__(128) unsigned char shared[];
    const SmallGeometry& g = p.geometry;
    const Role role(g);
    const int teams = g.heads / g.heads_here;
    const int first_head = blockIdx.x % teams * g.heads_here, head = first_head + role.head;
    SmallItem item;
    if (!item.set(g, blockIdx.x / teams)) return;

    const int row0 = item.begin[0], height = item.extent[0], width = item.extent[1];
    const int last = least(row0 + g.rows, height) - 1;
    const int top = inverse_window(row0, height, KH).begin;
    const int rows = inverse_window(last, height, KH).end - top;
    const int left = first_staged(g, inverse_window(item.begin[1], width, KW).begin, width);
    const unsigned staged = shared_address(shared), line = g.pitch * ROW;
    const int even = g.pitch + g.pitch % 2;
    const int tokens = g.staged * even, queries = g.heads * g.queries_per_kv;
    // Columns are read from an even one on, so one past the last may be read and weigh nothing.
    float* past_staged = (float*)(shared + 2 * g.heads_here * tensor_bytes(g));
    for (int n = threadIdx.x; n < ROW / 4; n += blockDim.x) past_staged[n] = 0;
    float* tables = past_staged + ROW / 4;
    // [head][what scores start from, minus delta][row][even]: a lane reads pairs.
    // A row past the last table is read but never used.
    float* known = tables + g.heads_here * BIASES + BIAS_PITCH;
    if (threadIdx.x < BIAS_PITCH) known[(int)threadIdx.x - BIAS_PITCH] = 0;

    // This warp's key columns and the query columns that see them.
    const int column0 = item.begin[1] + role.column;
    const bool active = column0 < width;
    const int c = role.lane % 4, column = column0 + role.lane / 4, near = least(column, width - 1);
    int from = inverse_window(least(column0, width - 1), width, KW).begin;
    from -= (from - left) % 2;
    const int to = inverse_window(least(column0 + 7, width - 1), width, KW).end;
    const float scale = (float)p.scale * (float)LOG2_E;
    // As in na2d_small_bwd_dq: lse is not subtracted from each score.
    const float unscale = -1 / (float)p.scale;
    const float never = p.scale > 0 ? minus_infinity() : -minus_infinity();
    const unsigned table = shared_address(tables) + role.head * BIASES * 4;
    const unsigned lse_here = shared_address(known) + role.head * 2 * tokens * 4;
    const unsigned here = staged + 2 * role.head * tensor_bytes(g);

    // NOTE: the sums of a pair of rows run over all query heads of a group, so heads are staged anew
    // for every pair; the plan gives a warp one pair where heads are grouped, if it can.
    const int own = row0 + 2 * role.split;
    const Lines keys(p.key, g, item, head, own, near), values(p.value, g, item, head, own, near);
    const Lines d_keys(p.d_key, g, item, head, own, near);
    const Lines d_values(p.d_value, g, item, head, own, near);
    // The first columns of queries: mostly there are no others.
    Seen seen(g, left, from, near, width, c, table);
    for (int pass = 0; pass * 2 * g.splits < g.rows; ++pass) {
        const int below = 2 * pass * g.splits, row = own + below;
        const bool mine = active && row <= last, two = row + 1 < height;
        Left key, value;
        float d_key[D / 8][4], d_value[D / 8][4];
        if (mine) {
            Chunk k[2][PIECES], v[2][PIECES];
#pragma unroll
            for (int side = 0; side < 2; ++side) {
                const bool there = side == 0 || two;
                read_row(keys.at(below + side), c, there, k[side]);
                read_row(values.at(below + side), c, there, v[side]);
            }
            key.set(k[0], k[1], g.zero);
            value.set(v[0], v[1], g.zero);
        }
#pragma unroll
        for (int j = 0; j < D / 8; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e) d_key[j][e] = d_value[j][e] = 0;

        for (int member = 0; member < g.queries_per_kv; ++member) {
            if (pass == 0 || g.queries_per_kv > 1) {
                __syncthreads();  // what was staged before has been read
                stage(g, item, role, staged, first_head, p.query, p.d_out, g.queries_per_kv, member,
                      1, top, left, rows);
                stage_biases(g, tables, p.rpb, first_head, g.queries_per_kv, member, (float)LOG2_E);
                for (int n = role.warp; n < g.heads_here * rows; n += role.warps) {
                    const int down = n % rows, h = n / rows;
                    const int query_head = (first_head + h) * g.queries_per_kv + member;
                    const long long image =
                        (item.batch * queries + query_head) * g.length[0] * g.length[1];
                    for (int x = role.lane; x < even; x += 32) {
                        const bool real = x < g.pitch && left + x < width;
                        const long long at = image + item.token(g, top + down, left + x);
                        float* write = known + 2 * h * tokens + down * even + x;
                        write[0] = real ? p.lse[at] * unscale : never;
                        write[tokens] = real ? -p.delta[at] : 0;
                    }
                }
                copies_done();
                __syncthreads();
            }
            if (!mine) continue;
            // Queries from `first` on see the first row of keys, until `past`; from `second` on the
            // second row, until `end`.
            const Interval upper = inverse_window(row, height, KH);
            const Interval lower = inverse_window(row + 1, height, KH);
            const int first = upper.begin, past = upper.end;
            int second = two ? lower.begin : past, end = two ? lower.end : past;
            asm volatile("" : "+r"(second), "+r"(end));  // made once, not in every step
#pragma unroll 1
            for (int begin = from; begin < to; begin += COLUMNS) {
                if (to - from > COLUMNS) seen = Seen(g, left, begin, near, width, c, table);
                const int at = seen.first;
                unsigned biases[OWN];
#pragma unroll
                for (int x = 0; x < OWN; ++x)
                    biases[x] = seen.biases[x] + (row - first + KH) * (BIAS_PITCH * 4);
                unsigned skip = (first - top) * line;
                unsigned scalars = lse_here + ((first - top) * even + at - left + c * 2) * 4;
                const unsigned rows_at = here + row_offset(at - left, role.lane);
                const Across across = Across(at - left, role.lane, block_bytes(g)) + here;
#pragma unroll 1
                for (int i = first; i < end; i += EACH) {
                    const int blocks = step_blocks(i, end);
                    const unsigned next = blocks < STEP ? 0 : block_bytes(g);
                    float t[STEP][4], d[STEP][4];
                    float t0[STEP][4], d0[STEP][4];
#pragma unroll
                    for (int h = 0; h < STEP; ++h) {
                        const int rest = h < blocks ? h * (PAIRED ? even : 8) : 0;
                        const unsigned at = scalars + rest * 4;
                        const int query = PAIRED ? i + h : i;
                        float start[2];
                        read_pair(at, start[0], start[1]);
                        read_pair(at + tokens * 4, d0[h][0], d0[h][1]);
#pragma unroll
                        for (int side = 0; side < 2; ++side) {
                            const bool sees = side ? query >= second : query < past;
#pragma unroll
                            for (int e = 0; e < 2; ++e) {
                                t0[h][2 * side + e] = sees ? start[e] : never;
                                d0[h][2 * side + e] = d0[h][e];
                            }
                        }
                    }
                    scores(t, t0, key, rows_at + skip, next);
                    scores(d, d0, value, rows_at + tensor_bytes(g) + skip, next);
                    key.renew(g.zero);
                    value.renew(g.zero);
                    Weights<STEP> weights, ds;
#pragma unroll
                    for (int h = 0; h < STEP; ++h) {
                        weights.clear(h);
                        ds.clear(h);
                        if (h >= blocks) continue;
#pragma unroll
                        for (int side = 0; side < 2; ++side) {
                            const int down = (side - (PAIRED ? h : 0)) * (BIAS_PITCH * 4);
                            float x[2], y[2];
#pragma unroll
                            for (int e = 0; e < 2; ++e) {
                                const float bias =
                                    read_float(biases[PAIRED ? e : 2 * h + e] + down);
                                x[e] = exp_2(t[h][2 * side + e] * scale + bias);
                                y[e] = x[e] * d[h][2 * side + e];
                            }
                            weights.set(h, side, x[0], x[1]);
                            ds.set(h, side, y[0], y[1]);
                        }
                    }
                    accumulate(scalar_t(), d_value, weights, across + (tensor_bytes(g) + skip), block_bytes(g),
                               blocks);
                    accumulate(scalar_t(), d_key, ds, across + skip, block_bytes(g), blocks);
                    skip += EACH * line;
                    scalars += EACH * even * 4;
#pragma unroll
                    for (int x = 0; x < OWN; ++x) biases[x] -= EACH * BIAS_PITCH * 4;
                }
            }
        }
        if (!mine) continue;
#pragma unroll
        for (int side = 0; side < 2; ++side) {
            const bool write = column < width && (side == 0 || two);
            store_row(d_keys.at(below + side), d_key, side, (float)p.scale, c, write);
            store_row(d_values.at(below + side), d_value, side, 1, c, write);
        }
    }
}
