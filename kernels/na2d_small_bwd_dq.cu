// Backward for small 2-D windows on tensor cores, queries at rest: what na_bwd_dq computes.

#include "common.cuh"
#include "instructions.cuh"
#include "neighborhood.cuh"
#include "products.cuh"
#include "small.cuh"
#include "small_queries.cuh"

struct Params {
    SmallGeometry geometry;
    int items;       // tiles of all dilation groups of all images
    Scale scale;
    View query;
    View key;
    View value;
    View out;
    View d_out;
    View d_query;
    acc_t* rpb;      // [heads, 2 * kernel_size - 1 per axis]
    acc_t* lse;      // [batch, heads, *spatial]
    acc_t* d_lse;    // like lse, or null
    acc_t* delta;    // like lse
    acc_t* partial;  // [blocks per head, heads, 2 * kernel_size - 1 per axis]
};

extern "C" __global__ void __launch_bounds__(256, CROWDED ? 2 : 1)
na2d_small_bwd_dq(const __grid_constant__ Params p) {
    extern __shared__ __align__(128) unsigned char shared[];
    query_side<true>(p, p.geometry, shared, blockIdx.x, gridDim.x);
}
