// What the row kernels of the log-prob ops are called with, on the CPU and on CUDA. Plain C types only.
//
// Logits are (B, T, V): any strides (in elements) on B and T, stride 1 on V. A row is one pair (b, t); its number is
// b * T + t, and every array with one entry a row holds B * T contiguous entries in that order. They may be some columns
// of a larger vocabulary. A raw logit r at column v stands for the logit
//
//     z = cap(logit_scale * (r + bias_v)),   cap(u) = softcap * tanh(u / softcap), or u where softcap is 0
#pragma once

#include <cstdint>

#include "common/element.h"

extern "C" {

// What forward and backward share.
struct R1kernelsTokenLogprobs {
    const void* logits;                          // (B, T, V) of `element`
    r1kernels::Element element;
    int64_t batch, tokens, vocabulary;           // B, T, V; B * T may be 0
    int64_t batch_stride, token_stride;          // in elements; 0 for expanded logits
    const int64_t* targets;                      // (B * T), columns of the whole vocabulary
    const float* temperatures;                   // (B * T), or null: then `temperature` serves every row
    float temperature;
    int64_t ignore_index;
    const float* bias;                           // (V), or null
    float logit_scale, softcap;                  // 1 and 0 where there is none
    int64_t first, whole;                        // these are the columns [first, first + V) of `whole` columns
};

// What the backward reads besides.
struct R1kernelsLogprobGradients {
    const float* logp;                           // (B * T), final
    const float* stats;                          // (3, B * T): M, S', E' over the whole vocabulary
    const float* grad_logp;                      // (B * T), or one per sequence; null for no gradient
    const float* grad_entropy;                   // likewise
    const int32_t* sequences;                    // (B * T): the entry of the gradients that a row takes; null: its own
};

// Divergences, in the order of KINDS in r1kernels/logprob/divergence_terms.py.
enum R1kernelsDivergenceKind : int32_t { R1KERNELS_FORWARD_KL, R1KERNELS_REVERSE_KL, R1KERNELS_JSD };

// The logits of student and teacher side by side: float32, of one shape and the same columns, with the same targets, which
// say no more than which rows are ignored.
struct R1kernelsDivergence {
    R1kernelsTokenLogprobs student, teacher;
    const float *student_stats, *teacher_stats;  // (3, B * T): M, S', E' over the whole vocabulary
    R1kernelsDivergenceKind kind;
    float beta;
};

// Products of hidden states and the rows of the head that were kept, for kept sets (r1kernels/logprob/kept_head.py). An
// entry is a pair of a token and a row of the head.
struct R1kernelsKeptProducts {
    const void* hidden;                          // (N, H) of `element`
    const void* weight;                          // (V, H): the rows [first, first + V) of the head
    r1kernels::Element element;
    int64_t tokens, width, vocabulary, first;    // N, H, V
    int64_t entries;                             // Z
    const int64_t* ids;                          // (Z), rows of the whole head; those elsewhere take no part
    const int64_t* entry_tokens;                 // (Z), -1 for no part
    const float* bias;                           // (V), or null; forward alone
    const int64_t* offsets;                      // (N + 1): the entries of a token; backward alone, as what follows
    const int64_t* order;                        // (Z): the entries by id, those of one id by token
    const float* grad;                           // (Z); an entry at 0 takes no part
};

}  // extern "C"
