// What the torch ops of all families share, on top of torch's stable ABI.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

// Absent from a CPU build of torch: null there.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace r1kernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kGrain = 65536;  // elements; less work than this is not worth a second thread

// torch's current stream on a device, a cudaStream_t.
inline void* current_stream(int32_t device) {
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "this torch was built without CUDA");
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
    return stream;
}

// An uninitialised contiguous tensor on the device of `like`.
inline Tensor empty_on(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef shape, ScalarType dtype) {
    return torch::stable::new_empty(like, shape, dtype);
}

}  // namespace r1kernels
