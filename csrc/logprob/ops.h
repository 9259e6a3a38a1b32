// The torch ops of the log-prob rows, for what a device has to run: they check what the kernels trust, and allocate.
// Schemas and fakes stand in r1kernels/logprob/token.py; B, T, V, and rows = B * T are explained there.
#pragma once

#include <optional>
#include <tuple>

#include "common/stable.h"
#include "logprob/call.h"

namespace r1kernels {

using Optional = std::optional<Tensor>;

template <typename T>
const T* row_values(const char* name, const Tensor& tensor, ScalarType dtype, int64_t count, const Tensor& logits) {
    STD_TORCH_CHECK(tensor.scalar_type() == dtype, name, ": wrong dtype");
    STD_TORCH_CHECK(tensor.is_contiguous() && tensor.numel() == count, name, ": expected ", count,
                    " contiguous values, got ", tensor.numel());
    STD_TORCH_CHECK(tensor.device() == logits.device(), name, ": expected a tensor on the device of the logits");
    return static_cast<const T*>(tensor.data_ptr());
}

template <typename T>
const T* optional_values(const char* name, const Optional& tensor, ScalarType dtype, int64_t count,
                         const Tensor& logits) {
    return tensor ? row_values<T>(name, *tensor, dtype, count, logits) : nullptr;
}

inline R1kernelsTokenLogprobs call_of(const Tensor& logits, const Optional& bias, double logit_scale, double softcap,
                                      const Tensor& targets, const Optional& temperatures, double temperature,
                                      int64_t ignore_index, int64_t first, int64_t whole) {
    STD_TORCH_CHECK(logits.dim() == 3, "logits: expected 3 dimensions (B, T, V), got ", logits.dim());
    STD_TORCH_CHECK(logits.size(2) > 0, "logits: expected V >= 1");
    STD_TORCH_CHECK(logits.size(2) == 1 || logits.stride(2) == 1, "logits: expected stride 1 on V, got ",
                    logits.stride(2));
    R1kernelsTokenLogprobs call = {};
    call.logits = logits.data_ptr();
    call.element = element_of("logits", logits);
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

inline float* floats(const Tensor& tensor) { return tensor.numel() ? static_cast<float*>(tensor.data_ptr()) : nullptr; }

struct RowOutputs {
    Tensor logp, entropy, stats, extra;

    // An entropy needs the whole vocabulary.
    RowOutputs(const R1kernelsTokenLogprobs& call, const Tensor& logits, bool entropy, bool extra)
        : RowOutputs(logits, call.batch * call.tokens, entropy && call.vocabulary == call.whole, extra) {}

    std::tuple<Tensor, Tensor, Tensor, Tensor> results() const { return {logp, entropy, stats, extra}; }

private:
    RowOutputs(const Tensor& logits, int64_t rows, bool entropy, bool extra)
        : logp(empty_on(logits, {rows}, ScalarType::Float)),
          entropy(empty_on(logits, {entropy ? rows : 0}, ScalarType::Float)),
          stats(empty_on(logits, {3, rows}, ScalarType::Float)),
          extra(empty_on(logits, {extra ? 3 : 0, rows}, ScalarType::Float)) {}
};

// What a backward is called with.
struct RowsBackward {
    R1kernelsTokenLogprobs call;
    R1kernelsLogprobGradients from;
    int64_t entries;  // of the upstream gradients: one per row, or one per sequence

    int64_t rows() const { return call.batch * call.tokens; }
};

inline RowsBackward backward_of(
    const Tensor& logits, const Optional& bias, double logit_scale, double softcap, const Tensor& targets,
    const Optional& temperatures, double temperature, int64_t ignore_index, int64_t first, int64_t whole,
    const Tensor& logp, const Tensor& stats, const Optional& grad_logp, const Optional& grad_entropy,
    const Optional& sequences) {
    RowsBackward backward = {};
    backward.call = call_of(logits, bias, logit_scale, softcap, targets, temperatures, temperature, ignore_index, first,
                            whole);
    const int64_t rows = backward.rows();
    const Tensor* given = grad_logp ? &*grad_logp : grad_entropy ? &*grad_entropy : nullptr;
    const int64_t entries = backward.entries = sequences && given ? given->numel() : rows;
    R1kernelsLogprobGradients& from = backward.from;
    from.logp = row_values<float>("logp", logp, ScalarType::Float, rows, logits);
    from.stats = row_values<float>("stats", stats, ScalarType::Float, 3 * rows, logits);
    from.sequences = optional_values<int32_t>("sequences", sequences, ScalarType::Int, rows, logits);
    from.grad_logp = optional_values<float>("grad_logp", grad_logp, ScalarType::Float, entries, logits);
    from.grad_entropy = optional_values<float>("grad_entropy", grad_entropy, ScalarType::Float, entries, logits);
    return backward;
}

using Sums = void (*)(const R1kernelsTokenLogprobs& call, const RowOutputs& outputs, bool entropy);
using Gradient = void (*)(const RowsBackward& backward, const Tensor& grad);
using Allocate = Tensor (*)(const Tensor& like, Shape shape, ScalarType dtype);

template <Sums sums>
std::tuple<Tensor, Tensor, Tensor, Tensor> forward(
    const Tensor& logits, const Optional& bias, double logit_scale, double softcap, const Tensor& targets,
    const Optional& temperatures, double temperature, int64_t ignore_index, int64_t first, int64_t whole,
    bool entropy, bool extra) {
    const R1kernelsTokenLogprobs call = call_of(logits, bias, logit_scale, softcap, targets, temperatures, temperature,
                                                ignore_index, first, whole);
    const RowOutputs outputs(call, logits, entropy, extra);
    sums(call, outputs, entropy);
    return outputs.results();
}

template <Gradient write>
void backward_into(
    const Tensor& logits, const Optional& bias, double logit_scale, double softcap, const Tensor& targets,
    const Optional& temperatures, double temperature, int64_t ignore_index, int64_t first, int64_t whole,
    const Tensor& logp, const Tensor& stats, const Optional& grad_logp, const Optional& grad_entropy,
    const Optional& sequences, const Tensor& grad) {
    STD_TORCH_CHECK(grad.dim() == 3 && grad.size(0) == logits.size(0) && grad.size(1) == logits.size(1) &&
                        grad.size(2) == logits.size(2) && (grad.size(2) == 1 || grad.stride(2) == 1),
                    "grad: expected the shape of the logits, and stride 1 on V");
    STD_TORCH_CHECK(grad.device() == logits.device(), "grad: expected a tensor on the device of the logits");
    STD_TORCH_CHECK(logits.scalar_type() == ScalarType::Float || grad.scalar_type() == logits.scalar_type(),
                    "grad: expected the dtype of the logits, which are not float32");
    write(backward_of(logits, bias, logit_scale, softcap, targets, temperatures, temperature, ignore_index, first, whole,
                      logp, stats, grad_logp, grad_entropy, sequences),
          grad);
}

template <Gradient write, Allocate allocate>
Tensor backward(
    const Tensor& logits, const Optional& bias, double logit_scale, double softcap, const Tensor& targets,
    const Optional& temperatures, double temperature, int64_t ignore_index, int64_t first, int64_t whole,
    const Tensor& logp, const Tensor& stats, const Optional& grad_logp, const Optional& grad_entropy,
    const Optional& sequences) {
    const Tensor grad = allocate(logits, logits.sizes(), logits.scalar_type());
    backward_into<write>(logits, bias, logit_scale, softcap, targets, temperatures, temperature, ignore_index, first,
                         whole, logp, stats, grad_logp, grad_entropy, sequences, grad);
    return grad;
}

// The gradient goes over the logits.
template <Gradient write>
void backward_(
    const Tensor& logits, const Optional& bias, double logit_scale, double softcap, const Tensor& targets,
    const Optional& temperatures, double temperature, int64_t ignore_index, int64_t first, int64_t whole,
    const Tensor& logp, const Tensor& stats, const Optional& grad_logp, const Optional& grad_entropy,
    const Optional& sequences) {
    backward_into<write>(logits, bias, logit_scale, softcap, targets, temperatures, temperature, ignore_index, first,
                         whole, logp, stats, grad_logp, grad_entropy, sequences, logits);
}

}  // namespace r1kernels
