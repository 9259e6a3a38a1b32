// The text of CUDA's error codes, for hosts that include no CUDA header.
#include <cuda_runtime.h>

extern "C" const char* r1kernels_cuda_error(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }
