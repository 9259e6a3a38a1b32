// Checks of the tensors that the MoE ops of all devices are called with.
#pragma once

#include <initializer_list>

#include "common/stable.h"
#include "moe/element.h"

namespace r1kernels {

inline Element element_of(const char* name, const Tensor& tensor) {
    switch (tensor.scalar_type()) {
        case ScalarType::Float: return Element::float32;
        case ScalarType::BFloat16: return Element::bfloat16;
        case ScalarType::Half: return Element::float16;
        default: STD_TORCH_CHECK(false, name, ": expected float32, bfloat16 or float16");
    }
    return Element::float32;
}

// A contiguous tensor of these sizes.
inline void check(const char* name, const Tensor& tensor, ScalarType dtype, std::initializer_list<int64_t> sizes) {
    STD_TORCH_CHECK(tensor.scalar_type() == dtype, name, ": wrong dtype");
    STD_TORCH_CHECK(tensor.is_contiguous(), name, ": expected a contiguous tensor");
    STD_TORCH_CHECK(tensor.dim() == static_cast<int64_t>(sizes.size()), name, ": wrong number of dimensions");
    int64_t dim = 0;
    for (int64_t size : sizes) {
        STD_TORCH_CHECK(tensor.size(dim) == size, name, ": expected size ", size, " at dimension ", dim, ", got ",
                        tensor.size(dim));
        ++dim;
    }
}

template <typename T>
T* data_of(const Tensor& tensor) { return static_cast<T*>(tensor.data_ptr()); }

}  // namespace r1kernels
