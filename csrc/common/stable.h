// What the torch ops of all families share, on top of torch's stable ABI.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#include "common/element.h"

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
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
    return stream;
}

using Shape = torch::headeronly::IntHeaderOnlyArrayRef;

// Strides of a contiguous tensor.
struct Strides {
    static constexpr int64_t kMostDimensions = 8;
    int64_t values[kMostDimensions];

    explicit Strides(Shape shape) {
        const int64_t dimensions = static_cast<int64_t>(shape.size());
        STD_TORCH_CHECK(dimensions <= kMostDimensions, "expected at most 8 dimensions, got ", dimensions);
        int64_t stride = 1;
        for (int64_t i = dimensions - 1; i >= 0; --i) {
            values[i] = stride;
            stride *= shape[i] > 1 ? shape[i] : 1;
        }
    }
};

inline Element element_of(const char* name, const Tensor& tensor) {
    switch (tensor.scalar_type()) {
        case ScalarType::Float: return Element::float32;
        case ScalarType::BFloat16: return Element::bfloat16;
        case ScalarType::Half: return Element::float16;
        default: STD_TORCH_CHECK(false, name, ": expected float32, bfloat16 or float16");
    }
    return Element::float32;
}

inline int32_t number_of(ScalarType dtype) { return torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)); }

// An uninitialised contiguous tensor on the device of `like`. A small batch feels the half microsecond more of new_empty.
inline Tensor empty_on(const Tensor& like, Shape shape, ScalarType dtype) {
    int32_t device = 0;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
    AtenTensorHandle result = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.data(),
                                                    Strides(shape).values, number_of(dtype), device,
                                                    like.get_device_index(), &result));
    return Tensor(result);
}

}  // namespace r1kernels
