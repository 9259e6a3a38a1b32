// Functions of vectors of float that vector.h does not have: e^x for any x, e^x - 1, log x.
//
// Included only by files that are compiled once for each instruction set, see vector.h.
#pragma once

#include <cmath>

#include "common/vector.h"

namespace r1kernels::R1KERNELS_ISA {

// e^x - 1 = 2^n (1 + small) - 1, with x = n ln 2 + r, |r| <= ln 2 / 2 and small = e^r - 1; see exp_negative.
struct Exponential {
    Floats small, n;
};

inline Exponential exponential_of(Floats x) {
    const Floats raised = greater(all(kSmallestExponent), x);         // the second operand passes NaN on
    const Floats clamped = lesser(all(89.0f), raised);                // e^89 is infinite
    const Floats shift = all(0x1.8p23f);                              // adding it rounds to a whole number
    const Floats n = (clamped * 0x1.715476p+0f + shift) - shift;
    const Floats r = (clamped - n * 0x1.62e400p-1f) - n * 0x1.7f7d1cp-20f;
    return {exp_minus_one(r), n};
}

// (1 + small) 2^n; the result may be subnormal, 0 or infinite
inline Floats scaled(Exponential e) {
    const Floats p = e.small + 1.0f;
#if defined(__AVX512F__)
    return _mm512_scalef_ps(p, e.n);
#else
    // 2^n may not be a float: in two steps, of which only the last one rounds
    const Ints n = __builtin_convertvector(e.n, Ints), half = n >> 1;
    return p * (Floats)((half + 127) << 23) * (Floats)((n - half + 127) << 23);
#endif
}

// e^x, within 2 units in the last place; NaN stays NaN
inline Floats exp_of(Floats x) { return scaled(exponential_of(x)); }

// e^x - 1, without cancellation for small x
inline Floats expm1_of(Floats x) {
    const Exponential e = exponential_of(x);
    return e.n == 0.0f ? e.small : scaled(e) - 1.0f;
}

// not inline: gcc 12 crashes where it vectorises around the loop over the lanes
__attribute__((noinline)) inline Floats log_of(Floats x) {
    for (int lane = 0; lane < kLanes; ++lane) x[lane] = ::logf(x[lane]);
    return x;
}

inline float exp_of(float x) { return ::expf(x); }
inline float log_of(float x) { return ::logf(x); }

}  // namespace r1kernels::R1KERNELS_ISA
