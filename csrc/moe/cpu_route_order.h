// The K largest of a token's values and their order, on the CPU. Included by cpu_route_choice.h alone, once for each
// instruction set.
//
// Vectors are compared lane with lane at every distance: each lane counts for itself, and no branch depends on the values.
#pragma once

#include "moe/cpu_route_scores.h"

namespace r1kernels::R1KERNELS_ISA {

namespace {

// --- counting ---

// `count`, and how many lanes of `others` are above each lane of `bound`.
template <int kDistance = kLanes - 1, typename Vector>
Ints and_above(Ints count, Vector bound, Vector others) {
    count = neighbours<kDistance>(others) > bound ? count + 1 : count;
    if constexpr (kDistance > 0) return and_above<kDistance - 1>(count, bound, others);
    else return count;
}

// How many lanes come before each lane: those of larger keys, and those of equal keys to its left.
template <int kDistance = kLanes - 1>
Ints lanes_before(Ints keys) {
    if constexpr (kDistance > 0) {
        Ints left = {};
        for (int lane = 0; lane < kLanes; ++lane) left[lane] = (lane ^ kDistance) < lane ? -1 : 0;
        const Ints count = lanes_before<kDistance - 1>(keys);
        return neighbours<kDistance>(keys) > keys + left ? count + 1 : count;
    } else {
        return Ints{};
    }
}

// How many of the keys come before keys[at] to keys[at + kLanes - 1]; `count` of them, in whole vectors.
Ints ranks_of(const int32_t* keys, int64_t count, int64_t at) {
    const Ints key = load_as<Ints>(keys + at);
    Ints rank = lanes_before(key);
    for (int64_t i = 0; i < at; i += kLanes) rank = and_above(rank, key - 1, load_as<Ints>(keys + i));
    for (int64_t i = at + kLanes; i < count; i += kLanes) rank = and_above(rank, key, load_as<Ints>(keys + i));
    return rank;
}

// The smallest of `gap` and of what the lanes of `others`, at distances of at least kLast, are above each lane of `keys`,
// less `ties`; a lane that is not above counts as far away.
template <int kLast, int kDistance = kLanes - 1>
Words gap_above(Words gap, Words keys, Ints others, uint32_t ties) {
    gap = smaller(gap, (Words)neighbours<kDistance>(others) - keys - ties);
    if constexpr (kDistance > kLast) return gap_above<kLast, kDistance - 1>(gap, keys, others, ties);
    else return gap;
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

}  // namespace

}  // namespace r1kernels::R1KERNELS_ISA
