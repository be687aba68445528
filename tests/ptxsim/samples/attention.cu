// Sample for the interpreter's own tests: windowed attention over rows of a 1-D sequence, with
// tensor cores, double-buffered asynchronous copies and an online softmax.
//
// One block: 64 queries of one head, 4 warps. Keys pass in tiles of 64. q, k, v, out are
// [length, heads, D] in bf16, lse is [length, heads]. A query at i sees keys start(i) to
// start(i) + window - 1.
typedef unsigned short u16;
typedef unsigned int u32;

#define D 32
#define TILE 64
#define PITCH (D + 8)

static __device__ __forceinline__ u32 shared_address(const void* p) {
    return (u32)__cvta_generic_to_shared(p);
}
static __device__ __forceinline__ void copy16(void* to, const void* from, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)),
                 "l"(from), "r"(valid ? 16 : 0)
                 : "memory");
}
static __device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N>
static __device__ __forceinline__ void wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}
static __device__ __forceinline__ void load4(u32 (&r)[4], const u16* p) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(p))
                 : "memory");
}
static __device__ __forceinline__ void load4_transposed(u32 (&r)[4], const u16* p) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(p))
                 : "memory");
}
static __device__ __forceinline__ void multiply(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
static __device__ __forceinline__ u32 pair(float low, float high) {
    u32 r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}
static __device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
static __device__ __forceinline__ int start_of(int i, int length, int window) {
    return max(0, min(i - window / 2, length - window));
}

extern "C" __global__ void __launch_bounds__(128)
attention(const u16* __restrict__ q, const u16* __restrict__ k, const u16* __restrict__ v,
          u16* __restrict__ out, float* __restrict__ lse, int length, int heads, int window,
          float scale) {
    extern __shared__ __align__(16) u16 shared[];
    u16* queries = shared;
    u16* stages = shared + TILE * PITCH;
    const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5, head = blockIdx.y;
    const int first = blockIdx.x * TILE, last = min(first + TILE, length) - 1;
    const int from = start_of(first, length, window);
    const int count = start_of(last, length, window) + window - from;
    const int tiles = (count + TILE - 1) / TILE;

    auto bring = [&](int tile, int stage) {
        for (int i = thread; i < TILE * (D / 8); i += 128) {
            const int row = i / (D / 8), column = i % (D / 8) * 8, j = tile * TILE + row;
            const bool valid = j < count;
            const long long at = ((long long)(from + (valid ? j : 0)) * heads + head) * D + column;
            u16* to = stages + stage * 2 * TILE * PITCH + row * PITCH + column;
            copy16(to, k + at, valid);
            copy16(to + TILE * PITCH, v + at, valid);
        }
    };
    for (int i = thread; i < TILE * (D / 8); i += 128) {
        const int row = i / (D / 8), column = i % (D / 8) * 8;
        const bool valid = first + row < length;
        const long long at = valid ? ((long long)(first + row) * heads + head) * D + column : 0;
        copy16(queries + row * PITCH + column, q + at, valid);
    }
    bring(0, 0);
    commit();

    const int group = lane >> 2, quad = lane & 3;
    u32 a[D / 16][4];
    float acc[D / 8][4] = {}, top[2] = {-1e30f, -1e30f}, sum[2] = {0.f, 0.f};
    int begin[2];
#pragma unroll
    for (int h = 0; h < 2; ++h)
        begin[h] = start_of(min(first + warp * 16 + group + h * 8, length - 1), length, window);

    for (int tile = 0; tile < tiles; ++tile) {
        const int stage = tile & 1;
        if (tile + 1 < tiles) bring(tile + 1, stage ^ 1);
        commit();
        wait<1>();
        __syncthreads();  // the tile is there
        const u16* keys = stages + stage * 2 * TILE * PITCH;
        const u16* values = keys + TILE * PITCH;
        if (tile == 0) {
#pragma unroll
            for (int s = 0; s < D / 16; ++s)
                load4(a[s], queries + (warp * 16 + (lane & 15)) * PITCH + s * 16 + (lane >> 4) * 8);
        }
        float score[TILE / 8][4] = {};
#pragma unroll
        for (int s = 0; s < D / 16; ++s) {
#pragma unroll
            for (int n = 0; n < TILE / 16; ++n) {
                u32 b[4];
                const int row = n * 16 + (lane & 7) + ((lane >> 4) << 3);
                load4(b, keys + row * PITCH + s * 16 + ((lane >> 3) & 1) * 8);
                multiply(score[2 * n], a[s], b[0], b[1]);
                multiply(score[2 * n + 1], a[s], b[2], b[3]);
            }
        }
        float now[2] = {top[0], top[1]}, rescale[2];
#pragma unroll
        for (int n = 0; n < TILE / 8; ++n) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int h = e >> 1, j = tile * TILE + n * 8 + quad * 2 + (e & 1);
                const bool seen = from + j >= begin[h] && from + j < begin[h] + window;
                score[n][e] = seen ? score[n][e] * scale : -1e30f;
                now[h] = fmaxf(now[h], score[n][e]);
            }
        }
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            now[h] = fmaxf(now[h], __shfl_xor_sync(0xffffffffu, now[h], 1));
            now[h] = fmaxf(now[h], __shfl_xor_sync(0xffffffffu, now[h], 2));
            rescale[h] = exp2_fast(top[h] - now[h]);
            top[h] = now[h];
            sum[h] *= rescale[h];
        }
#pragma unroll
        for (int n = 0; n < D / 8; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) acc[n][e] *= rescale[e >> 1];
#pragma unroll
        for (int n = 0; n < TILE / 8; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                score[n][e] = score[n][e] <= -1e29f ? 0.f : exp2_fast(score[n][e] - now[e >> 1]);
                sum[e >> 1] += score[n][e];
            }
#pragma unroll
        for (int s = 0; s < TILE / 16; ++s) {
            const u32 p[4] = {pair(score[2 * s][0], score[2 * s][1]),
                              pair(score[2 * s][2], score[2 * s][3]),
                              pair(score[2 * s + 1][0], score[2 * s + 1][1]),
                              pair(score[2 * s + 1][2], score[2 * s + 1][3])};
#pragma unroll
            for (int n = 0; n < D / 16; ++n) {
                u32 b[4];
                load4_transposed(b, values + (s * 16 + (lane & 15)) * PITCH + n * 16 + (lane >> 4) * 8);
                multiply(acc[2 * n], p, b[0], b[1]);
                multiply(acc[2 * n + 1], p, b[2], b[3]);
            }
        }
        __syncthreads();  // the stage may be overwritten
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        sum[h] += __shfl_xor_sync(0xffffffffu, sum[h], 1);
        sum[h] += __shfl_xor_sync(0xffffffffu, sum[h], 2);
        const int row = first + warp * 16 + group + h * 8;
        if (row < length) {
            const long long at = (long long)row * heads + head;
#pragma unroll
            for (int n = 0; n < D / 8; ++n)
                *(u32*)(out + at * D + n * 8 + quad * 2) =
                    pair(acc[n][2 * h] / sum[h], acc[n][2 * h + 1] / sum[h]);
            if (quad == 0) lse[at] = top[h] + log2f(sum[h]);
        }
    }
}
