// The router on the CPU. Included by cpu.cpp alone, once for each instruction set.
#pragma once

#include "moe/cpu_route_choice.h"

namespace r1kernels::R1KERNELS_ISA {

namespace {

// Whether a logit is NaN or +inf: a softmax has no scores then.
template <typename T>
bool no_softmax(const T* row, int64_t experts) {
    Ints below = Ints{} - 1;
    for (int64_t i = 0; i < experts; i += kLanes) below &= logits_at(row, i, experts) < kInfinity;
    return bits_of(~below) != 0;
}

// c v_k / n: v the scores, or e^l, of the chosen, n what they are divided by, NaN where there are no scores; of `count`
// tokens.
template <typename T>
void weigh(const MoeRouter& call, const T* rows, int64_t count, const RouterScratch* scratch, const int64_t* indices,
           const bool* undefined, float* weights) {
    const int64_t top_k = call.top_k;
    double largest[kRouterTokens], total[kRouterTokens];
    for (int64_t token = 0; token < count; ++token) {
        const T* row = rows + token * call.experts;
        largest[token] = chosen_logits(row, indices + token * top_k, top_k, scratch[token].wide);
        total[token] = 1;
        if (call.softmax && !call.normalize) {
            const float most = largest_logit(row, call.experts);
            largest[token] = most;
            total[token] = exponentials(row, call.experts, most, nullptr);
        }
    }
    for (int64_t token = 0; token < count; ++token) {
        double* values = scratch[token].wide;
        for (int64_t k = 0; k < top_k; k += kDoubles) {
            const Doubles logits = load_doubles(values + k);
            store_doubles(values + k, call.softmax ? exp_negative(logits - largest[token]) : sigmoid(logits));
        }
    }
    for (int64_t token = 0; token < count; ++token) {
        const double* values = scratch[token].wide;
        if (call.normalize) {
            total[token] = undefined[token] ? __builtin_nan("") : call.softmax ? 0 : 1e-20;
            for (int64_t k = 0; k < top_k; ++k) total[token] += values[k];
        }
        const double factor = call.scale / total[token];
        for (int64_t k = 0; k < top_k; ++k) weights[token * top_k + k] = static_cast<float>(factor * values[k]);
    }
}

template <typename T>
void route_of(const MoeRouter& call, bool replayed, int64_t* indices, float* weights, void* memory, int64_t begin,
              int64_t end) {
    RouterScratch scratch[kRouterTokens];
    for (int64_t token = 0; token < kRouterTokens; ++token) scratch[token] = RouterScratch(call, memory, token);
    const float apart = needed_apart(call);
    const bool chosen_alone = replayed && call.softmax && call.normalize;  // no step before reads the other logits
    for (int64_t token = begin; token < end; token += kRouterTokens) {
        const int64_t count = end - token < kRouterTokens ? end - token : kRouterTokens;
        const T* rows = static_cast<const T*>(call.logits) + token * call.experts;
        int64_t* chosen = indices + token * call.top_k;
        bool undefined[kRouterTokens] = {};
        if (!replayed) choose(call, rows, count, scratch, apart, chosen, undefined);
        for (int64_t i = 0; chosen_alone && i < count; ++i) {
            undefined[i] = no_softmax(rows + i * call.experts, call.experts);
        }
        weigh(call, rows, count, scratch, chosen, undefined, weights + token * call.top_k);
    }
}

}  // namespace

}  // namespace r1kernels::R1KERNELS_ISA
