// The router on the CPU. Included by cpu.cpp alone, once for each instruction set.
//
// Scores are computed in float64 and rounded once to float32, so that equal logits have equal scores wherever they stand.
// The choice compares their keys: integers in the order of the floats, NaN above everything, -0 equal to 0.
#pragma once

#include "moe/cells.h"
#include "moe/cpu.h"

namespace r1kernels::R1KERNELS_ISA {

namespace {

constexpr int kDoubles = kLanes / 2;
typedef double Doubles __attribute__((vector_size(4 * kLanes)));
typedef int64_t Longs __attribute__((vector_size(4 * kLanes)));
typedef float HalfFloats __attribute__((vector_size(2 * kLanes)));

constexpr int32_t kNotEligible = INT32_MIN;  // below the key of every float

// e^x for x <= 0 within 1 unit in the last place; results below e^-708 become e^-708, which is 0 in float32.
//
// x = n ln 2 + r with |r| <= ln 2 / 2 and e^x = 2^n e^r; e^r by its Taylor polynomial of degree 13 (error 4e-18).
Doubles exp_negative(Doubles x) {
    const Doubles low = Doubles{} - 708.0;
    const Doubles clamped = x < low ? low : x;
    const Doubles shift = Doubles{} + 0x1.8p52;  // adding it rounds; the low bits are then n
    const Doubles shifted = clamped * 0x1.71547652b82fep0 + shift;
    const Doubles n = shifted - shift;
    const Doubles r = (clamped - n * 0x1.62e42fefa3800p-1) - n * 0x1.ef35793c76730p-45;
    constexpr double kFactors[] = {1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320,
                                   1.0 / 5040,      1.0 / 720,      1.0 / 120,     1.0 / 24,     1.0 / 6,
                                   1.0 / 2,         1.0,            1.0};
    Doubles p = Doubles{} + 1.0 / 6227020800;
    for (double factor : kFactors) p = p * r + factor;
    const Doubles scaled = (Doubles)((Longs)p + ((Longs)shifted << 52));
    return x == x ? scaled : x;
}

struct Wide {
    Doubles low, high;  // kLanes values
};

Wide widen(Floats value) {
    HalfFloats halves[2];
    memcpy(halves, &value, sizeof value);
    return {__builtin_convertvector(halves[0], Doubles), __builtin_convertvector(halves[1], Doubles)};
}

Floats narrow(const Wide& value) {
    const HalfFloats halves[2] = {__builtin_convertvector(value.low, HalfFloats),
                                  __builtin_convertvector(value.high, HalfFloats)};
    Floats result;
    memcpy(&result, halves, sizeof result);
    return result;
}

Doubles sigmoid(Doubles x) {
    const Doubles e = exp_negative(x < 0 ? x : -x);
    return (x < 0 ? e : Doubles{} + 1.0) / (1.0 + e);
}

float to_float(const float* from) { return *from; }
float to_float(const BFloat16* from) { return ((Floats)((Words{} + from->bits) << 16))[0]; }
float to_float(const Float16* from) { return load_some(from, 1)[0]; }

template <typename T>
Floats logits_at(const T* row, int64_t at, int64_t experts) {  // -inf behind the last expert
    return at + kLanes <= experts ? load(row + at) : load_some(row + at, static_cast<int>(experts - at));
}

int64_t whole_vectors(int64_t count) { return (count + kLanes - 1) / kLanes * kLanes; }

// Buffers of one token, in whole vectors.
struct RouterScratch {
    double* wide;      // of all experts, or of the chosen ones
    float* scores;     // p
    int32_t* keys;     // of p + bias
    int32_t* largest;  // the largest key of each vector of keys
    int32_t* groups;   // the key of each group
    int32_t* places;   // of the candidates

    RouterScratch(void* base, const MoeRouter& call) {
        const int64_t experts = whole_vectors(call.experts > call.top_k ? call.experts : call.top_k);
        wide = static_cast<double*>(base);
        scores = reinterpret_cast<float*>(wide + experts);
        keys = reinterpret_cast<int32_t*>(scores + experts);
        largest = keys + experts + kLanes;  // a vector may be read from any key on
        groups = largest + experts;
        places = groups + experts;
    }
};

// --- softmax ---

struct SoftmaxSums {
    double largest, sum;
};

// The largest logit, e^(l - largest) of all of them in `wide`, and their sum.
template <typename T>
SoftmaxSums exponentials(const T* row, int64_t experts, double* wide) {
    Floats most = all(-kInfinity);
    for (int64_t i = 0; i < experts; i += kLanes) most = greater(logits_at(row, i, experts), most);  // NaN never wins
    const double largest = r1kernels::R1KERNELS_ISA::largest(most);
    Doubles total = {};
    for (int64_t i = 0; i < experts; i += kLanes) {
        const Wide logits = widen(logits_at(row, i, experts));
        const Wide value = {exp_negative(logits.low - largest), exp_negative(logits.high - largest)};
        total += value.low + value.high;
        memcpy(wide + i, &value, sizeof value);
    }
    double sum = 0;
    for (int lane = 0; lane < kDoubles; ++lane) sum += total[lane];
    return {largest, sum};
}

// The same of the chosen logits alone; -inf stands behind the last of them.
template <typename T>
SoftmaxSums chosen_exponentials(const T* row, const int64_t* indices, int64_t top_k, double* wide) {
    double largest = -kInfinity, sum = 0;
    for (int64_t k = 0; k < whole_vectors(top_k); ++k) {
        wide[k] = k < top_k ? to_float(row + indices[k]) : -kInfinity;
        if (!(wide[k] <= largest)) largest = wide[k];  // NaN stays
    }
    for (int64_t k = 0; k < top_k; k += kDoubles) {
        Doubles value;
        memcpy(&value, wide + k, sizeof value);
        value = exp_negative(value - largest);
        memcpy(wide + k, &value, sizeof value);
    }
    for (int64_t k = 0; k < top_k; ++k) sum += wide[k];
    return {largest, sum};
}

// --- scores ---

template <typename T>
void scores_of(const MoeRouter& call, const T* row, const RouterScratch& scratch) {
    double inverse = 0;
    if (call.softmax) inverse = 1.0 / exponentials(row, call.experts, scratch.wide).sum;
    for (int64_t i = 0; i < call.experts; i += kLanes) {
        Wide value;
        if (call.softmax) {
            memcpy(&value, scratch.wide + i, sizeof value);
            value = {value.low * inverse, value.high * inverse};
        } else {
            value = widen(logits_at(row, i, call.experts));
            value = {sigmoid(value.low), sigmoid(value.high)};
        }
        store(scratch.scores + i, narrow(value));
    }
}

// --- keys ---

Ints keys_of(Floats selection) {
    const Ints bits = (Ints)(selection + 0.0f);
    const Ints ordered = bits ^ ((bits >> 31) & 0x7fffffff);
    return selection == selection ? ordered : Ints{} + INT32_MAX;
}

float value_of(int32_t key) { return ((Floats)(Ints{} + (key ^ ((key >> 31) & 0x7fffffff))))[0]; }
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

// --- choice ---

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

// Marks the experts outside of the best groups as not eligible.
void keep_best_groups(const MoeRouter& call, const RouterScratch& scratch) {
    const int64_t size = call.experts / call.n_group;
    for (int64_t group = 0; group < call.n_group; ++group) {
        scratch.groups[group] = group_key(call, scratch.keys + group * size, size);
    }
    for (int64_t kept = 0; kept < call.topk_group; ++kept) {
        int64_t best = 0;
        for (int64_t group = 1; group < call.n_group; ++group) {
            if (scratch.groups[group] > scratch.groups[best]) best = group;
        }
        scratch.groups[best] = kNotEligible;
    }
    for (int64_t group = 0; group < call.n_group; ++group) {
        if (scratch.groups[group] == kNotEligible) continue;  // one of the best
        for (int64_t i = 0; i < size; ++i) scratch.keys[group * size + i] = kNotEligible;
    }
}

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

// The K largest keys, the lowest place among equals. Each of the K largest of the vectors' own largest keys is one of the
// keys, so none below the K-th of them can be chosen: few candidates remain, and each finds its rank by itself.
void choose_largest(const RouterScratch& scratch, int64_t experts, int64_t top_k, int64_t* indices) {
    const int64_t vectors = whole_vectors(experts) / kLanes;
    int32_t least = kNotEligible;
    if (top_k <= vectors) {
        for (int64_t i = 0; i < vectors; ++i) scratch.largest[i] = largest_key(load_keys(scratch.keys + i * kLanes));
        fill_up(scratch.largest, vectors);
        for (int64_t i = 0; i < vectors; ++i) {
            if (rank_of(scratch.largest, vectors, i) == top_k - 1) least = scratch.largest[i];
        }
    }
    const int64_t found = gather_at_least(scratch.keys, whole_vectors(experts), least, scratch.places);
    fill_up(scratch.keys, found);
    int32_t* ranked = scratch.largest;
    for (int64_t i = 0; i < found; ++i) ranked[rank_of(scratch.keys, found, i)] = scratch.places[i];
    for (int64_t k = 0; k < top_k; ++k) indices[k] = ranked[k];
}

void choose(const MoeRouter& call, const RouterScratch& scratch, int64_t* indices) {
    for (int64_t i = 0; i < call.experts; i += kLanes) {
        Floats selection = load(scratch.scores + i);
        if (call.bias) selection += logits_at(call.bias, i, call.experts);
        const Ints keys = keys_of(selection);
        memcpy(scratch.keys + i, &keys, sizeof keys);
    }
    fill_up(scratch.keys, call.experts);
    if (call.n_group > 1) keep_best_groups(call, scratch);
    choose_largest(scratch, call.experts, call.top_k, indices);
}

template <typename T>
void weigh(const MoeRouter& call, const T* row, const RouterScratch& scratch, const int64_t* indices, float* weights) {
    if (call.softmax && call.normalize) {
        const double factor = call.scale / chosen_exponentials(row, indices, call.top_k, scratch.wide).sum;
        for (int64_t k = 0; k < call.top_k; ++k) weights[k] = static_cast<float>(factor * scratch.wide[k]);
        return;
    }
    double total = call.normalize ? 1e-20 : 1;
    if (call.normalize) {
        for (int64_t k = 0; k < call.top_k; ++k) total += scratch.scores[indices[k]];
    }
    const double factor = call.scale / total;
    for (int64_t k = 0; k < call.top_k; ++k) {
        weights[k] = static_cast<float>(factor * scratch.scores[indices[k]]);
    }
}

template <typename T>
void route_of(const MoeRouter& call, bool replayed, int64_t* indices, float* weights, void* memory, int64_t begin,
              int64_t end) {
    const RouterScratch scratch(memory, call);
    const bool scored = !replayed || !(call.softmax && call.normalize);
    for (int64_t token = begin; token < end; ++token) {
        const T* row = static_cast<const T*>(call.logits) + token * call.experts;
        int64_t* chosen = indices + token * call.top_k;
        if (scored) scores_of(call, row, scratch);
        if (!replayed) choose(call, scratch, chosen);
        weigh(call, row, scratch, chosen, weights + token * call.top_k);
    }
}

}  // namespace

}  // namespace r1kernels::R1KERNELS_ISA
