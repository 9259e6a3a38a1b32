// Whether a device can run what was built here: a question to its driver, which may know no binary for the device among
// those that were built, or be older than the CUDA runtime that is linked.
#include <cuda_runtime.h>

namespace r1kernels {

__global__ void probe_kernel() {}

}  // namespace r1kernels

// An error code; 0: it can. The current device stays.
extern "C" int r1kernels_cuda_probe(int device) {
    int current = 0;
    if (const cudaError_t code = cudaGetDevice(&current); code != cudaSuccess) return code;
    if (const cudaError_t code = cudaSetDevice(device); code != cudaSuccess) return code;
    cudaFuncAttributes attributes;
    const cudaError_t found = cudaFuncGetAttributes(&attributes, r1kernels::probe_kernel);
    const cudaError_t back = cudaSetDevice(current);
    return found != cudaSuccess ? found : back;
}
