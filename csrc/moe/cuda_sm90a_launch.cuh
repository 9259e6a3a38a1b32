// What the launchers of the Hopper kernels share: the device, and descriptors for the copy engine.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include "common/launch.cuh"
#include "moe/hopper_plan.h"

namespace r1kernels::moe::hopper {

struct Device {
    bool is_hopper = false;
    int processors = 0;
};

// The current device, whose context is this thread's from here on: a thread of autograd may begin without one, and
// encode_tiled() is the driver's. A failed question counts as a device that is no Hopper.
inline Device current_device() {
    Device found;
    int device = 0, major = 0, minor = 0, shared = 0;
    if (cudaGetDevice(&device) != cudaSuccess || cudaSetDevice(device) != cudaSuccess) return found;
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    cudaDeviceGetAttribute(&found.processors, cudaDevAttrMultiProcessorCount, device);
    found.is_hopper = major == 9 && minor == 0 && shared >= kSharedBytes && found.processors > 0;
    return found;
}

using EncodeTiled = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                                 const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                                 CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// From the driver that is loaded: nothing here is linked with it. Null where it is older than CUDA 12.
inline EncodeTiled encode_tiled() {
    static const EncodeTiled function = [] {
        void* entry = nullptr;
        cudaDriverEntryPointQueryResult result;
        const cudaError_t code =
            cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &result);
        const bool found = code == cudaSuccess && result == cudaDriverEntryPointSuccess;
        return found ? reinterpret_cast<EncodeTiled>(entry) : nullptr;
    }();
    return function;
}

// Whether the kernels run here and take a product. A driver that is too old could not describe its operands.
template <class Product>
bool serves(const Product& product) {
    return takes(product) && current_device().is_hopper && encode_tiled() != nullptr;
}

inline cudaError_t encode(const Boxes& boxes, Element element, CUtensorMap* map) {
    const CUtensorMapDataType type =
        element == Element::float16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    const cuuint64_t dims[3] = {boxes.dims[0], boxes.dims[1], boxes.dims[2]};
    const cuuint64_t strides[2] = {boxes.strides[0], boxes.strides[1]};
    const cuuint32_t steps[3] = {1, 1, 1};
    const CUresult result =
        encode_tiled()(map, type, 3, const_cast<void*>(boxes.data), dims, strides, boxes.box, steps,
                       CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                       CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace r1kernels::moe::hopper
