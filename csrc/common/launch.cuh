// One way to launch a kernel.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

namespace r1kernels {

inline int64_t divide_up(int64_t count, int64_t by) { return (count + by - 1) / by; }

// Enqueues kernel(arguments...) on a one-dimensional grid and returns the error code of that, not of calls before. A grid
// holds at most 2^31 - 1 blocks: a kernel strides over its rows by gridDim.x. Nothing is launched for no blocks. A block
// gets 48 KB of shared memory unasked; more has to be asked for, on every device again.
template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared_bytes, void* stream,
           const Arguments&... arguments) {
    if (blocks == 0) return cudaSuccess;
    if (shared_bytes > 48 << 10) {
        const cudaError_t code = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                      static_cast<int>(shared_bytes));
        if (code != cudaSuccess) return code;
    }
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(std::min<int64_t>(blocks, INT32_MAX)));
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = static_cast<cudaStream_t>(stream);
    return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}

}  // namespace r1kernels
