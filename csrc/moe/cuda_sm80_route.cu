// Launchers of the router for every architecture from sm_80 on.
#include "common/launch.cuh"
#include "moe/cuda_route_backward.cuh"
#include "moe/cuda_scalar.cuh"

using namespace r1kernels;
using namespace r1kernels::moe;

namespace {

int64_t blocks_of(const R1kernelsRoute& call) { return (call.tokens + kRouteWarps - 1) / kRouteWarps; }

template <class Scalar>
int choose(const R1kernelsRoute& call, float* weights, int64_t* indices, int32_t* counts, void* stream) {
    const auto run = [&](auto kernel) {
        const size_t shared = kRouteWarps * call.experts * sizeof(int);
        return launch(kernel, blocks_of(call), kRouteThreads, shared, stream, call, weights, indices, counts);
    };
    if (call.experts <= 4 * kWarpSize) return run(route_kernel<Scalar, 4>);
    if (call.experts <= 8 * kWarpSize) return run(route_kernel<Scalar, 8>);
    if (call.experts <= 16 * kWarpSize) return run(route_kernel<Scalar, 16>);
    if (call.experts <= R1KERNELS_ROUTE_MOST_EXPERTS) {
        return run(route_kernel<Scalar, R1KERNELS_ROUTE_MOST_EXPERTS / kWarpSize>);
    }
    return cudaErrorInvalidValue;
}

}  // namespace

int r1kernels_route_cuda(const R1kernelsRoute* call, float* weights, int64_t* indices, int32_t* counts, void* stream) {
    const int code =
        cudaMemsetAsync(counts, 0, call->experts * sizeof(int32_t), static_cast<cudaStream_t>(stream));
    if (code != cudaSuccess) return code;
    return with_scalar(call->element, [&](auto scalar) {
        using Scalar = decltype(scalar);
        if (call->replayed == nullptr) return choose<Scalar>(*call, weights, indices, counts, stream);
        return launch(replay_kernel<Scalar>, blocks_of(*call), kRouteThreads, 0, stream, *call, weights, indices,
                      counts);
    });
}

int r1kernels_route_cuda_backward(const R1kernelsRoute* call, const int64_t* indices, const float* grad_weights,
                                  void* grad_logits, void* stream) {
    return with_scalar(call->element, [&](auto scalar) {
        using Scalar = decltype(scalar);
        return launch(route_backward_kernel<Scalar>, blocks_of(*call), kRouteThreads, 0, stream, *call, indices,
                      grad_weights, static_cast<Scalar*>(grad_logits));
    });
}
