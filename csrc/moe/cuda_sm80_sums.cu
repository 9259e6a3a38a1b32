// What stands around the grouped products, for every architecture from sm_80 on: the tiles of rows that they run over, and
// sums over the rows of a token and over the parts of a row.
#include <climits>

#include "common/block_reduce.cuh"
#include "common/elements.cuh"
#include "common/launch.cuh"
#include "moe/cuda.h"

namespace r1kernels::moe {

// --- the tiles of rows, from the offsets of the experts ---

constexpr int kScheduleThreads = 512;

struct ScheduleShared {
    int of_warp[kScheduleThreads / kWarpSize];
    int first[kScheduleThreads], end[kScheduleThreads], tile[kScheduleThreads];
};

// combine() over the values of the threads up to this one.
template <class Combine>
__device__ inline int block_scan(int value, int* of_warp, Combine combine) {
    const int lane = lane_id(), warp = threadIdx.x / kWarpSize;
#pragma unroll
    for (int lanes = 1; lanes < kWarpSize; lanes *= 2) {
        const int below = __shfl_up_sync(kWholeWarp, value, lanes);
        if (lane >= lanes) value = combine(value, below);
    }
    __syncthreads();  // whoever used of_warp before has read it
    if (lane == kWarpSize - 1) of_warp[warp] = value;
    __syncthreads();
    for (int i = 0; i < warp; ++i) value = combine(value, of_warp[i]);
    return value;
}

// Writes the tiles of the rows [first, end) to tiles[0, ...). The lanes of one warp.
__device__ inline void write_tiles(R1kernelsMoeTile* tiles, int expert, int first, int end, int tile_rows) {
    for (int64_t row = int64_t{lane_id()} * tile_rows; row < end - first; row += int64_t{kWarpSize} * tile_rows) {
        const int begin = first + static_cast<int>(row);
        tiles[row / tile_rows] = R1kernelsMoeTile{expert, begin, begin + min(tile_rows, end - begin), 0};
    }
}

// One block. Experts come in strips of one a thread; then the warps write the tiles of one expert after the other.
__global__ void schedule_kernel(R1kernelsMoeSchedule schedule, const int32_t* offsets) {
    ScheduleShared& shared = *reinterpret_cast<ScheduleShared*>(shared_memory);
    const int rows = static_cast<int>(schedule.rows), tile_rows = static_cast<int>(schedule.tile_rows);
    const int thread = threadIdx.x, unowned = static_cast<int>(schedule.experts);
    // Rows and tiles before a strip: before the first one rows of no expert, where the offsets do not begin at 0.
    int before = min(max(offsets[0], 0), rows);
    int tiles = before / tile_rows + (before % tile_rows != 0);
    if (thread < kWarpSize) write_tiles(schedule.tiles, unowned, 0, before, tile_rows);
    for (int64_t strip = 0; strip <= schedule.experts; strip += kScheduleThreads) {
        const int64_t expert = strip + thread;
        // the last one, expert E, has the other rows of no expert
        int end = expert < schedule.experts ? min(max(offsets[expert + 1], before), rows) : rows;
        end = block_scan(end, shared.of_warp, [](int a, int b) { return max(a, b); });
        shared.end[thread] = end;
        __syncthreads();
        const int first = thread == 0 ? before : shared.end[thread - 1];
        const int needed = (end - first) / tile_rows + ((end - first) % tile_rows != 0);
        const int last_tile = tiles + block_scan(needed, shared.of_warp, [](int a, int b) { return a + b; });
        shared.first[thread] = first;
        shared.tile[thread] = last_tile - needed;
        if (expert <= schedule.experts) {
            schedule.bounds[expert] = first;
            if (expert == schedule.experts) schedule.bounds[expert + 1] = rows;
        }
        __syncthreads();

        const int in_strip = static_cast<int>(min(int64_t{kScheduleThreads}, schedule.experts + 1 - strip));
        for (int i = thread / kWarpSize; i < in_strip; i += kScheduleThreads / kWarpSize) {
            write_tiles(schedule.tiles + shared.tile[i], static_cast<int>(strip) + i, shared.first[i], shared.end[i],
                        tile_rows);
        }
        __syncthreads();
        before = shared.end[kScheduleThreads - 1];
        tiles = shared.tile[kScheduleThreads - 1] +
                (before - shared.first[kScheduleThreads - 1] + tile_rows - 1) / tile_rows;
        __syncthreads();
    }
    for (int64_t tile = tiles + thread; tile < schedule.tile_count; tile += kScheduleThreads) {
        schedule.tiles[tile] = R1kernelsMoeTile{-1, 0, 0, 0};
    }
}

// --- sums ---

constexpr int kSumThreads = 256;

// A thread takes one chunk of the columns of one token after the other.
template <class Scalar>
__global__ __launch_bounds__(kSumThreads) void combine_kernel(R1kernelsMoeCombine combine, int64_t chunks) {
    constexpr int kSize = Chunk<Scalar>::kSize;
    const int size = static_cast<int>(combine.columns);
    const int limit = combine.bounds[combine.experts];
    const int64_t stride = int64_t{gridDim.x} * kSumThreads;
    for (int64_t i = int64_t{blockIdx.x} * kSumThreads + threadIdx.x; i < combine.tokens * chunks; i += stride) {
        const int64_t token = i / chunks;
        const int column = static_cast<int>(i - token * chunks) * kSize;
        float sums[kSize] = {};
#pragma unroll 4
        for (int64_t k = token * combine.top_k; k < (token + 1) * combine.top_k; ++k) {
            const int64_t row = combine.inverse[k];
            if (row >= limit) continue;  // of no one: it was never written
            const float weight = combine.weights ? combine.weights[k] : 1.0f;
            const Chunk<Scalar> values =
                load_chunk(static_cast<const Scalar*>(combine.rows) + row * size, column, size);
#pragma unroll
            for (int j = 0; j < kSize; ++j) sums[j] += weight * values[j];
        }
        Scalar out[kSize];
#pragma unroll
        for (int j = 0; j < kSize; ++j) out[j] = from_float<Scalar>(sums[j]);
        store_chunk(static_cast<Scalar*>(combine.out) + token * size, column, size, out);
    }
}

__global__ __launch_bounds__(kSumThreads) void sum_partials_kernel(R1kernelsMoeSchedule schedule,
                                                                   const float* partials, int64_t parts,
                                                                   const int32_t* permutation, float* grad) {
    const int64_t stride = int64_t{gridDim.x} * kSumThreads;
    const int limit = schedule.bounds[schedule.experts];
    for (int64_t row = int64_t{blockIdx.x} * kSumThreads + threadIdx.x; row < schedule.rows; row += stride) {
        float sum = 0.0f;
        if (row < limit) {
            for (int64_t part = 0; part < parts; ++part) sum += partials[part * schedule.rows + row];
        }
        grad[permutation[row]] = sum;
    }
}

}  // namespace r1kernels::moe

using namespace r1kernels;
using namespace r1kernels::moe;

void r1kernels_moe_plan(Element element, int64_t rows, int64_t experts, R1kernelsMoeSchedule* schedule) {
    constexpr int64_t kManyRows = 64;  // of an expert: more would waste less of a large tile than they gain
    schedule->rows = rows;
    schedule->experts = experts;
    schedule->tile_rows = element == Element::float32 || rows <= kManyRows * experts ? 64 : 128;
    // each group, and the rows of no expert are two, leaves at most one tile partly empty, and an empty group has none
    const int64_t groups = std::min(rows, experts + 2);
    schedule->tile_count = (rows + groups * (schedule->tile_rows - 1)) / schedule->tile_rows;
}

int r1kernels_moe_schedule_cuda(const R1kernelsMoeSchedule* schedule, const int32_t* offsets, void* stream) {
    return launch(schedule_kernel, 1, kScheduleThreads, sizeof(ScheduleShared), stream, *schedule, offsets);
}

int r1kernels_moe_combine_cuda(const R1kernelsMoeCombine* combine, void* stream) {
    return with_scalar(combine->element, [=](auto zero) {
        using Scalar = decltype(zero);
        const int64_t chunks = divide_up(combine->columns, Chunk<Scalar>::kSize);
        return launch(combine_kernel<Scalar>, divide_up(combine->tokens * chunks, kSumThreads), kSumThreads, 0, stream,
                      *combine, chunks);
    });
}

int r1kernels_moe_sum_partials_cuda(const R1kernelsMoeSchedule* schedule, const float* partials, int64_t parts,
                                    const int32_t* permutation, float* grad, void* stream) {
    return launch(sum_partials_kernel, divide_up(schedule->rows, kSumThreads), kSumThreads, 0, stream, *schedule,
                  partials, parts, permutation, grad);
}
