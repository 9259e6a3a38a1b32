// group_advantages in one launch: a thread for each reward walks those of its group, or all where ids name the groups.
#pragma once

#include <cuda_runtime.h>

#include "grpo/advantages.h"

namespace r1kernels::grpo {

constexpr int kAdvantageThreads = 128;

__global__ void __launch_bounds__(kAdvantageThreads) advantages_kernel(R1kernelsAdvantages call) {
    const int64_t step = gridDim.x * int64_t{kAdvantageThreads};
    for (int64_t i = blockIdx.x * int64_t{kAdvantageThreads} + threadIdx.x; i < call.size; i += step) {
        const auto is_valid = [&](int64_t j) { return call.valid == nullptr || call.valid[j]; };
        const auto group = [&](auto see) {
            const int64_t first = call.group_ids == nullptr ? i / call.group_size * call.group_size : 0;
            const int64_t end = call.group_ids == nullptr ? first + call.group_size : call.size;
            for (int64_t j = first; j < end; ++j) {
                const bool member = call.group_ids == nullptr || call.group_ids[j] == call.group_ids[i];
                if (member && is_valid(j)) see(static_cast<double>(call.rewards[j]));
            }
        };
        const auto batch = [&](auto see) {
            for (int64_t j = 0; j < call.size; ++j) {
                if (is_valid(j)) see(static_cast<double>(call.rewards[j]));
            }
        };
        float advantage = 0.0f;
        if (is_valid(i)) {
            const double batch_std = call.scale == R1KERNELS_SCALE_BATCH ? statistics_of(batch).std : 0.0;
            advantage = advantage_of(call, call.rewards[i], statistics_of(group), batch_std);
        }
        call.advantages[i] = advantage;
    }
}

}  // namespace r1kernels::grpo
