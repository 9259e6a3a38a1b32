// The torch ops of grpo_loss: they check what the kernels trust, allocate, and share the items out.
// Schemas and fakes stand in r1kernels/grpo/ops.py, where the arguments are explained.
#include <memory>
#include <optional>
#include <tuple>

#include "common/kept.h"
#include "common/stable.h"
#include "grpo/call.h"
#include "grpo/cpu.h"
#include "grpo/cuda.h"
#include "logprob/cuda.h"  // r1kernels_cuda_error

namespace r1kernels {

namespace {

using torch::stable::parallel_for;
using Optional = std::optional<Tensor>;
using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

constexpr int64_t kTokensOfThread = 16384;  // fewer are not worth a second thread
constexpr int64_t kCountedForOne = 16;      // tokens that are counted in the time in which one is computed
constexpr int64_t kMetrics = 12;

const void* values(const char* name, const Tensor& tensor, int64_t count, const Tensor& like) {
    STD_TORCH_CHECK(tensor.is_contiguous() && tensor.numel() == count, name, ": expected ", count,
                    " contiguous values, got ", tensor.numel());
    STD_TORCH_CHECK(tensor.device() == like.device(), name, ": expected a tensor on the device of logp");
    return tensor.data_ptr();
}

const float* floats(const char* name, const Tensor& tensor, int64_t count, const Tensor& like) {
    STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float, name, ": expected float32");
    return static_cast<const float*>(values(name, tensor, count, like));
}

const float* floats(const char* name, const Optional& tensor, int64_t count, const Tensor& like) {
    return tensor ? floats(name, *tensor, count, like) : nullptr;
}

int32_t integer_bytes(const char* name, const Tensor& tensor) {
    const ScalarType dtype = tensor.scalar_type();
    STD_TORCH_CHECK(dtype == ScalarType::Bool || dtype == ScalarType::Byte || dtype == ScalarType::Char ||
                        dtype == ScalarType::Short || dtype == ScalarType::Int || dtype == ScalarType::Long,
                    name, ": expected bool or integers");
    return static_cast<int32_t>(tensor.element_size());
}

// Whether the values are one a token; (B, 1): one a sequence.
bool per_token(const Tensor& tensor, const R1kernelsGrpo& call) {
    return !(tensor.dim() == 2 && tensor.size(0) == call.sequences && tensor.size(1) == 1);
}

// Mask and boundaries.
R1kernelsGrpo layout_of(const Tensor& mask, const Optional& cu_seqlens) {
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

R1kernelsGrpo call_of(const Tensor& logp, const Optional& old_logp, const Tensor& advantages, const Tensor& mask,
                      const Optional& ref_logp, const Optional& policy_weights, const Optional& entropy,
                      const Optional& entropy_weights, const Optional& weights, const Optional& cu_seqlens,
                      const Tensor& numbers, const Optional& total, int64_t variant, int64_t ratio, int64_t kl,
                      int64_t count) {
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
    return call;
}

float* data(const Tensor& tensor) { return static_cast<float*>(tensor.data_ptr()); }

typedef Tensor (*Allocate)(const Tensor& like, Shape shape, ScalarType dtype);

// Allocates the outputs and notes them in the call.
Outputs outputs_of(R1kernelsGrpo& call, Allocate allocate, const Tensor& logp, bool logp_gradient,
                   bool entropy_gradient) {
    const auto empty = [&](Shape shape) { return allocate(logp, shape, ScalarType::Float); };
    const bool of_ratio = logp_gradient && call.ratio != R1KERNELS_RATIO_TOKEN;
    Outputs outputs = {empty({}), empty({kMetrics}), logp_gradient ? empty(logp.sizes()) : empty({0}),
                       empty({of_ratio ? call.sequences : 0}), entropy_gradient ? empty(logp.sizes()) : empty({0})};
    call.loss = data(std::get<0>(outputs));
    call.metrics = data(std::get<1>(outputs));
    call.grad_logp = logp_gradient ? data(std::get<2>(outputs)) : nullptr;
    call.grad_of_ratio = of_ratio ? data(std::get<3>(outputs)) : nullptr;
    call.grad_entropy = entropy_gradient ? data(std::get<4>(outputs)) : nullptr;
    return outputs;
}

// --- CPU ---

// Python checks the boundaries in eager mode with better errors; a compiled graph comes here unchecked.
void check_boundaries(const R1kernelsGrpo& call) {
    if (call.cu_seqlens == nullptr) return;
    const auto boundary = [&](int64_t i) {
        return call.cu_seqlens_bytes == 8 ? static_cast<const int64_t*>(call.cu_seqlens)[i]
                                          : static_cast<const int32_t*>(call.cu_seqlens)[i];
    };
    bool rising = boundary(0) == 0 && boundary(call.sequences) == call.tokens;
    for (int64_t i = 0; i < call.sequences; ++i) rising = rising && boundary(i) <= boundary(i + 1);
    STD_TORCH_CHECK(rising, "cu_seqlens: expected 0, ..., ", call.tokens, " without a fall");
}

int64_t items_of_thread(const R1kernelsGrpo& call, int64_t items) {
    const int64_t tokens_of_item = items == 0 ? 1 : call.tokens / items + 1;
    return kTokensOfThread / tokens_of_item + 1;
}

Outputs forward_cpu(const Tensor& logp, const Optional& old_logp, const Tensor& advantages, const Tensor& mask,
                    const Optional& ref_logp, const Optional& policy_weights, const Optional& entropy,
                    const Optional& entropy_weights, const Optional& weights, const Optional& cu_seqlens,
                    const Tensor& numbers, const Optional& total, int64_t variant, int64_t ratio, int64_t kl,
                    int64_t count, bool logp_gradient, bool entropy_gradient) {
    R1kernelsGrpo call = call_of(logp, old_logp, advantages, mask, ref_logp, policy_weights, entropy, entropy_weights,
                                 weights, cu_seqlens, numbers, total, variant, ratio, kl, count);
    check_boundaries(call);
    Outputs outputs = outputs_of(call, kept_on, logp, logp_gradient, entropy_gradient);
    const GrpoKernels& kernels = chosen_grpo_kernels();
    const int64_t items = r1kernels_grpo_items(call, kGrpoChunk), grain = items_of_thread(call, items);
    const std::unique_ptr<double[]> memory(new double[kernels.workspace_bytes(call, items) / sizeof(double) + 1]);
    void* workspace = memory.get();
    if (r1kernels_grpo_needs_first_pass(call)) {
        const bool counts = !r1kernels_grpo_sums_over_sequences(call);  // the mask alone is read
        parallel_for(0, items, counts ? kCountedForOne * grain : grain, [&](int64_t begin, int64_t end) {
            kernels.first_pass(call, workspace, items, begin, end);
        });
    }
    kernels.between(call, workspace, items);
    parallel_for(0, items, grain, [&](int64_t begin, int64_t end) {
        kernels.second_pass(call, workspace, items, begin, end);
    });
    kernels.finish(call, workspace, items);
    return outputs;
}

std::tuple<Tensor, Tensor> backward_cpu(const Tensor& grad_loss, const Tensor& grad_logp, const Tensor& grad_of_ratio,
                                        const Tensor& grad_entropy, const Tensor& mask, const Optional& cu_seqlens) {
    const R1kernelsGrpo call = layout_of(mask, cu_seqlens);
    check_boundaries(call);
    const float factor = *floats("grad_loss", grad_loss, 1, mask);
    const float* of_ratio =
        grad_of_ratio.numel() > 0 ? floats("grad_of_ratio", grad_of_ratio, call.sequences, mask) : nullptr;
    const GrpoKernels& kernels = chosen_grpo_kernels();
    const int64_t items = r1kernels_grpo_items(call, kGrpoChunk);
    const auto scaled = [&](const char* name, const Tensor& grad, const float* shared) {
        Tensor result = kept_on(grad, grad.sizes(), ScalarType::Float);
        if (grad.numel() == 0) return result;
        const float* from = floats(name, grad, call.tokens, mask);
        float* to = data(result);
        parallel_for(0, items, items_of_thread(call, items), [&](int64_t begin, int64_t end) {
            kernels.backward(call, factor, shared, from, to, begin, end);
        });
        return result;
    };
    return {scaled("grad_logp", grad_logp, of_ratio), scaled("grad_entropy", grad_entropy, nullptr)};
}

STABLE_TORCH_LIBRARY_IMPL(r1kernels, CPU, library) {
    library.impl("grpo_loss_cpu", TORCH_BOX(&forward_cpu));
    library.impl("grpo_loss_cpu_backward", TORCH_BOX(&backward_cpu));
}

// --- CUDA ---

#ifdef R1KERNELS_CUDA

void check_launch(int code) { STD_TORCH_CHECK(code == 0, "CUDA: ", r1kernels_cuda_error(code)); }

Outputs forward_cuda(const Tensor& logp, const Optional& old_logp, const Tensor& advantages, const Tensor& mask,
                     const Optional& ref_logp, const Optional& policy_weights, const Optional& entropy,
                     const Optional& entropy_weights, const Optional& weights, const Optional& cu_seqlens,
                     const Tensor& numbers, const Optional& total, int64_t variant, int64_t ratio, int64_t kl,
                     int64_t count, bool logp_gradient, bool entropy_gradient) {
    R1kernelsGrpo call = call_of(logp, old_logp, advantages, mask, ref_logp, policy_weights, entropy, entropy_weights,
                                 weights, cu_seqlens, numbers, total, variant, ratio, kl, count);
    const int32_t device = logp.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    Outputs outputs = outputs_of(call, empty_on, logp, logp_gradient, entropy_gradient);
    const int64_t bytes = static_cast<int64_t>(r1kernels_grpo_loss_cuda_workspace(&call));
    const Tensor workspace = empty_on(logp, {bytes}, ScalarType::Byte);
    check_launch(r1kernels_grpo_loss_cuda(&call, workspace.data_ptr(), current_stream(device)));
    return outputs;
}

std::tuple<Tensor, Tensor> backward_cuda(const Tensor& grad_loss, const Tensor& grad_logp, const Tensor& grad_of_ratio,
                                         const Tensor& grad_entropy, const Tensor& mask, const Optional& cu_seqlens) {
    const R1kernelsGrpo call = layout_of(mask, cu_seqlens);
    const int32_t device = mask.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    const float* of_ratio =
        grad_of_ratio.numel() > 0 ? floats("grad_of_ratio", grad_of_ratio, call.sequences, mask) : nullptr;
    const auto given = [&](const char* name, const Tensor& grad) {
        return grad.numel() > 0 ? floats(name, grad, call.tokens, mask) : nullptr;
    };
    const Tensor to_logp = empty_on(grad_logp, grad_logp.sizes(), ScalarType::Float);
    const Tensor to_entropy = empty_on(grad_entropy, grad_entropy.sizes(), ScalarType::Float);
    check_launch(r1kernels_grpo_loss_cuda_backward(&call, floats("grad_loss", grad_loss, 1, mask), of_ratio,
                                                   given("grad_logp", grad_logp), given("grad_entropy", grad_entropy),
                                                   data(to_logp), data(to_entropy), current_stream(device)));
    return {to_logp, to_entropy};
}

STABLE_TORCH_LIBRARY_IMPL(r1kernels, CUDA, library) {
    library.impl("grpo_loss_cuda", TORCH_BOX(&forward_cuda));
    library.impl("grpo_loss_cuda_backward", TORCH_BOX(&backward_cuda));
}

#endif

}  // namespace

}  // namespace r1kernels
