// The machine of the Hopper kernels on the host: stands in for the header of this name in csrc. Barriers count and fail on
// too many arrivals; boxes arrive and products read shared memory at once or as late as the protocol allows, as the seed
// decides: whoever reads too early, or reuses a stage too early, computes something else.
#pragma once

#include <deque>
#include <map>
#include <vector>

#include "common/elements.cuh"
#include "common/warp.cuh"
#include "moe/hopper_plan.h"

#define __grid_constant__

namespace r1kernels::moe::hopper {

using TensorMap = Boxes;
using Barrier = uint64_t;

namespace machine {

struct PendingBox {
    TensorMap map;
    unsigned char* to;
    int64_t first[3];

    void arrive() const {
        const auto* data = static_cast<const unsigned char*>(map.data);
        for (uint32_t line = 0; line < map.box[1]; ++line) {
            for (uint32_t element = 0; element < map.box[0]; ++element) {
                const int64_t at[3] = {first[0] + element, first[1] + line, first[2]};
                unsigned char* shared = to + k_major_offset(line, element);
                memset(shared, 0, kElementBytes);
                bool inside = true;
                for (int i = 0; i < 3; ++i) inside &= at[i] >= 0 && at[i] < static_cast<int64_t>(map.dims[i]);
                if (!inside) continue;
                memcpy(shared, data + at[2] * map.strides[1] + at[1] * map.strides[0] + at[0] * kElementBytes,
                       kElementBytes);
            }
        }
    }
};

struct BarrierState {
    int expected, arrived = 0;
    int64_t missing_bytes = 0;
    uint32_t phases = 0;  // completed
    std::vector<PendingBox> boxes;

    void check() {
        if (arrived > expected) throw emulator::EmulatorError("mbarrier: more arrivals than it was made for");
        if (arrived < expected || missing_bytes != 0) return;
        arrived = 0;
        ++phases;
    }
    void receive() {
        for (const PendingBox& box : boxes) {
            box.arrive();
            missing_bytes -= box.map.bytes();
        }
        boxes.clear();
        check();
    }
};

inline std::map<Barrier*, BarrierState> barriers;
inline emulator::Random coin;

inline BarrierState& state_of(Barrier* barrier) {
    const auto found = barriers.find(barrier);
    if (found == barriers.end()) throw emulator::EmulatorError("mbarrier: not initialised");
    return found->second;
}

}  // namespace machine

inline void barrier_init(Barrier* barrier, int arrivals) { machine::barriers[barrier] = {arrivals}; }
inline void barriers_ready() {}

inline void barrier_arrive(Barrier* barrier) {
    auto& state = machine::state_of(barrier);
    ++state.arrived;
    state.check();
}

inline void barrier_expect(Barrier* barrier, uint32_t bytes) {
    auto& state = machine::state_of(barrier);
    state.missing_bytes += bytes;
    ++state.arrived;
    state.check();
}

inline void barrier_wait(Barrier* barrier, uint32_t parity) {
    emulator::wait_until("an mbarrier", [&state = machine::state_of(barrier), parity] {
        if (!state.boxes.empty()) state.receive();
        return (state.phases & 1) != parity;
    });
}

inline void load_box(const TensorMap& map, Barrier* barrier, unsigned char* to, int c0, int c1, int c2) {
    if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(map.data)) % kChunkBytes != 0) {
        throw emulator::EmulatorError("the copy engine: a misaligned address");
    }
    auto& state = machine::state_of(barrier);
    state.boxes.push_back({map, to, {c0, c1, c2}});
    if (machine::coin() % 2) state.receive();
}

inline void show_to_wgmma() {}
template <int kCount>
void registers_give() {}
template <int kCount>
void registers_take() {}

// A warp multiplies together: its 16 rows of A with all columns of B.
template <class Scalar, bool kMnMajorA, bool kMnMajorB>
struct Multiplier {
    struct Pending {
        const unsigned char *a, *b;
        bool first;
        int row;
    };

    float accumulators[kBlockM * kBlockN / (32 * kConsumerWarps)];
    std::deque<Pending> pending;  // of lane 0, for all

    float operator[](int i) const { return accumulators[i]; }
    void clear() { std::fill(std::begin(accumulators), std::end(accumulators), 0.0f); }

    void start(unsigned char* a, unsigned char* b, int stage, bool first, int thread) {
        const Pending product = {a + stage * kStageBytesA, b + stage * kStageBytesB, first, thread / 32 * 16};
        emulator::together(this, "wgmma", [=](const emulator::LanePointers& lanes) {
            of(lanes[0]).pending.push_back(product);
            if (machine::coin() % 2) run(lanes, 0);
        });
    }
    template <int kPending>
    void wait() {
        emulator::together(this, "wgmma.wait", [](const emulator::LanePointers& lanes) { run(lanes, kPending); });
    }

private:
    static Multiplier& of(const void* lane) { return *static_cast<Multiplier*>(const_cast<void*>(lane)); }

    static float at(const unsigned char* tile, bool mn_major, int mn, int k) {
        Scalar value;
        memcpy(&value, tile + (mn_major ? mn_major_offset(mn, k) : k_major_offset(mn, k)), sizeof(value));
        return to_float(value);
    }

    static void run(const emulator::LanePointers& lanes, size_t left) {
        static float sums[16][kBlockN], a[kBlockK][16], b[kBlockK][kBlockN];
        std::deque<Pending>& pending = of(lanes[0]).pending;
        for (; pending.size() > left; pending.pop_front()) {
            const Pending& product = pending.front();
            for (int k = 0; k < kBlockK; ++k) {
                for (int row = 0; row < 16; ++row) a[k][row] = at(product.a, kMnMajorA, product.row + row, k);
                for (int column = 0; column < kBlockN; ++column) b[k][column] = at(product.b, kMnMajorB, column, k);
            }
            const auto each = [&](auto act) {
                for (int lane = 0; lane < kWarpSize; ++lane) {
                    float* values = of(lanes[lane]).accumulators;
                    for (int i = 0; i < kBlockN / 2; ++i) {
                        act(values[i], sums[lane / 4 + i / 2 % 2 * 8][i / 4 * 8 + lane % 4 * 2 + i % 2]);
                    }
                }
            };
            each([&](float& value, float& sum) { sum = product.first ? 0.0f : value; });
            emulator::add_product(sums, a, b);
            each([](float& value, float& sum) { value = sum; });
        }
    }
};

}  // namespace r1kernels::moe::hopper
