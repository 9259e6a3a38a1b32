// Sums over the rows of a token, and over the parts of a row.
#pragma once

#include "common/elements.cuh"
#include "moe/cuda.h"

namespace r1kernels::moe {

constexpr int kSumThreads = 256;

// A thread takes one chunk of the columns of one token after the other.
template <class Scalar>
__global__ __launch_bounds__(kSumThreads) void combine_kernel(R1kernelsMoeCombine combine, int64_t chunks) {
    constexpr int kSize = Chunk<Scalar>::kSize;
    const int size = static_cast<int>(combine.columns);
    const int limit = combine.bounds[combine.experts];
    const int64_t stride = int64_t{gridDim.x} * kSumThreads;
    for (int64_t i = int64_t{blockIdx.x} * kSumThreads + threadIdx.x; i < combine.tokens * chunks; i += stride) {
        const int64_t token = i / chunks;
        const int column = static_cast<int>(i - token * chunks) * kSize;
        float sums[kSize] = {};
#pragma unroll 4
        for (int64_t k = token * combine.top_k; k < (token + 1) * combine.top_k; ++k) {
            const int64_t row = combine.inverse[k];
            if (row >= limit) continue;  // of nobody: it was never written
            const float weight = combine.weights ? combine.weights[k] : 1.0f;
            const Chunk<Scalar> values =
                load_chunk(static_cast<const Scalar*>(combine.rows) + row * size, column, size);
#pragma unroll
            for (int j = 0; j < kSize; ++j) sums[j] += weight * values[j];
        }
        Scalar out[kSize];
#pragma unroll
        for (int j = 0; j < kSize; ++j) out[j] = from_float<Scalar>(sums[j]);
        store_chunk(static_cast<Scalar*>(combine.out) + token * size, column, size, out);
    }
}

__global__ __launch_bounds__(kSumThreads) void sum_partials_kernel(R1kernelsMoeSchedule schedule,
                                                                   const float* partials, int64_t parts,
                                                                   const int32_t* permutation, float* grad) {
    const int64_t stride = int64_t{gridDim.x} * kSumThreads;
    const int limit = schedule.bounds[schedule.experts];
    for (int64_t row = int64_t{blockIdx.x} * kSumThreads + threadIdx.x; row < schedule.rows; row += stride) {
        float sum = 0.0f;
        if (row < limit) {
            for (int64_t part = 0; part < parts; ++part) sum += partials[part * schedule.rows + row];
        }
        grad[permutation[row]] = sum;
    }
}

}  // namespace r1kernels::moe
