// The arithmetic of group_advantages, in float64, for the CPU and for CUDA. Plain C types only.
#pragma once

#include <cmath>
#include <cstdint>

#include "grpo/call.h"

extern "C" {

enum R1kernelsAdvantageScale { R1KERNELS_SCALE_GROUP, R1KERNELS_SCALE_BATCH, R1KERNELS_SCALE_NONE };

struct R1kernelsAdvantages {
    int64_t size;              // B
    const float* rewards;      // (B)
    const int64_t* group_ids;  // (B), or null: runs of group_size entries are the groups
    int64_t group_size;
    const bool* valid;  // (B), or null: all
    int32_t scale;      // an R1kernelsAdvantageScale
    int32_t leave_one_out;
    double eps;
    float* advantages;  // (B)
};

}  // extern "C"

namespace r1kernels {

struct RewardStatistics {
    double count, sum;
    double std;  // the unbiased one; 0 for fewer than two
    bool equal;  // no two of them differ
};

// Of the rewards that members(see) shows one by one to see(reward).
template <class Members>
R1KERNELS_GRPO_BOTH inline RewardStatistics statistics_of(const Members& members) {
    RewardStatistics all = {0, 0, 0, false};
    double lowest = INFINITY, highest = -INFINITY, squares = 0;
    members([&](double reward) {
        all.count += 1;
        all.sum += reward;
        lowest = reward < lowest ? reward : lowest;
        highest = reward > highest ? reward : highest;
    });
    const double mean = all.sum / (all.count > 1 ? all.count : 1);
    members([&](double reward) { squares += (reward - mean) * (reward - mean); });
    all.std = sqrt(squares / (all.count > 2 ? all.count - 1 : 1));
    all.equal = highest <= lowest && all.sum == all.sum;  // a NaN is not equal to anything
    return all;
}

// `batch_std`: of all valid rewards, for the scale "batch".
R1KERNELS_GRPO_BOTH inline float advantage_of(const R1kernelsAdvantages& call, double reward,
                                              const RewardStatistics& group, double batch_std) {
    // equal rewards have no advantage, exactly: the rounding of their mean must not become one
    if (group.count < 2 || group.equal) return 0.0f;
    if (call.leave_one_out) return static_cast<float>(reward - (group.sum - reward) / (group.count - 1));
    const double centred = reward - group.sum / group.count;
    if (call.scale == R1KERNELS_SCALE_NONE) return static_cast<float>(centred);
    const double std = call.scale == R1KERNELS_SCALE_GROUP ? group.std : batch_std;
    return static_cast<float>(centred / (std + call.eps));
}

}  // namespace r1kernels
