// The CPU kernels of grpo_loss: plain functions over ranges of items (layout.h), for a caller that shares them out to
// threads. Each item is summed by one thread in a fixed order, and so are the items: results do not depend on the number
// of threads. Arguments are trusted.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/isa.h"
#include "grpo/call.h"

namespace r1kernels {

constexpr int64_t kGrpoChunk = 4096;  // tokens of an item

struct GrpoKernels {
    // Bytes that a call needs between its passes, for that many items.
    size_t (*workspace_bytes)(const R1kernelsGrpo& call, int64_t items);

    // Sums up what the sequences need; called where r1kernels_grpo_needs_first_pass says so.
    void (*first_pass)(const R1kernelsGrpo& call, void* workspace, int64_t items, int64_t begin, int64_t end);

    // The constants of all sequences.
    void (*between)(const R1kernelsGrpo& call, void* workspace, int64_t items);

    // Loss sums and the gradients of the items of [begin, end).
    void (*second_pass)(const R1kernelsGrpo& call, void* workspace, int64_t items, int64_t begin, int64_t end);

    // Loss, metrics and grad_of_ratio.
    void (*finish)(const R1kernelsGrpo& call, void* workspace, int64_t items);

    // to = factor * grad + factor * mask * grad_of_ratio (null: 0) for the tokens of the items of [begin, end); the ratio has no
    // gradient in a logp (null: none is) of -inf.
    void (*backward)(const R1kernelsGrpo& call, float factor, const float* grad_of_ratio, const float* grad, float* to,
                     int64_t begin, int64_t end);
};

R1KERNELS_DECLARE_TABLES(GrpoKernels, grpo_kernels)

}  // namespace r1kernels
