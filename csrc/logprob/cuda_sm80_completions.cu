// Launchers of the kernels over completions, for every architecture from sm_80 on.
#include "common/launch.cuh"
#include "logprob/cuda.h"
#include "logprob/cuda_completions.cuh"

using namespace r1kernels;
using namespace r1kernels::logprob;

int r1kernels_completion_sums_cuda(const float* values, int64_t tokens, const int64_t* cu_seqlens, int64_t completions,
                                   float* sums, void* stream) {
    constexpr int64_t warps = kCompletionThreads / kWarpSize;
    return launch(completion_sums_kernel, (completions + warps - 1) / warps, kCompletionThreads, 0, stream, values,
                  tokens, cu_seqlens, completions, sums);
}

int r1kernels_completion_numbers_cuda(const int64_t* cu_seqlens, int64_t completions, int64_t tokens, int32_t* numbers,
                                      void* stream) {
    return launch(completion_numbers_kernel, (tokens + kCompletionThreads - 1) / kCompletionThreads, kCompletionThreads,
                  0, stream, cu_seqlens, completions, tokens, numbers);
}
