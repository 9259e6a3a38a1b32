// Stands in for the CUDA toolkit's header: the part of the language and of the runtime that the kernels use.
#pragma once

#include <math.h>
#include <string.h>

#include <algorithm>
#include <utility>

#include "emulator.h"
#include "tensor_cores.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
// dynamic shared memory is an extern array; on a local variable this attribute does not compile
#define __shared__ __attribute__((section("emulated_shared_memory")))

struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(16) int4 {
    int x, y, z, w;
};
struct alignas(16) float4 {
    float x, y, z, w;
};

using std::max;
using std::min;

#define EMULATED_TEXT(number) #number
#define EMULATED_PLACE(file, line) file ":" EMULATED_TEXT(line)
#define __syncthreads() ::emulator::sync_threads("__syncthreads at " EMULATED_PLACE(__FILE__, __LINE__))

// --- warps ---

inline void __syncwarp(unsigned mask = 0xffffffffu) { emulator::exchange(mask, 0, "__syncwarp"); }

template <class Value>
Value __shfl_sync(unsigned mask, Value value, int source) {
    return emulator::shuffle(mask, value, source % emulator::kWarpSize, "__shfl_sync");
}

template <class Value>
Value __shfl_down_sync(unsigned mask, Value value, unsigned delta) {
    const int source = emulator::lane() + static_cast<int>(delta);
    return emulator::shuffle(mask, value, source < emulator::kWarpSize ? source : emulator::lane(), "__shfl_down_sync");
}

template <class Value>
Value __shfl_up_sync(unsigned mask, Value value, unsigned delta) {
    const int source = emulator::lane() - static_cast<int>(delta);
    return emulator::shuffle(mask, value, source >= 0 ? source : emulator::lane(), "__shfl_up_sync");
}

template <class Value>
Value __shfl_xor_sync(unsigned mask, Value value, int lanes) {
    return emulator::shuffle(mask, value, emulator::lane() ^ lanes, "__shfl_xor_sync");
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
    const emulator::WarpValues& all = emulator::exchange(mask, predicate != 0, "__ballot_sync");
    unsigned ballot = 0;
    for (int lane = 0; lane < emulator::kWarpSize; ++lane) {
        if (mask >> lane & 1u && all[lane]) ballot |= 1u << lane;
    }
    return ballot;
}

// The lanes of `mask` that hold the same value as this one.
template <class Value>
unsigned __match_any_sync(unsigned mask, Value value) {
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof(Value));
    const emulator::WarpValues& all = emulator::exchange(mask, bits, "__match_any_sync");
    unsigned same = 0;
    for (int lane = 0; lane < emulator::kWarpSize; ++lane) {
        if (mask >> lane & 1u && all[lane] == bits) same |= 1u << lane;
    }
    return same;
}

// combine() over the lanes of `mask`; on a GPU these are for integers of 32 bits.
template <class Value, class Combine>
Value emulated_reduce_sync(unsigned mask, Value value, const char* operation, Combine combine) {
    static_assert(sizeof(Value) == 4, "32 bits");
    const emulator::WarpValues& all = emulator::exchange(mask, static_cast<uint32_t>(value), operation);
    for (int lane = 0; lane < emulator::kWarpSize; ++lane) {
        if (mask >> lane & 1u) value = combine(value, static_cast<Value>(static_cast<uint32_t>(all[lane])));
    }
    return value;
}

inline int __reduce_max_sync(unsigned mask, int value) {
    return emulated_reduce_sync(mask, value, "__reduce_max_sync", [](int a, int b) { return std::max(a, b); });
}

inline int __reduce_min_sync(unsigned mask, int value) {
    return emulated_reduce_sync(mask, value, "__reduce_min_sync", [](int a, int b) { return std::min(a, b); });
}

inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, !predicate) == 0; }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }

// --- atomics: fibers do not preempt each other ---

template <class Value>
Value atomicExch(Value* address, Value value) {
    const Value old = *address;
    *address = value;
    return old;
}

template <class Value>
Value atomicAdd(Value* address, Value value) {
    return atomicExch(address, static_cast<Value>(*address + value));
}

// Counts up to `last`, behind which comes 0.
inline unsigned atomicInc(unsigned* address, unsigned last) {
    return atomicExch(address, *address >= last ? 0 : *address + 1);
}

template <class Value>
Value atomicMax(Value* address, Value value) {
    return atomicExch(address, std::max(*address, value));
}

template <class Value>
Value atomicMin(Value* address, Value value) {
    return atomicExch(address, std::min(*address, value));
}

template <class Value>
Value atomicCAS(Value* address, Value expected, Value value) {
    return *address == expected ? atomicExch(address, value) : *address;
}

inline void __threadfence() {}
inline void __threadfence_block() {}

// --- runtime ---

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
using cudaStream_t = void*;

struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes = 0;
    cudaStream_t stream = nullptr;
};

inline cudaError_t emulated_last_error = cudaSuccess;

inline cudaError_t cudaGetLastError() { return std::exchange(emulated_last_error, cudaSuccess); }

// What a host has asked the device for.
inline int emulated_launches = 0, emulated_memsets = 0;

inline cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t) {
    ++emulated_memsets;
    memset(memory, value, bytes);
    return cudaSuccess;
}

enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };
inline cudaStreamCaptureStatus emulated_capture = cudaStreamCaptureStatusNone;

inline cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
    *status = emulated_capture;
    return cudaSuccess;
}

inline cudaError_t cudaStreamGetId(cudaStream_t stream, unsigned long long* id) {
    *id = reinterpret_cast<uintptr_t>(stream);
    return cudaSuccess;
}

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };

template <class... Parameters>
cudaError_t cudaFuncSetAttribute(void (*)(Parameters...), cudaFuncAttribute, int) {
    return cudaSuccess;
}

inline const char* cudaGetErrorString(cudaError_t error) {
    switch (error) {
        case cudaSuccess: return "no error";
        case cudaErrorInvalidValue: return "invalid argument";
        default: return "invalid configuration argument";
    }
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments... arguments) {
    const dim3 block = config->blockDim;
    if (size_t{block.x} * block.y * block.z > emulator::kMaxThreads || config->gridDim.x == 0 ||
        config->dynamicSmemBytes > emulator::kMaxSharedBytes) {
        return emulated_last_error = cudaErrorInvalidConfiguration;
    }
    ++emulated_launches;
    dim3 grid = config->gridDim;
    grid.x = std::min(grid.x, emulator::max_blocks);
    emulator::run_grid(grid, block, config->dynamicSmemBytes, [=] { kernel(arguments...); });
    return cudaSuccess;
}
