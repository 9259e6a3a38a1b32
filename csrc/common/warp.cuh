// Values exchanged between the lanes of a warp.
#pragma once

#include <cuda_runtime.h>

#include <cmath>

namespace r1kernels {

constexpr int kWarpSize = 32;
constexpr unsigned kWholeWarp = 0xffffffffu;

__device__ inline int lane_id() { return threadIdx.x % kWarpSize; }  // of one-dimensional blocks

// combine() over the lanes of a warp, as a tree in a fixed order. combine() is commutative: all lanes get the same bits.
template <class Value, class Combine>
__device__ inline Value warp_reduce(Value value, Combine combine) {
#pragma unroll
    for (int lanes = kWarpSize / 2; lanes > 0; lanes /= 2) {
        value = combine(value, __shfl_xor_sync(kWholeWarp, value, lanes));
    }
    return value;
}

// The larger of two numbers; NaN if one of them is (fmaxf would take the other).
__device__ inline float max_or_nan(float a, float b) {
#ifdef __CUDA_ARCH__
    float larger;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(a), "f"(b));
    return larger;
#else
    return a != a || b != b ? NAN : fmaxf(a, b);
#endif
}

__device__ inline float warp_sum(float value) {
    return warp_reduce(value, [](float a, float b) { return a + b; });
}

__device__ inline float warp_max(float value) { return warp_reduce(value, max_or_nan); }

}  // namespace r1kernels
