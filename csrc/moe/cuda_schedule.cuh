// The tiles of rows that a grouped product runs over, from the offsets of the experts.
#pragma once

#include <climits>

#include "common/block_reduce.cuh"
#include "moe/cuda.h"

namespace r1kernels::moe {

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
    const int thread = threadIdx.x, nobody = static_cast<int>(schedule.experts);
    // Rows and tiles before a strip: before the first one rows of nobody, where the offsets do not begin at 0.
    int before = min(max(offsets[0], 0), rows);
    int tiles = before / tile_rows + (before % tile_rows != 0);
    if (thread < kWarpSize) write_tiles(schedule.tiles, nobody, 0, before, tile_rows);
    for (int64_t strip = 0; strip <= schedule.experts; strip += kScheduleThreads) {
        const int64_t expert = strip + thread;
        // the last one, expert E, has the other rows of nobody
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

}  // namespace r1kernels::moe
