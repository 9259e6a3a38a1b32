// Hidden states times the rows of the head that were kept, and the gradients (see logprob/call.h). Every sum has a fixed order,
// which depends on the set of the token, or on the entries of the row, alone.
#pragma once

#include "common/elements.cuh"
#include "common/warp.cuh"
#include "logprob/call.h"

namespace r1kernels::logprob {

constexpr int kKeptThreads = 128;

__device__ inline bool has_row(const R1kernelsKeptProducts& call, int64_t id) {
    return id >= call.first && id < call.first + call.vocabulary;
}

// One warp per entry: a lane adds every 32nd chunk of 16 bytes in their order, then the lanes are added as a tree.
template <class Scalar>
__global__ void __launch_bounds__(kKeptThreads) kept_products_kernel(R1kernelsKeptProducts call, float* to) {
    constexpr int kWarps = kKeptThreads / kWarpSize, kSize = Chunk<Scalar>::kSize;
    const Scalar *hidden = static_cast<const Scalar*>(call.hidden), *weight = static_cast<const Scalar*>(call.weight);
    const int width = static_cast<int>(call.width);
    for (int64_t entry = blockIdx.x * int64_t{kWarps} + threadIdx.x / kWarpSize; entry < call.entries;
         entry += int64_t{gridDim.x} * kWarps) {
        const int64_t token = call.entry_tokens[entry], id = call.ids[entry], row = id - call.first;
        const bool takes_part = token >= 0 && has_row(call, id);
        float sum = 0.0f;
        for (int i = lane_id() * kSize; takes_part && i < width; i += kWarpSize * kSize) {
            const Chunk<Scalar> x = load_chunk(hidden + token * width, i, width);
            const Chunk<Scalar> w = load_chunk(weight + row * width, i, width);
#pragma unroll
            for (int j = 0; j < kSize; ++j) sum += x[j] * w[j];
        }
        sum = warp_sum(sum);
        if (lane_id() == 0) to[entry] = takes_part && call.bias != nullptr ? sum + call.bias[row] : sum;
    }
}

// One block per token; a thread sums up every kKeptThreads-th column over the entries of the token.
template <class Scalar, class Out>
__global__ void __launch_bounds__(kKeptThreads) kept_gradient_of_hidden_kernel(R1kernelsKeptProducts call, Out* to) {
    const Scalar* weight = static_cast<const Scalar*>(call.weight);
    for (int64_t token = blockIdx.x; token < call.tokens; token += gridDim.x) {
        // offsets that do not rise (an error that only the CPU sees) must not lead outside
        const int64_t begin = call.offsets[token] > 0 ? call.offsets[token] : 0;
        const int64_t end = call.offsets[token + 1] < call.entries ? call.offsets[token + 1] : call.entries;
        for (int64_t column = threadIdx.x; column < call.width; column += kKeptThreads) {
            float sum = 0.0f;
            for (int64_t entry = begin; entry < end; ++entry) {
                const int64_t id = call.ids[entry];
                const float g = call.grad[entry];
                if (g != 0.0f && has_row(call, id)) sum += g * to_float(weight[(id - call.first) * call.width + column]);
            }
            to[token * call.width + column] = from_float<Out>(sum);
        }
    }
}

// One block a place in the order of the entries, with work where a row begins; the other rows are 0 already.
template <class Scalar>
__global__ void __launch_bounds__(kKeptThreads)
    kept_gradient_of_weight_kernel(R1kernelsKeptProducts call, Scalar* to, float* bias) {
    const Scalar* hidden = static_cast<const Scalar*>(call.hidden);
    for (int64_t place = blockIdx.x; place < call.entries; place += gridDim.x) {
        const int64_t id = call.ids[call.order[place]];
        if (!has_row(call, id) || (place > 0 && call.ids[call.order[place - 1]] == id)) continue;
        for (int64_t column = threadIdx.x; to != nullptr && column < call.width; column += kKeptThreads) {
            float sum = 0.0f;
            for (int64_t i = place; i < call.entries && call.ids[call.order[i]] == id; ++i) {
                const int64_t entry = call.order[i];
                const float g = call.grad[entry];
                if (g != 0.0f) sum += g * to_float(hidden[call.entry_tokens[entry] * call.width + column]);
            }
            to[(id - call.first) * call.width + column] = from_float<Scalar>(sum);
        }
        if (bias == nullptr || threadIdx.x != 0) continue;
        float sum = 0.0f;
        for (int64_t i = place; i < call.entries && call.ids[call.order[i]] == id; ++i) sum += call.grad[call.order[i]];
        bias[id - call.first] = sum;
    }
}

}  // namespace r1kernels::logprob
