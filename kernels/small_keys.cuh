// Small 2-D windows backward, keys at rest: d_key and d_value, with the fragments of na2d_small_fwd
// turned round: rows of a fragment are keys, a step is some of the queries that see them, which the
// inverse windows name.
//
// A block stages queries and output gradients of all queries that see its tile of keys, with their
// log-sum-exp and delta. With grouped heads it walks all query heads of its keys' head, one after
// the other, into the same registers. No atomics, the same bits every time.

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

// Where a warp is, worked out from the numbers of its block and of its thread alone.
struct Place {
    Role role;
    SmallItem item;
    bool exists, active;
    int first_head, head;
    int height, width, last;             // the group's, and the tile's last row of keys
    int top, rows, left;                 // staged rows and columns of queries
    int own;                             // first row of keys
    int c, column, near;                 // of keys; `near` is a token in place of those past the map
    int from, to;                        // query columns that see the warp's keys

    __device__ __forceinline__ Place(const SmallGeometry& g, unsigned thread, int block)
        : role(g, thread) {
        first_head = remainder(block, g.by_teams) * g.heads_here;
        head = first_head + role.head;
        exists = item.set(g, block);
        height = item.extent[0];
        width = item.extent[1];
        last = least(item.begin[0] + g.rows, height) - 1;
        top = inverse_window(item.begin[0], height, KH).begin;
        rows = inverse_window(last, height, KH).end - top;
        left = first_staged(g, inverse_window(item.begin[1], width, KW).begin, width);
        own = item.begin[0] + 2 * role.split;
        const int column0 = item.begin[1] + role.column;
        active = column0 < width;
        c = role.lane % 4;
        column = column0 + role.lane / 4;
        near = least(column, width - 1);
        from = inverse_window(least(column0, width - 1), width, KW).begin;
        from -= (from - left) % 2;
        to = inverse_window(least(column0 + 7, width - 1), width, KW).end;
    }
};

// Numbers from a staged row to the next: an even number, so that pairs are read, and two rows of 8
// columns lie in different banks.
__device__ __forceinline__ int number_pitch(const SmallGeometry& g) {
    const int even = g.pitch + g.pitch % 2, bank = even % 32;
    return even + (bank < 8 ? 8 - bank : bank > 24 ? 40 - bank : 0);
}

enum { FLIGHT = 2 };  // fragments of rows on their way at once: the loop waits for memory

// Subtracts the delta of all staged queries of a head from `known`, [row][even]; `d_outs` is where
// their staged gradients of the output are.
template <class Params>
__device__ __forceinline__ void subtract_delta(
    const Params& p, const SmallGeometry& g, const Place& at, int head, unsigned d_outs,
    float* known, int even) {
    const unsigned line = g.pitch * ROW;
    const unsigned right = g.dilation[1] * (unsigned)p.out.axis[1] * (unsigned)sizeof(scalar_t);
#pragma unroll 1
    for (int down = 2 * at.role.warp; down < at.rows; down += 2 * at.role.warps) {
        const Lines outs(p.out, g, at.item, head, at.top + down, at.left + at.role.lane / 4,
                         loaded(at.c));
#pragma unroll 1
        for (int begin = 0; begin < g.pitch; begin += 8 * FLIGHT) {
            const int first = begin + at.role.lane / 4;
            const auto real = [&](int n, int side) {
                const int x = first + 8 * n;
                return x < g.pitch && at.left + x < at.width && down + side < at.rows;
            };
            Chunk o[FLIGHT][2][PIECES];
#pragma unroll
            for (int n = 0; n < FLIGHT; ++n)
#pragma unroll
                for (int side = 0; side < 2; ++side)
                    read_row(outs.at(side, (begin + 8 * n) * right), real(n, side), o[n][side]);
#pragma unroll
            for (int n = 0; n < FLIGHT; ++n) {
                if (begin + 8 * n >= g.pitch) break;
                const unsigned staged =
                    d_outs + down * line + row_offset(begin + 8 * n, at.role.lane);
                Chunk d[2][PIECES];
#pragma unroll
                for (int side = 0; side < 2; ++side)
#pragma unroll
                    for (int i = 0; i < PIECES; ++i) {
                        d[side][i] = {};
                        if (real(n, side))
                            d[side][i] = read_chunk(
                                ((staged + side * line) ^ (i % 2 * 64)) + i / 2 * 128);
                    }
                Left d_out;
                d_out.set(d[0], d[1], g.zero);
                float delta[2];
                dots(scalar_t(), d_out, o[n], at.role.lane, delta);
                if (at.c < 2 && real(n, at.c))
                    known[(down + at.c) * even + first + 8 * n] -= at.c ? delta[1] : delta[0];
            }
        }
    }
}

// Asks the second-level cache for what `subtract_delta` will read of the first head.
template <class Params>
__device__ __forceinline__ void ask_for_outs(const Params& p, const SmallGeometry& g, const Place& at) {
#pragma unroll 1
    for (int down = at.role.warp; down < at.rows; down += at.role.warps) {
#pragma unroll 1
        for (int x = at.role.lane; x < least(g.pitch, at.width - at.left); x += 32)
            ask_for(at.item.at(p.out, g, at.first_head, at.top + down, at.left + x));
    }
}

// Of a staged row of queries: what their scores start from, and minus what is known of delta `tokens`
// numbers on; from `write` on, a lane every 32nd column.
template <bool KNOWS_DELTA, class Params>
__device__ __forceinline__ void stage_numbers(
    const Params& p, const SmallGeometry& g, const Place& at, long long number, float* write,
    int tokens, int even) {
    const unsigned right = 32 * 4 * g.dilation[1];
#pragma unroll 1
    for (int x = at.role.lane; x < even; x += 32 * FLIGHT) {
        float start[FLIGHT], delta[FLIGHT];
#pragma unroll
        for (int n = 0; n < FLIGHT; ++n) {
            const int column = x + 32 * n;
            const bool real = column < g.pitch && at.left + column < at.width;
            start[n] = p.scale.never;
            delta[n] = 0;
            if (!real) continue;
            // As in small_queries.cuh: lse is not subtracted from each score.
            start[n] = *number_at(p.lse, g, number + n * right, 0) * -p.scale.inverse;
            if constexpr (KNOWS_DELTA)
                delta[n] = -*number_at(p.delta, g, number + n * right, 0);
            else if (p.d_lse)
                delta[n] = *number_at(p.d_lse, g, number + n * right, 0);
        }
#pragma unroll
        for (int n = 0; n < FLIGHT; ++n)
            if (x + 32 * n < even) {
                write[32 * n] = start[n];
                write[tokens + 32 * n] = delta[n];
            }
        number += FLIGHT * right;
        write += FLIGHT * 32;
    }
}

// What block `block` does. With KNOWS_DELTA, p.delta holds what the query side has written; without,
// it is made anew from out and d_out of all staged queries.
template <bool KNOWS_DELTA, class Params>
__device__ __forceinline__ void key_side(
    const Params& p, const SmallGeometry& g, unsigned char* shared, unsigned block) {
    unsigned thread = threadIdx.x;
    const Place once(g, thread, block);
    if (!once.exists) return;
    // Sums of long rows leave no registers to remember it in.
    const auto here = [&] {
        if (!LONG) return once;
        anew(thread);
        anew(block);
        return Place(g, thread, block);
    };
    const int even = number_pitch(g);
    const int tokens = g.staged * even, queries = g.heads * g.queries_per_kv;
    const unsigned staged = shared_address(shared), line = g.pitch * ROW;
    // Columns are read from an even one on, so one past the last may be read and weigh nothing.
    float* past_staged = (float*)(shared + 2 * g.heads_here * tensor_bytes(g));
    for (int n = threadIdx.x; n < ROW / 4; n += blockDim.x) past_staged[n] = 0;
    float* tables = past_staged + ROW / 4;
    // [head][what scores start from, minus delta][row][even]: a lane reads pairs.
    // A row past the last table is read but never used.
    float* known = tables + g.heads_here * BIASES + BIAS_PITCH;
    if (threadIdx.x < BIAS_PITCH) known[(int)threadIdx.x - BIAS_PITCH] = 0;
    const auto seen_from = [&](const Place& at, int begin) {
        return Seen(g, at.left, begin, at.near, at.width, at.c,
                    shared_address(tables) + at.role.head * BIASES * 4);
    };
    const auto lines = [&](const View& v, const Place& at, int inside) {
        return Lines(v, g, at.item, at.head, at.own, at.near, inside);
    };
    const Lines keys = lines(p.key, once, loaded(once.c)), values = lines(p.value, once, loaded(once.c));
    const Lines d_keys = lines(p.d_key, once, stored(once.c));
    const Lines d_values = lines(p.d_value, once, stored(once.c));
    // For the first columns of queries: mostly there are no others.
    Seen seen = seen_from(once, once.from);

    // NOTE: the sums of a pair of rows run over all query heads of a group, so heads are staged anew
    // for every pair; the plan gives a warp one pair where heads are grouped, if it can.
    for (int below = 0; below < g.rows; below += 2 * g.splits) {
        Left key, value;
        float d_key[D / 8][4], d_value[D / 8][4];
#pragma unroll
        for (int j = 0; j < D / 8; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e) d_key[j][e] = d_value[j][e] = 0;

        for (int member = 0; member < g.queries_per_kv; ++member) {
            if (below == 0 || g.queries_per_kv > 1) {
                const Place at = here();
                __syncthreads();  // what was staged before has been read
                stage(g, at.item, at.role, staged, at.first_head, p.query, p.d_out,
                      g.queries_per_kv, member, 1, at.top, at.left, at.rows);
                // Of an odd number of columns one past the last row is read, and weighs nothing.
                if (g.pitch % 2 && at.rows < g.staged)
                    for (int n = threadIdx.x; n < 2 * g.heads_here * CHUNKS; n += blockDim.x)
                        clear_chunk(staged + n / CHUNKS * tensor_bytes(g) + at.rows * line +
                                    n % CHUNKS * 16);
                if constexpr (!KNOWS_DELTA) ask_for_outs(p, g, at);
                stage_biases(
                    g, tables, p.rpb, at.first_head, g.queries_per_kv, member, (float)LOG2_E);
            }
            if (member == 0) {  // while what is staged is on its way
                const Place at = here();
                if (at.active && at.own + below <= at.last) {
                    const Lines from_keys = LONG ? lines(p.key, at, loaded(at.c)) : keys;
                    const Lines from_values = LONG ? lines(p.value, at, loaded(at.c)) : values;
                    Chunk k[2][PIECES], v[2][PIECES];
#pragma unroll
                    for (int side = 0; side < 2; ++side) {
                        const bool there = side == 0 || at.own + below + 1 < at.height;
                        read_row(from_keys.at(below + side), there, k[side]);
                        read_row(from_values.at(below + side), there, v[side]);
                    }
                    key.set(k[0], k[1], g.zero);
                    value.set(v[0], v[1], g.zero);
                }
            }
            if (below == 0 || g.queries_per_kv > 1) {
                const Place at = here();
#pragma unroll 1
                for (int h = 0; h < g.heads_here; ++h)
#pragma unroll 1
                    for (int down = at.role.warp; down < at.rows; down += at.role.warps) {
                        const int query_head = (at.first_head + h) * g.queries_per_kv + member;
                        const long long number = at.item.number(
                            g, queries, query_head, at.top + down, at.left + at.role.lane);
                        float* write = known + 2 * h * tokens + down * even + at.role.lane;
                        stage_numbers<KNOWS_DELTA>(p, g, at, number, write, tokens, even);
                    }
                copies_done();
                __syncthreads();
                if constexpr (!KNOWS_DELTA) {
                    for (int h = 0; h < g.heads_here; ++h)
                        subtract_delta(
                            p, g, at, at.first_head + h, staged + (2 * h + 1) * tensor_bytes(g),
                            known + (2 * h + 1) * tokens, even);
                    __syncthreads();
                }
            }
#pragma unroll 1
            for (int walked = 0;; walked += COLUMNS) {  // mostly once
                const Place at = here();
                const int row = at.own + below, begin = at.from + walked;
                if (!at.active || row > at.last || begin >= at.to) break;
                // Queries from `first` on see the first row of keys, until `past`; from `second` on
                // the second row, until `end`.
                const bool two = row + 1 < at.height;
                const Interval upper = inverse_window(row, at.height, KH);
                const Interval lower = inverse_window(row + 1, at.height, KH);
                const int first = upper.begin, past = upper.end;
                int second = two ? lower.begin : past, end = two ? lower.end : past;
                asm volatile("" : "+r"(second), "+r"(end));  // made once, not in every step
                if (LONG || at.to - at.from > COLUMNS) seen = seen_from(at, begin);
                unsigned biases[OWN];
#pragma unroll
                for (int x = 0; x < OWN; ++x)
                    biases[x] = seen.biases[x] + (row - first + KH) * (BIAS_PITCH * 4);
                // Of the second row of keys: what the first one had a row of queries before.
                float lower_bias[OWN];
                if (!PAIRED)
#pragma unroll
                    for (int x = 0; x < OWN; ++x)
                        lower_bias[x] = read_float<BIAS_PITCH * 4>(biases[x]);
                const unsigned queries_at = staged + 2 * at.role.head * tensor_bytes(g);
                unsigned skip = (first - at.top) * line;
                unsigned scalars = shared_address(known) + at.role.head * 2 * tokens * 4 +
                                   ((first - at.top) * even + seen.first - at.left + at.c * 2) * 4;
                const unsigned rows_at = queries_at + row_offset(seen.first - at.left, at.role.lane);
                const Across across =
                    Across(seen.first - at.left, at.role.lane, block_bytes(g)) + queries_at;
#pragma unroll 1
                for (int i = first; i < end; i += EACH) {
                    const int blocks = step_blocks(g, i, end);
                    const unsigned next = blocks < STEP ? 0 : block_bytes(g);
                    float t[STEP][4], d[STEP][4];
                    float t0[STEP][4], d0[STEP][4];
#pragma unroll
                    for (int h = 0; h < STEP; ++h) {
                        const int rest = h < blocks ? h * (PAIRED ? even : 8) : 0;
                        const unsigned pair = scalars + rest * 4;
                        const int query = PAIRED ? i + h : i;
                        float start[2];
                        read_pair(pair, start[0], start[1]);
                        read_pair(pair + tokens * 4, d0[h][0], d0[h][1]);
#pragma unroll
                        for (int side = 0; side < 2; ++side) {
                            const bool sees = side ? query >= second : query < past;
#pragma unroll
                            for (int e = 0; e < 2; ++e) {
                                t0[h][2 * side + e] = sees ? start[e] : p.scale.never;
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
                        float upper_bias[2];
                        if (!PAIRED)
#pragma unroll
                            for (int e = 0; e < 2; ++e)
                                upper_bias[e] = read_float(biases[2 * h + e]);
#pragma unroll
                        for (int side = 0; side < 2; ++side) {
                            const int down = (side - (PAIRED ? h : 0)) * (BIAS_PITCH * 4);
                            float x[2], y[2];
#pragma unroll
                            for (int e = 0; e < 2; ++e) {
                                const float bias = PAIRED ? read_float(biases[e] + down)
                                                   : side ? lower_bias[2 * h + e] : upper_bias[e];
                                x[e] = exp_2(t[h][2 * side + e] * p.scale.base_two + bias);
                                y[e] = x[e] * d[h][2 * side + e];
                            }
                            weights.set(h, side, x[0], x[1]);
                            ds.set(h, side, y[0], y[1]);
                        }
                        if (!PAIRED)
#pragma unroll
                            for (int e = 0; e < 2; ++e) lower_bias[2 * h + e] = upper_bias[e];
                    }
                    accumulate(scalar_t(), d_value, weights, across + (tensor_bytes(g) + skip),
                               block_bytes(g), blocks);
                    accumulate(scalar_t(), d_key, ds, across + skip, block_bytes(g), blocks);
                    skip += EACH * line;
                    scalars += EACH * even * 4;
#pragma unroll
                    for (int x = 0; x < OWN; ++x) biases[x] -= EACH * BIAS_PITCH * 4;
                }
            }
        }
        const Place at = here();
        if (!at.active || at.own + below > at.last) continue;
        const Lines to_keys = LONG ? lines(p.d_key, at, stored(at.c)) : d_keys;
        const Lines to_values = LONG ? lines(p.d_value, at, stored(at.c)) : d_values;
#pragma unroll
        for (int side = 0; side < 2; ++side) {
            const bool write =
                at.column < at.width && (side == 0 || at.own + below + 1 < at.height);
            store_row(to_keys.at(below + side), d_key, side, p.scale.plain, at.c, write);
            store_row(to_values.at(below + side), d_value, side, 1, at.c, write);
        }
    }
}
