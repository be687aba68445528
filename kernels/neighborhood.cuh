// Which keys a query sees, which queries see a key, and which bias a pair gets. The twin of
// natcupy/neighborhood.py: the same three functions under the same names. All of it is per axis and
// in group coordinates: `length` is the length of the token's own dilation group. Intervals are
// half-open, and both ends of each never decrease with `position`.

struct Interval { int begin, end; };

__device__ __forceinline__ int least(int a, int b) { return a < b ? a : b; }
__device__ __forceinline__ int most(int a, int b) { return a > b ? a : b; }

// Keys that the query at `position` sees.
__device__ __forceinline__ Interval window(
    int position, int length, int kernel_size, int stride, bool is_causal) {
    const int group = position / stride * stride;
    if (is_causal) {
        const int leader = least(group + stride - 1, length - 1);
        return {most(leader - (kernel_size - 1), 0), position + 1};
    }
    const int leader = least(group + stride / 2, length - 1);
    const int begin = most(least(leader - kernel_size / 2, length - kernel_size), 0);
    return {begin, begin + kernel_size};
}

// Queries that see the key at `position`.
__device__ __forceinline__ Interval inverse_window(
    int position, int length, int kernel_size, int stride, bool is_causal) {
    if (is_causal) {
        const bool last = position + kernel_size >= length;
        return {position, last ? length : (position + kernel_size) / stride * stride};
    }
    const int last_group = (length - 1) / stride * stride;
    const int shift = kernel_size / 2 - stride / 2;
    int begin = 0, end = length;
    if (position >= kernel_size) {
        const int first = position - (kernel_size - 1) + shift;
        begin = least((first + stride - 1) / stride * stride, last_group);
    }
    if (position < length - kernel_size)
        end = least(length, ((position + shift) / stride + 1) * stride);
    return {begin, end};
}

// The pair's bias on one axis, in [0, 2 * kernel_size - 2].
__device__ __forceinline__ int rpb_index(int key, int query, int kernel_size) {
    return key - query + kernel_size - 1;
}
