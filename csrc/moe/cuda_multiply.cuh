// One step of a product of tiles: sums (kTileRows x 128) += left right, float32 sums in registers.
//
// Four warps, two side by side and two one below the other, compute 64 columns of half of the rows each. When the product
// is done, a thread holds kRuns runs of kChunk consecutive columns in kRows rows: run h lies in the columns
// [32 h, 32 h + 32) of its warp, and the kLanesOfRow lanes that follow each other in a warp hold a whole run of 32.
#pragma once

#include <type_traits>

#include "common/block_reduce.cuh"
#include "moe/cuda_stage.cuh"

namespace r1kernels::moe {

constexpr int kTileColumns = 128;
constexpr int kWarpColumns = 64;
constexpr int kRunColumns = 32;

static_assert(kWarpColumns == R1KERNELS_MOE_PART_COLUMNS, "a warp writes one partial sum per row");

__device__ inline int warp_row() { return threadIdx.x / kWarpSize / 2; }
__device__ inline int warp_column() { return threadIdx.x / kWarpSize % 2; }

// Blocks that follow each other take turns through so many rows of tiles, then go to the next columns: what runs at a time
// then shares both operands in the second-level cache.
constexpr int kRowTilesTogether = 8;

struct TilePlace {
    int row, column;
};

__device__ inline TilePlace place_of(unsigned block, int row_tiles, int column_tiles) {
    const int first = static_cast<int>(block / (kRowTilesTogether * column_tiles)) * kRowTilesTogether;
    const int in_group = static_cast<int>(block) - first * column_tiles;
    const int together = min(kRowTilesTogether, row_tiles - first);
    return {first + in_group % together, in_group / together};
}

// 16-bit elements on tensor cores. Every sum runs over the depth in the same steps of 16, whatever the tile.
template <class Scalar, int kRowsOfTile, template <class, int> class LeftLayout,
          template <class, int> class RightLayout>
class Multiply {
    static constexpr int kRowBlocks = kRowsOfTile / 2 / 16, kBlocks = kWarpColumns / 8;  // of a warp

public:
    static constexpr int kTileRows = kRowsOfTile;
    static constexpr int kRows = 2 * kRowBlocks, kRuns = 2, kLanesOfRow = 4;
    using Left = LeftLayout<Scalar, kTileRows>;
    using Right = RightLayout<Scalar, kTileColumns>;

    // The column of the tile that lies at place `outer` of a right operand along the depth.
    __device__ static int column_at(int outer) { return outer; }

    __device__ void operator()(const unsigned char* left, const unsigned char* right) {
#pragma unroll
        for (int k = 0; k < kStep<Scalar>; k += 16) {
            uint32_t a[kRowBlocks][4];
#pragma unroll
            for (int i = 0; i < kRowBlocks; ++i) load_left(left, kTileRows / 2 * warp_row() + 16 * i, k, a[i]);
#pragma unroll
            for (int j = 0; j < kBlocks; j += 2) {
                uint32_t b[2][2];
                load_right(right, kWarpColumns * warp_column() + 8 * j, k, b);
#pragma unroll
                for (int i = 0; i < kRowBlocks; ++i) {
                    multiply_add<Scalar>(sums_[i][j], a[i], b[0]);
                    multiply_add<Scalar>(sums_[i][j + 1], a[i], b[1]);
                }
            }
        }
    }

    // A lane holds two columns of each of four blocks of 8; afterwards it holds one whole block, its run.
    __device__ void finish() {
        const int lane = lane_id();
#pragma unroll
        for (int i = 0; i < kRowBlocks; ++i) {
#pragma unroll
            for (int run = 0; run < kRuns; ++run) {
#pragma unroll
                for (int value = 0; value < 4; ++value) {
                    float(*blocks)[4] = sums_[i] + 4 * run;
                    exchange(blocks[0][value], blocks[1][value], lane & 1, 1);
                    exchange(blocks[2][value], blocks[3][value], lane & 1, 1);
                    exchange(blocks[0][value], blocks[2][value], lane & 2, 2);
                    exchange(blocks[1][value], blocks[3][value], lane & 2, 2);
                }
            }
        }
    }

    __device__ static int row(int i) { return kTileRows / 2 * warp_row() + 16 * (i / 2) + 8 * (i % 2) + lane_id() / 4; }
    // Of the warp's columns, the first of a run.
    __device__ static int column(int run) { return kRunColumns * run + 8 * (lane_id() % 4); }
    __device__ float value(int i, int run, int column) const {
        return sums_[i / 2][4 * run + column / 2][2 * (i % 2) + column % 2];
    }

private:
    static constexpr bool kLeftAlong = std::is_same_v<Left, AlongDepth<Scalar, kTileRows>>;
    static constexpr bool kRightAlong = std::is_same_v<Right, AlongDepth<Scalar, kTileColumns>>;

    // Rows [row, row + 16), depth [k, k + 16), as multiply_add takes them.
    __device__ static void load_left(const unsigned char* left, int row, int k, uint32_t (&a)[4]) {
        const int lane = lane_id();
        if constexpr (kLeftAlong) {
            load_matrices(a, left + Left::offset(row + lane % 16, k / 8 + lane / 16));
        } else {
            load_transposed_matrices(a, left + Left::offset(k + lane / 16 * 8 + lane % 8, row / 8 + lane / 8 % 2));
        }
    }

    // Columns [column, column + 16): two blocks.
    __device__ static void load_right(const unsigned char* right, int column, int k, uint32_t (&b)[2][2]) {
        const int lane = lane_id();
        uint32_t words[4];
        if constexpr (kRightAlong) {
            load_matrices(words, right + Right::offset(column + lane / 16 * 8 + lane % 8, k / 8 + lane / 8 % 2));
        } else {
            load_transposed_matrices(words, right + Right::offset(k + lane % 16, column / 8 + lane / 16));
        }
        b[0][0] = words[0], b[0][1] = words[1], b[1][0] = words[2], b[1][1] = words[3];
    }

    // The lane without the bit gives its second value for the first of the lane with it.
    __device__ static void exchange(float& first, float& second, bool bit, int lanes) {
        const float received = __shfl_xor_sync(kWholeWarp, bit ? first : second, lanes);
        if (bit) {
            first = received;
        } else {
            second = received;
        }
    }

    float sums_[kRowBlocks][kBlocks][4] = {};
};

// float32 in true float32: a thread multiplies 8 rows with 8 columns.
template <template <class, int> class LeftLayout, template <class, int> class RightLayout>
class Multiply<float, 64, LeftLayout, RightLayout> {
public:
    static constexpr int kTileRows = 64;
    static constexpr int kRows = 8, kRuns = 2, kLanesOfRow = 8;
    using Left = LeftLayout<float, kTileRows>;
    using Right = RightLayout<float, kTileColumns>;

    // Four consecutive columns of a thread lie 8 places apart, so that 8 lanes read 8 consecutive places.
    __device__ static int column_at(int outer) { return outer / 32 * 32 + outer % 8 * 4 + outer % 32 / 8; }

    __device__ void operator()(const unsigned char* left, const unsigned char* right) {
#pragma unroll
        for (int chunk = 0; chunk < 4; ++chunk) {
            float a[kRows][4];  // [row][depth]
            load_left(left, chunk, a);
#pragma unroll
            for (int half = 0; half < kRuns; ++half) {
                float b[4][4];  // [column][depth]
                load_right(right, chunk, half, b);
#pragma unroll
                for (int k = 0; k < 4; ++k) {
#pragma unroll
                    for (int i = 0; i < kRows; ++i) {
#pragma unroll
                        for (int j = 0; j < 4; ++j) sums_[i][4 * half + j] += a[i][k] * b[j][k];
                    }
                }
            }
        }
    }

    __device__ void finish() {}

    __device__ static int row(int i) {
        return kLeftAlong ? row_thread() + kRowThreads * i : 4 * row_thread() + i % 4 + 4 * kRowThreads * (i / 4);
    }
    __device__ static int column(int run) { return kRunColumns * run + 4 * (lane_id() % 8); }
    __device__ float value(int i, int run, int column) const { return sums_[i][4 * run + column]; }

private:
    static constexpr int kRowThreads = kTileRows / kRows;
    static constexpr bool kLeftAlong = std::is_same_v<Left, AlongDepth<float, kTileRows>>;
    static constexpr bool kRightAlong = std::is_same_v<Right, AlongDepth<float, kTileColumns>>;

    __device__ static int row_thread() { return 4 * warp_row() + lane_id() / 8; }

    __device__ static float4 load(const unsigned char* from) { return *reinterpret_cast<const float4*>(from); }

    __device__ static void load_left(const unsigned char* left, int chunk, float (&a)[kRows][4]) {
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
            if constexpr (kLeftAlong) {
                const float4 depths = load(left + Left::offset(row(i), chunk));
                a[i][0] = depths.x, a[i][1] = depths.y, a[i][2] = depths.z, a[i][3] = depths.w;
            } else {
                const int k = i % 4, first = i / 4 * 4;
                const float4 rows = load(left + Left::offset(4 * chunk + k, row(first) / 4));
                a[first][k] = rows.x, a[first + 1][k] = rows.y, a[first + 2][k] = rows.z, a[first + 3][k] = rows.w;
            }
        }
    }

    __device__ static void load_right(const unsigned char* right, int chunk, int half, float (&b)[4][4]) {
        const int first = kWarpColumns * warp_column() + kRunColumns * half, lane = lane_id() % 8;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if constexpr (kRightAlong) {
                const float4 depths = load(right + Right::offset(first + 8 * i + lane, chunk));
                b[i][0] = depths.x, b[i][1] = depths.y, b[i][2] = depths.z, b[i][3] = depths.w;
            } else {
                const float4 columns = load(right + Right::offset(4 * chunk + i, first / 4 + lane));
                b[0][i] = columns.x, b[1][i] = columns.y, b[2][i] = columns.z, b[3][i] = columns.w;
            }
        }
    }

    float sums_[kRows][8] = {};
};

// The shared memory of a block.
template <class Sums>
constexpr int kSharedBytes = kStages * (Sums::Left::kBytes + Sums::Right::kBytes);

}  // namespace r1kernels::moe
