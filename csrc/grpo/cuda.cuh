// Kernels of grpo_loss: one block an item (layout.h), the mathematics of terms.h.
//
// first_kernel sums up what the sequences need. Every block of loss_kernel derives the constants of its sequence from
// those sums, adds up its tokens and writes their gradients; the block that finishes last adds up the blocks in their
// order, so that the result does not depend on which one that is.
#pragma once

#include "common/block_reduce.cuh"
#include "common/math.cuh"
#include "common/stream_counter.cuh"
#include "grpo/cuda.h"
#include "grpo/terms.h"  // after the functions that it is built on

namespace r1kernels::grpo {

constexpr int kThreads = 256;
constexpr int kTokensOfThread = 4;
constexpr int64_t kChunk = kThreads * kTokensOfThread;

struct Workspace {
    int counter;                  // of the blocks that have finished, that of the stream; kNoCounter: the next is one
    unsigned* finished;           // 0 before loss_kernel
    SequenceSums* sequence_sums;  // one an item
    LossSums<float>* loss_sums;   // one an item
};

using Tokens = Token<float, bool>;

__device__ inline bool is_counted(const R1kernelsGrpo& call, int64_t token) {
    switch (call.mask_bytes) {
        case 1: return static_cast<const int8_t*>(call.mask)[token] != 0;
        case 2: return static_cast<const int16_t*>(call.mask)[token] != 0;
        case 4: return static_cast<const int32_t*>(call.mask)[token] != 0;
        default: return static_cast<const int64_t*>(call.mask)[token] != 0;
    }
}

// Whether the ratio of its sequence has a gradient in a token's log-prob; logp may be null.
__device__ inline bool is_in_ratio(const R1kernelsGrpo& call, int64_t token) {
    return is_counted(call, token) && (call.logp == nullptr || call.logp[token] != -INFINITY);
}

// The sequence of a token that lies in one.
__device__ inline int64_t sequence_at(const R1kernelsGrpo& call, int64_t token) {
    if (call.cu_seqlens == nullptr) return token / call.width;
    int64_t low = 0, high = call.sequences;
    while (high - low > 1) {
        const int64_t middle = (low + high) / 2;
        (boundary(call, middle) <= token ? low : high) = middle;
    }
    return low;
}

__device__ inline Tokens load_token(const R1kernelsGrpo& call, int64_t sequence, float weight, int64_t t) {
    Tokens token = {};
    if (!is_counted(call, t)) return token;
    const float logp = call.logp[t], old_logp = call.old_logp == nullptr ? logp : call.old_logp[t];
    token.impossible = is_impossible(call, logp, old_logp);
    if (token.impossible) return token;
    token.counted = true;
    token.logp = logp;
    if (call.old_logp != nullptr) token.log_ratio = logp - old_logp;
    if (call.ref_logp != nullptr) token.drift = call.ref_logp[t] - token.logp;
    token.advantage = call.advantages[call.advantages_per_token ? t : sequence];
    token.policy_weight =
        call.policy_weights == nullptr ? 1.0f : call.policy_weights[call.policy_weights_per_token ? t : sequence];
    token.weight = call.weights == nullptr ? weight : call.weights[t];
    if (call.entropy != nullptr) token.entropy = call.entropy[t];
    if (call.entropy_weights != nullptr) token.entropy_weight = call.entropy_weights[t];
    return token;
}

__device__ inline SequenceSums add(SequenceSums a, const SequenceSums& b) {
    a.counted += b.counted;
    a.first += b.first;
    a.second += b.second;
    a.third += b.third;
    return a;
}

__global__ void __launch_bounds__(kThreads) first_kernel(R1kernelsGrpo call, Workspace workspace) {
    if (blockIdx.x == 0 && threadIdx.x == 0) *workspace.finished = 0;
    const Item item = item_of(call, blockIdx.x, kChunk);
    const bool only_counts = !r1kernels_grpo_sums_over_sequences(call);
    SequenceSums sums;
    for (int64_t t = item.begin + threadIdx.x; t < item.end; t += kThreads) {
        SequenceSums one;
        if (only_counts) {
            one.counted = is_counted(call, t) ? 1.0f : 0.0f;
        } else {
            const Tokens token = load_token(call, item.sequence, 1.0f, t);
            one.counted = token.counted || token.impossible ? 1.0f : 0.0f;
            sequence_terms(call, token, one.first, one.second, one.third);
        }
        sums = add(sums, one);
    }
    sums = block_reduce(sums, [](const SequenceSums& a, const SequenceSums& b) { return add(a, b); });
    if (threadIdx.x == 0) workspace.sequence_sums[blockIdx.x] = sums;
}

// What divides the weights of all tokens, the same in every thread.
__device__ inline float divisor_of(const R1kernelsGrpo& call, const Workspace& workspace, int64_t items) {
    const float divisor = given_divisor(call);
    if (call.weights != nullptr) return divisor;
    if (call.count == R1KERNELS_COUNT_BATCH) {
        double counted = 0;
        for (int64_t i = threadIdx.x; i < items; i += kThreads) counted += workspace.sequence_sums[i].counted;
        counted = block_reduce(counted, [](double a, double b) { return a + b; });
        return divisor * (counted > 1 ? static_cast<float>(counted) : 1.0f);
    }
    if (call.count == R1KERNELS_COUNT_LONGEST) {
        int64_t longest = 1;
        for (int64_t i = threadIdx.x; i < call.sequences; i += kThreads) {
            const int64_t length = boundary(call, i + 1) - boundary(call, i);
            longest = length > longest ? length : longest;
        }
        longest = block_reduce(longest, [](int64_t a, int64_t b) { return a > b ? a : b; });
        return divisor * static_cast<float>(longest);
    }
    return divisor;
}

// The constants of one sequence, the same in every thread.
__device__ inline Sequence load_sequence(const R1kernelsGrpo& call, const Workspace& workspace, int64_t sequence,
                                         float divisor) {
    SequenceSums sums;
    if (r1kernels_grpo_needs_first_pass(call)) {
        const SequenceSums* parts = workspace.sequence_sums + first_item(call, sequence, kChunk);
        const int64_t chunks = number_of_chunks(call, sequence, kChunk);
        for (int64_t i = threadIdx.x; i < chunks; i += kThreads) sums = add(sums, parts[i]);
        sums = block_reduce(sums, [](const SequenceSums& a, const SequenceSums& b) { return add(a, b); });
    }
    const bool weighted = call.policy_weights != nullptr && !call.policy_weights_per_token;
    return sequence_of(call, sums, divisor, weighted ? call.policy_weights[sequence] : 1.0f);
}

template <class F>
struct Merge {
    __device__ LossSums<F> operator()(const LossSums<F>& a, const LossSums<F>& b) const { return merge(a, b); }
};

// Whether this block is the last of the grid to come here; what the others wrote before is then visible. The counter is 0
// before and after.
__device__ inline bool is_last_block(unsigned* finished) {
    bool* last = reinterpret_cast<bool*>(shared_memory);
    __syncthreads();  // whoever used the shared memory before has read it
    if (threadIdx.x == 0) {
        __threadfence();
        *last = atomicInc(finished, gridDim.x - 1) == gridDim.x - 1;
        __threadfence();
    }
    __syncthreads();
    return *last;
}

__device__ inline void finish_call(const R1kernelsGrpo& call, const Workspace& workspace, int64_t items) {
    LossSums<double> total;
    for (int64_t i = threadIdx.x; i < items; i += kThreads) total = merge(total, workspace.loss_sums[i]);
    total = block_reduce(total, Merge<double>());
    if (threadIdx.x == 0) finish(call, total);
    if (call.grad_of_ratio == nullptr) return;
    for (int64_t i = threadIdx.x; i < call.sequences; i += kThreads) {
        const int64_t from = first_item(call, i, kChunk), chunks = number_of_chunks(call, i, kChunk);
        double of_ratio = 0;
        SequenceSums sums;
        for (int64_t number = from; number < from + chunks; ++number) {
            of_ratio += workspace.loss_sums[number].of_ratio;
            sums.counted += workspace.sequence_sums[number].counted;
        }
        call.grad_of_ratio[i] = shared_gradient(call, sums.counted, of_ratio);
    }
}

__global__ void __launch_bounds__(kThreads) loss_kernel(R1kernelsGrpo call, Workspace workspace, int64_t items) {
    if (blockIdx.x < items) {
        const Item item = item_of(call, blockIdx.x, kChunk);
        const float divisor = divisor_of(call, workspace, items);
        const Sequence sequence = load_sequence(call, workspace, item.sequence, divisor);
        Tokens tokens[kTokensOfThread];
#pragma unroll
        for (int i = 0; i < kTokensOfThread; ++i) {
            const int64_t t = item.begin + threadIdx.x + i * kThreads;
            tokens[i] = {};
            if (t < item.end) tokens[i] = load_token(call, item.sequence, sequence.weight, t);
        }
        LossSums<float> sums;
#pragma unroll
        for (int i = 0; i < kTokensOfThread; ++i) {
            const int64_t t = item.begin + threadIdx.x + i * kThreads;
            if (t >= item.end) break;
            const TokenGradient<float> gradient = add_token(call, sequence, tokens[i], sums);
            if (call.grad_logp != nullptr) call.grad_logp[t] = gradient.logp;
            if (call.grad_entropy != nullptr) call.grad_entropy[t] = gradient.entropy;
        }
        sums = block_reduce(sums, Merge<float>());
        to_units(call, sequence, item.chunk == 0, sums);
        if (threadIdx.x == 0) workspace.loss_sums[blockIdx.x] = sums;
    }
    unsigned* finished = workspace.counter == kNoCounter ? workspace.finished : stream_counters + workspace.counter;
    if (is_last_block(finished)) finish_call(call, workspace, items);
}

__global__ void __launch_bounds__(kThreads)
    backward_kernel(R1kernelsGrpo call, const float* grad_loss, const float* grad_of_ratio, const float* grad_logp,
                    const float* grad_entropy, float* to_logp, float* to_entropy) {
    const float factor = *grad_loss;
    // tokens behind the last boundary belong to no sequence
    const int64_t first = boundary(call, 0), end = boundary(call, call.sequences);
    for (int64_t t = blockIdx.x * int64_t{kThreads} + threadIdx.x; t < call.tokens;
         t += gridDim.x * int64_t{kThreads}) {
        const bool inside = t >= first && t < end;
        if (grad_logp != nullptr) {
            float value = inside ? grad_logp[t] : 0.0f;
            if (inside && grad_of_ratio != nullptr && is_in_ratio(call, t)) value += grad_of_ratio[sequence_at(call, t)];
            to_logp[t] = factor * value;
        }
        if (grad_entropy != nullptr) to_entropy[t] = inside ? factor * grad_entropy[t] : 0.0f;
    }
}

}  // namespace r1kernels::grpo
