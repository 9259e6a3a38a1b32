// The CUDA launchers of the row ops, of divergences and of kept rows of the head under the emulator, for pytest. Addresses come as integers (Tensor.data_ptr()).
#include <nanobind/nanobind.h>

#include <stdexcept>
#include <vector>

#include "common/cuda_sm80_error.cu"
#include "logprob/cuda_sm80_backward.cu"
#include "logprob/cuda_sm80_completions.cu"
#include "logprob/cuda_sm80_divergence.cu"
#include "logprob/cuda_sm80_forward.cu"
#include "logprob/cuda_sm80_kept.cu"

namespace nb = nanobind;

namespace {

float* floats(uintptr_t address) { return reinterpret_cast<float*>(address); }

struct Call : R1kernelsTokenLogprobs {
    Call(uintptr_t logits, int element, int64_t batch, int64_t tokens, int64_t vocabulary, int64_t batch_stride,
         int64_t token_stride, uintptr_t targets, uintptr_t temperatures, float temperature, int64_t ignore_index,
         uintptr_t bias, float logit_scale, float softcap, int64_t first, int64_t whole)
        : R1kernelsTokenLogprobs{reinterpret_cast<const void*>(logits),
                                 static_cast<r1kernels::Element>(element),
                                 batch,
                                 tokens,
                                 vocabulary,
                                 batch_stride,
                                 token_stride,
                                 reinterpret_cast<const int64_t*>(targets),
                                 floats(temperatures),
                                 temperature,
                                 ignore_index,
                                 floats(bias),
                                 logit_scale,
                                 softcap,
                                 first,
                                 whole} {}
};

int forward(const Call& call, bool with_entropy, uintptr_t logp, uintptr_t entropy, uintptr_t stats, uintptr_t extra) {
    const R1kernelsLogprobOutputs to = {floats(logp), floats(entropy), floats(stats), floats(extra), with_entropy};
    const int64_t size = r1kernels_token_logprobs_cuda_workspace(&call, &to);
    constexpr float canary = 12345.0f;
    std::vector<float> workspace(size + 64, NAN);
    std::fill(workspace.begin() + size, workspace.end(), canary);
    const int code = r1kernels_token_logprobs_cuda(&call, &to, workspace.data(), nullptr);
    for (auto past = workspace.begin() + size; past != workspace.end(); ++past) {
        if (*past != canary) throw std::runtime_error("write past the end of the workspace");
    }
    return code;
}

int backward(const Call& call, uintptr_t logp, uintptr_t stats, uintptr_t grad_logp, uintptr_t grad_entropy,
             uintptr_t sequences, uintptr_t grad_logits, int grad_element, int64_t batch_stride, int64_t token_stride) {
    const R1kernelsLogprobGradients from = {floats(logp), floats(stats), floats(grad_logp), floats(grad_entropy),
                                            reinterpret_cast<const int32_t*>(sequences)};
    return r1kernels_token_logprobs_cuda_backward(&call, &from, reinterpret_cast<void*>(grad_logits),
                                                  static_cast<r1kernels::Element>(grad_element), batch_stride,
                                                  token_stride, nullptr);
}

int completion_sums(uintptr_t values, int64_t tokens, uintptr_t cu_seqlens, int64_t completions, uintptr_t sums) {
    return r1kernels_completion_sums_cuda(floats(values), tokens, reinterpret_cast<const int64_t*>(cu_seqlens),
                                          completions, floats(sums), nullptr);
}

int completion_numbers(uintptr_t cu_seqlens, int64_t completions, int64_t tokens, uintptr_t numbers) {
    return r1kernels_completion_numbers_cuda(reinterpret_cast<const int64_t*>(cu_seqlens), completions, tokens,
                                             reinterpret_cast<int32_t*>(numbers), nullptr);
}

// --- divergences ---

R1kernelsDivergence divergence_call_of(const Call& student, const Call& teacher, uintptr_t stats,
                                       uintptr_t teacher_stats, int kind, float beta) {
    return {student, teacher, floats(stats), floats(teacher_stats), static_cast<R1kernelsDivergenceKind>(kind), beta};
}

int divergence(const R1kernelsDivergence& call, uintptr_t sums) {
    return r1kernels_divergence_cuda(&call, floats(sums), nullptr);
}

int divergence_backward(const R1kernelsDivergence& call, uintptr_t mean, uintptr_t grad, uintptr_t to) {
    return r1kernels_divergence_cuda_backward(&call, floats(mean), floats(grad), floats(to), nullptr);
}

// --- kept rows of the head ---

template <class T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

R1kernelsKeptProducts kept_call_of(uintptr_t hidden, uintptr_t weight, int element, int64_t tokens, int64_t width,
                              int64_t vocabulary, int64_t first, int64_t entries, uintptr_t ids,
                              uintptr_t entry_tokens) {
    R1kernelsKeptProducts call = {};
    call.hidden = at<const void>(hidden), call.weight = at<const void>(weight);
    call.element = static_cast<r1kernels::Element>(element);
    call.tokens = tokens, call.width = width, call.vocabulary = vocabulary, call.first = first;
    call.entries = entries;
    call.ids = at<const int64_t>(ids), call.entry_tokens = at<const int64_t>(entry_tokens);
    return call;
}

int kept_products(R1kernelsKeptProducts call, uintptr_t bias, uintptr_t to) {
    call.bias = at<const float>(bias);
    return r1kernels_kept_products_cuda(&call, at<float>(to), nullptr);
}

int kept_backward(R1kernelsKeptProducts call, uintptr_t offsets, uintptr_t order, uintptr_t grad, uintptr_t for_hidden,
             bool float32, uintptr_t for_weight, uintptr_t for_bias) {
    call.offsets = at<const int64_t>(offsets), call.order = at<const int64_t>(order);
    call.grad = at<const float>(grad);
    return r1kernels_kept_products_cuda_backward(&call, at<void>(for_hidden), float32, at<void>(for_weight),
                                                 at<float>(for_bias), nullptr);
}

float round_trip_half(float value) { return __half2float(__float2half_rn(value)); }
float round_trip_bfloat16(float value) { return __bfloat162float(__float2bfloat16_rn(value)); }

}  // namespace

NB_MODULE(token_logprobs, m) {
    nb::class_<Call>(m, "Call")
        .def(nb::init<uintptr_t, int, int64_t, int64_t, int64_t, int64_t, int64_t, uintptr_t, uintptr_t, float,
                      int64_t, uintptr_t, float, float, int64_t, int64_t>());
    m.def("set_seed", &emulator::set_seed);
    m.def("set_max_blocks", [](unsigned blocks) { emulator::max_blocks = blocks; });
    m.def("forward", &forward);
    m.def("backward", &backward);
    nb::class_<R1kernelsDivergence>(m, "DivergenceCall").def(nb::new_(&divergence_call_of));
    m.def("divergence", &divergence);
    m.def("divergence_backward", &divergence_backward);
    nb::class_<R1kernelsKeptProducts>(m, "KeptCall").def(nb::new_(&kept_call_of));
    m.def("kept_products", &kept_products);
    m.def("kept_backward", &kept_backward);
    m.def("completion_sums", &completion_sums);
    m.def("completion_numbers", &completion_numbers);
    m.def("error_text", &r1kernels_cuda_error);
    m.def("round_trip_half", &round_trip_half);
    m.def("round_trip_bfloat16", &round_trip_bfloat16);
    m.attr("PIECE") = kPiece;
    m.attr("WARP_ROW") = kWarpRow;
}
