// The scheduler of the emulator: blocks one after another, the threads of a block as fibers that run until they wait.
// A fiber starts by setcontext and is left and resumed by longjmp: swapcontext would call the kernel each time.
#undef _FORTIFY_SOURCE  // which takes a jump to another stack for a mistake

#include <setjmp.h>
#include <ucontext.h>

#include <exception>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

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
    int bytes;

    void run() const {
        std::memset(to, 0, 16);
        std::memcpy(to, from, bytes);
    }
};

struct Fiber {
    enum State { kReady, kAtBarrier, kAtWarp, kWaiting, kDone };
    ucontext_t start;
    jmp_buf here;  // where it waits
    uint3 index;
    int warp, lane;
    State state;
    bool started = false;
    std::string_view waits_for;  // a barrier's place in the source, or a warp operation
    std::function<bool()> ready;  // what a waiting thread waits for
    std::vector<std::vector<Copy>> copies = {{}};  // by group; the last one is still open
};

// Where lanes of one mask hand each other a value.
struct Meeting {
    WarpValues arriving, result;
    uint32_t arrived = 0;
    std::string_view operation;
};

class Block {
public:
    Block(dim3 size, const std::function<void()>& kernel, char* stacks) : kernel_(kernel) {
        const int threads = size.x * size.y * size.z;
        fibers_.resize(threads);
        for (int i = 0; i < threads; ++i) {
            Fiber& fiber = fibers_[i];
            fiber.index = uint3(i % size.x, i / size.x % size.y, i / (size.x * size.y));
            fiber.warp = i / kWarpSize;
            fiber.lane = i % kWarpSize;
            fiber.state = Fiber::kReady;
            getcontext(&fiber.start);
            fiber.start.uc_stack.ss_sp = stacks + i * kStackBytes;
            fiber.start.uc_stack.ss_size = kStackBytes;
            makecontext(&fiber.start, &Block::enter, 0);
        }
    }

    void run(std::mt19937_64& random);
    void wait(Fiber::State state, std::string_view reason);
    // Ends the grid with an error, from inside a thread that cannot throw.
    void stop(const std::string& message) {
        error_ = std::make_exception_ptr(EmulatorError(message));
        wait(Fiber::kDone, "");
    }

    Meeting& meeting(uint32_t mask) { return meetings_[{running_->warp, mask}]; }
    Fiber& running() { return *running_; }

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
    void resume(Fiber& fiber);
    bool wake_waiting(std::mt19937_64& random);
    void release_barrier();
    std::string where_threads_are() const;

    const std::function<void()>& kernel_;
    std::vector<Fiber> fibers_;
    std::map<std::pair<int, uint32_t>, Meeting> meetings_;
    jmp_buf scheduler_;
    Fiber* running_ = nullptr;
    std::exception_ptr error_;
};

uint64_t current_seed = 0;
Block* current_block = nullptr;
std::mt19937_64 copy_order;

void Block::enter() {
    Block& block = *current_block;
    try {
        block.kernel_();
    } catch (...) {
        block.error_ = std::current_exception();
    }
    block.running_->state = Fiber::kDone;
    _longjmp(block.scheduler_, 1);
}

void Block::resume(Fiber& fiber) {
    running_ = &fiber;
    threadIdx = fiber.index;
    if (_setjmp(scheduler_) == 0) {
        if (std::exchange(fiber.started, true)) _longjmp(fiber.here, 1);
        setcontext(&fiber.start);
    }
    if (error_) std::rethrow_exception(error_);
}

void Block::wait(Fiber::State state, std::string_view reason) {
    Fiber& fiber = *running_;
    fiber.state = state;
    fiber.waits_for = reason;
    if (_setjmp(fiber.here) == 0) _longjmp(scheduler_, 1);
}

// A warp runs until all its lanes wait for other warps: the farther warps drift apart, the more a missing barrier shows.
void Block::run(std::mt19937_64& random) {
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
bool Block::wake_waiting(std::mt19937_64& random) {
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
        if (fiber.state != Fiber::kAtBarrier || fiber.waits_for != fibers_[0].waits_for) {
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
    for (size_t i = shared_bytes; i < sizeof(shared_memory); ++i) {
        if (shared_memory[i] != kCanary) {
            throw EmulatorError("write past the end of the shared memory: byte " + std::to_string(i) + " of " +
                                std::to_string(shared_bytes));
        }
    }
}

}  // namespace

void set_seed(uint64_t seed) { current_seed = seed; }

void run_grid(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel) {
    const size_t threads = size_t{block.x} * block.y * block.z;
    const auto stacks = std::make_unique_for_overwrite<char[]>(threads * kStackBytes);
    std::mt19937_64 random(current_seed);
    copy_order.seed(current_seed);
    std::vector<uint64_t> order(uint64_t{grid.x} * grid.y * grid.z);
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), random);

    gridDim = grid;
    blockDim = block;
    for (const uint64_t i : order) {
        blockIdx = uint3(i % grid.x, i / grid.x % grid.y, i / (uint64_t{grid.x} * grid.y));
        std::memset(shared_memory, kPoison, shared_bytes);
        std::memset(shared_memory + shared_bytes, kCanary, sizeof(shared_memory) - shared_bytes);
        Block running(block, kernel, stacks.get());
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

WarpValues exchange(uint32_t mask, uint64_t value, const char* operation) {
    Block& block = *current_block;
    const uint32_t self = 1u << lane();
    if (!(mask & self)) throw EmulatorError(std::string(operation) + ": a lane that its own mask leaves out");
    Meeting& meeting = block.meeting(mask);
    if (meeting.arrived == 0) meeting.operation = operation;
    if (meeting.operation != operation) {
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
        if (meeting.arrived == 0 || meeting.operation == operation) act(lanes);
    }
    exchange(kAll, reinterpret_cast<uint64_t>(mine), operation);
}

void copy_async(void* shared, const void* global, int bytes) {
    if ((reinterpret_cast<uintptr_t>(shared) | (bytes ? reinterpret_cast<uintptr_t>(global) : 0)) % 16 != 0) {
        throw EmulatorError("cp.async: a misaligned address");
    }
    const Copy copy = {shared, global, bytes};
    if (copy_order() % 2) {
        copy.run();
    } else {
        current_block->running().copies.back().push_back(copy);
    }
}

void commit_copies() { current_block->running().copies.emplace_back(); }

void wait_for_copies(int pending) {
    auto& groups = current_block->running().copies;
    while (groups.size() > size_t{1} + pending) {
        for (const Copy& copy : groups.front()) copy.run();
        groups.erase(groups.begin());
    }
}

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
