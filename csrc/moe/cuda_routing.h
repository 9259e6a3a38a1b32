// Launchers of the CUDA kernels of the router and of sort_by_expert. Plain C types only.
//
// T tokens, E experts, K experts per token, S = T * K routed rows. All arrays are contiguous.
//
// Every launcher enqueues on `stream` (a cudaStream_t) of the current device, does not wait for it, and returns
// a cudaError_t as an int: 0 is success. Arguments are trusted: the caller has checked them. Values of indices are not
// trusted: one outside [0, E) is nobody's.
#pragma once

#include <cstddef>
#include <cstdint>

#include "moe/element.h"

extern "C" {

// --- the router ---

enum { R1KERNELS_ROUTE_MOST_EXPERTS = 2048 };  // that an expert can be chosen from

struct R1kernelsRoute {
    r1kernels::Element element;               // of the logits
    const void* logits;                       // (T, E)
    int64_t tokens, experts, top_k;
    int64_t n_group, topk_group;
    int32_t softmax, normalize;
    double scale;
    const float* bias;                        // (E,), or null
    const int64_t* replayed;                  // (T, K), or null: choose
};

// Writes weights (T, K), indices (T, K) and counts (E,).
int r1kernels_route_cuda(const R1kernelsRoute* call, float* weights, int64_t* indices, int32_t* counts, void* stream);

// Writes grad_logits (T, E) of the element of the logits. Groups, bias and `replayed` are not read.
int r1kernels_route_cuda_backward(const R1kernelsRoute* call, const int64_t* indices, const float* grad_weights,
                                  void* grad_logits, void* stream);

// --- the order of experts ---

// A stable counting sort; indices outside [0, E) come last.
struct R1kernelsExpertSort {
    const int64_t* indices;     // (S,)
    int64_t rows, experts;      // S < 2^31, E
    int32_t wide;               // permutation and inverse are int64_t, else int32_t
    int32_t* offsets;           // (E + 1,)
    void* permutation;          // (S,)
    void* inverse;              // (S,)
};

// The bytes of device memory that a call needs until it has run; any contents, 16-byte aligned.
size_t r1kernels_expert_sort_cuda_workspace(const R1kernelsExpertSort* call);

// One launch for few rows, else three.
int r1kernels_expert_sort_cuda(const R1kernelsExpertSort* call, void* workspace, void* stream);

}  // extern "C"
