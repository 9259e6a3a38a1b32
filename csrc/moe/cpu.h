// The CPU kernels of the MoE ops: plain functions over blocks, for a caller that shares the blocks out to threads.
//
// T tokens, H hidden size, I intermediate size, E experts, K experts per token, S = T * K routed rows, R rank of a low-rank
// addition. "Expert order": the rows sorted by expert (sort_by_expert). Every number is computed by one thread in an order
// that depends on neither blocks nor threads. Arguments are trusted.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "moe/call.h"

namespace r1kernels {

// Row r: data + (index ? index[r] : r) * stride elements.
struct BlockRows {
    const void* data;
    int64_t stride;
    const int32_t* index;
};

constexpr int64_t kMoeBlockRows = 256;     // the most rows m of a product
constexpr int64_t kMoeBlockColumns = 256;  // the most columns n of a product
constexpr int64_t kMoeLeastColumns = 64;   // fewer are not worth packing the rows for
constexpr int64_t kMoeGateColumns = kMoeBlockColumns / 2;  // of I, for the two functions that work on gate and up

// What is added to the sums of a product: rows (m, R) times the matrix of the expert, which lies as that of the product.
struct LowRankBlock {
    const void* rows;    // null: nothing
    const void* weight;  // the first of the rows or columns that take part
    int64_t weight_stride, rank;
};

// One product of one expert: out (m, n) = A (m, k) times B, or out (m, n) = A^T B of A (k, m) and B (k, n).
struct ProductBlock {
    Element element;
    BlockRows a;
    const void* b;        // the first of the rows that take part; of A^T B: see b_rows
    int64_t b_stride;
    int64_t m, n, k;
    void* out;
    int64_t out_stride;
    bool float_out;       // out in float32, else in the element type
    bool batch_invariant; // A B^T: few rows have the bits of many
    float scale;          // of A B^T and A B
    LowRankBlock low;
    bool streamed;        // A^T B: out is written past the caches (common/memory.h)
};

// Rows [0, rows) of one expert and columns [0, columns) of I; pointers are at the first of both.
struct GateBlock {
    Element element;
    Gating gating;
    bool batch_invariant;      // few rows have the bits of many
    int64_t rows, columns, hidden, intermediate;
    BlockRows tokens;          // (rows, H): hidden states, or gradients of the output
    const void* weight;      // gate_up[e] at its first row (stride H), or down[e] at its first column (stride I)
    void* pre_activation;    // (rows, 2 I), gate then up; null where the forward is not to keep it
    void* activated;         // (rows, I): A; in the backward s A, or null
    const float* scales;     // (rows,): s
    float* grad_scales;      // (rows,): <dA', A> over the columns
    void* grad_pre;          // (rows, 2 I), or null
    LowRankBlock low;        // to gate and up, or to dA'
};

// Each token's rows, weighted and added up: out[t] = sum_k weights[t, k] rows[inverse[t, k]] over inverse < limit.
struct CombineBlock {
    Element element;
    const float* rows;
    int64_t rows_stride;
    const int32_t* inverse;  // (T, K)
    int64_t top_k, limit, columns;
    const float* weights;    // (T, K), or null for 1
    void* out;
    int64_t out_stride;
};

struct MoeKernels {
    int64_t workspace;  // bytes that each of the first five functions needs, 64-byte aligned
    void (*product_nt)(const ProductBlock& product, void* workspace);  // B holds n rows of k elements
    void (*product_nn)(const ProductBlock& product, void* workspace);  // B holds k rows of n elements
    void (*product_tn)(const ProductBlock& product, const BlockRows& b, void* workspace);

    // The pre-activation, and A = act(gate) * up of its rounded values.
    void (*up)(const GateBlock& block, void* workspace);
    // dA' = dO W2; from it and the pre-activation s A, <dA', A> and the gradient of the pre-activation.
    // With neither grad_scales nor grad_pre only s A.
    void (*gate_backward)(const GateBlock& block, void* workspace);

    void (*combine)(const CombineBlock& call, int64_t first_token, int64_t last_token);

    // Tokens [begin, end): writes weights (T, K), and indices (T, K) unless they are replayed and hold that choice.
    void (*route)(const R1kernelsRoute& call, int64_t* indices, float* weights, void* scratch, int64_t begin,
                  int64_t end);
    // Writes grad_logits (T, E) in the dtype of the logits.
    void (*route_backward)(const R1kernelsRoute& call, const int64_t* indices, const float* grad_weights,
                           void* grad_logits, void* scratch, int64_t begin, int64_t end);
};

// Tokens that the router works on together: each takes a step before the next step begins, which gives the processor work
// while a chain of dependent instructions is waited for.
constexpr int64_t kRouterTokens = 4;
constexpr int64_t kRouterBytes = 48;  // of scratch for an expert

// Bytes of scratch that `route` and `route_backward` need.
inline int64_t router_scratch(int64_t experts, int64_t top_k) {
    return kRouterTokens * kRouterBytes * ((experts > top_k ? experts : top_k) + 64);
}

R1KERNELS_DECLARE_TABLES(MoeKernels, moe_kernels)

}  // namespace r1kernels
