// Backward on tensor cores, queries at rest: what na_bwd_dq computes, but for the gradient of the
// bias. Delta is written for the key side, which runs later.
//
// A block takes a tile of queries of one head, a warp 16 of them; keys and values pass as in
// na_mma_fwd. A NaN or infinity may spread to the 16 queries of a warp that has its key before it.

#include "common.cuh"
#include "neighborhood.cuh"
#include "instructions.cuh"
#include "products.cuh"
#include "tile.cuh"
#include "mma.cuh"

struct Params {
    Geometry geometry;
    int heads;
    int queries_per_kv;  // query heads that share a key and value head
    int head_dim;
    int value_dim;
    int extras;          // additional keys and values
    int zero;            // 0, which the compiler must not know
    float scale;
    View query;
    View key;
    View value;
    View extra_key;
    View extra_value;
    View out;
    View d_out;
    View d_query;
    float* rpb;    // [heads, 2 * kernel_size - 1 per axis]
    float* lse;    // [batch, heads, *spatial]
    float* d_lse;  // like lse, or null
    float* delta;  // like lse
};

enum {
    STAGED = (QK_PARTS + V_PARTS) * PART_BYTES,  // bytes, twice
    MIN_BLOCKS = (QK_PARTS + V_PARTS) * ROW <= 256 ? 16 / WARPS : 8 / WARPS
};

extern "C" __global__ void __launch_bounds__(32 * WARPS, MIN_BLOCKS)
na_mma_bwd_dq(const __grid_constant__ Params p) {
    extern __shared__ __align__(128) unsigned char shared[];
    __shared__ Item item;
    __shared__ Owned owned[WARPS];
    const Geometry& g = p.geometry;
    const int lane = threadIdx.x % 32;
    const int head = blockIdx.x % p.heads, kv_head = head / p.queries_per_kv;
    if (!begin_item<false>(g, blockIdx.x / p.heads, item)) return;

    Sight sight;
    sight.begin<false>(g, item, owned + threadIdx.x / 32);
    Biases<true> biases(g, item.halo, sight);
    if (RPB) biases.table = p.rpb + (long long)head * biases_per_head(g);

    // Keys and values of the window, later the additional ones.
    Walk walk;
    walk.begin(item.halo.extent);
    const int window_turns = walk.turns();
    const int turns = window_turns + (p.extras + TOKENS - 1) / TOKENS;
    Source keys(rows_of(p.key, g, item, kv_head), item.halo.begin, p.head_dim);
    Source values(rows_of(p.value, g, item, kv_head), item.halo.begin, p.value_dim);
    const unsigned staged = shared_address(shared);
    stage(walk, keys, values, staged);

    // The queries and the gradients of their outputs; delta and log-sum-exp.
    Left query[QK_PARTS], d_out[V_PARTS];
    read_own(rows_of(p.query, g, item, head), sight, p.head_dim, p.zero, query);
    float minus_delta[2], minus_lse[2];
    {
        const Rows outs = rows_of(p.out, g, item, head), d_outs = rows_of(p.d_out, g, item, head);
        float delta[2] = {0, 0};
#pragma unroll
        for (int part = 0; part < V_PARTS; ++part) {
            Chunk d[2][PIECES];
#pragma unroll
            for (int side = 0; side < 2; ++side) {
                Chunk o[PIECES];
                const bool there = sight.there(side);
                read_part(own_row(d_outs, sight, side), part, p.value_dim, there, d[side]);
                read_part(own_row(outs, sight, side), part, p.value_dim, there, o);
#pragma unroll
                for (int n = 0; n < PIECES; ++n) {
                    float x[CHUNK], y[CHUNK];
                    widen(d[side][n], x);
                    widen(o[n], y);
#pragma unroll
                    for (int i = 0; i < CHUNK; ++i) delta[side] += x[i] * y[i];
                }
            }
            d_out[part].set(d[0], d[1], p.zero);
        }
#pragma unroll
        for (int side = 0; side < 2; ++side) {
            delta[side] = sum_of_quad(delta[side]);
            minus_lse[side] = 0;
            if (sight.there(side)) {
                int position[RANK];
                sight.find(side, position);
                const long long number = number_of(g, item, p.heads, head, position);
                if (p.d_lse) delta[side] -= p.d_lse[number];
                if (lane % 4 == 0) p.delta[number] = delta[side];
                minus_lse[side] = p.lse[number] * -(float)LOG2_E;
            }
            minus_delta[side] = -delta[side];
        }
    }
    const float scale = p.scale * (float)LOG2_E;
    float d_query[QK_PARTS][D / 8][4];
    clear(d_query);
    const unsigned rows = row_offset(0, lane);
    const Across across(0, lane, 8 * ROW);

#pragma unroll 1
    for (int n = 0; n < turns; ++n) {
        copies_done();
        __syncthreads();  // these have come, and the buffer of those before is free
        if (n == window_turns) sight.set_line(p.extras);
        const Turn turn(sight, walk.at);
        const int offset = RPB ? biases.offset(g, walk.at) : 0;
        if (n + 1 < turns) {
            if (n + 1 == window_turns) {
                const Box line = line_box(0, p.extras);
                walk.begin(line.extent);
                keys = Source(line_of(p.extra_key, item.batch, kv_head), line.begin, p.head_dim);
                values =
                    Source(line_of(p.extra_value, item.batch, kv_head), line.begin, p.value_dim);
            } else {
                walk.advance();
            }
            stage(walk, keys, values, staged + (n + 1) % 2 * STAGED);
        }
        const bool in_window = n < window_turns;
#pragma unroll 1
        for (int i = 0; i < TURNS / 2; ++i) {
            if (turn.skips(i)) continue;
            const unsigned from = staged + n % 2 * STAGED + 2 * i * 8 * ROW;
            float t[2][4], d[2][4];
#pragma unroll
            for (int h = 0; h < 2; ++h)
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    t[h][e] = 0;
                    d[h][e] = minus_delta[e / 2];
                }
            add_products(t, query, from + rows, p.zero);
            add_products(d, d_out, from + rows + QK_PARTS * PART_BYTES, p.zero);
            if (RPB || turn.masks(i)) {
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    const Mask mask(sight, turn, 2 * i + h);
                    const int there = RPB ? __shfl_sync(0xFFFFFFFFu, offset, 2 * i + h) : 0;
#pragma unroll
                    for (int e = 0; e < 4; ++e) {
                        const bool sees = mask.sees(e / 2, e % 2);
                        float x = fmaf(t[h][e], scale, minus_lse[e / 2]);
                        if (RPB) x += biases.at(there, e / 2, e % 2, sees && in_window);
                        d[h][e] = sees ? exp_2(x) * d[h][e] : 0;
                    }
                }
            } else {
#pragma unroll
                for (int h = 0; h < 2; ++h)
#pragma unroll
                    for (int e = 0; e < 4; ++e)
                        d[h][e] *= exp_2(fmaf(t[h][e], scale, minus_lse[e / 2]));
            }
            Weights<2> ds;
#pragma unroll
            for (int h = 0; h < 2; ++h)
#pragma unroll
                for (int side = 0; side < 2; ++side)
                    ds.set(h, side, d[h][2 * side], d[h][2 * side + 1]);
            add_weighted(d_query, ds, across + from);
        }
    }
    const float factor[2] = {p.scale, p.scale};
    write_own(rows_of(p.d_query, g, item, head), sight, p.head_dim, d_query, factor);
}
