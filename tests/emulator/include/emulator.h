// Runs CUDA kernels on the host, one fiber a thread, so that their source can be tested without a GPU.
//
// Compile a .cu or .cuh with a C++ compiler and this folder first on the include path: the headers beside this one stand
// in for those of the CUDA toolkit. A launch runs at once and returns when the grid has ended.
//
// What it notices: a missing barrier (between barriers warps run one after another, in an order shuffled by the seed, as
// do blocks), a divergent barrier or warp operation (EmulatorError), reads of uninitialised shared memory (poisoned
// with 0xFF before every block: NaN as a float), writes past its end, misaligned accesses, and asynchronous copies that
// no one waits for or that come too early (the seed decides whether a copy happens at once or when it is waited for).
// Tensor cores are those of tensor_cores.h, and of Hopper those of moe/cuda_sm90a_machine.cuh. What it does not cover:
// memory order inside a warp, and static __shared__ variables (a compile error: use the dynamic shared memory).
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
using uint3 = dim3;

// Of the thread that runs now.
inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace emulator {

struct EmulatorError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

constexpr int kWarpSize = 32;
constexpr size_t kMaxThreads = 1024;
constexpr size_t kMaxSharedBytes = 227 * 1024;
using WarpValues = std::array<uint64_t, kWarpSize>;
using LanePointers = std::array<const void*, kWarpSize>;

// A launch gets at most this many blocks, as at the limit of a grid: kernels must stride over the rest.
inline unsigned max_blocks = ~0u;

// SplitMix64: quicker to compile and to seed than what <random> has.
struct Random {
    using result_type = uint64_t;
    uint64_t state = 0;

    static constexpr uint64_t min() { return 0; }
    static constexpr uint64_t max() { return UINT64_MAX; }
    uint64_t operator()() {
        uint64_t z = state += 0x9e3779b97f4a7c15;
        z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
        z = (z ^ z >> 27) * 0x94d049bb133111eb;
        return z ^ z >> 31;
    }
};

void set_seed(uint64_t seed);
void run_grid(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel);

// What a kernel calls.
void sync_threads(const char* place);
// Waits until all lanes of `mask` have come; every lane's value, until the thread waits again.
const WarpValues& exchange(uint32_t mask, uint64_t value, const char* operation);
int lane();
// Waits until `ready`, which is asked when no one else can run; `what`: for the error that says that it never came.
void wait_until(const char* what, const std::function<bool()>& ready);
// Waits until all 32 lanes have come with a pointer of theirs; the last one acts for all, before any goes on.
void together(const void* mine, const char* operation, const std::function<void(const LanePointers&)>& act);

// Asynchronous copies of the running thread: 16 bytes, zeros behind the first `bytes`.
void copy_async(void* shared, const void* global, int bytes);
void commit_copies();
void wait_for_copies(int pending);

template <class Value>
Value shuffle(uint32_t mask, Value value, int source, const char* operation) {
    static_assert(sizeof(Value) <= sizeof(uint64_t), "a shuffle moves at most 8 bytes");
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof(Value));
    const WarpValues& all = exchange(mask, bits, operation);
    std::memcpy(&value, &all[source], sizeof(Value));
    return value;
}

}  // namespace emulator
