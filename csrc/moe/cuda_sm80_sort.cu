// The launcher of sort_by_expert for every architecture from sm_80 on.
#include "common/launch.cuh"
#include "moe/cuda_sort.cuh"

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
