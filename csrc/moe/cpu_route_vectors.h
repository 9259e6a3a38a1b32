// The vectors of the router on the CPU: keys, exchanging lanes, counting, float64. Compiled once for each instruction set, as
// all of the router (see common/vector.h).
//
// Values are floats, or their keys: integers in the order of the floats, NaN above everything, -0 equal to 0. Vectors are
// compared lane with lane at every distance: each lane counts for itself, and no branch depends on the values.
#pragma once

#include "common/vector.h"

namespace r1kernels::R1KERNELS_ISA {

namespace {

constexpr int32_t kNotEligible = INT32_MIN + 1;  // below the key of every float, and one less is an integer

// --- keys ---

Ints keys_of(Floats values) {
    const Ints bits = (Ints)(values + 0.0f);
    const Ints ordered = bits ^ ((bits >> 31) & 0x7fffffff);
    return values == values ? ordered : Ints{} + INT32_MAX;
}

Floats values_of(Ints keys) { return (Floats)(keys ^ ((keys >> 31) & 0x7fffffff)); }

float value_of(int32_t key) { return values_of(Ints{} + key)[0]; }
Ints as_keys(Floats values) { return keys_of(values); }
Ints as_keys(Ints keys) { return keys; }

// What a lane holds, and what stands below and above all that is compared.
template <typename Vector>
struct LaneOf;
template <>
struct LaneOf<Floats> {
    typedef float Scalar;
    static constexpr float kLowest = -kInfinity, kHighest = kInfinity;
};
template <>
struct LaneOf<Ints> {
    typedef int32_t Scalar;
    static constexpr int32_t kLowest = kNotEligible, kHighest = INT32_MAX;
};
template <typename Vector>
using Scalar = typename LaneOf<Vector>::Scalar;
template <typename Vector>
Vector lowest() { return Vector{} + LaneOf<Vector>::kLowest; }
template <typename Vector>
Vector highest() { return Vector{} + LaneOf<Vector>::kHighest; }

template <typename Vector>
Vector load_as(const Scalar<Vector>* from) {
    Vector value;
    memcpy(&value, from, sizeof value);
    return value;
}
void store_as(float* to, Floats value) { memcpy(to, &value, sizeof value); }
void store_as(int32_t* to, Ints value) { memcpy(to, &value, sizeof value); }

// --- exchanging ---

// The second where either is NaN.
template <typename Vector>
Vector larger(Vector a, Vector b) { return a > b ? a : b; }
template <typename Vector>
Vector smaller(Vector a, Vector b) { return a > b ? b : a; }

// Lane i of the result is lane i ^ kDistance.
template <int kDistance, typename Vector>
Vector neighbours(Vector value) {
    Ints mask = {};
    for (int lane = 0; lane < kLanes; ++lane) mask[lane] = lane ^ kDistance;
    return choose_lanes(value, value, mask);
}

template <int kDistance = kLanes / 2, typename Vector>
auto largest_lane(Vector value) {
    value = larger(neighbours<kDistance>(value), value);
    if constexpr (kDistance > 1) return largest_lane<kDistance / 2>(value);
    else return value[0];
}

template <int kDistance = kLanes / 2, typename Vector>
auto smallest_lane(Vector value) {
    value = smaller(neighbours<kDistance>(value), value);
    if constexpr (kDistance > 1) return smallest_lane<kDistance / 2>(value);
    else return value[0];
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

// --- float64 ---

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

Doubles load_doubles(const double* from) {
    Doubles value;
    memcpy(&value, from, sizeof value);
    return value;
}
void store_doubles(double* to, Doubles value) { memcpy(to, &value, sizeof value); }

double sum_of_lanes(Doubles value) {
    double sum = 0;
    for (int lane = 0; lane < kDoubles; ++lane) sum += value[lane];
    return sum;
}

// --- reading a token's logits ---

float to_float(const float* from) { return *from; }
float to_float(const BFloat16* from) { return ((Floats)((Words{} + from->bits) << 16))[0]; }
float to_float(const Float16* from) { return load_some(from, 1)[0]; }

template <typename T>
Floats logits_at(const T* row, int64_t at, int64_t experts) {  // -inf behind the last expert
    return at + kLanes <= experts ? load(row + at) : load_some(row + at, static_cast<int>(experts - at));
}

}  // namespace

}  // namespace r1kernels::R1KERNELS_ISA
