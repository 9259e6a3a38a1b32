// Which experts a token goes to, on the CPU.
//
// The order of the selection scores decides, which are computed in float64 and rounded once to float32, so that equal logits
// have equal scores wherever they stand. Nearly every token gets the same order from values that cost less, the logits or
// scores in float32, and knows that it does; the others compute what is missing.
#pragma once

#include "moe/cpu.h"
#include "moe/cpu_route_vectors.h"

namespace r1kernels::R1KERNELS_ISA {

namespace {

// Buffers of one token, in whole vectors, each with room for the vector behind it.
struct RouterScratch {
    double* wide;      // of all experts, or of the chosen ones
    double* slopes;    // of the chosen ones
    float* scores;     // of all experts; then of the candidates
    int32_t* keys;     // of all experts; then of the candidates
    int32_t* largest;  // the largest values of sets of them
    int32_t* groups;   // the key of each group
    int32_t* places;   // of the candidates
    int32_t* ranks;    // of the candidates
    int32_t* ordered;  // the places of the candidates, by their ranks

    RouterScratch() = default;
    RouterScratch(const R1kernelsRoute& call, void* base, int64_t token) {
        const int64_t size = whole_vectors(call.experts > call.top_k ? call.experts : call.top_k) + kLanes;
        wide = static_cast<double*>(base) + token * size * (kRouterBytes / 8);
        slopes = wide + size;
        scores = reinterpret_cast<float*>(slopes + size);
        keys = reinterpret_cast<int32_t*>(scores + size);
        largest = keys + size;
        groups = largest + size;
        places = groups + size;
        ranks = places + size;
        ordered = ranks + size;
    }
};

// --- the scores of all experts ---

// sqrt(log(1 + e^l)): lane by lane, for want of a logarithm of vectors.
Doubles root_of_softplus(Doubles logits) {
    for (int64_t lane = 0; lane < kDoubles; ++lane) {
        const double l = logits[lane];
        logits[lane] = __builtin_sqrt(__builtin_log1p(__builtin_exp(-__builtin_fabs(l))) + (l < 0 ? 0 : l));
    }
    return logits;
}

// The score of a logit alone, which a softmax is not.
Doubles score_alone(Score score, Doubles logits) {
    return score == Score::sigmoid ? sigmoid(logits) : root_of_softplus(logits);
}

template <typename T>
float largest_logit(const T* row, int64_t experts) {
    Floats most = all(-kInfinity);
    for (int64_t i = 0; i < experts; i += kLanes) most = larger(logits_at(row, i, experts), most);  // NaN never wins
    return largest_lane(most);
}

// e^(l - largest) of all experts; returns their sum, and keeps them in `to` unless it is null.
template <typename T>
double exponentials(const T* row, int64_t experts, float largest, float* to) {
    constexpr int64_t kTerms = 4 * kLanes;  // are added up in float32, which loses little of so few
    Doubles total = {};
    for (int64_t first = 0; first < experts; first += kTerms) {
        Floats some = {};
        for (int64_t i = first; i < first + kTerms && i < experts; i += kLanes) {
            const Floats value = exp_negative(logits_at(row, i, experts) - largest);
            if (to) store(to + i, value);
            some += value;
        }
        const Wide wide = widen(some);
        total += wide.low + wide.high;
    }
    return sum_of_lanes(total);
}

// p of all experts, rounded once.
template <typename T>
void scores_of(const R1kernelsRoute& call, const T* row, const RouterScratch& scratch) {
    double largest = 0, inverse = 0;
    if (call.score == Score::softmax) {
        largest = largest_logit(row, call.experts);
        Doubles total = {};
        for (int64_t i = 0; i < call.experts; i += kLanes) {
            const Wide logits = widen(logits_at(row, i, call.experts));
            const Wide value = {exp_negative(logits.low - largest), exp_negative(logits.high - largest)};
            total += value.low + value.high;
            memcpy(scratch.wide + i, &value, sizeof value);
        }
        inverse = 1.0 / sum_of_lanes(total);
    }
    for (int64_t i = 0; i < call.experts; i += kLanes) {
        Wide value;
        if (call.score == Score::softmax) {
            memcpy(&value, scratch.wide + i, sizeof value);
            value = {value.low * inverse, value.high * inverse};
        } else {
            value = widen(logits_at(row, i, call.experts));
            value = {score_alone(call.score, value.low), score_alone(call.score, value.high)};
        }
        store(scratch.scores + i, narrow(value));
    }
}

// --- the K largest ---

// A value that is at most the K-th largest one: the K-th largest of the largest values of disjoint sets. NaN among floats
// is passed over. Values and `memory` are in whole vectors, the values behind the last one the lowest.
template <typename Vector>
Scalar<Vector> least_chosen(const Scalar<Vector>* values, int64_t experts, int64_t top_k, void* memory) {
    const int64_t count = whole_vectors(experts);
    int64_t sets = whole_vectors(2 * top_k);  // twice as many as needed: the bound is closer
    if (sets > count) sets = count;
    Scalar<Vector>* largest = static_cast<Scalar<Vector>*>(memory);
    for (int64_t set = 0; set < sets; set += kLanes) {
        Vector most = lowest<Vector>();
        for (int64_t i = set; i < count; i += sets) most = larger(load_as<Vector>(values + i), most);
        store_as(largest + set, most);
    }
    Vector least = highest<Vector>();
    for (int64_t set = 0; set < sets; set += kLanes) {
        const Vector value = load_as<Vector>(largest + set);
        Ints above = {};
        for (int64_t other = 0; other < sets; other += kLanes) {
            above = and_above(above, value, load_as<Vector>(largest + other));
        }
        least = smaller(above < static_cast<int32_t>(top_k) ? value : highest<Vector>(), least);
    }
    return smallest_lane(least);
}

// --- candidates ---
//
// The few values that could be chosen: their keys and places, in the order of their places.

#if defined(__AVX512F__)
__mmask16 not_below(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_NLT_UQ); }
__mmask16 not_below(Ints a, Ints b) { return _mm512_cmpge_epi32_mask((__m512i)a, (__m512i)b); }
#endif

// Moves the values that are not below `least`, NaN too, to the front, their places to `places`; returns how many they are.
template <typename Vector>
int64_t gather_from(Scalar<Vector> least, int64_t experts, Scalar<Vector>* values, int32_t* places) {
    const Vector bound = Vector{} + least;
    int64_t found = 0;
    for (int64_t i = 0; i < experts; i += kLanes) {
        const Vector value = load_as<Vector>(values + i);
#if defined(__AVX512F__)
        const __mmask16 mask = not_below(value, bound);
        _mm512_storeu_si512(values + found, _mm512_maskz_compress_epi32(mask, (__m512i)value));
        _mm512_storeu_si512(places + found, _mm512_maskz_compress_epi32(mask, (__m512i)places_from(i)));
        found += __builtin_popcount(mask);
#else
        for (unsigned bits = bits_of(~(value < bound)); bits; bits &= bits - 1) {
            const int lane = __builtin_ctz(bits);
            values[found] = value[lane];
            places[found++] = static_cast<int32_t>(i) + lane;
        }
#endif
    }
    return found;
}

// The keys of the values that were gathered, behind the last one not eligible; returns the largest.
template <typename Vector>
int32_t make_keys(const Scalar<Vector>* values, int64_t found, int32_t* keys) {
    Ints most = lowest<Ints>();
    for (int64_t i = 0; i < found; i += kLanes) {
        const Ints inside = places_from(i) < static_cast<int32_t>(found);
        const Ints some = inside ? as_keys(load_as<Vector>(values + i)) : lowest<Ints>();
        store_as(keys + i, some);
        most = larger(some, most);
    }
    return largest_lane(most);
}

void rank_candidates(const int32_t* keys, int64_t found, int32_t* ranks) {
    const int64_t count = whole_vectors(found);
    for (int64_t i = 0; i < count; i += kLanes) store_as(ranks + i, ranks_of(keys, count, i));
}

// Whether candidates that follow each other are at least `apart` apart; where `ties` is 1, or equal. Those behind the
// K-th count too: one that is near it could have an equal score and a lower place.
bool stand_apart(const RouterScratch& scratch, int64_t found, float apart, uint32_t ties) {
    const int64_t count = whole_vectors(found);
    Ints near = {};
    for (int64_t i = 0; i < count; i += kLanes) {
        const Ints keys = load_as<Ints>(scratch.keys + i);
        Words gap = gap_above<1>(Words{} - 1, (Words)keys, keys, ties);
        for (int64_t j = 0; j < count; j += kLanes) {
            if (j != i) gap = gap_above<0>(gap, (Words)keys, load_as<Ints>(scratch.keys + j), ties);
        }
        const Words needed = larger((Words)keys_of(values_of(keys) + apart) - (Words)keys, Words{} + 1) - ties;
        near |= (gap < needed) & (places_from(i) < static_cast<int32_t>(found));
    }
    return bits_of(near) == 0;
}

// Writes the places of the first K of the ranked candidates.
void take_first(const RouterScratch& scratch, int64_t found, int64_t top_k, int64_t* indices) {
    int32_t *places = scratch.places, *ranks = scratch.ranks, *ordered = scratch.ordered;
    for (int64_t i = 0; i < whole_vectors(found); ++i) ordered[ranks[i]] = places[i];
    for (int64_t k = 0; k < top_k; ++k) indices[k] = ordered[k];
}

// --- groups ---

// Joins the two largest values of one set, lane by lane, with those of another, or with one more value.
template <typename Vector>
void join(Vector& first, Vector& second, Vector value) {
    second = larger(smaller(first, value), second);
    first = larger(first, value);
}
template <typename Vector>
void join(Vector& first, Vector& second, Vector other_first, Vector other_second) {
    join(first, second, other_first);
    second = larger(second, other_second);
}

// Joins the lanes of each of `count` sets, a power of two: set i fills the lanes of first[0] and second[0] from
// i * kLanes / count on.
template <int kSize = kLanes / 2, typename Vector>
void join_lanes(Vector* first, Vector* second, int64_t count) {
    const Ints lower = lower_blocks<kSize>(), upper = upper_blocks<kSize>();
    const int64_t half = count / 2;
    for (int64_t i = 0; i < half || i == 0; ++i) {
        const Vector a = first[i], b = first[i + half], c = second[i], d = second[i + half];
        Vector most = choose_lanes(a, b, lower), next = choose_lanes(c, d, lower);
        join(most, next, choose_lanes(a, b, upper), choose_lanes(c, d, upper));
        first[i] = most, second[i] = next;
    }
    if constexpr (kSize > 1) join_lanes<kSize / 2>(first, second, half);
}

Floats sum_of(Floats a, Floats b) { return a + b; }
Ints sum_of(Ints a, Ints b) { return keys_of(values_of(a) + values_of(b)); }

// The keys of up to kLanes groups from group `from` on; the score of a group is its best value, or the sum of its two best
// ones. A vector may be read from any value on.
template <typename Vector>
Ints keys_of_groups(const R1kernelsRoute& call, const Scalar<Vector>* values, int64_t from) {
    const int64_t size = call.experts / call.n_group;
    const int64_t groups = call.n_group - from < kLanes ? call.n_group - from : kLanes;
    int64_t sets = 1;
    while (sets < groups) sets *= 2;
    Vector first[kLanes], second[kLanes];
    for (int64_t group = 0; group < sets; ++group) {
        const Scalar<Vector>* of_group = values + (from + group) * size;
        Vector most = lowest<Vector>(), next = most;
        for (int64_t i = 0; group < groups && i < size; i += kLanes) {
            Vector value = load_as<Vector>(of_group + i);
            if (size - i < kLanes) value = places_from(i) < static_cast<int32_t>(size) ? value : lowest<Vector>();
            join(most, next, value);
        }
        first[group] = most, second[group] = next;
    }
    join_lanes(first, second, sets);
    const bool best_alone = !call.two_best || size == 1;
    const Ints keys = as_keys(best_alone ? first[0] : sum_of(first[0], second[0]));
    const Ints lane = places_from(0);
    const Ints in_order = choose_lanes(keys, keys, lane * static_cast<int32_t>(kLanes / sets) & (kLanes - 1));
    return lane < static_cast<int32_t>(groups) ? in_order : lowest<Ints>();
}

// Makes the values of the experts outside of the best groups the lowest; returns by how much the score of the last group
// kept leads those of the others.
template <typename Vector>
float keep_best_groups(const R1kernelsRoute& call, const RouterScratch& scratch, Scalar<Vector>* values) {
    const int64_t groups = whole_vectors(call.n_group), size = call.experts / call.n_group;
    for (int64_t i = 0; i < groups; i += kLanes) store_as(scratch.groups + i, keys_of_groups<Vector>(call, values, i));
    Floats last = highest<Floats>(), next = lowest<Floats>();
    for (int64_t i = 0; i < groups; i += kLanes) {
        const Ints keys = load_as<Ints>(scratch.groups + i);
        const Ints kept = ranks_of(scratch.groups, groups, i) < static_cast<int32_t>(call.topk_group);
        last = smaller(kept ? values_of(keys) : highest<Floats>(), last);
        next = larger(kept | (keys == kNotEligible) ? lowest<Floats>() : values_of(keys), next);
        store_as(scratch.ranks + i, kept);
    }
    for (int64_t group = 0; group < call.n_group; ++group) {
        const Ints kept = Ints{} + scratch.ranks[group];
        Scalar<Vector>* of_group = values + group * size;
        int64_t i = 0;
        for (; i + kLanes <= size; i += kLanes) {
            store_as(of_group + i, kept ? load_as<Vector>(of_group + i) : lowest<Vector>());
        }
        for (; i < size; ++i) of_group[i] = kept[0] ? of_group[i] : LaneOf<Vector>::kLowest;
    }
    return smallest_lane(last) - largest_lane(next);
}

// --- choice ---

// By how much a selection score may be off that is made of a sigmoid in float32.
//
// The sigmoid is off by 2^-22, and with B the largest |bias| both sums p + bias are rounded by (1 + B) 2^-24 at most.
float selection_error(const R1kernelsRoute& call) {
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
float needed_apart(const R1kernelsRoute& call) {
    return call.score == Score::softmax ? 0x1p-20f : 2 * selection_error(call);
}

// The values: the logits, or selection scores in float32. False where they do not tell which groups are kept: the sum of
// two scores, rounded too, may be off by three times their error.
template <typename T>
bool values_of_token(const R1kernelsRoute& call, const T* row, const RouterScratch& scratch, float apart) {
    float* values = scratch.scores;
    Floats total = {};
    for (int64_t i = 0; i < call.experts; i += kLanes) {
        Floats value = logits_at(row, i, call.experts);
        if (call.score == Score::sigmoid) value = sigmoid(value);
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
void exact_scores(const R1kernelsRoute& call, const T* row, const RouterScratch& scratch, int64_t found) {
    for (int64_t i = 0; i < found; ++i) scratch.scores[i] = to_float(row + scratch.places[i]);
    for (int64_t i = 0; i < found; i += kLanes) {
        const Wide logits = widen(load(scratch.scores + i));
        store(scratch.scores + i, narrow({sigmoid(logits.low), sigmoid(logits.high)}));
    }
    for (int64_t i = 0; call.bias && i < found; ++i) scratch.scores[i] += call.bias[scratch.places[i]];
}

// Returns whether there are no scores: those of a softmax are NaN if a logit is NaN or +inf.
template <typename T>
bool choose_by_scores(const R1kernelsRoute& call, const T* row, const RouterScratch& scratch, int64_t* indices) {
    scores_of(call, row, scratch);
    const bool undefined = call.score == Score::softmax && scratch.scores[0] != scratch.scores[0];
    for (int64_t i = 0; i < call.experts; i += kLanes) {
        Floats selection = call.by_logits ? logits_at(row, i, call.experts) : load(scratch.scores + i);
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
void choose(const R1kernelsRoute& call, const T* rows, int64_t count, const RouterScratch* scratch, float apart,
            int64_t* indices, bool* undefined) {
    const bool softmax = call.score == Score::softmax;
    const bool by_values = !call.by_logits && (call.score == Score::sigmoid || (softmax && !call.bias && call.n_group == 1));
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
        if (!known[token] || stand_apart(scratch[token], found[token], apart, softmax)) continue;
        known[token] = !softmax;
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
