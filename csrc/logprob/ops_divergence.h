// The torch ops of the rows of divergences, for what a device has to run. Schemas and fakes stand in
// r1kernels/logprob/divergence.py.
#pragma once

#include "logprob/ops.h"

namespace r1kernels {

inline const float* float_stats(const char* name, const Tensor& stats, int64_t rows, const Tensor& logits) {
    return row_values<float>(name, stats, ScalarType::Float, 3 * rows, logits);
}

inline R1kernelsDivergence divergence_call_of(
    const Tensor& logits, const Tensor& teacher_logits, const Optional& bias, double logit_scale, double softcap,
    const Tensor& targets, const Optional& temperatures, double temperature, int64_t ignore_index, int64_t first,
    int64_t whole, const Optional& teacher_bias, double teacher_logit_scale, double teacher_softcap,
    const Optional& teacher_temperatures, double teacher_temperature, const Tensor& stats, const Tensor& teacher_stats,
    int64_t kind, double beta) {
    R1kernelsDivergence call = {};
    call.student =
        call_of(logits, bias, logit_scale, softcap, targets, temperatures, temperature, ignore_index, first, whole);
    call.teacher = call_of(teacher_logits, teacher_bias, teacher_logit_scale, teacher_softcap, targets,
                           teacher_temperatures, teacher_temperature, ignore_index, first, whole);
    STD_TORCH_CHECK(call.student.element == Element::float32 && call.teacher.element == Element::float32,
                    "logits: expected float32");
    STD_TORCH_CHECK(call.student.batch == call.teacher.batch && call.student.tokens == call.teacher.tokens &&
                        call.student.vocabulary == call.teacher.vocabulary,
                    "teacher_logits: expected the shape of the student's");
    STD_TORCH_CHECK(kind >= R1KERNELS_FORWARD_KL && kind <= R1KERNELS_JSD, "kind: expected 0, 1 or 2, got ", kind);
    const int64_t rows = call.student.batch * call.student.tokens;
    call.student_stats = float_stats("stats", stats, rows, logits);
    call.teacher_stats = float_stats("teacher_stats", teacher_stats, rows, logits);
    call.kind = static_cast<R1kernelsDivergenceKind>(kind);
    call.beta = static_cast<float>(beta);
    return call;
}

using WriteSums = void (*)(const R1kernelsDivergence& call, const Tensor& sums);
using WriteGradient = void (*)(const R1kernelsDivergence& call, const float* mean, const float* grad,
                               const Tensor& logits);

template <WriteSums write>
Tensor divergence_forward(
    const Tensor& logits, const Tensor& teacher_logits, const Optional& bias, double logit_scale, double softcap,
    const Tensor& targets, const Optional& temperatures, double temperature, int64_t ignore_index, int64_t first,
    int64_t whole, const Optional& teacher_bias, double teacher_logit_scale, double teacher_softcap,
    const Optional& teacher_temperatures, double teacher_temperature, const Tensor& stats, const Tensor& teacher_stats,
    int64_t kind, double beta) {
    const R1kernelsDivergence call = divergence_call_of(
        logits, teacher_logits, bias, logit_scale, softcap, targets, temperatures, temperature, ignore_index, first,
        whole, teacher_bias, teacher_logit_scale, teacher_softcap, teacher_temperatures, teacher_temperature, stats,
        teacher_stats, kind, beta);
    const int64_t rows = call.student.batch * call.student.tokens;
    const Tensor sums = empty_on(logits, {4, rows}, ScalarType::Float);
    write(call, sums);
    return sums;
}

// The gradient goes over the student's logits.
template <WriteGradient write>
void divergence_backward_(
    const Tensor& logits, const Tensor& teacher_logits, const Optional& bias, double logit_scale, double softcap,
    const Tensor& targets, const Optional& temperatures, double temperature, int64_t ignore_index, int64_t first,
    int64_t whole, const Optional& teacher_bias, double teacher_logit_scale, double teacher_softcap,
    const Optional& teacher_temperatures, double teacher_temperature, const Tensor& stats, const Tensor& teacher_stats,
    int64_t kind, double beta, const Tensor& mean, const Optional& grad) {
    const R1kernelsDivergence call = divergence_call_of(
        logits, teacher_logits, bias, logit_scale, softcap, targets, temperatures, temperature, ignore_index, first,
        whole, teacher_bias, teacher_logit_scale, teacher_softcap, teacher_temperatures, teacher_temperature, stats,
        teacher_stats, kind, beta);
    const int64_t rows = call.student.batch * call.student.tokens;
    write(call, row_values<float>("mean", mean, ScalarType::Float, 2 * rows, logits),
          optional_values<float>("grad", grad, ScalarType::Float, rows, logits), logits);
}

}  // namespace r1kernels
