// A matrix product of bfloat16 values with float32 accumulators on the CPU, for a caller that shares the work out.
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace r1kernels {

constexpr int64_t kGemmPanelColumns = 64, kGemmBlockRows = 192;
constexpr int64_t kGemmStep = 16;    // pairs of k: so many are packed at a time, of the last ones the rest as 0
constexpr int64_t kGemmPairs = 512;  // pairs of k in one pass: a panel of B then stays in the second-level cache

// C (m, n) = A (m, k) B (k, n), or C += A B. A and B are bfloat16, or float32 that is rounded when it is packed. Strides in
// elements; C has stride 1 on n.
struct Gemm {
    const void *a, *b;
    bool a_is_float32, b_is_float32;
    int64_t m, n, k;
    int64_t a_row_stride, a_k_stride, b_k_stride, b_column_stride, c_stride;
    float* c;
    bool add;
    uint32_t* packed_b;  // b_words(gemm)
};

inline int64_t gemm_pairs(const Gemm& gemm) {
    return (gemm.k + 2 * kGemmStep - 1) / (2 * kGemmStep) * kGemmStep;
}
inline int64_t gemm_b_panels(const Gemm& gemm) { return (gemm.n + kGemmPanelColumns - 1) / kGemmPanelColumns; }
inline int64_t gemm_b_words(const Gemm& gemm) { return gemm_b_panels(gemm) * kGemmPanelColumns * gemm_pairs(gemm); }
inline int64_t gemm_a_blocks(const Gemm& gemm) { return (gemm.m + kGemmBlockRows - 1) / kGemmBlockRows; }
constexpr int64_t kGemmAWords = kGemmBlockRows * kGemmPairs;

// Null where the instruction set multiplies no bfloat16.
struct GemmKernels {
    // Packs the panels [begin, end) of B.
    void (*pack_b)(const Gemm& gemm, int64_t begin, int64_t end);

    // Computes the blocks [begin, end) of rows of C; packed_a: kGemmAWords for this thread.
    void (*multiply)(const Gemm& gemm, uint32_t* packed_a, int64_t begin, int64_t end);
};

R1KERNELS_DECLARE_TABLES(GemmKernels, gemm_kernels)

}  // namespace r1kernels
