// The torch ops of kept rows of the head on CUDA.
#ifdef R1KERNELS_CUDA

#include "common/cuda_host.h"
#include "logprob/cuda.h"
#include "logprob/ops_kept.h"

namespace r1kernels {

namespace {

Tensor products(const Tensor& hidden, const Tensor& weight, const Optional& bias, const Tensor& ids,
                const Tensor& tokens, int64_t first) {
    R1kernelsKeptProducts call = kept_call_of(hidden, weight, ids, tokens, first);
    call.bias = optional_values<float>("bias", bias, ScalarType::Float, call.vocabulary, hidden);
    const CudaHost host(hidden);
    const Tensor result = empty_on(hidden, {call.entries}, ScalarType::Float);
    host.check(r1kernels_kept_products_cuda(&call, floats(result), host.stream));
    return result;
}

std::tuple<Tensor, Tensor, Tensor> backward(
    const Tensor& grad, const Tensor& hidden, const Tensor& weight, const Tensor& ids, const Tensor& tokens,
    const Tensor& offsets, const Tensor& order, int64_t first, bool slab, bool need_hidden, bool need_weight,
    bool need_bias) {
    const R1kernelsKeptProducts call = kept_backward_of(grad, hidden, weight, ids, tokens, offsets, order, first);
    const CudaHost host(hidden);
    const ScalarType dtype = hidden.scalar_type();
    const auto shaped = [&](bool needed, int64_t rows, ScalarType of) {
        return needed ? empty_on(hidden, {rows, call.width}, of) : empty_on(hidden, {0}, of);
    };
    const Tensor for_hidden = shaped(need_hidden, call.tokens, slab ? ScalarType::Float : dtype);
    Tensor for_weight = shaped(need_weight, call.vocabulary, dtype);
    Tensor for_bias = empty_on(hidden, {need_bias ? call.vocabulary : 0}, ScalarType::Float);
    torch::stable::zero_(for_weight);
    torch::stable::zero_(for_bias);
    host.check(r1kernels_kept_products_cuda_backward(
        &call, need_hidden ? for_hidden.data_ptr() : nullptr, slab, need_weight ? for_weight.data_ptr() : nullptr,
        need_bias ? floats(for_bias) : nullptr, host.stream));
    return {for_hidden, for_weight, for_bias};
}

STABLE_TORCH_LIBRARY_IMPL(r1kernels, CUDA, library) {
    library.impl("kept_products_cuda", TORCH_BOX(&products));
    library.impl("kept_products_cuda_backward", TORCH_BOX(&backward));
}

}  // namespace

}  // namespace r1kernels

#endif
