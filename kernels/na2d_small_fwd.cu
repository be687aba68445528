// Neighborhood attention forward for small 2-D windows, on tensor cores.
//
// A block of threads stages keys and values that a tile of queries sees, once. A warp owns blocks
// of 8 query columns and walks down pairs of rows; the fragment of a pair meets one step of keys
// at a time. Two consecutive windows begin 0 or 1 rows apart, so a pair is either aligned (KH rows
// of keys) or staggered (KH + 1, the first and last of which only one query row sees): rows that are
// not seen are skipped, never masked. Columns are masked by the bias table, where
// a pair that does not see each other finds minus infinity.
//
// The softmax is exact and streamed: weights are 2^(t - peak), where `peak` is the largest score of
// the first step, and is raised, everything accumulated rescaled, only when a score exceeds it by
// 8 or more; so weights stay below 2^8, in range for halves.
//
// Layout: `lse` is [batch, heads, *spatial], natural log; rows of all tensors start at multiples of
// 16 bytes.

#include "common.cuh"
#include "neighborhood.cuh"
#include "products.cuh"
#include "small.cuh"

struct Params {
    SmallGeometry geometry;
    double scale;
    View query;
    View key;
    View value;
    View out;
    acc_t* rpb;  // [heads, 2 * kernel_size - 1 per axis]
    acc_t* lse;
};

struct Sums {  // of a pair of rows
    float out[D / 8][4], peak[2], total[2];
};

// Fragment `query` against the keys at `keys`, values at `values`; `biases` are this lane's columns
// of the table, at the row before the first query's first.
__device__ __forceinline__ void attend(
    const SmallGeometry& g, Left& query, unsigned keys, Across values,
    const unsigned (&biases)[OWN], float scale, bool staggered, Sums& sums) {
    const unsigned line = g.pitch * ROW;
    float (&peak)[2] = sums.peak, (&total)[2] = sums.total;
    peak[0] = peak[1] = -1e30f;  // finite: a table may hold minus infinity
    total[0] = total[1] = 0;
#pragma unroll
    for (int j = 0; j < D / 8; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) sums.out[j][e] = 0;
    float bias[OWN];  // of the second query's next row: the first query's row before it
#pragma unroll
    for (int x = 0; x < OWN; ++x) bias[x] = read_float(biases[x]);
#pragma unroll UNROLLED
    for (int i = 0; i < SEEN; i += EACH) {
        if (i == KH && !staggered) break;
        const int blocks = step_blocks(i, SEEN);
        float t[STEP][4], high[2] = {-1e30f, -1e30f};
        scores(t, query, keys, blocks < STEP ? 0 : block_bytes(g));
        query.renew(g.zero);
#pragma unroll
        for (int h = 0; h < STEP; ++h) {
            const int row = PAIRED ? i + h : i;
            if (row >= SEEN) continue;
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const int x = PAIRED ? e : 2 * h + e;
                if (row > 0 || !staggered) {
                    t[h][2 + e] = t[h][2 + e] * scale + bias[x];
                    high[1] = fmaxf(high[1], t[h][2 + e]);
                }
                if (row < KH) {
                    bias[x] = read_float(biases[x] + (row + 1) * (BIAS_PITCH * 4));
                    t[h][e] = t[h][e] * scale + bias[x];
                    high[0] = fmaxf(high[0], t[h][e]);
                }
            }
        }
        if (i == 0 ||
            __any_sync(0xFFFFFFFFu, high[0] > peak[0] + 8 || high[1] > peak[1] + 8)) {
            float factor[2];
#pragma unroll
            for (int side = 0; side < 2; ++side) {
                high[side] = fmaxf(max_of_quad(high[side]), peak[side]);
                factor[side] = exp_2(peak[side] - high[side]);
                peak[side] = high[side];
            }
            if (i > 0) {
                total[0] *= factor[0];
                total[1] *= factor[1];
#pragma unroll
                for (int j = 0; j < D / 8; ++j)
#pragma unroll
                    for (int e = 0; e < 4; ++e) sums.out[j][e] *= factor[e / 2];
            }
        }
        Weights<STEP> weights;
#pragma unroll
        for (int h = 0; h < STEP; ++h) {
            const int row = PAIRED ? i + h : i;
            weights.clear(h);
#pragma unroll
            for (int side = 0; side < 2; ++side)
                if (side == 0 ? row < KH : row < SEEN && (row > 0 || !staggered)) {
                    const float a = exp_2(t[h][2 * side] - peak[side]);
                    const float b = exp_2(t[h][2 * side + 1] - peak[side]);
                    total[side] += a + b;
                    weights.set(h, side, a, b);
                }
        }
        accumulate(scalar_t(), sums.out, weights, values, block_bytes(g), blocks);
        keys += EACH * line;
        values += EACH * line;
    }
    total[0] = sum_of_quad(total[0]);
    total[1] = sum_of_quad(total[1]);
}

// Whether a NaN or infinity came to any row of the fragment.
__device__ __forceinline__ bool spoilt(const Sums& sums) {
    float sum = 0;
#pragma unroll
    for (int j = 0; j < D / 8; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) sum += sums.out[j][e];
    return __any_sync(0xFFFFFFFFu, !(fabsf(sum) < -minus_infinity()));
}

// One row of the fragment key by key, in floats: a product of 16 rows would multiply what other rows
// see by zero, and a NaN or infinity times zero is NaN. The first key of the row's window is at
// `column` of the staged row at `keys`, its bias at `biases`. Lanes of a quad share the row.
__device__ __forceinline__ void attend_alone(
    const SmallGeometry& g, const Chunk (&query)[PIECES], unsigned keys, int column,
    unsigned biases, float scale, int c, bool write, scalar_t* out, float* lse) {
    float peak = -1e30f, total = 0, sum[PIECES][CHUNK] = {};
#pragma unroll 1
    for (int n = 0; n < KH * KW; ++n) {
        const int at = column + n % KW;
        const unsigned row = keys + n / KW * g.pitch * ROW + at * ROW;
        float dot = 0, x[CHUNK], y[CHUNK];
#pragma unroll
        for (int i = 0; i < PIECES; ++i) {
            widen(query[i], x);
            widen(read_chunk(row + place(4 * i + c, at) * 16), y);
#pragma unroll
            for (int e = 0; e < CHUNK; ++e) dot += x[e] * y[e];
        }
        const float bias = read_float(biases + (n / KW * BIAS_PITCH + n % KW) * 4);
        const float t = sum_of_quad(dot) * scale + bias;
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
        for (int e = 0; e < CHUNK; ++e) sum[i][e] /= total;
        pack(scalar_t(), sum[i], chunk);
        if (write) write_global(out + (4 * i + c) * CHUNK, chunk.word);
    }
    if (write && c == 0) *lse = (peak + log_2(total)) * (float)LN_2;
}

extern "C" __global__ void __launch_bounds__(FLOATS ? 192 : 256, D == 32 && !(FLOATS && BLOCKS == 3) ? 2 : 1)
na2d_small_fwd(const __grid_constant__ Params p) {
    extern __shared__ __align__(128) unsigned char shared[];
    const SmallGeometry& g = p.geometry;
    const Role role(g);
    const int teams = g.heads / g.heads_here;
    const int first_head = blockIdx.x % teams * g.heads_here;
    SmallItem item;
    if (!item.set(g, blockIdx.x / teams)) return;

    // Stage what the tile sees, and the biases.
    const int row0 = item.begin[0], height = item.extent[0], width = item.extent[1];
    const int last = least(row0 + g.rows, height) - 1;
    const int top = window(row0, height, KH).begin;
    const int left = first_staged(g, window(item.begin[1], width, KW).begin, width);
    const unsigned staged = shared_address(shared);
    float* tables = (float*)(shared + 2 * g.heads_here * tensor_bytes(g));
    stage(g, item, role, staged, first_head, p.key, p.value, 1, 0, g.queries_per_kv, top, left,
          window(last, height, KH).end - top);
    stage_biases(g, tables, p.rpb, first_head, 1, 0);

    // This warp's columns: the first key column of its steps, each lane's columns of the bias.
    const int column0 = item.begin[1] + role.column, head = first_head + role.head;
    const bool active = column0 < width;
    const int c = role.lane % 4, column = column0 + role.lane / 4;
    const int near = least(column, width - 1);  // a token in place of those past the map
    const int begin =
        least(window(active ? column0 : 0, width, KW).begin, left + g.pitch - COLUMNS);
    const Interval seen = window(near, width, KW);
    unsigned offsets[OWN];
#pragma unroll
    for (int x = 0; x < OWN; ++x) {
        const int key = begin + own_column(x, c);
        const bool sees = key >= seen.begin && key < seen.end;
        offsets[x] = 4 * (role.head * BIASES + (sees ? rpb_index(key, near, KW) : (int)NO_BIAS));
    }
    const Grid queries(p.query, g, item, head), outs(p.out, g, item, head);
    Chunk first[PIECES], second[PIECES];
    const auto load = [&](int row) {
        read_row(queries.at(row, near), c, row < height, first);
        read_row(queries.at(row + 1, near), c, row + 1 < height, second);
    };
    load(row0 + 2 * role.split);
    copies_done();
    __syncthreads();
    if (!active) return;

    const unsigned line = g.pitch * ROW, table = shared_address(tables);
    const unsigned keys = staged + 2 * role.head * tensor_bytes(g) +
                          row_offset(begin - left, role.lane);
    const Across values = Across(begin - left, role.lane, block_bytes(g)) +
                          (staged + (2 * role.head + 1) * tensor_bytes(g));
    const float scale = (float)p.scale * (float)LOG2_E;
    float* lse = p.lse + (item.batch * g.heads + head) * g.length[0] * g.length[1];

    constexpr bool AHEAD = !FLOATS;  // the next rows travel while these are worked on
#pragma unroll 1
    for (int row = row0 + 2 * role.split; row <= last; row += 2 * g.splits) {
        const int from = window(row, height, KH).begin;
        const bool two = row + 1 < height;
        if (!AHEAD && row >= row0 + 2 * g.splits) load(row);
        Left query;
        query.set(first, second, g.zero);
        if (AHEAD && row + 2 * g.splits <= last) load(row + 2 * g.splits);
        unsigned biases[OWN];
#pragma unroll
        for (int x = 0; x < OWN; ++x)
            biases[x] = table + offsets[x] + (from - row + KH - 1) * (BIAS_PITCH * 4);
        const unsigned skip = (from - top) * line;
        Sums sums;
        const bool staggered = !DENSE && two && window(row + 1, height, KH).begin != from;
        attend(g, query, keys + skip, values + skip, biases, scale, staggered, sums);
        if (spoilt(sums)) {
#pragma unroll 1
            for (int side = 0; side < (two ? 2 : 1); ++side) {
                const int top_row = window(row + side, height, KH).begin;
                Chunk alone[PIECES];
                read_row(queries.at(row + side, near), c, true, alone);
                attend_alone(
                    g, alone, staged + 2 * role.head * tensor_bytes(g) + (top_row - top) * line,
                    seen.begin - left,
                    table + 4 * (role.head * BIASES + rpb_index(seen.begin, near, KW) +
                                 (top_row - row - side + KH) * BIAS_PITCH),
                    scale, c, column < width, outs.at(row + side, near),
                    lse + item.token(g, row + side, near));
            }
            continue;
        }
#pragma unroll
        for (int side = 0; side < 2; ++side) {
            const bool write = column < width && (side == 0 || two);
            store_row(outs.at(row + side, near), sums.out, side, 1 / sums.total[side], c, write);
            if (write && c == 0)
                lse[item.token(g, row + side, column)] =
                    (sums.peak[side] + log_2(sums.total[side])) * (float)LN_2;
        }
    }
}
