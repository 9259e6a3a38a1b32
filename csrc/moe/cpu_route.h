// The router on the CPU. Included by cpu.cpp alone, once for each instruction set.
#pragma once

#include "moe/cpu_route_choice.h"

namespace r1kernels::R1KERNELS_ISA {

namespace {

// c v_k / n: v the scores, or e^l, of the chosen, n what they are divided by.
template <typename T>
void weigh(const MoeRouter& call, const T* row, const RouterScratch& scratch, const int64_t* indices, float* weights) {
    const int64_t top_k = call.top_k;
    double* values = scratch.wide;
    double total = 1;
    if (call.softmax && call.normalize) {
        total = chosen_exponentials(row, indices, top_k, values);
    } else if (call.softmax) {
        const float largest = largest_logit(row, call.experts);
        total = exponentials(row, call.experts, largest, scratch.scores);
        chosen_logits(row, indices, top_k, values);
        exponentials(values, top_k, largest);
    } else {
        chosen_logits(row, indices, top_k, values);
        for (int64_t k = 0; k < top_k; k += kDoubles) {
            Doubles value;
            memcpy(&value, values + k, sizeof value);
            value = sigmoid(value);
            memcpy(values + k, &value, sizeof value);
        }
        if (call.normalize) {
            total = 1e-20;
            for (int64_t k = 0; k < top_k; ++k) total += values[k];
        }
    }
    const double factor = call.scale / total;
    for (int64_t k = 0; k < top_k; ++k) weights[k] = static_cast<float>(factor * values[k]);
}

template <typename T>
void route_of(const MoeRouter& call, bool replayed, int64_t* indices, float* weights, void* memory, int64_t begin,
              int64_t end) {
    const RouterScratch scratch(memory, call);
    const float error = selection_error(call);
    const T* rows = static_cast<const T*>(call.logits);
    for (int64_t token = begin; token < end; ++token) {
        const T* row = rows + token * call.experts;
        prefetch<false>(call, rows, token + 1, end);
        int64_t* chosen = indices + token * call.top_k;
        if (!replayed) choose(call, row, scratch, error, chosen);
        weigh(call, row, scratch, chosen, weights + token * call.top_k);
    }
}

}  // namespace

}  // namespace r1kernels::R1KERNELS_ISA
