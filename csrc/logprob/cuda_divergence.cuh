// Divergences of rows on CUDA: the logits of teacher and student side by side, their sums known. One block per row.
//
// Floor: 8 N V bytes read forward, 4 N V more written backward; two exponentials an id in either direction.
#pragma once

#include "common/math.cuh"
#include "logprob/cuda_rows.cuh"
#include "logprob/divergence_terms.h"  // after the functions that it is built on

namespace r1kernels::logprob {

using Logits = Chunk<float>;

// A row of one of the two.
struct Side {
    const R1kernelsTokenLogprobs& call;
    const float* logits;
    int size;
    bool plain;
    float largest, inverse_temperature, log_normaliser;

    __device__ Side(const R1kernelsTokenLogprobs& call, const float* stats, const Row& row)
        : call(call),
          logits(static_cast<const float*>(call.logits) + row.offset),
          size(static_cast<int>(call.vocabulary)),
          plain(call.bias == nullptr && call.logit_scale == 1.0f && call.softcap == 0.0f),
          largest(stats[row.number]),
          inverse_temperature(row.inverse_temperature),
          log_normaliser(log1pf(stats[call.batch * call.tokens + row.number])) {}

    // The log-probs of the ids [first, first + kSize), -inf outside of the row, and the slopes of their logits.
    __device__ void load(int first, float (&log_probs)[Logits::kSize], float (&slopes)[Logits::kSize]) const {
        const Logits raw = load_chunk(logits, first, size);
        float biases[Logits::kSize] = {};
        if (!plain) load_biases(call, 0, first, size, biases);
#pragma unroll
        for (int i = 0; i < Logits::kSize; ++i) {
            const Logit logit = plain ? Logit{raw[i], 1.0f} : logit_of(call, raw[i], biases[i]);
            const bool inside = first + i >= 0 && first + i < size;
            log_probs[i] = inside ? (logit.value - largest) * inverse_temperature - log_normaliser : -INFINITY;
            slopes[i] = logit.slope;
        }
    }
};

__device__ inline DivergenceSums<float> add(const DivergenceSums<float>& a, const DivergenceSums<float>& b) {
    return {a.divergence + b.divergence, a.weighted + b.weighted, a.at_largest + b.at_largest, a.largest + b.largest};
}

// sums (4, rows), the fields of DivergenceSums
template <int kKind>
__global__ void __launch_bounds__(kThreads, 2) divergence_sums_kernel(R1kernelsDivergence call, float* to) {
    const int64_t rows = call.student.batch * call.student.tokens;
    for (int64_t number = blockIdx.x; number < rows; number += gridDim.x) {
        const Row row(call.student, number), of_teacher(call.teacher, number);
        const Side student(call.student, call.student_stats, row), teacher(call.teacher, call.teacher_stats, of_teacher);
        DivergenceSums<float> sums = {};
        const int size = row.ignored ? 0 : student.size;
        for (int first = threadIdx.x * Logits::kSize; first < size; first += kThreads * Logits::kSize) {
            float x[Logits::kSize], y[Logits::kSize], slopes[Logits::kSize];
            student.load(first, x, slopes);
            teacher.load(first, y, slopes);
#pragma unroll
            for (int i = 0; i < Logits::kSize; ++i) {
                sums = add(sums, divergence_terms<kKind>(x[i], y[i], -student.log_normaliser, call.beta));
            }
        }
        sums = block_reduce(sums, add);
        if (threadIdx.x == 0) {
            to[number] = sums.divergence;
            to[rows + number] = sums.weighted;
            to[2 * rows + number] = sums.at_largest;
            to[3 * rows + number] = sums.largest;
        }
    }
}

// The gradient of the student's raw logits, over them: a thread reads the logits that it writes, and no other thread reads
// them, since chunks lie on the boundaries of their addresses. mean (2, rows): of r, see
// divergence_slope.
template <int kKind>
__global__ void __launch_bounds__(kThreads, 2)
    divergence_gradient_kernel(R1kernelsDivergence call, const float* mean, const float* grad, float* to) {
    const int64_t rows = call.student.batch * call.student.tokens;
    for (int64_t number = blockIdx.x; number < rows; number += gridDim.x) {
        const Row row(call.student, number), of_teacher(call.teacher, number);
        const Side student(call.student, call.student_stats, row), teacher(call.teacher, call.teacher_stats, of_teacher);
        const float at_largest = mean[number], above = mean[rows + number];
        const float upstream = (grad == nullptr ? 1.0f : grad[number]) * row.inverse_temperature;
        float* gradient = to + row.offset;
        for (int first = static_cast<int>(threadIdx.x) * Logits::kSize - misalignment<Logits::kSize>(gradient);
             first < student.size; first += kThreads * Logits::kSize) {
            float x[Logits::kSize], y[Logits::kSize], slopes[Logits::kSize], unused[Logits::kSize];
            student.load(first, x, slopes);
            teacher.load(first, y, unused);
#pragma unroll
            for (int i = 0; i < Logits::kSize; ++i) {
                const float slope = divergence_slope<kKind>(x[i], y[i], call.beta, at_largest, above);
                x[i] = row.ignored ? 0.0f : slope * upstream * slopes[i];
            }
            store_chunk(gradient, first, student.size, x);
        }
    }
}

}  // namespace r1kernels::logprob
