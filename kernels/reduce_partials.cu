// The second stage of every two-stage sum: out[i] = sum over s of partial[s][i], always in the same
// order. Used for the bias gradient and the gradients of additional keys and values.
//
// A block takes blockDim.x neighbouring results. Thread (x, y) adds the slices y, y + blockDim.y, ...
// of result x, AT_ONCE loads on their way at a time; then halves of the rows of threads, a power of two,
// are added up pair by pair. `out` is overwritten.

#include "common.cuh"

struct Params {
    long long size;  // results
    int slices;
    acc_t* partial;  // [slices, size]
    void* out;       // [size], stored as SCALAR
};

enum { MOST = 1024, AT_ONCE = 8 };  // threads of a block: many slices need many loads at once

extern "C" __global__ void __launch_bounds__(MOST)
reduce_partials(const __grid_constant__ Params p) {
    __shared__ acc_t sums[MOST];
    acc_t& mine = sums[threadIdx.y * blockDim.x + threadIdx.x];
    const long long results = blockDim.x, all = gridDim.x * results;
    for (long long first = blockIdx.x * results; first < p.size; first += all) {
        const long long at = first + threadIdx.x;
        const int slices = at < p.size ? p.slices : 0;
        acc_t sum = 0;
        for (int s = threadIdx.y; s < slices; s += AT_ONCE * blockDim.y) {
            acc_t x[AT_ONCE];
#pragma unroll
            for (int i = 0; i < AT_ONCE; ++i) {
                const int slice = s + i * blockDim.y;
                x[i] = slice < slices ? p.partial[slice * p.size + at] : 0;
            }
#pragma unroll
            for (int i = 0; i < AT_ONCE; ++i) sum += x[i];
        }
        __syncthreads();  // the sums of the results before these have been read
        mine = sum;
        for (unsigned half = blockDim.y / 2; half > 0; half /= 2) {
            __syncthreads();
            if (threadIdx.y < half) mine += (&mine)[half * blockDim.x];
        }
        if (threadIdx.y == 0 && at < p.size) narrow(mine, ((scalar_t*)p.out)[at]);
    }
}
