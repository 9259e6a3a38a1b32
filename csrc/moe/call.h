// What the kernels of the MoE ops are called with. Plain C types only.
//
// T tokens, H hidden size, I intermediate size, E experts, K experts per token, S = T * K routed rows, R rank of a low-rank
// addition. "Expert order": the rows sorted by expert (sort_by_expert), rows of no expert (sentinels) last. All matrices are contiguous; pointers and row
// lengths may have any alignment that their element has.
#pragma once

#include <cstdint>

#include "common/element.h"

namespace r1kernels {

enum class Activation : int32_t { silu, gelu_tanh };

// a = act(g') (u' + shift) of gate g and up projection u, with g' = min(g, limit) and u' = clamp(u, -limit, limit);
// act(g) is g sigmoid(alpha g), or gelu_tanh.
struct Gating {
    Activation activation;
    float alpha, limit, shift;
};

enum class Score : int32_t { sigmoid, softmax, sqrt_softplus };

}  // namespace r1kernels

extern "C" {

// --- the router, of every device ---

enum { R1KERNELS_ROUTE_MOST_EXPERTS = 2048 };  // that an expert can be chosen from on CUDA

struct R1kernelsRoute {
    r1kernels::Element element;               // of the logits
    const void* logits;                       // (T, E)
    int64_t tokens, experts, top_k;
    int64_t n_group, topk_group;
    r1kernels::Score score;
    int32_t by_logits;                        // chosen by logits + bias, not by scores + bias
    int32_t two_best;                         // the score of a group: the sum of its two best, else its best
    int32_t normalize;
    double eps, scale;
    const float* bias;                        // (E,), or null
    const int64_t* replayed;                  // (T, K), or null: choose
};

// --- the order of experts on CUDA ---

// A stable counting sort; indices outside [0, E) come last.
struct R1kernelsExpertSort {
    const int64_t* indices;     // (S,)
    int64_t rows, experts;      // S < 2^31, E
    int32_t wide;               // permutation and inverse are int64_t, else int32_t
    int32_t* offsets;           // (E + 1,)
    void* permutation;          // (S,)
    void* inverse;              // (S,)
};

// --- grouped products on CUDA: the schedule, which rows belong to whom ---

// Rows [first, end) of one expert, at most tile_rows of them. expert E: rows of no expert; expert -1: no tile.
struct R1kernelsMoeTile {
    int32_t expert, first, end, unused;
};

// Made on the device, from offsets that no one has looked at: bounds[e] is the largest of offsets[0 .. e], in [0, S].
struct R1kernelsMoeSchedule {
    int64_t rows, experts;      // S, E
    int64_t tile_rows;          // 64 or 128
    int64_t tile_count;         // the most tiles that any routing needs; those in use come first
    R1kernelsMoeTile* tiles;    // (tile_count)
    int32_t* bounds;            // (E + 2): bounds[e] = the first row of e; rows from bounds[E] on are no one's; then S
};

// --- grouped products on CUDA ---

// Row r in expert order is row (index ? index[r] / divisor : r) of data.
struct R1kernelsMoeRows {
    const void* data;
    const int32_t* index;       // (S), or null
    int32_t divisor;
};

// What is added to a product P: rows (S, rank) in expert order times a weight that lies as that of the product.
struct R1kernelsMoeLowRank {
    const void* rows;           // null: nothing
    const void* weight;
    int64_t rank;
};

enum R1kernelsMoeEpilogue {
    // out = scale P
    R1KERNELS_MOE_STORE = 0,
    // P (S, 2 I) has the gate, then the up projection: out = P; activated (S, I) = a of the rounded P (Gating)
    R1KERNELS_MOE_UP = 1,
    // P (S, I) = dA' = dO W2. From it, the pre-activation (g, u), its a (Gating) rounded, and s = scales[order[r]]:
    //     activated (S, I) = s a    out (S, 2 I) = (s dA' da/dg, s dA' da/du)    partials = parts of <dA', a>
    R1KERNELS_MOE_GATE_BACKWARD = 2,
};

// Of <dA', a>: one sum for so many columns of I, each in a fixed order.
enum { R1KERNELS_MOE_PART_COLUMNS = 64 };

// P (S, columns): row r of expert e is x[r] weight[e]^T or, not transposed, x[r] weight[e]; float32 accumulators.
struct R1kernelsMoeProduct {
    r1kernels::Element element;            // of x, weight, out, activated and pre_activation
    R1kernelsMoeEpilogue epilogue;
    r1kernels::Gating gating;
    int32_t transposed;                    // the layout of weight
    int32_t clear_rest;                    // the rows of no expert get zeros (P = 0); else they stay as they are
    R1kernelsMoeRows x;                    // rows of `depth` elements
    const void* weight;                    // transposed: (E, columns, depth), else (E, depth, columns)
    int64_t columns, depth;                // of an UP product columns is 2 I, of a GATE_BACKWARD I
    R1kernelsMoeSchedule schedule;
    void* out;                             // (S, columns); GATE_BACKWARD: (S, 2 I). null: not asked for (but by STORE)
    void* activated;                       // (S, I), or null
    const void* pre_activation;            // (S, 2 I), gate then up
    const float* scales;                   // (S), in the order before the sort
    const int32_t* order;                  // (S): the permutation
    float* partials;                       // (ceil(I / PART_COLUMNS), S), or null
    float scale;                           // of STORE
    R1kernelsMoeLowRank low;
};

// out[e] (m, n) = the sum over the rows r of expert e of left[r]^T right[r]; zeros for an expert without rows.
struct R1kernelsMoeWeightProduct {
    r1kernels::Element element;
    R1kernelsMoeRows left, right;          // rows of m and of n elements
    int64_t m, n;
    R1kernelsMoeSchedule schedule;         // bounds alone are read
    void* out;                             // (E, m, n)
};

// --- sums on CUDA ---

// out[t] = sum_k weights[t, k] rows[inverse[t * K + k]] in float32, in the order of k; rows of no expert are not read.
struct R1kernelsMoeCombine {
    r1kernels::Element element;
    const void* rows;                      // (S, columns)
    const int32_t* inverse;                // (T * K)
    const int32_t* bounds;                 // of the schedule
    const float* weights;                  // (T, K), or null for 1
    int64_t tokens, top_k, experts, columns;
    void* out;                             // (T, columns)
};

}  // extern "C"
