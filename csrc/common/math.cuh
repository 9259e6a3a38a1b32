// Functions of one float that code which CPU and CUDA share is built on (common/vector_math.h has those of vectors).
#pragma once

#include <cuda_runtime.h>

#include <cmath>

namespace r1kernels {

__device__ inline float exp_of(float x) { return expf(x); }
__device__ inline float expm1_of(float x) { return expm1f(x); }
__device__ inline float log_of(float x) { return logf(x); }
__device__ inline bool any(bool holds) { return holds; }

}  // namespace r1kernels
