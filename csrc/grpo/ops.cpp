// The torch ops of grpo_loss on the CPU: they share the items out.
#include "grpo/ops.h"

#include <memory>

#include "common/kept.h"
#include "grpo/cpu.h"

namespace r1kernels {

namespace {

using torch::stable::parallel_for;

constexpr int64_t kTokensOfThread = 16384;  // fewer are not worth a second thread
constexpr int64_t kCountedForOne = 16;      // tokens that are counted in the time in which one is computed

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

void run(const R1kernelsGrpo& call, const Tensor&) {
    check_boundaries(call);
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
}

std::tuple<Tensor, Tensor> backward(const Tensor& grad_loss, const Tensor& grad_logp, const Tensor& grad_of_ratio,
                                    const Tensor& grad_entropy, const Tensor& mask, const Optional& cu_seqlens,
                                    const Optional& logp) {
    R1kernelsGrpo call = layout_of(mask, cu_seqlens);
    call.logp = floats("logp", logp, call.tokens, mask);
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
    library.impl("grpo_loss_cpu", TORCH_BOX((&forward<run, kept_on>)));
    library.impl("grpo_loss_cpu_backward", TORCH_BOX(&backward));
}

}  // namespace

}  // namespace r1kernels
