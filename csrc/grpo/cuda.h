// Launchers of the CUDA kernels of grpo_loss and group_advantages. Plain C types only.
//
// Every launcher enqueues on `stream` (a cudaStream_t) of the current device, does not wait for it, and returns
// a cudaError_t as an int: 0 is success. Arguments are trusted: the caller has checked them.
#pragma once

#include <cstddef>
#include <cstdint>

#include "grpo/advantages.h"
#include "grpo/call.h"

extern "C" {

// The bytes of device memory that a call needs until it has run; any contents.
size_t r1kernels_grpo_loss_cuda_workspace(const R1kernelsGrpo* call);

// One launch from the mask to the loss and its gradients; one before it where sums over sequences or counts of tokens
// are needed.
int r1kernels_grpo_loss_cuda(const R1kernelsGrpo* call, void* workspace, void* stream);

// The gradients that the forward wrote (null: not asked for), times *grad_loss; grad_of_ratio is null for token ratios, and
// has no gradient in a call->logp (null: none is) of -inf.
int r1kernels_grpo_loss_cuda_backward(const R1kernelsGrpo* call, const float* grad_loss, const float* grad_of_ratio,
                                      const float* grad_logp, const float* grad_entropy, float* to_logp,
                                      float* to_entropy, void* stream);

// One launch.
int r1kernels_group_advantages_cuda(const R1kernelsAdvantages* call, void* stream);

}  // extern "C"
