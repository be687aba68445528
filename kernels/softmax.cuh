// Softmax over keys that arrive a few at a time, in base two: after any number of steps `total` is
// the sum of 2^(t - peak) over the scores t seen so far.

struct OnlineSoftmax {
    acc_t peak, total;

    __device__ __forceinline__ OnlineSoftmax() : peak(minus_infinity()), total(0) {}

    // Turns scores (minus infinity where there is no key) into weights and takes them in. Returns
    // the factor for everything accumulated under the former peak.
    template <int COUNT>
    __device__ __forceinline__ acc_t step(acc_t (&score)[COUNT]) {
        acc_t high = peak;
#pragma unroll
        for (int i = 0; i < COUNT; ++i) high = score[i] > high ? score[i] : high;
        // NOTE: no key yet means high = -inf; measured from 0 the weights are 0 and never NaN.
        const acc_t from = high == minus_infinity() ? (acc_t)0 : high;
        const acc_t shrink = exp_2(peak - from);
        total *= shrink;
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            score[i] = exp_2(score[i] - from);
            total += score[i];
        }
        peak = high;
        return shrink;
    }

    // Natural log of the sum of e^score.
    __device__ __forceinline__ acc_t log_sum_exp() const {
        return (peak + log_2(total)) * (acc_t)LN_2;
    }
};
