// Launchers of the rows of divergences, for every architecture from sm_80 on.
#include "common/launch.cuh"
#include "logprob/cuda.h"
#include "logprob/cuda_divergence.cuh"

using namespace r1kernels;
using namespace r1kernels::logprob;

int r1kernels_divergence_cuda(const R1kernelsDivergence* call, float* sums, void* stream) {
    const auto run = [&](auto kernel) {
        return launch(kernel, call->student.batch * call->student.tokens, kThreads,
                      block_reduce_bytes<DivergenceSums<float>>(kThreads), stream, *call, sums);
    };
    switch (call->kind) {
        case R1KERNELS_FORWARD_KL: return run(divergence_sums_kernel<R1KERNELS_FORWARD_KL>);
        case R1KERNELS_REVERSE_KL: return run(divergence_sums_kernel<R1KERNELS_REVERSE_KL>);
        default: return run(divergence_sums_kernel<R1KERNELS_JSD>);
    }
}

int r1kernels_divergence_cuda_backward(const R1kernelsDivergence* call, const float* mean, const float* grad, float* to,
                                       void* stream) {
    const auto run = [&](auto kernel) {
        return launch(kernel, call->student.batch * call->student.tokens, kThreads, 0, stream, *call, mean, grad, to);
    };
    switch (call->kind) {
        case R1KERNELS_FORWARD_KL: return run(divergence_gradient_kernel<R1KERNELS_FORWARD_KL>);
        case R1KERNELS_REVERSE_KL: return run(divergence_gradient_kernel<R1KERNELS_REVERSE_KL>);
        default: return run(divergence_gradient_kernel<R1KERNELS_JSD>);
    }
}
