// How the rows of logits are shared out to warps and blocks, and what a row is.
//
// A row is cut into pieces, and a piece belongs to a team: one warp (a short vocabulary) or all warps of a block. Both
// follow from V alone, and so does which lane adds what: the sums of a row are the same bits whatever else is in the call.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/block_reduce.cuh"
#include "common/elements.cuh"
#include "common/launch.cuh"
#include "common/warp.cuh"
#include "logprob/cuda.h"
#include "logprob/cuda_sums.cuh"

namespace r1kernels::logprob {

constexpr int kThreads = 256, kWarps = kThreads / kWarpSize;
constexpr int kUnroll = 4;            // chunks of 16 bytes that a thread loads before it uses the first
constexpr int kWarpRow = 2048;        // logits: a warp reads a row up to this long
constexpr int kPiece = 32768;         // logits: a block reads at most this many of a row; a whole number of its rounds

// What a kernel computes; the special cases cost the common ones nothing.
enum class Mode {
    kLogp,     // log-probs alone
    kEntropy,  // entropies too
    kGeneral,  // bias, logit_scale, softcap or extra statistics
};

// What the compiler fits registers to: 80 a thread (128 in the general mode), and 48 KB of loads under way on a processor.
constexpr int blocks_per_processor(Mode mode) { return mode == Mode::kGeneral ? 2 : 3; }

struct Partition {
    int64_t rows;
    int pieces;  // of a row
    int warps;   // of a team
};

// Of the piece that begins at column `begin`.
__device__ inline int piece_length(int64_t begin, int64_t vocabulary) {
    return vocabulary - begin < kPiece ? static_cast<int>(vocabulary - begin) : kPiece;
}

inline Partition partition_of(const R1kernelsTokenLogprobs& call) {
    Partition partition;
    partition.rows = call.batch * call.tokens;
    partition.pieces = static_cast<int>(divide_up(call.vocabulary, kPiece));
    partition.warps = call.vocabulary <= kWarpRow ? 1 : kWarps;
    return partition;
}

inline int64_t blocks_of(const Partition& partition) {
    return divide_up(partition.rows * partition.pieces, kWarps / partition.warps);
}

// The team of a thread, and its work: for (item = first; item < rows * pieces; item += step).
struct Team {
    int threads, rank;  // of the team; of the thread in it
    int64_t first, step;

    __device__ explicit Team(const Partition& partition)
        : threads(partition.warps * kWarpSize),
          rank(threadIdx.x % threads),
          first(blockIdx.x * int64_t{kThreads / threads} + threadIdx.x / threads),
          step(gridDim.x * int64_t{kThreads / threads}) {}
};

struct Row {
    int64_t number, offset;     // of b * T + t; of its first logit in elements
    int64_t target;
    bool ignored, valid;        // valid: a column of the whole vocabulary
    float inverse_temperature;  // NaN, which makes the row NaN, for a temperature that is not a number above 0

    __device__ Row(const R1kernelsTokenLogprobs& call, int64_t number)
        : number(number),
          offset(number / call.tokens * call.batch_stride + number % call.tokens * call.token_stride),
          target(call.targets[number]),
          ignored(target == call.ignore_index),
          valid(target >= 0 && target < call.whole) {
        const float temperature = call.temperatures == nullptr ? call.temperature : call.temperatures[number];
        inverse_temperature = temperature > 0.0f && temperature < INFINITY ? 1.0f / temperature : NAN;
    }

    __device__ float bits() const { return inverse_temperature * kLog2E; }

    // Whether these columns hold the target, and as which of them.
    __device__ bool has_target(const R1kernelsTokenLogprobs& call) const {
        return valid && target >= call.first && target < call.first + call.vocabulary;
    }
    __device__ int64_t column(const R1kernelsTokenLogprobs& call) const { return target - call.first; }
};

// z = cap(logit_scale * (raw + bias)) and dz / d raw.
struct Logit {
    float value, slope;
};

__device__ inline Logit logit_of(const R1kernelsTokenLogprobs& call, float raw, float bias) {
    const float scaled = call.logit_scale * (raw + bias);
    if (call.softcap == 0.0f) return {scaled, call.logit_scale};
    const float share = tanhf(scaled / call.softcap);
    return {call.softcap * share, call.logit_scale * (1.0f - share * share)};
}

// The biases of the columns of a chunk: logits [first, first + kSize) of a piece that begins at column `begin`.
template <int kSize>
__device__ inline void load_biases(const R1kernelsTokenLogprobs& call, int64_t begin, int first, int length,
                                   float (&biases)[kSize]) {
#pragma unroll
    for (int i = 0; i < kSize; i += Chunk<float>::kSize) {
        Chunk<float> chunk = {};
        if (call.bias != nullptr) chunk = load_chunk(call.bias + begin, first + i, length, 0.0f);
#pragma unroll
        for (int j = 0; j < Chunk<float>::kSize; ++j) biases[i + j] = chunk[j];
    }
}

}  // namespace r1kernels::logprob
