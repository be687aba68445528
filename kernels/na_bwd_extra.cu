// Backward of the additional keys and values, which every query of their image sees:
//   d_extra_key_e = scale * sum_i dS_ie q_i,   d_extra_value_e = sum_i P_ie d_out_i,
// P and dS as in na_bwd_dq, which must have written delta. This is the first of two stages: the
// queries of an image are dealt out to `slices`, each slice writes its own sums, and
// reduce_partials adds the slices in order. No atomics; both results are overwritten.
//
// A block holds `keys` additional keys of one key head and blockDim / LANES / keys slices of the
// queries. LANES threads share a key and a slice; key and sums stay in their registers, queries are
// read from global memory, the same row by all keys of a slice.

#include "common.cuh"

struct Params {
    int length[3];
    int heads;           // query heads
    int kv_heads;
    int queries_per_kv;  // query heads that share a key and value head
    int head_dim;
    int value_dim;
    int extras;          // additional keys and values
    int keys;            // of them in a block, a divisor of blockDim / LANES
    int slices;          // of the queries, a multiple of blockDim / LANES / keys
    int batch;
    long long blocks;    // of work; a block of threads may take several
    double scale;
    View query;
    View d_out;
    View extra_key;
    View extra_value;
    acc_t* lse;      // [batch, heads, *spatial]
    acc_t* delta;    // like lse
    acc_t* d_key;    // [slices, batch, extras, kv_heads, head_dim]
    acc_t* d_value;  // [slices, batch, extras, kv_heads, value_dim]
};

template <int CHUNKS>
__device__ __forceinline__ void store_sums(
    acc_t* row, int dim, int lane, const acc_t (&x)[CHUNKS][CHUNK]) {
#pragma unroll
    for (int i = 0; i < CHUNKS; ++i)
#pragma unroll
        for (int j = 0; j < CHUNK; ++j) {
            const int at = (lane + LANES * i) * CHUNK + j;
            if (at < dim) row[at] = x[i][j];
        }
}

extern "C" __global__ void __launch_bounds__(MAX_THREADS)
na_bwd_extra(const __grid_constant__ Params p) {
    const int lane = threadIdx.x % LANES, slot = threadIdx.x / LANES;
    const int slices_here = blockDim.x / LANES / p.keys;
    const int rounds = (p.extras + p.keys - 1) / p.keys;

    const acc_t scale = (acc_t)(p.scale * LOG2_E);
    long long tokens = 1;
#pragma unroll
    for (int a = 0; a < RANK; ++a) tokens *= p.length[a];

    for (long long n = blockIdx.x; n < p.blocks; n += gridDim.x) {
        // Which key, which slice.
        long long block = n;
        const int kv_head = (int)(block % p.kv_heads);
        block /= p.kv_heads;
        const int extra = (int)(block % rounds) * p.keys + slot % p.keys;
        block /= rounds;
        const int slice = (int)(block % (p.slices / slices_here)) * slices_here + slot / p.keys;
        const long long batch = block / (p.slices / slices_here);
        const bool active = extra < p.extras;

        acc_t key[QK_CHUNKS][CHUNK], d_key[QK_CHUNKS][CHUNK];
        acc_t value[V_CHUNKS][CHUNK], d_value[V_CHUNKS][CHUNK];
        set_zero(key);
        set_zero(d_key);
        set_zero(value);
        set_zero(d_value);
        if (active) {
            const long long k = batch * p.extra_key.batch + kv_head * p.extra_key.head;
            const long long v = batch * p.extra_value.batch + kv_head * p.extra_value.head;
            load_numbers((const scalar_t*)p.extra_key.data + k + extra * p.extra_key.axis[0],
                         p.head_dim, lane, key);
            load_numbers((const scalar_t*)p.extra_value.data + v + extra * p.extra_value.axis[0],
                         p.value_dim, lane, value);
        }

        // Sum over the slice's queries, for every query head that reads this key head.
        for (int h = 0; h < p.queries_per_kv; ++h) {
            const int head = kv_head * p.queries_per_kv + h;
            const long long image = (batch * p.heads + head) * tokens;
            const long long q_base = batch * p.query.batch + head * p.query.head;
            const long long o_base = batch * p.d_out.batch + head * p.d_out.head;
            // NOTE: the bound is the same for all threads, so that whole warps meet in the sums.
            for (long long first = 0; first < tokens; first += p.slices) {
                const long long token = first + slice;
                const bool valid = active && token < tokens;
                long long rest = valid ? token : 0, q_at = q_base, o_at = o_base;
#pragma unroll
                for (int a = RANK - 1; a >= 0; --a) {
                    const long long place = a > 0 ? rest % p.length[a] : rest;
                    if (a > 0) rest /= p.length[a];
                    q_at += place * p.query.axis[a];
                    o_at += place * p.d_out.axis[a];
                }
                Chunk c_query[QK_CHUNKS], c_d_out[V_CHUNKS];
                const scalar_t* q_row = (const scalar_t*)p.query.data + q_at;
                const scalar_t* o_row = (const scalar_t*)p.d_out.data + o_at;
                load_share(q_row, valid ? p.head_dim : 0, lane, c_query);
                load_share(o_row, valid ? p.value_dim : 0, lane, c_d_out);
                const acc_t t = sum_over_lanes(partial_dot(key, c_query)) * scale;
                const acc_t d_weight = sum_over_lanes(partial_dot(value, c_d_out));
                const acc_t lse = valid ? p.lse[image + token] * (acc_t)LOG2_E : (acc_t)0;
                const acc_t delta = valid ? p.delta[image + token] : (acc_t)0;
                const acc_t weight = valid ? exp_2(t - lse) : (acc_t)0;
                add_scaled(d_value, weight, c_d_out);
                add_scaled(d_key, valid ? weight * (d_weight - delta) : (acc_t)0, c_query);
            }
        }

        // Store the slice's sums.
        if (active) {
            scale_by(d_key, (acc_t)p.scale);
            const long long row =
                ((slice * (long long)p.batch + batch) * p.extras + extra) * p.kv_heads + kv_head;
            store_sums(p.d_key + row * p.head_dim, p.head_dim, lane, d_key);
            store_sums(p.d_value + row * p.value_dim, p.value_dim, lane, d_value);
        }
    }
}
