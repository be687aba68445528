// Forward on tensor cores, for any window: what na_fwd computes.
//
// A block takes a tile of queries of one head, a warp 16 of them. Keys and values that the tile sees
// pass through shared memory 64 at a time, then the additional ones. The softmax is online, per turn:
// weights are 2^(t - reference), where the reference moves to the largest score so far only when that
// has grown by more than SLACK, so sums are seldom scaled. Weights stay below 2^SLACK.
//
// A value that is NaN or infinite would reach queries that do not see it: zero times either is NaN.
// Where a result is not finite, the warp computes its queries again one by one.

#include "common.cuh"
#include "neighborhood.cuh"
#include "instructions.cuh"
#include "products.cuh"
#include "tile.cuh"
#include "mma.cuh"
#include "mma_rows.cuh"

struct Params {
    Geometry geometry;
    int heads;
    int queries_per_kv;  // query heads that share a key and value head
    int head_dim;
    int value_dim;
    int extras;          // additional keys and values
    int zero;            // 0, which the compiler must not know
    float scale;         // in base two: times log2(e)
    View query;
    View key;
    View value;
    View extra_key;
    View extra_value;
    View out;
    float* rpb;  // [heads, 2 * kernel_size - 1 per axis]
    float* lse;  // [batch, heads, *spatial]
};

enum {
    STAGED = (QK_PARTS + V_PARTS) * PART_BYTES,  // bytes, twice
    MIN_BLOCKS = ((QK_PARTS + V_PARTS) * ROW <= 256 ? 16 : 8) / WARPS  // 128 or 255 registers
};
#define SLACK 8.0f
#define LOWEST -3e38f  // finite: a reference that no score has set yet

// What a lane knows of its two queries; the reference is in base two. Of weights in halves `whole` has
// the sum after rounding: over it, a key that alone weighs anything gives its value exactly.
struct Sums {
    float out[V_PARTS][D / 8][4], reference[2], total[2], whole[4];

    __device__ __forceinline__ void clear() {
        ::clear(out);
#pragma unroll
        for (int e = 0; e < 4; ++e) whole[e] = 0;
#pragma unroll
        for (int side = 0; side < 2; ++side) {
            reference[side] = LOWEST;
            total[side] = 0;
        }
    }
};

// One query again, by the whole warp: a lane has every 32nd number of a row.
__device__ __forceinline__ void attend_alone(
    const Params& p, const Item& item, int head, const int (&query)[RANK], long long number) {
    enum { EACH = D / 32 * (QK_PARTS > V_PARTS ? QK_PARTS : V_PARTS) };
    const Geometry& g = p.geometry;
    const int lane = threadIdx.x % 32, kv_head = head / p.queries_per_kv;
    const auto read = [&](const Rows& rows, const int (&at)[RANK], int dim, float (&x)[EACH]) {
        const scalar_t* row = rows.at(at);
#pragma unroll
        for (int i = 0; i < EACH; ++i)
            x[i] = lane + 32 * i < dim ? widen(row[lane + 32 * i]) : 0.0f;
    };
    Box box;
    int keys = 1;
#pragma unroll
    for (int a = 0; a < RANK; ++a) {
        const Interval seen = sight<false>(g, a, item.length[a], query[a]);
        box.begin[a] = seen.begin;
        box.extent[a] = seen.end - seen.begin;
        keys *= box.extent[a];
    }
    float q[EACH], sum[EACH] = {}, peak = LOWEST, total = 0;
    read(rows_of(p.query, g, item, head), query, p.head_dim, q);
#pragma unroll 1
    for (int n = 0; n < keys + p.extras && total == total; ++n) {  // until all is NaN
        const bool extra = n >= keys;
        int at[RANK];
        position_in(box, n, at);
        if (extra)
#pragma unroll
            for (int a = 0; a < RANK; ++a) at[a] = a == LAST ? n - keys : 0;
        float x[EACH], dot = 0;
        read(extra ? line_of(p.extra_key, item.batch, kv_head)
                   : rows_of(p.key, g, item, kv_head), at, p.head_dim, x);
#pragma unroll
        for (int i = 0; i < EACH; ++i) dot += q[i] * x[i];
#pragma unroll
        for (int step = 16; step > 0; step /= 2) dot += __shfl_xor_sync(0xFFFFFFFFu, dot, step);
        float t = dot * p.scale;
        if (RPB && !extra)
            t += p.rpb[(long long)head * biases_per_head(g) + pair_bias(g, at, query)] *
                 (float)LOG2_E;
        const float high = fmaxf(peak, t), factor = exp_2(peak - high), weight = exp_2(t - high);
        peak = high;
        total = total * factor + weight;
        read(extra ? line_of(p.extra_value, item.batch, kv_head)
                   : rows_of(p.value, g, item, kv_head), at, p.value_dim, x);
#pragma unroll
        for (int i = 0; i < EACH; ++i) sum[i] = sum[i] * factor + weight * x[i];
    }
    scalar_t* out = rows_of(p.out, g, item, head).at(query);
#pragma unroll
    for (int i = 0; i < EACH; ++i)
        if (lane + 32 * i < p.value_dim) narrow(sum[i] / total, out[lane + 32 * i]);
    if (lane == 0) p.lse[number] = (peak + log_2(total)) * (float)LN_2;
}

// Scores of the own queries with the keys of a turn, staged from `at` on: minus infinity for what is
// not seen. `offset` is of a lane's block, see `Biases`. Returns the largest of each query in `high`.
__device__ __forceinline__ void score(
    const Params& p, const Sight& sight, const Turn& turn, Left (&query)[QK_PARTS],
    const Biases<true>& biases, int offset, bool in_window, unsigned at,
    float (&t)[TURN_BLOCKS / 2][2][4], float (&high)[2]) {
    high[0] = high[1] = minus_infinity();
#pragma unroll
    for (int i = 0; i < TURN_BLOCKS / 2; ++i) {
#pragma unroll
        for (int h = 0; h < 2; ++h)
#pragma unroll
            for (int e = 0; e < 4; ++e) t[i][h][e] = turn.skips(i) ? minus_infinity() : 0;
        if (turn.skips(i)) continue;
        add_products(t[i], query, at + 2 * i * 8 * ROW, p.zero);
        if (RPB || turn.masks(i))
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const Mask mask(sight, turn, 2 * i + h);
                const int there = RPB ? __shfl_sync(0xFFFFFFFFu, offset, 2 * i + h) : 0;
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    const bool sees = mask.sees(e / 2, e % 2);
                    float x = t[i][h][e];
                    if (RPB)
                        x = x * fabsf(p.scale) +
                            biases.at(there, e / 2, e % 2, sees && in_window);
                    t[i][h][e] = sees ? x : minus_infinity();
                }
            }
#pragma unroll
        for (int h = 0; h < 2; ++h)
#pragma unroll
            for (int e = 0; e < 4; ++e) high[e / 2] = fmaxf(high[e / 2], t[i][h][e]);
    }
}

// A new reference, where the largest scores have outgrown the old one.
__device__ __forceinline__ void refer(Sums& sums, const float (&high)[2], float scale) {
    bool grown = false;
    float most[2];
#pragma unroll
    for (int side = 0; side < 2; ++side) {
        most[side] = max_of_quad(high[side]) * scale;
        grown |= most[side] > sums.reference[side] + SLACK;
    }
    if (!__any_sync(0xFFFFFFFFu, grown)) return;
#pragma unroll
    for (int side = 0; side < 2; ++side) {
        const float next = fmaxf(sums.reference[side], most[side]);
        const float factor = exp_2(sums.reference[side] - next);
        sums.reference[side] = next;
        sums.total[side] *= factor;
#pragma unroll
        for (int e = 0; e < 2; ++e) sums.whole[2 * side + e] *= factor;
#pragma unroll
        for (int part = 0; part < V_PARTS; ++part)
#pragma unroll
            for (int j = 0; j < D / 8; ++j)
#pragma unroll
                for (int e = 0; e < 2; ++e) sums.out[part][j][2 * side + e] *= factor;
    }
}

// Weights of a turn's scores, and their values, staged from `from` on.
__device__ __forceinline__ void weigh(
    Sums& sums, const Turn& turn, const float (&t)[TURN_BLOCKS / 2][2][4], float scale,
    const Across& from) {
#pragma unroll
    for (int i = 0; i < TURN_BLOCKS / 2; ++i) {
        if (turn.skips(i)) continue;
        Weights<2> weights;
#pragma unroll
        for (int h = 0; h < 2; ++h)
#pragma unroll
            for (int side = 0; side < 2; ++side) {
                const float low = -sums.reference[side];
                const float a = exp_2(fmaf(t[i][h][2 * side], scale, low));
                const float b = exp_2(fmaf(t[i][h][2 * side + 1], scale, low));
                sums.total[side] += a + b;
                weights.set(h, side, a, b);
            }
        add_weighted(sums.out, weights, from + 2 * i * 8 * ROW);
        add_up(scalar_t(), sums.whole, weights, 2);
    }
}

// Adds up whole rows' totals; whether a NaN or infinity came to any query of the warp.
__device__ __forceinline__ bool spoilt(Sums& sums, const Sight& sight) {
    float sum = 0;
#pragma unroll
    for (int side = 0; side < 2; ++side) {
        sums.total[side] = sum_of_quad(sums.total[side]);
        if (!sight.there(side)) continue;
#pragma unroll
        for (int part = 0; part < V_PARTS; ++part)
#pragma unroll
            for (int j = 0; j < D / 8; ++j)
#pragma unroll
                for (int e = 0; e < 2; ++e) sum += sums.out[part][j][2 * side + e];
    }
    return __any_sync(0xFFFFFFFFu, !(fabsf(sum) < -minus_infinity()));
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, MIN_BLOCKS)
na_mma_fwd(const __grid_constant__ Params p) {
    extern __shared__ __align__(128) unsigned char shared[];
    __shared__ Item item;
    __shared__ Owned owned[WARPS];
    const Geometry& g = p.geometry;
    const int lane = threadIdx.x % 32;
    const int head = blockIdx.x % p.heads, kv_head = head / p.queries_per_kv;
    if (!begin_item<false>(g, blockIdx.x / p.heads, item)) return;

    Sight sight;
    sight.begin<false>(g, item, owned + threadIdx.x / 32);
    const Biases<true> biases(g, item.halo, sight, p.rpb, head);
    const unsigned staged = shared_address(shared);
    KeyTurns turns(p, item, kv_head);
    stage(turns.walk, turns.keys, turns.values, staged);

    // Scores are made positive multiples of products, so that the largest of both is the same.
    Left query[QK_PARTS];
    read_own(rows_of(p.query, g, item, head), sight, p.head_dim,
             p.zero ^ (p.scale >= 0 ? 0 : FLOATS ? 0x80000000u : 0x80008000u), query);
    // Minus infinity times it must not be NaN.
    const float scale = RPB ? 1.0f : fmaxf(fabsf(p.scale), 1e-37f);
    Sums sums;
    sums.clear();
    const Across across(0, lane, 8 * ROW);

#pragma unroll 1
    for (int now = 0; now < turns.all; ++now) {
        copies_done();
        __syncthreads();  // these have come, and the buffer of those before is free
        if (now == turns.window) sight.set_line(p.extras);
        const Turn turn(sight, turns.walk.at);
        const int offset = RPB ? biases.offset(g, turns.walk.at) : 0;
        turns.stage_next(p, item, kv_head, now, staged + (now + 1) % 2 * STAGED);
        if (turn.any == 0) continue;
        const unsigned from = staged + now % 2 * STAGED;
        float t[TURN_BLOCKS / 2][2][4], high[2];
        score(p, sight, turn, query, biases, offset, now < turns.window,
              from + row_offset(0, lane), t, high);
        refer(sums, high, scale);
        weigh(sums, turn, t, scale, across + (from + QK_PARTS * PART_BYTES));
    }

    if (!spoilt(sums, sight)) {
        float factor[2];
#pragma unroll
        for (int side = 0; side < 2; ++side) {
            factor[side] = inverse(FLOATS ? sums.total[side] : sums.whole[2 * side]);
            if (sight.there(side) && lane % 4 == 0)
                p.lse[sight.number(g, item, p.heads, head, side)] =
                    (sums.reference[side] + log_2(sums.total[side])) * (float)LN_2;
        }
        write_own(rows_of(p.out, g, item, head), sight, p.value_dim, sums.out, factor);
        return;
    }
#pragma unroll 1
    for (int token = 0; token < 16; ++token) {
        int position[RANK];
#pragma unroll
        for (int a = 0; a < RANK; ++a) position[a] = sight.owned->position[token][a];
        if (sight.full >> token & 1)
            attend_alone(p, item, head, position, number_of(g, item, p.heads, head, position));
    }
}
