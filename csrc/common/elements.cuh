// Elements of tensors as float32, and rows of them in chunks that are loaded and stored at once.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "common/element.h"

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

// Two neighbours, the first in the lower half of the word, each rounded to the nearest even.
template <class Scalar>
__device__ uint32_t pack_pair(float first, float second);
template <>
__device__ inline uint32_t pack_pair<__half>(float first, float second) {
    const __half2 pair = __floats2half2_rn(first, second);
    uint32_t word;
    memcpy(&word, &pair, sizeof(word));
    return word;
}
template <>
__device__ inline uint32_t pack_pair<__nv_bfloat16>(float first, float second) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
    uint32_t word;
    memcpy(&word, &pair, sizeof(word));
    return word;
}

// run(a value of the scalar type that `element` names)
template <class Run>
int with_scalar(Element element, Run run) {
    switch (element) {
        case Element::float32: return run(float{});
        case Element::float16: return run(__half{});
        case Element::bfloat16: return run(__nv_bfloat16{});
        default: return cudaErrorInvalidValue;
    }
}

// The vectors that one instruction moves.
template <int kBytes>
struct VectorOfBytes;
template <>
struct VectorOfBytes<16> {
    using Type = uint4;
};
template <>
struct VectorOfBytes<8> {
    using Type = uint2;
};

// One store; the compiler takes an assignment of a vector that was put together from elements apart again.
__device__ inline void store_vector(uint4* address, uint4 vector) {
#ifdef __CUDA_ARCH__
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(address)), "r"(vector.x),
                 "r"(vector.y), "r"(vector.z), "r"(vector.w)
                 : "memory");
#else
    *address = vector;
#endif
}
__device__ inline void store_vector(uint2* address, uint2 vector) {
#ifdef __CUDA_ARCH__
    asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(address)), "r"(vector.x),
                 "r"(vector.y)
                 : "memory");
#else
    *address = vector;
#endif
}

// Consecutive elements of a row, 16 bytes of them where nothing else is said. They stay packed in words until they are
// asked for: taken apart where they are loaded, every load would be waited for at once.
template <class Scalar, int kCount = 16 / sizeof(Scalar)>
struct Chunk {
    static constexpr int kSize = kCount;
    static constexpr int kBytes = kCount * sizeof(Scalar);
    using Vector = typename VectorOfBytes<kBytes>::Type;

    Vector bits;

    // Element i as float32.
    __device__ float operator[](int i) const {
        constexpr int kPerWord = 4 / sizeof(Scalar);
        uint32_t words[kBytes / 4];
        memcpy(words, &bits, kBytes);
        const uint32_t word = words[i / kPerWord] >> (i % kPerWord * 8 * (4 / kPerWord));
        Scalar element;
        memcpy(&element, &word, sizeof(Scalar));
        return to_float(element);
    }

    __device__ static Chunk of(const Scalar (&elements)[kCount]) {
        Chunk chunk;
        memcpy(&chunk.bits, elements, kBytes);
        return chunk;
    }

    // `address` is a multiple of kBytes.
    __device__ static Chunk load(const Scalar* address) { return {*reinterpret_cast<const Vector*>(address)}; }
    __device__ void store(Scalar* address) const { store_vector(reinterpret_cast<Vector*>(address), bits); }
};

// How many elements an address lies behind the boundary of a chunk.
template <int kCount, class Scalar>
__device__ inline int misalignment(const Scalar* address) {
    return reinterpret_cast<uintptr_t>(address) % (kCount * sizeof(Scalar)) / sizeof(Scalar);
}

// The 16 bytes that begin `elements` elements into two chunks.
template <class Scalar>
__device__ inline Chunk<Scalar> middle_of(const Chunk<Scalar>& low, const Chunk<Scalar>& high, int elements) {
    uint32_t words[8] = {low.bits.x,  low.bits.y,  low.bits.z,  low.bits.w,
                         high.bits.x, high.bits.y, high.bits.z, high.bits.w};
    const int bytes = elements * sizeof(Scalar);
    // in steps with fixed indices: an array with a moving index would lie in local memory
    if (bytes & 8) {
#pragma unroll
        for (int i = 0; i < 6; ++i) words[i] = words[i + 2];
    }
    if (bytes & 4) {
#pragma unroll
        for (int i = 0; i < 5; ++i) words[i] = words[i + 1];
    }
    if (bytes & 2) {
#pragma unroll
        for (int i = 0; i < 4; ++i) words[i] = words[i] >> 16 | words[i + 1] << 16;
    }
    return {uint4{words[0], words[1], words[2], words[3]}};
}

// The elements [first, first + kSize) of a row of `size`; those outside [0, size) are not read, they are `fill`. Which
// elements form a chunk does not depend on where the row lies: an unaligned chunk comes out of two aligned loads (the
// second one hits the cache that the neighbouring thread has filled).
template <class Scalar>
__device__ inline Chunk<Scalar> load_chunk(const Scalar* row, int first, int size,
                                           Scalar fill = from_float<Scalar>(0.0f)) {
    constexpr int kSize = Chunk<Scalar>::kSize;
    const int behind = misalignment<kSize>(row + first);
    const int low = first - behind;
    if (behind == 0 && low >= 0 && low + kSize <= size) return Chunk<Scalar>::load(row + low);
    if (low >= 0 && low + 2 * kSize <= size) {
        return middle_of(Chunk<Scalar>::load(row + low), Chunk<Scalar>::load(row + low + kSize), behind);
    }
    Scalar elements[kSize];
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
        elements[i] = first + i >= 0 && first + i < size ? row[first + i] : fill;
    }
    return Chunk<Scalar>::of(elements);
}

// load_chunk at first, first + stride, ...: all loads are on their way before the first is waited for. `stride` is a
// multiple of kSize.
template <int kCount, class Scalar>
__device__ inline void load_chunks(const Scalar* row, int first, int stride, int size, Scalar fill,
                                   Chunk<Scalar> (&chunks)[kCount]) {
    constexpr int kSize = Chunk<Scalar>::kSize;
    const int behind = misalignment<kSize>(row + first);
    const int low = first - behind, last = low + (kCount - 1) * stride;
    const Scalar* aligned = row + low;
    if (behind == 0 && low >= 0 && last + kSize <= size) {
#pragma unroll
        for (int j = 0; j < kCount; ++j) chunks[j] = Chunk<Scalar>::load(aligned + j * stride);
    } else if (low >= 0 && last + 2 * kSize <= size) {
        Chunk<Scalar> next[kCount];
#pragma unroll
        for (int j = 0; j < kCount; ++j) {
            chunks[j] = Chunk<Scalar>::load(aligned + j * stride);
            next[j] = Chunk<Scalar>::load(aligned + j * stride + kSize);
        }
#pragma unroll
        for (int j = 0; j < kCount; ++j) chunks[j] = middle_of(chunks[j], next[j], behind);
    } else {
#pragma unroll
        for (int j = 0; j < kCount; ++j) chunks[j] = load_chunk(row, first + j * stride, size, fill);
    }
}

// Writes elements [first, first + kSize) of a row; those outside [0, size) are not written. One store where row + first
// is aligned.
template <class Scalar, int kSize>
__device__ inline void store_chunk(Scalar* row, int first, int size, const Scalar (&elements)[kSize]) {
    if (first >= 0 && first + kSize <= size && misalignment<kSize>(row + first) == 0) {
        Chunk<Scalar, kSize>::of(elements).store(row + first);
        return;
    }
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
        if (first + i >= 0 && first + i < size) row[first + i] = elements[i];
    }
}

}  // namespace r1kernels
