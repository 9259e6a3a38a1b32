// The CUDA launchers of kept rows of the head under the emulator, for pytest. Addresses come as integers (Tensor.data_ptr()).
#include <pybind11/pybind11.h>

#include "common/cuda_sm80_error.cu"
#include "logprob/cuda_sm80_kept.cu"

namespace {

template <class T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

R1kernelsKeptProducts call_of(uintptr_t hidden, uintptr_t weight, int element, int64_t tokens, int64_t width,
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

int products(R1kernelsKeptProducts call, uintptr_t bias, uintptr_t to) {
    call.bias = at<const float>(bias);
    return r1kernels_kept_products_cuda(&call, at<float>(to), nullptr);
}

int backward(R1kernelsKeptProducts call, uintptr_t offsets, uintptr_t order, uintptr_t grad, uintptr_t for_hidden,
             bool float32, uintptr_t for_weight, uintptr_t for_bias) {
    call.offsets = at<const int64_t>(offsets), call.order = at<const int64_t>(order);
    call.grad = at<const float>(grad);
    return r1kernels_kept_products_cuda_backward(&call, at<void>(for_hidden), float32, at<void>(for_weight),
                                                 at<float>(for_bias), nullptr);
}

}  // namespace

PYBIND11_MODULE(kept_products, m) {
    pybind11::class_<R1kernelsKeptProducts>(m, "Call").def(pybind11::init(&call_of));
    m.def("set_seed", &emulator::set_seed);
    m.def("set_max_blocks", [](unsigned blocks) { emulator::max_blocks = blocks; });
    m.def("products", &products);
    m.def("backward", &backward);
    m.def("error_text", &r1kernels_cuda_error);
}
