// Sharing work out to torch's threads where items cost unequal time.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <new>

#include "common/stable.h"

namespace r1kernels {

constexpr int64_t kWorkOfThread = 1 << 18;  // multiply-adds; less is not worth a thread of its own

// Memory at a multiple of 64 bytes: a vector or a row of a tile that crosses a cache line costs twice.
struct FreeAligned {
    void operator()(char* memory) const { ::operator delete[](memory, std::align_val_t(64)); }
};
typedef std::unique_ptr<char[], FreeAligned> AlignedBytes;
inline AlignedBytes aligned_bytes(int64_t bytes) { return AlignedBytes(new (std::align_val_t(64)) char[bytes]); }

// Scratch that each thread keeps between calls.
inline void* thread_workspace(int64_t bytes) {
    thread_local AlignedBytes memory;
    thread_local int64_t size = 0;
    if (size < bytes) {
        memory = aligned_bytes(bytes);
        size = bytes;
    }
    return memory.get();
}

// Calls run(item, workspace) for the items [0, count), each thread taking the next one when it is free.
template <typename Run>
void share(int64_t count, int64_t work, int64_t workspace_bytes, const Run& run) {
    const int64_t threads =
        std::min({count, work / kWorkOfThread + 1, static_cast<int64_t>(torch::stable::get_num_threads())});
    std::atomic<int64_t> next = 0;
    torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
        void* workspace = thread_workspace(workspace_bytes);
        for (int64_t thread = begin; thread < end; ++thread) {
            for (int64_t item = next++; item < count; item = next++) run(item, workspace);
        }
    });
}

}  // namespace r1kernels
