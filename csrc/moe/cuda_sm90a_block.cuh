// What the blocks of the Hopper kernels have in common: shared memory, the loop of the consumers, gathered copies.
#pragma once

#include "common/mma.cuh"
#include "common/warp.cuh"
#include "moe/cuda_sm90a_machine.cuh"

namespace r1kernels {

extern __shared__ __align__(16) unsigned char shared_memory[];

namespace moe::hopper {

// Registers a thread at the start and in its role; 128 producers and 256 consumers share 64 K.
constexpr int kProducerRegisters = 56, kConsumerRegisters = 224;
constexpr int kRegisters = 65536 / kThreads / 8 * 8;  // __launch_bounds__(kThreads, 1)
static_assert(kProducerWarps * kProducerRegisters + kConsumerWarps * kConsumerRegisters <= kThreads / 32 * kRegisters);

struct Stages {
    unsigned char *a, *b;    // kStages tiles of each operand
    Barrier *full, *empty;   // kStages of each

    __device__ Stages() {
        const uintptr_t start = reinterpret_cast<uintptr_t>(shared_memory);
        a = shared_memory + (kSharedAlignment - start % kSharedAlignment) % kSharedAlignment;
        b = a + kStages * kStageBytesA;
        full = reinterpret_cast<Barrier*>(b + kStages * kStageBytesB);
        empty = full + kStages;
    }

    // Once, by all threads.
    __device__ void begin(bool lanes_copy) const {
        if (threadIdx.x == 0) {
            for (int stage = 0; stage < kStages; ++stage) {
                barrier_init(full + stage, full_arrivals(lanes_copy));
                barrier_init(empty + stage, kEmptyArrivals);
            }
            barriers_ready();
        }
        __syncthreads();
    }
};

// A whole kernel: the first warps copy operands into the stages, the others multiply what lies there.
template <class Kernel, class Call>
__device__ inline void run_roles(const Call& call, bool lanes_copy) {
    const Stages stages;
    stages.begin(lanes_copy);
    if (threadIdx.x < 32 * kProducerWarps) {
        registers_give<kProducerRegisters>();
        Kernel::produce(call, stages, threadIdx.x / 32);
    } else {
        registers_take<kConsumerRegisters>();
        Kernel::multiply(call, stages, threadIdx.x - 32 * kProducerWarps);
    }
}

// A producer warp waits until its stage is free for the step. Its lanes go on together: one left behind could miss a phase
// that the others have seen, and wait for ever.
__device__ inline void wait_until_free(const Stages& stages, int warp, Step step) {
    barrier_wait(stages.empty + warp, step.empty_parity());
    __syncwarp();
}

// product = the sum over k_tiles stages, from `steps` on; zeros for no k tile. `thread`: of the consumers.
template <class Product>
__device__ inline void consume(Product& product, const Stages& stages, uint32_t& steps, int k_tiles, int thread) {
    if (k_tiles == 0) {
        product.clear();
        return;
    }
    const auto start = [&](int k) {
        const Step step = {steps + k};
        barrier_wait(stages.full + step.stage(), step.full_parity());
        product.start(stages.a, stages.b, step.stage(), k == 0, thread);
    };
    const auto release = [&](int k) {
        if (lane_id() == 0) barrier_arrive(stages.empty + Step{steps + k}.stage());
    };
    start(0);
    for (int k = 1; k < k_tiles; ++k) {
        start(k);
        product.template wait<1>();
        release(k - 1);
    }
    product.template wait<0>();
    release(k_tiles - 1);
    steps += k_tiles;
}

// Waits for the copies of this thread and shows them to wgmma: then the barrier of their stage may be arrived at.
__device__ inline void finish_copies() {
    commit_copies();
    wait_for_copies<0>();
    show_to_wgmma();
}

// Row `index ? index[r] / divisor : r` of a matrix in expert order; r < end, else no row: -1.
__device__ inline int source_row(const R1kernelsMoeRows& rows, int r, int end) {
    if (r >= end) return -1;
    return rows.index == nullptr ? r : rows.index[r] / rows.divisor;
}

// One warp copies lines of a k-major operand: 64 elements from column k on of kRows rows, zeros behind the matrix and for
// no row. Lane i holds the numbers of rows i, i + 32, ...
template <int kRows, class Scalar>
__device__ inline void copy_k_major(unsigned char* to, const Scalar* data, const int (&rows)[kRows / 32], int k,
                                    int64_t columns) {
    constexpr int kRowsAtOnce = 32 / kLineChunks;
    const int chunk = lane_id() % kLineChunks, mine = lane_id() / kLineChunks;
    const int column = k + chunk * kChunkElements;
#pragma unroll
    for (int part = 0; part < kRows / 32; ++part) {
#pragma unroll 4
        for (int i = 0; i < 32; i += kRowsAtOnce) {
            const int row = __shfl_sync(kWholeWarp, rows[part], i + mine);
            const bool valid = row >= 0 && column < columns;
            const Scalar* from = valid ? data + row * columns + column : data;
            copy_async(to + swizzled(part * 32 + i + mine, chunk), from, valid ? kChunkBytes : 0);
        }
    }
}

// One warp copies lines of an mn-major operand: kSize elements from column `first` on of kBlockK rows, zeros likewise.
template <int kSize, class Scalar>
__device__ inline void copy_mn_major(unsigned char* to, const Scalar* data, const int (&rows)[kBlockK / 32], int first,
                                     int64_t columns) {
    constexpr int kRowChunks = kSize / kChunkElements, kRowsAtOnce = 32 / kRowChunks;
    static_assert(kRowsAtOnce >= 1 && kRowsAtOnce * kRowChunks == 32);
    const int chunk = lane_id() % kRowChunks, mine = lane_id() / kRowChunks;
    const int column = first + chunk * kChunkElements;
    const int line = chunk / kLineChunks * kBlockK;
#pragma unroll
    for (int part = 0; part < kBlockK / 32; ++part) {
#pragma unroll 4
        for (int i = 0; i < 32; i += kRowsAtOnce) {
            const int row = __shfl_sync(kWholeWarp, rows[part], i + mine);
            const bool valid = row >= 0 && column < columns;
            const Scalar* from = valid ? data + row * columns + column : data;
            copy_async(to + swizzled(line + part * 32 + i + mine, chunk % kLineChunks), from,
                       valid ? kChunkBytes : 0);
        }
    }
}

// An mn-major operand of kSize columns by the copy engine, one box for 64 of them. One lane.
template <int kSize>
__device__ inline void load_mn_major(const TensorMap& map, Barrier* barrier, unsigned char* to, int first, int row,
                                     int matrix) {
#pragma unroll
    for (int i = 0; i < kSize / kLineElements; ++i) {
        load_box(map, barrier, to + i * kBlockK * kLineBytes, first + i * kLineElements, row, matrix);
    }
}

}  // namespace moe::hopper
}  // namespace r1kernels
