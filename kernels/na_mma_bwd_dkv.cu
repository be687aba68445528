// Backward on tensor cores, keys at rest: what na_bwd_dkv computes. Delta must have been written.
//
// A block takes a tile of keys of one key head, a warp 16 of them. The queries that see the tile pass
// through shared memory 64 at a time with the gradients of their outputs, for every query head that
// reads this key head. A NaN or infinity may spread to the 16 keys of a warp that has its query
// before it.

#include "common.cuh"
#include "neighborhood.cuh"
#include "instructions.cuh"
#include "products.cuh"
#include "tile.cuh"
#include "mma.cuh"
#include "mma_rows.cuh"

struct Params {
    Geometry geometry;
    int heads;           // query heads
    int kv_heads;
    int queries_per_kv;  // query heads that share a key and value head
    int head_dim;
    int value_dim;
    int zero;            // 0, which the compiler must not know
    float scale;
    View query;
    View key;
    View value;
    View d_out;
    View d_key;
    View d_value;
    float* rpb;    // [heads, 2 * kernel_size - 1 per axis]
    float* lse;    // [batch, heads, *spatial]
    float* delta;  // like lse
};

// Twice: rows, and behind them log-sum-exp and delta of each, which lie in different banks.
enum {
    NUMBERS = (QK_PARTS + V_PARTS) * PART_BYTES,  // where these begin, in bytes
    DELTAS = TURN_TOKENS + 8,                     // and delta among them
    STAGED = NUMBERS + 2 * TURN_TOKENS * 4 + 128,  // bytes
    MIN_BLOCKS = ((QK_PARTS + V_PARTS) * ROW <= 128 ? 16 : 8) / WARPS  // 128 or 255 registers
};

// Log-sum-exp and delta of a head from the first token of a halo on.
struct Numbers {
    const char *lse, *delta;
    unsigned step[RANK];

    __device__ __forceinline__ Numbers(const Params& p, const Item& item, int head) {
        const Geometry& g = p.geometry;
        const long long first = number_of(g, item, p.heads, head, item.halo.begin);
        lse = (const char*)(p.lse + first);
        delta = (const char*)(p.delta + first);
        unsigned bytes = 4;  // an image has at most 2^30 tokens
#pragma unroll
        for (int a = LAST; a >= 0; --a) {
            step[a] = bytes * g.dilation[a];
            bytes *= g.length[a];
        }
    }
    // Those of the 8 blocks that `walk` is at.
    __device__ __forceinline__ void stage(const Walk& walk, unsigned to) const {
        const int lane = threadIdx.x % 32, row = lane % 8;
#pragma unroll
        for (int n = 0; n < TURN_BLOCKS; n += WARPS) {
            const int block = n + threadIdx.x / 32;
            int at[RANK];
            walk.find(block, at);
            unsigned bytes = row * step[LAST];
            bool real = at[LAST] + row < walk.extent[LAST];
#pragma unroll
            for (int a = 0; a < RANK; ++a) {
                bytes += at[a] * step[a];
                real &= at[a] < walk.extent[a];
            }
            if (!real) bytes = 0;
            if (lane < 16)
                copy_float(to + (lane / 8 * DELTAS + block * 8 + row) * 4,
                           (lane < 8 ? lse : delta) + bytes, real);
        }
    }
    __device__ __forceinline__ void next_head(const Geometry& g) {
        lse += tokens_per_image(g) * 4;
        delta += tokens_per_image(g) * 4;
    }
};

// Weights of the own keys and the pair of blocks `pair` of a turn of queries, of which the first row
// is at `queries` and the first of the lane's numbers at `numbers`, in `t`, their dS in `d`; zero for
// what is not seen.
__device__ __forceinline__ void differentiate(
    const Params& p, const Sight& sight, const Turn& turn, int pair, Left (&key)[QK_PARTS],
    Left (&value)[V_PARTS], const Biases<false>& biases, int offset, unsigned queries,
    unsigned numbers, float (&t)[2][4], float (&d)[2][4]) {
    const float scale = p.scale * (float)LOG2_E;
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            t[h][e] = t[h][2 + e] = 0;
            d[h][e] = d[h][2 + e] = -read_float(numbers + (DELTAS + h * 8 + e) * 4);
        }
    add_products(t, key, queries, p.zero);
    add_products(d, value, queries + QK_PARTS * PART_BYTES, p.zero);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        float minus_lse[2];
#pragma unroll
        for (int e = 0; e < 2; ++e)
            minus_lse[e] = read_float(numbers + (h * 8 + e) * 4) * -(float)LOG2_E;
        if (!RPB && !turn.masks(pair)) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                t[h][e] = exp_2(fmaf(t[h][e], scale, minus_lse[e % 2]));
                d[h][e] *= t[h][e];
            }
            continue;
        }
        const Mask mask(sight, turn, 2 * pair + h);
        const int there = RPB ? __shfl_sync(0xFFFFFFFFu, offset, 2 * pair + h) : 0;
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            const bool sees = mask.sees(e / 2, e % 2);
            float x = fmaf(t[h][e], scale, minus_lse[e % 2]);
            if (RPB) x += biases.at(there, e / 2, e % 2, sees);
            t[h][e] = sees ? exp_2(x) : 0;
            d[h][e] = sees ? t[h][e] * d[h][e] : 0;
        }
    }
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, MIN_BLOCKS)
na_mma_bwd_dkv(const __grid_constant__ Params p) {
    extern __shared__ __align__(128) unsigned char shared[];
    __shared__ Item item;
    __shared__ Owned owned[WARPS];
    const Geometry& g = p.geometry;
    const int lane = threadIdx.x % 32;
    const int kv_head = blockIdx.x % p.kv_heads;
    if (!begin_item<true>(g, blockIdx.x / p.kv_heads, item)) return;

    // Queries of one head after the other.
    int head = kv_head * p.queries_per_kv;
    Sight sight;
    sight.begin<true>(g, item, owned + threadIdx.x / 32);
    Biases<false> biases(g, item.halo, sight, p.rpb, head);
    Walk walk;
    walk.begin(item.halo.extent);
    const int head_turns = walk.turns(), turns = head_turns * p.queries_per_kv;
    Source queries(rows_of(p.query, g, item, head), item.halo.begin, p.head_dim);
    Source d_outs(rows_of(p.d_out, g, item, head), item.halo.begin, p.value_dim);
    Numbers all(p, item, head);
    const unsigned staged = shared_address(shared);
    stage(walk, queries, d_outs, staged);
    all.stage(walk, staged + NUMBERS);

    Left key[QK_PARTS], value[V_PARTS];
    read_own(rows_of(p.key, g, item, kv_head), sight, p.head_dim, p.zero, key);
    read_own(rows_of(p.value, g, item, kv_head), sight, p.value_dim, p.zero, value);
    float d_key[QK_PARTS][D / 8][4], d_value[V_PARTS][D / 8][4];
    clear(d_key);
    clear(d_value);
    const Across across(0, lane, 8 * ROW);

    int left = head_turns;  // turns before the next head's
#pragma unroll 1
    for (int now = 0; now < turns; ++now) {
        if (RPB) biases.of_head(g, p.rpb, head);
        copies_done();
        __syncthreads();  // these have come, and the buffer of those before is free
        const Turn turn(sight, walk.at);
        const int offset = RPB ? biases.offset(g, walk.at) : 0;
        if (now + 1 < turns) {
            const unsigned next = staged + (now + 1) % 2 * STAGED;
            if (--left == 0) {
                left = head_turns;
                ++head;
                walk.begin(item.halo.extent);
                queries.base += p.query.head * (long long)sizeof(scalar_t);
                d_outs.base += p.d_out.head * (long long)sizeof(scalar_t);
                all.next_head(g);
            } else {
                walk.advance();
            }
            stage(walk, queries, d_outs, next);
            all.stage(walk, next + NUMBERS);
        }
#pragma unroll 1
        for (int i = 0; i < TURN_BLOCKS / 2; ++i) {
            if (turn.skips(i)) continue;
            const unsigned buffer = staged + now % 2 * STAGED, from = buffer + 2 * i * 8 * ROW;
            float t[2][4], d[2][4];
            differentiate(p, sight, turn, i, key, value, biases, offset,
                          from + row_offset(0, lane),
                          buffer + NUMBERS + (2 * i * 8 + lane % 4 * 2) * 4, t, d);
            add_weighted(d_value, weights_of(t), across + (from + QK_PARTS * PART_BYTES));
            add_weighted(d_key, weights_of(d), across + from);
        }
    }
    const float scales[2] = {p.scale, p.scale}, ones[2] = {1, 1};
    write_own(rows_of(p.d_key, g, item, kv_head), sight, p.head_dim, d_key, scales);
    write_own(rows_of(p.d_value, g, item, kv_head), sight, p.value_dim, d_value, ones);
}
