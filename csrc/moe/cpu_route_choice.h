// Which experts a token goes to, on the CPU. Included by cpu_route.h alone, once for each instruction set.
//
// The order of the selection scores decides, which are rounded from float64. Nearly every token gets the same order from
// values that cost less, the logits or scores in float32, and knows that it does; the others compute what is missing.
#pragma once

#include "moe/cpu_route_groups.h"

namespace r1kernels::R1KERNELS_ISA {

namespace {

// By how much a selection score may be off that is made of a sigmoid in float32.
//
// The sigmoid is off by 2^-22, and with B the largest |bias| both sums p + bias are rounded by (1 + B) 2^-24 at most.
float selection_error(const MoeRouter& call) {
    float most = 0;
    for (int64_t expert = 0; call.bias && expert < call.experts; ++expert) {
        const float size = __builtin_fabsf(call.bias[expert]);
        if (!(size <= most)) most = size;  // NaN stays
    }
    return (1 + most) * 0x1p-21f;
}

// How far apart the values of two experts must be, at least, for their scores to be in the same order.
//
// Those of a softmax are in the ratio e^(l - l'): logits that differ by 2^-20 have float32 scores that differ, and equal
// logits have equal ones, as long as the scores are no subnormals: e^-60 / E is none.
constexpr float kRange = 60.0f;
float needed_apart(const MoeRouter& call) { return call.softmax ? 0x1p-20f : 2 * selection_error(call); }

// The values: the logits, or selection scores in float32. False where they do not tell which groups are kept: the sum of
// two scores, rounded too, may be off by three times their error.
template <typename T>
bool values_of_token(const MoeRouter& call, const T* row, const RouterScratch& scratch, float apart) {
    float* values = scratch.scores;
    Floats total = {};
    for (int64_t i = 0; i < call.experts; i += kLanes) {
        Floats value = logits_at(row, i, call.experts);
        if (!call.softmax) value = sigmoid(value);
        if (call.bias) value += logits_at(call.bias, i, call.experts);
        total += value;
        store(values + i, value);
    }
    for (int64_t i = call.experts; i < whole_vectors(call.experts); ++i) values[i] = -kInfinity;
    if (call.n_group == 1) return true;
    if (bits_of(total != total)) return false;  // the groups would pass NaN over
    return keep_best_groups<Floats>(call, scratch, values) > 3 * apart;
}

// The selection scores of the candidates of a sigmoid, rounded from float64.
template <typename T>
void exact_scores(const MoeRouter& call, const T* row, const RouterScratch& scratch, int64_t found) {
    for (int64_t i = 0; i < found; ++i) scratch.scores[i] = to_float(row + scratch.places[i]);
    for (int64_t i = 0; i < found; i += kLanes) {
        const Wide logits = widen(load(scratch.scores + i));
        store(scratch.scores + i, narrow({sigmoid(logits.low), sigmoid(logits.high)}));
    }
    for (int64_t i = 0; call.bias && i < found; ++i) scratch.scores[i] += call.bias[scratch.places[i]];
}

// Returns whether there are no scores: those of a softmax are NaN if a logit is NaN or +inf.
template <typename T>
bool choose_by_scores(const MoeRouter& call, const T* row, const RouterScratch& scratch, int64_t* indices) {
    scores_of(call, row, scratch);
    const bool undefined = call.softmax && scratch.scores[0] != scratch.scores[0];
    for (int64_t i = 0; i < call.experts; i += kLanes) {
        Floats selection = load(scratch.scores + i);
        if (call.bias) selection += logits_at(call.bias, i, call.experts);
        const Ints inside = places_from(i) < static_cast<int32_t>(call.experts);
        store_as(scratch.keys + i, inside ? keys_of(selection) : lowest<Ints>());
    }
    if (call.n_group > 1) keep_best_groups<Ints>(call, scratch, scratch.keys);
    const int32_t least = least_chosen<Ints>(scratch.keys, call.experts, call.top_k, scratch.largest);
    const int64_t found = gather_from<Ints>(least, call.experts, scratch.keys, scratch.places);
    make_keys<Ints>(scratch.keys, found, scratch.keys);
    rank_candidates(scratch.keys, found, scratch.ranks);
    take_first(scratch, found, call.top_k, indices);
    return undefined;
}

// Of `count` tokens; `undefined` becomes true where there are no scores. `apart`: needed_apart(call).
template <typename T>
void choose(const MoeRouter& call, const T* rows, int64_t count, const RouterScratch* scratch, float apart,
            int64_t* indices, bool* undefined) {
    const bool by_values = !call.softmax || (!call.bias && call.n_group == 1);
    bool known[kRouterTokens];
    float least[kRouterTokens];
    int64_t found[kRouterTokens];
    for (int64_t token = 0; token < count; ++token) {
        known[token] = by_values && values_of_token(call, rows + token * call.experts, scratch[token], apart);
    }
    for (int64_t token = 0; token < count; ++token) {
        if (!known[token]) continue;
        const RouterScratch& at = scratch[token];
        least[token] = least_chosen<Floats>(at.scores, call.experts, call.top_k, at.largest) - 2 * apart;
        known[token] = least[token] > -kInfinity;
    }
    for (int64_t token = 0; token < count; ++token) {
        if (!known[token]) continue;
        found[token] = gather_from<Floats>(least[token], call.experts, scratch[token].scores, scratch[token].places);
    }
    for (int64_t token = 0; token < count; ++token) {
        if (!known[token]) continue;
        const RouterScratch& at = scratch[token];
        const int32_t most = make_keys<Floats>(at.scores, found[token], at.keys);
        known[token] = value_of(most) - least[token] <= kRange;  // not so: NaN, or infinity
        rank_candidates(at.keys, found[token], at.ranks);
    }
    for (int64_t token = 0; token < count; ++token) {
        if (!known[token] || stand_apart(scratch[token], found[token], apart, call.softmax)) continue;
        known[token] = !call.softmax;
        if (!known[token]) continue;
        const RouterScratch& at = scratch[token];
        exact_scores(call, rows + token * call.experts, at, found[token]);
        make_keys<Floats>(at.scores, found[token], at.keys);
        rank_candidates(at.keys, found[token], at.ranks);
    }
    for (int64_t token = 0; token < count; ++token) {
        int64_t* chosen = indices + token * call.top_k;
        if (known[token]) {
            take_first(scratch[token], found[token], call.top_k, chosen);
        } else {
            undefined[token] = choose_by_scores(call, rows + token * call.experts, scratch[token], chosen);
        }
    }
}

}  // namespace

}  // namespace r1kernels::R1KERNELS_ISA
