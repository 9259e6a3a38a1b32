// The torch ops of token_logprobs: they check what the kernels trust, allocate, and share the rows out.
// Schemas and fakes stand in r1kernels/logprob/ops.py; B, T, V, and rows = B * T are explained there.
#include <cfloat>
#include <memory>
#include <optional>
#include <tuple>

#include "common/stable.h"
#include "logprob/cpu.h"
#include "logprob/cuda.h"

namespace r1kernels {

namespace {

using torch::stable::parallel_for;

int32_t dtype_of(const char* name, const Tensor& tensor) {
    switch (tensor.scalar_type()) {
        case ScalarType::Float: return R1KERNELS_FLOAT32;
        case ScalarType::Half: return R1KERNELS_FLOAT16;
        case ScalarType::BFloat16: return R1KERNELS_BFLOAT16;
        default: STD_TORCH_CHECK(false, name, ": expected float32, bfloat16 or float16");
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

template <typename T>
const T* optional_values(const char* name, const std::optional<Tensor>& tensor, ScalarType dtype, int64_t count,
                         const Tensor& logits) {
    return tensor ? row_values<T>(name, *tensor, dtype, count, logits) : nullptr;
}

R1kernelsTokenLogprobs call_of(const Tensor& logits, const std::optional<Tensor>& bias, double logit_scale,
                               double softcap, const Tensor& targets, const std::optional<Tensor>& temperatures,
                               double temperature, int64_t ignore_index, int64_t first, int64_t whole) {
    STD_TORCH_CHECK(logits.dim() == 3, "logits: expected 3 dimensions (B, T, V), got ", logits.dim());
    STD_TORCH_CHECK(logits.size(2) > 0, "logits: expected V >= 1");
    STD_TORCH_CHECK(logits.size(2) == 1 || logits.stride(2) == 1, "logits: expected stride 1 on V, got ",
                    logits.stride(2));
    R1kernelsTokenLogprobs call = {};
    call.logits = logits.data_ptr();
    call.dtype = dtype_of("logits", logits);
    call.batch = logits.size(0);
    call.tokens = logits.size(1);
    call.vocabulary = logits.size(2);
    call.batch_stride = logits.stride(0);
    call.token_stride = logits.stride(1);
    const int64_t rows = call.batch * call.tokens;
    call.targets = row_values<int64_t>("targets", targets, ScalarType::Long, rows, logits);
    call.temperatures = optional_values<float>("temperatures", temperatures, ScalarType::Float, rows, logits);
    call.temperature = static_cast<float>(temperature);
    call.ignore_index = ignore_index;
    call.bias = optional_values<float>("bias", bias, ScalarType::Float, call.vocabulary, logits);
    STD_TORCH_CHECK(softcap >= 0, "softcap: expected a number above 0, or 0 for none, got ", softcap);
    call.logit_scale = static_cast<float>(logit_scale);
    call.softcap = static_cast<float>(softcap);
    STD_TORCH_CHECK(first >= 0 && first + call.vocabulary <= whole, "first: expected the columns [first, first + ",
                    call.vocabulary, ") to lie in a vocabulary of ", whole, ", got ", first);
    call.first = first;
    call.whole = whole;
    return call;
}

// Values inside tensors: Python checks them in eager mode with better errors, a compiled graph comes here unchecked.
void check_values(const R1kernelsTokenLogprobs& call) {
    STD_TORCH_CHECK(call.temperatures || call.temperature >= FLT_MIN, "temperature: expected a number above 0, got ",
                    call.temperature);
    for (int64_t row = 0; row < call.batch * call.tokens; ++row) {
        const int64_t target = call.targets[row];
        if (target == call.ignore_index) continue;
        STD_TORCH_CHECK(target >= 0 && target < call.whole, "targets: expected values in [0, ", call.whole,
                        ") or ", call.ignore_index, ", got ", target, " at position ", row);
        STD_TORCH_CHECK(!call.temperatures || call.temperatures[row] >= FLT_MIN, "temperature: expected values above 0, got ",
                        call.temperatures[row], " at position ", row);
    }
}

int64_t grain_of(int64_t elements_per_item) { return elements_per_item >= kGrain ? 1 : kGrain / elements_per_item; }

float* floats(const Tensor& tensor) { return tensor.numel() ? static_cast<float*>(tensor.data_ptr()) : nullptr; }

// --- what a backend does with a call ---

struct Cpu {
    static void check(const R1kernelsTokenLogprobs& call) { check_values(call); }

    static void check(const R1kernelsLogprobGradients& from, int64_t rows, int64_t entries) {
        for (int64_t row = 0; from.sequences && row < rows; ++row) {
            STD_TORCH_CHECK(from.sequences[row] >= 0 && from.sequences[row] < entries,
                            "sequences: expected values in [0, ", entries, "), got ", from.sequences[row],
                            " at position ", row);
        }
    }

    static void forward(const R1kernelsTokenLogprobs& call, bool entropy, const LogprobOutputs& to, const Tensor&) {
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

    static void backward(const R1kernelsTokenLogprobs& call, const R1kernelsLogprobGradients& from, const Tensor& grad) {
        void* to = grad.data_ptr();
        const int64_t batch_stride = grad.stride(0), token_stride = grad.stride(1);
        const int64_t rows = call.batch * call.tokens, chunks = chunks_per_row(call.vocabulary);
        const LogprobKernels& kernels = chosen_logprob_kernels();
        parallel_for(0, rows * chunks, grain_of(call.vocabulary / chunks), [&](int64_t begin, int64_t end) {
            kernels.backward(call, from, to, batch_stride, token_stride, begin, end);
        });
    }
};

#ifdef R1KERNELS_CUDA

void check_launch(int code) { STD_TORCH_CHECK(code == 0, "CUDA: ", r1kernels_cuda_error(code)); }

struct Cuda {
    // values inside tensors would cost a sync: their rows become NaN
    static void check(const R1kernelsTokenLogprobs&) {}
    static void check(const R1kernelsLogprobGradients&, int64_t, int64_t) {}

    static void forward(const R1kernelsTokenLogprobs& call, bool entropy, const LogprobOutputs& to, const Tensor& logits) {
        const int32_t device = logits.get_device_index();
        const torch::stable::accelerator::DeviceGuard guard(device);
        const R1kernelsLogprobOutputs outputs = {to.logp, to.entropy, to.stats, to.extra, entropy};
        const Tensor workspace = empty_on(logits, {r1kernels_token_logprobs_cuda_workspace(&call, &outputs)},
                                          ScalarType::Float);
        check_launch(r1kernels_token_logprobs_cuda(&call, &outputs, floats(workspace), current_stream(device)));
    }

    static void backward(const R1kernelsTokenLogprobs& call, const R1kernelsLogprobGradients& from, const Tensor& grad) {
        const int32_t device = grad.get_device_index();
        const torch::stable::accelerator::DeviceGuard guard(device);
        check_launch(r1kernels_token_logprobs_cuda_backward(&call, &from, grad.data_ptr(), dtype_of("grad", grad),
                                                            grad.stride(0), grad.stride(1), current_stream(device)));
    }
};

#endif

// --- the ops ---

template <typename Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor> forward(
    const Tensor& logits, const std::optional<Tensor>& bias, double logit_scale, double softcap, const Tensor& targets,
    const std::optional<Tensor>& temperatures, double temperature, int64_t ignore_index, int64_t first, int64_t whole,
    bool entropy, bool extra) {
    const R1kernelsTokenLogprobs call = call_of(logits, bias, logit_scale, softcap, targets, temperatures, temperature,
                                                ignore_index, first, whole);
    const bool is_whole = call.vocabulary == whole;
    Backend::check(call);
    const int64_t rows = call.batch * call.tokens;
    const Tensor logp = empty_on(logits, {rows}, ScalarType::Float);
    const Tensor entropies = empty_on(logits, {entropy && is_whole ? rows : 0}, ScalarType::Float);
    const Tensor stats = empty_on(logits, {3, rows}, ScalarType::Float);
    const Tensor extras = empty_on(logits, {extra ? 3 : 0, rows}, ScalarType::Float);
    Backend::forward(call, entropy, {floats(logp), floats(entropies), floats(stats), floats(extras)}, logits);
    return {logp, entropies, stats, extras};
}

template <typename Backend>
void backward_into(const Tensor& grad, const Tensor& logits, const std::optional<Tensor>& bias, double logit_scale,
                   double softcap, const Tensor& targets, const std::optional<Tensor>& temperatures,
                   double temperature, int64_t ignore_index, int64_t first, int64_t whole, const Tensor& logp,
                   const Tensor& stats, const std::optional<Tensor>& grad_logp,
                   const std::optional<Tensor>& grad_entropy, const std::optional<Tensor>& sequences) {
    const R1kernelsTokenLogprobs call = call_of(logits, bias, logit_scale, softcap, targets, temperatures, temperature,
                                                ignore_index, first, whole);
    Backend::check(call);
    const int64_t rows = call.batch * call.tokens;
    R1kernelsLogprobGradients from = {};
    from.logp = row_values<float>("logp", logp, ScalarType::Float, rows, logits);
    from.stats = row_values<float>("stats", stats, ScalarType::Float, 3 * rows, logits);
    from.sequences = optional_values<int32_t>("sequences", sequences, ScalarType::Int, rows, logits);
    const Tensor* given = grad_logp ? &*grad_logp : grad_entropy ? &*grad_entropy : nullptr;
    const int64_t entries = sequences && given ? given->numel() : rows;
    from.grad_logp = optional_values<float>("grad_logp", grad_logp, ScalarType::Float, entries, logits);
    from.grad_entropy = optional_values<float>("grad_entropy", grad_entropy, ScalarType::Float, entries, logits);
    Backend::check(from, rows, entries);
    Backend::backward(call, from, grad);
}

template <typename Backend>
Tensor backward(const Tensor& logits, const std::optional<Tensor>& bias, double logit_scale, double softcap,
                const Tensor& targets, const std::optional<Tensor>& temperatures, double temperature,
                int64_t ignore_index, int64_t first, int64_t whole, const Tensor& logp, const Tensor& stats,
                const std::optional<Tensor>& grad_logp, const std::optional<Tensor>& grad_entropy,
                const std::optional<Tensor>& sequences) {
    Tensor grad = empty_on(logits, logits.sizes(), logits.scalar_type());
    backward_into<Backend>(grad, logits, bias, logit_scale, softcap, targets, temperatures, temperature, ignore_index,
                           first, whole, logp, stats, grad_logp, grad_entropy, sequences);
    return grad;
}

template <typename Backend>
void backward_(const Tensor& logits, const std::optional<Tensor>& bias, double logit_scale, double softcap,
               const Tensor& targets, const std::optional<Tensor>& temperatures, double temperature,
               int64_t ignore_index, int64_t first, int64_t whole, const Tensor& logp, const Tensor& stats,
               const std::optional<Tensor>& grad_logp, const std::optional<Tensor>& grad_entropy,
               const std::optional<Tensor>& sequences) {
    backward_into<Backend>(logits, logits, bias, logit_scale, softcap, targets, temperatures, temperature,
                           ignore_index, first, whole, logp, stats, grad_logp, grad_entropy, sequences);
}

// The gradient goes to a tensor that Python gives: there the memory of large ones is kept between calls.
void backward_into_cpu(const Tensor& logits, const std::optional<Tensor>& bias, double logit_scale, double softcap,
                       const Tensor& targets, const std::optional<Tensor>& temperatures, double temperature,
                       int64_t ignore_index, int64_t first, int64_t whole, const Tensor& logp, const Tensor& stats,
                       const std::optional<Tensor>& grad_logp, const std::optional<Tensor>& grad_entropy,
                       const std::optional<Tensor>& sequences, const Tensor& grad) {
    STD_TORCH_CHECK(grad.dim() == 3 && grad.is_contiguous() && grad.numel() == logits.numel() &&
                        grad.scalar_type() == logits.scalar_type(),
                    "grad: expected a contiguous tensor of the shape and dtype of the logits");
    backward_into<Cpu>(grad, logits, bias, logit_scale, softcap, targets, temperatures, temperature, ignore_index,
                       first, whole, logp, stats, grad_logp, grad_entropy, sequences);
}

STABLE_TORCH_LIBRARY_IMPL(r1kernels, CPU, library) {
    library.impl("token_logprobs_cpu", TORCH_BOX(&forward<Cpu>));
    library.impl("token_logprobs_cpu_backward_into", TORCH_BOX(&backward_into_cpu));
    library.impl("token_logprobs_cpu_backward_", TORCH_BOX(&backward_<Cpu>));
}

#ifdef R1KERNELS_CUDA

void backward_into_cuda(const Tensor& logits, const std::optional<Tensor>& bias, double logit_scale, double softcap,
                        const Tensor& targets, const std::optional<Tensor>& temperatures, double temperature,
                        int64_t ignore_index, int64_t first, int64_t whole, const Tensor& logp, const Tensor& stats,
                        const std::optional<Tensor>& grad_logp, const std::optional<Tensor>& grad_entropy,
                        const std::optional<Tensor>& sequences, const Tensor& grad) {
    STD_TORCH_CHECK(grad.dim() == 3 && grad.size(0) == logits.size(0) && grad.size(1) == logits.size(1) &&
                        grad.size(2) == logits.size(2) && (grad.size(2) == 1 || grad.stride(2) == 1),
                    "grad: expected the shape of the logits, and stride 1 on V");
    STD_TORCH_CHECK(grad.device() == logits.device(), "grad: expected a tensor on the device of the logits");
    STD_TORCH_CHECK(logits.scalar_type() == ScalarType::Float || grad.scalar_type() == logits.scalar_type(),
                    "grad: expected the dtype of the logits, which are not float32");
    backward_into<Cuda>(grad, logits, bias, logit_scale, softcap, targets, temperatures, temperature, ignore_index,
                        first, whole, logp, stats, grad_logp, grad_entropy, sequences);
}

STABLE_TORCH_LIBRARY_IMPL(r1kernels, CUDA, library) {
    library.impl("token_logprobs_cuda", TORCH_BOX(&forward<Cuda>));
    library.impl("token_logprobs_cuda_backward", TORCH_BOX(&backward<Cuda>));
    library.impl("token_logprobs_cuda_backward_", TORCH_BOX(&backward_<Cuda>));
    library.impl("token_logprobs_cuda_backward_into", TORCH_BOX(&backward_into_cuda));
}

#endif

}  // namespace

}  // namespace r1kernels
