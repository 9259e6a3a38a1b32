// What a gated expert makes of its two projections, and the slopes.
#pragma once

#include <cuda_runtime.h>

#include <cmath>

#include "moe/call.h"

namespace r1kernels::moe {

struct Gate {
    float value, by_gate, by_up;  // a, da/dg, da/du
};

// e^-x and 1 / (1 + e^-x) of x >= 0.
struct Sigmoid {
    float smaller_odds, larger;
};

// kNarrow: for results that are rounded to 16 bits. By one instruction of the special function unit each: e^-x is off by
// (2^-22 + x 2^-24) of itself and 0 where it is below 2^-126, the quotient by 2^-23; bfloat16 rounds by 2^-9, float16 by 2^-12.
template <bool kNarrow>
__device__ inline Sigmoid sigmoid_of(float x) {
    Sigmoid found;
#ifdef __CUDA_ARCH__
    if constexpr (kNarrow) {
        asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(found.smaller_odds) : "f"(x * -1.4426950408889634f));
        asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(found.larger) : "f"(1.0f + found.smaller_odds));
        return found;
    }
#endif
    found.smaller_odds = expf(-x);
    found.larger = 1.0f / (1.0f + found.smaller_odds);
    return found;
}

// Both activations are g sigmoid(z): z = alpha g for silu, z = 2 sqrt(2 / pi) (g + 0.044715 g^3) for gelu_tanh, so that
// act' = sigmoid(z) + g sigmoid(z) sigmoid(-z) z'. Beyond the limit nothing moves; NaN stays. What the compiler knows of
// `gating` costs nothing.
template <bool kNarrow>
__device__ inline Gate gate_of(const Gating& gating, float gate, float up) {
    const float limit = gating.limit;
    const float g = gate > limit ? limit : gate;
    const float u = (up > limit ? limit : up < -limit ? -limit : up) + gating.shift;
    float z = gating.alpha * g, z_slope = gating.alpha;
    if (gating.activation == Activation::gelu_tanh) {
        const float square = g * g;
        z = g * (1.5957691216057308f + 0.07135481627159600f * square);
        z_slope = 1.5957691216057308f + 0.21406444881478800f * square;
    }
    const Sigmoid of_size = sigmoid_of<kNarrow>(fabsf(z));
    const float larger = of_size.larger, smaller = of_size.smaller_odds * larger;
    const float sigmoid = z < 0.0f ? smaller : larger;
    const float spread = g * (larger * smaller);
    const float act = g * sigmoid, slope = sigmoid + (spread == 0.0f ? 0.0f : spread * z_slope);
    return {act * u, gate > limit ? 0.0f : u * slope, up > limit || up < -limit ? 0.0f : act};
}

}  // namespace r1kernels::moe
