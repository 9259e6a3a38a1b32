// The router for every architecture from sm_80 on: its gradient, a warp per token, and the launchers; the forward stands in
// cuda_route.cuh.
//
// Notation: l logits, p scores, w weights, c scale, g gradient of the weights, n = sum p + eps; sums over the chosen.
#include "common/launch.cuh"
#include "moe/cuda.h"
#include "moe/cuda_route.cuh"

namespace r1kernels::moe {

template <class Scalar>
struct Choice {
    const int64_t* chosen;
    const float* grads;
    int64_t top_k, experts;

    __device__ bool is_expert(int64_t k) const { return k < top_k && chosen[k] >= 0 && chosen[k] < experts; }
};

// Writes finish(expert, sum) at every chosen expert, the sum of value(k) over the places k that chose it, in their order.
template <class Scalar, class Value, class Finish>
__device__ inline void scatter(const Choice<Scalar>& choice, Scalar* to, Value value, Finish finish) {
    const int64_t rounds = (choice.top_k + kWarpSize - 1) / kWarpSize;
    for (int64_t round = 0; round < rounds; ++round) {
        const int64_t mine = round * kWarpSize + lane_id();
        const int64_t expert = choice.is_expert(mine) ? choice.chosen[mine] : -1;
        double sum = 0;
        for (int64_t first = 0; first < choice.top_k; first += kWarpSize) {
            const int64_t k = first + lane_id();
            const bool is_expert = choice.is_expert(k);
            const int64_t other = is_expert ? choice.chosen[k] : -1;
            const double of_other = is_expert ? value(k) : 0;
            const int lanes = static_cast<int>(choice.top_k - first < kWarpSize ? choice.top_k - first : kWarpSize);
            for (int lane = 0; lane < lanes; ++lane) {
                const double term = __shfl_sync(kWholeWarp, of_other, lane);
                if (__shfl_sync(kWholeWarp, other, lane) == expert) sum += term;
            }
        }
        if (expert >= 0) to[expert] = from_float<Scalar>(static_cast<float>(finish(expert, sum)));
    }
}

template <class Scalar>
__device__ inline void clear(Scalar* to, int64_t count) {
    for (int64_t i = lane_id(); i < count; i += kWarpSize) to[i] = from_float<Scalar>(0.0f);
    __syncwarp();  // before other lanes write there
}

// Scores of a logit alone: dl_j = c p'_j g_j, or with n = sum p + eps: c / n (g_j - sum_i g_i p_i / n) p'_j.
template <class Scalar>
__device__ inline void alone_backward(const R1kernelsRoute& call, const Row<Scalar>& row,
                                      const Choice<Scalar>& choice, Scalar* to) {
    double total = 1, mean = 0;
    if (call.normalize) {
        double sum = 0, weighted = 0;
        for (int64_t k = lane_id(); k < call.top_k; k += kWarpSize) {
            if (!choice.is_expert(k)) continue;
            const double p = score_alone(row.kind, row.logit(choice.chosen[k]));
            sum += p;
            weighted += choice.grads[k] * p;
        }
        total = warp_sum(sum) + call.eps;
        mean = warp_sum(weighted) / total;
    }
    clear(to, call.experts);
    const double factor = call.scale / total;
    scatter(
        choice, to, [&](int64_t k) { return choice.grads[k] - mean; },
        [&](int64_t expert, double sum) { return factor * sum * slope_alone(row.kind, row.logit(expert)); });
}

// Softmax over the chosen: dl_j = c w_j (g_j - sum_i g_i w_i).
template <class Scalar>
__device__ inline void chosen_softmax_backward(const R1kernelsRoute& call, const Row<Scalar>& row,
                                               const Choice<Scalar>& choice, Scalar* to) {
    const SoftmaxSums sums = softmax_sums(call.top_k, [&](int64_t k) {
        return choice.is_expert(k) ? row.logit(choice.chosen[k]) : -INFINITY;
    });
    const auto weight = [&](int64_t expert) { return exp(row.logit(expert) - sums.largest) * sums.inverse; };
    double weighted = 0;
    for (int64_t k = lane_id(); k < call.top_k; k += kWarpSize) {
        if (choice.is_expert(k)) weighted += choice.grads[k] * weight(choice.chosen[k]);
    }
    const double mean = warp_sum(weighted);
    clear(to, call.experts);
    scatter(
        choice, to, [&](int64_t k) { return choice.grads[k] - mean; },
        [&](int64_t expert, double sum) { return call.scale * weight(expert) * sum; });
}

// Softmax over all experts: dl_e = c p_e (sum_{k chose e} g_k - sum_k g_k p_k).
template <class Scalar>
__device__ inline void softmax_backward(const R1kernelsRoute& call, const Row<Scalar>& row,
                                        const Choice<Scalar>& choice, Scalar* to) {
    double weighted = 0;
    for (int64_t k = lane_id(); k < call.top_k; k += kWarpSize) {
        if (choice.is_expert(k)) weighted += choice.grads[k] * row.wide_score(row.logit(choice.chosen[k]));
    }
    const double mean = warp_sum(weighted);
    const float factor = static_cast<float>(-call.scale * mean * row.sums.inverse);
    const float largest = static_cast<float>(row.sums.largest);
#pragma unroll 2  // all four at once would spill on sm_120
    for (int64_t expert = lane_id(); expert < call.experts; expert += kWarpSize) {
        to[expert] = from_float<Scalar>(factor * expf(row.logit(expert) - largest));
    }
    __syncwarp();
    scatter(
        choice, to, [&](int64_t k) { return double{choice.grads[k]}; },
        [&](int64_t expert, double sum) { return call.scale * row.wide_score(row.logit(expert)) * (sum - mean); });
}

template <class Scalar>
__global__ void __launch_bounds__(kRouteThreads, route_blocks(1))
    route_backward_kernel(R1kernelsRoute call, const int64_t* indices, const float* grad_weights, Scalar* grad_logits) {
    for (int64_t token = first_token(); token < call.tokens; token += all_warps_of_grid()) {
        Row<Scalar> row = {static_cast<const Scalar*>(call.logits) + token * call.experts, call.score, {}};
        const int64_t at = token * call.top_k;
        const Choice<Scalar> choice = {indices + at, grad_weights + at, call.top_k, call.experts};
        Scalar* to = grad_logits + token * call.experts;
        if (row.kind != Score::softmax) {
            alone_backward(call, row, choice, to);
        } else if (call.normalize) {
            chosen_softmax_backward(call, row, choice, to);
        } else {
            row.sums = softmax_sums<float>(call.experts, [&](int64_t expert) { return row.logit(expert); });
            softmax_backward(call, row, choice, to);
        }
    }
}

}  // namespace r1kernels::moe

using namespace r1kernels;
using namespace r1kernels::moe;

namespace {

int64_t blocks_of(const R1kernelsRoute& call) { return (call.tokens + kRouteWarps - 1) / kRouteWarps; }

template <class Scalar>
int choose(const R1kernelsRoute& call, float* weights, int64_t* indices, int32_t* counts, void* stream) {
    const auto run = [&](auto kernel) {
        const size_t shared = kRouteWarps * call.experts * sizeof(int);
        return launch(kernel, blocks_of(call), kRouteThreads, shared, stream, call, weights, indices, counts);
    };
    if (call.experts <= 4 * kWarpSize) return run(route_kernel<Scalar, 4>);
    if (call.experts <= 8 * kWarpSize) return run(route_kernel<Scalar, 8>);
    if (call.experts <= 16 * kWarpSize) return run(route_kernel<Scalar, 16>);
    if (call.experts <= R1KERNELS_ROUTE_MOST_EXPERTS) {
        return run(route_kernel<Scalar, R1KERNELS_ROUTE_MOST_EXPERTS / kWarpSize>);
    }
    return cudaErrorInvalidValue;
}

}  // namespace

int r1kernels_route_cuda(const R1kernelsRoute* call, float* weights, int64_t* indices, int32_t* counts, void* stream) {
    const int code =
        cudaMemsetAsync(counts, 0, call->experts * sizeof(int32_t), static_cast<cudaStream_t>(stream));
    if (code != cudaSuccess) return code;
    return with_scalar(call->element, [&](auto scalar) {
        using Scalar = decltype(scalar);
        if (call->replayed == nullptr) return choose<Scalar>(*call, weights, indices, counts, stream);
        return launch(replay_kernel<Scalar>, blocks_of(*call), kRouteThreads, 0, stream, *call, weights, indices,
                      counts);
    });
}

int r1kernels_route_cuda_backward(const R1kernelsRoute* call, const int64_t* indices, const float* grad_weights,
                                  void* grad_logits, void* stream) {
    return with_scalar(call->element, [&](auto scalar) {
        using Scalar = decltype(scalar);
        return launch(route_backward_kernel<Scalar>, blocks_of(*call), kRouteThreads, 0, stream, *call, indices,
                      grad_weights, static_cast<Scalar*>(grad_logits));
    });
}
