// The grouped product over rows: a tile of rows of one expert times a tile of the columns of its weight.
#pragma once

#include "moe/cuda_epilogue.cuh"

namespace r1kernels::moe {

template <class Scalar, int kTileRows, bool kTransposed>
using RowsMultiply = std::conditional_t<kTransposed, Multiply<Scalar, kTileRows, AlongDepth, AlongDepth>,
                                        Multiply<Scalar, kTileRows, AlongDepth, AcrossDepth>>;

// Copies the weight of one expert, from the tile's first column on.
template <class Scalar, class Sums, bool kTransposed, R1kernelsMoeEpilogue kEpilogue>
__device__ inline auto copy_of_weight(const R1kernelsMoeProduct& product, int expert, int first_column) {
    const Scalar* weight =
        static_cast<const Scalar*>(product.weight) + expert * product.columns * product.depth;
    if constexpr (kTransposed) {
        const int64_t columns = product.columns;
        return CopyAlongDepth<Scalar, kTileColumns>(weight, product.depth, [=](int outer) -> int64_t {
            const int column = Sums::column_at(outer);
            if constexpr (kEpilogue == R1KERNELS_MOE_UP) {
                // by turns 32 columns of gate and the 32 of up that belong to them, so that a warp has both
                const int64_t of_half = first_column + column / kWarpColumns * kRunColumns + column % kRunColumns;
                const int64_t inside = min(of_half, columns / 2 - 1);
                return column / kRunColumns % 2 ? columns / 2 + inside : inside;
            } else {
                return min(int64_t{first_column} + column, columns - 1);
            }
        });
    } else {
        return CopyAcrossDepth<Scalar, kTileColumns, false>({weight, nullptr, 1}, product.columns, first_column, 0,
                                                            static_cast<int>(product.depth));
    }
}

template <class Scalar, int kTileRows, bool kTransposed, R1kernelsMoeEpilogue kEpilogue>
__global__ __launch_bounds__(kThreads, 2) void rows_kernel(R1kernelsMoeProduct product, int column_tiles) {
    using Sums = RowsMultiply<Scalar, kTileRows, kTransposed>;
    const R1kernelsMoeSchedule& schedule = product.schedule;
    const TilePlace place = place_of(blockIdx.x, static_cast<int>(schedule.tile_count), column_tiles);
    const R1kernelsMoeTile tile = schedule.tiles[place.row];
    const bool nobodys = tile.expert == schedule.experts;
    if (tile.expert < 0 || (nobodys && !product.clear_rest)) return;

    const int first_column = place.column * kColumnsOfTile<kEpilogue>;
    const R1kernelsMoeRows& x = product.x;
    CopyAlongDepth<Scalar, kTileRows> copy_rows(x.data, product.depth, [&](int outer) -> int64_t {
        const int row = tile.first + min(outer, tile.end - tile.first - 1);
        return x.index ? x.index[row] / x.divisor : row;
    });
    auto copy_weight =
        copy_of_weight<Scalar, Sums, kTransposed, kEpilogue>(product, nobodys ? 0 : tile.expert, first_column);
    Sums sums;
    run_steps(nobodys ? 0 : steps_of<Scalar>(product.depth), shared_memory, copy_rows, copy_weight, sums);
    sums.finish();
    if constexpr (kEpilogue == R1KERNELS_MOE_STORE) store<Scalar>(product, tile, first_column, sums);
    if constexpr (kEpilogue == R1KERNELS_MOE_UP) store_up<Scalar>(product, tile, first_column, sums);
    if constexpr (kEpilogue == R1KERNELS_MOE_GATE_BACKWARD) {
        store_gate_backward<Scalar>(product, tile, first_column, sums);
    }
}

}  // namespace r1kernels::moe
