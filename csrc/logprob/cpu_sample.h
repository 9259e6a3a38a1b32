// Tokens drawn from logits on the CPU: the inverse of the cumulated probabilities.
//
// Notation: z logits of a row, T temperature, M = max z, w_v = e^((z_v - M) / T), W their sum, u the number of the row. The
// token is the first y with w_0 + ... + w_y > u W. Weights are made twice, with the same bits: once for the sums of blocks, and
// of the block in which the token lies for its place.
#pragma once

#include "logprob/cpu_forward.h"

namespace r1kernels::R1KERNELS_ISA {

namespace {

typedef double WideSums __attribute__((vector_size(8 * kLanes)));

static_assert(kSampleBlock % kLanes == 0);

// run(first entry, weights, how many of them count) for the entries [begin, end) of a row
template <typename T, typename Run>
inline void each_weight(const T* z, int64_t begin, int64_t end, float largest, float inverse_temperature, const Run& run) {
    for (int64_t v = begin; v < end; v += kLanes) {
        const int some = end - v < kLanes ? static_cast<int>(end - v) : kLanes;
        const Floats logits = some < kLanes ? load_some(z + v, some) : load(z + v);
        run(v, exp_negative((logits - largest) * inverse_temperature), some);
    }
}

template <typename T>
void sample_row(const SampleCall& call, int64_t row, double* ends) {
    const T* z = static_cast<const T*>(call.logits) + row * call.vocabulary;
    const float largest = largest_of(z, call.vocabulary), inverse = static_cast<float>(1.0 / call.temperature);
    const int64_t blocks = sample_blocks(call.vocabulary);
    double total = 0;
    for (int64_t block = 0; block < blocks; ++block) {
        const int64_t begin = block * kSampleBlock, rest = call.vocabulary - begin;
        WideSums sums = {};
        each_weight(z, begin, begin + (rest < kSampleBlock ? rest : kSampleBlock), largest, inverse,
                    [&](int64_t, Floats weights, int) { sums += __builtin_convertvector(weights, WideSums); });
        for (int lane = 0; lane < kLanes; ++lane) total += sums[lane];
        ends[block] = total;
    }
    const double target = call.uniform[row] * total;
    int64_t block = 0;
    while (block + 1 < blocks && !(ends[block] > target)) ++block;
    // where rounding lets the block end before the number, its last token that has a weight
    int64_t chosen = 0;
    double before = block > 0 ? ends[block - 1] : 0;
    const int64_t begin = block * kSampleBlock, rest = call.vocabulary - begin;
    each_weight(z, begin, begin + (rest < kSampleBlock ? rest : kSampleBlock), largest, inverse,
                [&](int64_t first, Floats weights, int some) {
                    for (int lane = 0; lane < some && !(before > target); ++lane) {
                        if (weights[lane] > 0) chosen = first + lane;
                        before += weights[lane];
                    }
                });
    const T* at = z + chosen;
    const double logit = load_some(at, 1)[0];
    call.tokens[row] = chosen;
    call.logp[row] = (logit - largest) / call.temperature - ::log(total);
}

}  // namespace

}  // namespace r1kernels::R1KERNELS_ISA
