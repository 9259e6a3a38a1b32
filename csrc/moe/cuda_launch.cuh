// What the launchers of the MoE kernels share.
#pragma once

#include "common/launch.cuh"
#include "moe/cuda_rows.cuh"
#include "moe/cuda_scalar.cuh"
#include "moe/cuda_weights.cuh"

namespace r1kernels::moe {

// The least that a block of any architecture from sm_80 on gets: sm_86, 89 and 120.
constexpr int kMostSharedBytes = 99 << 10;

inline int64_t divide_up(int64_t count, int64_t by) { return (count + by - 1) / by; }

template <class Scalar, int kTileRows, bool kTransposed, R1kernelsMoeEpilogue kEpilogue>
int launch_rows(const R1kernelsMoeProduct& product, void* stream) {
    using Sums = RowsMultiply<Scalar, kTileRows, kTransposed>;
    static_assert(kSharedBytes<Sums> <= kMostSharedBytes, "fewer stages, or smaller tiles");
    const int64_t columns = kEpilogue == R1KERNELS_MOE_UP ? product.columns / 2 : product.columns;
    const int64_t column_tiles = divide_up(columns, kColumnsOfTile<kEpilogue>);
    const int64_t blocks = product.schedule.tile_count * column_tiles;
    if (blocks > INT32_MAX) return cudaErrorInvalidValue;  // no memory holds as much
    return launch(rows_kernel<Scalar, kTileRows, kTransposed, kEpilogue>, blocks, kThreads, kSharedBytes<Sums>,
                  stream, product, static_cast<int>(column_tiles));
}

// float32 has one size of tiles: true float32 is bound by its multiplications.
template <class Scalar, bool kTransposed, R1kernelsMoeEpilogue kEpilogue>
int launch_rows(const R1kernelsMoeProduct& product, void* stream) {
    if constexpr (!std::is_same_v<Scalar, float>) {
        if (product.schedule.tile_rows == 128) return launch_rows<Scalar, 128, kTransposed, kEpilogue>(product, stream);
    }
    return launch_rows<Scalar, 64, kTransposed, kEpilogue>(product, stream);
}

template <class Scalar>
int launch_weights(const R1kernelsMoeWeightProduct& product, void* stream) {
    constexpr int kTileRows = std::is_same_v<Scalar, float> ? 64 : 128;
    using Sums = Multiply<Scalar, kTileRows, AcrossDepth, AcrossDepth>;
    static_assert(kSharedBytes<Sums> <= kMostSharedBytes, "fewer stages, or smaller tiles");
    const int64_t row_tiles = divide_up(product.m, kTileRows), column_tiles = divide_up(product.n, kTileColumns);
    const int64_t blocks = row_tiles * column_tiles * product.schedule.experts;
    if (blocks > INT32_MAX) return cudaErrorInvalidValue;  // no memory holds as much
    return launch(weights_kernel<Scalar, kTileRows>, blocks, kThreads, kSharedBytes<Sums>, stream, product,
                  static_cast<int>(row_tiles), static_cast<int>(column_tiles));
}

}  // namespace r1kernels::moe
