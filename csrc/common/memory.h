// What is different for large buffers: how they are written, and advice to the operating system.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace r1kernels {

// A result at least so large is written past the caches: lines that are written whole are then not read first.
constexpr int64_t kStreamedBytes = int64_t{16} << 20;

// Ask for huge pages behind a buffer that is about to be written for the first time: a fresh one is otherwise paid in
// page faults, several times the price of a kernel that fills it. Only advice: contents and failures do not matter.
inline void want_huge_pages(void* data, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr uintptr_t huge = uintptr_t{2} << 20;
    const uintptr_t address = reinterpret_cast<uintptr_t>(data);
    const uintptr_t first = (address + huge - 1) / huge * huge, last = (address + bytes) / huge * huge;
    if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
    (void)data, (void)bytes;
#endif
}

}  // namespace r1kernels
