// Backward, queries at rest: with P = e^(s - lse), dP_ij = d_out_i . v_j and
//   delta_i = d_out_i . out_i - d_lse_i,   dS_ij = P_ij (dP_ij - delta_i),
// this kernel writes delta, d_query_i = scale * sum_j dS_ij k_j, and, with RPB_GRAD, each block's
// own sums of dS per bias, which reduce_partials adds up in a fixed order.
//
// Blocks, lanes and boxes are as in na_fwd. `delta` and `d_query` are overwritten; `partial` must
// come zeroed, and a block adds to no table but its own: no atomics, the same bits every time. For
// the biases the dS of a box lie in shared memory, [query of the tile][key of the box], and each
// thread collects some of the biases from there, queries in order.

#include "common.cuh"
#include "neighborhood.cuh"
#include "tile.cuh"

struct Params {
    Geometry geometry;
    int heads;
    int queries_per_kv;  // query heads that share a key and value head
    int head_dim;
    int value_dim;
    int extras;          // additional keys and values
    int pitch;           // numbers per query in the shared table of dS
    long long items;
    double scale;
    View query;
    View key;
    View value;
    View extra_key;
    View extra_value;
    View out;
    View d_out;
    View d_query;
    acc_t* rpb;      // [heads, 2 * kernel_size - 1 per axis]
    acc_t* lse;      // [batch, heads, *spatial]
    acc_t* d_lse;    // like lse, or null
    acc_t* delta;    // like lse
    acc_t* partial;  // [blocks per head, heads, 2 * kernel_size - 1 per axis]
};

static_assert(RANK >= 1 && RANK <= 3 && STEP >= 1, "the plan gives 1 to 3 axes and whole steps");
static_assert(RPB || !RPB_GRAD, "only a given bias has a gradient");

// Adds the dS of one box to this block's table: each thread owns some biases and visits, in order,
// the queries that have their key at that distance inside the box.
__device__ __forceinline__ void collect_biases(
    const Geometry& g, const Box& tile, const Box& box, const acc_t* table, int pitch,
    acc_t* sums) {
    int low[RANK], span[RANK], total = 1;  // distances key - query that occur
#pragma unroll
    for (int a = 0; a < RANK; ++a) {
        const int k = g.kernel_size[a];
        low[a] = most(box.begin[a] - (tile.begin[a] + tile.extent[a] - 1), 1 - k);
        span[a] = least(box.begin[a] + box.extent[a] - 1 - tile.begin[a], k - 1) - low[a] + 1;
        total *= span[a];
    }
    for (int n = threadIdx.x; n < total; n += blockDim.x) {
        int rest = n, bias = 0, slot = 0, row = 0, lines = 1, count[RANK], at[RANK], distance[RANK];
#pragma unroll
        for (int a = RANK - 1; a >= 0; --a) {
            distance[a] = low[a] + rest % span[a];
            rest /= span[a];
        }
#pragma unroll
        for (int a = 0; a < RANK; ++a) {
            const int begin = most(tile.begin[a], box.begin[a] - distance[a]);
            const int end = least(tile.begin[a] + tile.extent[a],
                                  box.begin[a] + box.extent[a] - distance[a]);
            bias = bias * (2 * g.kernel_size[a] - 1) + rpb_index(distance[a], 0, g.kernel_size[a]);
            slot = slot * g.tile[a] + begin - tile.begin[a];
            row = row * box.extent[a] + begin + distance[a] - box.begin[a];
            count[a] = most(0, end - begin);
            at[a] = 0;
            if (a < RANK - 1) lines *= count[a];
        }
        acc_t sum = 0;
        for (int line = 0; line < lines; ++line) {
            int skip = 0;
#pragma unroll
            for (int a = 0; a < RANK - 1; ++a) {
                int slots = at[a], rows = at[a];
#pragma unroll
                for (int b = a + 1; b < RANK; ++b) {
                    slots *= g.tile[b];
                    rows *= box.extent[b];
                }
                skip += slots * pitch + rows;
            }
            const acc_t* from = table + slot * pitch + row + skip;
            for (int x = 0; x < count[RANK - 1]; ++x) sum += from[x * (pitch + 1)];
            bool carry = true;
#pragma unroll
            for (int a = RANK - 2; a >= 0; --a) {
                at[a] += carry;
                carry &= at[a] == count[a];
                if (carry) at[a] = 0;
            }
        }
        sums[bias] += sum;
    }
}

extern "C" __global__ void __launch_bounds__(MAX_THREADS, QK_CHUNKS + V_CHUNKS <= 4 ? 2 : 1)
na_bwd_dq(const __grid_constant__ Params p) {
    extern __shared__ Chunk shared[];
    __shared__ Item item;
    const Geometry& g = p.geometry;
    Chunk* keys = shared;
    Chunk* values = keys + (g.capacity + 1) * QK_CHUNKS * LANES;
    acc_t* table = (acc_t*)(values + (g.capacity + 1) * V_CHUNKS * LANES);
    clear_row<QK_CHUNKS>(keys, g.capacity);
    clear_row<V_CHUNKS>(values, g.capacity);

    const int lane = threadIdx.x % LANES, slot = threadIdx.x / LANES, slots = blockDim.x / LANES;
    const int head = blockIdx.x % p.heads, kv_head = head / p.queries_per_kv;
    const acc_t scale = (acc_t)(p.scale * LOG2_E);
    const int biases = biases_per_head(g);
    const acc_t* bias = RPB ? p.rpb + (long long)head * biases : nullptr;
    acc_t* sums = RPB_GRAD ? p.partial + (long long)blockIdx.x * biases : nullptr;

    for (long long n = blockIdx.x / p.heads; n < p.items; n += gridDim.x / p.heads) {
        if (!begin_item<false>(g, n, item)) continue;

        // Load the query and its output's gradient; delta and log-sum-exp.
        int position[RANK];
        Interval seen[RANK];
        const bool active = own_token<false>(g, item, slot, position, seen);
        acc_t query[QK_CHUNKS][CHUNK], d_query[QK_CHUNKS][CHUNK], d_out[V_CHUNKS][CHUNK];
        set_zero(query);
        set_zero(d_query);
        set_zero(d_out);
        acc_t delta = 0, lse = 0;
        const long long image = item.batch * p.heads + head;
        const long long token = image * tokens_per_image(g) + token_number(g, item, position);
        if (active) {
            load_numbers(rows_of(p.query, g, item, head).at(position), p.head_dim, lane, query);
            load_numbers(rows_of(p.d_out, g, item, head).at(position), p.value_dim, lane, d_out);
            Chunk out[V_CHUNKS];
            load_share(rows_of(p.out, g, item, head).at(position), p.value_dim, lane, out);
            delta = partial_dot(d_out, out);
            lse = p.lse[token] * (acc_t)LOG2_E;
        }
        delta = sum_over_lanes(delta);
        if (active) {
            if (p.d_lse) delta -= p.d_lse[token];
            if (lane == 0) p.delta[token] = delta;
        }

        // Walk the window box by box, then the additional keys.
        const int boxes = boxes_in(g, item.halo), lines = (p.extras + g.capacity - 1) / g.capacity;
        for (int b = 0; b < boxes + lines; ++b) {
            const bool in_window = b < boxes;
            Box box;
            Rows key_rows, value_rows;
            if (in_window) {
                box = box_at(g, item.halo, b);
                key_rows = rows_of(p.key, g, item, kv_head);
                value_rows = rows_of(p.value, g, item, kv_head);
            } else {
                const int begin = (b - boxes) * g.capacity;
                box = line_box(begin, least(g.capacity, p.extras - begin));
                key_rows = line_of(p.extra_key, item.batch, kv_head);
                value_rows = line_of(p.extra_value, item.batch, kv_head);
#pragma unroll
                for (int a = 0; a < RANK; ++a)
                    seen[a] = {0, !active ? 0 : a == RANK - 1 ? p.extras : 1};
            }
            __syncthreads();
            stage_rows<QK_CHUNKS, V_CHUNKS>(
                box, key_rows, p.head_dim, keys, value_rows, p.value_dim, values);
            if (RPB_GRAD && in_window)
                for (int i = threadIdx.x; i < slots * p.pitch; i += blockDim.x) table[i] = 0;
            __syncthreads();

            walk(box, seen, [&](const int (&first)[RANK], int row, int count, int turns) {
                const int bias_at = pair_bias(g, first, position);
                for (int x = 0; x < turns; x += STEP) {
                    Chunk c_key[STEP][QK_CHUNKS];
                    acc_t score[STEP], d_weight[STEP];
#pragma unroll
                    for (int j = 0; j < STEP; ++j) {
                        const int at = x + j < count ? row + x + j : g.capacity;
                        Chunk c_value[V_CHUNKS];
                        read_share(keys, at, lane, c_key[j]);
                        read_share(values, at, lane, c_value);
                        score[j] = partial_dot(query, c_key[j]);
                        d_weight[j] = partial_dot(d_out, c_value);
                    }
#pragma unroll
                    for (int j = 0; j < STEP; ++j) {
                        const bool valid = x + j < count;
                        acc_t t = sum_over_lanes(score[j]) * scale;
                        if (RPB && valid && in_window)
                            t += bias[bias_at + x + j] * (acc_t)LOG2_E;
                        const acc_t d_score =
                            exp_2(t - lse) * (sum_over_lanes(d_weight[j]) - delta);
                        score[j] = valid ? d_score : (acc_t)0;
                        if (RPB_GRAD && valid && in_window && lane == 0)
                            table[slot * p.pitch + row + x + j] = d_score;
                        add_scaled(d_query, score[j], c_key[j]);
                    }
                }
            });
            if (RPB_GRAD && in_window) {
                __syncthreads();
                collect_biases(g, item.tile, box, table, p.pitch, sums);
            }
        }

        // Store.
        if (active) {
            scale_by(d_query, (acc_t)p.scale);
            const Rows rows = rows_of(p.d_query, g, item, head);
            store_numbers(rows.at(position), p.head_dim, lane, d_query);
        }
    }
}
