// Lanes of the vectors of the router on the CPU: what they hold, exchanging them, and results over all of them. Included by
// the other router files alone, once for each instruction set.
//
// Values are floats, or their keys: integers in the order of the floats, NaN above everything, -0 equal to 0.
#pragma once

#include "moe/cells.h"

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

}  // namespace

}  // namespace r1kernels::R1KERNELS_ISA
