// The torch ops of the MoE family on CUDA: they check what the kernels trust, and allocate. Indices and offsets are data of
// the device: no one looks at them here, the kernels stay in bounds whatever they hold.
#ifdef R1KERNELS_CUDA

#include "common/cuda_host.h"
#include "moe/cuda_experts.h"
#include "moe/ops.h"

namespace r1kernels {

namespace {

// --- grouped_gemm ---

CudaGroupedGemm gemm_of(const Tensor& x, const Tensor& weight, const Tensor& offsets, bool transposed) {
    const int64_t rows = x.size(0), experts = weight.size(0);
    const int64_t outputs = weight.size(transposed ? 2 : 1), inputs = weight.size(transposed ? 1 : 2);
    const Element element = element_of("x", x);
    STD_TORCH_CHECK(experts > 0 && outputs > 0 && inputs > 0, "weight: expected no empty size");
    STD_TORCH_CHECK(rows <= INT32_MAX, "x: expected less than 2^31 rows, got ", rows);
    check_on("x", x, x, x.scalar_type(), {rows, inputs});
    check_on("weight", weight, x, x.scalar_type(), {experts, weight.size(1), weight.size(2)});
    check_on("offsets", offsets, x, ScalarType::Int, {experts + 1});
    return {element,  rows, experts, outputs, inputs, transposed, x.data_ptr(), weight.data_ptr(),
            data_of<int32_t>(offsets)};
}

// The bits of a row depend on no other row in any case: nothing here asks for `batch_invariant`.
Tensor gemm_forward(const Tensor& x, const Tensor& weight, const Tensor& offsets, bool transposed, bool) {
    const CudaGroupedGemm call = gemm_of(x, weight, offsets, transposed);
    const CudaHost host(x);
    const Tensor out = empty_on(x, {call.rows, call.outputs}, x.scalar_type());
    run_forward(host, call, out.data_ptr());
    return out;
}

// The memory of a gradient, or null of one that is not needed.
void* needed_data(bool needed, const Tensor& grad) { return needed ? grad.data_ptr() : nullptr; }

std::tuple<Tensor, Tensor> gemm_backward(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                         const Tensor& offsets, bool transposed, bool need_x, bool need_weight) {
    const CudaGroupedGemm call = gemm_of(x, weight, offsets, transposed);
    check_on("grad", grad, x, x.scalar_type(), {call.rows, call.outputs});
    const CudaHost host(x);
    const Tensor grad_x = empty_on(x, {need_x ? call.rows : 0, call.inputs}, x.scalar_type());
    const Tensor grad_weight =
        empty_on(x, {need_weight ? call.experts : 0, weight.size(1), weight.size(2)}, x.scalar_type());
    run_backward(host, call, grad.data_ptr(), needed_data(need_x, grad_x), needed_data(need_weight, grad_weight));
    return {grad_x, grad_weight};
}

// --- moe_experts ---

CudaLowRank low_rank_of(const std::optional<Tensor>& a, const std::optional<Tensor>& b) {
    if (!a) return {};
    return {a->data_ptr(), b->data_ptr(), a->size(1)};
}

CudaExperts experts_of(const Tensor& x, const Tensor& weights, const Tensor& gate_up, const Tensor& down,
                       const Tensor& offsets, const Tensor& permutation, const Tensor& inverse, const Gating& gating,
                       const Lora& lora) {
    const CudaExperts call = {element_of("hidden", x),
                              gating,
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
                              data_of<int32_t>(inverse),
                              low_rank_of(lora.up_a, lora.up_b),
                              low_rank_of(lora.down_a, lora.down_b),
                              lora.scale};
    STD_TORCH_CHECK(call.hidden > 0 && call.intermediate > 0 && call.experts > 0,
                    "hidden, gate_up, down: expected no empty size");
    STD_TORCH_CHECK(call.rows() <= INT32_MAX, "indices: expected less than 2^31 entries, got ", call.rows());
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
                                                                   const Tensor& down, int64_t activation,
                                                                   double alpha, double limit, double shift, bool,
                                                                   bool keep, const std::optional<Tensor>& up_a,
                                                                   const std::optional<Tensor>& up_b,
                                                                   const std::optional<Tensor>& down_a,
                                                                   const std::optional<Tensor>& down_b, double scale) {
    const int64_t rows = indices.numel();
    const Tensor offsets = empty_on(x, {down.size(0) + 1}, ScalarType::Int);
    const Tensor permutation = empty_on(x, {rows}, ScalarType::Int);
    const Tensor inverse = empty_on(x, {rows}, ScalarType::Int);
    const Lora lora(up_a, up_b, down_a, down_b, scale, x, gate_up, down);
    const CudaExperts call = experts_of(x, weights, gate_up, down, offsets, permutation, inverse,
                                        gating_of(activation, alpha, limit, shift), lora);
    check_on("indices", indices, x, ScalarType::Long, {call.tokens, call.top_k});
    const CudaHost host(x);
    const Tensor out = empty_on(x, {call.tokens, call.hidden}, x.scalar_type());
    const Tensor pre_activation = empty_on(x, {keep ? rows : 0, 2 * call.intermediate}, x.scalar_type());
    run_forward(host, call, data_of<int64_t>(indices), needed_data(keep, pre_activation), out.data_ptr());
    return {out, pre_activation, offsets, permutation, inverse};
}

ExpertsGradients experts_backward(
    const Tensor& grad, const Tensor& x, const Tensor& weights, const Tensor& gate_up, const Tensor& down,
    const Tensor& kept, const Tensor& offsets, const Tensor& permutation, const Tensor& inverse, int64_t activation,
    double alpha, double limit, double shift, bool, bool need_hidden, bool need_weights, bool need_gate_up,
    bool need_down, bool need_up_a, bool need_up_b, bool need_down_a, bool need_down_b,
    const std::optional<Tensor>& up_a, const std::optional<Tensor>& up_b, const std::optional<Tensor>& down_a,
    const std::optional<Tensor>& down_b, double scale) {
    const Lora lora(up_a, up_b, down_a, down_b, scale, x, gate_up, down);
    const CudaExperts call = experts_of(x, weights, gate_up, down, offsets, permutation, inverse,
                                        gating_of(activation, alpha, limit, shift), lora);
    const bool is_kept = kept.size(0) == call.rows();
    check_on("grad", grad, x, x.scalar_type(), {call.tokens, call.hidden});
    check_on("pre_activation", kept, x, x.scalar_type(), {is_kept ? call.rows() : 0, 2 * call.intermediate});
    const CudaHost host(x);
    const Tensor grad_hidden = empty_on(x, {need_hidden ? call.tokens : 0, call.hidden}, x.scalar_type());
    const Tensor grad_weights = empty_on(x, {need_weights ? call.tokens : 0, call.top_k}, ScalarType::Float);
    const Tensor grad_gate_up =
        empty_on(x, {need_gate_up ? call.experts : 0, 2 * call.intermediate, call.hidden}, x.scalar_type());
    const Tensor grad_down =
        empty_on(x, {need_down ? call.experts : 0, call.hidden, call.intermediate}, x.scalar_type());
    const auto matrix = [&](std::initializer_list<int64_t> sizes) { return empty_on(x, sizes, x.scalar_type()); };
    const std::vector<Tensor> of_lora =
        gradients_of(lora, {need_up_a, need_up_b, need_down_a, need_down_b}, matrix);
    const auto data_of_lora = [&](size_t place) {
        return place < of_lora.size() && of_lora[place].numel() > 0 ? of_lora[place].data_ptr() : nullptr;
    };
    run_backward(host, call, grad.data_ptr(), needed_data(is_kept, kept),
                 {needed_data(need_hidden, grad_hidden), static_cast<float*>(needed_data(need_weights, grad_weights)),
                  needed_data(need_gate_up, grad_gate_up), needed_data(need_down, grad_down),
                  data_of_lora(0), data_of_lora(1), data_of_lora(2), data_of_lora(3)});
    return {grad_hidden, grad_weights, grad_gate_up, grad_down, of_lora};
}

// --- sort_by_expert ---

std::tuple<Tensor, Tensor, Tensor> sort(const Tensor& indices, int64_t experts) {
    const int64_t rows = indices.numel();
    check("indices", indices, ScalarType::Long, {rows});
    STD_TORCH_CHECK(rows <= INT32_MAX, "indices: expected less than 2^31 entries, got ", rows);
    STD_TORCH_CHECK(experts >= 1 && experts < INT32_MAX, "experts: expected a number in [1, 2^31 - 1), got ", experts);
    const CudaHost host(indices);
    const Tensor offsets = empty_on(indices, {experts + 1}, ScalarType::Int);
    const Tensor permutation = empty_on(indices, {rows}, ScalarType::Long);
    const Tensor inverse = empty_on(indices, {rows}, ScalarType::Long);
    const R1kernelsExpertSort call = {data_of<int64_t>(indices), rows, experts, 1, data_of<int32_t>(offsets),
                                      permutation.data_ptr(), inverse.data_ptr()};
    const Tensor workspace = host.allocate(r1kernels_expert_sort_cuda_workspace(&call));
    host.check(r1kernels_expert_sort_cuda(&call, workspace.data_ptr(), host.stream));
    return {offsets, permutation, inverse};
}

// --- route ---

void choose(const R1kernelsRoute& call, const Tensor& logits, float* weights, int64_t* indices, int32_t* counts) {
    constexpr int64_t most = R1KERNELS_ROUTE_MOST_EXPERTS;
    STD_TORCH_CHECK(call.replayed || call.experts <= most, "logits: expected at most ", most, " experts, got ", call.experts);
    const CudaHost host(logits);
    host.check(r1kernels_route_cuda(&call, weights, indices, counts, host.stream));
}

Tensor route_backward(const Tensor& grad_weights, const Tensor& logits, const Tensor& indices, int64_t score,
                      bool normalize, double eps, double scale) {
    const R1kernelsRoute call = router_of(logits, indices.size(1), score, normalize, eps, scale);
    check_on("grad_weights", grad_weights, logits, ScalarType::Float, {call.tokens, call.top_k});
    check_on("indices", indices, logits, ScalarType::Long, {call.tokens, call.top_k});
    const CudaHost host(logits);
    const Tensor grad = empty_on(logits, {call.tokens, call.experts}, logits.scalar_type());
    host.check(r1kernels_route_cuda_backward(&call, data_of<int64_t>(indices), data_of<float>(grad_weights),
                                             grad.data_ptr(), host.stream));
    return grad;
}

STABLE_TORCH_LIBRARY_IMPL(r1kernels, CUDA, library) {
    library.impl("grouped_gemm_cuda", TORCH_BOX(&gemm_forward));
    library.impl("grouped_gemm_cuda_backward", TORCH_BOX(&gemm_backward));
    library.impl("moe_experts_cuda", TORCH_BOX(&experts_forward));
    library.impl("moe_experts_cuda_backward", TORCH_BOX(&experts_backward));
    library.impl("sort_by_expert_cuda", TORCH_BOX(&sort));
    library.impl("route_cuda", TORCH_BOX(&route<choose>));
    library.impl("route_cuda_backward", TORCH_BOX(&route_backward));
}

}  // namespace

}  // namespace r1kernels

#endif
