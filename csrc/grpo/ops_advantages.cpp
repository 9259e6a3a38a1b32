// The torch op of group_advantages on the CPU.
#include <algorithm>
#include <numeric>
#include <vector>

#include "grpo/ops.h"

namespace r1kernels {

namespace {

// The valid entries of order[first, end).
auto members_of(const R1kernelsAdvantages& call, const int64_t* first, const int64_t* end) {
    return [=, &call](auto see) {
        for (const int64_t* entry = first; entry < end; ++entry) {
            if (call.valid == nullptr || call.valid[*entry]) see(static_cast<double>(call.rewards[*entry]));
        }
    };
}

Tensor advantages_cpu(const Tensor& rewards, int64_t group_size, const Optional& group_ids, const Optional& valid,
                      int64_t scale, const Tensor& eps, bool leave_one_out) {
    Tensor advantages = empty_on(rewards, rewards.sizes(), ScalarType::Float);
    const R1kernelsAdvantages call =
        call_of(rewards, group_size, group_ids, valid, scale, eps, leave_one_out, advantages);
    std::vector<int64_t> order(call.size);
    std::iota(order.begin(), order.end(), int64_t{0});
    const auto group_of = [&](int64_t i) { return call.group_ids ? call.group_ids[i] : i / call.group_size; };
    if (call.group_ids) {
        std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return group_of(a) < group_of(b); });
    }
    const int64_t* const all_end = order.data() + call.size;
    const double batch_std =
        call.scale == R1KERNELS_SCALE_BATCH ? statistics_of(members_of(call, order.data(), all_end)).std : 0.0;
    for (const int64_t *first = order.data(), *end; first < all_end; first = end) {
        end = std::find_if(first, all_end, [&](int64_t i) { return group_of(i) != group_of(*first); });
        const RewardStatistics group = statistics_of(members_of(call, first, end));
        for (const int64_t* entry = first; entry < end; ++entry) {
            const bool counts = call.valid == nullptr || call.valid[*entry];
            call.advantages[*entry] =
                counts ? advantage_of(call, static_cast<double>(call.rewards[*entry]), group, batch_std) : 0.0f;
        }
    }
    return advantages;
}

STABLE_TORCH_LIBRARY_IMPL(r1kernels, CPU, library) {
    library.impl("group_advantages_cpu", TORCH_BOX(&advantages_cpu));
}

}  // namespace

}  // namespace r1kernels
