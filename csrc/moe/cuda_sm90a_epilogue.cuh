// What the consumers of the Hopper kernels do with their accumulators: from registers to memory, 16 bytes at a time.
//
// A thread holds of a row, in each 8 columns, the two columns 2 q and 2 q + 1; q: its number in its quad of lanes. Of 32
// columns these are 4 words of two elements; transposed over the quad they become the 8 columns from 8 q on.
#pragma once

#include <cstring>

#include "common/elements.cuh"
#include "common/warp.cuh"
#include "moe/cuda_gate.cuh"
#include "moe/hopper_plan.h"

namespace r1kernels::moe::hopper {

using Words = uint32_t[4];

template <class Scalar>
__device__ inline float unpack(uint32_t word, int i) {
    Scalar elements[2];
    memcpy(elements, &word, sizeof(word));
    return to_float(elements[i]);
}

// Word b of lane q of a quad becomes word q of lane b. All lanes of the warp.
__device__ inline void transpose_quad(Words& words) {
    const int q = lane_id() % 4;
#pragma unroll
    for (int bit = 1; bit <= 2; bit *= 2) {
#pragma unroll
        for (int b = 0; b < 4; ++b) {
            if (b & bit) continue;
            const uint32_t sent = q & bit ? words[b] : words[b + bit];
            const uint32_t received = __shfl_xor_sync(kWholeWarp, sent, bit);
            words[b] = q & bit ? received : words[b];
            words[b + bit] = q & bit ? words[b + bit] : received;
        }
    }
}

// The words of 32 columns, of which `row` has `columns` left; nothing is written where `row` is null.
template <class Scalar>
__device__ inline void store_columns(Scalar* row, int64_t columns, Words& words) {
    transpose_quad(words);
    const int first = lane_id() % 4 * kChunkElements;
    if (row == nullptr || first >= columns) return;
    store_vector(reinterpret_cast<uint4*>(row + first), uint4{words[0], words[1], words[2], words[3]});
}

template <class Scalar>
__device__ inline void load_columns(const Scalar* row, int64_t columns, Words& words) {
    const int first = lane_id() % 4 * kChunkElements;
    uint4 vector = {0, 0, 0, 0};
    if (row != nullptr && first < columns) vector = *reinterpret_cast<const uint4*>(row + first);
    words[0] = vector.x;
    words[1] = vector.y;
    words[2] = vector.z;
    words[3] = vector.w;
    transpose_quad(words);
}

// The words of 32 columns from column 32 * part on of the tile, for half `half` of the thread's rows.
template <class Scalar, class Product>
__device__ inline void words_of(const Product& product, int part, int half, Words& words) {
#pragma unroll
    for (int b = 0; b < 4; ++b) {
        const int i = (part * 4 + b) * 4 + half * 2;
        words[b] = pack_pair<Scalar>(product[i], product[i + 1]);
    }
}

// run(half, r): for both rows r of the tile that this thread of the consumers holds.
template <class Run>
__device__ inline void for_rows(int thread, Run run) {
#pragma unroll
    for (int half = 0; half < 2; ++half) run(half, thread / 32 * 16 + lane_id() / 4 + half * 8);
}

// out (rows, columns) = the tile that begins at (0, column) of it.
template <class Scalar, class Product>
__device__ inline void store_tile(const Product& product, Scalar* out, int64_t rows, int64_t columns, int64_t column,
                                  int thread) {
    for_rows(thread, [&](int half, int r) {
        Scalar* row = r < rows ? out + r * columns + column : nullptr;
#pragma unroll
        for (int part = 0; part < kBlockN / 32; ++part) {
            Words words;
            words_of<Scalar>(product, part, half, words);
            store_columns(row == nullptr ? nullptr : row + part * 32, columns - column - part * 32, words);
        }
    });
}

// The gates that Hopper's kernels serve (rows_serve): nothing of them is known at run time alone. To add -0 moves nothing,
// which the compiler knows; of +0 it does not.
template <Activation kActivation>
__device__ inline Gate plain_gate(float gate, float up) {
    return gate_of<true>({kActivation, 1.0f, INFINITY, -0.0f}, gate, up);
}

// cuda.h: R1KERNELS_MOE_UP. The first half of the tile is the gate, the second the up projection.
template <class Scalar, Activation kActivation, class Product>
__device__ inline void store_up(const Product& product, const R1kernelsMoeProduct& call, const R1kernelsMoeTile& tile,
                                int64_t column, int thread) {
    const int64_t inner = call.columns / 2;
    Scalar *out = static_cast<Scalar*>(call.out), *activated = static_cast<Scalar*>(call.activated);
    for_rows(thread, [&](int half, int r) {
        const bool mine = tile.first + r < tile.end;
        const int64_t row = tile.first + r;
#pragma unroll
        for (int part = 0; part < kBlockN / 64; ++part) {
            const int64_t c = column + part * 32, left = inner - c;
            Words gate, up, a;
            words_of<Scalar>(product, part, half, gate);
            words_of<Scalar>(product, part + kBlockN / 64, half, up);
            if (activated != nullptr) {
#pragma unroll
                for (int b = 0; b < 4; ++b) {
                    float values[2];
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
                        values[i] = plain_gate<kActivation>(unpack<Scalar>(gate[b], i), unpack<Scalar>(up[b], i)).value;
                    }
                    a[b] = pack_pair<Scalar>(values[0], values[1]);
                }
                store_columns(mine ? activated + row * inner + c : nullptr, left, a);
            }
            if (out != nullptr) {
                store_columns(mine ? out + row * call.columns + c : nullptr, left, gate);
                store_columns(mine ? out + row * call.columns + inner + c : nullptr, left, up);
            }
        }
    });
}

// cuda.h: R1KERNELS_MOE_GATE_BACKWARD. `unowned`: a tile of rows of no expert, all of whose outputs are 0.
template <class Scalar, Activation kActivation, class Product>
__device__ inline void store_gate_backward(const Product& product, const R1kernelsMoeProduct& call,
                                           const R1kernelsMoeTile& tile, int64_t column, bool unowned, int thread) {
    const int64_t inner = call.columns;
    const Scalar* pre = static_cast<const Scalar*>(call.pre_activation);
    Scalar *out = static_cast<Scalar*>(call.out), *activated = static_cast<Scalar*>(call.activated);
    for_rows(thread, [&](int half, int r) {
        const int64_t row = tile.first + r;
        const bool mine = row < tile.end, read = mine && !unowned;
        const float scale = read ? call.scales[call.order[row]] : 0.0f;
        float dot = 0.0f;
#pragma unroll
        for (int part = 0; part < kBlockN / 32; ++part) {
            const int64_t c = column + part * 32, left = inner - c;
            Words gate, up, a;
            load_columns(read ? pre + row * 2 * inner + c : nullptr, left, gate);
            load_columns(read ? pre + row * 2 * inner + inner + c : nullptr, left, up);
#pragma unroll
            for (int b = 0; b < 4; ++b) {
                const bool inside = b * kChunkElements < left;  // beyond, the product may be inf * 0
                Gate act[2];
                float d_gate[2], d_up[2], scaled[2];
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    act[i] = plain_gate<kActivation>(unpack<Scalar>(gate[b], i), unpack<Scalar>(up[b], i));
                }
                // as the forward rounded them
                const uint32_t values = pack_pair<Scalar>(act[0].value, act[1].value);
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const float grad = inside ? product[(part * 4 + b) * 4 + half * 2 + i] : 0.0f;
                    const float value = unpack<Scalar>(values, i);
                    dot += grad * value;
                    d_gate[i] = scale * grad * act[i].by_gate;
                    d_up[i] = scale * grad * act[i].by_up;
                    scaled[i] = scale * value;
                }
                gate[b] = pack_pair<Scalar>(d_gate[0], d_gate[1]);
                up[b] = pack_pair<Scalar>(d_up[0], d_up[1]);
                a[b] = pack_pair<Scalar>(scaled[0], scaled[1]);
            }
            if (out != nullptr) {
                store_columns(mine ? out + row * 2 * inner + c : nullptr, left, gate);
                store_columns(mine ? out + row * 2 * inner + inner + c : nullptr, left, up);
            }
            if (activated != nullptr) store_columns(mine ? activated + row * inner + c : nullptr, left, a);
            if ((part + 1) * 32 % R1KERNELS_MOE_PART_COLUMNS != 0) continue;
            dot += __shfl_xor_sync(kWholeWarp, dot, 1);
            dot += __shfl_xor_sync(kWholeWarp, dot, 2);
            const int64_t first = c + 32 - R1KERNELS_MOE_PART_COLUMNS;  // of the part that ends here
            if (call.partials != nullptr && mine && first < inner && lane_id() % 4 == 0) {
                call.partials[first / R1KERNELS_MOE_PART_COLUMNS * call.schedule.rows + row] = dot;
            }
            dot = 0.0f;
        }
    });
}

}  // namespace r1kernels::moe::hopper
