// Launchers of the CUDA kernels of the MoE ops. Plain C types only: a caller needs neither nvcc nor a CUDA header.
//
// Every launcher enqueues on `stream` (a cudaStream_t) of the current device, does not wait for it, and returns
// a cudaError_t as an int: 0 is success. Arguments are trusted: the caller has checked them. Values of indices and offsets
// are not: an index outside [0, E) is no one's. A row's result does not depend on other rows.
#pragma once

#include <cstddef>

#include "moe/call.h"

extern "C" {

// --- the router ---

// Writes weights (T, K), indices (T, K) and counts (E,).
int r1kernels_route_cuda(const R1kernelsRoute* call, float* weights, int64_t* indices, int32_t* counts, void* stream);

// Writes grad_logits (T, E) of the element of the logits. Groups, bias and `replayed` are not read.
int r1kernels_route_cuda_backward(const R1kernelsRoute* call, const int64_t* indices, const float* grad_weights,
                                  void* grad_logits, void* stream);

// --- the order of experts ---

// The bytes of device memory that a call needs until it has run; any contents, 16-byte aligned.
size_t r1kernels_expert_sort_cuda_workspace(const R1kernelsExpertSort* call);

// One launch for few rows, else three.
int r1kernels_expert_sort_cuda(const R1kernelsExpertSort* call, void* workspace, void* stream);

// --- grouped products ---

// The rows and the number of tiles, from sizes alone. The caller allocates `tiles` and `bounds`.
void r1kernels_moe_plan(r1kernels::Element element, int64_t rows, int64_t experts, R1kernelsMoeSchedule* schedule);

// Writes tiles and bounds from offsets (E + 1).
int r1kernels_moe_schedule_cuda(const R1kernelsMoeSchedule* schedule, const int32_t* offsets, void* stream);

int r1kernels_moe_product_cuda(const R1kernelsMoeProduct* product, void* stream);
int r1kernels_moe_weight_product_cuda(const R1kernelsMoeWeightProduct* product, void* stream);

// --- sums ---

int r1kernels_moe_combine_cuda(const R1kernelsMoeCombine* combine, void* stream);

// grad[permutation[r]] = the sum of partials (parts, S) over the parts; 0 for rows of no expert.
int r1kernels_moe_sum_partials_cuda(const R1kernelsMoeSchedule* schedule, const float* partials, int64_t parts,
                                    const int32_t* permutation, float* grad, void* stream);

// --- Hopper (cuda_sm90a_*.cu) ---

// Whether the current device is an sm_90 and the wgmma kernels take this product. They may refuse by device, dtype,
// sizes and alignment, not by the number of rows: a row has the same bits in any company.
int r1kernels_moe_hopper_serves(const R1kernelsMoeProduct* product);
int r1kernels_moe_hopper_product_cuda(const R1kernelsMoeProduct* product, void* stream);
int r1kernels_moe_hopper_serves_weights(const R1kernelsMoeWeightProduct* product);
int r1kernels_moe_hopper_weight_product_cuda(const R1kernelsMoeWeightProduct* product, void* stream);

}  // extern "C"
