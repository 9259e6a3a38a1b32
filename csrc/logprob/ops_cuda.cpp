// The torch ops of token_logprobs and over completions on CUDA. Schemas and fakes of the latter stand in
// r1kernels/logprob/completions.py.
#ifdef R1KERNELS_CUDA

#include "common/cuda_host.h"
#include "logprob/cuda.h"
#include "logprob/ops.h"

namespace r1kernels {

namespace {

// --- rows ---

void sums_of_rows(const R1kernelsTokenLogprobs& call, const RowOutputs& outputs, bool entropy) {
    const CudaHost host(outputs.logp);
    const R1kernelsLogprobOutputs to = {floats(outputs.logp), floats(outputs.entropy), floats(outputs.stats),
                                        floats(outputs.extra), entropy};
    const Tensor workspace =
        empty_on(outputs.logp, {r1kernels_token_logprobs_cuda_workspace(&call, &to)}, ScalarType::Float);
    host.check(r1kernels_token_logprobs_cuda(&call, &to, floats(workspace), host.stream));
}

void write_gradient(const RowsBackward& backward, const Tensor& grad) {
    const CudaHost host(grad);
    host.check(r1kernels_token_logprobs_cuda_backward(&backward.call, &backward.from, grad.data_ptr(),
                                                      element_of("grad", grad), grad.stride(0), grad.stride(1),
                                                      host.stream));
}

// --- completions ---

const int64_t* bounds_of(const Tensor& cu_seqlens) {
    STD_TORCH_CHECK(cu_seqlens.scalar_type() == ScalarType::Long && cu_seqlens.dim() == 1 &&
                        cu_seqlens.is_contiguous() && cu_seqlens.numel() > 0,
                    "cu_seqlens: expected (B + 1,) contiguous int64 values");
    return static_cast<const int64_t*>(cu_seqlens.data_ptr());
}

Tensor completion_sums(const Tensor& values, const Optional& cu_seqlens, int64_t completions) {
    STD_TORCH_CHECK(values.scalar_type() == ScalarType::Float && values.dim() == 1 && values.is_contiguous(),
                    "values: expected (N,) contiguous float32 values");
    STD_TORCH_CHECK(completions >= 0 && (!cu_seqlens || cu_seqlens->numel() == completions + 1),
                    "completions: expected one less than the bounds, got ", completions);
    const CudaHost host(values);
    const Tensor sums = empty_on(values, {completions}, ScalarType::Float);
    host.check(r1kernels_completion_sums_cuda(static_cast<const float*>(values.data_ptr()), values.numel(),
                                              cu_seqlens ? bounds_of(*cu_seqlens) : nullptr, completions,
                                              static_cast<float*>(sums.data_ptr()), host.stream));
    return sums;
}

Tensor completion_numbers(const Tensor& cu_seqlens, int64_t tokens) {
    const CudaHost host(cu_seqlens);
    const Tensor numbers = empty_on(cu_seqlens, {tokens}, ScalarType::Int);
    host.check(r1kernels_completion_numbers_cuda(bounds_of(cu_seqlens), cu_seqlens.numel() - 1, tokens,
                                                 static_cast<int32_t*>(numbers.data_ptr()), host.stream));
    return numbers;
}

STABLE_TORCH_LIBRARY_IMPL(r1kernels, CUDA, library) {
    library.impl("token_logprobs_cuda", TORCH_BOX(&forward<sums_of_rows>));
    library.impl("token_logprobs_cuda_backward", TORCH_BOX((&backward<write_gradient, empty_on>)));
    library.impl("token_logprobs_cuda_backward_", TORCH_BOX(&backward_<write_gradient>));
    library.impl("token_logprobs_cuda_backward_into", TORCH_BOX(&backward_into<write_gradient>));
    library.impl("completion_sums_cuda", TORCH_BOX(&completion_sums));
    library.impl("completion_numbers_cuda", TORCH_BOX(&completion_numbers));
}

}  // namespace

}  // namespace r1kernels

#endif
