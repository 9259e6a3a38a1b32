// The torch ops of token_logprobs: they check what the kernels trust, allocate, and share the rows out.
// Schemas and fakes stand in r1kernels/logprob/ops.py; B, T, V, and rows = B * T are explained there.
#include <memory>
#include <optional>
#include <tuple>

#include "common/memory.h"
#include "common/stable.h"
#include "logprob/cpu.h"
#include "logprob/cuda.h"

namespace r1kernels {

namespace {

using torch::stable::parallel_for;

int32_t dtype_of(const Tensor& logits) {
    switch (logits.scalar_type()) {
        case ScalarType::Float: return R1KERNELS_FLOAT32;
        case ScalarType::Half: return R1KERNELS_FLOAT16;
        case ScalarType::BFloat16: return R1KERNELS_BFLOAT16;
        default: STD_TORCH_CHECK(false, "logits: expected float32, bfloat16 or float16");
    }
    return 0;
}

template <typename T>
const T* row_values(const char* name, const Tensor& tensor, ScalarType dtype, int64_t count, const Tensor& logits) {
    STD_TORCH_CHECK(tensor.scalar_type() == dtype, name, ": wrong dtype");
    STD_TORCH_CHECK(tensor.is_contiguous() && tensor.numel() == count, name, ": expected ", count,
                    " contiguous values, got ", tensor.numel());
    STD_TORCH_CHECK(tensor.device() == logits.device(), name, ": expected a tensor on the device of the logits");
    return static_cast<const T*>(tensor.data_ptr());
}

const float* gradient_values(const char* name, const std::optional<Tensor>& grad, int64_t count, const Tensor& logits) {
    return grad ? row_values<float>(name, *grad, ScalarType::Float, count, logits) : nullptr;
}

R1kernelsTokenLogprobs call_of(const Tensor& logits, const Tensor& targets, const std::optional<Tensor>& temperatures,
                               double temperature, int64_t ignore_index) {
    STD_TORCH_CHECK(logits.dim() == 3, "logits: expected 3 dimensions (B, T, V), got ", logits.dim());
    STD_TORCH_CHECK(logits.size(2) > 0, "logits: expected V >= 1");
    STD_TORCH_CHECK(logits.size(2) == 1 || logits.stride(2) == 1, "logits: expected stride 1 on V, got ",
                    logits.stride(2));
    R1kernelsTokenLogprobs call = {};
    call.logits = logits.data_ptr();
    call.dtype = dtype_of(logits);
    call.batch = logits.size(0);
    call.tokens = logits.size(1);
    call.vocabulary = logits.size(2);
    call.batch_stride = logits.stride(0);
    call.token_stride = logits.stride(1);
    const int64_t rows = call.batch * call.tokens;
    call.targets = row_values<int64_t>("targets", targets, ScalarType::Long, rows, logits);
    call.temperatures =
        temperatures ? row_values<float>("temperatures", *temperatures, ScalarType::Float, rows, logits) : nullptr;
    call.temperature = static_cast<float>(temperature);
    call.ignore_index = ignore_index;
    return call;
}

// Values inside tensors: Python checks them in eager mode with better errors, a compiled graph comes here unchecked.
void check_values(const R1kernelsTokenLogprobs& call) {
    STD_TORCH_CHECK(call.temperatures || call.temperature > 0, "temperature: expected a number above 0, got ",
                    call.temperature);
    for (int64_t row = 0; row < call.batch * call.tokens; ++row) {
        const int64_t target = call.targets[row];
        if (target == call.ignore_index) continue;
        STD_TORCH_CHECK(target >= 0 && target < call.vocabulary, "targets: expected values in [0, ", call.vocabulary,
                        ") or ", call.ignore_index, ", got ", target, " at position ", row);
        STD_TORCH_CHECK(!call.temperatures || call.temperatures[row] > 0, "temperature: expected values above 0, got ",
                        call.temperatures[row], " at position ", row);
    }
}

int64_t grain_of(int64_t elements_per_item) { return elements_per_item >= kGrain ? 1 : kGrain / elements_per_item; }

std::tuple<Tensor, Tensor, Tensor> outputs_of(const Tensor& logits, bool entropy) {
    const int64_t rows = logits.size(0) * logits.size(1);
    return {empty_on(logits, {rows}, ScalarType::Float), empty_on(logits, {entropy ? rows : 0}, ScalarType::Float),
            empty_on(logits, {3, rows}, ScalarType::Float)};
}

float* floats(const Tensor& tensor) { return static_cast<float*>(tensor.data_ptr()); }

// --- CPU ---

std::tuple<Tensor, Tensor, Tensor> forward_cpu(const Tensor& logits, const Tensor& targets,
                                               const std::optional<Tensor>& temperatures, double temperature,
                                               int64_t ignore_index, bool entropy) {
    const R1kernelsTokenLogprobs call = call_of(logits, targets, temperatures, temperature, ignore_index);
    check_values(call);
    auto outputs = outputs_of(logits, entropy);
    const int64_t rows = call.batch * call.tokens, chunks = chunks_per_row(call.vocabulary), items = rows * chunks;
    float* logp = floats(std::get<0>(outputs));
    float* entropies = entropy ? floats(std::get<1>(outputs)) : nullptr;
    float* stats = floats(std::get<2>(outputs));
    const std::unique_ptr<LogitSums[]> sums(new LogitSums[items]);
    const LogprobKernels& kernels = chosen_logprob_kernels();
    parallel_for(0, items, grain_of(call.vocabulary / chunks), [&](int64_t begin, int64_t end) {
        kernels.reduce(call, entropy, sums.get(), begin, end);
    });
    parallel_for(0, rows, kGrain / 64, [&](int64_t begin, int64_t end) {
        kernels.finish(call, sums.get(), logp, entropies, stats, begin, end);
    });
    return outputs;
}

void backward_into(const Tensor& grad, const Tensor& logits, const Tensor& targets,
                   const std::optional<Tensor>& temperatures, double temperature, int64_t ignore_index,
                   const Tensor& logp, const Tensor& stats, const std::optional<Tensor>& grad_logp,
                   const std::optional<Tensor>& grad_entropy) {
    const R1kernelsTokenLogprobs call = call_of(logits, targets, temperatures, temperature, ignore_index);
    check_values(call);
    const int64_t rows = call.batch * call.tokens, chunks = chunks_per_row(call.vocabulary);
    const float* logp_values = row_values<float>("logp", logp, ScalarType::Float, rows, logits);
    const float* stats_values = row_values<float>("stats", stats, ScalarType::Float, 3 * rows, logits);
    const float* from_logp = gradient_values("grad_logp", grad_logp, rows, logits);
    const float* from_entropy = gradient_values("grad_entropy", grad_entropy, rows, logits);
    void* to = grad.data_ptr();
    const int64_t batch_stride = grad.stride(0), token_stride = grad.stride(1);
    const LogprobKernels& kernels = chosen_logprob_kernels();
    parallel_for(0, rows * chunks, grain_of(call.vocabulary / chunks), [&](int64_t begin, int64_t end) {
        kernels.backward(call, logp_values, stats_values, from_logp, from_entropy, to, batch_stride, token_stride,
                         begin, end);
    });
}

Tensor backward_cpu(const Tensor& logits, const Tensor& targets, const std::optional<Tensor>& temperatures,
                    double temperature, int64_t ignore_index, const Tensor& logp, const Tensor& stats,
                    const std::optional<Tensor>& grad_logp, const std::optional<Tensor>& grad_entropy) {
    Tensor grad = empty_on(logits, logits.sizes(), logits.scalar_type());
    want_huge_pages(grad.data_ptr(), grad.numel() * grad.element_size());
    backward_into(grad, logits, targets, temperatures, temperature, ignore_index, logp, stats, grad_logp, grad_entropy);
    return grad;
}

void backward_cpu_(const Tensor& logits, const Tensor& targets, const std::optional<Tensor>& temperatures,
                   double temperature, int64_t ignore_index, const Tensor& logp, const Tensor& stats,
                   const std::optional<Tensor>& grad_logp, const std::optional<Tensor>& grad_entropy) {
    backward_into(logits, logits, targets, temperatures, temperature, ignore_index, logp, stats, grad_logp,
                  grad_entropy);
}

STABLE_TORCH_LIBRARY_IMPL(r1kernels, CPU, library) {
    library.impl("token_logprobs_cpu", TORCH_BOX(&forward_cpu));
    library.impl("token_logprobs_cpu_backward", TORCH_BOX(&backward_cpu));
    library.impl("token_logprobs_cpu_backward_", TORCH_BOX(&backward_cpu_));
}

// --- CUDA ---

#ifdef R1KERNELS_CUDA

void check_launch(int code) { STD_TORCH_CHECK(code == 0, "CUDA: ", r1kernels_cuda_error(code)); }

std::tuple<Tensor, Tensor, Tensor> forward_cuda(const Tensor& logits, const Tensor& targets,
                                                const std::optional<Tensor>& temperatures, double temperature,
                                                int64_t ignore_index, bool entropy) {
    const R1kernelsTokenLogprobs call = call_of(logits, targets, temperatures, temperature, ignore_index);
    const int32_t device = logits.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    auto outputs = outputs_of(logits, entropy);
    check_launch(r1kernels_token_logprobs_cuda(&call, floats(std::get<0>(outputs)),
                                               entropy ? floats(std::get<1>(outputs)) : nullptr,
                                               floats(std::get<2>(outputs)), current_stream(device)));
    return outputs;
}

void backward_into_cuda(const Tensor& grad, const Tensor& logits, const Tensor& targets,
                        const std::optional<Tensor>& temperatures, double temperature, int64_t ignore_index,
                        const Tensor& logp, const Tensor& stats, const std::optional<Tensor>& grad_logp,
                        const std::optional<Tensor>& grad_entropy) {
    const R1kernelsTokenLogprobs call = call_of(logits, targets, temperatures, temperature, ignore_index);
    const int64_t rows = call.batch * call.tokens;
    const int32_t device = logits.get_device_index();
    check_launch(r1kernels_token_logprobs_cuda_backward(
        &call, row_values<float>("logp", logp, ScalarType::Float, rows, logits),
        row_values<float>("stats", stats, ScalarType::Float, 3 * rows, logits),
        gradient_values("grad_logp", grad_logp, rows, logits),
        gradient_values("grad_entropy", grad_entropy, rows, logits), grad.data_ptr(), grad.stride(0), grad.stride(1),
        current_stream(device)));
}

Tensor backward_cuda(const Tensor& logits, const Tensor& targets, const std::optional<Tensor>& temperatures,
                     double temperature, int64_t ignore_index, const Tensor& logp, const Tensor& stats,
                     const std::optional<Tensor>& grad_logp, const std::optional<Tensor>& grad_entropy) {
    const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
    Tensor grad = empty_on(logits, logits.sizes(), logits.scalar_type());
    backward_into_cuda(grad, logits, targets, temperatures, temperature, ignore_index, logp, stats, grad_logp,
                       grad_entropy);
    return grad;
}

void backward_cuda_(const Tensor& logits, const Tensor& targets, const std::optional<Tensor>& temperatures,
                    double temperature, int64_t ignore_index, const Tensor& logp, const Tensor& stats,
                    const std::optional<Tensor>& grad_logp, const std::optional<Tensor>& grad_entropy) {
    const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
    backward_into_cuda(logits, logits, targets, temperatures, temperature, ignore_index, logp, stats, grad_logp,
                       grad_entropy);
}

STABLE_TORCH_LIBRARY_IMPL(r1kernels, CUDA, library) {
    library.impl("token_logprobs_cuda", TORCH_BOX(&forward_cuda));
    library.impl("token_logprobs_cuda_backward", TORCH_BOX(&backward_cuda));
    library.impl("token_logprobs_cuda_backward_", TORCH_BOX(&backward_cuda_));
}

#endif

}  // namespace

}  // namespace r1kernels
