// The torch ops of token_logprobs on the CPU: they share the rows out.
#include "logprob/ops.h"

#include <cfloat>
#include <memory>

#include "common/kept.h"
#include "logprob/cpu.h"

namespace r1kernels {

namespace {

using torch::stable::parallel_for;

// Values inside tensors: Python checks them in eager mode with better errors, a compiled graph comes here unchecked.
void check_values(const R1kernelsTokenLogprobs& call) {
    STD_TORCH_CHECK(call.temperatures || call.temperature >= FLT_MIN, "temperature: expected a number above 0, got ",
                    call.temperature);
    for (int64_t row = 0; row < call.batch * call.tokens; ++row) {
        const int64_t target = call.targets[row];
        if (target == call.ignore_index) continue;
        STD_TORCH_CHECK(target >= 0 && target < call.whole, "targets: expected values in [0, ", call.whole,
                        ") or ", call.ignore_index, ", got ", target, " at position ", row);
        STD_TORCH_CHECK(!call.temperatures || call.temperatures[row] >= FLT_MIN,
                        "temperature: expected values above 0, got ", call.temperatures[row], " at position ", row);
    }
}

int64_t grain_of(int64_t elements_per_item) { return elements_per_item >= kGrain ? 1 : kGrain / elements_per_item; }

void sums_of_rows(const R1kernelsTokenLogprobs& call, const RowOutputs& outputs, bool entropy) {
    check_values(call);
    const LogprobOutputs to = {floats(outputs.logp), floats(outputs.entropy), floats(outputs.stats),
                               floats(outputs.extra)};
    const int64_t rows = call.batch * call.tokens, chunks = chunks_per_row(call.vocabulary), items = rows * chunks;
    const std::unique_ptr<LogitSums[]> sums(new LogitSums[items]);
    const LogprobKernels& kernels = chosen_logprob_kernels();
    parallel_for(0, items, grain_of(call.vocabulary / chunks), [&](int64_t begin, int64_t end) {
        kernels.reduce(call, entropy, to.extra != nullptr, sums.get(), begin, end);
    });
    parallel_for(0, rows, kGrain / 64, [&](int64_t begin, int64_t end) {
        kernels.finish(call, sums.get(), to, begin, end);
    });
}

void check_sequences(const RowsBackward& backward) {
    const int32_t* sequences = backward.from.sequences;
    for (int64_t row = 0; sequences && row < backward.rows(); ++row) {
        STD_TORCH_CHECK(sequences[row] >= 0 && sequences[row] < backward.entries,
                        "sequences: expected values in [0, ", backward.entries, "), got ", sequences[row],
                        " at position ", row);
    }
}

void write_gradient(const RowsBackward& backward, const Tensor& grad) {
    check_values(backward.call);
    check_sequences(backward);
    void* to = grad.data_ptr();
    const int64_t batch_stride = grad.stride(0), token_stride = grad.stride(1);
    const int64_t vocabulary = backward.call.vocabulary, chunks = chunks_per_row(vocabulary);
    const LogprobKernels& kernels = chosen_logprob_kernels();
    parallel_for(0, backward.rows() * chunks, grain_of(vocabulary / chunks), [&](int64_t begin, int64_t end) {
        kernels.backward(backward.call, backward.from, to, batch_stride, token_stride, begin, end);
    });
}

STABLE_TORCH_LIBRARY_IMPL(r1kernels, CPU, library) {
    library.impl("token_logprobs_cpu", TORCH_BOX(&forward<sums_of_rows>));
    library.impl("token_logprobs_cpu_backward", TORCH_BOX((&backward<write_gradient, kept_on>)));
    library.impl("token_logprobs_cpu_backward_", TORCH_BOX(&backward_<write_gradient>));
}

}  // namespace

}  // namespace r1kernels
