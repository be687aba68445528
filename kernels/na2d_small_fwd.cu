// Neighborhood attention forward for small 2-D windows, on tensor cores.
//
// A block of threads stages keys and values that a tile of queries sees, once. A warp owns blocks
// of 8 query columns and walks down pairs of rows; the fragment of a pair meets one step of keys
// at a time. Two consecutive windows begin 0 or 1 rows apart, so a pair is either aligned (KH rows
// of keys) or staggered (KH + 1, the first and last of which only one query row sees): rows that are
// not seen are skipped, never masked. Columns are masked by the bias table, where a pair that does
// not see each other finds minus infinity. Queries come through shared memory too, a fragment ahead.
//
// The softmax is exact and streamed, without a running maximum: weights are 2^(t - reference), where
// the reference is the query's largest score in the middle row of its window, or nothing at all in
// bfloat16, which is as precise far from one as near it. Fragments whose weights leave the range of
// their type are done again at the end, with the largest score of all.
//
// Scores are in units of the scale: biases, divided by it, are what products are added to.
//
// Layout: `lse` is [batch, heads, *spatial], natural log; rows of all tensors start at multiples of
// 16 bytes.

#include "common.cuh"
#include "instructions.cuh"
#include "neighborhood.cuh"
#include "products.cuh"
#include "small.cuh"

struct Params {
    SmallGeometry geometry;
    Scale scale;
    View query;
    View key;
    View value;
    View out;
    acc_t* rpb;  // [heads, 2 * kernel_size - 1 per axis]
    acc_t* lse;
};

enum {
    MIDDLE = KH / 2 / EACH * EACH,            // a step that both queries of a pair see
    FULL = (DENSE ? KH : KH - 1) / EACH,      // whole steps that both see
    STRAIGHT = BLOCKS == 3 || (DENSE && CROWDED) ? 1
               : FULL <= 3 ? FULL : FULL % 2 == 0 ? 2 : FULL % 3 == 0 ? 3 : 1
};

// Of a pair of rows; `low` is minus the reference, in base two. Of weights in halves `whole` has the
// sum after rounding: over it, a key that alone weighs anything gives its value exactly.
struct Sums {
    float out[D / 8][4], low[2], total[2], whole[4];

    __device__ __forceinline__ float share(int side) const {
        return inverse(FLOATS ? total[side] : whole[2 * side]);
    }
};

// Of weights, which are MOST together, and LEAST where they are not referred to any score; else the
// first reference becomes 2^-SHIFT.
template <class T> struct Range {
    static constexpr bool REFERS = true;
    static constexpr float SHIFT = 0, MOST = 1e18f, LEAST = 0;
};
template <> struct Range<F16> {
    static constexpr bool REFERS = true;
    static constexpr float SHIFT = 8, MOST = 65504, LEAST = 0;
};
template <> struct Range<BF16> {
    static constexpr bool REFERS = false;
    static constexpr float SHIFT = 0, MOST = 1e18f, LEAST = 1e-18f;
};

// What a fragment is at: a step of keys, values and biases, and the bias of the second query's next
// row, which is the first query's row before it.
struct Place {
    unsigned keys, biases[OWN];
    Across values;
    float bias[OWN];

    __device__ __forceinline__ void advance(unsigned line) {
        keys += EACH * line;
        values += EACH * line;
#pragma unroll
        for (int x = 0; x < OWN; ++x) biases[x] += EACH * (BIAS_PITCH * 4);
    }
    __device__ __forceinline__ void read() {
#pragma unroll
        for (int x = 0; x < OWN; ++x) bias[x] = read_float(biases[x]);
    }
    // Of the first query in block `h` of the step.
    __device__ __forceinline__ void read(int x, int h) {
        constexpr int LINE = BIAS_PITCH * 4;
        bias[x] = PAIRED && h == 1 ? read_float<2 * LINE>(biases[x]) : read_float<LINE>(biases[x]);
    }
};

// Scores of the first `blocks` blocks of a step; `first`: the first query sees them.
__device__ __forceinline__ void step_scores(
    const SmallGeometry& g, Left& query, Place& at, bool first, int blocks, float (&t)[STEP][4]) {
#pragma unroll
    for (int h = 0; h < STEP; ++h)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const int x = PAIRED ? e : 2 * h + e;
            t[h][2 + e] = at.bias[x];
            if (first && h < blocks) at.read(x, h);
            t[h][e] = at.bias[x];
        }
    add_scores(t, query, at.keys, block_bytes(g), blocks);
    query.renew(g.zero);
}

// The largest scores of the pair in rows `begin` to `end` into `low`.
__device__ __forceinline__ void refer(
    const SmallGeometry& g, Left& query, Place at, float scale, bool staggered, int begin, int end,
    float (&low)[2]) {
    float high[2] = {-1e30f, -1e30f};  // finite: a table may hold minus infinity
    at.keys += begin * pitch(g) * ROW;
#pragma unroll
    for (int x = 0; x < OWN; ++x) at.biases[x] += begin * (BIAS_PITCH * 4);
    at.read();
#pragma unroll 1
    for (int i = begin; i < end; i += EACH) {
        const int blocks = step_blocks(i, KH);
        float t[STEP][4];
        step_scores(g, query, at, i < KH, blocks, t);
#pragma unroll
        for (int side = 0; side < 2; ++side)
#pragma unroll
            for (int h = 0; h < STEP; ++h)
                if (h < blocks && (side == 0 ? i < KH : i > 0 || !staggered))
                    high[side] = fmaxf(high[side], fmaxf(t[h][2 * side], t[h][2 * side + 1]));
        at.advance(pitch(g) * ROW);
    }
#pragma unroll
    for (int side = 0; side < 2; ++side)
        low[side] = -max_of_quad(high[side]) * scale - (begin > 0 ? Range<scalar_t>::SHIFT : 0);
}

// One step; `first` and `second`: which queries of the pair see it.
__device__ __forceinline__ void step(
    const SmallGeometry& g, Left& query, Place& at, float scale, bool first, bool second,
    int blocks, Sums& sums) {
    float t[STEP][4];
    step_scores(g, query, at, first, blocks, t);
    Weights<STEP> weights;
#pragma unroll
    for (int h = 0; h < STEP; ++h) {
        weights.clear(h);
#pragma unroll
        for (int side = 0; side < 2; ++side)
            if (h < blocks && (side == 0 ? first : second)) {
                const float a = exp_2(fmaf(t[h][2 * side], scale, sums.low[side]));
                const float b = exp_2(fmaf(t[h][2 * side + 1], scale, sums.low[side]));
                sums.total[side] += a + b;
                weights.set(h, side, a, b);
            }
    }
    accumulate(scalar_t(), sums.out, weights, at.values, block_bytes(g), blocks);
    add_up(scalar_t(), sums.whole, weights, blocks);
    at.advance(pitch(g) * ROW);
}

// Fragment `query` against the keys and values from `at` on; `sums.low` is given.
__device__ __forceinline__ void attend(
    const SmallGeometry& g, Left& query, Place at, float scale, bool staggered, Sums& sums) {
    sums.total[0] = sums.total[1] = 0;
#pragma unroll
    for (int e = 0; e < 4; ++e) sums.whole[e] = 0;
#pragma unroll
    for (int j = 0; j < D / 8; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) sums.out[j][e] = 0;
    at.read();
    if (FLOATS) {  // one step in a loop: it is long, and the code must fit its cache
#pragma unroll 1
        for (int i = 0; i < KH + staggered; i += EACH)
            step(g, query, at, scale, i < KH, i > 0 || !staggered, step_blocks(i, KH), sums);
    } else {
        if (!DENSE) step(g, query, at, scale, true, !staggered, STEP, sums);
#pragma unroll STRAIGHT
        for (int n = 0; n < FULL; ++n) step(g, query, at, scale, true, true, STEP, sums);
        if (PAIRED && KH % 2 == 1) step(g, query, at, scale, true, true, 1, sums);
        if (staggered) step(g, query, at, scale, false, true, STEP, sums);
    }
}

// Adds up whole rows' totals; whether weights left their range, or a NaN or infinity came to any row
// of the fragment.
__device__ __forceinline__ bool spoilt(Sums& sums, float least_total) {
    float sum = 0;
#pragma unroll
    for (int side = 0; side < 2; ++side) sums.total[side] = sum_of_quad(sums.total[side]);
#pragma unroll
    for (int j = 0; j < D / 8; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) sum += sums.out[j][e];
    return __any_sync(0xFFFFFFFFu, !(fabsf(sum) < -minus_infinity() &&
                                     sums.total[0] + sums.total[1] <= Range<scalar_t>::MOST &&
                                     sums.total[0] >= least_total && sums.total[1] >= least_total));
}

// One row of the fragment key by key, in floats: a product of 16 rows would multiply what other rows
// see by zero, and a NaN or infinity times zero is NaN. The first key of the row's window is at
// `column` of the staged row at `keys`, its bias at `biases`. Lanes of a quad share the row.
__device__ __forceinline__ void attend_alone(
    const SmallGeometry& g, const Chunk (&query)[PIECES], unsigned keys, int column,
    unsigned biases, float scale, bool negative, int c, bool write, scalar_t* out, float* lse) {
    float peak = -1e30f, total = 0, sum[PIECES][CHUNK] = {};
#pragma unroll 1
    for (int n = 0; n < KH * KW; ++n) {
        const int at = column + n % KW;
        const unsigned row = keys + n / KW * pitch(g) * ROW + at * ROW;
        float dot = 0, x[CHUNK], y[CHUNK];
#pragma unroll
        for (int i = 0; i < PIECES; ++i) {
            widen(query[i], x);
            widen(read_chunk(row + place(4 * i + c, at) * 16), y);
#pragma unroll
            for (int e = 0; e < CHUNK; ++e) dot += x[e] * y[e];
        }
        const float bias = read_float(biases + (n / KW * BIAS_PITCH + n % KW) * 4);
        const float t = (sum_of_quad(negative ? -dot : dot) + bias) * scale;
        const float high = fmaxf(peak, t), factor = exp_2(peak - high), weight = exp_2(t - high);
        peak = high;
        total = total * factor + weight;
#pragma unroll
        for (int i = 0; i < PIECES; ++i) {
            widen(read_chunk(row + tensor_bytes(g) + place(4 * i + c, at) * 16), y);
#pragma unroll
            for (int e = 0; e < CHUNK; ++e) sum[i][e] = sum[i][e] * factor + weight * y[e];
        }
    }
#pragma unroll
    for (int i = 0; i < PIECES; ++i) {
        Chunk chunk;
#pragma unroll
        for (int e = 0; e < CHUNK; ++e) sum[i][e] *= inverse(total);
        pack(scalar_t(), sum[i], chunk);
        if (write) write_global(out + (4 * i + c) * CHUNK, chunk.word);
    }
    if (write && c == 0) *lse = (peak + log_2(total)) * (float)LN_2;
}

// Bytes of a warp's pair of query rows, and where the first warp's are in shared memory.
enum { AHEAD = 2 * PIECES * 512 };
__device__ __forceinline__ unsigned queries_at(const SmallGeometry& g) {
    return g.heads_here * (2 * tensor_bytes(g) + BIASES * 4);
}

// The pair of rows that has come, as the left factor.
__device__ __forceinline__ void take(unsigned ahead, unsigned flip, Left& query) {
    Chunk rows[2][PIECES];
    copies_done();
#pragma unroll
    for (int side = 0; side < 2; ++side)
#pragma unroll
        for (int n = 0; n < PIECES; ++n)
            rows[side][n] = read_chunk(ahead + (side * PIECES + n) * 512);
    query.set(rows[0], rows[1], flip);
}

extern "C" __global__ void
__launch_bounds__(FLOATS ? 192 : 256, CROWDED ? 3 : D == 32 && !(FLOATS && BLOCKS == 3) ? 2 : 1)
na2d_small_fwd(const __grid_constant__ Params p) {
    extern __shared__ __align__(128) unsigned char shared[];
    const SmallGeometry& g = p.geometry;
    const Role role(g);
    int rest = block_from_the_end();
    const int first_head = remainder(rest, g.by_teams) * g.heads_here;
    SmallItem item;
    if (!item.set(g, rest)) return;

    // Stage what the tile sees, and the biases.
    const int row0 = item.begin[0], height = item.extent[0], width = item.extent[1];
    const int last = least(row0 + g.rows, height) - 1;
    const int top = window(row0, height, KH).begin;
    const int left = first_staged(g, window(item.begin[1], width, KW).begin, width);
    const unsigned staged = shared_address(shared);
    float* tables = (float*)(shared + 2 * g.heads_here * tensor_bytes(g));
    stage(g, item, role, staged, first_head, p.key, p.value, 1, 0, g.queries_per_kv, top, left,
          window(last, height, KH).end - top);
    stage_biases(g, tables, p.rpb, first_head, 1, 0, fabsf(p.scale.inverse));

    // This warp's columns: the first key column of its steps, each lane's columns of the bias.
    const int column0 = item.begin[1] + role.column, head = first_head + role.head;
    const bool active = column0 < width;
    const int c = role.lane % 4, column = column0 + role.lane / 4;
    const int near = least(column, width - 1);  // a token in place of those past the map
    const int begin =
        least(window(active ? column0 : 0, width, KW).begin, left + pitch(g) - COLUMNS);
    const Interval seen = window(near, width, KW);
    const unsigned table = shared_address(tables) + 4 * role.head * BIASES;
    unsigned offsets[OWN];
#pragma unroll
    for (int x = 0; x < OWN; ++x) {
        const int key = begin + own_column(x, c);
        const bool sees = key >= seen.begin && key < seen.end;
        offsets[x] = table + 4 * (sees ? rpb_index(key, near, KW) : (int)NO_BIAS);
    }
    const int row1 = row0 + 2 * role.split;
    unsigned stride = 2 * g.splits;
    const Lines queries(p.query, g, item, head, row1, near, loaded(c));
    const Lines outs(p.out, g, item, head, row1, near, stored(c));
    const long long number = item.number(g, g.heads, head, row1, near);
    // Pairs of query rows come ahead of their turn; a lane copies the chunks that it will read.
    const unsigned ahead = staged + queries_at(g) + threadIdx.x / 32 * AHEAD + role.lane * 16;
    const auto fetch = [&](int row) {
#pragma unroll
        for (int side = 0; side < 2; ++side)
#pragma unroll
            for (int n = 0; n < PIECES; ++n)
                copy_chunk(ahead + (side * PIECES + n) * 512,
                           queries.at(row + side - row1) + 4 * n * CHUNK, true,
                           row + side <= last);
    };
    fetch(row1);
    copies_done();
    __syncthreads();
    if (!active) return;

    const unsigned line = pitch(g) * ROW;
    const unsigned keys = staged + 2 * role.head * tensor_bytes(g) +
                          row_offset(begin - left, role.lane);
    const Across values = Across(begin - left, role.lane, block_bytes(g)) +
                          (staged + (2 * role.head + 1) * tensor_bytes(g));
    const float scale = fabsf(p.scale.base_two);
    const unsigned sign = p.scale.plain >= 0 ? 0 : FLOATS ? 0x80000000u : 0x80008000u;

    // What both passes make of the pair of rows at `row`.
    struct Pair {
        int from;  // the first row of the first one's window
        bool two, staggered;
    };
    const auto pair_at = [&](int row) -> Pair {
        const int from = window(row, height, KH).begin;
        const bool two = row + 1 < height;
        return {from, two, !DENSE && two && window(row + 1, height, KH).begin != from};
    };
    const auto place_at = [&](int row, int from) {
        Place at = {keys + (from - top) * line, {}, values + (from - top) * line};
#pragma unroll
        for (int x = 0; x < OWN; ++x)
            at.biases[x] = offsets[x] + (from - row + KH - 1) * (BIAS_PITCH * 4);
        return at;
    };
    const auto write = [&](int row, bool two, Sums& sums) {
#pragma unroll
        for (int side = 0; side < 2; ++side) {
            const bool there = column < width && (side == 0 || two);
            const float sum = (log_2(sums.total[side]) - sums.low[side]) * (float)LN_2;
            store_row(outs.at(row + side - row1), sums.out, side, sums.share(side), c, there);
            if (there && c == 0) *number_at(p.lse, g, number, row + side - row1) = sum;
        }
    };

    unsigned spoilt_pairs = 0;  // a bit for each pair of this warp
#pragma unroll 1
    for (int row = row1, bit = 1; row <= last; row += stride, bit *= 2) {
        anew(stride);
        const Pair pair = pair_at(row);
        Left query;
        take(ahead, g.zero ^ sign, query);
        if (row + (int)stride <= last) fetch(row + stride);
        Sums sums;
        sums.low[0] = sums.low[1] = 0;
        Place at = place_at(row, pair.from);
        // Of one row there is no middle that both see.
        if (Range<scalar_t>::REFERS)
            refer(g, query, at, scale, pair.staggered, KH == 1 ? 0 : MIDDLE,
                  KH == 1 ? KH + pair.staggered : MIDDLE + 1, sums.low);
        attend(g, query, at, scale, pair.staggered, sums);
        if (spoilt(sums, Range<scalar_t>::LEAST)) spoilt_pairs |= bit;
        write(row, pair.two, sums);
    }

    // Once more with the largest score as the reference, and what that does not help row by row.
#pragma unroll 1
    for (; spoilt_pairs != 0; spoilt_pairs &= spoilt_pairs - 1) {
        const int row = row1 + (__ffs(spoilt_pairs) - 1) * stride;
        const Pair pair = pair_at(row);
        Chunk rows[2][PIECES];
        read_row(queries.at(row - row1), true, rows[0]);
        read_row(queries.at(row + 1 - row1), pair.two, rows[1]);
        Left query;
        query.set(rows[0], rows[1], g.zero ^ sign);
        Sums sums;
        const Place at = place_at(row, pair.from);
        refer(g, query, at, scale, pair.staggered, 0, KH + pair.staggered, sums.low);
        attend(g, query, at, scale, pair.staggered, sums);
        if (!spoilt(sums, 0)) {
            write(row, pair.two, sums);
            continue;
        }
#pragma unroll 1
        for (int side = 0; side < (pair.two ? 2 : 1); ++side) {
            const int top_row = window(row + side, height, KH).begin;
            Chunk one[PIECES];
            read_row(queries.at(row + side - row1), true, one);
            attend_alone(
                g, one, staged + 2 * role.head * tensor_bytes(g) + (top_row - top) * line,
                seen.begin - left,
                table + 4 * (rpb_index(seen.begin, near, KW) +
                             (top_row - row - side + KH) * BIAS_PITCH),
                scale, sign != 0, c, column < width, outs.at(row + side - row1) - stored(c),
                number_at(p.lse, g, number, row + side - row1));
        }
    }
}
