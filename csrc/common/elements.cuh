// Elements of tensors as float32, and rows of them in 16-byte chunks.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace r1kernels {

__device__ inline float to_float(float value) { return value; }
__device__ inline float to_float(__half value) { return __half2float(value); }
__device__ inline float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

template <class Scalar>
__device__ Scalar from_float(float value);
template <>
__device__ inline float from_float<float>(float value) { return value; }
template <>
__device__ inline __half from_float<__half>(float value) { return __float2half_rn(value); }
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float value) { return __float2bfloat16_rn(value); }

// 16 bytes of consecutive elements. Which elements form a chunk depends on their index alone, so that a sum over a row
// takes the same order, and gives the same bits, wherever the row lies.
template <class Scalar>
struct alignas(16) Chunk {
    static constexpr int kSize = 16 / sizeof(Scalar);
    Scalar value[kSize];
};

template <class Scalar>
__device__ inline bool is_aligned(const Scalar* row) {
    return reinterpret_cast<uintptr_t>(row) % sizeof(Chunk<Scalar>) == 0;
}

// The chunk of row[0 .. size) that begins at `first`: one 16-byte load where it is aligned and whole. Elements past the
// end are not read; they are 0.
template <class Scalar>
__device__ inline Chunk<Scalar> load_chunk(const Scalar* row, int64_t first, int64_t size) {
    if (is_aligned(row) && first + Chunk<Scalar>::kSize <= size) {
        return *reinterpret_cast<const Chunk<Scalar>*>(row + first);
    }
    Chunk<Scalar> chunk = {};
#pragma unroll
    for (int i = 0; i < Chunk<Scalar>::kSize; ++i) {
        if (first + i < size) chunk.value[i] = row[first + i];
    }
    return chunk;
}

template <class Scalar>
__device__ inline void store_chunk(Scalar* row, int64_t first, int64_t size, const Chunk<Scalar>& chunk) {
    if (is_aligned(row) && first + Chunk<Scalar>::kSize <= size) {
        *reinterpret_cast<Chunk<Scalar>*>(row + first) = chunk;
        return;
    }
#pragma unroll
    for (int i = 0; i < Chunk<Scalar>::kSize; ++i) {
        if (first + i < size) row[first + i] = chunk.value[i];
    }
}

}  // namespace r1kernels
