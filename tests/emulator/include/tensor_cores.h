// Tensor cores and asynchronous copies for the emulator: what csrc/common/mma.cuh calls on the host.
#pragma once

#include <cstdint>
#include <cstring>

#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "emulator.h"

namespace emulator {

inline float wide(__half value) { return __half2float(value); }
inline float wide(__nv_bfloat16 value) { return __bfloat162float(value); }

// Half `i` of a register.
template <class Scalar>
Scalar half_of(uint32_t word, int i) {
    const uint16_t bits = static_cast<uint16_t>(word >> 16 * i);
    Scalar value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
}

inline void load_matrices(uint32_t (&values)[4], const void* row, bool transposed) {
    struct Lane {
        const void* row;
        uint32_t* values;
    } mine = {row, values};
    together(&mine, transposed ? "ldmatrix.trans" : "ldmatrix", [=](const LanePointers& lanes) {
        uint16_t matrices[4][8][8];
        for (int i = 0; i < kWarpSize; ++i) {
            const void* from = static_cast<const Lane*>(lanes[i])->row;
            if (reinterpret_cast<uintptr_t>(from) % 16 != 0) throw EmulatorError("ldmatrix: a misaligned row");
            std::memcpy(matrices[i / 8][i % 8], from, 16);
        }
        for (int i = 0; i < kWarpSize; ++i) {
            for (int matrix = 0; matrix < 4; ++matrix) {
                const int row = i / 4, column = i % 4 * 2;
                const auto& m = matrices[matrix];
                const uint32_t low = transposed ? m[column][row] : m[row][column];
                const uint32_t high = transposed ? m[column + 1][row] : m[row][column + 1];
                static_cast<const Lane*>(lanes[i])->values[matrix] = low | high << 16;
            }
        }
    });
}

template <class Scalar>
void multiply_add(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    struct Lane {
        float* sums;
        const uint32_t *a, *b;
    } mine = {sums, a, b};
    together(&mine, "mma.m16n8k16", [](const LanePointers& lanes) {
        float left[16][16], right[16][8];
        for (int i = 0; i < kWarpSize; ++i) {
            const auto& lane = *static_cast<const Lane*>(lanes[i]);
            for (int half = 0; half < 2; ++half) {
                for (int word = 0; word < 4; ++word) {
                    left[i / 4 + word % 2 * 8][i % 4 * 2 + word / 2 * 8 + half] = wide(half_of<Scalar>(lane.a[word], half));
                }
                for (int word = 0; word < 2; ++word) {
                    right[i % 4 * 2 + word * 8 + half][i / 4] = wide(half_of<Scalar>(lane.b[word], half));
                }
            }
        }
        for (int i = 0; i < kWarpSize; ++i) {
            const auto& lane = *static_cast<const Lane*>(lanes[i]);
            for (int word = 0; word < 4; ++word) {
                const int row = i / 4 + word / 2 * 8, column = i % 4 * 2 + word % 2;
                double sum = lane.sums[word];
                for (int k = 0; k < 16; ++k) sum += double{left[row][k]} * right[k][column];
                lane.sums[word] = static_cast<float>(sum);
            }
        }
    });
}

}  // namespace emulator
