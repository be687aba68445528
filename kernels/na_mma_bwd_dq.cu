// Backward on tensor cores, queries at rest: what na_bwd_dq computes. Delta is written for the key
// side, which runs later.
//
// A block takes a tile of queries of one head, a warp 16 of them; keys and values pass as in
// na_mma_fwd. A NaN or infinity may spread to the 16 queries of a warp that has its key before it.
//
// With RPB_GRAD a block takes several tiles, and each of its warps adds up dS per bias in a table of
// its own, a block of 8 columns at a time. Queries that follow each other on a line share a bias
// along the diagonals of their dS: lanes own diagonals, which are of different biases, so they add in
// a fixed order and without atomics. The block's tables are added in order at the end, the blocks' by
// reduce_partials.

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
    int items;
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
    float* partial;  // [blocks per head, heads, 2 * kernel_size - 1 per axis]
};

static_assert(RPB || !RPB_GRAD, "only a given bias has a gradient");

enum {
    STAGED = (QK_PARTS + V_PARTS) * PART_BYTES,  // bytes, twice
    MIN_BLOCKS = (QK_PARTS + V_PARTS) * ROW <= 256 ? 16 / WARPS : 8 / WARPS
};

// A diagonal of 16 queries by 8 keys: of pairs with one bias.
struct alignas(8) Diagonal {
    unsigned short from, pairs;  // number of its first pair; how many there are, 9 numbers apart
    int bias;                    // of the first pair, where the block is the halo's first
};

// A warp's sums of dS per bias, in shared memory.
struct BiasSums {
    enum { MOST = 128, PAIRS = 16 * 8 };  // diagonals: of 16 lines with one query each
    float* pairs;                         // [query][key] of a block
    Diagonal* diagonals;
    float* table;
    int count;  // diagonals in all

    // Where those of warp `warp` are: diagonals, pairs, table.
    static __device__ __forceinline__ unsigned char* room(unsigned char* all, int warp, int biases) {
        return all + warp * (MOST * 8 + PAIRS * 4 + (biases + 1) / 2 * 8);
    }
    static __device__ __forceinline__ float* table_of(unsigned char* all, int warp, int biases) {
        return (float*)(room(all, warp, biases) + MOST * 8) + PAIRS;
    }
    __device__ __forceinline__ void begin(unsigned char* all, int biases) {
        const int warp = threadIdx.x / 32;
        diagonals = (Diagonal*)room(all, warp, biases);
        pairs = (float*)(diagonals + MOST);
        table = table_of(all, warp, biases);
        for (int n = threadIdx.x % 32; n < biases; n += 32) table[n] = 0;
    }
    // The diagonals of the warp's queries, which lie on lines of `width` each.
    __device__ __forceinline__ void find(const Geometry& g, const Box& halo, const Sight& sight) {
        const int width = least(16, g.tile[LAST]), of_a_line = width + 7;
        count = 16 / width * of_a_line;
        __syncwarp();
        for (int n = threadIdx.x % 32; n < count; n += 32) {
            const int slope = n % of_a_line - (width - 1);  // key column - query column
            const int key = most(slope, 0), query = n / of_a_line * width + most(-slope, 0);
            int bias = 0;
#pragma unroll
            for (int a = 0; a < RANK; ++a) {
                const int k = g.kernel_size[a];
                bias = bias * (2 * k - 1) +
                       rpb_index(halo.begin[a], sight.owned->position[query][a], k);
            }
            const int pairs = least(8 - key, width - most(-slope, 0));
            diagonals[n] = {(unsigned short)(query * 8 + key), (unsigned short)pairs, bias + key};
        }
        __syncwarp();
    }
    // dS of a block whose bias is `offset` from the first one's; zero where pairs are not seen.
    __device__ __forceinline__ void add(const float (&ds)[4], int offset) const {
        const int lane = threadIdx.x % 32;
        __syncwarp();
#pragma unroll
        for (int side = 0; side < 2; ++side) {
            float* to = pairs + (side * 8 + lane / 4) * 8 + lane % 4 * 2;
            to[0] = ds[2 * side];
            to[1] = ds[2 * side + 1];
        }
        __syncwarp();
#pragma unroll 1
        for (int n = lane; n < count; n += 32) {
            const Diagonal diagonal = diagonals[n];
            float sum = 0;
#pragma unroll
            for (int i = 0; i < 8; ++i)
                if (i < diagonal.pairs) sum += pairs[diagonal.from + 9 * i];
            // Of pairs that do not see each other the number may be another's, or none at all.
            if (sum != 0) table[diagonal.bias + offset] += sum;
        }
    }
};

extern "C" __global__ void __launch_bounds__(32 * WARPS, MIN_BLOCKS)
na_mma_bwd_dq(const __grid_constant__ Params p) {
    extern __shared__ __align__(128) unsigned char shared[];
    __shared__ Item item;
    __shared__ Owned owned[WARPS];
    const Geometry& g = p.geometry;
    const int lane = threadIdx.x % 32;
    const int head = blockIdx.x % p.heads, kv_head = head / p.queries_per_kv;
    const float* bias = RPB ? p.rpb + (long long)head * biases_per_head(g) : nullptr;
    const unsigned staged = shared_address(shared);
    BiasSums sums;
    if (RPB_GRAD) sums.begin(shared + 2 * STAGED, biases_per_head(g));

#pragma unroll 1
    for (unsigned n = blockIdx.x / p.heads; n < (unsigned)p.items; n += gridDim.x / p.heads) {
        if (!begin_item<false>(g, n, item)) continue;

        Sight sight;
        sight.begin<false>(g, item, owned + threadIdx.x / 32);
        Biases<true> biases(g, item.halo, sight);
        biases.table = bias;
        if (RPB_GRAD) sums.find(g, item.halo, sight);

        // Keys and values of the window, later the additional ones.
        Walk walk;
        walk.begin(item.halo.extent);
        const int window_turns = walk.turns();
        const int turns = window_turns + (p.extras + TOKENS - 1) / TOKENS;
        Source keys(rows_of(p.key, g, item, kv_head), item.halo.begin, p.head_dim);
        Source values(rows_of(p.value, g, item, kv_head), item.halo.begin, p.value_dim);
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
        for (int now = 0; now < turns; ++now) {
            copies_done();
            __syncthreads();  // these have come, and the buffer of those before is free
            if (now == window_turns) sight.set_line(p.extras);
            const Turn turn(sight, walk.at);
            const int offset = RPB ? biases.offset(g, walk.at) : 0;
            if (now + 1 < turns) {
                if (now + 1 == window_turns) {
                    const Box line = line_box(0, p.extras);
                    walk.begin(line.extent);
                    keys = Source(line_of(p.extra_key, item.batch, kv_head), line.begin, p.head_dim);
                    values =
                        Source(line_of(p.extra_value, item.batch, kv_head), line.begin, p.value_dim);
                } else {
                    walk.advance();
                }
                stage(walk, keys, values, staged + (now + 1) % 2 * STAGED);
            }
            const bool in_window = now < window_turns;
#pragma unroll 1
            for (int i = 0; i < TURNS / 2; ++i) {
                if (turn.skips(i)) continue;
                const unsigned from = staged + now % 2 * STAGED + 2 * i * 8 * ROW;
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
                if (RPB_GRAD && in_window)
#pragma unroll
                    for (int h = 0; h < 2; ++h)
                        sums.add(d[h], __shfl_sync(0xFFFFFFFFu, offset, 2 * i + h));
            }
        }
        const float factor[2] = {p.scale, p.scale};
        write_own(rows_of(p.d_query, g, item, head), sight, p.head_dim, d_query, factor);
        if (!RPB_GRAD) return;
    }

    if (RPB_GRAD) {  // the warps, in order
        const int biases = biases_per_head(g);
        __syncthreads();
        for (int n = threadIdx.x; n < biases; n += 32 * WARPS) {
            float sum = 0;
            for (int w = 0; w < WARPS; ++w) sum += sums.table_of(shared + 2 * STAGED, w, biases)[n];
            p.partial[(long long)blockIdx.x * biases + n] = sum;
        }
    }
}
