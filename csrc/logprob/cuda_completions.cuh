// Sums over the tokens of completions, and the completion of each token. B completions, N tokens.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/warp.cuh"

namespace r1kernels::logprob {

constexpr int kCompletionThreads = 256;

// One warp a completion: a lane adds every 32nd value in their order, then the lanes are added as a tree, so that a
// completion has the same bits in any company.
__global__ void __launch_bounds__(kCompletionThreads)
    completion_sums_kernel(const float* values, int64_t tokens, const int64_t* cu_seqlens, int64_t completions,
                           float* sums) {
    constexpr int kWarpsOfBlock = kCompletionThreads / kWarpSize;
    for (int64_t i = blockIdx.x * int64_t{kWarpsOfBlock} + threadIdx.x / kWarpSize; i < completions;
         i += int64_t{gridDim.x} * kWarpsOfBlock) {
        const int64_t length = tokens / completions;
        const int64_t first = cu_seqlens == nullptr ? i * length : cu_seqlens[i];
        const int64_t last = cu_seqlens == nullptr ? first + length : cu_seqlens[i + 1];
        const bool valid = 0 <= first && first <= last && last <= tokens;
        float sum = valid ? 0.0f : NAN;
        for (int64_t token = first + lane_id(); valid && token < last; token += kWarpSize) sum += values[token];
        sum = warp_sum(sum);
        if (lane_id() == 0) sums[i] = sum;
    }
}

// One thread per token: the last completion that begins at or before it, by halving.
__global__ void __launch_bounds__(kCompletionThreads)
    completion_numbers_kernel(const int64_t* cu_seqlens, int64_t completions, int64_t tokens, int32_t* numbers) {
    for (int64_t token = blockIdx.x * int64_t{kCompletionThreads} + threadIdx.x; token < tokens;
         token += int64_t{gridDim.x} * kCompletionThreads) {
        int64_t low = 0, high = completions;  // cu_seqlens[low] <= token < cu_seqlens[high], if any completion holds it
        while (high - low > 1) {
            const int64_t middle = (low + high) / 2;
            (cu_seqlens[middle] <= token ? low : high) = middle;
        }
        const bool held = completions > 0 && cu_seqlens[low] <= token && token < cu_seqlens[low + 1];
        numbers[token] = held ? static_cast<int32_t>(low) : -1;
    }
}

}  // namespace r1kernels::logprob
