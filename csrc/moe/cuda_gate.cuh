// The activation of a gated expert and its slope.
#pragma once

#include "moe/call.h"

#include <cuda_runtime.h>

namespace r1kernels::moe {

struct Gate {
    float value, slope;  // act(g), act'(g)
};

// Both activations are g sigmoid(z): z = g for silu, z = 2 sqrt(2 / pi) (g + 0.044715 g^3) for gelu_tanh, so that
// act' = sigmoid(z) + g sigmoid(z) sigmoid(-z) z'.
__device__ inline Gate gate_of(Activation activation, float g) {
    float z = g, z_slope = 1.0f;
    if (activation == Activation::gelu_tanh) {
        const float square = g * g;
        z = g * (1.5957691216057308f + 0.07135481627159600f * square);
        z_slope = 1.5957691216057308f + 0.21406444881478800f * square;
    }
    const float e = expf(-fabsf(z));
    const float larger = 1.0f / (1.0f + e), smaller = e * larger;
    const float sigmoid = z < 0.0f ? smaller : larger;
    const float spread = g * (larger * smaller);
    return {g * sigmoid, sigmoid + (spread == 0.0f ? 0.0f : spread * z_slope)};
}

}  // namespace r1kernels::moe
