// Stands in for the CUDA toolkit's header: float16 with round to nearest even.
#pragma once

#include <math.h>

#include <bit>
#include <cstdint>

struct __half {
    uint16_t bits;
};

inline float __half2float(__half value) {
    // the exponent's bias is 15 instead of 127; infinity and NaN have the largest one in both
    const uint32_t size = (value.bits & 0x7fffu) << 13;
    const float scaled = std::bit_cast<float>(size) * 0x1p112f;
    const uint32_t bits = size < 0x1fu << 23 ? std::bit_cast<uint32_t>(scaled) : size | 0x7f800000u;
    return std::bit_cast<float>(bits | (value.bits & 0x8000u) << 16);
}

inline __half __float2half_rn(float value) {
    const uint16_t sign = signbit(value) ? 0x8000 : 0;
    const float size = fabsf(value);
    if (value != value) return {0x7fff};
    if (size >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00)};  // rounds past the largest, 65504
    // a float16 is a whole number of steps of 2^(exponent - 10), the smallest step being 2^-24
    const int exponent = size < 0x1p-14f ? -14 : ilogbf(size);
    const int steps = static_cast<int>(nearbyintf(ldexpf(size, 10 - exponent)));
    // a carry of the rounding runs into the exponent's bits, which is what it must do
    return {static_cast<uint16_t>(sign | ((exponent + 14) * 1024 + steps))};
}

struct __half2 {
    __half x, y;
};

inline __half2 __floats2half2_rn(float first, float second) { return {__float2half_rn(first), __float2half_rn(second)}; }
