// What the torch ops of all families share on CUDA: a device, its stream and memory, and the errors of launchers.
#pragma once

#include "common/stable.h"

// The text of an error code that a launcher returned.
extern "C" const char* r1kernels_cuda_error(int code);

namespace r1kernels {

// The device of `like`, which is current as long as this lives, and torch's stream there.
class CudaHost {
public:
    void* const stream;

    explicit CudaHost(const Tensor& like)
        : stream(current_stream(like.get_device_index())), guard_(like.get_device_index()), like_(like) {}

    Tensor allocate(int64_t bytes) const { return empty_on(like_, {bytes}, ScalarType::Byte); }

    // Throws where a launcher failed.
    void check(int code) const { STD_TORCH_CHECK(code == 0, "CUDA: ", r1kernels_cuda_error(code)); }

private:
    const torch::stable::accelerator::DeviceGuard guard_;
    const Tensor& like_;
};

}  // namespace r1kernels
