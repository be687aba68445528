// Backward for small 2-D windows on tensor cores, keys at rest: what na_bwd_dkv computes.

#include "common.cuh"
#include "instructions.cuh"
#include "neighborhood.cuh"
#include "products.cuh"
#include "small.cuh"
#include "small_keys.cuh"

struct Params {
    SmallGeometry geometry;  // its heads are those of keys and values
    Scale scale;
    View query;
    View key;
    View value;
    View d_out;
    View d_key;
    View d_value;
    acc_t* rpb;    // [query heads, 2 * kernel_size - 1 per axis]
    acc_t* lse;    // [batch, query heads, *spatial]
    acc_t* delta;  // like lse
};

// At most 8 warps; of short rows of halves a multiprocessor's registers hold 12.
extern "C" __global__ void
__launch_bounds__(D == 32 && !FLOATS && KW <= 9 && !CROWDED ? 384 : 256, CROWDED ? 2 : 1)
na2d_small_bwd_dkv(const __grid_constant__ Params p) {
    extern __shared__ __align__(128) unsigned char shared[];
    key_side<true>(p, p.geometry, shared, block_from_the_end());
}
