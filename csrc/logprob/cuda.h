// Launchers of the CUDA kernels of the log-prob ops. Plain C types only: a caller needs neither nvcc nor a CUDA header.
//
// Every launcher enqueues on `stream` (a cudaStream_t) of the current device, does not wait for it, and returns
// a cudaError_t as an int: 0 is success. Arguments are trusted: the caller has checked them.
#pragma once

#include <cstdint>

#include "logprob/call.h"

extern "C" {

// What the forward writes. stats are M, S', E' of each row, M being the largest logit before the division by the
// temperature; E' is 0 unless with_entropy is set, which an entropy asks for. Of a slab (call.h: whole > V) logp is the
// logit of the target before the division by the temperature, NaN where the slab does not hold it, and entropy is null.
struct R1kernelsLogprobOutputs {
    float* logp;           // (B * T)
    float* entropy;        // (B * T), or null
    float* stats;          // (3, B * T)
    float* extra;          // (3, B * T): log_sum_sq_probs, mean_logits, is_top1; or null
    int32_t with_entropy;
};

// How many floats of device memory the forward needs to put sums of pieces in; often 0.
int64_t r1kernels_token_logprobs_cuda_workspace(const R1kernelsTokenLogprobs* call, const R1kernelsLogprobOutputs* to);

int r1kernels_token_logprobs_cuda(const R1kernelsTokenLogprobs* call, const R1kernelsLogprobOutputs* to,
                                  float* workspace, void* stream);

// grad_logits (B, T, V) with its own strides on B and T, of the logits' element type or, of float32 logits, any. It may be the
// logits themselves (the same pointer, strides and type), which are then overwritten.
int r1kernels_token_logprobs_cuda_backward(const R1kernelsTokenLogprobs* call, const R1kernelsLogprobGradients* from,
                                           void* grad_logits, r1kernels::Element grad_element,
                                           int64_t grad_batch_stride, int64_t grad_token_stride, void* stream);

// sums (4, B * T) over the columns of the call (divergence_terms.h; 0 for ignored rows).
int r1kernels_divergence_cuda(const R1kernelsDivergence* call, float* sums, void* stream);

// The gradient of the student's raw logits, to the place where they lie; mean (2, B * T): of all columns; grad (B * T): null
// for ones.
int r1kernels_divergence_cuda_backward(const R1kernelsDivergence* call, const float* mean, const float* grad, float* to,
                                       void* stream);

// sums (B): those of the values (N) of each completion, in a fixed order. Completion i is the tokens
// [cu_seqlens[i], cu_seqlens[i + 1]), or N / B tokens each where cu_seqlens (B + 1) is null; NaN where these bounds do
// not lie in [0, N] in rising order.
int r1kernels_completion_sums_cuda(const float* values, int64_t tokens, const int64_t* cu_seqlens, int64_t completions,
                                   float* sums, void* stream);

// numbers (N): the completion of each token; -1 where no completion holds it.
int r1kernels_completion_numbers_cuda(const int64_t* cu_seqlens, int64_t completions, int64_t tokens, int32_t* numbers,
                                      void* stream);

// to (Z) = the products of the entries; 0 where an entry takes no part.
int r1kernels_kept_products_cuda(const R1kernelsKeptProducts* call, float* to, void* stream);

// for_hidden (N, H) of the call's element, or of float32; for_weight (V, H) and for_bias (V), which hold 0. Null: not wanted.
int r1kernels_kept_products_cuda_backward(const R1kernelsKeptProducts* call, void* for_hidden, int32_t float32,
                                          void* for_weight, float* for_bias, void* stream);

}  // extern "C"
