// Backward for small 2-D windows on tensor cores, all gradients in one launch: blocks of the query
// side among those of the key side, each followed by those that read what it reads.
//
// So a tile's tensors come from main memory once, for both: 8 tensors instead of the 12 of two
// launches. No block waits for another, as the key side makes delta itself; it is for short rows of
// halves, and for as many heads of keys as of queries.

#include "common.cuh"
#include "instructions.cuh"
#include "neighborhood.cuh"
#include "products.cuh"
#include "small.cuh"
#include "small_keys.cuh"
#include "small_queries.cuh"

struct Params {
    SmallGeometry geometry;      // of the query side's tiles
    SmallGeometry key_geometry;  // of the key side's
    int items;                   // tiles of the query side, of all dilation groups of all images
    int query_blocks;
    int key_blocks;
    Divisor by_share;  // blocks of both sides that lie together: one of the query side, then others
    Scale scale;
    View query;
    View key;
    View value;
    View out;
    View d_out;
    View d_query;
    View d_key;
    View d_value;
    acc_t* rpb;      // [heads, 2 * kernel_size - 1 per axis]
    acc_t* lse;      // [batch, heads, *spatial]
    acc_t* d_lse;    // like lse, or null
    acc_t* partial;  // [blocks per head, heads, 2 * kernel_size - 1 per axis]
};

extern "C" __global__ void __launch_bounds__(256, CROWDED ? 2 : 1)
na2d_small_bwd(const __grid_constant__ Params p) {
    extern __shared__ __align__(128) unsigned char shared[];
    int block = blockIdx.x;
    const int place = remainder(block, p.by_share);
    if (place == 0) {
        query_side<false>(p, p.geometry, shared, block, p.query_blocks);
    } else {
        // The tiles that the block of the query side walks, where both sides cut a map alike.
        block += (place - 1) * p.query_blocks;
        if (block < p.key_blocks) key_side<false>(p, p.key_geometry, shared, block);
    }
}
