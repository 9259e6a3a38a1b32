// Launchers of grpo_loss for every architecture from sm_80 on.
#include "common/launch.cuh"
#include "grpo/cuda.cuh"

using namespace r1kernels;
using namespace r1kernels::grpo;

namespace {

constexpr size_t kCounterBytes = 16;  // keeps what follows aligned

Workspace parts_of(void* workspace, int64_t items) {
    Workspace parts;
    parts.counter = kNoCounter;
    parts.finished = static_cast<unsigned*>(workspace);
    parts.sequence_sums = reinterpret_cast<SequenceSums*>(static_cast<char*>(workspace) + kCounterBytes);
    parts.loss_sums = reinterpret_cast<LossSums<float>*>(parts.sequence_sums + items);
    return parts;
}

}  // namespace

size_t r1kernels_grpo_loss_cuda_workspace(const R1kernelsGrpo* call) {
    return kCounterBytes + r1kernels_grpo_items(*call, kChunk) * (sizeof(SequenceSums) + sizeof(LossSums<float>));
}

int r1kernels_grpo_loss_cuda(const R1kernelsGrpo* call, void* workspace, void* stream) {
    const int64_t items = r1kernels_grpo_items(*call, kChunk);
    if (items > INT32_MAX) return cudaErrorInvalidValue;
    Workspace parts = parts_of(workspace, items);
    int code = cudaSuccess;
    if (r1kernels_grpo_needs_first_pass(*call) && items > 0) {
        code = launch(first_kernel, items, kThreads, block_reduce_bytes<SequenceSums>(kThreads), stream, *call, parts);
    } else if ((parts.counter = counter_of(stream)) == kNoCounter) {
        code = cudaMemsetAsync(parts.finished, 0, sizeof(unsigned), static_cast<cudaStream_t>(stream));
    }
    if (code != cudaSuccess) return code;
    const int64_t blocks = std::max<int64_t>(items, 1);  // without tokens too the loss is written
    return launch(loss_kernel, blocks, kThreads, block_reduce_bytes<LossSums<double>>(kThreads), stream, *call, parts,
                  items);
}

int r1kernels_grpo_loss_cuda_backward(const R1kernelsGrpo* call, const float* grad_loss, const float* grad_of_ratio,
                                      const float* grad_logp, const float* grad_entropy, float* to_logp,
                                      float* to_entropy, void* stream) {
    const int64_t blocks = (call->tokens + kChunk - 1) / kChunk;
    return launch(backward_kernel, blocks, kThreads, 0, stream, *call, grad_loss, grad_of_ratio, grad_logp,
                  grad_entropy, to_logp, to_entropy);
}
