// Kernels of token_logprobs: one block a row, one pass over its logits in either direction.
//
// A set of logits z with x = z / T is summed up by three numbers, none of which cancels:
//
//     M  = the largest z                          (-inf for an empty set)
//     S' = sum of e^(x - M/T) over all but one largest
//     E' = sum of e^(x - M/T) (M/T - x)           (terms whose exponential is 0 count as 0)
//
// Merging sets A and B with M_A >= M_B. Let d = (M_A - M_B) / T >= 0 and w = e^-d, w = 0 for an empty B. Against M_A,
// B's terms shrink by w, its largest, which S'_B leaves out, is w itself, and their distances to the largest grow by d:
//
//     S' = S'_A + w (1 + S'_B)
//     E' = E'_A + sum_B w e^(x - M_B/T) ((M_B/T - x) + d) = E'_A + w (E'_B + d (1 + S'_B))
//
// A single logit is the set (z, 0, 0), so that adding one costs one exponential whichever side is larger. All terms are
// >= 0. NaN enters S' and stays there: M is only ever replaced by a larger number, and 0 * NaN is NaN.
//
// With S = 1 + S':  logp = (z_y - M)/T - log1p(S'),  entropy = log1p(S') + E'/S,  p_v = e^(x_v - M/T) / S, and
//
//     d logp / d z_v    = (1[v = y] - p_v) / T,   1 - p_y = -expm1(logp)
//     d entropy / d z_v = p_v ((M/T - x_v) - E'/S) / T
#pragma once

#include <cmath>
#include <cstdint>

#include "common/block_reduce.cuh"
#include "common/elements.cuh"
#include "logprob/cuda.h"

namespace r1kernels::logprob {

constexpr int kThreads = 256;

struct SoftmaxState {
    float largest = -INFINITY;  // M
    float others = 0.0f;        // S'
    float spread = 0.0f;        // E'
};

// w x where w > 0; a weight of 0 takes away an infinite x too.
__device__ inline float weighted(float weight, float x) { return weight > 0.0f ? weight * x : 0.0f; }

__device__ inline void add(SoftmaxState& state, float logit, float inverse_temperature) {
    if (logit == -INFINITY) return;  // probability 0
    const float distance = fabsf(logit - state.largest) * inverse_temperature;
    const float weight = expf(-distance);
    if (logit > state.largest) {
        state.spread = weighted(weight, state.spread + distance * (1.0f + state.others));
        state.others = weight * (1.0f + state.others);
        state.largest = logit;
    } else {
        state.spread += weighted(weight, distance);
        state.others += weight;
    }
}

__device__ inline SoftmaxState merge(SoftmaxState high, SoftmaxState low, float inverse_temperature) {
    if (low.largest > high.largest) {
        const SoftmaxState larger = low;
        low = high;
        high = larger;
    }
    const float distance = (high.largest - low.largest) * inverse_temperature;
    const float weight = low.largest == -INFINITY ? 0.0f : expf(-distance);
    SoftmaxState merged;
    merged.largest = high.largest;
    merged.others = high.others + weight * (1.0f + low.others);
    merged.spread = high.spread + weighted(weight, low.spread + distance * (1.0f + low.others));
    return merged;
}

// 1 / T of a row; NaN, which makes the row NaN, for a temperature that is not a number above 0.
__device__ inline float inverse_temperature_of(const R1kernelsTokenLogprobs& call, int64_t row) {
    const float temperature = call.temperatures == nullptr ? call.temperature : call.temperatures[row];
    return temperature > 0.0f && temperature < INFINITY ? 1.0f / temperature : NAN;
}

__device__ inline int64_t row_offset(const R1kernelsTokenLogprobs& call, int64_t row, int64_t batch_stride,
                                     int64_t token_stride) {
    return row / call.tokens * batch_stride + row % call.tokens * token_stride;
}

template <class Scalar>
__global__ void __launch_bounds__(kThreads)
    forward_kernel(R1kernelsTokenLogprobs call, float* logp, float* entropy, float* stats) {
    const int64_t rows = call.batch * call.tokens;
    for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
        const int64_t target = call.targets[row];
        const bool ignored = target == call.ignore_index;
        const float inverse_temperature = inverse_temperature_of(call, row);
        const Scalar* logits = static_cast<const Scalar*>(call.logits) +
                               row_offset(call, row, call.batch_stride, call.token_stride);
        SoftmaxState state;
        if (!ignored) {
            constexpr int kSize = Chunk<Scalar>::kSize;
            for (int64_t first = threadIdx.x * kSize; first < call.vocabulary; first += kThreads * kSize) {
                const Chunk<Scalar> chunk = load_chunk(logits, first, call.vocabulary);
#pragma unroll
                for (int i = 0; i < kSize; ++i) {
                    if (first + i < call.vocabulary) add(state, to_float(chunk.value[i]), inverse_temperature);
                }
            }
        }
        state = block_reduce(state, [=](SoftmaxState a, SoftmaxState b) { return merge(a, b, inverse_temperature); });
        if (threadIdx.x != 0) continue;

        float row_logp = 0.0f, row_entropy = 0.0f;
        if (ignored) {
            state = {0.0f, 0.0f, 0.0f};
        } else {
            // no finite largest logit: nothing to normalise by
            if (!(fabsf(state.largest) < INFINITY)) state.others = NAN;
            const float log_normaliser = log1pf(state.others);
            const bool inside = target >= 0 && target < call.vocabulary;
            const float chosen = inside ? to_float(logits[target]) : NAN;
            row_logp = (chosen - state.largest) * inverse_temperature - log_normaliser;
            row_entropy = inside ? log_normaliser + state.spread / (1.0f + state.others) : NAN;
        }
        logp[row] = row_logp;
        if (entropy != nullptr) entropy[row] = row_entropy;
        stats[row] = state.largest;
        stats[rows + row] = state.others;
        stats[2 * rows + row] = entropy != nullptr ? state.spread : 0.0f;
    }
}

// grad_logits may be the logits: a thread reads an element before it writes it, and no other thread reads it.
template <class Scalar>
__global__ void __launch_bounds__(kThreads)
    backward_kernel(R1kernelsTokenLogprobs call, const float* logp, const float* stats, const float* grad_logp,
                    const float* grad_entropy, void* grad_logits, int64_t grad_batch_stride,
                    int64_t grad_token_stride) {
    const int64_t rows = call.batch * call.tokens;
    for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
        const int64_t target = call.targets[row];
        const bool ignored = target == call.ignore_index;
        const bool inside = target >= 0 && target < call.vocabulary;
        const float inverse_temperature = inverse_temperature_of(call, row);
        const Scalar* logits = static_cast<const Scalar*>(call.logits) +
                               row_offset(call, row, call.batch_stride, call.token_stride);
        Scalar* gradient =
            static_cast<Scalar*>(grad_logits) + row_offset(call, row, grad_batch_stride, grad_token_stride);

        const float largest = stats[row];
        const float normaliser = inside ? 1.0f / (1.0f + stats[rows + row]) : NAN;
        const float mean_distance = stats[2 * rows + row] * normaliser;
        const float at_target = -expm1f(logp[row]);
        const float slope_logp = grad_logp == nullptr ? 0.0f : grad_logp[row] * inverse_temperature;
        const float slope_entropy = grad_entropy == nullptr ? 0.0f : grad_entropy[row] * inverse_temperature;

        constexpr int kSize = Chunk<Scalar>::kSize;
        for (int64_t first = threadIdx.x * kSize; first < call.vocabulary; first += kThreads * kSize) {
            Chunk<Scalar> chunk = {};
            if (!ignored) chunk = load_chunk(logits, first, call.vocabulary);
#pragma unroll
            for (int i = 0; i < kSize; ++i) {
                const float distance = (largest - to_float(chunk.value[i])) * inverse_temperature;
                const float prob = expf(-distance) * normaliser;
                const float by_logp = slope_logp * (first + i == target ? at_target : -prob);
                const float by_entropy = slope_entropy * weighted(prob, distance - mean_distance);
                chunk.value[i] = from_float<Scalar>(ignored ? 0.0f : by_logp + by_entropy);
            }
            store_chunk(gradient, first, call.vocabulary, chunk);
        }
    }
}

}  // namespace r1kernels::logprob
