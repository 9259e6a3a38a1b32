// The portable grouped products: a tile of rows of one expert times a tile of the columns of its weight, what becomes of
// the sums (see R1kernelsMoeEpilogue), the gradient of the weights, and how they are launched.
//
// Notation: x token, (g, u) = pre-activation, A = act(g) u, s routing weight, dO gradient of the output,
//     dA' = dO W2        dS = <dA', A>        dg = s dA' u act'(g)        du = s dA' act(g)
#pragma once

#include "common/launch.cuh"
#include "moe/cuda_gate.cuh"
#include "moe/cuda_multiply.cuh"

namespace r1kernels::moe {

// The kinds of products over rows, each compiled in a file of its own.
int launch_transposed(const R1kernelsMoeProduct& product, void* stream);
int launch_up(const R1kernelsMoeProduct& product, void* stream);
int launch_plain(const R1kernelsMoeProduct& product, void* stream);
int launch_gate_backward(const R1kernelsMoeProduct& product, void* stream);

// --- the sums of a tile of rows ---

template <class Scalar>
__device__ inline float rounded(float value) {
    return to_float(from_float<Scalar>(value));
}

template <class Scalar>
constexpr bool kNarrow = !std::is_same_v<Scalar, float>;

// Row `row` of a matrix, or null of none.
template <class Scalar>
__device__ inline Scalar* row_of(void* matrix, int64_t row, int64_t length) {
    return matrix ? static_cast<Scalar*>(matrix) + row * length : nullptr;
}

// How many of the columns that a thread holds lie side by side in a tile; of an UP product the second half is up.
template <R1kernelsMoeEpilogue kEpilogue>
constexpr int kColumnsOfTile = kEpilogue == R1KERNELS_MOE_UP ? kTileColumns / 2 : kTileColumns;

// The sums of row i of a tile, times `scale`, to a row of `columns` elements; by reference, for a register less.
template <class Scalar, class Sums>
__device__ inline void store_row(Scalar* out, const int64_t& columns, int first_column, const Sums& sums, int i,
                                 float scale = 1.0f) {
#pragma unroll
    for (int run = 0; run < Sums::kRuns; ++run) {
        Scalar values[kChunk<Scalar>];
#pragma unroll
        for (int j = 0; j < kChunk<Scalar>; ++j) values[j] = from_float<Scalar>(scale * sums.value(i, run, j));
        store_chunk(out, first_column + kWarpColumns * warp_column() + Sums::column(run),
                    static_cast<int>(columns), values);
    }
}

template <class Scalar, class Sums>
__device__ inline void store(const R1kernelsMoeProduct& product, const R1kernelsMoeTile& tile, int first_column,
                             const Sums& sums) {
#pragma unroll
    for (int i = 0; i < Sums::kRows; ++i) {
        if (Sums::row(i) >= tile.end - tile.first) continue;
        const int64_t row = tile.first + Sums::row(i);
        Scalar* out = row_of<Scalar>(product.out, row, product.columns);
        store_row<Scalar>(out, product.columns, first_column, sums, i, product.scale);
    }
}

// Run 0 of a thread is gate, run 1 up, at the same columns of I.
template <class Scalar, class Sums>
__device__ inline void store_up(const R1kernelsMoeProduct& product, const R1kernelsMoeTile& tile, int first_column,
                                const Sums& sums) {
    const int size = static_cast<int>(product.columns / 2);
    const int column = first_column + kRunColumns * warp_column() + Sums::column(0);
#pragma unroll
    for (int i = 0; i < Sums::kRows; ++i) {
        if (Sums::row(i) >= tile.end - tile.first) continue;
        const int64_t row = tile.first + Sums::row(i);
        Scalar gate[kChunk<Scalar>], up[kChunk<Scalar>], activated[kChunk<Scalar>];
#pragma unroll
        for (int j = 0; j < kChunk<Scalar>; ++j) {
            gate[j] = from_float<Scalar>(sums.value(i, 0, j));
            up[j] = from_float<Scalar>(sums.value(i, 1, j));
            const Gate of = gate_of<kNarrow<Scalar>>(product.gating, to_float(gate[j]), to_float(up[j]));
            activated[j] = from_float<Scalar>(of.value);
        }
        if (Scalar* kept = row_of<Scalar>(product.out, row, product.columns)) {
            store_chunk(kept, column, size, gate);
            store_chunk(kept + size, column, size, up);
        }
        if (Scalar* to = row_of<Scalar>(product.activated, row, size)) store_chunk(to, column, size, activated);
    }
}

template <class Scalar, class Sums>
__device__ inline void store_gate_backward(const R1kernelsMoeProduct& product, const R1kernelsMoeTile& tile,
                                           int first_column, const Sums& sums) {
    const int size = static_cast<int>(product.columns);
    const int warp_first = first_column + kWarpColumns * warp_column();
#pragma unroll
    for (int i = 0; i < Sums::kRows; ++i) {
        const bool exists = Sums::row(i) < tile.end - tile.first;
        float product_with_a = 0.0f;
        if (exists) {
            const int64_t row = tile.first + Sums::row(i);
            const Scalar* pre = static_cast<const Scalar*>(product.pre_activation) + row * 2 * size;
            Scalar* out = row_of<Scalar>(product.out, row, 2 * int64_t{size});
            Scalar* activated = row_of<Scalar>(product.activated, row, size);
            const float s = product.scales[product.order[row]];
#pragma unroll
            for (int run = 0; run < Sums::kRuns; ++run) {
                const int column = warp_first + Sums::column(run);
                const Chunk<Scalar> gates = load_chunk(pre, column, size), ups = load_chunk(pre + size, column, size);
                Scalar scaled[kChunk<Scalar>], grad_gate[kChunk<Scalar>], grad_up[kChunk<Scalar>];
#pragma unroll
                for (int j = 0; j < kChunk<Scalar>; ++j) {
                    const Gate gate = gate_of<kNarrow<Scalar>>(product.gating, gates[j], ups[j]);
                    const float a = rounded<Scalar>(gate.value), da = sums.value(i, run, j);
                    if (column + j < size) product_with_a += da * a;
                    scaled[j] = from_float<Scalar>(s * a);
                    grad_gate[j] = from_float<Scalar>(s * da * gate.by_gate);
                    grad_up[j] = from_float<Scalar>(s * da * gate.by_up);
                }
                if (activated) store_chunk(activated, column, size, scaled);
                if (out) {
                    store_chunk(out, column, size, grad_gate);
                    store_chunk(out + size, column, size, grad_up);
                }
            }
        }
        if (product.partials == nullptr) continue;
#pragma unroll
        for (int lanes = 1; lanes < Sums::kLanesOfRow; lanes *= 2) {
            product_with_a += __shfl_xor_sync(kWholeWarp, product_with_a, lanes);
        }
        if (exists && lane_id() % Sums::kLanesOfRow == 0 && warp_first < size) {
            const int64_t part = warp_first / R1KERNELS_MOE_PART_COLUMNS;
            product.partials[part * product.schedule.rows + tile.first + Sums::row(i)] = product_with_a;
        }
    }
}

// --- products over rows ---

template <class Scalar, int kTileRows, bool kTransposed>
using RowsMultiply = std::conditional_t<kTransposed, Multiply<Scalar, kTileRows, AlongDepth, AlongDepth>,
                                        Multiply<Scalar, kTileRows, AlongDepth, AcrossDepth>>;

// What is multiplied: rows of `depth` elements and the weight (E, columns, depth) or (E, depth, columns).
struct Operands {
    R1kernelsMoeRows x;
    const void* weights;
    int64_t depth;
};

// The sums run over two parts: the product itself, and what is added to it.
__device__ inline Operands operands_of(const R1kernelsMoeProduct& product, int part) {
    if (part == 0) return {product.x, product.weight, product.depth};
    return {{product.low.rows, nullptr, 1}, product.low.weight, product.low.rank};
}

// Copies the weight of one expert, from the tile's first column on.
template <class Scalar, class Sums, bool kTransposed, R1kernelsMoeEpilogue kEpilogue>
__device__ inline auto copy_of_weight(const Operands& operands, int64_t columns, int expert, int first_column) {
    const int64_t depth = operands.depth;
    const Scalar* weight = static_cast<const Scalar*>(operands.weights) + expert * columns * depth;
    if constexpr (kTransposed) {
        return CopyAlongDepth<Scalar, kTileColumns>(weight, depth, [=](int outer) -> int64_t {
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
        return CopyAcrossDepth<Scalar, kTileColumns, false>({weight, nullptr, 1}, columns, first_column, 0,
                                                            static_cast<int>(depth));
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
    const int parts = nobodys ? 0 : product.low.rows ? 2 : 1;
    Sums sums;
#pragma unroll 1
    for (int part = 0; part < parts; ++part) {
        const Operands operands = operands_of(product, part);
        const R1kernelsMoeRows& x = operands.x;
        CopyAlongDepth<Scalar, kTileRows> copy_rows(x.data, operands.depth, [&](int outer) -> int64_t {
            const int row = tile.first + min(outer, tile.end - tile.first - 1);
            return x.index ? x.index[row] / x.divisor : row;
        });
        auto copy_weight =
            copy_of_weight<Scalar, Sums, kTransposed, kEpilogue>(operands, product.columns, tile.expert, first_column);
        if (part > 0) __syncthreads();  // the stages of the part before have been read
        run_steps(steps_of<Scalar>(operands.depth), shared_memory, copy_rows, copy_weight, sums);
    }
    sums.finish();
    if constexpr (kEpilogue == R1KERNELS_MOE_STORE) store<Scalar>(product, tile, first_column, sums);
    if constexpr (kEpilogue == R1KERNELS_MOE_UP) store_up<Scalar>(product, tile, first_column, sums);
    if constexpr (kEpilogue == R1KERNELS_MOE_GATE_BACKWARD) {
        store_gate_backward<Scalar>(product, tile, first_column, sums);
    }
}

// --- the gradient of the weights: for each expert a product whose depth is its rows ---

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
        store_row<Scalar>(out, product.n, first_column, sums, i);
    }
}

// --- launching ---

// The least that a block of any architecture from sm_80 on gets: sm_86, 89 and 120.
constexpr int kMostSharedBytes = 99 << 10;

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
