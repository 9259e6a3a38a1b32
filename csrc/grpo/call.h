// One call of grpo_loss, as the kernels of the CPU and of CUDA see it. Plain C types only.
//
// Arrays are described in r1kernels/grpo/loss.py; they are contiguous. B sequences; tokens are (B, T), or packed (N,).
// The orders of the enumerations are those of the tuples of names there.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define R1KERNELS_GRPO_BOTH __host__ __device__
#else
#define R1KERNELS_GRPO_BOTH
#endif

extern "C" {

enum R1kernelsGrpoVariant {
    R1KERNELS_GRPO,
    R1KERNELS_DUAL_CLIP,
    R1KERNELS_CISPO,
    R1KERNELS_SAPO,
    R1KERNELS_VESPO,
    R1KERNELS_GMPO,
    R1KERNELS_REINFORCE
};
enum R1kernelsGrpoRatio { R1KERNELS_RATIO_TOKEN, R1KERNELS_RATIO_SEQUENCE, R1KERNELS_RATIO_OUTPUT };
enum R1kernelsGrpoKl {
    R1KERNELS_KL_K1,
    R1KERNELS_KL_ABS,
    R1KERNELS_KL_K2,
    R1KERNELS_KL_K3,
    R1KERNELS_KL_K3_PLUS,
    R1KERNELS_KL_UNBIASED
};
// What the divisor of a weight is multiplied by.
enum R1kernelsGrpoCount {
    R1KERNELS_COUNT_ONE,
    R1KERNELS_COUNT_SEQUENCE,  // the counted tokens of the sequence, at least 1
    R1KERNELS_COUNT_BATCH,     // the counted tokens of the call, at least 1
    R1KERNELS_COUNT_LONGEST    // the length of the longest packed sequence, at least 1
};

struct R1kernelsGrpoNumbers {
    float low, high;
    float delta, dual_bound;
    float tau_positive, tau_other;
    float k_positive, lam_positive, k_negative, lam_negative;
    float kl_coef, entropy_coef;
    float divisor;
};

struct R1kernelsGrpo {
    int64_t sequences;  // B
    int64_t width;      // T where padded
    int64_t tokens;     // B T, or N
    const void* mask;   // integers of mask_bytes bytes
    int32_t mask_bytes;
    const void* cu_seqlens;  // (B + 1) integers of cu_seqlens_bytes bytes, or null where padded
    int32_t cu_seqlens_bytes;
    const float* logp;
    const float* old_logp;  // null: the policy itself
    const float* ref_logp;  // null: no KL
    const float* advantages;
    const float* policy_weights;  // null: 1
    const float* entropy;         // null: none
    const float* entropy_weights;  // null: the weights of the loss
    const float* weights;          // null: 1 / (divisor * total * count)
    const float* total;            // one number, or null for 1
    int32_t advantages_per_token, policy_weights_per_token;
    int32_t variant, ratio, kl, count;
    R1kernelsGrpoNumbers numbers;
    float* grad_logp;  // tokens, or null where no gradient is asked for; so too below
    float* grad_of_ratio;
    float* grad_entropy;
    float* loss;
    float* metrics;
};

}  // extern "C"

// How many items there are (layout.h), those without tokens included; from shapes alone.
static inline int64_t r1kernels_grpo_items(const R1kernelsGrpo& call, int64_t chunk) {
    if (call.cu_seqlens == nullptr) return call.sequences * ((call.width + chunk - 1) / chunk);
    return call.tokens == 0 ? 0 : call.tokens / chunk + call.sequences;
}

// Whether anything of a sequence but the number of its counted tokens is needed before its terms.
static inline R1KERNELS_GRPO_BOTH bool r1kernels_grpo_sums_over_sequences(const R1kernelsGrpo& call) {
    return call.ratio != R1KERNELS_RATIO_TOKEN || call.variant == R1KERNELS_VESPO || call.variant == R1KERNELS_GMPO;
}

// Whether a first pass over the tokens has to sum up or count before the second one.
static inline R1KERNELS_GRPO_BOTH bool r1kernels_grpo_needs_first_pass(const R1kernelsGrpo& call) {
    const bool counts = call.count == R1KERNELS_COUNT_SEQUENCE || call.count == R1KERNELS_COUNT_BATCH;
    return r1kernels_grpo_sums_over_sequences(call) || (call.weights == nullptr && counts);
}
