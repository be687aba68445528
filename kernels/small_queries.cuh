// Small 2-D windows backward, queries at rest: delta, d_query and, with RPB_GRAD, each block's own
// sums of dS per bias, with the fragments and the walk of na2d_small_fwd.
//
// In the fragment of a pair of rows each number of a lane stands for one fixed bias as long as the
// distances from the queries to their windows do not change: so dS adds up in registers, over rows
// and tiles, and goes to the warp's own table when those distances change. Lanes that share a bias
// add in a fixed order, and a block adds its warps' tables in order: the same bits every time, no
// atomics. A block takes several tiles, at best always at the same place of a map;
// reduce_partials adds the blocks' tables in order.

// Steps of straight code: with sums of long rows in registers there are too few of these.
enum { STRAIGHT = RPB_GRAD && (D == 64 || (KH > 8 && KW > 8)) ? 1 : UNROLLED };

// What a warp holds of the bias gradient: for every row of the table that a pair of rows meets this
// lane's numbers, in registers if the loop over rows is straight code, else in shared memory.
//
// A window of at most 8 columns never holds two columns 8 apart, so of two such at most one weighs
// anything: they share a number, as those 16 apart do under wider windows.
struct Sums {
    enum {
        FOLDED = (KW + 7) / 8,  // blocks of 8 columns that have numbers of their own
        WIDE = 2 * FOLDED,      // numbers of a lane per row
        ROWS = KH + 1,
        HELD = STRAIGHT == 1 ? 0 : ROWS,
        // Bytes from query to query, from block to block, from row to row: numbers that are written
        // or read at once lie in different banks.
        QUERY = HELD && FOLDED > 1 ? 96 : 32,
        BLOCK = QUERY == 96 ? 32 : 288,
        LINE = HELD ? 8 * QUERY : FOLDED * BLOCK,
        BYTES = (HELD ? 1 : (int)ROWS) * LINE  // in registers, rows are added up one by one
    };
    float held[HELD + 1][WIDE];
    unsigned at;   // of this warp's numbers in shared memory: [row][block][query][key]
    int lane;
    int distance;  // from the first query row to its window; positive where there is nothing yet
    int column, width;  // the first query column, and the group's columns
    int shift;     // from the first query column to its first key column

    __device__ __forceinline__ unsigned place(int row, int x) const {
        return at + row * LINE + lane / 4 * QUERY + x / 2 * BLOCK + lane % 4 * 8;
    }
    __device__ __forceinline__ void keep(int row, const float (&sum)[WIDE]) const {
#pragma unroll
        for (int x = 0; x < WIDE; x += 2)
            asm volatile("st.shared.v2.f32 [%0], {%1, %2};"
                :: "r"(place(row, x)), "f"(sum[x]), "f"(sum[x + 1]));
    }
    __device__ __forceinline__ void add(int row, const float (&y)[WIDE]) {
        if (HELD) {
#pragma unroll
            for (int x = 0; x < WIDE; ++x) held[row * !!HELD][x] += y[x];
        } else {
            float sum[WIDE];
#pragma unroll
            for (int x = 0; x < WIDE; x += 2)
                asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];"
                    : "=f"(sum[x]), "=f"(sum[x + 1]) : "r"(place(row, x)));
#pragma unroll
            for (int x = 0; x < WIDE; ++x) sum[x] += y[x];
            keep(row, sum);
        }
    }
    __device__ __forceinline__ void clear() {
        const float zero[WIDE] = {};
        if (HELD) {
#pragma unroll
            for (int row = 0; row < HELD; ++row)
#pragma unroll
                for (int x = 0; x < WIDE; ++x) held[row][x] = 0;
        } else {
            for (int row = 0; row < ROWS; ++row) keep(row, zero);
        }
    }

    // The queries, as bits, that see their key of bias number `lane` among the warp's columns.
    __device__ __forceinline__ unsigned seeing() const {
        unsigned found = 0;
#pragma unroll
        for (int query = 0; query < 8; ++query) {
            const int begin = window(least(column + query, width - 1), width, KW).begin;
            const unsigned key = column + query + lane - (KW - 1) - begin;
            if (key < KW) found |= 1 << query;
        }
        return found;
    }
    // One row to the warp's table: of each bias the numbers of 8 queries, in order.
    __device__ __forceinline__ void flush(float* table, int row, unsigned found) const {
        const int key = lane - (KW - 1) - shift;  // that the first query's bias number `lane` is for
        __syncwarp();
        if (lane < 2 * KW - 1) {
            float* to = table + (distance + KH - 1 + row) * BIAS_PITCH + lane;
            float sum = *to;
#pragma unroll
            for (int query = 0; query < 8; ++query) {
                const unsigned x = key + query;
                sum += read_float_if(found & 1 << query, at + (HELD ? 0 : row * LINE) +
                                                             query * QUERY + x / 8 % FOLDED * BLOCK +
                                                             x % 8 * 4);
            }
            *to = sum;
        }
        __syncwarp();
    }
    // What follows is at other distances: rows that it does not meet go to the table, in registers
    // the last one after the other, as the distance to the window never grows within a tile.
    __device__ __forceinline__ void move(
        float* table, int new_distance, int new_column, int new_width, int new_shift) {
        if (distance <= 0) {
            const bool near = HELD && column == new_column && width == new_width &&
                              new_distance <= distance;
            const int rows = near ? distance - new_distance : (int)ROWS;
            const unsigned found = seeing();
#pragma unroll 1
            for (int n = 0; n < rows; ++n) {
                if (HELD) keep(0, held[HELD - !!HELD]);
                flush(table, HELD ? KH : n, found);
                if (HELD) {
                    --distance;
#pragma unroll
                    for (int row = HELD - 1; row >= 0; --row)
#pragma unroll
                        for (int x = 0; x < WIDE; ++x)
                            held[row][x] = row > 0 ? held[row > 0 ? row - 1 : 0][x] : 0;
                }
            }
            if (!HELD) clear();
        }
        distance = new_distance;
        column = new_column;
        width = new_width;
        shift = new_shift;
    }
};

// d_query of a pair of rows into `out`, its dS into `sums`.
__device__ __forceinline__ void attend(
    const SmallGeometry& g, Left& query, Left& d_out, unsigned keys, unsigned values,
    Across across, const unsigned (&biases)[OWN], float scale, const float (&start)[2],
    const float (&minus_delta)[2], bool staggered, float (&out)[D / 8][4], Sums& sums) {
    const unsigned line = g.pitch * ROW;
#pragma unroll
    for (int j = 0; j < D / 8; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) out[j][e] = 0;
    float bias[OWN];  // of the second query's next row: the first query's row before it
#pragma unroll
    for (int x = 0; x < OWN; ++x) bias[x] = read_float(biases[x]);
    // The first query's dS of the row before, which has the same bias.
    float before[Sums::WIDE] = {};
    float t0[STEP][4], d0[STEP][4];  // what products are added to
#pragma unroll
    for (int h = 0; h < STEP; ++h)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            t0[h][e] = start[e / 2];
            d0[h][e] = minus_delta[e / 2];
        }
#pragma unroll STRAIGHT
    for (int i = 0; i < SEEN; i += EACH) {
        if (i == KH && !staggered) break;
        const int blocks = step_blocks(g, i, SEEN);
        float t[STEP][4], d[STEP][4];
        scores(t, t0, query, keys, blocks < STEP ? 0 : block_bytes(g));
        scores(d, d0, d_out, values, blocks < STEP ? 0 : block_bytes(g));
        query.renew(g.zero);
        d_out.renew(g.zero);
        Weights<STEP> ds;
        float both[Sums::WIDE];  // dS that share biases
#pragma unroll
        for (int h = 0; h < STEP; ++h) {
            const int row = PAIRED ? i + h : i, x = PAIRED ? 0 : 2 * h;
            ds.clear(h);
            if (row >= SEEN) continue;
            if (PAIRED || h == 0)
#pragma unroll
                for (int z = 0; z < Sums::WIDE; ++z) {
                    both[z] = before[z];
                    before[z] = 0;
                }
            const int folded = x % Sums::WIDE;
            float next[2] = {0, 0};
            if (row < KH)
#pragma unroll
                for (int e = 0; e < 2; ++e)
                    next[e] = read_float(biases[x + e] + (row + 1) * (BIAS_PITCH * 4));
            if (row > 0 || !staggered) {
                float y[2];
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    y[e] = exp_2(t[h][2 + e] * scale + bias[x + e]) * d[h][2 + e];
                    both[folded + e] += y[e];
                }
                ds.set(h, 1, y[0], y[1]);
            }
            if (row < KH) {
                float y[2];
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    y[e] = exp_2(t[h][e] * scale + next[e]) * d[h][e];
                    before[folded + e] += y[e];
                }
                ds.set(h, 0, y[0], y[1]);
            }
#pragma unroll
            for (int e = 0; e < 2; ++e) bias[x + e] = next[e];
            if (RPB_GRAD && (PAIRED || h == STEP - 1)) sums.add(row, both);
        }
        accumulate(scalar_t(), out, ds, across, block_bytes(g), blocks);
        keys += EACH * line;
        values += EACH * line;
        across += EACH * line;
        __syncwarp();  // a mark that ptxas mixes no steps across: registers are few
    }
    if (RPB_GRAD && !staggered) sums.add(KH, before);
}

// What block `worker` of `workers` does; with TELLS_DELTA, delta is written for others to read.
template <bool TELLS_DELTA, class Params>
__device__ __forceinline__ void query_side(
    const Params& p, const SmallGeometry& g, unsigned char* shared, int worker, int workers) {
    unsigned thread = threadIdx.x;
    anew(thread);  // or the compiler keeps for this what the other side has made of it
    const Role role(g, thread);
    // Of those of a team.
    int first_head = remainder(worker, g.by_teams) * g.heads_here;
    first_head = __shfl_sync(0xFFFFFFFFu, first_head, 0);  // so that it is known to be the warp's
    const int head = first_head + role.head;
    workers = divide(workers, g.by_teams);
    const unsigned staged = shared_address(shared), line = g.pitch * ROW;
    float* tables = (float*)(shared + 2 * g.heads_here * tensor_bytes(g));
    float* own = tables + (g.heads_here + role.warp) * BIASES;
    stage_biases(g, tables, p.rpb, first_head, 1, 0, (float)LOG2_E);
    if (RPB_GRAD)
        for (int n = role.lane; n < BIASES; n += 32) own[n] = 0;
    const int c = role.lane % 4;
    Sums sums;
    sums.at = shared_address(tables + (g.heads_here + role.warps) * BIASES) +
              role.warp * Sums::BYTES;
    sums.lane = role.lane;
    if (RPB_GRAD) sums.clear();
    sums.distance = 1;
    sums.column = sums.width = sums.shift = 0;

    for (int n = worker; n < p.items; n += workers) {
        SmallItem item;
        if (!item.set(g, n)) continue;
        const int row0 = item.begin[0], height = item.extent[0], width = item.extent[1];
        const int last = least(row0 + g.rows, height) - 1;
        const int top = window(row0, height, KH).begin;
        const int left = first_staged(g, window(item.begin[1], width, KW).begin, width);
        __syncthreads();  // the keys and values before these have been read
        stage(g, item, role, staged, first_head, p.key, p.value, 1, 0, g.queries_per_kv, top, left,
              window(last, height, KH).end - top);

        // This warp's columns, as in the forward kernel.
        const int column0 = item.begin[1] + role.column;
        const bool active = column0 < width;
        const int column = column0 + role.lane / 4, near = least(column, width - 1);
        const int begin =
            least(window(active ? column0 : 0, width, KW).begin, left + g.pitch - COLUMNS);
        const Interval seen = window(near, width, KW);
        int bias_column[OWN];
#pragma unroll
        for (int x = 0; x < OWN; ++x) {
            const int key = begin + own_column(x, c);
            const bool sees = key >= seen.begin && key < seen.end;
            bias_column[x] = sees ? rpb_index(key, near, KW) : (int)NO_BIAS;
        }
        const unsigned table = shared_address(tables) + role.head * BIASES * 4;
        const unsigned offset = staged + 2 * role.head * tensor_bytes(g);
        const unsigned keys = offset + row_offset(begin - left, role.lane);
        const Across across = Across(begin - left, role.lane, block_bytes(g)) + offset;
        copies_done();
        __syncthreads();
        if (!active) continue;

        const int first = row0 + 2 * role.split;
        const auto lines = [&](const View& v, int inside) {
            return Lines(v, g, item, head, first, near, inside);
        };
        const Lines queries = lines(p.query, loaded(c)), outs = lines(p.out, loaded(c));
        const Lines d_outs = lines(p.d_out, loaded(c)), d_queries = lines(p.d_query, stored(c));
        const long long numbers = item.number(g, g.heads, head, first, near);
        const int shift = begin - column0;
#pragma unroll 1
        for (int row = first; row <= last; row += 2 * g.splits) {
            const int from = window(row, height, KH).begin, distance = from - row;
            const bool two = row + 1 < height;
            Chunk q[2][PIECES], d[2][PIECES], o[2][PIECES];
#pragma unroll
            for (int side = 0; side < 2; ++side) {
                const bool there = side == 0 || two;
                read_row(queries.at(row - first + side), there, q[side]);
                read_row(d_outs.at(row - first + side), there, d[side]);
                read_row(outs.at(row - first + side), there, o[side]);
            }
            Left query, d_out;
            query.set(q[0], q[1], g.zero);
            d_out.set(d[0], d[1], g.zero);
            float start[2], delta[2];
            dots(scalar_t(), d_out, o, role.lane, delta);
#pragma unroll
            for (int side = 0; side < 2; ++side) {
                const bool real = column < width && (side == 0 || two);
                const auto own_number = [&](float* all) {
                    return number_at(all, g, numbers, row - first + side);
                };
                if (p.d_lse && real) delta[side] -= *own_number(p.d_lse);
                if constexpr (TELLS_DELTA)
                    if (real && c == 0) *own_number(p.delta) = delta[side];
                // Scores start from minus lse over the scale, so that lse is not subtracted from
                // each; rows that are not there from what weighs nothing.
                start[side] = real ? *own_number(p.lse) * -p.scale.inverse : p.scale.never;
                delta[side] = -delta[side];
            }
            if (RPB_GRAD) {
                if (distance != sums.distance || column0 != sums.column || width != sums.width)
                    sums.move(own, distance, column0, width, shift);
            }
            unsigned biases[OWN];
#pragma unroll
            for (int x = 0; x < OWN; ++x)
                biases[x] = table + (bias_column[x] + (distance + KH - 1) * BIAS_PITCH) * 4;
            const unsigned skip = (from - top) * line;
            float out[D / 8][4];
            const bool staggered = !DENSE && two && window(row + 1, height, KH).begin != from;
            attend(g, query, d_out, keys + skip, keys + tensor_bytes(g) + skip, across + skip,
                   biases, p.scale.base_two, start, delta, staggered, out, sums);
#pragma unroll
            for (int side = 0; side < 2; ++side)
                store_row(d_queries.at(row - first + side), out, side, p.scale.plain, c,
                          column < width && (side == 0 || two));
        }
    }

    if (RPB_GRAD) {  // the warps of each head, in order
        sums.move(own, 1, 0, 0, 0);
        __syncthreads();
        // Padded rows are added up whole, which meets no bank twice.
        constexpr int ROWS = 2 * KH - 1, WIDTH = 2 * KW - 1;
        const int warps = g.blocks * g.splits;
        float* to = p.partial + ((long long)worker * g.heads + first_head) * ROWS * WIDTH;
        for (int n = threadIdx.x; n < g.heads_here * ROWS * BIAS_PITCH; n += blockDim.x) {
            const int here = n / (ROWS * BIAS_PITCH), at = n % (ROWS * BIAS_PITCH);
            float sum = 0;
            for (int w = 0; w < warps; ++w)
                sum += tables[(g.heads_here + here * warps + w) * BIASES + BIAS_PITCH + at];
            if (at % BIAS_PITCH < WIDTH)
                to[(here * ROWS + at / BIAS_PITCH) * WIDTH + at % BIAS_PITCH] = sum;
        }
    }
}
