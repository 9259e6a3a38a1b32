// The CPU kernels of the log-prob rows, compiled once for each instruction set (see common/vector.h): by dtype.
#include "logprob/cpu.h"

#include "logprob/cpu_backward.h"
#include "logprob/cpu_forward.h"

namespace r1kernels::R1KERNELS_ISA {

namespace {

void reduce(const R1kernelsTokenLogprobs& call, bool entropy, bool extra, LogitSums* sums, int64_t begin, int64_t end) {
    with_element(call.element, [&](auto zero) {
        typedef decltype(zero) T;
        return entropy ? reduce_items<true, T>(call, extra, sums, begin, end)
                       : reduce_items<false, T>(call, extra, sums, begin, end);
    });
}

void finish(const R1kernelsTokenLogprobs& call, const LogitSums* sums, const LogprobOutputs& to, int64_t begin,
            int64_t end) {
    with_element(call.element, [&](auto zero) { finish_rows<decltype(zero)>(call, sums, to, begin, end); });
}

void backward(const R1kernelsTokenLogprobs& call, const R1kernelsLogprobGradients& from, void* grad,
              int64_t batch_stride, int64_t token_stride, int64_t begin, int64_t end) {
    with_element(call.element, [&](auto zero) {
        typedef decltype(zero) T;
        const auto run = from.grad_entropy ? backward_items<true, T> : backward_items<false, T>;
        run(call, from, static_cast<T*>(grad), batch_stride, token_stride, begin, end);
    });
}

}  // namespace

const LogprobKernels logprob_kernels = {reduce, finish, backward};

}  // namespace r1kernels::R1KERNELS_ISA
