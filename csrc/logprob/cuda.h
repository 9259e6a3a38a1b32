// Launchers of the CUDA kernels of token_logprobs. Plain C types only: a caller needs neither nvcc nor a CUDA header.
//
// Logits are (B, T, V): any strides (in elements) on B and T, stride 1 on V. A row is one pair (b, t); its number is
// b * T + t, and every array with one entry a row holds B * T contiguous entries in that order.
//
// Every launcher enqueues on `stream` (a cudaStream_t) of the current device, does not wait for it, and returns
// cudaGetLastError() as an int: 0 is success. Arguments are trusted: the caller has checked them.
#pragma once

#include <cstdint>

extern "C" {

enum R1kernelsDtype { R1KERNELS_FLOAT32 = 0, R1KERNELS_FLOAT16 = 1, R1KERNELS_BFLOAT16 = 2 };

// What forward and backward share.
struct R1kernelsTokenLogprobs {
    const void* logits;                          // (B, T, V) of `dtype`
    int32_t dtype;                               // an R1kernelsDtype
    int64_t batch, tokens, vocabulary;           // B, T, V; B * T may be 0
    int64_t batch_stride, token_stride;          // in elements; 0 for expanded logits
    const int64_t* targets;                      // (B * T)
    const float* temperatures;                   // (B * T), or null: then `temperature` serves every row
    float temperature;
    int64_t ignore_index;
};

// logp (B * T), entropy (B * T) or null when not asked for, stats (3, B * T): M, S', E' of each row (cuda.cuh), M being
// the largest logit before the division by the temperature. E' is 0 when entropy is null.
int r1kernels_token_logprobs_cuda(const R1kernelsTokenLogprobs* call, float* logp, float* entropy, float* stats,
                                  void* stream);

// grad_logits (B, T, V) of the logits' dtype with its own strides on B and T. It may be the logits themselves (the same
// pointer and strides), which are then overwritten. grad_logp, grad_entropy (B * T), or null for no gradient.
int r1kernels_token_logprobs_cuda_backward(const R1kernelsTokenLogprobs* call, const float* logp, const float* stats,
                                           const float* grad_logp, const float* grad_entropy, void* grad_logits,
                                           int64_t grad_batch_stride, int64_t grad_token_stride, void* stream);

// The text of an error code that a launcher returned.
const char* r1kernels_cuda_error(int code);

}  // extern "C"
