// Launchers of the forward of the log-prob ops, for every architecture from sm_80 on.
#include "logprob/cuda_forward.cuh"
#include "logprob/cuda_launch.cuh"

using namespace r1kernels;
using namespace r1kernels::logprob;

int64_t r1kernels_token_logprobs_cuda_workspace(const R1kernelsTokenLogprobs* call,
                                                const R1kernelsLogprobOutputs* to) {
    const Partition partition = partition_of(*call);
    const int64_t fields = to->extra == nullptr ? kSumsFields : kSumsFieldsWithExtra;
    return partition.pieces == 1 ? 0 : fields * partition.rows * partition.pieces;
}

int r1kernels_token_logprobs_cuda(const R1kernelsTokenLogprobs* call, const R1kernelsLogprobOutputs* to,
                                  float* workspace, void* stream) {
    const Partition partition = partition_of(*call);
    const bool general = is_transformed(*call) || to->extra != nullptr;
    const int code = with_scalar(call->element, [=](auto zero) {
        using Scalar = decltype(zero);
        return with_mode(general, to->with_entropy, [=](auto mode) {
            return launch(forward_kernel<Scalar, mode()>, blocks_of(partition), kThreads, kWarps * sizeof(Sums), stream,
                          *call, *to, partition, workspace);
        });
    });
    if (code != cudaSuccess || partition.pieces == 1) return code;
    return with_scalar(call->element, [=](auto zero) {
        return launch(merge_kernel<decltype(zero)>, divide_up(partition.rows, kWarps), kThreads, 0, stream, *call, *to,
                      partition, workspace);
    });
}
