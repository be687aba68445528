// A kernel with a mistake, for the tests of lost contexts: it stores where no memory is.
struct Params {
    int* out;
};

extern "C" __global__ void bad_store(const Params p) { p.out[threadIdx.x] = 1; }
