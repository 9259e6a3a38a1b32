// The gradient of the router on the CPU. Included by cpu.cpp alone, once for each instruction set.
//
// Notation: l logits, p scores, w weights, c scale, g gradient of the weights, n = sum p + 1e-20; sums over the chosen.
#pragma once

#include "moe/cpu_route.h"

namespace r1kernels::R1KERNELS_ISA {

namespace {

template <typename T>
void store_one(T* to, double value) { store_some(to, all(static_cast<float>(value)), 1); }

// Writes zeros, and at the chosen experts the sums of `values` over the places that chose them.
template <typename T>
void scatter(const MoeRouter& call, const int64_t* indices, const double* values, T* to) {
    memset(to, 0, call.experts * sizeof(T));
    for (int64_t k = 0; k < call.top_k; ++k) {
        double total = values[k];
        for (int64_t other = 0; other < call.top_k; ++other) {
            if (other != k && indices[other] == indices[k]) total += values[other];
        }
        store_one(to + indices[k], total);
    }
}

// Sigmoid: dl_j = c p_j (1 - p_j) g_j, or with n = sum p + 1e-20: c / n (g_j - sum_i g_i p_i / n) p_j (1 - p_j).
template <typename T>
void sigmoid_backward(const MoeRouter& call, const T* row, const int64_t* indices, const float* g, double* wide,
                      T* to) {
    for (int64_t k = 0; k < whole_vectors(call.top_k); ++k) wide[k] = k < call.top_k ? to_float(row + indices[k]) : 0;
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
    scatter(call, indices, wide, to);
}

// Softmax over the chosen: dl_j = c w_j (g_j - sum_i g_i w_i).
template <typename T>
void chosen_softmax_backward(const MoeRouter& call, const T* row, const int64_t* indices, const float* g, double* wide,
                             T* to) {
    const double sum = chosen_exponentials(row, indices, call.top_k, wide).sum;
    double mean = 0;
    for (int64_t k = 0; k < call.top_k; ++k) mean += g[k] * wide[k] / sum;
    for (int64_t k = 0; k < call.top_k; ++k) wide[k] *= call.scale / sum * (g[k] - mean);
    scatter(call, indices, wide, to);
}

// Softmax over all experts: dl_e = c p_e (sum_{k chose e} g_k - sum_k g_k p_k).
template <typename T>
void softmax_backward(const MoeRouter& call, const T* row, const int64_t* indices, const float* g, double* wide,
                      T* to) {
    const double sum = exponentials(row, call.experts, wide).sum;
    double mean = 0;
    for (int64_t k = 0; k < call.top_k; ++k) mean += g[k] * wide[indices[k]] / sum;
    const double factor = call.scale / sum;
    for (int64_t i = 0; i < call.experts; i += kLanes) {
        Wide value;
        memcpy(&value, wide + i, sizeof value);
        const Floats grad = narrow({-factor * mean * value.low, -factor * mean * value.high});
        if (i + kLanes <= call.experts) {
            store(to + i, grad);
        } else {
            store_some(to + i, grad, static_cast<int>(call.experts - i));
        }
    }
    for (int64_t k = 0; k < call.top_k; ++k) {
        double chose = 0;
        for (int64_t other = 0; other < call.top_k; ++other) chose += indices[other] == indices[k] ? g[other] : 0;
        store_one(to + indices[k], factor * (chose - mean) * wide[indices[k]]);
    }
}

template <typename T>
void route_backward_of(const MoeRouter& call, const int64_t* indices, const float* grad_weights, void* grad_logits,
                       void* memory, int64_t begin, int64_t end) {
    const RouterScratch scratch(memory, call);
    for (int64_t token = begin; token < end; ++token) {
        const T* row = static_cast<const T*>(call.logits) + token * call.experts;
        const int64_t* chosen = indices + token * call.top_k;
        const float* g = grad_weights + token * call.top_k;
        T* to = static_cast<T*>(grad_logits) + token * call.experts;
        if (!call.softmax) {
            sigmoid_backward(call, row, chosen, g, scratch.wide, to);
        } else if (call.normalize) {
            chosen_softmax_backward(call, row, chosen, g, scratch.wide, to);
        } else {
            softmax_backward(call, row, chosen, g, scratch.wide, to);
        }
    }
}

}  // namespace

}  // namespace r1kernels::R1KERNELS_ISA
