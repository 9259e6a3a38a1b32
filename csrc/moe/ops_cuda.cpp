// The torch ops grouped_gemm and moe_experts on CUDA: they check what the kernels trust, and allocate. Schemas and fakes
// stand in r1kernels/moe/ops.py; the shapes are explained there. Indices and offsets are data of the device: nobody looks
// at them here, the kernels stay in bounds whatever they hold.
#ifdef R1KERNELS_CUDA

#include <tuple>

#include "logprob/cuda.h"  // r1kernels_cuda_error
#include "moe/checks.h"
#include "moe/cuda_experts.h"

namespace r1kernels {

namespace {

// What cuda_experts.h asks for: workspace on the device of `like`, and torch's stream there.
class Host {
public:
    void* const stream;

    explicit Host(const Tensor& like)
        : stream(current_stream(like.get_device_index())), guard_(like.get_device_index()), like_(like) {}

    Tensor allocate(int64_t bytes) const { return empty_on(like_, {bytes}, ScalarType::Byte); }
    void check(int code) const { STD_TORCH_CHECK(code == 0, "CUDA: ", r1kernels_cuda_error(code)); }

private:
    const torch::stable::accelerator::DeviceGuard guard_;
    const Tensor& like_;
};

void check_on(const char* name, const Tensor& tensor, const Tensor& like, ScalarType dtype,
              std::initializer_list<int64_t> sizes) {
    check(name, tensor, dtype, sizes);
    STD_TORCH_CHECK(tensor.device() == like.device(), name, ": expected a tensor on the device of the first argument");
}

// --- grouped_gemm ---

CudaGroupedGemm gemm_of(const Tensor& x, const Tensor& weight, const Tensor& offsets) {
    const int64_t rows = x.size(0), experts = weight.size(0), outputs = weight.size(1), inputs = weight.size(2);
    const Element element = element_of("x", x);
    STD_TORCH_CHECK(experts > 0 && outputs > 0 && inputs > 0, "weight: expected no empty size");
    STD_TORCH_CHECK(rows <= INT32_MAX, "x: expected less than 2^31 rows, got ", rows);
    check_on("x", x, x, x.scalar_type(), {rows, inputs});
    check_on("weight", weight, x, x.scalar_type(), {experts, outputs, inputs});
    check_on("offsets", offsets, x, ScalarType::Int, {experts + 1});
    return {element, rows, experts, outputs, inputs, x.data_ptr(), weight.data_ptr(), data_of<int32_t>(offsets)};
}

Tensor gemm_forward(const Tensor& x, const Tensor& weight, const Tensor& offsets) {
    const CudaGroupedGemm call = gemm_of(x, weight, offsets);
    Host host(x);
    const Tensor out = empty_on(x, {call.rows, call.outputs}, x.scalar_type());
    run_forward(host, call, out.data_ptr());
    return out;
}

// The memory of a gradient, or null of one that is not needed.
void* needed_data(bool needed, const Tensor& grad) { return needed ? grad.data_ptr() : nullptr; }

std::tuple<Tensor, Tensor> gemm_backward(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                         const Tensor& offsets, bool need_x, bool need_weight) {
    const CudaGroupedGemm call = gemm_of(x, weight, offsets);
    check_on("grad", grad, x, x.scalar_type(), {call.rows, call.outputs});
    Host host(x);
    const Tensor grad_x = empty_on(x, {need_x ? call.rows : 0, call.inputs}, x.scalar_type());
    const Tensor grad_weight =
        empty_on(x, {need_weight ? call.experts : 0, call.outputs, call.inputs}, x.scalar_type());
    run_backward(host, call, grad.data_ptr(), needed_data(need_x, grad_x), needed_data(need_weight, grad_weight));
    return {grad_x, grad_weight};
}

// --- moe_experts ---

CudaExperts experts_of(const Tensor& x, const Tensor& weights, const Tensor& gate_up, const Tensor& down,
                       const Tensor& offsets, const Tensor& permutation, const Tensor& inverse, int64_t activation) {
    const CudaExperts call = {element_of("hidden", x),
                              static_cast<Activation>(activation),
                              x.size(0),
                              x.size(1),
                              down.size(2),
                              down.size(0),
                              weights.size(1),
                              x.data_ptr(),
                              data_of<float>(weights),
                              gate_up.data_ptr(),
                              down.data_ptr(),
                              data_of<int32_t>(offsets),
                              data_of<int32_t>(permutation),
                              data_of<int32_t>(inverse)};
    STD_TORCH_CHECK(call.hidden > 0 && call.intermediate > 0 && call.experts > 0,
                    "hidden, gate_up, down: expected no empty size");
    STD_TORCH_CHECK(call.rows() <= INT32_MAX, "indices: expected less than 2^31 entries, got ", call.rows());
    STD_TORCH_CHECK(activation == 0 || activation == 1, "activation: expected 0 or 1, got ", activation);
    check_on("hidden", x, x, x.scalar_type(), {call.tokens, call.hidden});
    check_on("weights", weights, x, ScalarType::Float, {call.tokens, call.top_k});
    check_on("gate_up", gate_up, x, x.scalar_type(), {call.experts, 2 * call.intermediate, call.hidden});
    check_on("down", down, x, x.scalar_type(), {call.experts, call.hidden, call.intermediate});
    check_on("offsets", offsets, x, ScalarType::Int, {call.experts + 1});
    check_on("permutation", permutation, x, ScalarType::Int, {call.rows()});
    check_on("inverse", inverse, x, ScalarType::Int, {call.rows()});
    return call;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> experts_forward(const Tensor& x, const Tensor& indices,
                                                                   const Tensor& weights, const Tensor& gate_up,
                                                                   const Tensor& down, int64_t activation, bool keep) {
    const int64_t rows = indices.numel();
    const Tensor offsets = empty_on(x, {down.size(0) + 1}, ScalarType::Int);
    const Tensor permutation = empty_on(x, {rows}, ScalarType::Int);
    const Tensor inverse = empty_on(x, {rows}, ScalarType::Int);
    const CudaExperts call = experts_of(x, weights, gate_up, down, offsets, permutation, inverse, activation);
    check_on("indices", indices, x, ScalarType::Long, {call.tokens, call.top_k});
    Host host(x);
    const Tensor out = empty_on(x, {call.tokens, call.hidden}, x.scalar_type());
    const Tensor pre_activation = empty_on(x, {keep ? rows : 0, 2 * call.intermediate}, x.scalar_type());
    run_forward(host, call, data_of<int64_t>(indices), needed_data(keep, pre_activation), out.data_ptr());
    return {out, pre_activation, offsets, permutation, inverse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> experts_backward(
    const Tensor& grad, const Tensor& x, const Tensor& weights, const Tensor& gate_up, const Tensor& down,
    const Tensor& kept, const Tensor& offsets, const Tensor& permutation, const Tensor& inverse, int64_t activation,
    bool need_hidden, bool need_weights, bool need_gate_up, bool need_down) {
    const CudaExperts call = experts_of(x, weights, gate_up, down, offsets, permutation, inverse, activation);
    const bool is_kept = kept.size(0) == call.rows();
    check_on("grad", grad, x, x.scalar_type(), {call.tokens, call.hidden});
    check_on("pre_activation", kept, x, x.scalar_type(), {is_kept ? call.rows() : 0, 2 * call.intermediate});
    Host host(x);
    const Tensor grad_hidden = empty_on(x, {need_hidden ? call.tokens : 0, call.hidden}, x.scalar_type());
    const Tensor grad_weights = empty_on(x, {need_weights ? call.tokens : 0, call.top_k}, ScalarType::Float);
    const Tensor grad_gate_up =
        empty_on(x, {need_gate_up ? call.experts : 0, 2 * call.intermediate, call.hidden}, x.scalar_type());
    const Tensor grad_down =
        empty_on(x, {need_down ? call.experts : 0, call.hidden, call.intermediate}, x.scalar_type());
    run_backward(host, call, grad.data_ptr(), needed_data(is_kept, kept),
                 {needed_data(need_hidden, grad_hidden), static_cast<float*>(needed_data(need_weights, grad_weights)),
                  needed_data(need_gate_up, grad_gate_up), needed_data(need_down, grad_down)});
    return {grad_hidden, grad_weights, grad_gate_up, grad_down};
}

STABLE_TORCH_LIBRARY_IMPL(r1kernels, CUDA, library) {
    library.impl("grouped_gemm_cuda", TORCH_BOX(&gemm_forward));
    library.impl("grouped_gemm_cuda_backward", TORCH_BOX(&gemm_backward));
    library.impl("moe_experts_cuda", TORCH_BOX(&experts_forward));
    library.impl("moe_experts_cuda_backward", TORCH_BOX(&experts_backward));
}

}  // namespace

}  // namespace r1kernels

#endif
