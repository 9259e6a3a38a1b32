// The torch ops of the rows of divergences on CUDA.
#ifdef R1KERNELS_CUDA

#include "common/cuda_host.h"
#include "logprob/cuda.h"
#include "logprob/ops_divergence.h"

namespace r1kernels {

namespace {

void write_sums(const R1kernelsDivergence& call, const Tensor& sums) {
    const CudaHost host(sums);
    host.check(r1kernels_divergence_cuda(&call, static_cast<float*>(sums.data_ptr()), host.stream));
}

void write_gradient(const R1kernelsDivergence& call, const float* mean, const float* grad, const Tensor& logits) {
    const CudaHost host(logits);
    host.check(r1kernels_divergence_cuda_backward(&call, mean, grad, static_cast<float*>(logits.data_ptr()),
                                                  host.stream));
}

STABLE_TORCH_LIBRARY_IMPL(r1kernels, CUDA, library) {
    library.impl("divergence_rows_cuda", TORCH_BOX(&divergence_forward<write_sums>));
    library.impl("divergence_rows_cuda_backward_", TORCH_BOX(&divergence_backward_<write_gradient>));
}

}  // namespace

}  // namespace r1kernels

#endif
