// The torch ops route and sort_by_expert on CUDA: they check what the kernels trust, and allocate. Schemas and fakes stand
// in r1kernels/moe/ops.py; the shapes are explained there. Indices are data of the device: nobody looks at them here.
#ifdef R1KERNELS_CUDA

#include <optional>
#include <tuple>

#include "logprob/cuda.h"  // r1kernels_cuda_error
#include "moe/checks.h"
#include "moe/cuda_routing.h"

namespace r1kernels {

namespace {

void check_launch(int code) { STD_TORCH_CHECK(code == 0, "CUDA: ", r1kernels_cuda_error(code)); }

void check_on(const char* name, const Tensor& tensor, const Tensor& like, ScalarType dtype,
              std::initializer_list<int64_t> sizes) {
    check(name, tensor, dtype, sizes);
    STD_TORCH_CHECK(tensor.device() == like.device(), name, ": expected a tensor on the device of the first argument");
}

// --- sort_by_expert ---

std::tuple<Tensor, Tensor, Tensor> sort(const Tensor& indices, int64_t experts) {
    const int64_t rows = indices.numel();
    check("indices", indices, ScalarType::Long, {rows});
    STD_TORCH_CHECK(rows <= INT32_MAX, "indices: expected less than 2^31 entries, got ", rows);
    STD_TORCH_CHECK(experts >= 1 && experts < INT32_MAX, "experts: expected a number in [1, 2^31 - 1), got ", experts);
    const int32_t device = indices.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    const Tensor offsets = empty_on(indices, {experts + 1}, ScalarType::Int);
    const Tensor permutation = empty_on(indices, {rows}, ScalarType::Long);
    const Tensor inverse = empty_on(indices, {rows}, ScalarType::Long);
    const R1kernelsExpertSort call = {data_of<int64_t>(indices), rows, experts, 1, data_of<int32_t>(offsets),
                                      permutation.data_ptr(), inverse.data_ptr()};
    const int64_t bytes = static_cast<int64_t>(r1kernels_expert_sort_cuda_workspace(&call));
    const Tensor workspace = empty_on(indices, {bytes}, ScalarType::Byte);
    check_launch(r1kernels_expert_sort_cuda(&call, workspace.data_ptr(), current_stream(device)));
    return {offsets, permutation, inverse};
}

// --- route ---

R1kernelsRoute router_of(const Tensor& logits, int64_t top_k, bool softmax, bool normalize, double scale) {
    R1kernelsRoute call = {};
    call.element = element_of("logits", logits);
    check("logits", logits, logits.scalar_type(), {logits.size(0), logits.size(1)});
    call.logits = logits.data_ptr();
    call.tokens = logits.size(0);
    call.experts = logits.size(1);
    call.top_k = top_k;
    STD_TORCH_CHECK(top_k >= 1 && call.experts >= 1, "top_k, logits: expected K >= 1 and E >= 1");
    call.n_group = call.topk_group = 1;
    call.softmax = softmax;
    call.normalize = normalize;
    call.scale = scale;
    return call;
}

std::tuple<Tensor, Tensor, Tensor> route(const Tensor& logits, int64_t top_k, bool softmax,
                                         const std::optional<Tensor>& bias, int64_t n_group, int64_t topk_group,
                                         bool normalize, double scale, const std::optional<Tensor>& replayed) {
    R1kernelsRoute call = router_of(logits, top_k, softmax, normalize, scale);
    if (replayed) {
        check_on("indices", *replayed, logits, ScalarType::Long, {call.tokens, top_k});
        call.replayed = data_of<int64_t>(*replayed);
    } else {
        STD_TORCH_CHECK(n_group >= 1 && call.experts % n_group == 0 && topk_group >= 1 && topk_group <= n_group,
                        "n_group, topk_group: expected a divisor of E and at most n_group");
        const int64_t eligible = topk_group * (call.experts / n_group);
        STD_TORCH_CHECK(top_k <= eligible, "top_k: expected at most the ", eligible, " eligible experts, got ", top_k);
        constexpr int64_t most = R1KERNELS_ROUTE_MOST_EXPERTS;
        STD_TORCH_CHECK(call.experts <= most, "logits: expected at most ", most, " experts, got ", call.experts);
        call.n_group = n_group;
        call.topk_group = topk_group;
    }
    if (bias) {
        check_on("bias", *bias, logits, ScalarType::Float, {call.experts});
        call.bias = data_of<float>(*bias);
    }
    const int32_t device = logits.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    const Tensor weights = empty_on(logits, {call.tokens, top_k}, ScalarType::Float);
    const Tensor indices = empty_on(logits, {call.tokens, top_k}, ScalarType::Long);
    const Tensor counts = empty_on(logits, {call.experts}, ScalarType::Int);
    check_launch(r1kernels_route_cuda(&call, data_of<float>(weights), data_of<int64_t>(indices),
                                      data_of<int32_t>(counts), current_stream(device)));
    return {weights, indices, counts};
}

Tensor route_backward(const Tensor& grad_weights, const Tensor& logits, const Tensor& indices, bool softmax,
                      bool normalize, double scale) {
    const R1kernelsRoute call = router_of(logits, indices.size(1), softmax, normalize, scale);
    check_on("grad_weights", grad_weights, logits, ScalarType::Float, {call.tokens, call.top_k});
    check_on("indices", indices, logits, ScalarType::Long, {call.tokens, call.top_k});
    const int32_t device = logits.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    const Tensor grad = empty_on(logits, {call.tokens, call.experts}, logits.scalar_type());
    check_launch(r1kernels_route_cuda_backward(&call, data_of<int64_t>(indices), data_of<float>(grad_weights),
                                               grad.data_ptr(), current_stream(device)));
    return grad;
}

STABLE_TORCH_LIBRARY_IMPL(r1kernels, CUDA, library) {
    library.impl("sort_by_expert_cuda", TORCH_BOX(&sort));
    library.impl("route_cuda", TORCH_BOX(&route));
    library.impl("route_cuda_backward", TORCH_BOX(&route_backward));
}

}  // namespace

}  // namespace r1kernels

#endif
