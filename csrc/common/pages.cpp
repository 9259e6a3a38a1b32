#include "common/pages.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <mutex>
#include <new>
#include <vector>

#include "common/memory.h"

namespace r1kernels {

namespace {

struct Block {
    void* data;
    size_t bytes;
};

std::mutex mutex;
std::vector<Block> kept;  // free ones, the oldest first
size_t kept_bytes = 0;

constexpr size_t kHugePage = size_t{2} << 20;

// Of free buffers, in all: logits of a large vocabulary that are saved for the backward fit where memory is not short.
size_t most_kept_bytes() {
    static const size_t most = std::max(size_t{512} << 20, static_cast<size_t>(sysconf(_SC_PHYS_PAGES)) *
                                                               static_cast<size_t>(sysconf(_SC_PAGESIZE)) / 16);
    return most;
}

// The smallest kept block of at least `bytes` that is not more than twice as large, or none.
Block take(size_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex);
    auto best = kept.end();
    for (auto block = kept.begin(); block != kept.end(); ++block) {
        const bool fits = block->bytes >= bytes && block->bytes <= 2 * bytes;
        if (fits && (best == kept.end() || block->bytes < best->bytes)) best = block;
    }
    if (best == kept.end()) return {nullptr, 0};
    const Block found = *best;
    kept.erase(best);
    kept_bytes -= found.bytes;
    return found;
}

// The oldest go until at most so many bytes are kept.
void shrink_to(size_t most) {
    while (kept_bytes > most) {
        munmap(kept.front().data, kept.front().bytes);
        kept_bytes -= kept.front().bytes;
        kept.erase(kept.begin());
    }
}

void give_back(Block block) {
    const std::lock_guard<std::mutex> lock(mutex);
    kept.push_back(block);
    kept_bytes += block.bytes;
    shrink_to(most_kept_bytes());
}

}  // namespace

Pages::Pages(size_t bytes) : size_(bytes) {
    capacity_ = (bytes + kHugePage - 1) / kHugePage * kHugePage;
    const Block block = take(capacity_);
    if (block.data) {
        data_ = block.data, capacity_ = block.bytes;
        return;
    }
    data_ = mmap(nullptr, capacity_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (data_ == MAP_FAILED) throw std::bad_alloc();
    want_huge_pages(data_, capacity_);
}

Pages::~Pages() { give_back({data_, capacity_}); }

void Pages::release() {
    const std::lock_guard<std::mutex> lock(mutex);
    shrink_to(0);
}

}  // namespace r1kernels
