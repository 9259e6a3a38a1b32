// Launchers of token_logprobs for every architecture from sm_80 on.
#include "common/launch.cuh"
#include "logprob/cuda.cuh"

using namespace r1kernels;
using namespace r1kernels::logprob;

namespace {

// run(a value of the scalar type that `dtype` names)
template <class Run>
int with_scalar(int32_t dtype, Run run) {
    switch (dtype) {
        case R1KERNELS_FLOAT32: return run(float{});
        case R1KERNELS_FLOAT16: return run(__half{});
        case R1KERNELS_BFLOAT16: return run(__nv_bfloat16{});
        default: return cudaErrorInvalidValue;
    }
}

}  // namespace

int r1kernels_token_logprobs_cuda(const R1kernelsTokenLogprobs* call, float* logp, float* entropy, float* stats,
                                  void* stream) {
    return with_scalar(call->dtype, [=](auto zero) {
        return launch(forward_kernel<decltype(zero)>, call->batch * call->tokens, kThreads,
                      block_reduce_bytes<SoftmaxState>(kThreads), stream, *call, logp, entropy, stats);
    });
}

int r1kernels_token_logprobs_cuda_backward(const R1kernelsTokenLogprobs* call, const float* logp, const float* stats,
                                           const float* grad_logp, const float* grad_entropy, void* grad_logits,
                                           int64_t grad_batch_stride, int64_t grad_token_stride, void* stream) {
    return with_scalar(call->dtype, [=](auto zero) {
        return launch(backward_kernel<decltype(zero)>, call->batch * call->tokens, kThreads, 0, stream, *call, logp,
                      stats, grad_logp, grad_entropy, grad_logits, grad_batch_stride, grad_token_stride);
    });
}

const char* r1kernels_cuda_error(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }
