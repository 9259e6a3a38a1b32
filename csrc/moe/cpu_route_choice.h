// Which experts a token goes to, on the CPU. Included by cpu_route.h alone, once for each instruction set.
//
// The choice compares keys: integers in the order of the floats, NaN above everything, -0 equal to 0.
#pragma once

#include "moe/cpu_route_scores.h"

namespace r1kernels::R1KERNELS_ISA {

namespace {

constexpr int32_t kNotEligible = INT32_MIN;  // below the key of every float

// --- keys ---

Ints keys_of(Floats selection) {
    const Ints bits = (Ints)(selection + 0.0f);
    const Ints ordered = bits ^ ((bits >> 31) & 0x7fffffff);
    return selection == selection ? ordered : Ints{} + INT32_MAX;
}

Floats values_of(Ints keys) { return (Floats)(keys ^ ((keys >> 31) & 0x7fffffff)); }
float value_of(int32_t key) { return values_of(Ints{} + key)[0]; }
int32_t key_of(float value) { return keys_of(all(value))[0]; }

Ints load_keys(const int32_t* from) {
    Ints keys;
    memcpy(&keys, from, sizeof keys);
    return keys;
}

template <int kDistance>
Ints with_neighbour(Ints keys) {
    Ints mask = {};
    for (int lane = 0; lane < kLanes; ++lane) mask[lane] = lane ^ kDistance;
    const Ints other = choose_lanes(keys, keys, mask);
    return keys > other ? keys : other;
}

inline __attribute__((always_inline)) int32_t largest_key(Ints keys) {
    if constexpr (kLanes >= 16) keys = with_neighbour<8>(keys);
    if constexpr (kLanes >= 8) keys = with_neighbour<4>(keys);
    return with_neighbour<1>(with_neighbour<2>(keys))[0];
}

// A bit for each lane that holds (lanes of all ones or all zeros, as comparisons give them).
unsigned bits_of(Ints holds) {
#if defined(__AVX512F__)
    return _mm512_movepi32_mask((__m512i)holds);
#elif defined(__AVX2__)
    return static_cast<unsigned>(_mm256_movemask_ps((__m256)holds));
#else
    unsigned bits = 0;
    for (int lane = 0; lane < kLanes; ++lane) bits |= (holds[lane] & 1u) << lane;
    return bits;
#endif
}

Ints places_from(int64_t first) {
    Ints places = {};
    for (int lane = 0; lane < kLanes; ++lane) places[lane] = lane;
    return places + static_cast<int32_t>(first);
}

// --- groups ---

// For softmax the best key of a group, for sigmoid the key of the sum of its two best selection scores.
int32_t group_key(const MoeRouter& call, const int32_t* keys, int64_t size) {
    Ints best = Ints{} + kNotEligible, second = best;
    for (int64_t i = 0; i < size; i += kLanes) {
        Ints value = load_keys(keys + i);  // the buffers are longer than the keys by a vector
        if (size - i < kLanes) value = places_from(i) < static_cast<int32_t>(size) ? value : Ints{} + kNotEligible;
        const Ints smaller = value > best ? best : value;
        best = value > best ? value : best;
        second = smaller > second ? smaller : second;
    }
    const int32_t first = largest_key(best);
    if (call.softmax || size == 1) return first;
    const int lane = __builtin_ctz(bits_of(best == first));
    best = places_from(0) == lane ? second : best;
    return key_of(value_of(first) + value_of(largest_key(best)));
}

// Marks the experts outside of the best groups as not eligible; returns by how much the last group kept leads the others.
float keep_best_groups(const MoeRouter& call, const RouterScratch& scratch) {
    const int64_t size = call.experts / call.n_group;
    for (int64_t group = 0; group < call.n_group; ++group) {
        scratch.groups[group] = group_key(call, scratch.keys + group * size, size);
    }
    float last = 0, next = -kInfinity;
    for (int64_t kept = 0; kept < call.topk_group; ++kept) {
        int64_t best = 0;
        for (int64_t group = 1; group < call.n_group; ++group) {
            if (scratch.groups[group] > scratch.groups[best]) best = group;
        }
        last = value_of(scratch.groups[best]);
        scratch.groups[best] = kNotEligible;
    }
    for (int64_t group = 0; group < call.n_group; ++group) {
        if (scratch.groups[group] == kNotEligible) continue;  // one of the best
        const float value = value_of(scratch.groups[group]);
        if (!(value <= next)) next = value;  // NaN stays
        for (int64_t i = 0; i < size; ++i) scratch.keys[group * size + i] = kNotEligible;
    }
    return last - next;
}

// --- the K largest ---

// How many of the keys come before keys[at]: larger ones, and equal ones at a lower place. `count` keys in whole vectors.
int64_t rank_of(const int32_t* keys, int64_t count, int64_t at) {
    const Ints key = Ints{} + keys[at], place = Ints{} + static_cast<int32_t>(at);
    int64_t rank = 0;
    for (int64_t i = 0; i < count; i += kLanes) {
        const Ints value = load_keys(keys + i);
        rank += __builtin_popcount(bits_of((value > key) | ((value == key) & (places_from(i) < place))));
    }
    return rank;
}

// Copies the keys of at least `least` to the front, their places to `places`; returns how many there are.
int64_t gather_at_least(int32_t* keys, int64_t count, int32_t least, int32_t* places) {
    int64_t found = 0;
    for (int64_t i = 0; i < count; i += kLanes) {
#if defined(__AVX512F__)
        const __m512i value = (__m512i)load_keys(keys + i);
        const __mmask16 mask = _mm512_cmpge_epi32_mask(value, _mm512_set1_epi32(least));
        const __m512i place = (__m512i)places_from(i);
        _mm512_storeu_si512(keys + found, _mm512_maskz_compress_epi32(mask, value));
        _mm512_storeu_si512(places + found, _mm512_maskz_compress_epi32(mask, place));
        found += __builtin_popcount(mask);
#else
        for (int64_t at = i; at < i + kLanes; ++at) {
            const int32_t key = keys[at];
            keys[found] = key;
            places[found] = static_cast<int32_t>(at);
            found += key >= least;
        }
#endif
    }
    return found;
}

void fill_up(int32_t* keys, int64_t count) {
    for (int64_t i = count; i < whole_vectors(count); ++i) keys[i] = kNotEligible;
}

// A key that is at most the K-th largest one: the K-th largest of the largest keys of disjoint sets.
int32_t least_chosen(const RouterScratch& scratch, int64_t experts, int64_t top_k) {
    const int64_t keys = whole_vectors(experts);
    int64_t sets = whole_vectors(2 * top_k);  // twice as many as needed: the bound is closer
    if (sets > keys) sets = keys;
    for (int64_t set = 0; set < sets; set += kLanes) {
        Ints most = load_keys(scratch.keys + set);
        for (int64_t i = set + sets; i < keys; i += sets) {
            const Ints value = load_keys(scratch.keys + i);
            most = value > most ? value : most;
        }
        memcpy(scratch.largest + set, &most, sizeof most);
    }
    int32_t least = kNotEligible;
    for (int64_t i = 0; i < sets; ++i) {
        if (rank_of(scratch.largest, sets, i) == top_k - 1) least = scratch.largest[i];
    }
    return least;
}

// Puts the first `found` keys in descending order into `ranked`, the lowest place first among equals, and the places of the
// first K into `indices`. Few candidates remain, and each finds its rank by itself.
void rank_candidates(const RouterScratch& scratch, int64_t found, int64_t top_k, int64_t* indices) {
    fill_up(scratch.keys, found);
    for (int64_t i = 0; i < found; ++i) {
        const int64_t rank = rank_of(scratch.keys, found, i);
        scratch.ranked[rank] = scratch.keys[i];
        if (rank < top_k) indices[rank] = scratch.places[i];
    }
}

// The same for the keys of at least `least`; returns how many there are.
int64_t rank_largest(const RouterScratch& scratch, int64_t experts, int64_t top_k, int32_t least, int64_t* indices) {
    const int64_t found = gather_at_least(scratch.keys, whole_vectors(experts), least, scratch.places);
    rank_candidates(scratch, found, top_k, indices);
    return found;
}

// --- choice ---

template <typename T>
void choose_by_scores(const MoeRouter& call, const T* row, const RouterScratch& scratch, int64_t* indices) {
    scores_of(call, row, scratch);
    for (int64_t i = 0; i < call.experts; i += kLanes) {
        Floats selection = load(scratch.scores + i);
        if (call.bias) selection += logits_at(call.bias, i, call.experts);
        const Ints keys = keys_of(selection);
        memcpy(scratch.keys + i, &keys, sizeof keys);
    }
    fill_up(scratch.keys, call.experts);
    if (call.n_group > 1) keep_best_groups(call, scratch);
    const int32_t least = least_chosen(scratch, call.experts, call.top_k);
    rank_largest(scratch, call.experts, call.top_k, least, indices);
}

// The choice of a softmax without bias and groups by the logits alone, or false where scores could tie that logits do not.
//
// Scores are in the ratio e^(l - l'): logits that differ by kApart have float32 scores that differ, and equal logits have
// equal ones, as long as the scores are no subnormals: e^-60 / E is none.
template <typename T>
bool choose_by_logits(const MoeRouter& call, const T* row, const RouterScratch& scratch, int64_t* indices) {
    constexpr float kApart = 0x1p-20f, kRange = 60.0f;
    for (int64_t i = 0; i < call.experts; i += kLanes) {
        const Ints keys = keys_of(logits_at(row, i, call.experts));
        memcpy(scratch.keys + i, &keys, sizeof keys);
    }
    fill_up(scratch.keys, call.experts);
    const float least = value_of(least_chosen(scratch, call.experts, call.top_k)) - 2 * kApart;
    if (!(least > -kInfinity)) return false;
    const int64_t found = rank_largest(scratch, call.experts, call.top_k, key_of(least), indices);
    const float first = value_of(scratch.ranked[0]), last = value_of(scratch.ranked[call.top_k - 1]);
    if (!(first - last <= kRange)) return false;  // or NaN, or infinity
    fill_up(scratch.ranked, found);
    scratch.ranked[whole_vectors(found)] = kNotEligible;
    unsigned near = 0;
    for (int64_t k = 0; k < found; k += kLanes) {  // those equal to the last one of the choice too
        const Floats value = values_of(load_keys(scratch.ranked + k));
        const Floats apart = value - values_of(load_keys(scratch.ranked + k + 1));
        near |= bits_of((apart > 0.0f) & (apart < kApart) & (value >= last));
    }
    return near == 0;
}

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

// The choice of a sigmoid router from scores in float32, of which those near the choice are computed again exactly, or false
// where two groups are too close for that: the sum of two scores, rounded too, may be off by three times `error`.
template <typename T>
bool choose_among_near(const MoeRouter& call, const T* row, const RouterScratch& scratch, float error,
                       int64_t* indices) {
    for (int64_t i = 0; i < call.experts; i += kLanes) {
        Floats selection = sigmoid(logits_at(row, i, call.experts));
        if (call.bias) selection += logits_at(call.bias, i, call.experts);
        const Ints keys = keys_of(selection);
        memcpy(scratch.keys + i, &keys, sizeof keys);
    }
    fill_up(scratch.keys, call.experts);
    if (call.n_group > 1 && !(keep_best_groups(call, scratch) > 6 * error)) return false;
    const float least = value_of(least_chosen(scratch, call.experts, call.top_k)) - 2 * error;
    if (least != least) return false;
    const int64_t found = gather_at_least(scratch.keys, whole_vectors(call.experts), key_of(least), scratch.places);
    for (int64_t i = 0; i < found; ++i) scratch.scores[i] = to_float(row + scratch.places[i]);
    for (int64_t i = 0; i < found; i += kLanes) {
        const Wide logits = widen(load(scratch.scores + i));
        store(scratch.scores + i, narrow({sigmoid(logits.low), sigmoid(logits.high)}));
    }
    for (int64_t i = 0; call.bias && i < found; ++i) scratch.scores[i] += call.bias[scratch.places[i]];
    for (int64_t i = 0; i < found; i += kLanes) {
        const Ints keys = keys_of(load(scratch.scores + i));
        memcpy(scratch.keys + i, &keys, sizeof keys);
    }
    rank_candidates(scratch, found, call.top_k, indices);
    return true;
}

// `error`: selection_error(call).
template <typename T>
void choose(const MoeRouter& call, const T* row, const RouterScratch& scratch, float error, int64_t* indices) {
    bool done = false;
    if (!call.softmax) {
        done = choose_among_near(call, row, scratch, error, indices);
    } else if (!call.bias && call.n_group == 1) {
        done = choose_by_logits(call, row, scratch, indices);
    }
    if (!done) choose_by_scores(call, row, scratch, indices);
}

}  // namespace

}  // namespace r1kernels::R1KERNELS_ISA
