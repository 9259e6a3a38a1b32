// sort_by_expert: a stable counting sort of S rows by E experts, in three phases with a barrier between them.
//
// Rows are cut into tiles, one warp each. count: how many rows of each bin a tile has (a bin is an expert; the last bin,
// E, holds the rows of no expert). scan: of each bin, the sums over the tiles before. place: a row's place is the start of
// its bin, plus its bin's rows in tiles before, plus those before it in its tile. Nothing depends on the order in which
// warps run.
#include "common/block_reduce.cuh"
#include "common/launch.cuh"
#include "moe/cuda.h"

namespace r1kernels::moe {

constexpr int kSortThreads = 256;
constexpr int kSortWarps = kSortThreads / kWarpSize;
constexpr int kSortBlocks = 4;                  // at once on a processor; more would make the compiler spill
constexpr int64_t kTileRows = 256;              // at least
constexpr int64_t kMostTiles = 2048;
constexpr int64_t kMostCounts = 1 << 22;    // of all tiles: where there are many experts, tiles are larger
constexpr int kSharedCounts = (48 << 10) / sizeof(int32_t);

// What the phases share. `counts` is (bins, tiles): the rows of a bin in a tile, after the scan those in tiles before.
struct SortPlan {
    int bins, tiles;    // their product fits into an int too
    int64_t tile_rows;
    int32_t* counts;
    int32_t* totals;    // (bins)
    int32_t* counters;  // (tiles, bins): those of a warp, where the shared memory is too small for them; else null
};

// The counters of this warp.
__device__ inline int32_t* counters_of(const SortPlan& plan, int tile) {
    if (plan.counters != nullptr) return plan.counters + tile * plan.bins;
    return reinterpret_cast<int32_t*>(shared_memory) + threadIdx.x / kWarpSize * plan.bins;
}

// Calls visit(row, bin, rank, count) for all rows of a tile, a warp's width at a time and all lanes together: of the rows
// of this bin in the width, `rank` lie before this one and there are `count`. Lanes behind the last row have bin -1.
template <class Visit>
__device__ inline void for_each_row(const R1kernelsExpertSort& call, const SortPlan& plan, int tile, Visit visit) {
    const int64_t first = tile * plan.tile_rows;
    const int64_t end = first + plan.tile_rows < call.rows ? first + plan.tile_rows : call.rows;
    for (int64_t start = first; start < end; start += kWarpSize) {
        const int64_t row = start + lane_id();
        int bin = -1;
        if (row < end) {
            const int64_t index = call.indices[row];
            bin = index >= 0 && index < call.experts ? static_cast<int>(index) : plan.bins - 1;
        }
        const unsigned same = __match_any_sync(kWholeWarp, bin);
        visit(row, bin, __popc(same & ((1u << lane_id()) - 1)), __popc(same));
    }
}

__device__ inline void count_rows(const R1kernelsExpertSort& call, const SortPlan& plan, int tile) {
    int32_t* counters = counters_of(plan, tile);
    for (int bin = lane_id(); bin < plan.bins; bin += kWarpSize) counters[bin] = 0;
    __syncwarp();
    for_each_row(call, plan, tile, [&](int64_t, int bin, int rank, int count) {
        if (bin >= 0 && rank == 0) counters[bin] += count;
        __syncwarp();
    });
    for (int bin = lane_id(); bin < plan.bins; bin += kWarpSize) {
        plan.counts[bin * plan.tiles + tile] = counters[bin];
    }
    __syncwarp();
}

// The sum over the lanes before this one; `total` becomes that over all.
__device__ inline int32_t warp_sum_before(int32_t value, int32_t& total) {
    int32_t sum = value;
#pragma unroll
    for (int lanes = 1; lanes < kWarpSize; lanes *= 2) {
        const int32_t below = __shfl_up_sync(kWholeWarp, sum, lanes);
        if (lane_id() >= lanes) sum += below;
    }
    total = __shfl_sync(kWholeWarp, sum, kWarpSize - 1);
    return sum - value;
}

__device__ inline void scan_tiles(const SortPlan& plan, int bin) {
    constexpr int kTogether = 4;  // loads under way at once
    int32_t* counts = plan.counts + bin * plan.tiles;
    int32_t before = 0;
    for (int first = 0; first < plan.tiles; first += kTogether * kWarpSize) {
        int32_t values[kTogether];
#pragma unroll
        for (int i = 0; i < kTogether; ++i) {
            const int tile = first + i * kWarpSize + lane_id();
            values[i] = tile < plan.tiles ? counts[tile] : 0;
        }
#pragma unroll
        for (int i = 0; i < kTogether; ++i) {
            const int tile = first + i * kWarpSize + lane_id();
            int32_t total;
            const int32_t sum = before + warp_sum_before(values[i], total);
            if (tile < plan.tiles) counts[tile] = sum;
            before += total;
        }
    }
    if (lane_id() == 0) plan.totals[bin] = before;
}

template <class Index>
__device__ inline void place_rows(const R1kernelsExpertSort& call, const SortPlan& plan, int tile) {
    int32_t* counters = counters_of(plan, tile);
    int32_t start = 0;  // of the bins that are next
    for (int first = 0; first < plan.bins; first += kWarpSize) {
        const int bin = first + lane_id();
        int32_t total;
        const int32_t place = start + warp_sum_before(bin < plan.bins ? plan.totals[bin] : 0, total);
        start += total;
        if (bin < plan.bins) {
            counters[bin] = place + plan.counts[bin * plan.tiles + tile];
            if (tile == 0) call.offsets[bin] = place;
        }
    }
    __syncwarp();
    Index* permutation = static_cast<Index*>(call.permutation);
    Index* inverse = static_cast<Index*>(call.inverse);
    for_each_row(call, plan, tile, [&](int64_t row, int bin, int rank, int count) {
        const int32_t place = bin >= 0 ? counters[bin] + rank : 0;
        __syncwarp();
        if (bin >= 0) {
            if (rank == 0) counters[bin] += count;
            permutation[place] = static_cast<Index>(row);
            inverse[row] = static_cast<Index>(place);
        }
        __syncwarp();
    });
}

// One phase on a grid, a warp for each tile or bin. The blocks hold as many warps as there is shared memory for.

__device__ inline int first_warp() { return (blockIdx.x * blockDim.x + threadIdx.x) / kWarpSize; }
__device__ inline int all_warps() { return gridDim.x * blockDim.x / kWarpSize; }

__global__ void __launch_bounds__(kSortThreads, kSortBlocks) count_kernel(R1kernelsExpertSort call, SortPlan plan) {
    for (int tile = first_warp(); tile < plan.tiles; tile += all_warps()) count_rows(call, plan, tile);
}

__global__ void __launch_bounds__(kSortThreads, kSortBlocks) scan_kernel(SortPlan plan) {
    for (int bin = first_warp(); bin < plan.bins; bin += all_warps()) scan_tiles(plan, bin);
}

template <class Index>
__global__ void __launch_bounds__(kSortThreads, kSortBlocks) place_kernel(R1kernelsExpertSort call, SortPlan plan) {
    for (int tile = first_warp(); tile < plan.tiles; tile += all_warps()) place_rows<Index>(call, plan, tile);
}

// All phases in one block.
template <class Index>
__global__ void __launch_bounds__(kSortThreads, kSortBlocks) sort_kernel(R1kernelsExpertSort call, SortPlan plan) {
    for (int tile = first_warp(); tile < plan.tiles; tile += all_warps()) count_rows(call, plan, tile);
    __syncthreads();
    for (int bin = first_warp(); bin < plan.bins; bin += all_warps()) scan_tiles(plan, bin);
    __syncthreads();
    for (int tile = first_warp(); tile < plan.tiles; tile += all_warps()) place_rows<Index>(call, plan, tile);
}

}  // namespace r1kernels::moe

using namespace r1kernels;
using namespace r1kernels::moe;

namespace {

constexpr int kTilesOfBlock = 2 * kSortWarps;  // one block sorts so many in less time than three launches take

SortPlan plan_of(const R1kernelsExpertSort& call, void* workspace) {
    SortPlan plan;
    plan.bins = static_cast<int>(call.experts + 1);
    const int64_t most = std::clamp<int64_t>(kMostCounts / plan.bins, 1, kMostTiles);
    plan.tile_rows = std::max((call.rows + most - 1) / most, kTileRows);
    plan.tiles = static_cast<int>(std::max<int64_t>((call.rows + plan.tile_rows - 1) / plan.tile_rows, 1));
    plan.counts = static_cast<int32_t*>(workspace);
    plan.totals = plan.counts + plan.bins * plan.tiles;
    plan.counters = plan.bins <= kSharedCounts ? nullptr : plan.totals + plan.bins;
    return plan;
}

template <class Index>
int run(const R1kernelsExpertSort& call, const SortPlan& plan, void* stream) {
    const bool in_shared = plan.counters == nullptr;
    const int warps = in_shared ? std::min(kSharedCounts / plan.bins, kSortWarps) : kSortWarps;
    const size_t shared = in_shared ? warps * plan.bins * sizeof(int32_t) : 0;
    const int threads = warps * kWarpSize;
    if (plan.tiles <= kTilesOfBlock) return launch(sort_kernel<Index>, 1, threads, shared, stream, call, plan);

    const int blocks = (plan.tiles + warps - 1) / warps;
    int code = launch(count_kernel, blocks, threads, shared, stream, call, plan);
    if (code != cudaSuccess) return code;
    code = launch(scan_kernel, (plan.bins + kSortWarps - 1) / kSortWarps, kSortThreads, 0, stream, plan);
    if (code != cudaSuccess) return code;
    return launch(place_kernel<Index>, blocks, threads, shared, stream, call, plan);
}

}  // namespace

size_t r1kernels_expert_sort_cuda_workspace(const R1kernelsExpertSort* call) {
    const SortPlan plan = plan_of(*call, nullptr);
    const size_t counters = plan.bins <= kSharedCounts ? 0 : plan.bins * plan.tiles;
    return (plan.bins * plan.tiles + plan.bins + counters) * sizeof(int32_t);
}

int r1kernels_expert_sort_cuda(const R1kernelsExpertSort* call, void* workspace, void* stream) {
    const SortPlan plan = plan_of(*call, workspace);
    return call->wide ? run<int64_t>(*call, plan, stream) : run<int32_t>(*call, plan, stream);
}
