// The backward kernel of the log-prob ops: one pass, each logit read once and its gradient written once.
//
// With d = (M - z) / (T ln 2) bits, S = 1 + S', p = 2^-d / S and the entropy's mean distance m = E' / S:
//
//     d logp / d z_v    = (1[v = y] - p_v) / T,   1 - p_y = -expm1(logp)
//     d entropy / d z_v = p_v (d_v ln 2 - m) / T
//
// so that apart from the target the gradient is 2^-d (a + b d), with a and b of the row.
//
// Floor: N * V * (bytes of a logit + bytes of a gradient), read and written once; one exponential per logit, as in the
// forward.
#pragma once

#include "logprob/cuda_rows.cuh"

namespace r1kernels::logprob {

// What the gradient of a row is made of.
struct RowGradient {
    float largest, bits;
    float constant, by_distance;   // a, b
    float target_constant;         // a of the target's column, from the entropy alone
    float at_target;               // what the log-prob adds there

    __device__ RowGradient(const Row& row, const R1kernelsLogprobGradients& from, int64_t rows)
        : largest(from.stats[row.number]), bits(row.bits()) {
        const float by_logp = upstream(from.grad_logp, row, from.sequences);
        const float by_entropy = upstream(from.grad_entropy, row, from.sequences);
        const float normaliser = row.valid ? 1.0f / (1.0f + from.stats[rows + row.number]) : NAN;
        const float mean = from.stats[2 * rows + row.number] * normaliser;
        by_distance = normaliser * by_entropy * kLn2;
        target_constant = -normaliser * by_entropy * mean;
        constant = target_constant - normaliser * by_logp;
        at_target = by_logp * -expm1f(from.logp[row.number]);
    }

    // dL / d (log-prob or entropy), over T; NaN for a row that belongs to no sequence.
    __device__ static float upstream(const float* gradients, const Row& row, const int32_t* sequences) {
        if (gradients == nullptr) return 0.0f;
        const int64_t entry = sequences == nullptr ? row.number : sequences[row.number];
        return entry < 0 ? NAN : gradients[entry] * row.inverse_temperature;
    }

    template <Mode kMode>
    __device__ float operator()(float logit) const {
        const float distance = (largest - logit) * bits;
        const float weight = exp2_fast(-distance);
        if constexpr (kMode == Mode::kLogp) return weight * constant;
        return weight * (constant + by_distance * fminf(distance, kFarBits));  // 0 * inf would be NaN
    }

    __device__ float of_target(float logit) const {
        const float distance = (largest - logit) * bits;
        return at_target + exp2_fast(-distance) * (target_constant + by_distance * fminf(distance, kFarBits));
    }
};

// grad_logits may be the logits: a thread reads the elements that it writes, and no other thread reads them (where both
// have one address, chunks lie on its boundaries). Or it is narrower: a 16-bit gradient of float32 logits.
template <class Scalar, class Gradient, Mode kMode>
__global__ void __launch_bounds__(kThreads, blocks_per_processor(kMode))
    backward_kernel(R1kernelsTokenLogprobs call, R1kernelsLogprobGradients from, Partition partition,
                    void* grad_logits, int64_t grad_batch_stride, int64_t grad_token_stride) {
    constexpr int kSize = Chunk<Scalar>::kSize;
    const Team team(partition);
    const int stride = team.threads * kSize;
    const int64_t items = partition.rows * partition.pieces;
    for (int64_t item = team.first; item < items; item += team.step) {
        const Row row(call, item / partition.pieces);
        const int64_t begin = item % partition.pieces * kPiece;
        const int length = piece_length(begin, call.vocabulary);
        const Scalar* logits = static_cast<const Scalar*>(call.logits) + row.offset + begin;
        Gradient* gradient = static_cast<Gradient*>(grad_logits) + row.number / call.tokens * grad_batch_stride +
                           row.number % call.tokens * grad_token_stride + begin;
        const RowGradient gradient_of(row, from, partition.rows);
        const int64_t column = row.column(call) - begin;
        const int target = row.has_target(call) && column >= 0 && column < length ? static_cast<int>(column) : -kSize;

        for (int start = -misalignment<kSize>(gradient); start < length; start += kUnroll * stride) {
            Chunk<Scalar> chunks[kUnroll] = {};
            if (!row.ignored) {
                load_chunks(logits, start + team.rank * kSize, stride, length, from_float<Scalar>(0.0f), chunks);
            }
#pragma unroll
            for (int j = 0; j < kUnroll; ++j) {
                if (start + j * stride >= length) break;
                const int first = start + j * stride + team.rank * kSize;
                float z[kSize], grad[kSize], slopes[kSize];
                Gradient result[kSize];
#pragma unroll
                for (int i = 0; i < kSize; ++i) z[i] = chunks[j][i];
                if constexpr (kMode == Mode::kGeneral) {
                    float biases[kSize];
                    load_biases(call, begin, first, length, biases);
#pragma unroll
                    for (int i = 0; i < kSize; ++i) {
                        const Logit logit = logit_of(call, z[i], biases[i]);
                        z[i] = logit.value;
                        slopes[i] = logit.slope;
                    }
                }
#pragma unroll
                for (int i = 0; i < kSize; ++i) grad[i] = gradient_of.template operator()<kMode>(z[i]);
                if (static_cast<unsigned>(target - first) < kSize) {
                    float chosen = 0.0f;
#pragma unroll
                    for (int i = 0; i < kSize; ++i) chosen = first + i == target ? z[i] : chosen;
                    chosen = gradient_of.of_target(chosen);
#pragma unroll
                    for (int i = 0; i < kSize; ++i) grad[i] = first + i == target ? chosen : grad[i];
                }
#pragma unroll
                for (int i = 0; i < kSize; ++i) {
                    if constexpr (kMode == Mode::kGeneral) grad[i] *= slopes[i];
                    result[i] = from_float<Gradient>(row.ignored ? 0.0f : grad[i]);
                }
                store_chunk(gradient, first, length, result);
            }
        }
    }
}

}  // namespace r1kernels::logprob
