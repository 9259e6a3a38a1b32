// The router: a warp per token, which chooses among keys in registers.
//
// Scores are computed in float64 and rounded once to float32, so that equal logits have equal scores on every device. The
// choice compares their keys: integers in the order of the floats, NaN above everything. Expert e lies in lane e % 32.
//
// Most GPUs have few units for float64: one for 64 of float32. So float32 makes the choice wherever it tells what the scores
// would, and float64 is left for the experts that are chosen, for those too close to each other, and for what float32 cannot
// stand for: sqrt(softplus), and a softmax with a bias or with groups that are chosen by two scores.
#pragma once

#include <type_traits>

#include "common/block_reduce.cuh"
#include "common/elements.cuh"
#include "moe/call.h"

namespace r1kernels::moe {

constexpr int kRouteThreads = 128;
constexpr int kRouteWarps = kRouteThreads / kWarpSize;
constexpr int kNotEligible = INT32_MIN;  // below the key of every float

// --- scores ---

__device__ inline double sigmoid(double x) { return 1.0 / (1.0 + exp(-x)); }

// log(1 + e^x); NaN stays.
__device__ inline double softplus(double x) { return log1p(exp(-fabs(x))) + (x < 0.0 ? 0.0 : x); }

// The score of a logit alone, and its slope: p (1 - p) of a sigmoid; of p = sqrt(softplus) sigmoid / (2 p), 0 where p is.
__device__ inline double score_alone(Score score, double x) {
    return score == Score::sigmoid ? sigmoid(x) : sqrt(softplus(x));
}
__device__ inline double slope_alone(Score score, double x) {
    if (score == Score::sigmoid) return sigmoid(x) * sigmoid(-x);
    const double p = sqrt(softplus(x));
    return p == 0.0 ? 0.0 : 0.5 * sigmoid(x) / p;
}

__device__ inline double warp_sum(double value) {
    return warp_reduce(value, [](double a, double b) { return a + b; });
}

struct SoftmaxSums {
    double largest, inverse;  // of the sum of e^(l - largest)
};

// The inverse is NaN if that of softmax_sums is, else 1: whether one of the logits is NaN or infinite, or all are -inf.
template <class At>
__device__ inline SoftmaxSums softmax_defined(int64_t count, At at) {
    float most = -INFINITY;
    bool is_nan = false;
    for (int64_t i = lane_id(); i < count; i += kWarpSize) {
        const float logit = at(i);
        most = fmaxf(most, logit);
        is_nan |= logit != logit;
    }
    most = warp_reduce(most, [](float a, float b) { return fmaxf(a, b); });
    const bool undefined = __any_sync(kWholeWarp, is_nan) || fabsf(most) == INFINITY;
    return {most, undefined ? NAN : 1.0};
}

// Of some logits of a token; at(i) is the logit i < count. Float: what the exponentials are computed in.
template <class Float = double, class At>
__device__ inline SoftmaxSums softmax_sums(int64_t count, At at) {
    float most = -INFINITY;
    for (int64_t i = lane_id(); i < count; i += kWarpSize) most = fmaxf(most, at(i));  // NaN comes into the sum
    const Float largest = warp_reduce(most, [](float a, float b) { return fmaxf(a, b); });
    double sum = 0;
    for (int64_t i = lane_id(); i < count; i += kWarpSize) {
        const Float distance = at(i) - largest;
        sum += std::is_same_v<Float, float> ? expf(distance) : exp(distance);
    }
    return {largest, 1.0 / warp_sum(sum)};
}

// A token's logits, and what turns one of them into a score.
template <class Scalar>
struct Row {
    const Scalar* logits;
    Score kind;
    SoftmaxSums sums;  // of all experts, for softmax

    __device__ float logit(int64_t expert) const { return to_float(logits[expert]); }
    __device__ double wide_score(double logit) const {
        return kind == Score::softmax ? exp(logit - sums.largest) * sums.inverse : score_alone(kind, logit);
    }
    __device__ float score(double logit) const { return static_cast<float>(wide_score(logit)); }

    // For the scores that choose.
    __device__ void sum_up_for_choice(const R1kernelsRoute& call) {
        if (kind != Score::softmax || call.by_logits) return;
        sums = softmax_sums(call.experts, [&](int64_t expert) { return logit(expert); });
    }

    // For the weights: where they are a softmax over the chosen, no more is asked than whether that over all exists.
    __device__ void sum_up_for_weights(const R1kernelsRoute& call) {
        if (kind != Score::softmax) return;
        const auto at = [&](int64_t expert) { return logit(expert); };
        sums = call.normalize ? softmax_defined(call.experts, at) : softmax_sums<float>(call.experts, at);
    }
};

// --- keys ---

// Both zeros have one key.
__device__ inline int key_of(float value) {
    value += 0.0f;
    int bits;
    memcpy(&bits, &value, sizeof bits);
    return value == value ? bits ^ ((bits >> 31) & INT32_MAX) : INT32_MAX;
}

__device__ inline float value_of(int key) {
    const int bits = key ^ ((key >> 31) & INT32_MAX);
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

__device__ inline int warp_max(int value) { return __reduce_max_sync(kWholeWarp, value); }
__device__ inline int warp_min(int value) { return __reduce_min_sync(kWholeWarp, value); }

// Both the largest key and the lowest number that has it, over the lanes; each lane gives its own.
struct Best {
    int key, number;
};

__device__ inline Best warp_best(Best mine) {
    const int key = warp_max(mine.key);
    return {key, warp_min(mine.key == key ? mine.number : INT32_MAX)};
}

// The selection keys of all experts: key i of lane l belongs to expert 32 i + l.
template <int kOfLane>
struct Keys {
    int keys[kOfLane];

    __device__ static int expert(int i) { return i * kWarpSize + lane_id(); }

    // The best of the experts [first, end).
    __device__ Best best(int first, int end) const {
        Best mine = {kNotEligible, INT32_MAX};
#pragma unroll
        for (int i = 0; i < kOfLane; ++i) {
            const bool inside = expert(i) >= first && expert(i) < end;
            if (inside && keys[i] > mine.key) mine = {keys[i], expert(i)};
        }
        return warp_best(mine);
    }

    __device__ void set(int number, int key) {
#pragma unroll
        for (int i = 0; i < kOfLane; ++i) {
            if (expert(i) == number) keys[i] = key;
        }
    }
    __device__ void remove(int number) { set(number, kNotEligible); }
};

// --- choice ---

// The best key of a group, or the key of the sum of its two best selection scores.
template <int kOfLane>
__device__ inline int group_key(const R1kernelsRoute& call, Keys<kOfLane> selection, int first, int end) {
    const Best best = selection.best(first, end);
    if (!call.two_best || end - first == 1) return best.key;
    selection.remove(best.number);
    return key_of(value_of(best.key) + value_of(selection.best(first, end).key));
}

__device__ inline Best best_group(const int* groups, int n_group) {
    Best mine = {kNotEligible, INT32_MAX};
    for (int group = lane_id(); group < n_group; group += kWarpSize) {
        if (groups[group] > mine.key) mine = {groups[group], group};
    }
    return warp_best(mine);
}

constexpr float kRange = 60.0f;

// Makes the experts outside of the best groups not eligible; returns by how much the last group kept leads the others, or 0
// where it is further than kRange behind the first.
// `groups` is memory for n_group integers of this warp alone.
template <int kOfLane>
__device__ inline float keep_best_groups(const R1kernelsRoute& call, Keys<kOfLane>& selection, int* groups) {
    const int n_group = static_cast<int>(call.n_group), size = static_cast<int>(call.experts / call.n_group);
    for (int group = 0; group < n_group; ++group) {
        const int key = group_key(call, selection, group * size, (group + 1) * size);
        if (lane_id() == group % kWarpSize) groups[group] = key;
    }
    const Best first = best_group(groups, n_group);
    Best last;
    for (int64_t kept = 0; kept < call.topk_group; ++kept) {
        last = best_group(groups, n_group);
        if (lane_id() == last.number % kWarpSize) groups[last.number] = kNotEligible;
    }
    const Best next = best_group(groups, n_group);
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kOfLane; ++i) {
        const int expert = Keys<kOfLane>::expert(i);
        if (expert < call.experts && groups[expert / size] != kNotEligible) selection.keys[i] = kNotEligible;
    }
    __syncwarp();  // the next token's keys come to the same place
    if (next.key == kNotEligible) return INFINITY;
    return value_of(first.key) - value_of(last.key) <= kRange ? value_of(last.key) - value_of(next.key) : 0.0f;
}

// The keys of value(expert), by way of `memory`, E integers of this warp alone, so that values are computed in a loop.
template <int kOfLane, class Value>
__device__ inline Keys<kOfLane> keys_of(const R1kernelsRoute& call, int* memory, Value value) {
    const int experts = static_cast<int>(call.experts);
#pragma unroll 4
    for (int expert = lane_id(); expert < experts; expert += kWarpSize) memory[expert] = key_of(value(expert));
    Keys<kOfLane> selection;
#pragma unroll
    for (int i = 0; i < kOfLane; ++i) {
        const int expert = Keys<kOfLane>::expert(i);
        selection.keys[i] = expert < experts ? memory[expert] : kNotEligible;  // which this lane has written
    }
    __syncwarp();  // the memory is free again
    return selection;
}

// What experts are chosen by.
template <class Scalar>
__device__ inline float selection_of(const R1kernelsRoute& call, const Row<Scalar>& row, int expert) {
    const float logit = row.logit(expert);
    const float score = call.by_logits ? logit : row.score(logit);
    return call.bias == nullptr ? score : score + call.bias[expert];
}

template <int kOfLane>
__device__ inline void choose(const R1kernelsRoute& call, Keys<kOfLane> selection, int64_t* chosen) {
    for (int64_t k = 0; k < call.top_k; ++k) {
        const Best best = selection.best(0, static_cast<int>(call.experts));
        if (lane_id() == k % kWarpSize) chosen[k] = best.number;
        selection.remove(best.number);
    }
}

// --- choice by float32 ---

// The values of float32 that stand for what experts are chosen by, and how far apart two of them must be for it to be in the
// same order; equal ones may be told to be equal.
//
// A softmax keeps the order of the logits: e^(l - l') is the ratio of two scores, so that logits 2^-20 apart have float32
// scores that differ, and equal logits equal ones, as long as the scores are no subnormals: e^-60 / E is none. A sigmoid in
// float32 is off by 2^-22, and with B the largest |bias| both sums p + bias are rounded by (1 + B) 2^-24 at most.
constexpr float kLogitsApart = 0x1p-20f;

__device__ inline float sigmoid_narrow(float logit) { return 1.0f / (1.0f + expf(-logit)); }

__device__ inline bool by_narrow_values(const R1kernelsRoute& call) {
    if (call.by_logits) return false;  // they are float32 as it is
    if (call.score == Score::softmax) return call.bias == nullptr && (call.n_group == 1 || !call.two_best);
    return call.score == Score::sigmoid;
}

__device__ inline float needed_apart(const R1kernelsRoute& call) {
    if (call.score == Score::softmax) return kLogitsApart;
    float most = 0.0f;
    for (int64_t i = lane_id(); call.bias != nullptr && i < call.experts; i += kWarpSize) {
        most = max_or_nan(most, fabsf(call.bias[i]));
    }
    return 2 * (1 + r1kernels::warp_max(most)) * 0x1p-21f;
}

// Where the values chosen follow each other too closely: the experts that could be among the K best, from `least` on, by the
// keys of what they are chosen by; the others not eligible. `memory` is for E integers of this warp alone.
template <int kOfLane, class Scalar>
__device__ inline void recheck(const R1kernelsRoute& call, const Row<Scalar>& row, Keys<kOfLane>& values, float least,
                               int* memory) {
    int count = 0;
#pragma unroll
    for (int i = 0; i < kOfLane; ++i) {
        const bool close = values.keys[i] != kNotEligible && value_of(values.keys[i]) >= least;
        const unsigned lanes = __ballot_sync(kWholeWarp, close);
        if (close) memory[count + __popc(lanes & ((1u << lane_id()) - 1))] = Keys<kOfLane>::expert(i);
        count += __popc(lanes);
        values.keys[i] = kNotEligible;
    }
    __syncwarp();
    for (int first = 0; first < count; first += kWarpSize) {
        const int mine = first + lane_id() < count ? memory[first + lane_id()] : -1;
        const int key = mine < 0 ? kNotEligible : key_of(selection_of(call, row, mine));
        for (int lane = 0; lane < kWarpSize && first + lane < count; ++lane) {
            values.set(__shfl_sync(kWholeWarp, mine, lane), __shfl_sync(kWholeWarp, key, lane));
        }
    }
    __syncwarp();  // the memory is free again
}

// Whether float32 values make the choice; else nothing is written.
template <int kOfLane, class Scalar>
__device__ inline bool choose_by_values(const R1kernelsRoute& call, const Row<Scalar>& row, int* memory,
                                        int64_t* chosen) {
    const bool softmax = call.score == Score::softmax;
    const float apart = needed_apart(call);
    Keys<kOfLane> values = keys_of<kOfLane>(call, memory, [&](int expert) {
        const float logit = row.logit(expert);
        if (softmax) return logit;
        return call.bias == nullptr ? sigmoid_narrow(logit) : sigmoid_narrow(logit) + call.bias[expert];
    });
    // the sum of two scores, rounded too, may be off by three times their error
    if (call.n_group > 1 && !(keep_best_groups(call, values, memory) > 3 * apart)) return false;

    Keys<kOfLane> left = values;
    float first = 0.0f, last = 0.0f;
    bool stand_apart = true;
    for (int64_t k = 0;; ++k) {
        const Best best = left.best(0, static_cast<int>(call.experts));
        if (best.key == kNotEligible) break;  // of the experts none is left out
        const float value = value_of(best.key);
        const bool tie = softmax && k > 0 && last == value;
        if (k == 0) {
            first = value;
            if (!(fabsf(first) < INFINITY)) return false;
        } else {
            stand_apart &= last - value > apart || tie;
        }
        // those behind the K-th count too: one that is near it could have an equal score and a lower number
        if (k >= call.top_k && !tie) break;
        last = value;
        left.remove(best.number);
    }
    if (!(first - last <= kRange)) return false;  // a NaN too
    if (!stand_apart) {
        if (softmax) return false;
        recheck(call, row, values, last - apart, memory);
    }
    choose(call, values, chosen);
    return true;
}

// --- weights ---

// Choice k is read by the lane k % 32, which has also written it.
template <class Scalar>
__device__ inline void weigh(const R1kernelsRoute& call, const Row<Scalar>& row, const int64_t* chosen, float* weights,
                             int32_t* counts) {
    const auto is_expert = [&](int64_t k) { return chosen[k] >= 0 && chosen[k] < call.experts; };
    const bool softmax_of_chosen = row.kind == Score::softmax && call.normalize;
    double largest = 0, factor = call.scale;
    if (softmax_of_chosen) {
        const SoftmaxSums sums =
            softmax_sums(call.top_k, [&](int64_t k) { return is_expert(k) ? row.logit(chosen[k]) : -INFINITY; });
        largest = sums.largest;
        factor *= row.sums.inverse == row.sums.inverse ? sums.inverse : row.sums.inverse;  // NaN, of all logits
    } else if (call.normalize) {
        double sum = 0;
        for (int64_t k = lane_id(); k < call.top_k; k += kWarpSize) {
            if (is_expert(k)) sum += row.score(row.logit(chosen[k]));
        }
        factor /= warp_sum(sum) + call.eps;
    }
    for (int64_t k = lane_id(); k < call.top_k; k += kWarpSize) {
        double weight = 0;
        if (is_expert(k)) {
            const double logit = row.logit(chosen[k]);
            weight = factor * (softmax_of_chosen ? exp(logit - largest) : row.score(logit));
            atomicAdd(counts + chosen[k], 1);  // of integers: in any order
        }
        weights[k] = static_cast<float>(weight);
    }
}

// --- kernels ---

__device__ inline int64_t first_token() { return blockIdx.x * int64_t{kRouteWarps} + threadIdx.x / kWarpSize; }
__device__ inline int64_t all_warps_of_grid() { return gridDim.x * int64_t{kRouteWarps}; }

// How many blocks share a processor: the compiler, left to itself, spills to fit more of them.
constexpr int route_blocks(int of_lane) { return of_lane > 16 ? 2 : of_lane > 4 ? 4 : 5; }

constexpr int kMostOfLaneByValues = 16;  // keys; twice as many would not fit beside the values

// counts are zeros before. Shared memory: E integers a warp.
template <class Scalar, int kOfLane>
__global__ void __launch_bounds__(kRouteThreads, route_blocks(kOfLane))
    route_kernel(R1kernelsRoute call, float* weights, int64_t* indices, int32_t* counts) {
    int* memory = reinterpret_cast<int*>(shared_memory) + threadIdx.x / kWarpSize * call.experts;
    for (int64_t token = first_token(); token < call.tokens; token += all_warps_of_grid()) {
        Row<Scalar> row = {static_cast<const Scalar*>(call.logits) + token * call.experts, call.score, {}};
        int64_t* chosen = indices + token * call.top_k;
        bool known = false;
        if constexpr (kOfLane <= kMostOfLaneByValues) {
            known = by_narrow_values(call) && choose_by_values<kOfLane>(call, row, memory, chosen);
        }
        if (!known) {
            row.sum_up_for_choice(call);
            Keys<kOfLane> selection =
                keys_of<kOfLane>(call, memory, [&](int expert) { return selection_of(call, row, expert); });
            if (call.n_group > 1) keep_best_groups(call, selection, memory);
            choose(call, selection, chosen);
        }
        row.sum_up_for_weights(call);
        weigh(call, row, chosen, weights + token * call.top_k, counts);
    }
}

template <class Scalar>
__global__ void __launch_bounds__(kRouteThreads, route_blocks(1))
    replay_kernel(R1kernelsRoute call, float* weights, int64_t* indices, int32_t* counts) {
    for (int64_t token = first_token(); token < call.tokens; token += all_warps_of_grid()) {
        Row<Scalar> row = {static_cast<const Scalar*>(call.logits) + token * call.experts, call.score, {}};
        row.sum_up_for_weights(call);
        int64_t* chosen = indices + token * call.top_k;
        for (int64_t k = lane_id(); k < call.top_k; k += kWarpSize) chosen[k] = call.replayed[token * call.top_k + k];
        weigh(call, row, chosen, weights + token * call.top_k, counts);
    }
}

}  // namespace r1kernels::moe
