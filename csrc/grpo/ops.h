// What the torch ops of grpo_loss and group_advantages share on all devices: they check what the kernels trust, and
// allocate. Schemas and fakes stand in r1kernels/grpo/loss.py, where the arguments are explained.
#pragma once

#include <optional>
#include <tuple>

#include "common/stable.h"
#include "grpo/advantages.h"
#include "grpo/call.h"

namespace r1kernels {

using Optional = std::optional<Tensor>;

// --- grpo_loss ---

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

constexpr int64_t kMetrics = 13;

inline float* data(const Tensor& tensor) { return static_cast<float*>(tensor.data_ptr()); }

inline const void* values(const char* name, const Tensor& tensor, int64_t count, const Tensor& like) {
    STD_TORCH_CHECK(tensor.is_contiguous() && tensor.numel() == count, name, ": expected ", count,
                    " contiguous values, got ", tensor.numel());
    STD_TORCH_CHECK(tensor.device() == like.device(), name, ": expected a tensor on the device of logp");
    return tensor.data_ptr();
}

inline const float* floats(const char* name, const Tensor& tensor, int64_t count, const Tensor& like) {
    STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float, name, ": expected float32");
    return static_cast<const float*>(values(name, tensor, count, like));
}

inline const float* floats(const char* name, const Optional& tensor, int64_t count, const Tensor& like) {
    return tensor ? floats(name, *tensor, count, like) : nullptr;
}

inline int32_t integer_bytes(const char* name, const Tensor& tensor) {
    const ScalarType dtype = tensor.scalar_type();
    STD_TORCH_CHECK(dtype == ScalarType::Bool || dtype == ScalarType::Byte || dtype == ScalarType::Char ||
                        dtype == ScalarType::Short || dtype == ScalarType::Int || dtype == ScalarType::Long,
                    name, ": expected bool or integers");
    return static_cast<int32_t>(tensor.element_size());
}

// Whether the values are one per token; (B, 1): one per sequence.
inline bool per_token(const Tensor& tensor, const R1kernelsGrpo& call) {
    return !(tensor.dim() == 2 && tensor.size(0) == call.sequences && tensor.size(1) == 1);
}

// Mask and boundaries.
inline R1kernelsGrpo layout_of(const Tensor& mask, const Optional& cu_seqlens) {
    R1kernelsGrpo call = {};
    call.tokens = mask.numel();
    call.mask_bytes = integer_bytes("mask", mask);
    call.mask = values("mask", mask, call.tokens, mask);
    if (!cu_seqlens) {
        STD_TORCH_CHECK(mask.dim() == 2, "mask: expected shape (B, T), got ", mask.dim(), " dimensions");
        call.sequences = mask.size(0);
        call.width = mask.size(1);
        return call;
    }
    STD_TORCH_CHECK(mask.dim() == 1, "mask: expected shape (N,) with cu_seqlens, got ", mask.dim(), " dimensions");
    call.sequences = cu_seqlens->numel() - 1;
    STD_TORCH_CHECK(call.sequences > 0 || (call.sequences == 0 && call.tokens == 0),
                    "cu_seqlens: expected shape (B + 1,) with B >= 1");
    call.cu_seqlens_bytes = integer_bytes("cu_seqlens", *cu_seqlens);
    STD_TORCH_CHECK(call.cu_seqlens_bytes >= 4, "cu_seqlens: expected int32 or int64");
    call.cu_seqlens = values("cu_seqlens", *cu_seqlens, call.sequences + 1, mask);
    return call;
}

using Allocate = Tensor (*)(const Tensor& like, Shape shape, ScalarType dtype);
using Run = void (*)(const R1kernelsGrpo& call, const Tensor& logp);

// The op, by what a device has to run.
template <Run run, Allocate allocate>
Outputs forward(const Tensor& logp, const Optional& old_logp, const Tensor& advantages, const Tensor& mask,
                const Optional& ref_logp, const Optional& policy_weights, const Optional& entropy,
                const Optional& entropy_weights, const Optional& weights, const Optional& cu_seqlens,
                const Tensor& numbers, const Optional& total, int64_t variant, int64_t ratio, int64_t kl, int64_t count,
                bool logp_gradient, bool entropy_gradient) {
    R1kernelsGrpo call = layout_of(mask, cu_seqlens);
    call.logp = floats("logp", logp, call.tokens, mask);
    call.old_logp = floats("old_logp", old_logp, call.tokens, mask);
    call.ref_logp = floats("ref_logp", ref_logp, call.tokens, mask);
    call.advantages_per_token = per_token(advantages, call);
    call.advantages =
        floats("advantages", advantages, call.advantages_per_token ? call.tokens : call.sequences, mask);
    if (policy_weights) {
        call.policy_weights_per_token = per_token(*policy_weights, call);
        call.policy_weights = floats("policy_weights", *policy_weights,
                                     call.policy_weights_per_token ? call.tokens : call.sequences, mask);
    }
    call.entropy = floats("entropy", entropy, call.tokens, mask);
    call.entropy_weights = floats("entropy_weights", entropy_weights, call.tokens, mask);
    call.weights = floats("weights", weights, call.tokens, mask);
    call.total = floats("total", total, 1, mask);
    constexpr int64_t number_count = sizeof(R1kernelsGrpoNumbers) / sizeof(float);
    STD_TORCH_CHECK(numbers.scalar_type() == ScalarType::Float && numbers.is_contiguous() && numbers.is_cpu() &&
                        numbers.numel() == number_count,
                    "numbers: expected ", number_count, " float32 values on the CPU");
    call.numbers = *static_cast<const R1kernelsGrpoNumbers*>(numbers.data_ptr());
    call.variant = static_cast<int32_t>(variant);
    call.ratio = static_cast<int32_t>(ratio);
    call.kl = static_cast<int32_t>(kl);
    call.count = static_cast<int32_t>(count);
    const auto empty = [&](Shape shape) { return allocate(logp, shape, ScalarType::Float); };
    const bool of_ratio = logp_gradient && call.ratio != R1KERNELS_RATIO_TOKEN;
    Outputs outputs = {empty({}), empty({kMetrics}), logp_gradient ? empty(logp.sizes()) : empty({0}),
                       empty({of_ratio ? call.sequences : 0}), entropy_gradient ? empty(logp.sizes()) : empty({0})};
    call.loss = data(std::get<0>(outputs));
    call.metrics = data(std::get<1>(outputs));
    call.grad_logp = logp_gradient ? data(std::get<2>(outputs)) : nullptr;
    call.grad_of_ratio = of_ratio ? data(std::get<3>(outputs)) : nullptr;
    call.grad_entropy = entropy_gradient ? data(std::get<4>(outputs)) : nullptr;
    run(call, logp);
    return outputs;
}

// --- group_advantages ---

inline const void* entries(const char* name, const Tensor& tensor, ScalarType dtype, const Tensor& rewards) {
    STD_TORCH_CHECK(tensor.scalar_type() == dtype, name, ": wrong dtype");
    STD_TORCH_CHECK(tensor.is_contiguous() && tensor.numel() == rewards.numel(), name, ": expected ", rewards.numel(),
                    " contiguous values, got ", tensor.numel());
    STD_TORCH_CHECK(tensor.device() == rewards.device(), name, ": expected a tensor on the device of the rewards");
    return tensor.data_ptr();
}

inline R1kernelsAdvantages call_of(const Tensor& rewards, int64_t group_size, const Optional& group_ids,
                                   const Optional& valid, int64_t scale, const Tensor& eps, bool leave_one_out,
                                   const Tensor& advantages) {
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
    STD_TORCH_CHECK(eps.is_cpu() && eps.scalar_type() == ScalarType::Double && eps.numel() == 1,
                    "eps: expected a float64 number on the CPU");
    call.eps = static_cast<float>(*static_cast<const double*>(eps.data_ptr()));
    call.scale = static_cast<int32_t>(scale);
    call.leave_one_out = leave_one_out;
    call.advantages = static_cast<float*>(advantages.data_ptr());
    return call;
}

}  // namespace r1kernels
