// The second stage of every two-stage sum: out[i] = sum over s of partial[s][i], always in the same
// order. Used for the bias gradient and the gradients of additional keys and values.
//
// A block takes 32 neighbouring results. Thread (x, y) adds the slices y, y + blockDim.y, ... of
// result x; then the first row adds the blockDim.y sums in order. `out` is overwritten.

#include "common.cuh"

struct Params {
    long long size;  // results
    int slices;
    acc_t* partial;  // [slices, size]
    void* out;       // [size], stored as SCALAR
};

enum { MOST = 1024 };  // threads of a block: many slices need many loads at once

extern "C" __global__ void __launch_bounds__(MOST)
reduce_partials(const __grid_constant__ Params p) {
    __shared__ acc_t sums[MOST];
    for (long long first = blockIdx.x * 32ll; first < p.size; first += gridDim.x * 32ll) {
        const long long at = first + threadIdx.x;
        acc_t sum = 0;
        if (at < p.size)
#pragma unroll 8
            for (int s = threadIdx.y; s < p.slices; s += blockDim.y)
                sum += p.partial[s * p.size + at];
        __syncthreads();  // the sums of the results before these have been read
        sums[threadIdx.y * 32 + threadIdx.x] = sum;
        __syncthreads();
        if (threadIdx.y == 0 && at < p.size) {
            for (int y = 1; y < blockDim.y; ++y) sum += sums[y * 32 + threadIdx.x];
            narrow(sum, ((scalar_t*)p.out)[at]);
        }
    }
}
