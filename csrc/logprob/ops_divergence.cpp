// The torch ops of the rows of divergences on the CPU: they share the rows out.
#include "logprob/ops_divergence.h"

#include "logprob/cpu.h"

namespace r1kernels {

namespace {

using torch::stable::parallel_for;

int64_t rows_of(const R1kernelsDivergence& call) { return call.student.batch * call.student.tokens; }

int64_t rows_of_thread(const R1kernelsDivergence& call) { return kGrain / call.student.vocabulary + 1; }

void write_sums(const R1kernelsDivergence& call, const Tensor& sums) {
    const DivergenceKernels& kernels = chosen_divergence_kernels();
    float* to = static_cast<float*>(sums.data_ptr());
    parallel_for(0, rows_of(call), rows_of_thread(call),
                 [&](int64_t begin, int64_t end) { kernels.sums(call, to, begin, end); });
}

void write_gradient(const R1kernelsDivergence& call, const float* mean, const float* grad, const Tensor& logits) {
    const DivergenceKernels& kernels = chosen_divergence_kernels();
    float* to = static_cast<float*>(logits.data_ptr());
    parallel_for(0, rows_of(call), rows_of_thread(call),
                 [&](int64_t begin, int64_t end) { kernels.gradient(call, mean, grad, to, begin, end); });
}

STABLE_TORCH_LIBRARY_IMPL(r1kernels, CPU, library) {
    library.impl("divergence_rows_cpu", TORCH_BOX(&divergence_forward<write_sums>));
    library.impl("divergence_rows_cpu_backward_", TORCH_BOX(&divergence_backward_<write_gradient>));
}

}  // namespace

}  // namespace r1kernels
