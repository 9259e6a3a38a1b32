// Launcher of the backward of the log-prob ops, for every architecture from sm_80 on.
#include "logprob/cuda_backward.cuh"
#include "logprob/cuda_launch.cuh"

using namespace r1kernels;
using namespace r1kernels::logprob;

namespace {

template <class Scalar, class Gradient>
int launch_backward(const R1kernelsTokenLogprobs& call, const R1kernelsLogprobGradients& from, void* grad_logits,
                    int64_t grad_batch_stride, int64_t grad_token_stride, void* stream) {
    const Partition partition = partition_of(call);
    return with_mode(is_transformed(call), from.grad_entropy != nullptr, [=](auto mode) {
        return launch(backward_kernel<Scalar, Gradient, mode()>, blocks_of(partition), kThreads, 0, stream, call, from,
                      partition, grad_logits, grad_batch_stride, grad_token_stride);
    });
}

}  // namespace

int r1kernels_token_logprobs_cuda_backward(const R1kernelsTokenLogprobs* call, const R1kernelsLogprobGradients* from,
                                           void* grad_logits, Element grad_element,
                                           int64_t grad_batch_stride, int64_t grad_token_stride, void* stream) {
    return with_scalar(call->element, [=](auto zero) {
        using Scalar = decltype(zero);
        const auto run = [=](auto gradient) {
            return launch_backward<Scalar, decltype(gradient)>(*call, *from, grad_logits, grad_batch_stride,
                                                               grad_token_stride, stream);
        };
        if constexpr (std::is_same_v<Scalar, float>) return with_scalar(grad_element, run);
        return grad_element == call->element ? run(zero) : static_cast<int>(cudaErrorInvalidValue);
    });
}
