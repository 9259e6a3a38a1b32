// What a set of logits is summed up by, and how sets are merged.
//
// With x = z / T in bits, that is divided by ln 2 (the GPU has 2^x, not e^x), and M the largest z:
//
//     S' = sum of 2^-d over all but one largest,   d = (M - z) / (T ln 2) >= 0
//     E' = sum of 2^-d d
//
// No term cancels: all are >= 0. The largest is left out by holding one element of a set apart: of two elements the larger
// is kept, the smaller is added (1 + S' would round S' away where one logit leads).
//
// Sums may stand against any reference R >= all that was added to them. Against a larger one, D bits above it, every
// 2^-d shrinks by w = 2^-D and every d grows by D:
//
//     S -> w S        E -> w (E + D S)
//
// A logit at -inf adds 0: its d is cut to a number, since 0 * inf would be NaN. NaN enters S' and stays there.
#pragma once

#include "common/warp.cuh"

namespace r1kernels::logprob {

constexpr float kLog2E = 1.44269504f, kLn2 = 0.693147181f;
constexpr float kFarBits = 200.0f;  // 2^-200 is 0 in float32

// 2^x within a relative 2^-22, 0 below 2^-126: one instruction of the special function unit.
__device__ inline float exp2_fast(float x) {
#ifdef __CUDA_ARCH__
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
#else
    return x < -126.0f ? 0.0f : exp2f(x);
#endif
}

struct Sums {
    float largest = -INFINITY;  // M, which is held apart: not in the sums
    float others = 0.0f;        // S', against M
    float spread = 0.0f;        // E', in bits
    // for the extra statistics alone:
    float squares = 0.0f;       // sum of 2^-2d, against M, over all but one largest
    float total = 0.0f;         // sum of all z
    float earlier = 0.0f;       // how many logits before the target are not smaller than it
};
constexpr int kSumsFields = 3, kSumsFieldsWithExtra = 6;

// Sums of a lane: they stand against `reference`, which may be larger than the element that the lane holds apart.
struct LaneSums : Sums {
    float reference = -INFINITY;

    LaneSums() = default;
    __device__ explicit LaneSums(const Sums& sums) : Sums(sums), reference(sums.largest) {}

    // -inf - -inf would be NaN: while there was nothing but -inf, 0 serves as well
    __device__ float origin() const { return reference == -INFINITY ? 0.0f : reference; }

    template <bool kExtra>
    __device__ void refer_to(float larger, float bits) {
        const float distance = fminf((larger - reference) * bits, kFarBits);
        const float weight = exp2_fast(-distance);
        spread = weight * (spread + distance * others);
        others *= weight;
        if constexpr (kExtra) squares *= weight * weight;
        reference = larger;
    }

    template <bool kExtra>
    __device__ void add(float logit, float bits) {
        const float distance = (origin() - logit) * bits;
        const float weight = exp2_fast(-distance);
        others += weight;
        spread += weight * fminf(distance, kFarBits);
        if constexpr (kExtra) squares += weight * weight;
    }
};

// The sums of a whole warp, the same bits in every lane. `bits` is 1 / (T ln 2).
template <bool kExtra>
__device__ inline Sums merge_lanes(LaneSums lane, float bits) {
    const float largest = warp_max(lane.largest);
    lane.refer_to<kExtra>(largest, bits);
    const unsigned reaching = __ballot_sync(kWholeWarp, lane.largest == largest);
    if (lane_id() != __ffs(reaching) - 1) lane.add<kExtra>(lane.largest, bits);
    Sums sums;
    sums.largest = largest;
    sums.others = warp_sum(lane.others);
    sums.spread = warp_sum(lane.spread);
    if constexpr (kExtra) {
        sums.squares = warp_sum(lane.squares);
        sums.total = warp_sum(lane.total);
        sums.earlier = warp_sum(lane.earlier);
    }
    return sums;
}

}  // namespace r1kernels::logprob
