// grouped_gemm and moe_experts on CUDA: which launches, in which order. Neither torch nor CUDA headers: `host` gives memory
// (allocate(bytes), an owner with data_ptr()), a stream, and check(code), which throws where a launcher failed.
//
// T tokens, H hidden size, I intermediate size, E experts, K experts per token, S = T * K routed rows, R rank of a low-rank
// addition.
#pragma once

#include <utility>

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

// --- grouped_gemm: x (S, N), weight (E, M, N) or, given transposed, (E, N, M), out (S, M) ---

struct CudaGroupedGemm {
    Element element;
    int64_t rows, experts, outputs, inputs;  // S, E, M, N
    bool transposed;                         // the weight is
    const void *x, *weight;
    const int32_t* offsets;
};

// Rows of inputs to rows of outputs, or back.
inline R1kernelsMoeProduct product_of(const CudaGroupedGemm& call, bool forward, const void* rows, void* out) {
    R1kernelsMoeProduct product = {};
    product.element = call.element;
    product.epilogue = R1KERNELS_MOE_STORE;
    product.transposed = forward != call.transposed;
    product.clear_rest = 1;
    product.scale = 1.0f;
    product.x = {rows, nullptr, 1};
    product.weight = call.weight;
    product.columns = forward ? call.outputs : call.inputs;
    product.depth = forward ? call.inputs : call.outputs;
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

// grad (S, M); grad_x (S, N) and grad_weight, of the layout of the weight, null where they are not needed.
template <class Host>
void run_backward(Host& host, const CudaGroupedGemm& call, const void* grad, void* grad_x, void* grad_weight) {
    const Schedule<Host> schedule(host, call.element, call.rows, call.experts, call.offsets);
    if (grad_x != nullptr) {
        R1kernelsMoeProduct product = product_of(call, false, grad, grad_x);
        product.schedule = *schedule;
        host.check(run(product, host.stream));
    }
    if (grad_weight != nullptr) {
        R1kernelsMoeWeightProduct product = {call.element, {grad, nullptr, 1}, {call.x, nullptr, 1}, call.outputs,
                                             call.inputs, *schedule, grad_weight};
        if (call.transposed) {
            std::swap(product.left, product.right);
            std::swap(product.m, product.n);
        }
        host.check(run(product, host.stream));
    }
}

// --- moe_experts ---

// scale b[e] a[e] is added to the matrix of an expert; null: nothing.
struct CudaLowRank {
    const void *a, *b;  // (E, R, inputs), (E, outputs, R)
    int64_t rank;
};

struct CudaExperts {
    Element element;
    Gating gating;
    int64_t tokens, hidden, intermediate, experts, top_k;
    const void* x;                             // (T, H)
    const float* weights;                      // (T, K)
    const void *gate_up, *down;                // (E, 2 I, H), (E, H, I)
    int32_t *offsets, *permutation, *inverse;  // (E + 1), (S), (S): the order of the rows
    CudaLowRank gate_up_low, down_low;         // added to gate_up and down
    float low_scale;

    int64_t rows() const { return tokens * top_k; }
    int64_t row_bytes(int64_t columns) const { return rows() * columns * bytes_of(element); }
};

// scale (x weight[e]^T or x weight[e]) of R columns, the rows of a low-rank addition; none without a weight.
template <class Host>
class LowRows {
public:
    LowRows(Host& host, const CudaExperts& call, const R1kernelsMoeSchedule& schedule, bool transposed,
            const R1kernelsMoeRows& x, int64_t depth, const void* weight, int64_t rank)
        : rank_(rank), rows_(host.allocate(call.row_bytes(rank))), exist_(weight != nullptr) {
        if (!exist_) return;
        R1kernelsMoeProduct product = {};
        product.element = call.element;
        product.epilogue = R1KERNELS_MOE_STORE;
        product.transposed = transposed;
        product.scale = call.low_scale;
        product.x = x;
        product.weight = weight;
        product.columns = rank;
        product.depth = depth;
        product.schedule = schedule;
        product.out = rows_.data_ptr();
        host.check(run(product, host.stream));
    }

    // To be added to a product, times the other matrix of the two.
    R1kernelsMoeLowRank times(const void* weight) const {
        return exist_ ? R1kernelsMoeLowRank{rows_.data_ptr(), weight, rank_} : R1kernelsMoeLowRank{};
    }
    R1kernelsMoeRows rows() const { return {rows_.data_ptr(), nullptr, 1}; }

private:
    int64_t rank_;
    decltype(std::declval<Host&>().allocate(0)) rows_;
    bool exist_;
};

// Up GEMM with gather: pre_activation (S, 2 I) and activated (S, I), null where they are not asked for.
template <class Host>
void run_up(Host& host, const CudaExperts& call, const R1kernelsMoeSchedule& schedule, const R1kernelsMoeLowRank& low,
            bool clear_rest, void* pre_activation, void* activated) {
    R1kernelsMoeProduct product = {};
    product.element = call.element;
    product.epilogue = R1KERNELS_MOE_UP;
    product.gating = call.gating;
    product.transposed = 1;
    product.clear_rest = clear_rest;
    product.scale = 1.0f;
    product.low = low;
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
                     const void* rows, int64_t depth, const void* weight, const R1kernelsMoeLowRank& low,
                     const float* weights, void* out) {
    const auto products = host.allocate(call.row_bytes(call.hidden));
    R1kernelsMoeProduct product = {};
    product.element = call.element;
    product.epilogue = R1KERNELS_MOE_STORE;
    product.transposed = transposed;
    product.scale = 1.0f;
    product.low = low;
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
    const R1kernelsMoeRows x_rows = {call.x, call.permutation, static_cast<int32_t>(call.top_k)};
    const CudaLowRank &up = call.gate_up_low, &down = call.down_low;
    {
        const LowRows<Host> low(host, call, *schedule, true, x_rows, call.hidden, up.a, up.rank);
        // rows of sentinels are saved too, and no one computes them
        run_up(host, call, *schedule, low.times(up.b), pre_activation != nullptr, pre_activation, activated.data_ptr());
    }
    const LowRows<Host> low(host, call, *schedule, true, {activated.data_ptr(), nullptr, 1}, call.intermediate, down.a,
                            down.rank);
    run_and_combine(host, call, *schedule, true, activated.data_ptr(), call.intermediate, call.down, low.times(down.b),
                    call.weights, out);
}

// What a backward writes; null where it is not needed.
struct CudaExpertsGradients {
    void* hidden;    // (T, H)
    float* weights;  // (T, K)
    void *gate_up, *down;
    void *up_a, *up_b, *down_a, *down_b;

    bool pre_activation() const { return hidden || gate_up || up_a || up_b; }
    bool activated() const { return down || down_a || down_b; }
};

// grad (T, H); kept: the pre-activation (S, 2 I), or null to compute it again.
template <class Host>
void run_backward(Host& host, const CudaExperts& call, const void* grad, const void* kept,
                  const CudaExpertsGradients& needed) {
    const Schedule<Host> schedule(host, call.element, call.rows(), call.experts, call.offsets);
    const int32_t top_k = static_cast<int32_t>(call.top_k);
    const R1kernelsMoeRows grad_rows = {grad, call.permutation, top_k}, x_rows = {call.x, call.permutation, top_k};
    const CudaLowRank &up = call.gate_up_low, &down = call.down_low;
    const int64_t size = call.hidden, width = call.intermediate;
    const auto weight_gradient = [&](const R1kernelsMoeRows& left, int64_t m, const R1kernelsMoeRows& right, int64_t n,
                                     void* out) {
        if (out == nullptr) return;
        host.check(run(R1kernelsMoeWeightProduct{call.element, left, right, m, n, *schedule, out}, host.stream));
    };
    const auto low_rows = [&](bool wanted, bool transposed, const R1kernelsMoeRows& x, int64_t depth, const void* weight,
                              const CudaLowRank& low) {
        return LowRows<Host>(host, call, *schedule, transposed, x, depth, wanted ? weight : nullptr,
                             wanted ? low.rank : 0);
    };
    const auto low_x = low_rows(kept == nullptr || needed.up_b, true, x_rows, size, up.a, up);
    const auto grad_pre = host.allocate(needed.pre_activation() ? call.row_bytes(2 * width) : 0);
    const R1kernelsMoeRows grad_pre_rows = {grad_pre.data_ptr(), nullptr, 1};
    {
        const bool product_needed = needed.pre_activation() || needed.weights;
        const auto low_grad = low_rows(product_needed || needed.down_a, false, grad_rows, size, down.b, down);
        const auto computed = host.allocate(kept ? 0 : call.row_bytes(2 * width));
        const auto activated = host.allocate(needed.activated() ? call.row_bytes(width) : 0);
        const R1kernelsMoeRows activated_rows = {activated.data_ptr(), nullptr, 1};
        const int64_t parts = (width + R1KERNELS_MOE_PART_COLUMNS - 1) / R1KERNELS_MOE_PART_COLUMNS;
        const auto partials =
            host.allocate(needed.weights ? parts * call.rows() * static_cast<int64_t>(sizeof(float)) : 0);
        if (kept == nullptr) run_up(host, call, *schedule, low_x.times(up.b), false, computed.data_ptr(), nullptr);

        R1kernelsMoeProduct product = {};
        product.element = call.element;
        product.epilogue = R1KERNELS_MOE_GATE_BACKWARD;
        product.gating = call.gating;
        product.scale = 1.0f;
        product.x = grad_rows;
        product.weight = call.down;
        product.columns = width;
        product.depth = product_needed ? size : 0;  // s A alone needs no product
        if (product_needed) product.low = low_grad.times(down.a);
        product.schedule = *schedule;
        product.out = needed.pre_activation() ? grad_pre.data_ptr() : nullptr;
        product.activated = needed.activated() ? activated.data_ptr() : nullptr;
        product.pre_activation = kept ? kept : computed.data_ptr();
        product.scales = call.weights;
        product.order = call.permutation;
        product.partials = needed.weights ? static_cast<float*>(partials.data_ptr()) : nullptr;
        host.check(run(product, host.stream));

        if (needed.weights) {
            host.check(r1kernels_moe_sum_partials_cuda(&*schedule, product.partials, parts, call.permutation,
                                                       needed.weights, host.stream));
        }
        weight_gradient(grad_rows, size, activated_rows, width, needed.down);
        // of W + c B A: dB = dY^T (c X A^T) and dA = (c dY B)^T X, where dY are the gradients of the rows
        weight_gradient(low_grad.rows(), down.rank, activated_rows, width, needed.down_a);
        const auto low_activated = low_rows(needed.down_b, true, activated_rows, width, down.a, down);
        weight_gradient(grad_rows, size, low_activated.rows(), down.rank, needed.down_b);
    }
    weight_gradient(grad_pre_rows, 2 * width, x_rows, size, needed.gate_up);
    weight_gradient(grad_pre_rows, 2 * width, low_x.rows(), up.rank, needed.up_b);
    const auto low_pre = low_rows(needed.hidden || needed.up_a, false, grad_pre_rows, 2 * width, up.b, up);
    weight_gradient(low_pre.rows(), up.rank, x_rows, size, needed.up_a);
    if (needed.hidden) {
        run_and_combine(host, call, *schedule, false, grad_pre.data_ptr(), 2 * width, call.gate_up, low_pre.times(up.a),
                        nullptr, needed.hidden);
    }
}

}  // namespace r1kernels
