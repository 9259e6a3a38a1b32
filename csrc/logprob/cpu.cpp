// The CPU kernels of the log-prob rows, compiled once for each instruction set (see common/vector.h): by dtype.
#include "logprob/cpu.h"

#include "logprob/cpu_backward.h"
#include "logprob/cpu_forward.h"

namespace r1kernels::R1KERNELS_ISA {

namespace {

void reduce(const R1kernelsTokenLogprobs& call, bool entropy, bool extra, LogitSums* sums, int64_t begin, int64_t end) {
    switch (call.dtype) {
        case R1KERNELS_FLOAT32:
            return entropy ? reduce_items<true, float>(call, extra, sums, begin, end)
                           : reduce_items<false, float>(call, extra, sums, begin, end);
        case R1KERNELS_FLOAT16:
            return entropy ? reduce_items<true, Float16>(call, extra, sums, begin, end)
                           : reduce_items<false, Float16>(call, extra, sums, begin, end);
        default:
            return entropy ? reduce_items<true, BFloat16>(call, extra, sums, begin, end)
                           : reduce_items<false, BFloat16>(call, extra, sums, begin, end);
    }
}

void finish(const R1kernelsTokenLogprobs& call, const LogitSums* sums, const LogprobOutputs& to, int64_t begin,
            int64_t end) {
    switch (call.dtype) {
        case R1KERNELS_FLOAT32: return finish_rows<float>(call, sums, to, begin, end);
        case R1KERNELS_FLOAT16: return finish_rows<Float16>(call, sums, to, begin, end);
        default: return finish_rows<BFloat16>(call, sums, to, begin, end);
    }
}

template <typename T>
void backward_of(const R1kernelsTokenLogprobs& call, const R1kernelsLogprobGradients& from, void* grad,
                 int64_t batch_stride, int64_t token_stride, int64_t begin, int64_t end) {
    const auto run = from.grad_entropy ? backward_items<true, T> : backward_items<false, T>;
    run(call, from, static_cast<T*>(grad), batch_stride, token_stride, begin, end);
}

void backward(const R1kernelsTokenLogprobs& call, const R1kernelsLogprobGradients& from, void* grad,
              int64_t batch_stride, int64_t token_stride, int64_t begin, int64_t end) {
    const auto run = call.dtype == R1KERNELS_FLOAT32   ? backward_of<float>
                     : call.dtype == R1KERNELS_FLOAT16 ? backward_of<Float16>
                                                       : backward_of<BFloat16>;
    run(call, from, grad, batch_stride, token_stride, begin, end);
}

}  // namespace

const LogprobKernels logprob_kernels = {reduce, finish, backward};

}  // namespace r1kernels::R1KERNELS_ISA
