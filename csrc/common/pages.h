// Large buffers on the CPU that are given again to the next caller once they are free.
//
// A fresh buffer is paid in page faults, several times the price of a kernel that fills it; torch's own allocator gives
// large buffers back to the operating system at once. Kept are at most a sixteenth of the machine's memory, or 512 MiB.
#pragma once

#include <cstddef>

namespace r1kernels {

class Pages {
public:
    // Gives what is kept back to the system.
    static void release();

    explicit Pages(size_t bytes);  // throws std::bad_alloc
    ~Pages();
    Pages(const Pages&) = delete;
    Pages& operator=(const Pages&) = delete;

    void* data() const { return data_; }
    size_t size() const { return size_; }

private:
    void* data_;
    size_t size_, capacity_;
};

}  // namespace r1kernels
