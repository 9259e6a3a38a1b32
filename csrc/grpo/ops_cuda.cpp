// The torch ops of grpo_loss and group_advantages on CUDA.
#ifdef R1KERNELS_CUDA

#include "common/cuda_host.h"
#include "grpo/cuda.h"
#include "grpo/ops.h"

namespace r1kernels {

namespace {

void run(const R1kernelsGrpo& call, const Tensor& logp) {
    const CudaHost host(logp);
    const Tensor workspace = host.allocate(r1kernels_grpo_loss_cuda_workspace(&call));
    host.check(r1kernels_grpo_loss_cuda(&call, workspace.data_ptr(), host.stream));
}

std::tuple<Tensor, Tensor> backward(const Tensor& grad_loss, const Tensor& grad_logp, const Tensor& grad_of_ratio,
                                    const Tensor& grad_entropy, const Tensor& mask, const Optional& cu_seqlens,
                                    const Optional& logp) {
    R1kernelsGrpo call = layout_of(mask, cu_seqlens);
    call.logp = floats("logp", logp, call.tokens, mask);
    const CudaHost host(mask);
    const float* of_ratio =
        grad_of_ratio.numel() > 0 ? floats("grad_of_ratio", grad_of_ratio, call.sequences, mask) : nullptr;
    const auto given = [&](const char* name, const Tensor& grad) {
        return grad.numel() > 0 ? floats(name, grad, call.tokens, mask) : nullptr;
    };
    const Tensor to_logp = empty_on(grad_logp, grad_logp.sizes(), ScalarType::Float);
    const Tensor to_entropy = empty_on(grad_entropy, grad_entropy.sizes(), ScalarType::Float);
    host.check(r1kernels_grpo_loss_cuda_backward(&call, floats("grad_loss", grad_loss, 1, mask), of_ratio,
                                                 given("grad_logp", grad_logp), given("grad_entropy", grad_entropy),
                                                 data(to_logp), data(to_entropy), host.stream));
    return {to_logp, to_entropy};
}

Tensor advantages(const Tensor& rewards, int64_t group_size, const Optional& group_ids, const Optional& valid,
                  int64_t scale, const Tensor& eps, bool leave_one_out) {
    const CudaHost host(rewards);
    Tensor results = empty_on(rewards, rewards.sizes(), ScalarType::Float);
    const R1kernelsAdvantages call =
        call_of(rewards, group_size, group_ids, valid, scale, eps, leave_one_out, results);
    host.check(r1kernels_group_advantages_cuda(&call, host.stream));
    return results;
}

STABLE_TORCH_LIBRARY_IMPL(r1kernels, CUDA, library) {
    library.impl("grpo_loss_cuda", TORCH_BOX((&forward<run, empty_on>)));
    library.impl("grpo_loss_cuda_backward", TORCH_BOX(&backward));
    library.impl("group_advantages_cuda", TORCH_BOX(&advantages));
}

}  // namespace

}  // namespace r1kernels

#endif
