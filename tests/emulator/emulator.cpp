// The scheduler of the emulator: blocks one after another, the threads of a block as fibers that run until they wait.
// A fiber starts by setcontext and is left and resumed by longjmp: swapcontext would call the kernel each time. When its
// thread is done it waits for one of the next block.
#undef _FORTIFY_SOURCE  // which takes a jump to another stack for a mistake

#include <setjmp.h>
#include <ucontext.h>

#include <exception>
#include <list>
#include <map>
#include <memory>
#include <numeric>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "cuda_runtime.h"

namespace r1kernels {
// the name that every kernel gives its dynamic shared memory
__shared__ __align__(16) unsigned char shared_memory[emulator::kMaxSharedBytes + 256];
}  // namespace r1kernels

namespace emulator {
namespace {

constexpr size_t kStackBytes = 128 * 1024;
constexpr unsigned char kPoison = 0xFF, kCanary = 0xA5;

using r1kernels::shared_memory;

struct Copy {
    void* to;
    const void* from;
    int bytes, group;

    void run() const {
        std::memset(to, 0, 16);
        std::memcpy(to, from, bytes);
    }
};

struct Fiber {
    enum State { kReady, kAtBarrier, kAtWarp, kWaiting, kDone };
    std::unique_ptr<char[]> stack;
    bool started = false;
    jmp_buf here;  // where it waits
    uint3 index;
    int warp, lane;
    State state;
    const char* waits_for;  // a barrier's place in the source, or a warp operation
    std::function<bool()> ready;  // what a waiting thread waits for
    std::vector<Copy> copies;  // that have not been waited for
    int groups;  // of copies, closed ones
};

Fiber all_fibers[kMaxThreads];  // of thread 0, 1, ... of any block

// Where lanes of one mask hand each other a value.
struct Meeting {
    uint32_t mask, arrived = 0;
    const char* operation = nullptr;
    WarpValues arriving = {}, result = {};
};

// The same text may lie in two places.
bool same(const char* one, const char* other) { return one == other || std::strcmp(one, other) == 0; }

class Block {
public:
    Block(dim3 size, const std::function<void()>& kernel)
        : kernel_(kernel), fibers_(all_fibers, size.x * size.y * size.z) {
        for (unsigned i = 0; i < fibers_.size(); ++i) {
            Fiber& fiber = fibers_[i];
            fiber.index = uint3(i % size.x, i / size.x % size.y, i / (size.x * size.y));
            fiber.warp = i / kWarpSize;
            fiber.lane = i % kWarpSize;
            fiber.state = Fiber::kReady;
            fiber.copies.clear();
            fiber.groups = 0;
        }
    }
    ~Block() {  // after an error fibers stand in the middle of the kernel
        for (Fiber& fiber : fibers_) fiber.started &= fiber.state == Fiber::kDone;
    }

    void run(Random& random);
    void wait(Fiber::State state, const char* reason);
    // Ends the grid with an error, from inside a thread that cannot throw.
    void stop(const std::string& message) {
        error_ = std::make_exception_ptr(EmulatorError(message));
        wait(Fiber::kWaiting, "");
    }

    Fiber& running() { return *running_; }

    Meeting& meeting(uint32_t mask) {
        std::list<Meeting>& of_warp = meetings_[running_->warp];
        for (Meeting& meeting : of_warp) {
            if (meeting.mask == mask) return meeting;
        }
        of_warp.push_back({mask});
        return of_warp.back();
    }

    // Of `mask`, the lanes that the warp of the running thread has.
    uint32_t present(uint32_t mask) const {
        const size_t lanes = fibers_.size() - size_t{kWarpSize} * running_->warp;
        return lanes >= kWarpSize ? mask : mask & ((1u << lanes) - 1);
    }

    void wake_warp(uint32_t lanes) {
        for (int lane = 0; lane < kWarpSize; ++lane) {
            if (lanes >> lane & 1u) fibers_[running_->warp * kWarpSize + lane].state = Fiber::kReady;
        }
    }

private:
    static void enter();
    static void start(Fiber& fiber);
    void resume(Fiber& fiber);
    bool wake_waiting(Random& random);
    void release_barrier();
    std::string where_threads_are() const;

    const std::function<void()>& kernel_;
    const std::span<Fiber> fibers_;
    std::list<Meeting> meetings_[kMaxThreads / kWarpSize];
    jmp_buf scheduler_;
    Fiber* running_ = nullptr;
    std::exception_ptr error_;
};

uint64_t current_seed = 0;
Block* current_block = nullptr;
Random copy_order;

void Block::enter() {
    for (;;) {
        try {
            current_block->kernel_();
        } catch (...) {
            current_block->error_ = std::current_exception();
        }
        current_block->wait(Fiber::kDone, "");
    }
}

void Block::start(Fiber& fiber) {
    if (!fiber.stack) fiber.stack = std::make_unique_for_overwrite<char[]>(kStackBytes);
    fiber.started = true;
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = fiber.stack.get();
    context.uc_stack.ss_size = kStackBytes;
    makecontext(&context, &Block::enter, 0);
    setcontext(&context);
}

void Block::resume(Fiber& fiber) {
    running_ = &fiber;
    threadIdx = fiber.index;
    if (_setjmp(scheduler_) == 0) {
        if (fiber.started) _longjmp(fiber.here, 1);
        start(fiber);
    }
    if (error_) std::rethrow_exception(error_);
}

void Block::wait(Fiber::State state, const char* reason) {
    Fiber& fiber = *running_;
    fiber.state = state;
    fiber.waits_for = reason;
    if (_setjmp(fiber.here) == 0) _longjmp(scheduler_, 1);
}

// A warp runs until all its lanes wait for other warps: the farther warps drift apart, the more a missing barrier shows.
void Block::run(Random& random) {
    const size_t threads = fibers_.size();
    std::vector<size_t> warps((threads + kWarpSize - 1) / kWarpSize), lanes(kWarpSize);
    std::iota(warps.begin(), warps.end(), 0);
    std::iota(lanes.begin(), lanes.end(), 0);
    const auto ready = [](const Fiber& fiber) { return fiber.state == Fiber::kReady; };
    const auto done = [](const Fiber& fiber) { return fiber.state == Fiber::kDone; };
    for (;;) {
        std::shuffle(warps.begin(), warps.end(), random);
        for (const size_t warp : warps) {
            const auto first = fibers_.begin() + warp * kWarpSize;
            const auto last = fibers_.begin() + std::min((warp + 1) * kWarpSize, threads);
            while (std::any_of(first, last, ready)) {
                std::shuffle(lanes.begin(), lanes.end(), random);
                for (const size_t lane : lanes) {
                    if (first + lane < last && ready(first[lane])) resume(first[lane]);
                }
            }
        }
        if (std::all_of(fibers_.begin(), fibers_.end(), done)) return;
        if (!wake_waiting(random)) release_barrier();
    }
}

// Some of the threads for which what they wait for has come, at least one of them.
bool Block::wake_waiting(Random& random) {
    std::vector<Fiber*> ready;
    for (Fiber& fiber : fibers_) {
        if (fiber.state == Fiber::kWaiting && fiber.ready()) ready.push_back(&fiber);
    }
    std::shuffle(ready.begin(), ready.end(), random);
    const size_t count = ready.empty() ? 0 : 1 + random() % ready.size();
    for (size_t i = 0; i < count; ++i) ready[i]->state = Fiber::kReady;
    return count > 0;
}

// No one can run: either all threads wait at the same barrier, or some wait for what never comes.
void Block::release_barrier() {
    for (const Fiber& fiber : fibers_) {
        if (fiber.state != Fiber::kAtBarrier || !same(fiber.waits_for, fibers_[0].waits_for)) {
            throw EmulatorError("divergence: " + where_threads_are());
        }
    }
    for (Fiber& fiber : fibers_) fiber.state = Fiber::kReady;
}

std::string Block::where_threads_are() const {
    std::map<std::string, int> counts;
    for (const Fiber& fiber : fibers_) {
        ++counts[fiber.state == Fiber::kDone ? "exited" : "at " + std::string(fiber.waits_for)];
    }
    std::string text;
    for (const auto& [place, count] : counts) {
        text += (text.empty() ? "" : ", ") + std::to_string(count) + " threads " + place;
    }
    return text;
}

void check_shared_memory(size_t shared_bytes) {
    const unsigned char* const behind = shared_memory + shared_bytes;
    const size_t size = sizeof(shared_memory) - shared_bytes;
    if (behind[0] == kCanary && std::memcmp(behind, behind + 1, size - 1) == 0) return;
    const auto written = std::find_if(behind, behind + size, [](unsigned char byte) { return byte != kCanary; });
    throw EmulatorError("write past the end of the shared memory: byte " + std::to_string(written - shared_memory) +
                        " of " + std::to_string(shared_bytes));
}

}  // namespace

void set_seed(uint64_t seed) { current_seed = seed; }

void run_grid(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel) {
    Random random = {current_seed};
    copy_order = {current_seed};
    std::vector<uint64_t> order(uint64_t{grid.x} * grid.y * grid.z);
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), random);

    gridDim = grid;
    blockDim = block;
    std::memset(shared_memory + shared_bytes, kCanary, sizeof(shared_memory) - shared_bytes);
    for (const uint64_t i : order) {
        blockIdx = uint3(i % grid.x, i / grid.x % grid.y, i / (uint64_t{grid.x} * grid.y));
        std::memset(shared_memory, kPoison, shared_bytes);
        Block running(block, kernel);
        current_block = &running;
        running.run(random);
        check_shared_memory(shared_bytes);
    }
}

void sync_threads(const char* place) { current_block->wait(Fiber::kAtBarrier, place); }

int lane() { return current_block->running().lane; }

void wait_until(const char* what, const std::function<bool()>& ready) {
    current_block->running().ready = ready;
    current_block->wait(Fiber::kWaiting, what);
}

const WarpValues& exchange(uint32_t mask, uint64_t value, const char* operation) {
    Block& block = *current_block;
    const uint32_t self = 1u << lane();
    if (!(mask & self)) throw EmulatorError(std::string(operation) + ": a lane that its own mask leaves out");
    Meeting& meeting = block.meeting(mask);
    if (meeting.arrived == 0) meeting.operation = operation;
    if (!same(meeting.operation, operation)) {
        throw EmulatorError("lanes of a warp meet in " + std::string(meeting.operation) + " and in " + operation);
    }
    meeting.arriving[lane()] = value;
    meeting.arrived |= self;
    if (meeting.arrived == block.present(mask)) {
        meeting.result = meeting.arriving;
        meeting.arrived = 0;
        block.wake_warp(block.present(mask));
    } else {
        block.wait(Fiber::kAtWarp, operation);
    }
    return meeting.result;
}

void together(const void* mine, const char* operation, const std::function<void(const LanePointers&)>& act) {
    constexpr uint32_t kAll = 0xffffffffu;
    Block& block = *current_block;
    Meeting& meeting = block.meeting(kAll);
    const bool last = (meeting.arrived | 1u << lane()) == block.present(kAll);
    if (last) {
        LanePointers lanes;
        for (int i = 0; i < kWarpSize; ++i) lanes[i] = reinterpret_cast<const void*>(meeting.arriving[i]);
        lanes[lane()] = mine;
        if (block.present(kAll) != kAll) throw EmulatorError(std::string(operation) + ": a warp without 32 lanes");
        if (same(meeting.operation, operation)) act(lanes);
    }
    exchange(kAll, reinterpret_cast<uint64_t>(mine), operation);
}

void copy_async(void* shared, const void* global, int bytes) {
    if ((reinterpret_cast<uintptr_t>(shared) | (bytes ? reinterpret_cast<uintptr_t>(global) : 0)) % 16 != 0) {
        throw EmulatorError("cp.async: a misaligned address");
    }
    Fiber& fiber = current_block->running();
    const Copy copy = {shared, global, bytes, fiber.groups};
    if (copy_order() % 2) {
        copy.run();
    } else {
        fiber.copies.push_back(copy);
    }
}

void commit_copies() { ++current_block->running().groups; }

void wait_for_copies(int pending) {
    Fiber& fiber = current_block->running();
    auto copy = fiber.copies.begin();
    for (; copy != fiber.copies.end() && copy->group < fiber.groups - pending; ++copy) copy->run();
    fiber.copies.erase(fiber.copies.begin(), copy);
}

// --- tensor cores ---

void load_matrices(uint32_t (&values)[4], const void* row, bool transposed) {
    struct Lane {
        const void* row;
        uint32_t* values;
    } mine = {row, values};
    together(&mine, transposed ? "ldmatrix.trans" : "ldmatrix", [=](const LanePointers& lanes) {
        uint16_t matrices[4][8][8];
        for (int i = 0; i < kWarpSize; ++i) {
            const void* from = static_cast<const Lane*>(lanes[i])->row;
            if (reinterpret_cast<uintptr_t>(from) % 16 != 0) throw EmulatorError("ldmatrix: a misaligned row");
            std::memcpy(matrices[i / 8][i % 8], from, 16);
        }
        for (int i = 0; i < kWarpSize; ++i) {
            for (int matrix = 0; matrix < 4; ++matrix) {
                const int row = i / 4, column = i % 4 * 2;
                const auto& m = matrices[matrix];
                const uint32_t low = transposed ? m[column][row] : m[row][column];
                const uint32_t high = transposed ? m[column + 1][row] : m[row][column + 1];
                static_cast<const Lane*>(lanes[i])->values[matrix] = low | high << 16;
            }
        }
    });
}

namespace {

double wide(__half value) { return __half2float(value); }
double wide(__nv_bfloat16 value) { return __bfloat162float(value); }

// Half `i` of a register.
template <class Scalar>
double half_of(uint32_t word, int i) {
    const uint16_t bits = static_cast<uint16_t>(word >> 16 * i);
    Scalar value;
    std::memcpy(&value, &bits, sizeof(value));
    return wide(value);
}

}  // namespace

template <class Scalar>
void multiply_add(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    struct Lane {
        float* sums;
        const uint32_t *a, *b;
    } mine = {sums, a, b};
    together(&mine, "mma.m16n8k16", [](const LanePointers& lanes) {
        double left[16][16], right[16][8], total[16][8];
        for (int i = 0; i < kWarpSize; ++i) {
            const auto& lane = *static_cast<const Lane*>(lanes[i]);
            for (int half = 0; half < 2; ++half) {
                for (int word = 0; word < 4; ++word) {
                    left[i / 4 + word % 2 * 8][i % 4 * 2 + word / 2 * 8 + half] = half_of<Scalar>(lane.a[word], half);
                }
                for (int word = 0; word < 2; ++word) {
                    right[i % 4 * 2 + word * 8 + half][i / 4] = half_of<Scalar>(lane.b[word], half);
                }
            }
            for (int word = 0; word < 4; ++word) total[i / 4 + word / 2 * 8][i % 4 * 2 + word % 2] = lane.sums[word];
        }
        for (int row = 0; row < 16; ++row) {
            for (int k = 0; k < 16; ++k) {
                for (int column = 0; column < 8; ++column) total[row][column] += left[row][k] * right[k][column];
            }
        }
        for (int i = 0; i < kWarpSize; ++i) {
            float* sums = static_cast<const Lane*>(lanes[i])->sums;
            for (int word = 0; word < 4; ++word) {
                sums[word] = static_cast<float>(total[i / 4 + word / 2 * 8][i % 4 * 2 + word % 2]);
            }
        }
    });
}

void add_product(float (&sums)[16][256], const float (&a)[64][16], const float (&b)[64][256]) {
    for (int row = 0; row < 16; ++row) {
        float* __restrict to = sums[row];
        for (int k = 0; k < 64; ++k) {
            const float factor = a[k][row];
            for (int column = 0; column < 256; ++column) to[column] += factor * b[k][column];
        }
    }
}

template void multiply_add<__half>(float (&)[4], const uint32_t (&)[4], const uint32_t (&)[2]);
template void multiply_add<__nv_bfloat16>(float (&)[4], const uint32_t (&)[4], const uint32_t (&)[2]);

}  // namespace emulator

// What -fsanitize=alignment calls before a misaligned access: a GPU stops there, most CPUs do not. The thread ends here.
extern "C" void __ubsan_handle_type_mismatch_v1(void* place, void*) {
    struct {
        const char* file;
        uint32_t line;
    } source;
    std::memcpy(&source, place, sizeof(source));
    emulator::current_block->stop("misaligned access at " + std::string(source.file) + ":" + std::to_string(source.line));
}
