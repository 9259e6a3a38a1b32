// The torch op sample_tokens on the CPU: it shares the rows out.
#include <cfloat>
#include <tuple>
#include <vector>

#include "common/stable.h"
#include "logprob/cpu.h"

namespace r1kernels {

namespace {

std::tuple<Tensor, Tensor> sample_tokens(const Tensor& logits, const Tensor& uniform, double temperature) {
    SampleCall call = {};
    call.element = element_of("logits", logits);
    STD_TORCH_CHECK(logits.dim() == 2 && logits.is_contiguous() && logits.size(1) > 0,
                    "logits: expected a contiguous tensor of shape (B, V), V at least 1");
    const int64_t rows = logits.size(0);
    STD_TORCH_CHECK(uniform.scalar_type() == ScalarType::Double && uniform.is_contiguous() && uniform.dim() == 1 &&
                        uniform.size(0) == rows,
                    "uniform: expected a contiguous float64 tensor of ", rows, " entries");
    STD_TORCH_CHECK(temperature >= FLT_MIN, "temperature: expected a number above 0, got ", temperature);
    const Tensor tokens = empty_on(logits, {rows}, ScalarType::Long), logp = empty_on(logits, {rows}, ScalarType::Double);
    if (rows == 0) return {tokens, logp};
    call.logits = logits.data_ptr();
    call.vocabulary = logits.size(1);
    call.temperature = temperature;
    call.uniform = static_cast<const double*>(uniform.data_ptr());
    // one that is not passes every probability, or none
    for (int64_t row = 0; row < rows; ++row) {
        STD_TORCH_CHECK(call.uniform[row] >= 0 && call.uniform[row] < 1, "uniform: expected values in [0, 1)");
    }
    call.tokens = static_cast<int64_t*>(tokens.data_ptr());
    call.logp = static_cast<double*>(logp.data_ptr());
    const SampleKernels& kernels = chosen_sample_kernels();
    torch::stable::parallel_for(0, rows, kGrain / call.vocabulary + 1, [&](int64_t begin, int64_t end) {
        std::vector<double> ends(sample_blocks(call.vocabulary));
        kernels.sample(call, ends.data(), begin, end);
    });
    return {tokens, logp};
}

STABLE_TORCH_LIBRARY_IMPL(r1kernels, CPU, library) {
    library.impl("sample_tokens_cpu", TORCH_BOX(&sample_tokens));
}

}  // namespace

}  // namespace r1kernels
