// The functions that terms.h is built on, for one float.
#pragma once

#include <cuda_runtime.h>

#include <cmath>

namespace r1kernels::grpo {

__device__ inline float exp_of(float x) { return expf(x); }
__device__ inline float expm1_of(float x) { return expm1f(x); }
__device__ inline float log_of(float x) { return logf(x); }

}  // namespace r1kernels::grpo
