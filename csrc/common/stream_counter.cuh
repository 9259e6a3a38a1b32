// A counter for each stream, by which the blocks of a grid find out which of them is the last: 0 before every kernel, as
// the last block sets it back, so that no launch has to. Kernels of one stream run one after another.
#pragma once

#include <cuda_runtime.h>

#include <atomic>

namespace r1kernels {

constexpr int kCountedStreams = 64;
constexpr int kNoCounter = -1;

// On every device zeros when the library is loaded there.
static __device__ unsigned stream_counters[kCountedStreams];

// The number of a stream's counter. None for the streams behind the first 64, and none while work is captured for a graph,
// which may run on another stream.
inline int counter_of(void* stream) {
    static std::atomic<unsigned long long> owners[kCountedStreams];  // ids plus 1: those of no other stream, ever
    cudaStreamCaptureStatus capture;
    unsigned long long id = 0;
    const bool known = cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &capture) == cudaSuccess &&
                       capture == cudaStreamCaptureStatusNone &&
                       cudaStreamGetId(static_cast<cudaStream_t>(stream), &id) == cudaSuccess;
    for (int i = 0; known && i < kCountedStreams; ++i) {
        unsigned long long owner = 0;
        if (owners[i].compare_exchange_strong(owner, id + 1) || owner == id + 1) return i;
    }
    return kNoCounter;
}

}  // namespace r1kernels
