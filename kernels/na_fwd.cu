// Forward: out_i = sum_j softmax_j(scale * q_i . k_j + rpb) v_j over the window of i, and
// lse_i, the log of the sum of the exponentials (Hassani et al., CVPR 2023, eq. 2 and 3).
//
// A block takes a tile of queries of one head. LANES threads share a query: its row and its sum
// stay in their registers. The keys and values that the tile sees pass through shared memory box by
// box, then the additional ones; each query walks its part of a box, STEP keys at a time, with an
// online softmax. `out` and `lse` are overwritten, nothing is accumulated.

#include "common.cuh"
#include "neighborhood.cuh"
#include "softmax.cuh"
#include "tile.cuh"

struct Params {
    Geometry geometry;
    int heads;
    int queries_per_kv;  // query heads that share a key and value head
    int head_dim;
    int value_dim;
    int extras;          // additional keys and values
    long long items;
    double scale;
    View query;
    View key;
    View value;
    View extra_key;
    View extra_value;
    View out;
    acc_t* rpb;  // [heads, 2 * kernel_size - 1 per axis]
    acc_t* lse;  // [batch, heads, *spatial]
};

static_assert(RANK >= 1 && RANK <= 3 && STEP >= 1, "the plan gives 1 to 3 axes and whole steps");

extern "C" __global__ void __launch_bounds__(MAX_THREADS, QK_CHUNKS + V_CHUNKS <= 4 ? 2 : 1)
na_fwd(const __grid_constant__ Params p) {
    extern __shared__ Chunk shared[];
    __shared__ Item item;
    const Geometry& g = p.geometry;
    Chunk* keys = shared;
    Chunk* values = keys + (g.capacity + 1) * QK_CHUNKS * LANES;
    clear_row<QK_CHUNKS>(keys, g.capacity);
    clear_row<V_CHUNKS>(values, g.capacity);

    const int lane = threadIdx.x % LANES, slot = threadIdx.x / LANES;
    const int head = blockIdx.x % p.heads, kv_head = head / p.queries_per_kv;
    const acc_t scale = (acc_t)(p.scale * LOG2_E);
    const acc_t* bias = RPB ? p.rpb + (long long)head * biases_per_head(g) : nullptr;

    for (long long n = blockIdx.x / p.heads; n < p.items; n += gridDim.x / p.heads) {
        if (!begin_item<false>(g, n, item)) continue;

        // Load the query and find what it and the whole tile see.
        int position[RANK];
        Interval seen[RANK];
        const bool active = own_token<false>(g, item, slot, position, seen);
        acc_t query[QK_CHUNKS][CHUNK], out[V_CHUNKS][CHUNK];
        set_zero(query);
        set_zero(out);
        const Rows queries = rows_of(p.query, g, item, head);
        if (active) load_numbers(queries.at(position), p.head_dim, lane, query);

        // Walk the window box by box, then the additional keys.
        OnlineSoftmax softmax;
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
            __syncthreads();

            walk(box, seen, [&](const int (&first)[RANK], int row, int count, int turns) {
                const int bias_at = pair_bias(g, first, position);
                for (int x = 0; x < turns; x += STEP) {
                    acc_t score[STEP];
#pragma unroll
                    for (int j = 0; j < STEP; ++j) {
                        Chunk c[QK_CHUNKS];
                        read_share(keys, x + j < count ? row + x + j : g.capacity, lane, c);
                        score[j] = partial_dot(query, c);
                    }
#pragma unroll
                    for (int j = 0; j < STEP; ++j) {
                        const bool valid = x + j < count;
                        acc_t t = sum_over_lanes(score[j]) * scale;
                        if (RPB && valid && in_window)
                            t += bias[bias_at + x + j] * (acc_t)LOG2_E;
                        score[j] = valid ? t : minus_infinity();
                    }
                    scale_by(out, softmax.step(score));
#pragma unroll
                    for (int j = 0; j < STEP; ++j) {
                        Chunk c[V_CHUNKS];
                        read_share(values, x + j < count ? row + x + j : g.capacity, lane, c);
                        add_scaled(out, score[j], c);
                    }
                }
            });
        }

        // Finish the softmax and store.
        if (active) {
            scale_by(out, (acc_t)1 / softmax.total);
            const Rows outs = rows_of(p.out, g, item, head);
            store_numbers(outs.at(position), p.value_dim, lane, out);
            const long long image = item.batch * p.heads + head;
            if (lane == 0)
                p.lse[image * tokens_per_image(g) + token_number(g, item, position)] =
                    softmax.log_sum_exp();
        }
    }
}
