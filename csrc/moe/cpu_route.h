// The router on the CPU, and its gradient. Included by cpu.cpp alone, once for each instruction set.
//
// Notation: l logits, p scores, w weights, c scale, g gradient of the weights, n = sum p + eps; sums over the chosen.
#pragma once

#include "moe/cpu_route_choice.h"

namespace r1kernels::R1KERNELS_ISA {

namespace {

// --- the chosen experts ---

// Their logits, in whole vectors, -inf behind the last; returns the largest.
template <typename T>
double chosen_logits(const T* row, const int64_t* indices, int64_t top_k, double* to) {
    double largest = -kInfinity;
    for (int64_t k = 0; k < top_k; ++k) {
        const double logit = to_float(row + indices[k]);
        largest = logit > largest ? logit : largest;  // NaN is passed over: the sum that it is part of is NaN anyway
        to[k] = logit;
    }
    for (int64_t k = top_k; k < whole_vectors(top_k); ++k) to[k] = -kInfinity;
    return largest;
}

// --- weights ---

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
void weigh(const R1kernelsRoute& call, const T* rows, int64_t count, const RouterScratch* scratch, const int64_t* indices,
           const bool* undefined, float* weights) {
    const int64_t top_k = call.top_k;
    double largest[kRouterTokens], total[kRouterTokens];
    for (int64_t token = 0; token < count; ++token) {
        const T* row = rows + token * call.experts;
        largest[token] = chosen_logits(row, indices + token * top_k, top_k, scratch[token].wide);
        total[token] = 1;
        if (call.score == Score::softmax && !call.normalize) {
            const float most = largest_logit(row, call.experts);
            largest[token] = most;
            total[token] = exponentials(row, call.experts, most, nullptr);
        }
    }
    for (int64_t token = 0; token < count; ++token) {
        double* values = scratch[token].wide;
        for (int64_t k = 0; k < top_k; k += kDoubles) {
            const Doubles logits = load_doubles(values + k);
            const bool softmax = call.score == Score::softmax;
            store_doubles(values + k, softmax ? exp_negative(logits - largest[token]) : score_alone(call.score, logits));
        }
    }
    for (int64_t token = 0; token < count; ++token) {
        const double* values = scratch[token].wide;
        if (call.normalize) {
            total[token] = undefined[token] ? __builtin_nan("") : call.score == Score::softmax ? 0 : call.eps;
            for (int64_t k = 0; k < top_k; ++k) total[token] += values[k];
        }
        const double factor = call.scale / total[token];
        for (int64_t k = 0; k < top_k; ++k) weights[token * top_k + k] = static_cast<float>(factor * values[k]);
    }
}

template <typename T>
void route_of(const R1kernelsRoute& call, int64_t* indices, float* weights, void* memory, int64_t begin, int64_t end) {
    RouterScratch scratch[kRouterTokens];
    for (int64_t token = 0; token < kRouterTokens; ++token) scratch[token] = RouterScratch(call, memory, token);
    const float apart = needed_apart(call);
    const bool replayed = call.replayed != nullptr;
    const bool chosen_alone = replayed && call.score == Score::softmax && call.normalize;  // no step before reads the other logits
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

// --- gradient ---

// Writes zeros, and at the chosen experts the sums of `values`, in whole vectors, over the places that chose them.
template <typename T>
void scatter(const R1kernelsRoute& call, const int64_t* indices, const RouterScratch& scratch, double* values, T* to) {
    int32_t* last = scratch.places;
    for (int64_t k = 0; k < call.top_k; ++k) last[indices[k]] = static_cast<int32_t>(k);
    bool twice = false;
    for (int64_t k = 0; k < call.top_k; ++k) twice |= last[indices[k]] != k;
    for (int64_t k = 0; twice && k < call.top_k; ++k) {
        const int32_t at = last[indices[k]];  // is written last
        if (at != k) values[at] += values[k];
    }
    T* rounded = reinterpret_cast<T*>(scratch.scores);
    for (int64_t k = 0; k < call.top_k; k += kLanes) {
        store(rounded + k, narrow({load_doubles(values + k), load_doubles(values + k + kDoubles)}));
    }
    memset(to, 0, call.experts * sizeof(T));
    for (int64_t k = 0; k < call.top_k; ++k) to[indices[k]] = rounded[k];
}

// Scores of a logit alone: dl_j = c p'_j g_j, or with n = sum p + eps: c / n (g_j - sum_i g_i p_i / n) p'_j.
// Softmax over the chosen: dl_j = c w_j (g_j - sum_i g_i w_i), w = e^l / n with n = sum e^l.
template <typename T>
void chosen_backward(const R1kernelsRoute& call, const T* rows, int64_t count, const RouterScratch* scratch,
                     const int64_t* indices, const float* grads, T* to) {
    const int64_t top_k = call.top_k;
    double largest[kRouterTokens];
    for (int64_t token = 0; token < count; ++token) {
        const int64_t* chosen = indices + token * top_k;
        largest[token] = chosen_logits(rows + token * call.experts, chosen, top_k, scratch[token].wide);
    }
    for (int64_t token = 0; token < count; ++token) {
        double *values = scratch[token].wide, *slopes = scratch[token].slopes;
        for (int64_t k = 0; k < top_k; k += kDoubles) {
            const Doubles logits = load_doubles(values + k);
            if (call.score == Score::softmax) {
                const Doubles e = exp_negative(logits - largest[token]);
                store_doubles(values + k, e);
                store_doubles(slopes + k, e);
            } else {
                const Doubles e = exp_negative(logits < 0 ? logits : -logits), inverse = 1.0 / (1.0 + e);
                const Doubles p = logits < 0 ? e * inverse : inverse;
                if (call.score == Score::sigmoid) {
                    store_doubles(values + k, p);
                    store_doubles(slopes + k, e * inverse * inverse);  // p (1 - p)
                } else {
                    const Doubles root = root_of_softplus(logits);
                    store_doubles(values + k, root);
                    store_doubles(slopes + k, root == 0 ? Doubles{} : 0.5 * p / root);
                }
            }
        }
    }
    for (int64_t token = 0; token < count; ++token) {
        double *values = scratch[token].wide, *slopes = scratch[token].slopes;
        const float* g = grads + token * top_k;
        double total = call.score == Score::softmax ? 0 : call.eps, mean = 0;
        for (int64_t k = 0; k < top_k; ++k) {
            total += values[k];
            mean += g[k] * values[k];
        }
        const double inverse = call.normalize ? 1 / total : 1;
        mean = call.normalize ? mean * inverse : 0;
        for (int64_t k = 0; k < top_k; ++k) values[k] = call.scale * inverse * slopes[k] * (g[k] - mean);
    }
    for (int64_t token = 0; token < count; ++token) {
        scatter(call, indices + token * top_k, scratch[token], scratch[token].wide, to + token * call.experts);
    }
}

// Softmax over all experts: dl_e = c p_e (sum_{k chose e} g_k - sum_k g_k p_k).
template <typename T>
void softmax_backward(const R1kernelsRoute& call, const T* rows, int64_t count, const RouterScratch* scratch,
                      const int64_t* indices, const float* grads, T* to) {
    const int64_t top_k = call.top_k, experts = call.experts;
    float largest[kRouterTokens];
    double factor[kRouterTokens], mean[kRouterTokens];
    for (int64_t token = 0; token < count; ++token) largest[token] = largest_logit(rows + token * experts, experts);
    for (int64_t token = 0; token < count; ++token) {
        float* values = scratch[token].scores;
        const double inverse = 1.0 / exponentials(rows + token * experts, experts, largest[token], values);
        factor[token] = call.scale * inverse;
        mean[token] = 0;
        for (int64_t k = token * top_k; k < (token + 1) * top_k; ++k) {
            mean[token] += grads[k] * inverse * values[indices[k]];
        }
    }
    for (int64_t token = 0; token < count; ++token) {
        const float* values = scratch[token].scores;
        T* row = to + token * experts;
        const float others = static_cast<float>(-factor[token] * mean[token]);
        for (int64_t i = 0; i + kLanes <= experts; i += kLanes) store(row + i, others * load(values + i));
        const int64_t rest = experts % kLanes;
        if (rest) store_some(row + experts - rest, others * load(values + experts - rest), static_cast<int>(rest));
    }
    for (int64_t token = 0; token < count; ++token) {
        const int64_t* chosen = indices + token * top_k;
        const float *values = scratch[token].scores, *g = grads + token * top_k;
        double* chose = scratch[token].wide;
        for (int64_t k = 0; k < top_k; ++k) chose[chosen[k]] = 0;
        for (int64_t k = 0; k < top_k; ++k) chose[chosen[k]] += g[k];
        for (int64_t k = 0; k < top_k; ++k) {
            const double grad = factor[token] * (chose[chosen[k]] - mean[token]) * values[chosen[k]];
            store_some(to + token * experts + chosen[k], all(static_cast<float>(grad)), 1);
        }
    }
}

template <typename T>
void route_backward_of(const R1kernelsRoute& call, const int64_t* indices, const float* grad_weights, void* grad_logits,
                       void* memory, int64_t begin, int64_t end) {
    RouterScratch scratch[kRouterTokens];
    for (int64_t token = 0; token < kRouterTokens; ++token) scratch[token] = RouterScratch(call, memory, token);
    for (int64_t token = begin; token < end; token += kRouterTokens) {
        const int64_t count = end - token < kRouterTokens ? end - token : kRouterTokens;
        const T* rows = static_cast<const T*>(call.logits) + token * call.experts;
        T* to = static_cast<T*>(grad_logits) + token * call.experts;
        const int64_t* chosen = indices + token * call.top_k;
        const float* grads = grad_weights + token * call.top_k;
        if (call.score == Score::softmax && !call.normalize) {
            softmax_backward(call, rows, count, scratch, chosen, grads, to);
        } else {
            chosen_backward(call, rows, count, scratch, chosen, grads, to);
        }
    }
}

}  // namespace

}  // namespace r1kernels::R1KERNELS_ISA
