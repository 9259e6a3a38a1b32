// The launcher of group_advantages for every architecture from sm_80 on.
#include "common/launch.cuh"
#include "grpo/advantages.cuh"
#include "grpo/cuda.h"

int r1kernels_group_advantages_cuda(const R1kernelsAdvantages* call, void* stream) {
    using namespace r1kernels;
    const int64_t blocks = (call->size + grpo::kAdvantageThreads - 1) / grpo::kAdvantageThreads;
    return launch(grpo::advantages_kernel, blocks, grpo::kAdvantageThreads, 0, stream, *call);
}
