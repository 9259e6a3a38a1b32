// The gradient of the router on the CPU. Included by cpu.cpp alone, once for each instruction set.
//
// Notation: l logits, p scores, w weights, c scale, g gradient of the weights, n = sum p + 1e-20; sums over the chosen.
#pragma once

#include "moe/cpu_route_scores.h"

namespace r1kernels::R1KERNELS_ISA {

namespace {

constexpr int64_t kRowsAhead = 4;  // that are asked for before they are written

template <typename T>
void store_one(T* to, double value) { store_some(to, all(static_cast<float>(value)), 1); }

// Writes zeros, and at the chosen experts the sums of `values` over the places that chose them.
template <typename T>
void scatter(const MoeRouter& call, const int64_t* indices, double* values, int32_t* last, T* to) {
    memset(to, 0, call.experts * sizeof(T));
    for (int64_t k = 0; k < call.top_k; ++k) last[indices[k]] = static_cast<int32_t>(k);  // the place that sums up
    for (int64_t k = 0; k < call.top_k; ++k) {
        const int32_t at = last[indices[k]];
        if (at != k) values[at] += values[k];
    }
    for (int64_t k = 0; k < call.top_k; ++k) store_one(to + indices[k], values[last[indices[k]]]);
}

// Sigmoid: dl_j = c p_j (1 - p_j) g_j, or with n = sum p + 1e-20: c / n (g_j - sum_i g_i p_i / n) p_j (1 - p_j).
template <typename T>
void sigmoid_backward(const MoeRouter& call, const T* row, const int64_t* indices, const float* g,
                      const RouterScratch& scratch, T* to) {
    double* wide = scratch.wide;
    chosen_logits(row, indices, call.top_k, wide);
    double total = call.normalize ? 1e-20 : 1, mean = 0;
    if (call.normalize) {
        for (int64_t first = 0; first < call.top_k; first += kDoubles) {
            Doubles p;
            memcpy(&p, wide + first, sizeof p);
            p = sigmoid(p);
            for (int64_t k = first; k < first + kDoubles && k < call.top_k; ++k) {
                total += p[k - first];
                mean += g[k] * p[k - first];
            }
        }
        mean /= total;
    }
    const double factor = call.scale / total;
    for (int64_t first = 0; first < call.top_k; first += kDoubles) {
        Doubles logits;
        memcpy(&logits, wide + first, sizeof logits);
        const Doubles slope = factor * sigmoid(logits) * sigmoid(-logits);
        for (int64_t k = first; k < first + kDoubles && k < call.top_k; ++k) {
            wide[k] = slope[k - first] * (g[k] - mean);
        }
    }
    scatter(call, indices, wide, scratch.places, to);
}

// Softmax over the chosen: dl_j = c w_j (g_j - sum_i g_i w_i).
template <typename T>
void chosen_softmax_backward(const MoeRouter& call, const T* row, const int64_t* indices, const float* g,
                             const RouterScratch& scratch, T* to) {
    double* wide = scratch.wide;
    const double inverse = 1 / chosen_exponentials(row, indices, call.top_k, wide);
    double mean = 0;
    for (int64_t k = 0; k < call.top_k; ++k) mean += g[k] * wide[k];
    mean *= inverse;
    for (int64_t k = 0; k < call.top_k; ++k) wide[k] *= call.scale * inverse * (g[k] - mean);
    scatter(call, indices, wide, scratch.places, to);
}

// Softmax over all experts: dl_e = c p_e (sum_{k chose e} g_k - sum_k g_k p_k).
template <typename T>
void softmax_backward(const MoeRouter& call, const T* row, const int64_t* indices, const float* g,
                      const RouterScratch& scratch, T* to) {
    float* values = scratch.scores;
    double* chose = scratch.wide;
    const double inverse = 1 / exponentials(row, call.experts, largest_logit(row, call.experts), values);
    double mean = 0;
    for (int64_t k = 0; k < call.top_k; ++k) mean += g[k] * inverse * values[indices[k]];
    const double factor = call.scale * inverse;
    const float others = static_cast<float>(-factor * mean);
    for (int64_t i = 0; i < call.experts; i += kLanes) {
        const Floats grad = others * load(values + i);
        if (i + kLanes <= call.experts) {
            store(to + i, grad);
        } else {
            store_some(to + i, grad, static_cast<int>(call.experts - i));
        }
    }
    for (int64_t k = 0; k < call.top_k; ++k) chose[indices[k]] = 0;
    for (int64_t k = 0; k < call.top_k; ++k) chose[indices[k]] += g[k];
    for (int64_t k = 0; k < call.top_k; ++k) {
        store_one(to + indices[k], factor * (chose[indices[k]] - mean) * values[indices[k]]);
    }
}

template <typename T>
void route_backward_of(const MoeRouter& call, const int64_t* indices, const float* grad_weights, void* grad_logits,
                       void* memory, int64_t begin, int64_t end) {
    const RouterScratch scratch(memory, call);
    const T* rows = static_cast<const T*>(call.logits);
    T* grad_rows = static_cast<T*>(grad_logits);
    for (int64_t token = begin; token < end; ++token) {
        const T* row = rows + token * call.experts;
        T* to = grad_rows + token * call.experts;
        prefetch<true>(call, grad_rows, token + kRowsAhead, end);
        const int64_t* chosen = indices + token * call.top_k;
        const float* g = grad_weights + token * call.top_k;
        if (!call.softmax) {
            sigmoid_backward(call, row, chosen, g, scratch, to);
        } else if (call.normalize) {
            chosen_softmax_backward(call, row, chosen, g, scratch, to);
        } else {
            softmax_backward(call, row, chosen, g, scratch, to);
        }
    }
}

}  // namespace

}  // namespace r1kernels::R1KERNELS_ISA
