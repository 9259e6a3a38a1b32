// The gradient of the weights: for each expert a product whose depth is its rows.
#pragma once

#include "moe/cuda_multiply.cuh"

namespace r1kernels::moe {

template <class Scalar, int kTileRows>
__global__ __launch_bounds__(kThreads, 2) void weights_kernel(R1kernelsMoeWeightProduct product, int row_tiles,
                                                              int column_tiles) {
    using Sums = Multiply<Scalar, kTileRows, AcrossDepth, AcrossDepth>;
    const unsigned tiles = row_tiles * column_tiles, expert = blockIdx.x / tiles;
    const TilePlace place = place_of(blockIdx.x - expert * tiles, row_tiles, column_tiles);
    const int first_row = place.row * kTileRows, first_column = place.column * kTileColumns;
    const int first = product.schedule.bounds[expert], end = product.schedule.bounds[expert + 1];
    CopyAcrossDepth<Scalar, kTileRows, true> copy_left(product.left, product.m, first_row, first, end);
    CopyAcrossDepth<Scalar, kTileColumns, true> copy_right(product.right, product.n, first_column, first, end);
    Sums sums;
    run_steps(steps_of<Scalar>(end - first), shared_memory, copy_left, copy_right, sums);
    sums.finish();
#pragma unroll
    for (int i = 0; i < Sums::kRows; ++i) {
        const int row = first_row + Sums::row(i);
        if (row >= product.m) continue;
        Scalar* out = static_cast<Scalar*>(product.out) + (expert * product.m + row) * product.n;
#pragma unroll
        for (int run = 0; run < Sums::kRuns; ++run) {
            Scalar values[kChunk<Scalar>];
#pragma unroll
            for (int j = 0; j < kChunk<Scalar>; ++j) values[j] = from_float<Scalar>(sums.value(i, run, j));
            store_chunk(out, first_column + kWarpColumns * warp_column() + Sums::column(run),
                        static_cast<int>(product.n), values);
        }
    }
}

}  // namespace r1kernels::moe
