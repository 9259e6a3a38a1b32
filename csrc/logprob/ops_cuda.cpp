// The torch ops of token_logprobs and over completions on CUDA. Schemas and fakes of the latter stand in
// r1kernels/logprob/cuda.py.
#ifdef R1KERNELS_CUDA

#include "common/cuda_host.h"
#include "logprob/cuda.h"
#include "logprob/ops.h"

namespace r1kernels {

namespace {

// --- rows ---

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(
    const Tensor& logits, const Optional& bias, double logit_scale, double softcap, const Tensor& targets,
    const Optional& temperatures, double temperature, int64_t ignore_index, int64_t first, int64_t whole,
    bool entropy, bool extra) {
    const R1kernelsTokenLogprobs call = call_of(logits, bias, logit_scale, softcap, targets, temperatures, temperature, ignore_index,
                                                first, whole);
    const CudaHost host(logits);
    const RowOutputs outputs(call, logits, entropy, extra);
    const R1kernelsLogprobOutputs to = {floats(outputs.logp), floats(outputs.entropy), floats(outputs.stats),
                                        floats(outputs.extra), entropy};
    const Tensor workspace =
        empty_on(logits, {r1kernels_token_logprobs_cuda_workspace(&call, &to)}, ScalarType::Float);
    host.check(r1kernels_token_logprobs_cuda(&call, &to, floats(workspace), host.stream));
    return outputs.results();
}

void write_gradient(const RowsBackward& backward, const Tensor& grad) {
    const CudaHost host(grad);
    host.check(r1kernels_token_logprobs_cuda_backward(&backward.call, &backward.from, grad.data_ptr(),
                                                      element_of("grad", grad), grad.stride(0), grad.stride(1),
                                                      host.stream));
}

Tensor backward(
    const Tensor& logits, const Optional& bias, double logit_scale, double softcap, const Tensor& targets,
    const Optional& temperatures, double temperature, int64_t ignore_index, int64_t first, int64_t whole,
    const Tensor& logp, const Tensor& stats, const Optional& grad_logp, const Optional& grad_entropy,
    const Optional& sequences) {
    const Tensor grad = empty_on(logits, logits.sizes(), logits.scalar_type());
    write_gradient(backward_of(logits, bias, logit_scale, softcap, targets, temperatures, temperature, ignore_index,
                               first, whole, logp, stats, grad_logp, grad_entropy, sequences),
                   grad);
    return grad;
}

// The gradient goes over the logits.
void backward_(
    const Tensor& logits, const Optional& bias, double logit_scale, double softcap, const Tensor& targets,
    const Optional& temperatures, double temperature, int64_t ignore_index, int64_t first, int64_t whole,
    const Tensor& logp, const Tensor& stats, const Optional& grad_logp, const Optional& grad_entropy,
    const Optional& sequences) {
    write_gradient(backward_of(logits, bias, logit_scale, softcap, targets, temperatures, temperature, ignore_index,
                               first, whole, logp, stats, grad_logp, grad_entropy, sequences),
                   logits);
}

void backward_into(
    const Tensor& logits, const Optional& bias, double logit_scale, double softcap, const Tensor& targets,
    const Optional& temperatures, double temperature, int64_t ignore_index, int64_t first, int64_t whole,
    const Tensor& logp, const Tensor& stats, const Optional& grad_logp, const Optional& grad_entropy,
    const Optional& sequences, const Tensor& grad) {
    STD_TORCH_CHECK(grad.dim() == 3 && grad.size(0) == logits.size(0) && grad.size(1) == logits.size(1) &&
                        grad.size(2) == logits.size(2) && (grad.size(2) == 1 || grad.stride(2) == 1),
                    "grad: expected the shape of the logits, and stride 1 on V");
    STD_TORCH_CHECK(grad.device() == logits.device(), "grad: expected a tensor on the device of the logits");
    STD_TORCH_CHECK(logits.scalar_type() == ScalarType::Float || grad.scalar_type() == logits.scalar_type(),
                    "grad: expected the dtype of the logits, which are not float32");
    write_gradient(backward_of(logits, bias, logit_scale, softcap, targets, temperatures, temperature, ignore_index,
                               first, whole, logp, stats, grad_logp, grad_entropy, sequences),
                   grad);
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
    library.impl("token_logprobs_cuda", TORCH_BOX(&forward));
    library.impl("token_logprobs_cuda_backward", TORCH_BOX(&backward));
    library.impl("token_logprobs_cuda_backward_", TORCH_BOX(&backward_));
    library.impl("token_logprobs_cuda_backward_into", TORCH_BOX(&backward_into));
    library.impl("completion_sums_cuda", TORCH_BOX(&completion_sums));
    library.impl("completion_numbers_cuda", TORCH_BOX(&completion_numbers));
}

}  // namespace

}  // namespace r1kernels

#endif
