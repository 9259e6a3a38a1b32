// The CPU kernels of the log-prob rows, compiled once for each instruction set (see common/vector.h): by dtype.
#include "logprob/cpu.h"

#include "logprob/cpu_backward.h"
#include "logprob/cpu_divergence.h"
#include "logprob/cpu_forward.h"
#include "logprob/cpu_kept.h"
#include "logprob/cpu_sample.h"

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

void kept_products(const R1kernelsKeptProducts& call, float* to, int64_t begin, int64_t end) {
    with_element(call.element, [&](auto zero) { products<decltype(zero)>(call, to, begin, end); });
}

void kept_gradient_of_hidden(const R1kernelsKeptProducts& call, void* to, bool float32, int64_t begin, int64_t end) {
    with_element(call.element, [&](auto zero) {
        typedef decltype(zero) T;
        if (float32) return gradient_of_hidden<T>(call, static_cast<float*>(to), begin, end);
        gradient_of_hidden<T>(call, static_cast<T*>(to), begin, end);
    });
}

void kept_gradient_of_weight(const R1kernelsKeptProducts& call, void* to, float* bias, int64_t begin, int64_t end) {
    with_element(call.element, [&](auto zero) {
        gradient_of_weight(call, static_cast<decltype(zero)*>(to), bias, begin, end);
    });
}

template <int kKind>
struct Kind {
    static constexpr int value = kKind;
};

// run(the kind as a constant)
template <typename Run>
void with_kind(R1kernelsDivergenceKind kind, const Run& run) {
    switch (kind) {
        case R1KERNELS_FORWARD_KL: return run(Kind<R1KERNELS_FORWARD_KL>());
        case R1KERNELS_REVERSE_KL: return run(Kind<R1KERNELS_REVERSE_KL>());
        case R1KERNELS_JSD: return run(Kind<R1KERNELS_JSD>());
    }
}

void sums_of_divergence(const R1kernelsDivergence& call, float* sums, int64_t begin, int64_t end) {
    with_kind(call.kind, [&](auto kind) { divergence_sums<kind.value>(call, sums, begin, end); });
}

void gradient_of_divergence(const R1kernelsDivergence& call, const float* mean, const float* grad, float* to,
                            int64_t begin, int64_t end) {
    with_kind(call.kind, [&](auto kind) { divergence_gradient<kind.value>(call, mean, grad, to, begin, end); });
}

void sample(const SampleCall& call, double* ends, int64_t begin, int64_t end) {
    with_element(call.element, [&](auto zero) {
        for (int64_t row = begin; row < end; ++row) sample_row<decltype(zero)>(call, row, ends);
    });
}

}  // namespace

const SampleKernels sample_kernels = {sample};
const DivergenceKernels divergence_kernels = {sums_of_divergence, gradient_of_divergence};
const KeptKernels kept_kernels = {kept_products, kept_gradient_of_hidden, kept_gradient_of_weight};
const LogprobKernels logprob_kernels = {reduce, finish, backward};

}  // namespace r1kernels::R1KERNELS_ISA
