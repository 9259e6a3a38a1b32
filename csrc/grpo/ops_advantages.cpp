// The torch ops of group_advantages. Schemas and fakes stand in r1kernels/grpo/ops.py.
#include <algorithm>
#include <numeric>
#include <optional>
#include <vector>

#include "common/stable.h"
#include "grpo/advantages.h"
#include "grpo/cuda.h"
#include "logprob/cuda.h"  // r1kernels_cuda_error

namespace r1kernels {

namespace {

using Optional = std::optional<Tensor>;

const void* entries(const char* name, const Tensor& tensor, ScalarType dtype, const Tensor& rewards) {
    STD_TORCH_CHECK(tensor.scalar_type() == dtype, name, ": wrong dtype");
    STD_TORCH_CHECK(tensor.is_contiguous() && tensor.numel() == rewards.numel(), name, ": expected ", rewards.numel(),
                    " contiguous values, got ", tensor.numel());
    STD_TORCH_CHECK(tensor.device() == rewards.device(), name, ": expected a tensor on the device of the rewards");
    return tensor.data_ptr();
}

R1kernelsAdvantages call_of(const Tensor& rewards, int64_t group_size, const Optional& group_ids, const Optional& valid,
                            int64_t scale, const Tensor& eps, bool leave_one_out, const Tensor& advantages) {
    R1kernelsAdvantages call = {};
    call.size = rewards.numel();
    call.rewards = static_cast<const float*>(entries("rewards", rewards, ScalarType::Float, rewards));
    if (group_ids) {
        call.group_ids = static_cast<const int64_t*>(entries("group_ids", *group_ids, ScalarType::Long, rewards));
    } else {
        STD_TORCH_CHECK(group_size > 0 && call.size % group_size == 0, "group_size: expected a divisor of ", call.size,
                        ", got ", group_size);
    }
    call.group_size = group_size;
    if (valid) call.valid = static_cast<const bool*>(entries("valid", *valid, ScalarType::Bool, rewards));
    STD_TORCH_CHECK(eps.is_cpu() && eps.scalar_type() == ScalarType::Float && eps.numel() == 1,
                    "eps: expected a float32 number on the CPU");
    call.eps = *static_cast<const float*>(eps.data_ptr());
    call.scale = static_cast<int32_t>(scale);
    call.leave_one_out = leave_one_out;
    call.advantages = static_cast<float*>(advantages.data_ptr());
    return call;
}

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

#ifdef R1KERNELS_CUDA

Tensor advantages_cuda(const Tensor& rewards, int64_t group_size, const Optional& group_ids, const Optional& valid,
                       int64_t scale, const Tensor& eps, bool leave_one_out) {
    const int32_t device = rewards.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    Tensor advantages = empty_on(rewards, rewards.sizes(), ScalarType::Float);
    const R1kernelsAdvantages call =
        call_of(rewards, group_size, group_ids, valid, scale, eps, leave_one_out, advantages);
    const int code = r1kernels_group_advantages_cuda(&call, current_stream(device));
    STD_TORCH_CHECK(code == 0, "CUDA: ", r1kernels_cuda_error(code));
    return advantages;
}

STABLE_TORCH_LIBRARY_IMPL(r1kernels, CUDA, library) {
    library.impl("group_advantages_cuda", TORCH_BOX(&advantages_cuda));
}

#endif

}  // namespace

}  // namespace r1kernels
