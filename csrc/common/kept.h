// Tensors on the CPU whose memory is kept for the next one once they are free.
#pragma once

#include <dlfcn.h>

#include <memory>

#include "common/pages.h"
#include "common/stable.h"

namespace r1kernels {

constexpr int64_t kLargeBytes = 1 << 20;  // malloc keeps smaller ones itself

// torch's function that takes the memory of others and how to free it: of 2.11 and later, null before.
typedef AOTITorchError (*FromBlob)(void* data, int64_t dimensions, const int64_t* sizes, const int64_t* strides,
                                   int64_t offset, int32_t dtype, int32_t device_type, int32_t device,
                                   AtenTensorHandle* result, int32_t layout, const uint8_t* metadata,
                                   int64_t metadata_bytes, void (*deleter)(void* data, void* context), void* context);

inline FromBlob from_blob() {
    static const FromBlob found = reinterpret_cast<FromBlob>(dlsym(RTLD_DEFAULT, "torch_from_blob"));
    return found;
}

// An uninitialised contiguous tensor on the CPU, like empty_on's; see common/pages.h.
inline Tensor kept_on(const Tensor& like, Shape shape, ScalarType dtype) {
    int64_t bytes = static_cast<int64_t>(aoti_torch_dtype_element_size(number_of(dtype)));
    for (int64_t size : shape) bytes *= size;
    if (bytes < kLargeBytes || !from_blob()) return empty_on(like, shape, dtype);
    auto pages = std::make_unique<Pages>(bytes);
    AtenTensorHandle result = nullptr;
    TORCH_ERROR_CODE_CHECK(from_blob()(
        pages->data(), static_cast<int64_t>(shape.size()), shape.data(), Strides(shape).values, 0, number_of(dtype),
        aoti_torch_device_type_cpu(), like.get_device_index(), &result, aoti_torch_layout_strided(), nullptr, 0,
        [](void*, void* context) { delete static_cast<Pages*>(context); }, pages.get()));
    (void)pages.release();  // the tensor's now
    return Tensor(result);
}

}  // namespace r1kernels
