// Backward, keys at rest: d_key_j = scale * sum_i dS_ij q_i and d_value_j = sum_i P_ij d_out_i over
// the queries i that see key j, its inverse window; P and dS as in na_bwd_dq, which must have
// written delta.
//
// A block takes a tile of keys of one key head. LANES threads share a key: its rows and both sums
// stay in their registers. The queries that see the tile pass through shared memory box by box,
// with the gradient of their output, for every query head that reads this key head. Both results
// are overwritten: every key has one owner, so there are no atomics.

#include "common.cuh"
#include "neighborhood.cuh"
#include "tile.cuh"

struct Params {
    Geometry geometry;
    int heads;           // query heads
    int kv_heads;
    int queries_per_kv;  // query heads that share a key and value head
    int head_dim;
    int value_dim;
    long long items;
    double scale;
    View query;
    View key;
    View value;
    View d_out;
    View d_key;
    View d_value;
    acc_t* rpb;    // [heads, 2 * kernel_size - 1 per axis]
    acc_t* lse;    // [batch, heads, *spatial]
    acc_t* delta;  // like lse
};

static_assert(RANK >= 1 && RANK <= 3 && STEP >= 1, "the plan gives 1 to 3 axes and whole steps");

// Two blocks on a multiprocessor while a thread's four shares of rows leave room for it.
enum { MIN_BLOCKS = (QK_CHUNKS + V_CHUNKS) * CHUNK * sizeof(acc_t) <= 64 ? 2 : 1 };

extern "C" __global__ void __launch_bounds__(MAX_THREADS, MIN_BLOCKS)
na_bwd_dkv(const __grid_constant__ Params p) {
    extern __shared__ Chunk shared[];
    __shared__ Item item;
    const Geometry& g = p.geometry;
    Chunk* queries = shared;
    Chunk* d_outs = queries + (g.capacity + 1) * QK_CHUNKS * LANES;
    acc_t* lses = (acc_t*)(d_outs + (g.capacity + 1) * V_CHUNKS * LANES);
    acc_t* deltas = lses + g.capacity + 1;
    clear_row<QK_CHUNKS>(queries, g.capacity);
    clear_row<V_CHUNKS>(d_outs, g.capacity);
    if (threadIdx.x == 0) lses[g.capacity] = deltas[g.capacity] = 0;

    const int lane = threadIdx.x % LANES, slot = threadIdx.x / LANES;
    const int kv_head = blockIdx.x % p.kv_heads;
    const acc_t scale = (acc_t)(p.scale * LOG2_E);

    for (long long n = blockIdx.x / p.kv_heads; n < p.items; n += gridDim.x / p.kv_heads) {
        if (!begin_item<true>(g, n, item)) continue;

        // Load the key and find who sees it and the whole tile.
        int position[RANK];
        Interval seen[RANK];
        const bool active = own_token<true>(g, item, slot, position, seen);
        acc_t key[QK_CHUNKS][CHUNK], d_key[QK_CHUNKS][CHUNK];
        acc_t value[V_CHUNKS][CHUNK], d_value[V_CHUNKS][CHUNK];
        set_zero(key);
        set_zero(d_key);
        set_zero(value);
        set_zero(d_value);
        if (active) {
            load_numbers(rows_of(p.key, g, item, kv_head).at(position), p.head_dim, lane, key);
            load_numbers(rows_of(p.value, g, item, kv_head).at(position), p.value_dim, lane, value);
        }

        // Walk the inverse window box by box, one query head after the other.
        const int boxes = boxes_in(g, item.halo);
        for (int b = 0; b < boxes * p.queries_per_kv; ++b) {
            const Box box = box_at(g, item.halo, b % boxes);
            const int head = kv_head * p.queries_per_kv + b / boxes;
            const acc_t* bias = RPB ? p.rpb + (long long)head * biases_per_head(g) : nullptr;
            const long long image = (item.batch * p.heads + head) * tokens_per_image(g);
            __syncthreads();
            stage_rows<QK_CHUNKS, V_CHUNKS>(
                box, rows_of(p.query, g, item, head), p.head_dim, queries,
                rows_of(p.d_out, g, item, head), p.value_dim, d_outs);
            for (int row = threadIdx.x; row < rows_in(box); row += blockDim.x) {
                int at[RANK];
                position_in(box, row, at);
                const long long token = image + token_number(g, item, at);
                lses[row] = p.lse[token] * (acc_t)LOG2_E;
                deltas[row] = p.delta[token];
            }
            __syncthreads();

            walk(box, seen, [&](const int (&first)[RANK], int row, int count, int turns) {
                const int bias_at = pair_bias(g, position, first);  // falls as the query moves on
                for (int x = 0; x < turns; x += STEP) {
                    Chunk c_query[STEP][QK_CHUNKS], c_d_out[STEP][V_CHUNKS];
                    acc_t score[STEP], d_weight[STEP];
#pragma unroll
                    for (int j = 0; j < STEP; ++j) {
                        const int at = x + j < count ? row + x + j : g.capacity;
                        read_share(queries, at, lane, c_query[j]);
                        read_share(d_outs, at, lane, c_d_out[j]);
                        score[j] = partial_dot(key, c_query[j]);
                        d_weight[j] = partial_dot(value, c_d_out[j]);
                    }
#pragma unroll
                    for (int j = 0; j < STEP; ++j) {
                        const bool valid = x + j < count;
                        const int at = valid ? row + x + j : g.capacity;
                        acc_t t = sum_over_lanes(score[j]) * scale;
                        if (RPB && valid) t += bias[bias_at - x - j] * (acc_t)LOG2_E;
                        const acc_t weight = exp_2(t - lses[at]);
                        const acc_t d_score = weight * (sum_over_lanes(d_weight[j]) - deltas[at]);
                        add_scaled(d_value, valid ? weight : (acc_t)0, c_d_out[j]);
                        add_scaled(d_key, valid ? d_score : (acc_t)0, c_query[j]);
                    }
                }
            });
        }

        // Store.
        if (active) {
            scale_by(d_key, (acc_t)p.scale);
            store_numbers(rows_of(p.d_key, g, item, kv_head).at(position), p.head_dim, lane, d_key);
            store_numbers(
                rows_of(p.d_value, g, item, kv_head).at(position), p.value_dim, lane, d_value);
        }
    }
}
