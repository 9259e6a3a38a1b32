// Launchers of the kernels over kept rows of the head, for every architecture from sm_80 on.
#include "common/launch.cuh"
#include "logprob/cuda.h"
#include "logprob/cuda_kept.cuh"

using namespace r1kernels;
using namespace r1kernels::logprob;

int r1kernels_kept_products_cuda(const R1kernelsKeptProducts* call, float* to, void* stream) {
    return with_scalar(call->element, [&](auto zero) {
        return launch(kept_products_kernel<decltype(zero)>, divide_up(call->entries, kKeptThreads / kWarpSize),
                      kKeptThreads, 0, stream, *call, to);
    });
}

int r1kernels_kept_products_cuda_backward(const R1kernelsKeptProducts* call, void* for_hidden, int32_t float32,
                                          void* for_weight, float* for_bias, void* stream) {
    return with_scalar(call->element, [&](auto zero) {
        typedef decltype(zero) Scalar;
        int code = cudaSuccess;
        if (for_hidden != nullptr && float32) {
            code = launch(kept_gradient_of_hidden_kernel<Scalar, float>, call->tokens, kKeptThreads, 0, stream, *call,
                          static_cast<float*>(for_hidden));
        } else if (for_hidden != nullptr) {
            code = launch(kept_gradient_of_hidden_kernel<Scalar, Scalar>, call->tokens, kKeptThreads, 0, stream, *call,
                          static_cast<Scalar*>(for_hidden));
        }
        if (code != cudaSuccess || (for_weight == nullptr && for_bias == nullptr)) return code;
        return launch(kept_gradient_of_weight_kernel<Scalar>, call->entries, kKeptThreads, 0, stream, *call,
                      static_cast<Scalar*>(for_weight), for_bias);
    });
}
