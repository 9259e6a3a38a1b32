// grouped_gemm and moe_experts on CUDA: which launches, in which order. Neither torch nor CUDA headers: `host` gives memory
// (allocate(bytes), an owner with data_ptr()), a stream, and check(code), which throws where a launcher failed.
//
// T tokens, H hidden size, I intermediate size, E experts, K experts per token, S = T * K routed rows.
#pragma once

#include "moe/cuda.h"

namespace r1kernels {

inline int64_t bytes_of(Element element) { return element == Element::float32 ? 4 : 2; }

// --- the one place that chooses between the kernels of an architecture and the portable ones ---

inline int run(const R1kernelsMoeProduct& product, void* stream) {
#ifdef R1KERNELS_MOE_HOPPER
    if (r1kernels_moe_hopper_serves(&product)) return r1kernels_moe_hopper_product_cuda(&product, stream);
#endif
    return r1kernels_moe_product_cuda(&product, stream);
}

inline int run(const R1kernelsMoeWeightProduct& product, void* stream) {
#ifdef R1KERNELS_MOE_HOPPER
    if (r1kernels_moe_hopper_serves_weights(&product)) {
        return r1kernels_moe_hopper_weight_product_cuda(&product, stream);
    }
#endif
    return r1kernels_moe_weight_product_cuda(&product, stream);
}

// --- the schedule and its memory ---

template <class Host>
class Schedule {
public:
    Schedule(Host& host, Element element, int64_t rows, int64_t experts, const int32_t* offsets)
        : schedule_(plan(element, rows, experts)),
          tiles_(host.allocate(schedule_.tile_count * static_cast<int64_t>(sizeof(R1kernelsMoeTile)))),
          bounds_(host.allocate((experts + 2) * static_cast<int64_t>(sizeof(int32_t)))) {
        schedule_.tiles = static_cast<R1kernelsMoeTile*>(tiles_.data_ptr());
        schedule_.bounds = static_cast<int32_t*>(bounds_.data_ptr());
        host.check(r1kernels_moe_schedule_cuda(&schedule_, offsets, host.stream));
    }

    const R1kernelsMoeSchedule& operator*() const { return schedule_; }

private:
    using Owner = decltype(std::declval<Host&>().allocate(0));

    static R1kernelsMoeSchedule plan(Element element, int64_t rows, int64_t experts) {
        R1kernelsMoeSchedule schedule = {};
        r1kernels_moe_plan(element, rows, experts, &schedule);
        return schedule;
    }

    R1kernelsMoeSchedule schedule_;
    Owner tiles_, bounds_;
};

// --- grouped_gemm: x (S, N), weight (E, M, N), out (S, M) ---

struct CudaGroupedGemm {
    Element element;
    int64_t rows, experts, outputs, inputs;  // S, E, M, N
    const void *x, *weight;
    const int32_t* offsets;
};

// Rows times the weight (E, M, N), or its transpose.
inline R1kernelsMoeProduct product_of(const CudaGroupedGemm& call, bool transposed, const void* rows, void* out) {
    R1kernelsMoeProduct product = {};
    product.element = call.element;
    product.epilogue = R1KERNELS_MOE_STORE;
    product.transposed = transposed;
    product.clear_rest = 1;
    product.x = {rows, nullptr, 1};
    product.weight = call.weight;
    product.columns = transposed ? call.outputs : call.inputs;
    product.depth = transposed ? call.inputs : call.outputs;
    product.out = out;
    return product;
}

template <class Host>
void run_forward(Host& host, const CudaGroupedGemm& call, void* out) {
    const Schedule<Host> schedule(host, call.element, call.rows, call.experts, call.offsets);
    R1kernelsMoeProduct product = product_of(call, true, call.x, out);
    product.schedule = *schedule;
    host.check(run(product, host.stream));
}

// grad (S, M); grad_x (S, N) and grad_weight (E, M, N), null where they are not needed.
template <class Host>
void run_backward(Host& host, const CudaGroupedGemm& call, const void* grad, void* grad_x, void* grad_weight) {
    const Schedule<Host> schedule(host, call.element, call.rows, call.experts, call.offsets);
    if (grad_x != nullptr) {
        R1kernelsMoeProduct product = product_of(call, false, grad, grad_x);
        product.schedule = *schedule;
        host.check(run(product, host.stream));
    }
    if (grad_weight != nullptr) {
        host.check(run(R1kernelsMoeWeightProduct{call.element, {grad, nullptr, 1}, {call.x, nullptr, 1}, call.outputs,
                                                 call.inputs, *schedule, grad_weight},
                       host.stream));
    }
}

// --- moe_experts ---

struct CudaExperts {
    Element element;
    Gating gating;
    int64_t tokens, hidden, intermediate, experts, top_k;
    const void* x;                             // (T, H)
    const float* weights;                      // (T, K)
    const void *gate_up, *down;                // (E, 2 I, H), (E, H, I)
    int32_t *offsets, *permutation, *inverse;  // (E + 1), (S), (S): the order of the rows

    int64_t rows() const { return tokens * top_k; }
    int64_t row_bytes(int64_t columns) const { return rows() * columns * bytes_of(element); }
};

// Up GEMM with gather: pre_activation (S, 2 I) and activated (S, I), null where they are not asked for.
template <class Host>
void run_up(Host& host, const CudaExperts& call, const R1kernelsMoeSchedule& schedule, bool clear_rest,
            void* pre_activation, void* activated) {
    R1kernelsMoeProduct product = {};
    product.element = call.element;
    product.epilogue = R1KERNELS_MOE_UP;
    product.gating = call.gating;
    product.transposed = 1;
    product.clear_rest = clear_rest;
    product.x = {call.x, call.permutation, static_cast<int32_t>(call.top_k)};
    product.weight = call.gate_up;
    product.columns = 2 * call.intermediate;
    product.depth = call.hidden;
    product.schedule = schedule;
    product.out = pre_activation;
    product.activated = activated;
    host.check(run(product, host.stream));
}

// out (T, H) = for each token the sum over its rows of weights * (rows weight[e]^T or rows weight[e]).
template <class Host>
void run_and_combine(Host& host, const CudaExperts& call, const R1kernelsMoeSchedule& schedule, bool transposed,
                     const void* rows, int64_t depth, const void* weight, const float* weights, void* out) {
    const auto products = host.allocate(call.row_bytes(call.hidden));
    R1kernelsMoeProduct product = {};
    product.element = call.element;
    product.epilogue = R1KERNELS_MOE_STORE;
    product.transposed = transposed;
    product.x = {rows, nullptr, 1};
    product.weight = weight;
    product.columns = call.hidden;
    product.depth = depth;
    product.schedule = schedule;
    product.out = products.data_ptr();
    host.check(run(product, host.stream));
    const R1kernelsMoeCombine combine = {call.element, products.data_ptr(), call.inverse, schedule.bounds, weights,
                                         call.tokens,  call.top_k,          call.experts, call.hidden,     out};
    host.check(r1kernels_moe_combine_cuda(&combine, host.stream));
}

// out (T, H); pre_activation (S, 2 I), or null where the backward is to compute it again.
template <class Host>
void run_forward(Host& host, const CudaExperts& call, const int64_t* indices, void* pre_activation, void* out) {
    {
        const R1kernelsExpertSort sort = {indices,      call.rows(),      call.experts, 0,
                                          call.offsets, call.permutation, call.inverse};
        const auto workspace = host.allocate(r1kernels_expert_sort_cuda_workspace(&sort));
        host.check(r1kernels_expert_sort_cuda(&sort, workspace.data_ptr(), host.stream));
    }
    const Schedule<Host> schedule(host, call.element, call.rows(), call.experts, call.offsets);
    const auto activated = host.allocate(call.row_bytes(call.intermediate));
    // rows of sentinels are saved too, and nobody computes them
    run_up(host, call, *schedule, pre_activation != nullptr, pre_activation, activated.data_ptr());
    run_and_combine(host, call, *schedule, true, activated.data_ptr(), call.intermediate, call.down, call.weights, out);
}

// What a backward writes; null where it is not needed.
struct CudaExpertsGradients {
    void* hidden;    // (T, H)
    float* weights;  // (T, K)
    void *gate_up, *down;
};

// grad (T, H); kept: the pre-activation (S, 2 I), or null to compute it again.
template <class Host>
void run_backward(Host& host, const CudaExperts& call, const void* grad, const void* kept,
                  const CudaExpertsGradients& needed) {
    const Schedule<Host> schedule(host, call.element, call.rows(), call.experts, call.offsets);
    const int32_t top_k = static_cast<int32_t>(call.top_k);
    const R1kernelsMoeRows grad_rows = {grad, call.permutation, top_k}, x_rows = {call.x, call.permutation, top_k};
    const bool pre_needed = needed.hidden != nullptr || needed.gate_up != nullptr;
    const auto grad_pre = host.allocate(pre_needed ? call.row_bytes(2 * call.intermediate) : 0);
    {
        const auto computed = host.allocate(kept ? 0 : call.row_bytes(2 * call.intermediate));
        const auto activated = host.allocate(needed.down ? call.row_bytes(call.intermediate) : 0);
        const int64_t parts = (call.intermediate + R1KERNELS_MOE_PART_COLUMNS - 1) / R1KERNELS_MOE_PART_COLUMNS;
        const auto partials =
            host.allocate(needed.weights ? parts * call.rows() * static_cast<int64_t>(sizeof(float)) : 0);
        if (kept == nullptr) run_up(host, call, *schedule, false, computed.data_ptr(), nullptr);

        R1kernelsMoeProduct product = {};
        product.element = call.element;
        product.epilogue = R1KERNELS_MOE_GATE_BACKWARD;
        product.gating = call.gating;
        product.x = grad_rows;
        product.weight = call.down;
        product.columns = call.intermediate;
        product.depth = pre_needed || needed.weights ? call.hidden : 0;  // s A alone needs no product
        product.schedule = *schedule;
        product.out = pre_needed ? grad_pre.data_ptr() : nullptr;
        product.activated = needed.down ? activated.data_ptr() : nullptr;
        product.pre_activation = kept ? kept : computed.data_ptr();
        product.scales = call.weights;
        product.order = call.permutation;
        product.partials = needed.weights ? static_cast<float*>(partials.data_ptr()) : nullptr;
        host.check(run(product, host.stream));

        if (needed.weights) {
            host.check(r1kernels_moe_sum_partials_cuda(&*schedule, product.partials, parts, call.permutation,
                                                       needed.weights, host.stream));
        }
        if (needed.down) {
            host.check(run(R1kernelsMoeWeightProduct{call.element, grad_rows, {product.activated, nullptr, 1},
                                                     call.hidden, call.intermediate, *schedule, needed.down},
                           host.stream));
        }
    }
    if (needed.gate_up) {
        host.check(run(R1kernelsMoeWeightProduct{call.element, {grad_pre.data_ptr(), nullptr, 1}, x_rows,
                                                 2 * call.intermediate, call.hidden, *schedule, needed.gate_up},
                       host.stream));
    }
    if (needed.hidden) {
        run_and_combine(host, call, *schedule, false, grad_pre.data_ptr(), 2 * call.intermediate, call.gate_up, nullptr,
                        needed.hidden);
    }
}

}  // namespace r1kernels
