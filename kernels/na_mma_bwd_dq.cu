// Backward on tensor cores, queries at rest: what na_bwd_dq computes. Delta is written for the key
// side, which runs later.
//
// A block takes a tile of queries of one head, a warp 16 of them; keys and values pass as in
// na_mma_fwd. A NaN or infinity may spread to the 16 queries of a warp that has its key before it.
//
// With RPB_GRAD a block takes several tiles, and each of its warps adds up dS per bias in a table of
// its own, a block of 8 columns at a time. Queries that follow each other on a line share a bias
// along the diagonals of their dS: lanes own diagonals, which are of different biases, so they add in
// a fixed order and without atomics. Tables are in shared memory, where a block adds up those of its
// warps in order at the end, or FAR, those of all warps in global memory; reduce_partials adds these.

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
    float* partial;  // [blocks per head (FAR: their warps), heads, 2 * kernel_size - 1 per axis]
};

static_assert(RPB || !RPB_GRAD, "only a given bias has a gradient");

enum {
    STAGED = (QK_PARTS + V_PARTS) * PART_BYTES,  // bytes, twice
    // For 128 or 255 registers.
    MIN_BLOCKS = ((QK_PARTS + V_PARTS) * ROW <= 256 && !(FLOATS && RPB_GRAD) ? 16 : 8) / WARPS
};

// A diagonal of 16 queries by 8 keys: of pairs with one bias.
struct alignas(8) Diagonal {
    unsigned short from, pairs;  // number of its first pair; how many there are, 9 numbers apart
    int bias;                    // of the first pair, where the block is the halo's first
};

// A warp's sums of dS per bias.
struct BiasSums {
    enum { MOST = 128, PAIRS = 16 * 8 };  // diagonals: of 16 lines with one query each
    float* pairs;                         // [query][key] of a block
    Diagonal* diagonals;
    float* table;
    int count;  // diagonals in all

    // Diagonals, pairs and table of warp `warp`, all in shared memory if the tables are.
    static __device__ __forceinline__ Diagonal* diagonals_of(
        unsigned char* all, int warp, int biases) {
        const int numbers = FAR ? 0 : (biases + 1) / 2 * 2;
        return (Diagonal*)(all + warp * (MOST * 8 + PAIRS * 4 + numbers * 4));
    }
    static __device__ __forceinline__ float* table_of(
        const Params& p, unsigned char* all, int warp, int biases) {
        if (!FAR) return (float*)(diagonals_of(all, warp, biases) + MOST) + PAIRS;
        const long long slice = blockIdx.x / p.heads * WARPS + warp;
        return p.partial + (slice * p.heads + blockIdx.x % p.heads) * biases;
    }
    __device__ __forceinline__ void begin(const Params& p, unsigned char* all) {
        const int warp = threadIdx.x / 32, biases = biases_per_head(p.geometry);
        diagonals = diagonals_of(all, warp, biases);
        pairs = (float*)(diagonals + MOST);
        table = table_of(p, all, warp, biases);
        for (int n = threadIdx.x % 32; n < biases; n += 32) table[n] = 0;
    }
    // Of all warps, in order, to the block's own table.
    static __device__ __forceinline__ void finish(const Params& p, unsigned char* all) {
        const int biases = biases_per_head(p.geometry);
        __syncthreads();
        for (int n = threadIdx.x; n < biases; n += 32 * WARPS) {
            float sum = 0;
            for (int w = 0; w < WARPS; ++w) sum += table_of(p, all, w, biases)[n];
            p.partial[(long long)blockIdx.x * biases + n] = sum;
        }
    }
    // The diagonals of the warp's queries, which lie on lines of `width` each.
    __device__ __forceinline__ void find(const Geometry& g, const Box& halo, const Sight& sight) {
        const int width = g.stage[LAST], of_a_line = width + 7;
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
#pragma unroll
        for (int side = 0; side < 2; ++side) {
            float* to = pairs + (side * 8 + lane / 4) * 8 + lane % 4 * 2;
            *(float2*)to = {ds[2 * side], ds[2 * side + 1]};
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
        __syncwarp();
    }
};

// What a lane knows of its two queries: rows, minus delta, minus log-sum-exp in base two.
struct Queries {
    Left query[QK_PARTS], d_out[V_PARTS];
    float minus_delta[2], minus_lse[2];

    __device__ __forceinline__ void read(
        const Params& p, const Item& item, const Sight& sight, int head) {
        const Geometry& g = p.geometry;
        read_own(rows_of(p.query, g, item, head), sight, p.head_dim, p.zero, query);
        read_own(rows_of(p.d_out, g, item, head), sight, p.value_dim, p.zero, d_out);
        const Rows outs = rows_of(p.out, g, item, head);
#pragma unroll
        for (int side = 0; side < 2; ++side) {
            float delta = sum_of_quad(dot(own_row(outs, sight, side), p.value_dim, side,
                                          sight.there(side)));
            minus_lse[side] = 0;
            if (sight.there(side)) {
                const long long number = sight.number(g, item, p.heads, head, side);
                if (p.d_lse) delta -= p.d_lse[number];
                if (threadIdx.x % 4 == 0) p.delta[number] = delta;
                minus_lse[side] = p.lse[number] * -(float)LOG2_E;
            }
            minus_delta[side] = -delta;
        }
    }
    // This lane's part of the product of a row with the gradient of one query's output.
    __device__ __forceinline__ float dot(
        const scalar_t* row, int dim, int side, bool there) const {
        float sum = 0;
#pragma unroll
        for (int part = 0; part < V_PARTS; ++part) {
            Chunk chunks[PIECES];
            read_part(row, part, dim, there, chunks);
#pragma unroll
            for (int n = 0; n < PIECES; ++n) {
                float x[CHUNK], y[CHUNK];
                widen(chunks[n], x);
                widen(chunk_of(d_out[part], n, side), y);
#pragma unroll
                for (int i = 0; i < CHUNK; ++i) sum += x[i] * y[i];
            }
        }
        return sum;
    }
};

// dS of the own queries and the pair of blocks `pair` of a turn, of which the first row of keys is at
// `keys`, in `d`; zero for what is not seen.
__device__ __forceinline__ void differentiate(
    const Params& p, const Sight& sight, const Turn& turn, int pair, Queries& own,
    const Biases<true>& biases, int offset, bool in_window, unsigned keys, float (&d)[2][4]) {
    const float scale = p.scale * (float)LOG2_E;
    float t[2][4];
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            t[h][e] = 0;
            d[h][e] = own.minus_delta[e / 2];
        }
    add_products(t, own.query, keys, p.zero);
    add_products(d, own.d_out, keys + QK_PARTS * PART_BYTES, p.zero);
    if (!RPB && !turn.masks(pair)) {
#pragma unroll
        for (int h = 0; h < 2; ++h)
#pragma unroll
            for (int e = 0; e < 4; ++e)
                d[h][e] *= exp_2(fmaf(t[h][e], scale, own.minus_lse[e / 2]));
        return;
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const Mask mask(sight, turn, 2 * pair + h);
        const int there = RPB ? __shfl_sync(0xFFFFFFFFu, offset, 2 * pair + h) : 0;
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            const bool sees = mask.sees(e / 2, e % 2);
            float x = fmaf(t[h][e], scale, own.minus_lse[e / 2]);
            if (RPB) x += biases.at(there, e / 2, e % 2, sees && in_window);
            d[h][e] = sees ? exp_2(x) * d[h][e] : 0;
        }
    }
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, MIN_BLOCKS)
na_mma_bwd_dq(const __grid_constant__ Params p) {
    extern __shared__ __align__(128) unsigned char shared[];
    __shared__ Item item;
    __shared__ Owned owned[WARPS];
    const Geometry& g = p.geometry;
    const int lane = threadIdx.x % 32;
    const int head = blockIdx.x % p.heads, kv_head = head / p.queries_per_kv;
    const unsigned staged = shared_address(shared);
    const Across across(0, lane, 8 * ROW);
    BiasSums sums;
    if (RPB_GRAD) sums.begin(p, shared + 2 * STAGED);

#pragma unroll 1
    for (unsigned n = blockIdx.x / p.heads; n < (unsigned)p.items; n += gridDim.x / p.heads) {
        if (!begin_item<false>(g, n, item)) continue;
        Sight sight;
        sight.begin<false>(g, item, owned + threadIdx.x / 32);
        const Biases<true> biases(g, item.halo, sight, p.rpb, head);
        if (RPB_GRAD) sums.find(g, item.halo, sight);
        KeyTurns turns(p, item, kv_head);
        stage(turns.walk, turns.keys, turns.values, staged);
        Queries own;
        own.read(p, item, sight, head);
        float d_query[QK_PARTS][D / 8][4];
        clear(d_query);

#pragma unroll 1
        for (int now = 0; now < turns.all; ++now) {
            copies_done();
            __syncthreads();  // these have come, and the buffer of those before is free
            if (now == turns.window) sight.set_line(p.extras);
            const Turn turn(sight, turns.walk.at);
            const int offset = RPB ? biases.offset(g, turns.walk.at) : 0;
            turns.stage_next(p, item, kv_head, now, staged + (now + 1) % 2 * STAGED);
            const bool in_window = now < turns.window;
#pragma unroll 1
            for (int i = 0; i < TURN_BLOCKS / 2; ++i) {
                if (turn.skips(i)) continue;
                const unsigned from = staged + now % 2 * STAGED + 2 * i * 8 * ROW;
                float d[2][4];
                differentiate(p, sight, turn, i, own, biases, offset, in_window,
                              from + row_offset(0, lane), d);
                add_weighted(d_query, weights_of(d), across + from);
                if (RPB_GRAD && in_window)
#pragma unroll
                    for (int h = 0; h < 2; ++h)
                        if (turn.any >> (2 * i + h) & 1)
                            sums.add(d[h], __shfl_sync(0xFFFFFFFFu, offset, 2 * i + h));
            }
        }
        const float factor[2] = {p.scale, p.scale};
        write_own(rows_of(p.d_query, g, item, head), sight, p.head_dim, d_query, factor);
        if (!RPB_GRAD) return;
    }

    if (RPB_GRAD && !FAR) sums.finish(p, shared + 2 * STAGED);
}
