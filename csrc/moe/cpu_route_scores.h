// The scores of the router on the CPU. Included by the other router files alone, once for each instruction set.
//
// Scores are computed in float64 and rounded once to float32, so that equal logits have equal scores wherever they stand.
#pragma once

#include "moe/cpu.h"
#include "moe/cpu_route_lanes.h"

namespace r1kernels::R1KERNELS_ISA {

namespace {

constexpr int kDoubles = kLanes / 2;
typedef double Doubles __attribute__((vector_size(4 * kLanes)));
typedef int64_t Longs __attribute__((vector_size(4 * kLanes)));
typedef float HalfFloats __attribute__((vector_size(2 * kLanes)));

using r1kernels::R1KERNELS_ISA::exp_negative;  // that of Floats

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

// In float32, within 2^-22.
Floats sigmoid(Floats x) {
    const Floats e = exp_negative(x < 0 ? x : -x);
    return (x < 0 ? e : all(1.0f)) / (1.0f + e);
}

float to_float(const float* from) { return *from; }
float to_float(const BFloat16* from) { return ((Floats)((Words{} + from->bits) << 16))[0]; }
float to_float(const Float16* from) { return load_some(from, 1)[0]; }

template <typename T>
Floats logits_at(const T* row, int64_t at, int64_t experts) {  // -inf behind the last expert
    return at + kLanes <= experts ? load(row + at) : load_some(row + at, static_cast<int>(experts - at));
}

int64_t whole_vectors(int64_t count) { return (count + kLanes - 1) / kLanes * kLanes; }

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
    RouterScratch(const MoeRouter& call, void* base, int64_t token) {
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

// --- all experts ---

template <typename T>
float largest_logit(const T* row, int64_t experts) {
    Floats most = all(-kInfinity);
    for (int64_t i = 0; i < experts; i += kLanes) most = larger(logits_at(row, i, experts), most);  // NaN never wins
    return largest_lane(most);
}

double sum_of_lanes(Doubles value) {
    double sum = 0;
    for (int lane = 0; lane < kDoubles; ++lane) sum += value[lane];
    return sum;
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
void scores_of(const MoeRouter& call, const T* row, const RouterScratch& scratch) {
    double largest = 0, inverse = 0;
    if (call.softmax) {
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

Doubles load_doubles(const double* from) {
    Doubles value;
    memcpy(&value, from, sizeof value);
    return value;
}
void store_doubles(double* to, Doubles value) { memcpy(to, &value, sizeof value); }

}  // namespace

}  // namespace r1kernels::R1KERNELS_ISA
