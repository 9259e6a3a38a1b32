// The CUDA launchers of token_logprobs under the emulator, for pytest. Addresses come as integers (Tensor.data_ptr()).
#include <pybind11/pybind11.h>

#include "logprob/cuda_sm80.cu"

namespace {

struct Call : R1kernelsTokenLogprobs {
    Call(uintptr_t logits, int dtype, int64_t batch, int64_t tokens, int64_t vocabulary, int64_t batch_stride,
         int64_t token_stride, uintptr_t targets, uintptr_t temperatures, float temperature, int64_t ignore_index)
        : R1kernelsTokenLogprobs{reinterpret_cast<const void*>(logits),
                                 dtype,
                                 batch,
                                 tokens,
                                 vocabulary,
                                 batch_stride,
                                 token_stride,
                                 reinterpret_cast<const int64_t*>(targets),
                                 reinterpret_cast<const float*>(temperatures),
                                 temperature,
                                 ignore_index} {}
};

float* floats(uintptr_t address) { return reinterpret_cast<float*>(address); }

int forward(const Call& call, uintptr_t logp, uintptr_t entropy, uintptr_t stats) {
    return r1kernels_token_logprobs_cuda(&call, floats(logp), floats(entropy), floats(stats), nullptr);
}

int backward(const Call& call, uintptr_t logp, uintptr_t stats, uintptr_t grad_logp, uintptr_t grad_entropy,
             uintptr_t grad_logits, int64_t batch_stride, int64_t token_stride) {
    return r1kernels_token_logprobs_cuda_backward(&call, floats(logp), floats(stats), floats(grad_logp),
                                                  floats(grad_entropy), reinterpret_cast<void*>(grad_logits),
                                                  batch_stride, token_stride, nullptr);
}

// Fewer blocks than rows, as past 2^31 rows.
int forward_in_blocks(const Call& call, int64_t blocks, uintptr_t logp, uintptr_t entropy, uintptr_t stats) {
    return launch(forward_kernel<float>, blocks, kThreads, block_reduce_bytes<SoftmaxState>(kThreads), nullptr, call,
                  floats(logp), floats(entropy), floats(stats));
}

int backward_in_blocks(const Call& call, int64_t blocks, uintptr_t logp, uintptr_t stats, uintptr_t grad_logp,
                       uintptr_t grad_entropy, uintptr_t grad_logits) {
    return launch(backward_kernel<float>, blocks, kThreads, 0, nullptr, call, floats(logp), floats(stats),
                  floats(grad_logp), floats(grad_entropy), reinterpret_cast<void*>(grad_logits), call.batch_stride,
                  call.token_stride);
}

float round_trip_half(float value) { return __half2float(__float2half_rn(value)); }
float round_trip_bfloat16(float value) { return __bfloat162float(__float2bfloat16_rn(value)); }

}  // namespace

PYBIND11_MODULE(token_logprobs, m) {
    pybind11::class_<Call>(m, "Call")
        .def(pybind11::init<uintptr_t, int, int64_t, int64_t, int64_t, int64_t, int64_t, uintptr_t, uintptr_t, float,
                            int64_t>());
    m.def("set_seed", &emulator::set_seed);
    m.def("forward", &forward);
    m.def("backward", &backward);
    m.def("forward_in_blocks", &forward_in_blocks);
    m.def("backward_in_blocks", &backward_in_blocks);
    m.def("error_text", &r1kernels_cuda_error);
    m.def("round_trip_half", &round_trip_half);
    m.def("round_trip_bfloat16", &round_trip_bfloat16);
}
