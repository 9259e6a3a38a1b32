// Reductions over the threads of a block.
#pragma once

#include <cuda_runtime.h>

#include <cstring>

#include "common/warp.cuh"

namespace r1kernels {

// The dynamic shared memory of the block; its size is an argument of the launch.
extern __shared__ __align__(16) unsigned char shared_memory[];

// `value` of the lane `offset` above this one (this lane's own where there is none), for any trivial struct of words.
template <class Value>
__device__ inline Value shuffle_down(const Value& value, int offset) {
    static_assert(sizeof(Value) % sizeof(int) == 0, "a value is moved word by word");
    int words[sizeof(Value) / sizeof(int)];
    memcpy(words, &value, sizeof(Value));
#pragma unroll
    for (int& word : words) word = __shfl_down_sync(kWholeWarp, word, offset);
    Value result;
    memcpy(&result, words, sizeof(Value));
    return result;
}

// The bytes of shared memory that block_reduce needs.
template <class Value>
constexpr size_t block_reduce_bytes(int threads) {
    return threads / kWarpSize * sizeof(Value);
}

// merge() over the values of all threads, the same bits in every thread: inside warps first, as a tree, then over the
// warps in order. Every thread of the block calls it; blockDim.x is a multiple of the warp size.
template <class Value, class Merge>
__device__ inline Value block_reduce(Value value, Merge merge) {
    for (int offset = kWarpSize / 2; offset > 0; offset /= 2) value = merge(value, shuffle_down(value, offset));

    Value* of_warp = reinterpret_cast<Value*>(shared_memory);
    __syncthreads();  // whoever used the shared memory before has read it
    if (threadIdx.x % kWarpSize == 0) of_warp[threadIdx.x / kWarpSize] = value;
    __syncthreads();
    value = of_warp[0];
    for (unsigned warp = 1; warp < blockDim.x / kWarpSize; ++warp) value = merge(value, of_warp[warp]);
    return value;
}

}  // namespace r1kernels
