// Launchers of what stands around the grouped products, for every architecture from sm_80 on.
#include "common/launch.cuh"
#include "moe/cuda_combine.cuh"
#include "moe/cuda_launch.cuh"
#include "moe/cuda_schedule.cuh"

using namespace r1kernels;
using namespace r1kernels::moe;

void r1kernels_moe_plan(Element element, int64_t rows, int64_t experts, R1kernelsMoeSchedule* schedule) {
    constexpr int64_t kManyRows = 64;  // of an expert: more would waste less of a large tile than they gain
    schedule->rows = rows;
    schedule->experts = experts;
    schedule->tile_rows = element == Element::float32 || rows <= kManyRows * experts ? 64 : 128;
    // each group, and the rows of nobody are two, leaves at most one tile partly empty, and an empty group has none
    const int64_t groups = std::min(rows, experts + 2);
    schedule->tile_count = (rows + groups * (schedule->tile_rows - 1)) / schedule->tile_rows;
}

int r1kernels_moe_schedule_cuda(const R1kernelsMoeSchedule* schedule, const int32_t* offsets, void* stream) {
    return launch(schedule_kernel, 1, kScheduleThreads, sizeof(ScheduleShared), stream, *schedule, offsets);
}

int r1kernels_moe_combine_cuda(const R1kernelsMoeCombine* combine, void* stream) {
    return with_scalar(combine->element, [=](auto zero) {
        using Scalar = decltype(zero);
        const int64_t chunks = divide_up(combine->columns, kChunk<Scalar>);
        return launch(combine_kernel<Scalar>, divide_up(combine->tokens * chunks, kSumThreads), kSumThreads, 0, stream,
                      *combine, chunks);
    });
}

int r1kernels_moe_sum_partials_cuda(const R1kernelsMoeSchedule* schedule, const float* partials, int64_t parts,
                                    const int32_t* permutation, float* grad, void* stream) {
    return launch(sum_partials_kernel, divide_up(schedule->rows, kSumThreads), kSumThreads, 0, stream, *schedule,
                  partials, parts, permutation, grad);
}
